// How a grouped product is cut into tiles: shared by the portable kernels (gemm_portable.cu) and those for Hopper
// (gemm_sm90.cu).
//
// Every block counts, from the extents on the device, how many tiles each group has; tile numbers then run over all
// groups of both sides, and the blocks of a persistent grid take them in strides. Weight gradients differ in length (an
// expert's rows), so there the longest groups come first.
#ifndef TESSERA_GEMM_TILES_H
#define TESSERA_GEMM_TILES_H

#include "kernels/cuda/gemm.h"

// GEMM_NT: C = A B^T and GEMM_NN: C = A B (gemm_rows), GEMM_TN: C = A^T B (gemm_weights).
enum { GEMM_NT, GEMM_NN, GEMM_TN };

// Load policies: rows of the operands in place, or those of one of them gathered by its index.
enum { GEMM_IN_PLACE, GEMM_GATHER_A, GEMM_GATHER_B };

// The products that are built: kind, load policy, epilogue. Whatever an op launches stands here, and nothing else.
#define GEMM_PRODUCTS(PRODUCT)                                                                                         \
  PRODUCT(GEMM_NT, GEMM_IN_PLACE, GemmStore)          /* LINEAR_FWD, EXPERT_DOWN_FWD, MOD_FWD */                       \
  PRODUCT(GEMM_NT, GEMM_GATHER_A, GemmStoreFloat)     /* HEAD_CE, HEAD_LOGITS */                                       \
  PRODUCT(GEMM_NT, GEMM_GATHER_A, GemmStoreSwiglu)    /* EXPERT_UP_FWD */                                              \
  PRODUCT(GEMM_NN, GEMM_IN_PLACE, GemmStore)          /* LINEAR_DGRAD, EXPERT_UP_DGRAD, HEAD_CE */                     \
  PRODUCT(GEMM_NN, GEMM_GATHER_A, GemmSwigluBackward) /* EXPERT_DOWN_BWD */                                            \
  PRODUCT(GEMM_TN, GEMM_IN_PLACE, GemmStoreWeights)   /* LINEAR_WGRAD */                                               \
  PRODUCT(GEMM_TN, GEMM_GATHER_A, GemmStoreWeights)   /* EXPERT_DOWN_WGRAD */                                          \
  PRODUCT(GEMM_TN, GEMM_GATHER_B, GemmStoreWeights)   /* EXPERT_UP_WGRAD, HEAD_CE */

enum {
  GEMM_BM = 128,         // rows of a tile
  GEMM_BAND = 8,         // row tiles whose columns are walked together, so that they meet in L2
  GEMM_MAX_GROUPS = 512, // of both sides
  GEMM_MAX_PARTS = 64,
  GEMM_SHARES = 132, // into how many shares the work is thought divided (an H100's multiprocessors); not the card's
                     //   own number, so that the result does not depend on it
  GEMM_SHARE_UNITS = 238, // most tiles of split groups, see gemm_tiles_build
  GEMM_SHARE_DEPTH = 64,  // rows that such parts are multiples of,
  GEMM_SHORTEST_PART = 8  //   and how many times as many they have at least
};

