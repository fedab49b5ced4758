// Units of work, and tiles of queries, keys and values in shared memory, as the attention kernels share them.
//
// Query q attends key k where q_start[k] <= q < q_end[k]: the key's interval alone is the mask (batch.h). The query's
// own interval [doc_start, kv_end) bounds the keys a tile of queries can reach.
//
// What is multiplied is of one document: blocks take tiles of the batch's list, which end with their document, and the
// rows of a tile in shared memory behind the last one wanted are zeros. So what is NaN or infinite in a document stays
// there. Queries of all heads that share a kv head are rows of one matrix: their keys are copied once, and only the
// last rows of a document are fewer than a tile.
//
// A tile [rows, D] lies in blocks of 64 columns (32 when D is 32), one after the other; within a block the 16-byte
// chunks of a row change places with the row, so that eight rows that are read at once lie in different banks. For
// D >= 64 that is the 128-byte swizzle of wgmma.h, for which tiles are aligned to 1024 bytes.
#ifndef TESSERA_ATTENTION_H
#define TESSERA_ATTENTION_H

#include <limits.h>
#include <math.h>

#include "kernels/cuda/mma.h"
#include "kernels/divide.h"

// Sizes of one call.
typedef struct AttentionShape {
  int T, H, G;
  float scale; // 1 / sqrt(D)
  int heads;   // H / G
  Divisor by_heads;
} AttentionShape;

static inline AttentionShape attention_shape(const Dims *d) {
  const int heads = d->H / d->G;
  return {d->T, d->H, d->G, 1 / sqrtf((float)d->D), heads, divisor_of((uint32_t)heads)};
}

#define LOG2E 1.4426950408889634f

// Positions before the filler.
static __device__ inline int batch_used(const Batch &b) {
  return b.dims->n_text + b.dims->n_image;
}

// Bytes from one row of a block to the next, and where 16-byte chunk `chunk` of row `row` of a tile lies, in elements.
template <int D> static __host__ __device__ constexpr int tile_pitch() {
  static_assert(D == 32 || D == 64 || D == 128, "a tile is one block of 32 columns, or blocks of 64");
  return D >= 64 ? 128 : 64;
}
template <int D, int rows> static __device__ inline int tile_at(int row, int chunk) {
  return D >= 64 ? (chunk >> 3) * rows * 64 + row * 64 + (((chunk ^ row) & 7) << 3)
                 : row * 32 + ((chunk ^ ((row >> 1) & 3)) << 3);
}

// Starts copying rows [0, valid) of `from` (stride elements apart) to a tile; its other rows become zeros. By `threads`
// threads that follow each other, the first a multiple of that. A thread copies the same chunk of every eighth row (or
// 16th, 32nd), so its places in the tile differ by constants.
template <int D, int rows, int threads>
static __device__ inline void tile_load(bf16 *tile, const bf16 *from, int stride, int valid) {
  static_assert(rows % (threads / (D / 8)) == 0 && threads / (D / 8) % 8 == 0, "a thread's rows are swizzled alike");
  const int chunks = D / 8, step = threads / chunks;
  int thread = (int)recompute(threadIdx.x % threads), row = thread / chunks, chunk = thread % chunks;
  uint32_t to = shared_address(tile + tile_at<D, rows>(row, chunk));
  const bf16 *at = from + (row * stride + chunk * 8);
#pragma unroll
  for (int i = 0; i < rows / step; i++, at += step * stride) {
    bool in = row + i * step < valid;
    copy16_async(to + i * step * tile_pitch<D>(), in ? at : from, in);
  }
}

// Entries [0, valid) of an array to shared memory, zeros after them. rows <= threads.
template <int rows> static __device__ inline void line_load(void *line, const void *from, int valid) {
  int i = (int)threadIdx.x;
  bool in = i < valid;
  if (i < rows) copy4_async(shared_address(line) + 4 * i, (const int32_t *)from + (in ? i : 0), in);
}

// A tile of the batch's list: positions [first, end), as many as the tile has, of a document that ends at `end`.
typedef struct Span {
  int first, end;
} Span;

