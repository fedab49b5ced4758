// The model: records its forward and backward pass as programs.
#ifndef TESSERA_TRANSFORMER_H
#define TESSERA_TRANSFORMER_H

#include "model/model.h"

// Records, schedules and places the program for packs of `slots` tokens and `segments` modulation rows. `policy` is
// borrowed (NULL: keep).
ModelProgram transformer_record(const Model *model, Mode mode, int slots, int segments, const PolicyTable *policy);

// The update: gradient norm and decision, AdamW, and with `ema` the moving average.
Program *update_record(const Model *model, int ema);
// GRAD_HASH of all gradients; *hash is its output [params.n].
Program *hash_record(const Model *model, TensorId *hash);

// Puts the EMA in the place of the weights, which lie aside in the gradients' slab until the program with `enter` 0
// puts them back, bit for bit. Only between steps: a step's first micro-step overwrites the gradients.
Program *ema_record(const Model *model, int enter);

// Training FLOPs of a step as the field counts them for MFU: 6 x active parameters per token + 12 L H D per allowed
// (query, key) pair; recomputation earns nothing.
double transformer_flops(const Config *c, double text_tokens, double image_tokens, double pairs);
#endif
