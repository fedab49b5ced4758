// Warpgroup products (sm_90a) of the tiles of attention.h, D >= 64, for the attention kernels for Hopper: 64 rows of
// one tile against rows of another, and probabilities in registers against a tile.
#ifndef TESSERA_ATTENTION_WGMMA_H
#define TESSERA_ATTENTION_WGMMA_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/wgmma.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Starts score [64, 8 n] = x y^T: 64 rows of a tile of x_rows at `x`, all rows of the tile at `y`. One group.
template <int D, int x_rows, int n>
static __device__ inline void start_scores(float (&score)[n][4], const bf16 *x, const bf16 *y) {
  static_assert(D % 64 == 0 && x_rows % 64 == 0, "tiles are blocks of 64 columns in the 128-byte swizzle");
  uint32_t a = shared_address(x), b = shared_address(y);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; k++)
    wgmma_score(score, wgmma_descriptor(a + (k >> 2) * x_rows * 128 + (k & 3) * 32, 0),
                wgmma_descriptor(b + (k >> 2) * 8 * n * 128 + (k & 3) * 32, 0), k > 0);
  wgmma_commit();
}

// Starts sum [64, D] += p y: p [64, 8 n] in bf16 pairs, of which two neighbouring fragments are an A fragment; y: a
// tile of 8 n rows. One group.
template <int D, int n>
static __device__ inline void start_sum(float (&sum)[D / 8][4], const uint32_t (&p)[n][2], const bf16 *y) {
  uint32_t b = shared_address(y);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < n / 2; k++) wgmma_add(sum, p[2 * k], wgmma_descriptor(b + k * 2048, 8 * n * 128));
  wgmma_commit();
}

// Starts product [64, 64] = x^T y: x 64 columns of a tile of `rows`, y 64 columns of another, summed over their rows.
// One group.
template <int rows> static __device__ inline void start_product(float (&product)[8][4], const bf16 *x, const bf16 *y) {
  uint32_t a = shared_address(x), b = shared_address(y);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < rows / 16; k++)
    wgmma_score<1, 1>(product, wgmma_descriptor(a + k * 2048, rows * 128), wgmma_descriptor(b + k * 2048, rows * 128),
                      k > 0);
  wgmma_commit();
}
#endif
#endif
