// Quotients of numbers from 0 to 2^31 - 1 by one that is known before the loop, by a product and a shift. Shared by
// host code and CUDA kernels.
#ifndef TESSERA_DIVIDE_H
#define TESSERA_DIVIDE_H

#include <stdint.h>

#ifdef __CUDACC__
#define DIVIDE_FN static __host__ __device__ inline
#else
#define DIVIDE_FN static inline
#endif

typedef struct Divisor {
  uint32_t factor;
  int shift;
} Divisor;

// by: 1 to 2^31 - 1. With 2^s >= by, 2^(31 + s) / by rounded up fits in 32 bits. What the rounding adds to a quotient
// is below 2^31 / 2^(31 + s) <= 1 / by: too little to reach the next whole number.
DIVIDE_FN Divisor divisor_of(uint32_t by) {
  Divisor d = {0, 31};
  while (1ull << (d.shift - 31) < by) d.shift++;
  d.factor = (uint32_t)(((1ull << d.shift) + by - 1) / by);
  return d;
}

// d by its address: given by value, gathering kernels were scheduled otherwise than with the two numbers spelled out.
DIVIDE_FN int divide(int i, const Divisor *d) {
  return (int)((uint64_t)(uint32_t)i * d->factor >> d->shift);
}
#endif
