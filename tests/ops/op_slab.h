// A slab of parameters of every length, with gaps between them that no op may touch.
#ifndef TESSERA_OP_SLAB_H
#define TESSERA_OP_SLAB_H

#include "kernels/exact.h"
#include "tests/ops/op_case.h"

enum { PARAMS = 9 };
typedef struct Slab {
  ParamSpan span[PARAMS];
  int64_t size;
  OpArgs args; // of the ops on parameters
} Slab;
void slab_make(OpCase *c, Slab *s);
// The parameter that element i belongs to, or -1 in a gap.
int slab_param(const Slab *s, int64_t i);
// A tensor [size], NaN in the gaps.
real *slab_random(OpCase *c, const Slab *s, double std);
// GRAD_SQUARES and GRAD_DECIDE.
void slab_norm(const OpCase *c, OpArgs args, const real *grads, const Metrics *metrics, const StepScalars *scalars,
               UpdateStatus *status, double *squares); // [n, EXACT_WORDS]
#endif
