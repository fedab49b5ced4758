// A tokenizer that is learnt from the data of a run.
#ifndef TESSERA_TOKENIZER_SAMPLES_H
#define TESSERA_TOKENIZER_SAMPLES_H

#include "data/source.h"
#include "data/tokenizer.h"

// tokenizer_train on every text of the training samples of all sources: those that are not in the held-out part.
Tokenizer *tokenizer_train_samples(Source *const *source, int sources, double held_out, int vocab, Error *err);
#endif
