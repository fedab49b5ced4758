// What follows from the op table of kernels.h.
#ifndef TESSERA_OPS_H
#define TESSERA_OPS_H

#include "kernels/kernels.h"

// Operands of an op kind, from its table entry: 'name', 'name?' optional, 'name+' accumulating.
typedef struct Operand {
  char name[24];
  int optional, accumulates;
} Operand;
typedef struct Operands {
  int n_in, n_out;
  Operand in[OP_MAX_IN], out[OP_MAX_OUT];
} Operands;
Operands op_operands(OpKind kind);

// Reads the live pack (its extents at least).
int op_uses_batch(OpKind kind);
// Output `out` of such an op is added to rather than overwritten. Of outputs with '+': metrics, weights, m, v and ema
// always; the others as `accumulate` of args says.
int op_accumulates(OpKind kind, int out, const OpArgs *args);
#endif
