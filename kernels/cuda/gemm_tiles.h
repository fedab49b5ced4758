// How a grouped product is cut into tiles: shared by the portable kernels (gemm.cu) and those for Hopper
// (gemm_sm90.cu).
//
// Every block counts, from the extents on the device, how many tiles each group has; tile numbers then run over all
// groups of both sides, and the blocks of a persistent grid take them in strides. Weight gradients differ in length (an
// expert's rows), so there the longest groups come first.
#ifndef TESSERA_GEMM_TILES_H
#define TESSERA_GEMM_TILES_H

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/swiglu.h"

// GEMM_NT: C = A B^T and GEMM_NN: C = A B (gemm_rows), GEMM_TN: C = A^T B (gemm_weights).
enum { GEMM_NT, GEMM_NN, GEMM_TN };

enum {
  GEMM_BM = 128,         // rows of a tile
  GEMM_BAND = 8,         // row tiles whose columns are walked together, so that they meet in L2
  GEMM_MAX_GROUPS = 512, // of both sides
  GEMM_MAX_PARTS = 64
};

// A product as the kernels take it. With parts[s] > 1 the inner dimension of side s is cut into that many parts, each a
// tile of its own that stores its plain fp32 sums to partial[s]; another kernel adds them in order.
typedef struct GemmLaunch {
  Gemm g;
  int parts[MODALITIES];
  float *partial[MODALITIES]; // [parts, rows, N] (gemm_weights: [parts, groups, M, N])
} GemmLaunch;

// The Hopper kernels, and whether this card and this build have them.
bool gemm_sm90_usable(void);
void gemm_sm90(const GemmLaunch *l, int kind, cudaStream_t stream);

// gemm_weights' tiles are rows of dW, gemm_rows' are rows of C.
static inline __host__ __device__ int gemm_tile_rows(const GemmSide *s, int kind) {
  return kind == GEMM_TN ? s->M : s->rows;
}

// Where tile numbers of a block's groups begin; in shared memory.
typedef struct GemmTiles {
  int first[GEMM_MAX_GROUPS + 1]; // place i has tiles [first[i], first[i + 1]); behind the last place: all of them
  int begin[GEMM_MAX_GROUPS];     // by group: its rows
  int count[GEMM_MAX_GROUPS];
  int16_t group[GEMM_MAX_GROUPS]; // by place
} GemmTiles;

// One tile of C, and what is summed for it.
typedef struct GemmTile {
  int side, group, part;
  int m, n;             // first row (gemm_rows: row of the side; gemm_weights: of dW) and column
  int m_end;            // rows from here on are not this tile's
  int inner, inner_end; // gemm_rows: columns of A; gemm_weights: rows of the side
} GemmTile;

static __device__ inline int gemm_group_side(const GemmLaunch &l, int group) {
  return group < l.g.side[TEXT].groups ? TEXT : IMAGE;
}

// Fills *t. All threads of the block take part; at least one warp of them.
template <int KIND> static __device__ void gemm_tiles_build(const GemmLaunch &l, int bn, GemmTiles *t) {
  int groups = l.g.side[TEXT].groups + l.g.side[IMAGE].groups;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    int m = gemm_group_side(l, i), e = i - (m == IMAGE ? l.g.side[TEXT].groups : 0);
    const GemmExtent &x = l.g.side[m].extent;
    t->begin[i] = x.begin_fixed + (x.begin ? x.begin[e] : 0);
    t->count[i] = max(0, x.count_fixed + (x.count ? x.count[e] : 0));
    t->group[i] = (int16_t)i;
  }
  __syncthreads();
  if (KIND == GEMM_TN) { // longest first, ties by number
    for (int i = threadIdx.x; i < groups; i += blockDim.x) {
      int place = 0, own = t->count[i] / l.parts[gemm_group_side(l, i)];
      for (int j = 0; j < groups; j++) {
        int other = t->count[j] / l.parts[gemm_group_side(l, j)];
        place += other > own || (other == own && j < i);
      }
      t->group[place] = (int16_t)i;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i <= GEMM_MAX_GROUPS; i += blockDim.x) {
    int tiles = 0;
    if (i > 0 && i <= groups) { // those of place i - 1
      int g = t->group[i - 1], m = gemm_group_side(l, g);
      int rows = KIND == GEMM_TN ? l.g.side[m].M : l.g.side[m].K > 0 ? t->count[g] : 0;
      tiles = ceil_div(rows, GEMM_BM) * ceil_div(l.g.side[m].N, bn) * l.parts[m];
    }
    t->first[i] = tiles;
  }
  __syncthreads();
  if (threadIdx.x < 32) { // running sums; a lane takes a run of them
    enum { RUN = GEMM_MAX_GROUPS / 32 };
    int *own = t->first + 1 + threadIdx.x * RUN, total = 0;
    for (int i = 0; i < RUN; i++) total += own[i];
    int before = total;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      int v = __shfl_up_sync(0xffffffffu, before, d);
      if ((int)threadIdx.x >= d) before += v;
    }
    before -= total;
    for (int i = 0; i < RUN; i++) own[i] = before += own[i];
  }
  __syncthreads();
}

static __device__ inline int gemm_tiles_total(const GemmTiles *t) {
  return t->first[GEMM_MAX_GROUPS];
}

