// The walk of a grouped product: how groups are cut into tiles and in which order the tiles are taken. It looks at
// sizes and counts alone, and is C for the device and for the host, so that the tests walk it too.
//
// Every block knows from the counts how many tiles each group has; tile numbers run over all groups of both sides, and
// the blocks of a persistent grid take them in strides, or draw them (gemm_load.h). What takes longest comes first, so
// that the last round is filled with short tiles: a tile is as long as its inner dimension, which differs from side to
// side and, where the inner dimension is the rows (weight gradients), from group to group.
#ifndef TESSERA_GEMM_WALK_H
#define TESSERA_GEMM_WALK_H

#include "base/modality.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define GEMM_BOTH __host__ __device__ __forceinline__
#else
#define GEMM_BOTH inline
#endif
// What the threads of a block share among them, and the host does by itself.
#ifdef __CUDA_ARCH__
#define GEMM_EACH(i, n) _Pragma("unroll 1") for (int i = (int)threadIdx.x; i < (n); i += (int)blockDim.x)
#define GEMM_FIRST_THREAD (threadIdx.x == 0)
#define GEMM_SYNC() __syncthreads()
#else
#define GEMM_EACH(i, n) for (int i = 0; i < (n); i++)
#define GEMM_FIRST_THREAD true
#define GEMM_SYNC() (void)0
#endif

// GEMM_NT: C = A B^T and GEMM_NN: C = A B (gemm_rows), GEMM_TN: C = A^T B (gemm_weights).
enum { GEMM_NT, GEMM_NN, GEMM_TN };

enum {
  GEMM_BM = 128,         // rows of a tile
  GEMM_LEAST_BN = 128,   // and least columns
  GEMM_BAND = 8,         // row tiles whose columns are walked together, so that they meet in L2
  GEMM_MAX_GROUPS = 512, // of both sides
  GEMM_MAX_PARTS = 64,
  GEMM_SHARES = 132, // into how many shares the work is thought divided (an H100's multiprocessors); not the card's
                     //   own number, so that the result does not depend on it
  GEMM_SHARE_UNITS = 238, // most tiles of split groups, see gemm_group_parts
  GEMM_SHARE_DEPTH = 64,  // rows that such parts are multiples of,
  GEMM_SHORTEST_PART = 8, //   and how many times as many they have at least
  GEMM_TRIES = 32         // lengths of parts that are tried
};

// What the walk knows of a product before the counts. The inner dimension may be cut into parts, each a tile of its own
// whose plain sums another kernel adds in order. gemm_rows: sides of one group only, by their capacity. gemm_weights:
// groups whose rows are more than a multiprocessor's share of the launch.
typedef struct GemmShape {
  int groups[MODALITIES];                          // 0: the side is absent
  int rows[MODALITIES];                            // capacity
  int M[MODALITIES], N[MODALITIES], K[MODALITIES]; // as in GemmSide
  int bn[MODALITIES];                              // columns of a tile
  int parts[MODALITIES];                           // of an inner dimension; 0: as the counts want it
  int blocks;                                      // that walk; 0: the tiles of a last round are not halved
  int adds;                                        // to what is there: a weight gradient of no rows has no tiles
} GemmShape;

// The tiles of all groups; on the device in shared memory.
typedef struct GemmTiles {
  int first[GEMM_MAX_GROUPS + 1];   // place i has tiles [first[i], first[i + 1])
  int begin[GEMM_MAX_GROUPS];       // by group: its first row
  int count[GEMM_MAX_GROUPS];       // by group: its rows
  int64_t partial[GEMM_MAX_GROUPS]; // by group: where its partial sums end
  int16_t parts[GEMM_MAX_GROUPS];   // by group
  int16_t group[GEMM_MAX_GROUPS];   // by place
  int tried[GEMM_TRIES];            // how many tiles there would be, by length of parts
  int halved;                       // tiles of the last round that are made as two, of half the columns each
  int share;                        // rows that a part may have, over GEMM_SHARE_DEPTH
  bool one_round;                   // no multiprocessor has more than one tile
} GemmTiles;

// One tile of C, and what is summed for it.
typedef struct GemmTile {
  int side, group, part;
  bool partial;         // one of several parts
  int64_t partial_at;   // of the group
  int m, n;             // first row (gemm_rows: row of the side; gemm_weights: of dW) and column
  int bn;               // columns
  int m_end;            // rows from here on are not this tile's
  int inner, inner_end; // gemm_rows: columns of A; gemm_weights: rows of the side
} GemmTile;

