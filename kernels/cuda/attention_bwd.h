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

// For head_dim 64 and for 128 on Hopper, and whether this card and this build have them. The latter does not use
// c->delta; its scratch, and the bytes of that.
bool attention_bwd_sm90_usable(void);
void attention_bwd_sm90(const BackwardCall *c, cudaStream_t stream);
void attention_bwd_pass(const BackwardCall *c, const Dims *d, void *scratch, cudaStream_t stream);
size_t attention_bwd_pass_scratch(const Dims *d);

// ---- dq: a block takes `queries` queries of one head; tiles of `keys` keys stream past, two in shared memory ----

template <int D, int queries, int keys> struct DqShared {
  bf16 q[queries * D], dout[queries * D];
  KeyTile<D, keys> tiles[2];
  float lse2[queries], delta[queries]; // lse log2(e), +inf for filler
};

// Copies the queries and dO, finds delta, and starts copying the first tile of keys. As many threads as a row has
// chunks share a row.
template <int D, int queries, int keys>
static __device__ inline QueryBlock dq_begin(DqShared<D, queries, keys> *s, const BackwardCall &c) {
  static_assert(queries <= THREADS && queries % (THREADS / (D / 8)) == 0, "a thread a query, rows in whole rounds");
  const int H = c.shape.H, T = c.shape.T, chunks = D / 8, step = THREADS / chunks;
  int head = blockIdx.x % H, first = blockIdx.x / H * queries, used = batch_used(c.b);
  int key = c.b.doc_start[first], key_end = c.b.kv_end[min(first + queries, T) - 1], count = min(queries, used - first);
  QueryBlock block = {head, head / (H / c.shape.G), first, 0, 0};
  if (count <= 0) return block;
  block.key = key;
  block.key_end = min(key_end, used); // filler's end is its own place; before it the last document ends at `used`
  tile_load<D, queries, THREADS>(s->q, c.q + ((int64_t)first * H + head) * D, H * D, count);
  tile_gather<D, queries, THREADS>(s->dout, c.dout + head * D, c.b.row + first, H * D, count);
  copy_commit();
  load_keys<THREADS>(&s->tiles[0], c, block.key, block.key_end, block.kv_head);
  copy_commit();

  int chunk = threadIdx.x % chunks, row = threadIdx.x / chunks;
  int64_t line = (int64_t)head * T + first;
  uint4 o[queries / step];
#pragma unroll
  for (int i = 0; i < queries / step; i++) {
    int at = row + i * step;
    o[i] = make_uint4(0, 0, 0, 0);
    if (at < count) o[i] = *(const uint4 *)(c.o + ((int64_t)c.b.row[first + at] * H + head) * D + chunk * 8);
  }
  if (threadIdx.x < queries) s->lse2[threadIdx.x] = threadIdx.x < count ? c.lse[line + threadIdx.x] * LOG2E : INFINITY;
  copy_wait<1>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < queries / step; i++) {
    int at = row + i * step;
    float x[8], y[8], sum = 0;
    unpack8(o[i], x);
    unpack8(*(const uint4 *)(s->dout + tile_at<D, queries>(at, chunk)), y);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j] * y[j];
#pragma unroll
    for (int d = chunks / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (chunk == 0) {
      s->delta[at] = sum;
      if (at < count) c.delta[line + at] = sum;
    }
  }
  return block;
}

// score [16, 8 n] -> p = exp2(score scale2 - lse2), 0 where a query does not see a key. lse2: of this lane's row g.
template <int n>
static __device__ inline void query_probability(float (&p)[n][4], const float *lse2, float scale2, TileView view,
                                                const int32_t *q_start, const int32_t *q_end, int query) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float shift = lse2[8 * h];
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; i++) p[j][i] = exp2_fast(p[j][i] * scale2 - shift);
  }
  if (view == TILE_PARTLY) mask_rows(p, 0, q_start, q_end, query);
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
template <int D, int queries, int keys>
static __device__ inline void dq_write(const float (&dq)[D / 8][4], DqShared<D, queries, keys> *s, int row,
                                       const QueryBlock &block, const BackwardCall &c) {
  const float scale[2] = {c.shape.scale, c.shape.scale};
  tile_store<D, queries>(s->q, row, dq, scale);
  __syncwarp();
#pragma unroll
  for (int i = threadIdx.x & 31; i < 16 * D / 8; i += 32) {
    int at = block.first + row + i / (D / 8);
    if (at < c.shape.T)
      *(uint4 *)(c.dq + ((int64_t)at * c.shape.H + block.head) * D + i % (D / 8) * 8) =
          tile_chunk<D, queries>(s->q, row, i);
  }
}