// Tile number `number` < total. Inner dimensions are cut at multiples of `depth`.
template <int KIND>
static __device__ GemmTile gemm_tile_at(const GemmLaunch &l, const GemmTiles *t, int number, int bn, int depth) {
  int lo = 0, hi = GEMM_MAX_GROUPS; // first[lo] <= number < first[hi]
  while (hi - lo > 1) {
    int mid = (lo + hi) / 2;
    if (t->first[mid] <= number)
      lo = mid;
    else
      hi = mid;
  }
  int g = t->group[lo], i = number - t->first[lo];
  GemmTile tile;
  tile.side = gemm_group_side(l, g);
  tile.group = g - (tile.side == IMAGE ? l.g.side[TEXT].groups : 0);
  const GemmSide &s = l.g.side[tile.side];
  int rows = KIND == GEMM_TN ? s.M : t->count[g];
  int m_tiles = ceil_div(rows, GEMM_BM), n_tiles = ceil_div(s.N, bn);
  tile.part = i / (m_tiles * n_tiles);
  i -= tile.part * m_tiles * n_tiles;
  int band = i / (GEMM_BAND * n_tiles), height = min((int)GEMM_BAND, m_tiles - band * GEMM_BAND);
  i -= band * GEMM_BAND * n_tiles;
  tile.m = (band * GEMM_BAND + i % height) * GEMM_BM;
  tile.n = i / height * bn;
  tile.m_end = rows;
  int inner = KIND == GEMM_TN ? t->count[g] : s.K, steps = ceil_div(inner, depth), parts = l.parts[tile.side];
  tile.inner = (int)((int64_t)steps * tile.part / parts) * depth;
  tile.inner_end = min(inner, (int)((int64_t)steps * (tile.part + 1) / parts) * depth);
  if (KIND == GEMM_TN) {
    tile.inner += t->begin[g];
    tile.inner_end += t->begin[g];
  } else {
    tile.m += t->begin[g];
    tile.m_end += t->begin[g];
  }
  return tile;
}

// Where the tile's sums go: C, dW or the tile's part of `partial`; [., N], its row 0 as tile.m counts.
template <int KIND> static __device__ inline void *gemm_tile_out(const GemmLaunch &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  int64_t rows = KIND == GEMM_TN ? (int64_t)s.groups * s.M : s.rows, row = KIND == GEMM_TN ? (int64_t)t.group * s.M : 0;
  if (l.parts[t.side] > 1) return l.partial[t.side] + (t.part * rows + row) * s.N;
  return KIND == GEMM_TN || l.g.c_float ? (void *)((float *)s.c + row * s.N) : s.c;
}

static __device__ inline int gemm_row_source(const int32_t *index, int row, int divisor) {
  return index ? index[row] / divisor : row;
}

// ---- the end of gemm_rows: bias, add, rounding, SwiGLU ----

// Columns col, col + 1 (col even) of a row of C from their products.
static __device__ inline void gemm_store_pair(const GemmLaunch &l, const GemmSide &s, int64_t row, int col, float x,
                                              float y) {
  int64_t at = row * s.N + col;
  if (s.bias) {
    float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(s.bias + col));
    x += b.x, y += b.y;
  }
  if (s.add) {
    float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(s.add + at));
    x += b.x, y += b.y;
  }
  if (l.g.c_float) {
    *(float2 *)((float *)s.c + at) = make_float2(x, y);
  } else {
    __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    *(__nv_bfloat162 *)((bf16 *)s.c + at) = rounded;
    x = __low2float(rounded), y = __high2float(rounded);
  }
  if (s.act) s.act[at / 2] = __float2bfloat16_rn(swiglu(x, y));
}

// ---- the end of gemm_rows with `swiglu` ----

// The (gate, up) pairs of columns col, col + 1 (col even) of a row.
static __device__ inline uint2 gemm_pre_load(const GemmSide &s, int64_t row, int col) {
  return *(const uint2 *)(s.swiglu.pre + (row * s.N + col) * 2);
}

// Stores dpre and sa of those columns from x, y = dA; returns <dA, a>.
static __device__ inline float gemm_store_backward(const GemmSide &s, int64_t row, int col, float w, uint2 pre, float x,
                                                   float y) {
  int64_t at = row * s.N + col;
  SwigluGrad g = swiglu_backward(__uint_as_float(pre.x << 16), __uint_as_float(pre.x & 0xffff0000u), x);
  SwigluGrad h = swiglu_backward(__uint_as_float(pre.y << 16), __uint_as_float(pre.y & 0xffff0000u), y);
  *(uint2 *)(s.swiglu.dpre + 2 * at) = make_uint2(pack2(w * g.dgate, w * g.dup), pack2(w * h.dgate, w * h.dup));
  *(uint32_t *)(s.swiglu.sa + at) = pack2(w * g.a, w * h.a);
  return x * g.a + y * h.a;
}

// Stores `dot`, summed over the quad of lanes that hold GEMM_DOT_COLUMNS columns of a row from `col`. All lanes take
// part; `in`: row and column are the tile's.
static __device__ inline void gemm_store_dot(const GemmSide &s, int64_t row, int col, bool in, float dot) {
  dot += __shfl_xor_sync(0xffffffffu, dot, 1);
  dot += __shfl_xor_sync(0xffffffffu, dot, 2);
  if (in && (threadIdx.x & 3) == 0) s.swiglu.dot[(int64_t)(col / GEMM_DOT_COLUMNS) * s.rows + row] = dot;
}
#endif
