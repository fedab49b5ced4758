// The two kinds of token that a model has parameters of its own for, in the order of every array [MODALITIES].
#ifndef TESSERA_MODALITY_H
#define TESSERA_MODALITY_H

enum { TEXT = 0, IMAGE = 1, MODALITIES = 2 };
#endif