// ---- dk, dv: a block takes 64 keys of one kv head, a warp 16 of them; tiles of 64 queries of each head that shares
// the kv head stream past, two in shared memory. Scores are held transposed, so that p and ds are A fragments where
// they stand. ----

enum { DKV_KEYS = 64, DKV_QUERIES = 64 };

template <int D> struct __align__(1024) QueryTile {
  bf16 q[DKV_QUERIES * D], dout[DKV_QUERIES * D];
  float lse[DKV_QUERIES], delta[DKV_QUERIES];
};
template <int D> struct DkvShared {
  bf16 k[DKV_KEYS * D], v[DKV_KEYS * D];
  QueryTile<D> queries[2];
  int32_t q_start[DKV_KEYS], q_end[DKV_KEYS]; // zeros past the last key: an empty interval
};

static_assert(offsetof(DkvShared<128>, queries) % 1024 == 0 && offsetof(DkvShared<64>, queries) % 1024 == 0,
              "tiles begin on a block of the swizzle");
static_assert(DKV_KEYS == 16 * WARPS && DKV_QUERIES <= (int)THREADS,
              "a warp has 16 keys; a thread copies a query's lse");
static_assert(2 * sizeof(DkvShared<128>) <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");

// What a block is for. Block: kv head blockIdx % G of key tile blockIdx / G.
typedef struct DkvBlock {
  int kv_head, first;   // its keys begin at `first`
  int query, query_end; // queries that see some of them
  int tiles;            // of queries, for each of the heads
} DkvBlock;

// Starts copying tile i: tiles come head by head.
template <int D>
static __device__ inline void load_queries(QueryTile<D> *tile, const BackwardCall &c, const DkvBlock &block, int i) {
  const int H = c.shape.H, end = block.query_end;
  int query = block.query + i % block.tiles * DKV_QUERIES, head = block.kv_head * (H / c.shape.G) + i / block.tiles;
  int64_t line = (int64_t)head * c.shape.T + query;
  tile_load<D, DKV_QUERIES, THREADS>(tile->q, c.q + ((int64_t)query * H + head) * D, H * D, end - query);
  tile_gather<D, DKV_QUERIES, THREADS>(tile->dout, c.dout + head * D, c.b.row + query, H * D, end - query);
  line_load<DKV_QUERIES>(tile->lse, c.lse + line, end - query);
  line_load<DKV_QUERIES>(tile->delta, c.delta + line, end - query);
}

// Starts copying the keys and the first tile of queries.
template <int D> static __device__ inline DkvBlock dkv_begin(DkvShared<D> *s, const BackwardCall &c) {
  const int G = c.shape.G;
  int kv_head = blockIdx.x % G, first = blockIdx.x / G * DKV_KEYS, used = batch_used(c.b);
  int query = c.b.q_start[first], query_end = 0; // q_start never decreases with the key; q_end may
  for (int i = first + (threadIdx.x & 31); i < min(first + DKV_KEYS, c.shape.T); i += 32)
    query_end = max(query_end, c.b.q_end[i]);
  query_end = min(__reduce_max_sync(0xffffffffu, query_end), used); // as in dq_begin
  DkvBlock block = {kv_head, first, 0, 0, 0};
  if (first < used) {
    block = {kv_head, first, query, query_end, ceil_div(query_end - query, DKV_QUERIES)};
    int64_t at = ((int64_t)first * G + kv_head) * D;
    tile_load<D, DKV_KEYS, THREADS>(s->k, c.k + at, G * D, used - first);
    tile_load<D, DKV_KEYS, THREADS>(s->v, c.v + at, G * D, used - first);
    line_load<DKV_KEYS>(s->q_start, c.b.q_start + first, used - first);
    line_load<DKV_KEYS>(s->q_end, c.b.q_end + first, used - first);
    load_queries<D>(&s->queries[0], c, block, 0);
  }
  copy_commit();
  return block;
}

// score^T [16, DKV_QUERIES] -> p^T = exp2(score^T scale2 - lse log2(e)), 0 where a query does not see a key; also as
// bf16 pairs, of which two neighbouring fragments are an A fragment.
static __device__ inline void key_probability(float (&p)[DKV_QUERIES / 8][4], uint32_t (&pairs)[DKV_QUERIES / 8][2],
                                              const float *lse, float scale2, TileView view, const int32_t *q_start,
                                              const int32_t *q_end, int query) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < DKV_QUERIES / 8; n++) {
    float2 shift = *(const float2 *)(lse + 8 * n + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      p[n][2 * h] = exp2_fast(p[n][2 * h] * scale2 - shift.x * LOG2E);
      p[n][2 * h + 1] = exp2_fast(p[n][2 * h + 1] * scale2 - shift.y * LOG2E);
    }
  }
  if (view == TILE_PARTLY) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int from = q_start[g + 8 * h] - query - 2 * t, to = q_end[g + 8 * h] - query - 2 * t;
