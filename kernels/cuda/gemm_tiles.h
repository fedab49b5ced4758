// What the kernels of grouped products share: the portable ones (gemm_portable.cu) and those for Hopper (gemm_sm90.cu).
// How a product is cut into tiles: gemm_walk.h.
#ifndef TESSERA_GEMM_TILES_H
#define TESSERA_GEMM_TILES_H

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_walk.h"
#include "kernels/divide.h"

// Load policies: rows of the operands in place, or those of one of them gathered by its index.
enum { GEMM_IN_PLACE, GEMM_GATHER_A, GEMM_GATHER_B };

// The products that are built: kind, load policy, epilogue. Whatever an op launches stands here, and nothing else.
#define GEMM_PRODUCTS(PRODUCT)                                                                                         \
  PRODUCT(GEMM_NT, GEMM_IN_PLACE, GemmStore)          /* LINEAR_FWD, EXPERT_DOWN_FWD, MOD_FWD */                       \
  PRODUCT(GEMM_NT, GEMM_IN_PLACE, GemmStoreSwiglu)    /* SHARED_UP_FWD */                                              \
  PRODUCT(GEMM_NT, GEMM_GATHER_A, GemmStoreFloat)     /* HEAD_CE, HEAD_LOGITS */                                       \
  PRODUCT(GEMM_NT, GEMM_GATHER_A, GemmStoreSwiglu)    /* EXPERT_UP_FWD */                                              \
  PRODUCT(GEMM_NN, GEMM_IN_PLACE, GemmStore)          /* LINEAR_DGRAD, EXPERT_UP_DGRAD, HEAD_CE */                     \
  PRODUCT(GEMM_NN, GEMM_IN_PLACE, GemmSharedBackward) /* SHARED_DOWN_BWD */                                            \
  PRODUCT(GEMM_NN, GEMM_GATHER_A, GemmSwigluBackward) /* EXPERT_DOWN_BWD */                                            \
  PRODUCT(GEMM_TN, GEMM_IN_PLACE, GemmStoreWeights)   /* LINEAR_WGRAD */                                               \
  PRODUCT(GEMM_TN, GEMM_GATHER_A, GemmStoreWeights)   /* EXPERT_DOWN_WGRAD */                                          \
  PRODUCT(GEMM_TN, GEMM_GATHER_B, GemmStoreWeights)   /* EXPERT_UP_WGRAD, HEAD_CE */

// A product as the kernels take it, but for its epilogue.
typedef struct GemmWork {
  Gemm g;
  GemmShape shape;
  float *partial; // by group, where it has more than one part: [parts, rows, N] (gemm_weights: [parts, M, N])
  Divisor index_divisor;
} GemmWork;

template <class End> struct GemmLaunch {
  GemmWork work;
  End end[MODALITIES];
};

// Launch a product of GEMM_PRODUCTS: on any card from sm_80 on, with tiles of GEMM_PORTABLE_BN columns; on Hopper, and
// whether this card and this build can.
enum { GEMM_PORTABLE_BN = 128 };
template <class End> void gemm_portable(const GemmLaunch<End> *l, int kind, cudaStream_t stream);
bool gemm_sm90_usable(void);
template <class End> void gemm_sm90(const GemmLaunch<End> *l, int kind, int load, cudaStream_t stream);

static_assert(GEMM_MAX_GROUPS >= MODALITIES * CUDA_MOST_EXPERTS, "a group an expert");
static_assert(GEMM_MAX_GROUPS <= INT16_MAX && GEMM_MAX_PARTS <= INT16_MAX, "GemmTiles has groups and parts in 16 bits");
static_assert(sizeof(GemmTiles) <= CUDA_STATIC_SHARED,
              "the kernel that adds parts has the tiles in static shared memory");

// Fills begin and count from the extents on the device, past L1, which may be older than they are where the kernel
// began early. All threads of the block take part.
static __device__ inline void gemm_counts_load(const GemmWork &l, GemmTiles *t) {
  for (int i = threadIdx.x; i < gemm_groups(&l.shape); i += blockDim.x) {
    int m = gemm_group_side(&l.shape, i), e = i - (m == IMAGE ? l.shape.groups[TEXT] : 0);
    const GemmExtent &x = l.g.side[m].extent;
    t->begin[i] = x.begin_fixed + (x.begin ? __ldcg(x.begin + e) : 0);
    t->count[i] = max(0, x.count_fixed + (x.count ? __ldcg(x.count + e) : 0) + (x.more ? __ldcg(x.more + e) : 0));
  }
  __syncthreads();
}
// Fills *t; at least two warps.
template <int KIND> static __device__ inline void gemm_tiles_load(const GemmWork &l, GemmTiles *t) {
  gemm_counts_load(l, t);
  gemm_tiles_build(KIND, &l.shape, t);
}

// Where a tile's part of an inner dimension leaves its sums: [., N], row 0 as tile.m counts.
template <int KIND> static __device__ inline float *gemm_part_sums(const GemmWork &l, const GemmTile &t) {
  return l.partial + t.partial_at + t.part * gemm_part_size(KIND, &l.shape, t.side);
}

// Writes the rows that no group has. Thread `thread` of `threads` in all.
static __device__ inline void gemm_fill(const Gemm &g, int thread, int threads) {
#pragma unroll 1
  for (int i = 0; i < GEMM_FILLS && g.fill[i].part != GEMM_NO_ROWS; i++) {
    const GemmFill &f = g.fill[i];
    const int text = g.dims->n_text, used = text + g.dims->n_image;
    const int first = f.part == GEMM_TEXT_ROWS || f.part == GEMM_TEXT_SEGMENT ? 0
                      : f.part == GEMM_IMAGE_ROWS                             ? text
                      : f.part == GEMM_FILLER_ROWS                            ? used
                                                                              : g.dims->n_segments;
    const int end = f.part == GEMM_TEXT_ROWS      ? text
                    : f.part == GEMM_IMAGE_ROWS   ? used
                    : f.part == GEMM_TEXT_SEGMENT ? 1
                                                  : g.fill_rows;
    const int64_t eights = f.width / 8;
    const uint4 *from = (const uint4 *)f.from;
    for (int64_t at = first * eights + thread; at < end * eights; at += threads)
      ((uint4 *)f.to)[at] = from ? from[at] : make_uint4(0, 0, 0, 0);
  }
}

#endif
