// Warpgroup products (sm_90a) of the tiles of attention.h, D >= 64, for attention_fwd.cu and attention_bwd.cu: 64 rows
// of one tile against 64 rows of another, and probabilities in registers against a tile.
#ifndef TESSERA_ATTENTION_WGMMA_H
#define TESSERA_ATTENTION_WGMMA_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.h"

// Only code built for sm_90a has the bodies of the kernels that use what follows; other builds that run on such a
// device were translated from older PTX.
static inline bool built_for_sm90(const void *kernel) {
  cudaFuncAttributes a;
  return cudaFuncGetAttributes(&a, kernel) == cudaSuccess && a.binaryVersion == 90 && a.ptxVersion >= 90;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ACCUMULATOR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define ACCUMULATORS(i)                                                                                                \
  ACCUMULATOR(i), ACCUMULATOR(i + 1), ACCUMULATOR(i + 2), ACCUMULATOR(i + 3), ACCUMULATOR(i + 4), ACCUMULATOR(i + 5),  \
      ACCUMULATOR(i + 6), ACCUMULATOR(i + 7)

// d [64, 64] = a [64, 16] b [64, 16]^T, added to d if `add`. Warp w of the group holds rows 16 w .., as C fragments.
static __device__ inline void wgmma_score(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "%32, %33, add, 1, 1, 0, 0;}"
               : ACCUMULATORS(0)
               : "l"(a), "l"(b), "r"(add));
}

// d [64, N] += a [64, 16] b [16, N], N = 64 or 128; a: this warp's rows as an A fragment.
static __device__ inline void wgmma_add(float (&d)[8][4], const uint32_t a[4], uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "{%32, %33, %34, %35}, %36, add, 1, 1, 1;}"
               : ACCUMULATORS(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ inline void wgmma_add(float (&d)[16][4], const uint32_t a[4], uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "{%64, %65, %66, %67}, %68, add, 1, 1, 1;}"
               : ACCUMULATORS(0), ACCUMULATORS(8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef ACCUMULATORS
#undef ACCUMULATOR

// Behind a wait: keeps the compiler from moving uses of accumulators in front of it.
template <int n> static __device__ inline void wgmma_keep(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+f"(d[i][j])::"memory");
}

// Starts score [64, 64] = x y^T: 64 rows of a tile of x_rows at `x`, all 64 rows of the tile at `y`. One group.
template <int D, int x_rows>
static __device__ inline void start_scores(float (&score)[8][4], const bf16 *x, const bf16 *y) {
  uint32_t a = shared_address(x), b = shared_address(y);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; k++)
    wgmma_score(score, wgmma_descriptor(a + (k >> 2) * x_rows * 128 + (k & 3) * 32, 0),
                wgmma_descriptor(b + (k >> 2) * 64 * 128 + (k & 3) * 32, 0), k > 0);
  wgmma_commit();
}

// Starts sum [64, D] += p y: p [64, 64] in bf16 pairs, of which two neighbouring fragments are an A fragment; y: a tile
// of 64 rows. One group.
template <int D>
static __device__ inline void start_sum(float (&sum)[D / 8][4], const uint32_t (&p)[8][2], const bf16 *y) {
  uint32_t b = shared_address(y);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_add(sum, p[2 * k], wgmma_descriptor(b + k * 2048, 64 * 128));
  wgmma_commit();
}
#endif
#endif
