// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and normals from it.
// key = seed; counter = (document draw number, low and high), stream, element block. Never step, slot or rank, so
// that packing and process count do not change a document's randomness (STREAM_MOMENTS alone is no document's). Shared
// by host code, CPU and CUDA kernels.
#ifndef TESSERA_PHILOX_H
#define TESSERA_PHILOX_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define PHILOX_FN static __host__ __device__ inline
#else
#define PHILOX_FN static inline
#endif

// Streams of random numbers a document draws from; a segment's ordinal in its document goes into bits 8 and up.
enum {
  STREAM_KIND = 0,
  STREAM_CFG_DROP = 1,
  STREAM_TIME = 2,
  STREAM_NOISE = 3,
  STREAM_EVAL = 4,
  STREAM_FLIP = 5,
  STREAM_SHUFFLE = 6,
  STREAM_SAMPLE = 7,
  STREAM_INIT = 8,
  STREAM_MOMENTS = 9
};

typedef struct Philox4 {
  uint32_t v[4];
} Philox4;

PHILOX_FN Philox4 philox4(uint64_t seed, uint64_t draw, uint32_t stream, uint32_t block) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  uint32_t c0 = (uint32_t)draw, c1 = (uint32_t)(draw >> 32), c2 = stream, c3 = block;
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  Philox4 r = {{c0, c1, c2, c3}};
  return r;
}

// Uniform in (0, 1): the middle of one of 2^23 cells, exact in fp32.
PHILOX_FN float philox_uniform(uint32_t v) {
  return ((float)(v >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

// Two independent normals from two words (Box and Muller 1958), in fp32.
PHILOX_FN void philox_normal2(uint32_t a, uint32_t b, float *n0, float *n1) {
  float radius = sqrtf(-2.0f * logf(philox_uniform(a)));
  float angle = 6.2831853071795864769f * philox_uniform(b);
  *n0 = radius * cosf(angle);
  *n1 = radius * sinf(angle);
}

// Four normals: elements 4*block .. 4*block+3 of a stream.
PHILOX_FN void philox_normal4(uint64_t seed, uint64_t draw, uint32_t stream, uint32_t block, float n[4]) {
  Philox4 r = philox4(seed, draw, stream, block);
  philox_normal2(r.v[0], r.v[1], &n[0], &n[1]);
  philox_normal2(r.v[2], r.v[3], &n[2], &n[3]);
}
#endif
