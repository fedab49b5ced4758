// What happens to the parameters between passes, as programs.
#ifndef TESSERA_UPDATE_H
#define TESSERA_UPDATE_H

#include "model/model.h"

// The update: squares of the gradients that are on the device, the step's decision, AdamW, and with `ema` the moving
// average. What lies on the host passes through the arena.
Program *update_record(const Model *model, int ema);
// The update in two halves: squares and decision; and then all the rest, after which weights that are updated in shares
// come together.
Program *decision_record(const Model *model);
Program *apply_record(const Model *model, int ema);
// What apply_record does with a bucket, all of whose state is on the device.
void bucket_update(Program *p, const Model *model, const ParamBucket *b, int ema);
// Where every process updates its share of the weights: everybody gets all of them, as from the first micro-step of the
// next step, which begins with that.
Program *gather_record(const Model *model);
// Hashes of all gradients, of which shared ones are this process's shares, into SPACE_PARAM_SUMS (SUMS_OF_BITS).
Program *hash_record(const Model *model);

// Puts the EMA in the place of the weights and saves the weights in the gradients' slab, on the host where gradients
// leave; the program with `enter` 0 restores them, bit for bit: of weights updated in shares this process's, as after
// an update. Only between steps: a step's first micro-step overwrites the gradients.
Program *ema_record(const Model *model, int enter);
#endif
