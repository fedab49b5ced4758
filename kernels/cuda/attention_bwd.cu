// Attention over packed documents, backward: FlashAttention-2 (Dao, 2023) as two kernels, so that every gradient has
// one writer that sums in a fixed order. With p = exp(s - lse), s = q k^T / sqrt(D) and delta = rowsum(dO * O):
//
//   dv = p^T dO        ds = p * (dO v^T - delta)        dq = ds k / sqrt(D)        dk = ds^T q / sqrt(D)
//
// The first kernel takes tiles of queries, finds delta and dq; the second takes tiles of keys, finds dk and dv. Rows
// that lie together leave out the tiles that none of them sees and compare intervals only in those that some see in
// part.
//
// Either kernel exists twice: one multiplies with warpgroups (sm_90a), the other, for other targets and D = 32, with
// warps.
#include "kernels/cuda/attention_wgmma.h"

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

// ---- dq with warps: 128 queries, a warp 32 of them as two sets of 16; 32 keys ----

enum { DQ_QUERIES = 128, DQ_KEYS = 32, DQ_ROWS = DQ_QUERIES / WARPS };

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries(BackwardCall c) {
  extern __shared__ __align__(1024) char shared[];
  auto s = (DqShared<D, DQ_QUERIES, DQ_KEYS> *)shared;
  QueryBlock block = dq_begin(s, c);
  int row = threadIdx.x / 32 * DQ_ROWS, query = block.first + row, g = (threadIdx.x & 31) >> 2, stage = 0;
  float dq[2][D / 8][4];
  fragments_zero(dq[0]);
  fragments_zero(dq[1]);
  for (int key = block.key; key < block.key_end; key += DQ_KEYS, stage ^= 1) {
    copy_wait<0>();
    __syncthreads(); // the tile is there, and no warp still reads the other stage
    if (key + DQ_KEYS < block.key_end)
      load_keys<THREADS>(&s->tiles[stage ^ 1], c, key + DQ_KEYS, block.key_end, block.kv_head);
    copy_commit();
    const KeyTile<D, DQ_KEYS> *tile = &s->tiles[stage];
    TileView view = tile_view<DQ_KEYS>(tile->q_start, tile->q_end, query, query + DQ_ROWS - 1);
    if (view == TILE_HIDDEN) continue;
    uint32_t place = tile_place<D, DQ_QUERIES>(s->q) + row * tile_pitch<D>(), k_place = tile_place<D, DQ_KEYS>(tile->k);
    float p[2][DQ_KEYS / 8][4], dp[2][DQ_KEYS / 8][4];
    uint32_t ds[2][DQ_KEYS / 8][2];
    rows_product<D, DQ_QUERIES, DQ_KEYS>(p, place, k_place);
#pragma unroll
    for (int m = 0; m < 2; m++)
      query_probability(p[m], s->lse2 + row + 16 * m + g, c.shape.scale * LOG2E, view, tile->q_start, tile->q_end,
                        query + 16 * m + g);
    rows_product<D, DQ_QUERIES, DQ_KEYS>(dp, place + sizeof s->q, tile_place<D, DQ_KEYS>(tile->v));
#pragma unroll
    for (int m = 0; m < 2; m++) query_gradient(ds[m], p[m], dp[m], s->delta + row + 16 * m + g);
#pragma unroll
    for (int step = 0; step < DQ_KEYS / 16; step++)
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        fragments_b_rows<D, DQ_KEYS>(b, k_place, 16 * step, n / 2);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_add(dq[m][n], ds[m][2 * step], b);
          mma_add(dq[m][n + 1], ds[m][2 * step], b + 2);
        }
      }
  }
  dq_write(dq[0], s, row, block, c);
  dq_write(dq[1], s, row + 16, block, c);
}

// ---- dq with one warpgroup: 64 queries, 64 keys ----

enum { GROUP_ROWS = 64 };

