// The model: records its forward and backward pass as programs.
#ifndef TESSERA_TRANSFORMER_H
#define TESSERA_TRANSFORMER_H

#include "model/model.h"

// Records, schedules and places the program for packs of `slots` tokens and `segments` modulation rows. `policy` is
// borrowed (NULL: keep).
ModelProgram transformer_record(const Model *model, Mode mode, int slots, int segments, const PolicyTable *policy);

// Training FLOPs of a step as the field counts them for MFU: 6 x active parameters per token + 12 L H D per allowed
// (query, key) pair; recomputation earns nothing.
double transformer_flops(const Config *c, double text_tokens, double image_tokens, double pairs);
#endif
