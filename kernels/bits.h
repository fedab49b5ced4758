// A hash of tensors that many threads can form in any order: every element's bits are mixed with its index, and the sum
// modulo 2^64 is the same whatever the order. One changed bit changes the sum with certainty, since the mix is a
// bijection of the bits for each index.
#ifndef TESSERA_BITS_H
#define TESSERA_BITS_H

#include <stdint.h>

#ifdef __CUDACC__
#define BITS_FN static __host__ __device__ inline
#else
#define BITS_FN static inline
#endif

// The finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), over
// the element's bits and the golden-ratio step of its index.
BITS_FN uint64_t bits_mix(uint64_t bits, int64_t index) {
  uint64_t z = bits + 0x9E3779B97F4A7C15ull * ((uint64_t)index + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
#endif
