// What the host decides about an update: learning rate, EMA decay, bias corrections, and when skipping must end.
#ifndef TESSERA_OPTIMIZER_H
#define TESSERA_OPTIMIZER_H

#include "kernels/kernels.h"
#include "model/config/config.h"

enum {
  SPIKE_WINDOW = 64, // gradient norms whose median a spike is measured against
  SPIKE_LEAST = 16   // fewer of them are not judged by
};

// What the optimiser remembers between steps beside its slabs.
typedef struct OptimizerState {
  int64_t applied; // updates applied (Adam's t)
  int64_t skipped; // steps skipped over the whole run
  int64_t skipped_in_row;
  int64_t rewinds;           // times the run was sent back to a checkpoint
  double norm[SPIKE_WINDOW]; // with train.spike: gradient norms of the updates applied last, oldest first
  int norms;                 // how many are known
} OptimizerState;

// lr(n) = lr min(1, (n+1) / warmup_steps) min(1, (N-n) / (decay_fraction N)) for step n of N: the last step still
// moves.
double optimizer_lr(const Config *c, int64_t step);
// min(d, (1+n) / (10+n)) to the power of the steps since the last EMA update. n: updates applied before this one.
double optimizer_ema_decay(const Config *c, int64_t applied);
// Whether step n ends with an EMA update.
int optimizer_ema_due(const Config *c, int64_t step);
StepScalars optimizer_scalars(const Config *c, const OptimizerState *s, int64_t step);
// The gradient norm beyond which a step is a spike: train.spike times the median of s->norm; 0 while there are too few.
double optimizer_norm_limit(const Config *c, const OptimizerState *s);
// Counts what GRAD_DECIDE decided. -1 with *err once max_skipped steps in a row were skipped, the last of them not
// finite; 1 once spike_patience were, the last of them a spike: the run should go back to its newest checkpoint.
int optimizer_count(const Config *c, OptimizerState *s, const UpdateStatus *status, Error *err);
#endif