template <int D>
static __global__ void __launch_bounds__(THREADS, D == 64 ? 3 : 2) attention_backward_queries_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  auto s = (DqShared<D, GROUP_ROWS, GROUP_ROWS> *)shared;
  QueryBlock block = dq_begin(s, c);
  int row = threadIdx.x / 32 * 16, lane_row = row + ((threadIdx.x & 31) >> 2), stage = 0;
  float dq[D / 8][4];
  fragments_zero(dq);
  for (int key = block.key; key < block.key_end; key += GROUP_ROWS, stage ^= 1) {
    copy_wait<0>();
    fence_async_proxy();
    __syncthreads(); // the tile is there for the tensor cores, and no warp still reads the other stage
    if (key + GROUP_ROWS < block.key_end)
      load_keys<THREADS>(&s->tiles[stage ^ 1], c, key + GROUP_ROWS, block.key_end, block.kv_head);
    copy_commit();
    const KeyTile<D, GROUP_ROWS> *tile = &s->tiles[stage];
    TileView view = tile_view<GROUP_ROWS>(tile->q_start, tile->q_end, block.first, block.first + GROUP_ROWS - 1);
    if (view == TILE_HIDDEN) continue;
    float p[GROUP_ROWS / 8][4], dp[GROUP_ROWS / 8][4];
    uint32_t ds[GROUP_ROWS / 8][2];
    start_scores<D, GROUP_ROWS>(p, s->q, tile->k);
    start_scores<D, GROUP_ROWS>(dp, s->dout, tile->v);
    wgmma_wait<1>();
    wgmma_keep(p);
    query_probability(p, s->lse2 + lane_row, c.shape.scale * LOG2E, view, tile->q_start, tile->q_end,
                      block.first + lane_row);
    wgmma_wait<0>();
    wgmma_keep(dp);
    query_gradient(ds, p, dp, s->delta + lane_row);
    start_sum<D>(dq, ds, tile->k);
    wgmma_wait<0>();
    wgmma_keep(dq);
  }
  __syncthreads(); // the tensor cores have read every warp's rows
  dq_write(dq, s, row, block, c);
#endif
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

// ---- dk, dv with warps ----

// c [16, DKV_QUERIES] = a b^T: a a warp's rows of a key tile, b a query tile, by their places.
template <int D>
static __device__ inline void dkv_product(float (&c)[DKV_QUERIES / 8][4], uint32_t a_place, uint32_t b_place) {
  fragments_zero(c);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[4];
    fragment_a<D, DKV_KEYS>(a, a_place, 0, step);
#pragma unroll
    for (int n = 0; n < DKV_QUERIES / 8; n += 2) {
      uint32_t b[4];
      fragments_b<D, DKV_QUERIES>(b, b_place, 8 * n, step);
      mma_add(c[n], a, b);
      mma_add(c[n + 1], a, b + 2);
    }
  }
}

// sum [16, D] += x b: x [16, DKV_QUERIES] as pairs, b a query tile by its place.
template <int D>
static __device__ inline void dkv_add(float (&sum)[D / 8][4], const uint32_t (&x)[DKV_QUERIES / 8][2],
                                      uint32_t b_place) {
#pragma unroll
  for (int step = 0; step < DKV_QUERIES / 16; step++)
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      fragments_b_rows<D, DKV_QUERIES>(b, b_place, 16 * step, n / 2);
      mma_add(sum[n], x[2 * step], b);
      mma_add(sum[n + 1], x[2 * step], b + 2);
    }
}

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys(BackwardCall c) {
  extern __shared__ __align__(1024) char shared[];
  DkvShared<D> *s = (DkvShared<D> *)shared;
  DkvBlock block = dkv_begin<D>(s, c);
  int row = threadIdx.x / 32 * 16, tiles = c.shape.H / c.shape.G * block.tiles;
  float dk[D / 8][4], dv[D / 8][4];
  fragments_zero(dk);
  fragments_zero(dv);
  for (int i = 0; i < tiles; i++) {
    copy_wait<0>();
    __syncthreads(); // the tile is there, and no warp still reads the other stage
    if (i + 1 < tiles) load_queries<D>(&s->queries[(i + 1) & 1], c, block, i + 1);
    copy_commit();
    int query = block.query + i % block.tiles * DKV_QUERIES;
    TileView view = tile_view<16>(s->q_start + row, s->q_end + row, query, query + DKV_QUERIES - 1);
    if (view == TILE_HIDDEN) continue;
    const QueryTile<D> *tile = &s->queries[i & 1];
    uint32_t place = tile_place<D, DKV_KEYS>(s->k) + row * tile_pitch<D>();
    uint32_t q_place = tile_place<D, DKV_QUERIES>(tile->q), dout_place = q_place + sizeof tile->q;
    float p[DKV_QUERIES / 8][4], dp[DKV_QUERIES / 8][4];
    uint32_t pairs[DKV_QUERIES / 8][2];
    dkv_product<D>(p, place, q_place);
    key_probability(p, pairs, tile->lse, c.shape.scale * LOG2E, view, s->q_start + row, s->q_end + row, query);
    dkv_add<D>(dv, pairs, dout_place);
    dkv_product<D>(dp, place + sizeof s->k, dout_place);
    key_gradient(pairs, p, dp, tile->delta);
    dkv_add<D>(dk, pairs, q_place);
  }
  dkv_write<D>(dk, dv, s, block, c);
}