static GEMM_BOTH int gemm_up(int a, int b) { // a / b, rounded up
  return (a + b - 1) / b;
}
static GEMM_BOTH int gemm_less(int a, int b) {
  return a < b ? a : b;
}

static GEMM_BOTH int gemm_groups(const GemmShape *s) {
  return s->groups[TEXT] + s->groups[IMAGE];
}
static GEMM_BOTH int gemm_group_side(const GemmShape *s, int group) {
  return group < s->groups[TEXT] ? TEXT : IMAGE;
}
// Tiles of one part of a weight gradient.
static GEMM_BOTH int gemm_weight_tiles(const GemmShape *s, int m) {
  return gemm_up(s->M[m], GEMM_BM) * gemm_up(s->N[m], s->bn[m]);
}
// Floats of the sums of one part of a group.
static GEMM_BOTH int64_t gemm_part_size(int kind, const GemmShape *s, int m) {
  return (int64_t)(kind == GEMM_TN ? s->M[m] : s->rows[m]) * s->N[m];
}

// How many equal parts `count` rows are cut into: each at most `longest` GEMM_SHARE_DEPTHs long, and none shorter than
// GEMM_SHORTEST_PART of them, which would not be worth a sum of its own.
static GEMM_BOTH int gemm_even_parts(int count, int longest) {
  const int depth = gemm_up(count, GEMM_SHARE_DEPTH);
  const int parts = gemm_less(gemm_up(depth, longest), depth / GEMM_SHORTEST_PART);
  return parts > 1 ? parts : 1;
}

// ---- parts of weight gradients ----

// What a group of a weight gradient adds to the launch's work.
static GEMM_BOTH int64_t gemm_group_work(const GemmShape *s, const GemmTiles *t, int i) {
  return (int64_t)gemm_weight_tiles(s, gemm_group_side(s, i)) * gemm_up(t->count[i], GEMM_SHARE_DEPTH);
}
// Its tiles with parts of up to `longest`; GEMM_SHARES + 1 stands for all that are more.
static GEMM_BOTH int gemm_group_tried(const GemmShape *s, const GemmTiles *t, int i, int longest) {
  const int m = gemm_group_side(s, i), parts = s->parts[m] ? s->parts[m] : gemm_even_parts(t->count[i], longest);
  const int64_t tiles = (int64_t)gemm_weight_tiles(s, m) * parts;
  return tiles <= GEMM_SHARES ? (int)tiles : GEMM_SHARES + 1;
}
static GEMM_BOTH int gemm_share_of(int64_t work) {
  const int share = (int)((work + GEMM_SHARES - 1) / GEMM_SHARES);
  return share > 1 ? share : 1;
}
// Try number `i` cuts into parts of up to 1 + i / 64 shares.
static GEMM_BOTH int gemm_try_longest(int share, int i) {
  return share + share * i / 64;
}

// Fills t->share and t->one_round: the shortest parts of those tried with which each multiprocessor has one tile at
// most; one share, where it has several with all of them.
static GEMM_BOTH void gemm_share_find(const GemmShape *s, GemmTiles *t) {
  const int groups = gemm_groups(s);
  int fits;
#ifdef __CUDA_ARCH__
  static_assert(GEMM_TRIES == 32, "a lane looks at each try");
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  int64_t work = 0;
  for (int i = lane; i < groups; i += 32) work += gemm_group_work(s, t, i);
#pragma unroll
  for (int d = 16; d; d >>= 1) work += __shfl_xor_sync(0xffffffffu, work, d);
  const int share = gemm_share_of(work);
  for (int k = threadIdx.x >> 5; k < GEMM_TRIES; k += warps) {
    int tiles = 0;
    for (int i = lane; i < groups; i += 32) tiles += gemm_group_tried(s, t, i, gemm_try_longest(share, k));
#pragma unroll
    for (int d = 16; d; d >>= 1) tiles += __shfl_xor_sync(0xffffffffu, tiles, d);
    if (lane == 0) t->tried[k] = tiles;
  }
  __syncthreads();
  fits = __ffs((int)__ballot_sync(0xffffffffu, t->tried[lane] <= GEMM_SHARES)) - 1;
#else
  int64_t work = 0;
  for (int i = 0; i < groups; i++) work += gemm_group_work(s, t, i);
  const int share = gemm_share_of(work);
  fits = -1;
  for (int k = GEMM_TRIES - 1; k >= 0; k--) {
    t->tried[k] = 0;
    for (int i = 0; i < groups; i++) t->tried[k] += gemm_group_tried(s, t, i, gemm_try_longest(share, k));
    if (t->tried[k] <= GEMM_SHARES) fits = k;
  }
#endif
  if (GEMM_FIRST_THREAD) {
    t->one_round = fits >= 0;
    t->share = gemm_try_longest(share, fits >= 0 ? fits : 0);
  }
  GEMM_SYNC();
}