// A product as the kernels take it, but for its epilogue. The inner dimension may be cut into parts, each a tile of its
// own that stores its plain fp32 sums to `partial`; another kernel adds them in order. gemm_rows: sides of one group
// only, by their capacity. gemm_weights: groups whose rows are more than a multiprocessor's share of the launch, which
// the device finds out.
typedef struct GemmWork {
  Gemm g;
  int parts[MODALITIES];  // 0: as the counts want it
  float *partial;         // by group, where it has more than one part: [parts, rows, N] (gemm_weights: [parts, M, N])
  int bn;                 // columns of a tile
  uint32_t divide_factor; // i / index_divisor = i * divide_factor >> divide_shift, for all i >= 0
  int divide_shift;
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

// gemm_weights' tiles are rows of dW, gemm_rows' are rows of C.
static inline __host__ __device__ int gemm_tile_rows(const GemmSide *s, int kind) {
  return kind == GEMM_TN ? s->M : s->rows;
}

// The tiles of all groups, in shared memory.
typedef struct GemmTiles {
  int first[GEMM_MAX_GROUPS + 1];   // place i has tiles [first[i], first[i + 1])
  int begin[GEMM_MAX_GROUPS];       // by group: its first row
  int count[GEMM_MAX_GROUPS];       // by group: its rows
  int64_t partial[GEMM_MAX_GROUPS]; // by group: where its partial sums begin
  int16_t parts[GEMM_MAX_GROUPS];   // by group
  int16_t group[GEMM_MAX_GROUPS];   // by place
  int share;                        // rows that a part may have, over GEMM_SHARE_DEPTH
  bool one_round;                   // no multiprocessor has more than one tile
} GemmTiles;

static_assert(GEMM_MAX_GROUPS >= MODALITIES * CUDA_MOST_EXPERTS, "a group an expert");
static_assert(GEMM_MAX_GROUPS <= INT16_MAX && GEMM_MAX_PARTS <= INT16_MAX, "GemmTiles has groups and parts in 16 bits");
static_assert(sizeof(GemmTiles) <= CUDA_STATIC_SHARED,
              "the kernel that adds parts has the tiles in static shared memory");

// One tile of C, and what is summed for it.
typedef struct GemmTile {
  int side, group, part;
  bool partial;         // one of several parts
  int64_t partial_at;   // of the group
  int m, n;             // first row (gemm_rows: row of the side; gemm_weights: of dW) and column
  int m_end;            // rows from here on are not this tile's
  int inner, inner_end; // gemm_rows: columns of A; gemm_weights: rows of the side
} GemmTile;

static __device__ inline int gemm_groups(const GemmWork &l) {
  return l.g.side[TEXT].groups + l.g.side[IMAGE].groups;
}
static __device__ inline int gemm_group_side(const GemmWork &l, int group) {
  return group < l.g.side[TEXT].groups ? TEXT : IMAGE;
}
// Tiles of one part of a group.
template <int KIND> static __device__ inline int gemm_group_tiles(const GemmSide &s, int count, int bn) {
  int rows = KIND == GEMM_TN ? s.M : s.K > 0 ? count : 0;
  return ceil_div(rows, GEMM_BM) * ceil_div(s.N, bn);
}

// values[i] = values[0] + .. + values[i], i < n; by one warp, of which a lane takes a run of them.
template <typename T> static __device__ inline void warp_running_sums(T *values, int n) {
  int run = ceil_div(n, 32), lane = threadIdx.x & 31, begin = min(n, lane * run), end = min(n, begin + run);
  T total = 0;
  for (int i = begin; i < end; i++) total += values[i];
  T before = total;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    T v = __shfl_up_sync(0xffffffffu, before, d);
    if (lane >= d) before += v;
  }
  before -= total;
  for (int i = begin; i < end; i++) values[i] = before += values[i];
}

// How many equal parts `count` rows are cut into: each at most `longest` GEMM_SHARE_DEPTHs long, and none shorter than
// GEMM_SHORTEST_PART of them, which would not be worth a sum of its own.
static __device__ inline int gemm_even_parts(int count, int longest) {
  int depth = ceil_div(count, GEMM_SHARE_DEPTH);
  return max(1, min(ceil_div(depth, longest), depth / GEMM_SHORTEST_PART));
}