static __device__ inline Span batch_tile(const Batch &b, int i) {
  int2 tile = ((const int2 *)b.tile)[i];
  return {tile.x, tile.y};
}
// The same tiles for kernels whose units are keys: of a document the first one first. The first keys are seen by all
// queries behind them, so their units are the longest, and what begins last should be short.
static __device__ inline Span batch_key_tile(const Batch &b, int i) {
  const Span tile = batch_tile(b, i);
  const int start = b.doc_start[tile.first], last = start + (tile.end - 1 - start) / BATCH_TILE * BATCH_TILE;
  return {start + last - tile.first, tile.end};
}

// The rows of a kv head are those of the heads that share it, position by position: row i is of position i / heads, and
// of head i % heads of theirs.
typedef struct KvRow {
  int position, head;
} KvRow;

static __device__ inline KvRow kv_row(const AttentionShape &s, int kv_head, int row) {
  const int position = divide(row, &s.by_heads);
  return {position, kv_head * s.heads + row - position * s.heads};
}

// A kernel's unit of work: `count` rows of a kv head from `first` on, none if count <= 0, all of one document, against
// its keys [key, key_end), which are those that some of the rows see.
typedef struct RowBlock {
  int kv_head, first, count, key, key_end;
} RowBlock;

template <int rows> static __device__ inline RowBlock row_block(const Batch &b, const AttentionShape &s, int unit) {
  const int heads = s.heads, parts = heads * (BATCH_TILE / rows);
  Span span = batch_tile(b, unit / s.G / parts);
  RowBlock block = {unit % s.G, span.first * heads + unit / s.G % parts * rows, 0, 0, 0};
  block.count = min(rows, min(span.first + BATCH_TILE, span.end) * heads - block.first);
  if (block.count <= 0) return block;
  block.key = b.doc_start[span.first];
  block.key_end = b.kv_end[(block.first + block.count - 1) / heads];
  return block;
}

// How many units of `rows` positions or rows the list has for `heads` heads.
template <int rows> static __device__ inline int tile_units(const Batch &b, int heads) {
  static_assert(BATCH_TILE % rows == 0, "a tile is whole units");
  return b.dims->n_tiles * (BATCH_TILE / rows) * heads;
}

// Blocks of a kernel for them, one a unit but where documents are short: each strides through the units, if there are
// more.
static inline int tile_blocks(int T, int rows, int heads) {
  return 2 * ceil_div(T, BATCH_TILE) * (BATCH_TILE / rows) * heads;
}

// What a thread copies of a tile of a kv head's rows [first, first + count): a chunk of one row in each of `turns`
// turns. By `threads` threads that follow each other, the first a multiple of that.
template <int D, int rows, int threads> struct RowChunk {
  static constexpr int step = threads / (D / 8), turns = rows / step;
  static_assert(rows % step == 0, "rows in whole turns");
  KvRow row;
  int chunk;
  bool in;     // it is one of the rows
  uint32_t to; // bytes of the tile
  __device__ RowChunk(const AttentionShape &s, int kv_head, int first, int count, int turn) {
    int thread = (int)recompute(threadIdx.x % threads), at = thread / (D / 8) + turn * step;
    chunk = thread % (D / 8), in = at < count;
    row = kv_row(s, kv_head, in ? first + at : first);
    to = 2 * tile_at<D, rows>(at, chunk);
  }
  // Where it lies in x [T, H, D], whose row of its position is `position`.
  __device__ int64_t element(const AttentionShape &s, int position) const {
    return ((int64_t)position * s.H + row.head) * D + chunk * 8;
  }
};

// Zeros in rows [from, to) of x [.., width], width a multiple of 8; all threads of the grid.
static __device__ inline void zero_rows(bf16 *x, int width, int from, int to) {
  int64_t end = (int64_t)to * (width / 8);
  for (int64_t i = (int64_t)from * (width / 8) + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < end;
       i += (int64_t)gridDim.x * blockDim.x)
    ((uint4 *)x)[i] = make_uint4(0, 0, 0, 0);
}

// Keys and values of one kv head, as they stream past.
template <int D, int keys> struct __align__(1024) KeyTile {
  bf16 k[keys * D], v[keys * D];
  int32_t q_start[keys], q_end[keys]; // zeros past the last key: an empty interval
  static_assert(keys * D * sizeof(bf16) % 1024 == 0, "v begins on a block of the swizzle, as k does");
};

