// What the router's forward and backward kernels share: tiles of rows, and quads of threads.
//
// Rows are worked on in tiles of one modality each. Four neighbouring threads, a quad, share a row's experts: lane q of
// the four has experts q, q + 4, .. A tile's logits stand in shared memory with rows of logit_stride floats, an odd
// multiple of four, so that the eight rows of a warp lie in different banks.
#ifndef TESSERA_ROUTER_H
#define TESSERA_ROUTER_H

#include "kernels/cuda/mma.h"
#include "kernels/cuda/sums.h"

enum {
  ROUTER_THREADS = 256,
  TILE = 64, // rows: the bits of a mask
  QUAD = 4,  // threads a row
  EXPERTS_MOST = CUDA_MOST_EXPERTS,
  FILLER = MODALITIES // the side of filler rows
};

static_assert(TILE * QUAD == ROUTER_THREADS, "a quad a row");
static_assert(TILE <= 64 && EXPERTS_MOST / QUAD <= 64, "rows of a tile and experts of a lane are bits of a word");

// What kernels know of both routers.
typedef struct Sides {
  int T, C, kmax;
  int E[MODALITIES], K[MODALITIES];
  int64_t base[MODALITIES]; // of a side's view in the two-sided logits [T, E]
} Sides;

// Rows [first, first + rows) of one side; the ordinal-th tile of it. `before`: tiles of other sides in front of them.
typedef struct RowTile {
  int side, first, rows, ordinal, before;
} RowTile;

static inline Sides sides_of(const Dims *d) {
  const int one[MODALITIES] = {1, 1};
  Sides s = {d->T, d->C, dims_kmax(d), {d->E[TEXT], d->E[IMAGE]}, {d->K[TEXT], d->K[IMAGE]}, {0, 0}};
  for (int m = 0; m < MODALITIES; m++) s.base[m] = two_sided_base(d->T, one, d->E, m);
  return s;
}

static inline int most_experts(const Dims *d) {
  return d->E[TEXT] > d->E[IMAGE] ? d->E[TEXT] : d->E[IMAGE];
}

// No pack has more tiles: each of the three sides may end in a ragged one.
static inline int tiles_most(int T, int tile_rows) {
  return T / tile_rows + 3;
}

static __device__ inline int side_rows(const BatchDims *n, int side) {
  return side == TEXT ? n->n_text : n->n_image;
}

// Tile `index` of a pack: text tiles, image tiles, filler tiles; rows <= 0 past the last.
static __device__ inline RowTile row_tile(const BatchDims *n, int T, int tile_rows, int index) {
  int text = n->n_text, used = text + n->n_image;
  int text_tiles = ceil_div(text, tile_rows), image_tiles = ceil_div(used - text, tile_rows);
  RowTile t = {TEXT, 0, 0, index, 0};
  int begin = 0, end = text;
  if (index >= text_tiles + image_tiles) {
    t.side = FILLER;
    t.before = text_tiles + image_tiles;
    begin = used;
    end = T;
  } else if (index >= text_tiles) {
    t.side = IMAGE;
    t.before = text_tiles;
    begin = text;
    end = used;
  }
  t.ordinal = index - t.before;
  t.first = begin + t.ordinal * tile_rows;
  t.rows = end - t.first < tile_rows ? end - t.first : tile_rows;
  return t;
}

static __host__ __device__ inline int logit_stride(int E) {
  return ((E + 3) / 4 | 1) * 4;
}

static __device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
static __device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// A larger tile than 48 KiB only with more than 180 experts.
static inline size_t tile_bytes(const Dims *d) {
  return (size_t)TILE * (size_t)logit_stride(most_experts(d)) * sizeof(float);
}

// Scratch of ROUTER_BWD (router_bwd.cu).
size_t router_bwd_scratch(const Dims *dims);
#endif
