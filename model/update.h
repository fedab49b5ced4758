// What happens to the parameters between passes, as programs.
#ifndef TESSERA_UPDATE_H
#define TESSERA_UPDATE_H

#include "model/model.h"

// The update: gradient norm and decision, AdamW, and with `ema` the moving average.
Program *update_record(const Model *model, int ema);
// GRAD_HASH of all gradients; *hash is its output [params.n].
Program *hash_record(const Model *model, TensorId *hash);

// Puts the EMA in the place of the weights and saves the weights in the gradients' slab; the program with `enter` 0
// restores them, bit for bit. Only between steps: a step's first micro-step overwrites the gradients.
Program *ema_record(const Model *model, int enter);
#endif
