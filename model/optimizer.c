#include "model/optimizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

double optimizer_lr(const Config *c, int64_t step) {
  double N = c->train.steps, n = (double)step, lr = c->train.lr;
  if (c->train.warmup_steps > 0) lr *= fmin(1, (n + 1) / c->train.warmup_steps);
  if (c->train.decay_fraction > 0) lr *= fmax(0, fmin(1, (N - n) / (c->train.decay_fraction * N)));
  return lr;
}

double optimizer_ema_decay(const Config *c, int64_t applied) {
  double n = (double)applied;
  return pow(fmin(c->train.ema, (1 + n) / (10 + n)), c->train.ema_every);
}

int optimizer_ema_due(const Config *c, int64_t step) {
  return c->train.ema > 0 && (step + 1) % c->train.ema_every == 0;
}

StepScalars optimizer_scalars(const Config *c, const OptimizerState *s, int64_t step) {
  double t = (double)(s->applied + 1);
  return (StepScalars){.lr = optimizer_lr(c, step),
                       .beta1 = c->train.beta1,
                       .beta2 = c->train.beta2,
                       .eps = 1e-8,
                       .weight_decay = c->train.weight_decay,
                       .clip = c->train.clip,
                       .bias1 = 1 - pow(c->train.beta1, t),
                       .bias2 = 1 - pow(c->train.beta2, t),
                       .ema_decay = optimizer_ema_decay(c, s->applied),
                       .norm_limit = optimizer_norm_limit(c, s),
                       .step = (double)step};
}

double optimizer_norm_limit(const Config *c, const OptimizerState *s) {
  double norms[SPIKE_WINDOW];
  if (c->train.spike == 0 || s->norms < SPIKE_LEAST) return 0;
  memcpy(norms, s->norm, (size_t)s->norms * sizeof *norms);
  return c->train.spike * median_f64(norms, s->norms);
}

static void norm_add(OptimizerState *s, double norm) {
  if (s->norms == SPIKE_WINDOW) memmove(s->norm, s->norm + 1, (size_t)--s->norms * sizeof *s->norm);
  s->norm[s->norms++] = norm;
}

int optimizer_count(const Config *c, OptimizerState *s, const UpdateStatus *status, Error *err) {
  if (!status->skip) {
    s->applied++;
    s->skipped_in_row = 0;
    if (c->train.spike > 0) norm_add(s, status->norm);
    return 0;
  }
  s->skipped++;
  s->skipped_in_row++;
  if (status->bad < 0) return s->skipped_in_row >= c->train.spike_patience;
  if (s->skipped_in_row < c->train.max_skipped) return 0;
  return error_set(err, "lower train.lr or look at the data; the newest checkpoint is from before this happened",
                   "%lld steps in a row had a non-finite loss or gradient (train.max_skipped)",
                   (long long)s->skipped_in_row);
}
