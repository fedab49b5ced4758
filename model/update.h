// What happens to the parameters between passes, as programs.
#ifndef TESSERA_UPDATE_H
#define TESSERA_UPDATE_H

#include "model/model.h"

// The update: squares of the gradients that are on the device, the step's decision, AdamW, and with `ema` the moving
// average. What lies on the host passes through the arena. Weights that are updated in shares come together where the
// next step reads them at once (bucket_opens), beside the update of others; all others do in the next step.
Program *update_record(const Model *model, int ema);
// Sums of squares of this process's share of a bucket's gradients, as the processes have summed them. Of several, the
// last micro-step takes them, while the last buckets are being summed, and the update does not.
void bucket_squares(Program *p, const Model *model, const ParamBucket *b);
// The update in two halves: squares and decision; and then all the rest, in which all weights that are updated in
// shares come together.
Program *decision_record(const Model *model);
Program *apply_record(const Model *model, int ema);
// What apply_record does with a bucket, all of whose state is on the device.
void bucket_update(Program *p, const Model *model, const ParamBucket *b, int ema);
// Where every process updates its share of the weights: everybody gets those that have not come together in the update,
// as from the first micro-step of the next step, which begins with that.
Program *gather_record(const Model *model);
// Hashes of all gradients, of which shared ones are this process's shares, into SPACE_PARAM_SUMS (SUMS_OF_BITS).
Program *hash_record(const Model *model);

// Puts the EMA in the place of the weights and saves the weights in the gradients' slab, on the host where gradients
// leave; the program with `enter` 0 restores them, bit for bit: of weights updated in shares as much as an update
// leaves. Only between steps: a step's first micro-step overwrites the gradients.
Program *ema_record(const Model *model, int enter);
#endif
