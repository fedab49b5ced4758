// What the kernels of the backward attention share (attention_bwd_portable.cu, attention_bwd_sm90.cu; formulas:
// attention_bwd.cu).
#ifndef TESSERA_ATTENTION_BWD_H
#define TESSERA_ATTENTION_BWD_H

#include "kernels/cuda/attention.h"

enum { WARPS = 4, THREADS = 32 * WARPS };

// One call, as all kernels see it.
typedef struct BackwardCall {
  const bf16 *dout, *o;  // [T, H D], row order
  const bf16 *q, *k, *v; // [T, H, D], [T, G, D] twice
  const float *lse;      // [H, T]
  float *delta;          // [H, T], positions before the filler only
  bf16 *dq, *dk, *dv;    // as q, k, v
  AttentionShape shape;
  Batch b;
} BackwardCall;

// For head_dim 32, 64 or 128 on any card from sm_80 on.
void attention_bwd_portable(const BackwardCall *c, int D, cudaStream_t stream);

// dq, dk, dv of ATTENTION_BWD, or of ATTENTION_ROPE_BWD, whose inputs begin alike. With `sums` dq may be left as the
// sums of a pass (attention_pass.h): then this is where they lie, and filler rows are not written. Otherwise NULL.
const float *attention_backward(const KernelCall *call, bf16 *dq, bf16 *dk, bf16 *dv, bool sums);

// For head_dim 64 and for 128 on Hopper, and whether this card and this build have them. The latter does not use
// c->delta; its scratch, and the bytes of that. It returns where dq's sums lie, which become c->dq if `finish`.
bool attention_bwd_sm90_usable(void);
void attention_bwd_sm90(const BackwardCall *c, cudaStream_t stream);
const float *attention_bwd_pass(const BackwardCall *c, const Dims *d, void *scratch, bool finish, cudaStream_t stream);
size_t attention_bwd_pass_scratch(const Dims *d);

// Where lse and delta of a row lie.
static __device__ inline int64_t row_line(const AttentionShape &s, int kv_head, int row) {
  KvRow at = kv_row(s, kv_head, row);
  return (int64_t)at.head * s.T + at.position;
}

// ---- dq: a block takes `rows` rows of a kv head; tiles of `keys` keys stream past, two in shared memory ----

template <int D, int rows, int keys> struct DqShared {
  bf16 q[rows * D], dout[rows * D];
  KeyTile<D, keys> tiles[2];
  float lse2[rows], delta[rows]; // lse log2(e), +inf past the last
  int position[rows];            // of the rows, also past the last
  RowBlock block;                // what the block is at: registers are short
};

// Copies q and dO, finds delta, and starts copying the first tile of keys, unless the unit has no rows. As many threads
// as a row has chunks share a row. s->block is known to all threads then.
template <int D, int rows, int keys>
static __device__ inline bool dq_begin(DqShared<D, rows, keys> *s, const BackwardCall &c, int unit) {
  static_assert(rows <= THREADS, "a thread a row");
  typedef RowChunk<D, rows, THREADS> Chunk;
  const RowBlock block = row_block<rows>(c.b, c.shape, unit);
  if (block.count <= 0) return false;
  if (threadIdx.x == 0) s->block = block;
  uint4 o[Chunk::turns];
#pragma unroll
  for (int i = 0; i < Chunk::turns; i++) {
    Chunk chunk(c.shape, block.kv_head, block.first, block.count, i);
    int64_t out = chunk.element(c.shape, c.b.row[chunk.row.position]);
    copy16_async(shared_address(s->q) + chunk.to, c.q + chunk.element(c.shape, chunk.row.position), chunk.in);
    copy16_async(shared_address(s->dout) + chunk.to, c.dout + out, chunk.in);
    o[i] = make_uint4(0, 0, 0, 0);
    if (chunk.in) o[i] = *(const uint4 *)(c.o + out);
  }
  copy_commit();
  load_keys<THREADS>(&s->tiles[0], c, block.key, block.key_end, block.kv_head);
  copy_commit();
  int own = (int)threadIdx.x;
  if (own < rows) {
    KvRow at = kv_row(c.shape, block.kv_head, block.first + own);
    s->position[own] = at.position;
    s->lse2[own] = own < block.count ? c.lse[(int64_t)at.head * c.shape.T + at.position] * LOG2E : INFINITY;
  }
  copy_wait<1>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Chunk::turns; i++) {
    int at = threadIdx.x / (D / 8) + i * Chunk::step, chunk = threadIdx.x % (D / 8);
    float x[8], y[8], sum = 0;
    unpack8(o[i], x);
    unpack8(*(const uint4 *)(s->dout + tile_at<D, rows>(at, chunk)), y);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j] * y[j];