// Starts copying keys [key, end), as many as the tile holds. Call: ForwardCall or BackwardCall.
template <int threads, int D, int keys, class Call>
static __device__ inline void load_keys(KeyTile<D, keys> *tile, const Call &c, int key, int end, int kv_head) {
  static_assert(keys <= threads, "a thread copies an interval");
  int64_t at = ((int64_t)key * c.shape.G + kv_head) * D;
  tile_load<D, keys, threads>(tile->k, c.k + at, c.shape.G * D, end - key);
  tile_load<D, keys, threads>(tile->v, c.v + at, c.shape.G * D, end - key);
  line_load<keys>(tile->q_start, c.b.q_start + key, end - key);
  line_load<keys>(tile->q_end, c.b.q_end + key, end - key);
}

// Fragments come from 16 x 16 blocks of a tile: rows [row, row + 16), columns [16 k, 16 k + 16). `place` is where the
// lane finds its part of block (0, 0), a shared address; that of any other block is an exclusive or and a sum away.
template <int D, int rows> static __device__ inline uint32_t tile_place(const bf16 *tile) {
  int lane = threadIdx.x & 31;
  return shared_address(tile + tile_at<D, rows>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
}
template <int D, int rows> static __device__ inline uint32_t block_place(uint32_t place, int row, int k) {
  return (place ^ ((k & 3) << 5)) + (k >> 2) * rows * 128 + row * tile_pitch<D>();
}
// The block as an A fragment.
template <int D, int rows> static __device__ inline void fragment_a(uint32_t a[4], uint32_t place, int row, int k) {
  uint32_t r[4];
  load_matrix(r, block_place<D, rows>(place, row, k));
  a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
}
// The block's transpose as two B fragments: b[0..1] have its rows [row, row + 8) as columns, b[2..3] the next eight;
// its columns are summed over.
template <int D, int rows> static __device__ inline void fragments_b(uint32_t b[4], uint32_t place, int row, int k) {
  load_matrix(b, block_place<D, rows>(place, row, k));
}
// The block as two B fragments: b[0..1] its left half, b[2..3] its right half; its rows are summed over.
template <int D, int rows>
static __device__ inline void fragments_b_rows(uint32_t b[4], uint32_t place, int row, int k) {
  uint32_t r[4];
  load_matrix_transposed(r, block_place<D, rows>(place, row, k));
  b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
}

// C fragments [16, 8 n] = 0
template <int n> static __device__ inline void fragments_zero(float (&c)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
}

// c [32, keys] = a b^T: a a warp's 32 rows of a tile of `rows`, b a tile of keys, by their places.
template <int D, int rows, int keys>
static __device__ inline void rows_product(float (&c)[2][keys / 8][4], uint32_t a_place, uint32_t b_place) {
  fragments_zero(c[0]);
  fragments_zero(c[1]);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[2][4];
    fragment_a<D, rows>(a[0], a_place, 0, step);
    fragment_a<D, rows>(a[1], a_place, 16, step);
#pragma unroll
    for (int n = 0; n < keys / 8; n += 2) {
      uint32_t b[4];
      fragments_b<D, keys>(b, b_place, 8 * n, step);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_add(c[m][n], a[m], b);
        mma_add(c[m][n + 1], a[m], b + 2);
      }
    }
  }
}

// As bf16 pairs, of which two neighbouring fragments are an A fragment.
template <int n> static __device__ inline void pack_rows(uint32_t (&pairs)[n][2], const float (&p)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; j++) {
    pairs[j][0] = pack2(p[j][0], p[j][1]);
    pairs[j][1] = pack2(p[j][2], p[j][3]);
  }
}

// Rounds scale[half] * c [16, D], rows [row, row + 16), into a tile. scale[0] is for rows g, scale[1] for g + 8.
template <int D, int rows>
static __device__ inline void tile_store(bf16 *tile, int row, const float c[D / 8][4], const float scale[2]) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    *(uint32_t *)(tile + tile_at<D, rows>(row + g, n) + 2 * t) = pack2(c[n][0] * scale[0], c[n][1] * scale[0]);
    *(uint32_t *)(tile + tile_at<D, rows>(row + g + 8, n) + 2 * t) = pack2(c[n][2] * scale[1], c[n][3] * scale[1]);
  }
}

