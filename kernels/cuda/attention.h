// Tiles of queries, keys and values in shared memory, as the attention kernels share them.
//
// Query q attends key k where q_start[k] <= q < q_end[k]: the key's interval alone is the mask (batch.h). The query's
// own interval [doc_start, kv_end) bounds the keys a tile of queries can reach.
//
// A tile [rows, D] lies in blocks of 64 columns (32 when D is 32), one after the other; within a block the 16-byte
// chunks of a row change places with the row, so that eight rows that are read at once lie in different banks. For
// D >= 64 that is the 128-byte swizzle of wgmma.h, for which tiles are aligned to 1024 bytes.
#ifndef TESSERA_ATTENTION_H
#define TESSERA_ATTENTION_H

#include <limits.h>

#include "kernels/cuda/mma.h"

// Sizes of one call.
typedef struct AttentionShape {
  int T, H, G;
  float scale; // 1 / sqrt(D)
} AttentionShape;

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

// Starts copying rows [0, valid) of `from` (stride elements apart) to a tile; its other rows become zeros. A thread
// copies the same chunk of every eighth row (or 16th, 32nd), so its places in the tile differ by constants.
template <int D, int rows, int threads>
static __device__ inline void tile_load(bf16 *tile, const bf16 *from, int stride, int valid) {
  static_assert(rows % (threads / (D / 8)) == 0 && threads / (D / 8) % 8 == 0, "a thread's rows are swizzled alike");
  const int chunks = D / 8, step = threads / chunks;
  int thread = (int)recompute(threadIdx.x), row = thread / chunks, chunk = thread % chunks;
  uint32_t to = shared_address(tile + tile_at<D, rows>(row, chunk));
  const bf16 *at = from + (row * stride + chunk * 8);
#pragma unroll
  for (int i = 0; i < rows / step; i++, at += step * stride) {
    bool in = row + i * step < valid;
    copy16_async(to + i * step * tile_pitch<D>(), in ? at : from, in);
  }
}

// The same for rows index[0], index[1], .. of `from`.
template <int D, int rows, int threads>
static __device__ inline void tile_gather(bf16 *tile, const bf16 *from, const int32_t *index, int64_t stride,
                                          int valid) {
  const int chunks = D / 8, step = threads / chunks;
  int thread = (int)recompute(threadIdx.x), row = thread / chunks, chunk = thread % chunks;
  uint32_t to = shared_address(tile + tile_at<D, rows>(row, chunk));
#pragma unroll
  for (int i = 0; i < rows / step; i++) {
    bool in = row + i * step < valid;
    copy16_async(to + i * step * tile_pitch<D>(), in ? from + index[row + i * step] * stride + chunk * 8 : from, in);
  }
}

// Entries [0, valid) of an array to shared memory, zeros after them. rows <= threads.
template <int rows> static __device__ inline void line_load(void *line, const void *from, int valid) {
  int i = (int)threadIdx.x;
  bool in = i < valid;
  if (i < rows) copy4_async(shared_address(line) + 4 * i, (const int32_t *)from + (in ? i : 0), in);
}

// What a block that takes a tile of queries is for: head blockIdx % H of query tile blockIdx / H.
typedef struct QueryBlock {
  int head, kv_head, first; // its queries begin at `first`
  int key, key_end;         // keys that some of them may see: either bound never decreases with the query
} QueryBlock;

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

// How the queries [first, last] see the keys of a tile: not at all, in part, or all of them all of it.
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

// Sets scores [16, 8 n] of queries `query` (this lane's row g) and query + 8 to `hidden` where they don't see the key.
template <int n>
static __device__ inline void mask_rows(float (&score)[n][4], float hidden, const int32_t *q_start,
                                        const int32_t *q_end, int query) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < n; j++) {
    int2 from = *(const int2 *)(q_start + 8 * j + 2 * t), to = *(const int2 *)(q_end + 8 * j + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int at = query + 8 * h;
      if (at < from.x || at >= to.x) score[j][2 * h] = hidden;
      if (at < from.y || at >= to.y) score[j][2 * h + 1] = hidden;
    }
  }
}
#endif