// Fills *t. All threads of the block take part; at least two warps of them.
template <int KIND> static __device__ void gemm_tiles_build(const GemmWork &l, int bn, GemmTiles *t) {
  int groups = gemm_groups(l);
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    int m = gemm_group_side(l, i), e = i - (m == IMAGE ? l.g.side[TEXT].groups : 0);
    const GemmExtent &x = l.g.side[m].extent;
    t->begin[i] = x.begin_fixed + (x.begin ? x.begin[e] : 0);
    t->count[i] = max(0, x.count_fixed + (x.count ? x.count[e] : 0));
    t->group[i] = (int16_t)i;
  }
  __syncthreads();
  if (KIND == GEMM_TN && threadIdx.x < 32) {
    int lane = (int)threadIdx.x;
    int64_t work = 0;
    for (int i = lane; i < groups; i += 32)
      work += (int64_t)gemm_group_tiles<KIND>(l.g.side[gemm_group_side(l, i)], t->count[i], bn) *
              ceil_div(t->count[i], GEMM_SHARE_DEPTH);
#pragma unroll
    for (int d = 16; d; d >>= 1) work += __shfl_xor_sync(0xffffffffu, work, d);
    // A lane tries parts of up to 1 + lane / 64 shares: the shortest with which each multiprocessor has one at most.
    int share = max(1, (int)ceil_div64(work, GEMM_SHARES)), longest = share + share * lane / 64, tiles = 0;
    for (int i = 0; i < groups && tiles <= GEMM_SHARES; i++) {
      int m = gemm_group_side(l, i), parts = l.parts[m] ? l.parts[m] : gemm_even_parts(t->count[i], longest);
      tiles += gemm_group_tiles<KIND>(l.g.side[m], t->count[i], bn) * parts;
    }
    unsigned fits = __ballot_sync(0xffffffffu, tiles <= GEMM_SHARES);
    if (lane == 0) t->one_round = fits != 0;
    if (lane == (fits ? __ffs((int)fits) - 1 : 0)) t->share = longest;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    int m = gemm_group_side(l, i), parts = l.parts[m];
    const GemmSide &s = l.g.side[m];
    if (KIND == GEMM_TN && parts == 0) {
      // In several rounds, a tile longer than 1.3 shares is cut: into at most 1.77 GEMM_SHARES such parts.
      bool cut = t->one_round || ceil_div(t->count[i], GEMM_SHARE_DEPTH) * 10LL > t->share * 13LL;
      parts = cut ? gemm_even_parts(t->count[i], t->share) : 1;
    }
    t->parts[i] = (int16_t)parts;
    t->partial[i] = parts > 1 ? parts * ((int64_t)gemm_tile_rows(&s, KIND) * s.N) : 0;
  }
  __syncthreads();
  if (KIND == GEMM_TN) { // longest first, ties by number
    for (int i = threadIdx.x; i < groups; i += blockDim.x) {
      int place = 0, own = ceil_div(t->count[i], t->parts[i]);
      for (int j = 0; j < groups; j++) {
        int other = ceil_div(t->count[j], t->parts[j]);
        place += other > own || (other == own && j < i);
      }
      t->group[place] = (int16_t)i;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i <= groups; i += blockDim.x) {
    int g = i > 0 ? t->group[i - 1] : 0; // first[i] counts place i - 1
    t->first[i] = i > 0 ? gemm_group_tiles<KIND>(l.g.side[gemm_group_side(l, g)], t->count[g], bn) * t->parts[g] : 0;
  }
  __syncthreads();
  if (threadIdx.x < 32) warp_running_sums(t->first, groups + 1);
  if (threadIdx.x >= 32 && threadIdx.x < 64) warp_running_sums(t->partial, groups);
  __syncthreads();
}

// The tile that this block takes in a round; none if it is not less than the launch's tiles. Every other round goes
// backwards, so that whoever had the longest tile of a round has the shortest of the next.
static __device__ inline int gemm_tile_number(int round) {
  return round * (int)gridDim.x + (int)(round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Tile number `number` of the launch. Inner dimensions are cut at multiples of `depth`.
template <int KIND>
static __device__ GemmTile gemm_tile_at(const GemmWork &l, const GemmTiles *t, int number, int bn, int depth) {
  int lo = 0, hi = gemm_groups(l); // first[lo] <= number < first[hi]
  while (hi - lo > 1) {
    int mid = (lo + hi) / 2;
    if (t->first[mid] <= number)
      lo = mid;
    else
      hi = mid;
  }
  int g = t->group[lo], i = number - t->first[lo], parts = t->parts[g];
  GemmTile tile;
  tile.side = gemm_group_side(l, g);
  tile.group = g - (tile.side == IMAGE ? l.g.side[TEXT].groups : 0);
  const GemmSide &s = l.g.side[tile.side];
  int rows = KIND == GEMM_TN ? s.M : t->count[g];
  int m_tiles = ceil_div(rows, GEMM_BM), n_tiles = ceil_div(s.N, bn);
  tile.part = i / (m_tiles * n_tiles);
  tile.partial = parts > 1;
  tile.partial_at = g > 0 ? t->partial[g - 1] : 0;
  i -= tile.part * m_tiles * n_tiles;
  int band = i / (GEMM_BAND * n_tiles), height = min((int)GEMM_BAND, m_tiles - band * GEMM_BAND);
  i -= band * GEMM_BAND * n_tiles;
  tile.m = (band * GEMM_BAND + i % height) * GEMM_BM;
  tile.n = i / height * bn;
  tile.m_end = rows;
  int inner = KIND == GEMM_TN ? t->count[g] : s.K, steps = ceil_div(inner, depth);
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

// Where a tile's part of an inner dimension leaves its sums: [., N], row 0 as tile.m counts.
template <int KIND> static __device__ inline float *gemm_part_sums(const GemmWork &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  return l.partial + t.partial_at + t.part * ((int64_t)gemm_tile_rows(&s, KIND) * s.N);
}

// index / index_divisor.
static __device__ inline int gemm_divide(const GemmWork &l, int index) {
  return (int)((uint64_t)(uint32_t)index * l.divide_factor >> l.divide_shift);
}
#endif
