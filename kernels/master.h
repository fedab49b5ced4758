// The fp32 master of a weight, kept as the bf16 weight that the products read plus the 16 bits it lacks.
//
// The weight is the master rounded to bf16, so the step needs no third copy, and 4 bytes hold what a bf16 weight beside
// an fp32 master would hold in 6. Rounding is half up in magnitude: it adds 0x8000 to the master's bits, a carry out of
// the lower half that the lower half itself still shows (its top bit), so the pair is undone exactly. Nearest-even, the
// rounding of ordinary casts, would need one bit more to undo; the two differ only at exact halves.
#ifndef TESSERA_MASTER_H
#define TESSERA_MASTER_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MASTER_FN static __host__ __device__ inline
#else
#define MASTER_FN static inline
#endif

// The master that (weight: bf16 bits, rest) stand for.
MASTER_FN float master_join(uint16_t weight, uint16_t rest) {
  uint32_t bits = ((uint32_t)weight - (rest >= 0x8000u)) << 16 | rest;
  float master;
  memcpy(&master, &bits, sizeof master);
  return master;
}

// master_join's inverse: exact for every number. A master above the largest bf16 by half a step or more has the weight
// inf, as it would in any rounding to nearest, and is still recovered; any NaN becomes the quiet one, since adding
// 0x8000 to some NaN patterns would make the weight look like a number.
MASTER_FN void master_split(float master, uint16_t *weight, uint16_t *rest) {
  uint32_t bits;
  memcpy(&bits, &master, sizeof bits);
  if (master != master) bits = 0x7fc00000u;
  *weight = (uint16_t)((bits + 0x8000u) >> 16);
  *rest = (uint16_t)bits;
}

// Masters [n] of weights and their rests (NULL: all 0).
static inline void masters_join(const uint16_t *weight, const uint16_t *rest, int64_t n, float *master) {
  if (rest)
    for (int64_t i = 0; i < n; i++) master[i] = master_join(weight[i], rest[i]);
  else
    for (int64_t i = 0; i < n; i++) master[i] = master_join(weight[i], 0);
}
#endif
