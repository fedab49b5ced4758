// SwiGLU on one row, shared by the experts and the shared expert. pre [2F] interleaves gate (2f) and up (2f + 1).
#ifndef TESSERA_SWIGLU_H
#define TESSERA_SWIGLU_H

#include "kernels/cpu/cpu.h"

// a [F] = silu(gate) * up.
static inline void swiglu_row(const real *pre, int64_t F, real *a) {
#pragma omp simd
  for (int64_t f = 0; f < F; f++) {
    real gate = pre[2 * f], up = pre[2 * f + 1];
    a[f] = gate * real_sigmoid(gate) * up;
  }
}

// From da [F], the gradient of the activation before it was weighted by w: wa [F] = w * activation, dpre [2F] =
// gradient of pre; returns <da, activation>, the gradient of w. wa may be da itself.
static inline real swiglu_row_backward(const real *pre, const real *da, real w, int64_t F, real *dpre, real *wa) {
  real dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t f = 0; f < F; f++) {
    real gate = pre[2 * f], up = pre[2 * f + 1], d = da[f];
    real sigmoid = real_sigmoid(gate), silu = gate * sigmoid;
    dot += d * silu * up;
    wa[f] = w * silu * up;
    dpre[2 * f] = w * d * up * (sigmoid + silu * (1 - sigmoid));
    dpre[2 * f + 1] = w * d * silu;
  }
  return dot;
}
#endif