#pragma unroll
    for (int d = D / 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (chunk != 0) continue;
    s->delta[at] = sum;
    if (at < s->block.count) c.delta[row_line(c.shape, s->block.kv_head, s->block.first + at)] = sum;
  }
  return true;
}

// score [16, 8 n] -> p = exp2(score scale2 - lse2). lse2: of this lane's row g.
template <int n> static __device__ inline void query_probability(float (&p)[n][4], const float *lse2, float scale2) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float shift = lse2[8 * h];
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; i++) p[j][i] = exp2_fast(p[j][i] * scale2 - shift);
  }
}

// ds = p (dp - delta) as bf16 pairs, of which two neighbouring fragments are an A fragment.
template <int n>
static __device__ inline void query_gradient(uint32_t (&ds)[n][2], const float (&p)[n][4], const float (&dp)[n][4],
                                             const float *delta) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float d = delta[8 * h];
#pragma unroll
    for (int j = 0; j < n; j++)
      ds[j][h] = pack2(p[j][2 * h] * (dp[j][2 * h] - d), p[j][2 * h + 1] * (dp[j][2 * h + 1] - d));
  }
}

// Writes 16 rows of dq from row `row` of the query tile, where they are staged: no other warp needs these rows now.
template <int D, int rows, int keys>
static __device__ inline void dq_write(const float (&dq)[D / 8][4], DqShared<D, rows, keys> *s, int row,
                                       const BackwardCall &c) {
  const RowBlock &block = s->block;
  const float scale[2] = {c.shape.scale, c.shape.scale};
  __syncwarp(); // every lane has read the queries that others overwrite
  tile_store<D, rows>(s->q, row, dq, scale);
  __syncwarp();
#pragma unroll
  for (int i = threadIdx.x & 31; i < 16 * D / 8; i += 32) {
    int at = row + i / (D / 8);
    if (at >= block.count) continue;
    KvRow to = kv_row(c.shape, block.kv_head, block.first + at);
    *(uint4 *)(c.dq + ((int64_t)to.position * c.shape.H + to.head) * D + i % (D / 8) * 8) =
        tile_chunk<D, rows>(s->q, row, i);
  }
}

// ---- dk, dv: a block takes 64 keys of one kv head, a warp 16 of them; tiles of 64 rows of the kv head stream past,
// two in shared memory. Scores are held transposed, so that p and ds are A fragments where they stand. ----

enum { DKV_KEYS = 64, DKV_ROWS = 64 };

template <int D> struct __align__(1024) QueryTile {
  bf16 q[DKV_ROWS * D], dout[DKV_ROWS * D];
  float lse[DKV_ROWS], delta[DKV_ROWS];
};

// A unit: `count` keys from `first` on of one document and one kv head, none if count <= 0.
typedef struct DkvBlock {
  int kv_head, first, count;
  int row, row_end;          // rows that see some of them
  int late_start, early_end; // rows in [late_start, early_end) see all of them
} DkvBlock;

template <int D> struct DkvShared {
  bf16 k[DKV_KEYS * D], v[DKV_KEYS * D];
  QueryTile<D> rows[2];
  int32_t q_start[DKV_KEYS], q_end[DKV_KEYS]; // zeros past the last key: an empty interval
  DkvBlock block;                             // what the block is at: registers are short
};

static_assert(offsetof(DkvShared<128>, rows) % 1024 == 0 && offsetof(DkvShared<64>, rows) % 1024 == 0,
              "tiles begin on a block of the swizzle");
