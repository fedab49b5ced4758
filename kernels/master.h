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

// The master that (weight: bf16 bits, remainder) stand for.
MASTER_FN float master_join(uint16_t weight, uint16_t remainder) {
  uint32_t bits = ((uint32_t)weight - (remainder >= 0x8000u)) << 16 | remainder;
  float master;
  memcpy(&master, &bits, sizeof master);
  return master;
}

// master_join's inverse: exact for every number. A master above the largest bf16 by half a step or more has the weight
// inf, as it would in any rounding to nearest, and is still recovered; any NaN becomes the quiet one, since adding
// 0x8000 to some NaN patterns would make the weight look like a number.
MASTER_FN void master_split(float master, uint16_t *weight, uint16_t *remainder) {
  uint32_t bits;
  memcpy(&bits, &master, sizeof bits);
  if (master != master) bits = 0x7fc00000u;
  *weight = (uint16_t)((bits + 0x8000u) >> 16);
  *remainder = (uint16_t)bits;
}

// Backend.weights_read and weights_write of a backend that stores weights so.
#ifdef __cplusplus
extern "C" {
#endif
void masters_join(const void *weights, const void *remainders, int64_t n, void *masters);
void masters_split(const void *masters, int64_t n, void *weights, void *remainders);
#ifdef __cplusplus
}
#endif
#endif