// Four lanes t exchange: word k of lane t becomes word t of lane k. With word i a lane's pair of fragment i, lane t has
// the 8 columns of fragment t afterwards.
static __device__ inline uint4 quad_transpose(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w0 : w1, 1), b = __shfl_xor_sync(0xffffffffu, odd ? w2 : w3, 1);
  if (odd)
    w0 = a, w2 = b;
  else
    w1 = a, w3 = b;
  a = __shfl_xor_sync(0xffffffffu, high ? w0 : w2, 2), b = __shfl_xor_sync(0xffffffffu, high ? w1 : w3, 2);
  if (high)
    w0 = a, w1 = b;
  else
    w2 = a, w3 = b;
  return make_uint4(w0, w1, w2, w3);
}

// Chunk `i` of a tile's rows from `row` on, counted along them.
template <int D, int rows> static __device__ inline uint4 tile_chunk(const bf16 *tile, int row, int i) {
  return *(const uint4 *)(tile + tile_at<D, rows>(row + i / (D / 8), i % (D / 8)));
}

// How the positions [first, last] see the keys of a tile: not at all, in part, or all of them all of it.
typedef enum TileView { TILE_HIDDEN, TILE_PARTLY, TILE_WHOLE } TileView;

// q_start, q_end [keys] of the tile, in shared memory.
template <int keys>
static __device__ inline TileView tile_view(const int32_t *q_start, const int32_t *q_end, int first, int last) {
  int lane = threadIdx.x & 31, early_start = INT_MAX, late_start = 0, early_end = INT_MAX, late_end = 0;
#pragma unroll
  for (int i = lane; i < keys; i += 32) {
    early_start = min(early_start, q_start[i]), late_start = max(late_start, q_start[i]);
    early_end = min(early_end, q_end[i]), late_end = max(late_end, q_end[i]);
  }
  if (__reduce_min_sync(0xffffffffu, early_start) > last) return TILE_HIDDEN;
  if (__reduce_max_sync(0xffffffffu, late_end) <= first) return TILE_HIDDEN;
  bool whole = __reduce_max_sync(0xffffffffu, late_start) <= first && __reduce_min_sync(0xffffffffu, early_end) > last;
  return whole ? TILE_WHOLE : TILE_PARTLY;
}

// Whether one of the tile's first `keys` keys is hidden from query `last`, though it may see them by its own interval:
// a noised image before it. q_end [64] in shared memory.
static __device__ inline bool ends_before(const int32_t *q_end, int keys, int last) {
  int lane = threadIdx.x & 31;
  int2 end = ((const int2 *)q_end)[lane];
  return __any_sync(0xffffffffu, (2 * lane < keys && end.x <= last) || (2 * lane + 1 < keys && end.y <= last));
}

// Sets scores [16, 8 n] of two rows a lane, at position[2], and keys from `key` on to `hidden` where they don't see the
// key: those behind kv_end[2] of the rows, and, if `intervals`, by q_end [8 n] of the keys.
template <int n>
static __device__ inline void hide_keys(float (&score)[n][4], float hidden, const int position[2], const int kv_end[2],
                                        const int32_t *q_end, bool intervals, int key) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int end = kv_end[h] - key - 2 * t;
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (8 * j + i >= end) score[j][2 * h + i] = hidden;
  }
  if (!intervals) return;
#pragma unroll
  for (int j = 0; j < n; j++) {
    int2 end = *(const int2 *)(q_end + 8 * j + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (position[h] >= end.x) score[j][2 * h] = hidden;
      if (position[h] >= end.y) score[j][2 * h + 1] = hidden;
    }
  }
}

// Sets scores [16, 8 n] of two rows a lane, at position[2], to `hidden` where they don't see the key.
template <int n>
static __device__ inline void mask_rows(float (&score)[n][4], float hidden, const int position[2],
                                        const int32_t *q_start, const int32_t *q_end) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < n; j++) {
    int2 from = *(const int2 *)(q_start + 8 * j + 2 * t), to = *(const int2 *)(q_end + 8 * j + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (position[h] < from.x || position[h] >= to.x) score[j][2 * h] = hidden;
      if (position[h] < from.y || position[h] >= to.y) score[j][2 * h + 1] = hidden;
    }
  }
}
#endif