// ---- dk, dv with one warpgroup ----

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  DkvShared<D> *s = (DkvShared<D> *)shared;
  DkvBlock block = dkv_begin<D>(s, c);
  int row = threadIdx.x / 32 * 16, tiles = c.shape.H / c.shape.G * block.tiles;
  float dk[D / 8][4], dv[D / 8][4];
  fragments_zero(dk);
  fragments_zero(dv);
  for (int i = 0; i < tiles; i++) {
    copy_wait<0>();
    fence_async_proxy();
    __syncthreads(); // the tile is there for the tensor cores, and no warp still reads the other stage
    if (i + 1 < tiles) load_queries<D>(&s->queries[(i + 1) & 1], c, block, i + 1);
    copy_commit();
    int query = block.query + i % block.tiles * DKV_QUERIES;
    TileView view = tile_view<DKV_KEYS>(s->q_start, s->q_end, query, query + DKV_QUERIES - 1);
    if (view == TILE_HIDDEN) continue;
    const QueryTile<D> *tile = &s->queries[i & 1];
    float p[DKV_QUERIES / 8][4], dp[DKV_QUERIES / 8][4];
    uint32_t pairs[DKV_QUERIES / 8][2], ds[DKV_QUERIES / 8][2];
    start_scores<D, DKV_KEYS>(p, s->k, tile->q);
    start_scores<D, DKV_KEYS>(dp, s->v, tile->dout);
    wgmma_wait<1>();
    wgmma_keep(p);
    key_probability(p, pairs, tile->lse, c.shape.scale * LOG2E, view, s->q_start + row, s->q_end + row, query);
    start_sum<D>(dv, pairs, tile->dout);
    wgmma_wait<1>(); // dp is there; dv is under way
    wgmma_keep(dp);
    key_gradient(ds, p, dp, tile->delta);
    start_sum<D>(dk, ds, tile->q);
    wgmma_wait<0>();
    wgmma_keep(dv);
    wgmma_keep(dk);
  }
  dkv_write<D>(dk, dv, s, block, c);
#endif
}

// ---- the host side ----

size_t attention_scratch(OpKind kind, const Dims *d, const OpArgs *) {
  return kind == OP_ATTENTION_BWD ? sizeof(float) * d->H * d->T : 0; // delta
}

typedef void (*BackwardKernel)(BackwardCall);

// queries: the kernel of dq, which takes tiles of `rows` queries and `queries_shared` bytes; keys: that of dk and dv.
template <int D>
static void launch_backward(const KernelCall *call, BackwardKernel queries, int rows, size_t queries_shared,
                            BackwardKernel keys) {
  const Dims *d = call->dims;
  BackwardCall c = {.dout = (const bf16 *)call->in[0],
                    .o = (const bf16 *)call->in[1],
                    .q = (const bf16 *)call->in[2],
                    .k = (const bf16 *)call->in[3],
                    .v = (const bf16 *)call->in[4],
                    .lse = (const float *)call->in[5],
                    .delta = (float *)call->scratch,
                    .dq = (bf16 *)call->out[0],
                    .dk = (bf16 *)call->out[1],
                    .dv = (bf16 *)call->out[2],
                    .shape = {d->T, d->H, d->G, 1 / sqrtf((float)D)},
                    .b = *call->batch};
  CUDA_ALLOW_SHARED(queries, queries_shared);
  CUDA_ALLOW_SHARED(keys, sizeof(DkvShared<D>));
  CUDA_LAUNCH(queries, ceil_div(d->T, rows) * d->H, THREADS, queries_shared, call_stream(call), c);
  CUDA_LAUNCH(keys, ceil_div(d->T, DKV_KEYS) * d->G, THREADS, sizeof(DkvShared<D>), call_stream(call), c);
}

template <int D> static void launch_warps(const KernelCall *c) {
  launch_backward<D>(c, attention_backward_queries<D>, DQ_QUERIES, sizeof(DqShared<D, DQ_QUERIES, DQ_KEYS>),
                     attention_backward_keys<D>);
}
template <int D> static void launch_groups(const KernelCall *c) {
  launch_backward<D>(c, attention_backward_queries_sm90<D>, GROUP_ROWS, sizeof(DqShared<D, GROUP_ROWS, GROUP_ROWS>),
                     attention_backward_keys_sm90<D>);
}

extern "C" void cuda_ATTENTION_BWD(const KernelCall *c) {
  static const bool groups = built_for_sm90((const void *)attention_backward_keys_sm90<128>);
  switch (c->dims->D) {
  case 32:
    return launch_warps<32>(c);
  case 64:
    return groups ? launch_groups<64>(c) : launch_warps<64>(c);
  default:
    return groups ? launch_groups<128>(c) : launch_warps<128>(c);
  }
}