// In several rounds, a tile longer than 1.3 shares is cut: into at most 1.77 GEMM_SHARES such parts.
static GEMM_BOTH int gemm_group_parts(int kind, const GemmShape *s, const GemmTiles *t, int i) {
  const int given = s->parts[gemm_group_side(s, i)];
  if (kind != GEMM_TN || given) return given;
  const bool cut = t->one_round || gemm_up(t->count[i], GEMM_SHARE_DEPTH) * 10LL > t->share * 13LL;
  return cut ? gemm_even_parts(t->count[i], t->share) : 1;
}

// values[i] = values[0] + .. + values[i], i < n; by one warp of the block, of which a lane takes a run of them.
#ifdef __CUDA_ARCH__
template <typename T> static __device__ inline void warp_running_sums(T *values, int n) {
  int run = gemm_up(n, 32), lane = threadIdx.x & 31, begin = min(n, lane * run), end = min(n, begin + run);
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
#define GEMM_RUNNING_SUMS(values, n, warp)                                                                             \
  if ((int)threadIdx.x >> 5 == (warp)) warp_running_sums(values, n)
#else
#define GEMM_RUNNING_SUMS(values, n, warp)                                                                             \
  for (int at = 1; at < (n); at++) (values)[at] += (values)[at - 1]
#endif

// ---- places ----

// gemm_rows: the side whose inner dimension is longer comes first; its groups, and the other's, in their order. Groups
// sorted by what their tiles take, those of few rows last, cost each launch more than they gave (docs/LOG.md).
static GEMM_BOTH void gemm_places_by_sides(const GemmShape *s, GemmTiles *t) {
  const int text = s->groups[TEXT], image = s->groups[IMAGE];
  const bool image_first = (int64_t)s->K[IMAGE] * s->parts[TEXT] > (int64_t)s->K[TEXT] * s->parts[IMAGE];
  GEMM_EACH(i, text + image) t->group[i] = (int16_t)(!image_first ? i : i < image ? text + i : i - image);
}

// gemm_weights: by the groups' rows, in a part.
static GEMM_BOTH void gemm_places_by_rows(const GemmShape *s, GemmTiles *t) {
  const int groups = gemm_groups(s);
  GEMM_EACH(g, groups) { // until the groups have their places
    t->first[g] = gemm_up(t->count[g], t->parts[g]);
  }
  GEMM_SYNC();
  GEMM_EACH(g, groups) { // longest first, ties by number
    int place = 0;
    const int own = t->first[g];
    for (int j = 0; j < groups; j++) place += t->first[j] > own || (t->first[j] == own && j < g);
    t->group[place] = (int16_t)g;
  }
}

// ---- all of it ----

// Fills parts (and share, one_round) from begin and count, which are there. All threads of the block take part, here
// and below; at least two warps of them.
static GEMM_BOTH void gemm_parts_find(int kind, const GemmShape *s, GemmTiles *t) {
  const bool by_counts = (s->groups[TEXT] > 0 && s->parts[TEXT] == 0) || (s->groups[IMAGE] > 0 && s->parts[IMAGE] == 0);
  if (kind == GEMM_TN && by_counts) gemm_share_find(s, t);
  GEMM_EACH(g, gemm_groups(s)) t->parts[g] = (int16_t)gemm_group_parts(kind, s, t, g);
}
// Fills partial from the parts, once all are there, but for running sums.
static GEMM_BOTH void gemm_sums_find(int kind, const GemmShape *s, GemmTiles *t) {
  GEMM_EACH(g, gemm_groups(s)) {
    const int parts = t->parts[g];
    t->partial[g] = parts > 1 ? parts * gemm_part_size(kind, s, gemm_group_side(s, g)) : 0;
  }
}

// What adds the parts' sums needs of *t: parts and partial.
static GEMM_BOTH void gemm_parts_build(int kind, const GemmShape *s, GemmTiles *t) {
  gemm_parts_find(kind, s, t);
  GEMM_SYNC();
  gemm_sums_find(kind, s, t);
  GEMM_SYNC();
  GEMM_RUNNING_SUMS(t->partial, gemm_groups(s), 0);
  GEMM_SYNC();
}

// A last round that has work for half of the blocks or less takes half as long where all its tiles are halved. No sum
// changes by it.
static GEMM_BOTH int gemm_halved(const GemmShape *s, int tiles) {
  const int left = s->blocks ? tiles % s->blocks : 0;
  for (int m = 0; m < MODALITIES; m++)
    if (s->groups[m] && s->bn[m] < 2 * GEMM_LEAST_BN) return 0;
  return 2 * left <= s->blocks ? left : 0;
}

// What walks the tiles needs of it: everything.
static GEMM_BOTH void gemm_tiles_build(int kind, const GemmShape *s, GemmTiles *t) {
  const int groups = gemm_groups(s);
  gemm_parts_find(kind, s, t);
  GEMM_SYNC();
  if (kind == GEMM_TN)
    gemm_places_by_rows(s, t);
  else
    gemm_places_by_sides(s, t);
  gemm_sums_find(kind, s, t);
  GEMM_SYNC();
  GEMM_EACH(i, groups) {
    const int g = t->group[i], m = gemm_group_side(s, g), rows = kind == GEMM_TN ? s->M[m] : t->count[g];
    const bool nothing = kind == GEMM_TN && s->adds && t->count[g] == 0; // what is stored must be zeros
    t->first[i + 1] = nothing ? 0 : gemm_up(rows, GEMM_BM) * gemm_up(s->N[m], s->bn[m]) * t->parts[g];
  }
  if (GEMM_FIRST_THREAD) t->first[0] = 0;
  GEMM_SYNC();
  GEMM_RUNNING_SUMS(t->first, groups + 1, 0);
  GEMM_RUNNING_SUMS(t->partial, groups, 1);
  GEMM_SYNC();
  if (GEMM_FIRST_THREAD) t->halved = gemm_halved(s, t->first[groups]);
  GEMM_SYNC();
}

// Tiles of the launch.
static GEMM_BOTH int gemm_tiles_total(const GemmShape *s, const GemmTiles *t) {
  return t->first[gemm_groups(s)] + t->halved;
}

// The tile that a block takes in a round, in strides; none if it is not less than the launch's tiles. Every other round
// goes backwards, so that whoever had the longest tile of a round has the shortest of the next.
static GEMM_BOTH int gemm_tile_number(int round, int block, int blocks) {
  return round * blocks + (round & 1 ? blocks - 1 - block : block);
}

// Tile number `number` of the launch. Inner dimensions are cut at multiples of `depth`.
static GEMM_BOTH GemmTile gemm_tile_at(int kind, const GemmShape *s, const GemmTiles *t, int number, int depth) {
  const int whole = t->first[gemm_groups(s)] - t->halved; // tiles that are not halved
  int second = 0;                                         // half of its tile
  if (number >= whole) second = (number - whole) & 1, number = whole + (number - whole) / 2;
  int lo = 0, hi = gemm_groups(s); // first[lo] <= number < first[hi]
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (t->first[mid] <= number)
      lo = mid;
    else
      hi = mid;
  }
  const int g = t->group[lo], parts = t->parts[g], m = gemm_group_side(s, g);
  int i = number - t->first[lo];
  GemmTile tile;
  tile.side = m;
  tile.group = g - (m == IMAGE ? s->groups[TEXT] : 0);
  const int rows = kind == GEMM_TN ? s->M[m] : t->count[g];
  const int m_tiles = gemm_up(rows, GEMM_BM), n_tiles = gemm_up(s->N[m], s->bn[m]);
  tile.part = i / (m_tiles * n_tiles);
  tile.partial = parts > 1;
  tile.partial_at = g > 0 ? t->partial[g - 1] : 0;
  i -= tile.part * m_tiles * n_tiles;
  const int band = i / (GEMM_BAND * n_tiles), height = gemm_less(GEMM_BAND, m_tiles - band * GEMM_BAND);
  i -= band * GEMM_BAND * n_tiles;
  tile.m = (band * GEMM_BAND + i % height) * GEMM_BM;
  tile.bn = number >= whole ? s->bn[m] / 2 : s->bn[m];
  tile.n = i / height * s->bn[m] + second * tile.bn;
  tile.m_end = rows;
  const int inner = kind == GEMM_TN ? t->count[g] : s->K[m], steps = gemm_up(inner, depth);
  tile.inner = (int)((int64_t)steps * tile.part / parts) * depth;
  tile.inner_end = gemm_less(inner, (int)((int64_t)steps * (tile.part + 1) / parts) * depth);
  if (kind == GEMM_TN) {
    tile.inner += t->begin[g];
    tile.inner_end += t->begin[g];
  } else {
    tile.m += t->begin[g];
    tile.m_end += t->begin[g];
  }
  return tile;
}
#endif