static_assert(DKV_KEYS == 16 * WARPS, "a warp has 16 keys");
static_assert(2 * sizeof(DkvShared<128>) <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");

static __device__ inline DkvBlock dkv_block(const Batch &b, const AttentionShape &s, int unit) {
  const int parts = BATCH_TILE / DKV_KEYS, heads = s.heads;
  Span span = batch_key_tile(b, unit / s.G / parts);
  DkvBlock block = {unit % s.G, span.first + unit / s.G % parts * DKV_KEYS, 0, 0, 0, 0, 0};
  block.count = min((int)DKV_KEYS, span.end - block.first);
  if (block.count <= 0) return block;
  int late_start = 0, early_end = INT_MAX, end = 0;
  for (int i = threadIdx.x & 31; i < block.count; i += 32) {
    int key = block.first + i; // q_start never decreases with the key, q_end may
    late_start = max(late_start, b.q_start[key]), early_end = min(early_end, b.q_end[key]),
    end = max(end, b.q_end[key]);
  }
  block.row = b.q_start[block.first] * heads;
  block.row_end = __reduce_max_sync(0xffffffffu, end) * heads;
  block.late_start = __reduce_max_sync(0xffffffffu, late_start) * heads;
  block.early_end = __reduce_min_sync(0xffffffffu, early_end) * heads;
  return block;
}

// Starts copying rows [row, row + DKV_ROWS), as many as are below row_end.
template <int D>
static __device__ inline void load_rows(QueryTile<D> *tile, const BackwardCall &c, const DkvBlock &block, int row) {
  static_assert(THREADS == 2 * DKV_ROWS, "a thread copies a row's lse or delta");
  typedef RowChunk<D, DKV_ROWS, THREADS> Chunk;
  const int count = block.row_end - row, own = threadIdx.x % DKV_ROWS;
#pragma unroll
  for (int i = 0; i < Chunk::turns; i++) {
    Chunk chunk(c.shape, block.kv_head, row, count, i);
    copy16_async(shared_address(tile->q) + chunk.to, c.q + chunk.element(c.shape, chunk.row.position), chunk.in);
    copy16_async(shared_address(tile->dout) + chunk.to, c.dout + chunk.element(c.shape, c.b.row[chunk.row.position]),
                 chunk.in);
  }
  bool delta = threadIdx.x >= DKV_ROWS, in = own < count;
  copy4_async(shared_address((delta ? tile->delta : tile->lse) + own),
              (delta ? c.delta : c.lse) + row_line(c.shape, block.kv_head, in ? row + own : row), in);
}

// Starts copying the keys and the first rows, unless the unit has no keys. s->block is known to all threads then.
template <int D> static __device__ inline bool dkv_begin(DkvShared<D> *s, const BackwardCall &c, int unit) {
  const DkvBlock block = dkv_block(c.b, c.shape, unit);
  if (block.count <= 0) return false;
  const int G = c.shape.G, first = block.first, count = block.count;
  int64_t at = ((int64_t)first * G + block.kv_head) * D;
  tile_load<D, DKV_KEYS, THREADS>(s->k, c.k + at, G * D, count);
  tile_load<D, DKV_KEYS, THREADS>(s->v, c.v + at, G * D, count);
  line_load<DKV_KEYS>(s->q_start, c.b.q_start + first, count);
  line_load<DKV_KEYS>(s->q_end, c.b.q_end + first, count);
  load_rows<D>(&s->rows[0], c, block, block.row);
  copy_commit();
  if (threadIdx.x == 0) s->block = block;
  __syncthreads();
  return true;
}

// score^T [16, 8 n] of rows from `row` on, of `heads` heads -> p^T = exp2(score^T scale2 - lse log2(e)), 0 where a row
// does not see a key; also as bf16 pairs, of which two neighbouring fragments are an A fragment.
template <int n>
static __device__ inline void key_probability(float (&p)[n][4], uint32_t (&pairs)[n][2], const float *lse, float scale2,
                                              bool partly, const int32_t *q_start, const int32_t *q_end, int row,
                                              int heads) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < n; j++) {
    float2 shift = *(const float2 *)(lse + 8 * j + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      p[j][2 * h] = exp2_fast(p[j][2 * h] * scale2 - shift.x * LOG2E);
      p[j][2 * h + 1] = exp2_fast(p[j][2 * h + 1] * scale2 - shift.y * LOG2E);
    }
  }
  if (partly) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int from = q_start[g + 8 * h] * heads - row - 2 * t, to = q_end[g + 8 * h] * heads - row - 2 * t;
