#include "tests/ops/op_slab.h"

void slab_make(OpCase *c, Slab *s) {
  const int64_t counts[PARAMS] = {0, 1, 5, 64, 16384, 16385, 40000, 1000, 33};
  s->size = 3;
  for (int p = 0; p < PARAMS; p++) {
    s->span[p] = (ParamSpan){.offset = s->size, .count = counts[p], .decay = p & 1};
    s->size += counts[p] + case_int(c, 1, 20);
  }
  s->args = (OpArgs){.params = {.spans = s->span, .n = PARAMS, .end = s->size}};
}

int slab_param(const Slab *s, int64_t i) {
  for (int p = 0; p < PARAMS; p++)
    if (i >= s->span[p].offset && i < s->span[p].offset + s->span[p].count) return p;
  return -1;
}

real *slab_random(OpCase *c, const Slab *s, double std) {
  real *x = case_random(c, s->size, std);
  for (int64_t i = 0; i < s->size; i++)
    if (slab_param(s, i) < 0) x[i] = (real)NAN;
  return x;
}

void slab_norm(const OpCase *c, OpArgs args, const real *grads, const Metrics *metrics, const StepScalars *scalars,
               UpdateStatus *status, double *squares) {
  op_run(c, OP_GRAD_SQUARES, args, OP_IN(grads), OP_OUT(squares));
  op_run(c, OP_GRAD_DECIDE, args, OP_IN(squares, metrics, scalars), OP_OUT(status));
}
