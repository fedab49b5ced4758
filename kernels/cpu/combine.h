// The sum over a token's experts, for the ops that go on with it.
#ifndef TESSERA_CPU_COMBINE_H
#define TESSERA_CPU_COMBINE_H

#include "kernels/cpu/cpu.h"

typedef struct Combine {
  const real *y[MODALITIES]; // [slots, C] views
  const real *weights;       // [T, Kmax] or NULL
  const real *add;           // [T, C] or NULL
  const int32_t *slot;       // [T, Kmax]
  int64_t C, kmax;
  int K[MODALITIES], n_text;
} Combine;

// From a call whose first operands are EXPERT_COMBINE's.
Combine combine_of(const KernelCall *c);
// out [n] = columns [first, first + n) of used row r of the sum: the same bits however a row is cut.
void combine_part(const Combine *c, int64_t r, int64_t first, int64_t n, real *out);
#endif
