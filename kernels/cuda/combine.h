// The sum over a token's experts, as EXPERT_COMBINE (combine.cu) and the AdaLN kernels that form it themselves
// (combine_adaln.cu) take it. All give the same bits: the terms are added by ascending expert, from `add` on, by
// sum = fmaf(weight, y, sum).
#ifndef TESSERA_COMBINE_H
#define TESSERA_COMBINE_H

#include "kernels/cuda/experts.h"

typedef struct Combine {
  const bf16 *y[MODALITIES]; // [slots, C] views
  const int32_t *slot;       // [T, Kmax]
  const float *weights;      // [T, Kmax] or NULL
  const bf16 *add;           // [T, C] or NULL
  int kmax, K[MODALITIES];
} Combine;

// Of EXPERT_COMBINE's operands, as another op may have them.
static inline Combine combine_of(const KernelCall *c, const void *y, const void *route, const void *weights,
                                 const void *add) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  Combine s = {};
  s.slot = route_of(c, route).slot;
  s.weights = (const float *)weights;
  s.add = (const bf16 *)add;
  s.kmax = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    s.y[m] = (const bf16 *)y + slots_at(d, C, 1, m);
    s.K[m] = d->K[m];
  }
  return s;
}

// Of a row's modality: experts of a token, and where their rows begin.
static __device__ inline int combine_experts(const Combine &s, int64_t r, int n_text) {
  return r < n_text ? s.K[TEXT] : s.K[IMAGE];
}
static __device__ inline const bf16 *combine_slots(const Combine &s, int64_t r, int n_text) {
  return r < n_text ? s.y[TEXT] : s.y[IMAGE];
}
#endif