#pragma unroll
      for (int n = 0; n < DKV_QUERIES / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (8 * n + i < from || 8 * n + i >= to) p[n][2 * h + i] = 0;
    }
  }
#pragma unroll
  for (int n = 0; n < DKV_QUERIES / 8; n++) {
    pairs[n][0] = pack2(p[n][0], p[n][1]);
    pairs[n][1] = pack2(p[n][2], p[n][3]);
  }
}

// ds^T = p^T (dp^T - delta) as pairs.
static __device__ inline void key_gradient(uint32_t (&ds)[DKV_QUERIES / 8][2], const float (&p)[DKV_QUERIES / 8][4],
                                           const float (&dp)[DKV_QUERIES / 8][4], const float *delta) {
#pragma unroll
  for (int n = 0; n < DKV_QUERIES / 8; n++) {
    float2 d = *(const float2 *)(delta + 8 * n + 2 * (threadIdx.x & 3));
#pragma unroll
    for (int h = 0; h < 2; h++)
      ds[n][h] = pack2(p[n][2 * h] * (dp[n][2 * h] - d.x), p[n][2 * h + 1] * (dp[n][2 * h + 1] - d.y));
  }
}

// Stages a warp's rows in the tiles of keys and values and writes them.
template <int D>
static __device__ inline void dkv_write(const float (&dk)[D / 8][4], const float (&dv)[D / 8][4], DkvShared<D> *s,
                                        const DkvBlock &block, const BackwardCall &c) {
  const float scale[2] = {c.shape.scale, c.shape.scale}, one[2] = {1, 1};
  int row = threadIdx.x / 32 * 16;
  copy_wait<0>();
  __syncthreads(); // no one reads keys and values any more
  tile_store<D, DKV_KEYS>(s->k, row, dk, scale);
  tile_store<D, DKV_KEYS>(s->v, row, dv, one);
  __syncwarp();
#pragma unroll
  for (int i = threadIdx.x & 31; i < 16 * D / 8; i += 32) {
    int at = block.first + row + i / (D / 8);
    int64_t to = ((int64_t)at * c.shape.G + block.kv_head) * D + i % (D / 8) * 8;
    if (at < c.shape.T) {
      *(uint4 *)(c.dk + to) = tile_chunk<D, DKV_KEYS>(s->k, row, i);
      *(uint4 *)(c.dv + to) = tile_chunk<D, DKV_KEYS>(s->v, row, i);
    }
  }
}

// ---- the host side ----

typedef void (*BackwardKernel)(BackwardCall);

// queries: the kernel of dq, which takes tiles of `rows` queries and `queries_shared` bytes; keys: that of dk and dv.
template <int D>
static inline void launch_backward(const BackwardCall *c, BackwardKernel queries, int rows, size_t queries_shared,
                                   BackwardKernel keys, cudaStream_t stream) {
  CUDA_ALLOW_SHARED(queries, queries_shared);
  CUDA_ALLOW_SHARED(keys, sizeof(DkvShared<D>));
  CUDA_LAUNCH(queries, ceil_div(c->shape.T, rows) * c->shape.H, THREADS, queries_shared, stream, *c);
  CUDA_LAUNCH(keys, ceil_div(c->shape.T, DKV_KEYS) * c->shape.G, THREADS, sizeof(DkvShared<D>), stream, *c);
}
#endif