#pragma unroll
      for (int j = 0; j < n; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (8 * j + i < from || 8 * j + i >= to) p[j][2 * h + i] = 0;
    }
  }
  pack_rows(pairs, p);
}

// ds^T = p^T (dp^T - delta), p and ds as pairs: registers are short, and p was rounded for dv, too.
template <int n>
static __device__ inline void key_gradient(uint32_t (&ds)[n][2], const uint32_t (&p)[n][2], const float (&dp)[n][4],
                                           const float *delta) {
#pragma unroll
  for (int j = 0; j < n; j++) {
    float2 d = *(const float2 *)(delta + 8 * j + 2 * (threadIdx.x & 3));
#pragma unroll
    for (int h = 0; h < 2; h++)
      ds[j][h] = pack2(__uint_as_float(p[j][h] << 16) * (dp[j][2 * h] - d.x),
                       __uint_as_float(p[j][h] & 0xffff0000u) * (dp[j][2 * h + 1] - d.y));
  }
}

// The same from p as it was.
static __device__ inline void key_gradient(uint32_t (&ds)[DKV_ROWS / 8][2], const float (&p)[DKV_ROWS / 8][4],
                                           const float (&dp)[DKV_ROWS / 8][4], const float *delta) {
#pragma unroll
  for (int n = 0; n < DKV_ROWS / 8; n++) {
    float2 d = *(const float2 *)(delta + 8 * n + 2 * (threadIdx.x & 3));
#pragma unroll
    for (int h = 0; h < 2; h++)
      ds[n][h] = pack2(p[n][2 * h] * (dp[n][2 * h] - d.x), p[n][2 * h + 1] * (dp[n][2 * h + 1] - d.y));
  }
}

// Stages a warp's rows in the tiles of keys and values and writes them.
template <int D>
static __device__ inline void dkv_write(const float (&dk)[D / 8][4], const float (&dv)[D / 8][4], DkvShared<D> *s,
                                        const BackwardCall &c) {
  const DkvBlock &block = s->block;
  const float scale[2] = {c.shape.scale, c.shape.scale}, one[2] = {1, 1};
  int row = threadIdx.x / 32 * 16;
  copy_wait<0>();
  __syncthreads(); // no one reads keys and values any more
  tile_store<D, DKV_KEYS>(s->k, row, dk, scale);
  tile_store<D, DKV_KEYS>(s->v, row, dv, one);
  __syncwarp();
#pragma unroll
  for (int i = threadIdx.x & 31; i < 16 * D / 8; i += 32) {
    int at = row + i / (D / 8);
    int64_t to = ((int64_t)(block.first + at) * c.shape.G + block.kv_head) * D + i % (D / 8) * 8;
    if (at < block.count) {
      *(uint4 *)(c.dk + to) = tile_chunk<D, DKV_KEYS>(s->k, row, i);
      *(uint4 *)(c.dv + to) = tile_chunk<D, DKV_KEYS>(s->v, row, i);
    }
  }
}

// Zeros in the gradients of filler, by all threads of the grid of either kernel.
static __device__ inline void dq_filler(const BackwardCall &c, int D) {
  zero_rows(c.dq, c.shape.H * D, batch_used(c.b), c.shape.T);
}
static __device__ inline void dkv_filler(const BackwardCall &c, int D) {
  zero_rows(c.dk, c.shape.G * D, batch_used(c.b), c.shape.T);
  zero_rows(c.dv, c.shape.G * D, batch_used(c.b), c.shape.T);
}

// ---- the host side ----

typedef void (*BackwardKernel)(BackwardCall);

// rows: the kernel of dq, which takes tiles of `count` rows and `rows_shared` bytes; keys: that of dk and dv.
template <int D>
static inline void launch_backward(const BackwardCall *c, BackwardKernel rows, int count, size_t rows_shared,
                                   BackwardKernel keys, cudaStream_t stream) {
  CUDA_ALLOW_SHARED(rows, rows_shared);
  CUDA_ALLOW_SHARED(keys, sizeof(DkvShared<D>));
  CUDA_LAUNCH(rows, tile_blocks(c->shape.T, count, c->shape.H), THREADS, rows_shared, stream, *c);
  CUDA_LAUNCH(keys, tile_blocks(c->shape.T, DKV_KEYS, c->shape.G), THREADS, sizeof(DkvShared<D>), stream, *c);
}
#endif
