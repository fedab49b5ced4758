// Attention over packed documents, backward: FlashAttention-2 (Dao, 2023) as two kernels, so that every gradient has
// one writer that sums in a fixed order. With p = exp(s - lse), s = q k^T / sqrt(D) and delta = rowsum(dO * O):
//
//   dv = p^T dO        ds = p * (dO v^T - delta)        dq = ds k / sqrt(D)        dk = ds^T q / sqrt(D)
//
// The first kernel takes tiles of queries, finds delta and dq; the second takes tiles of keys, finds dk and dv. Warps
// leave out the tiles that none of their rows sees and compare intervals only in those that some see in part.
#include "kernels/cuda/attention.h"

enum { WARPS = 4, THREADS = 32 * WARPS };

// One call, as both kernels see it.
typedef struct BackwardCall {
  const bf16 *dout, *o;  // [T, H D], row order
  const bf16 *q, *k, *v; // [T, H, D], [T, G, D] twice
  const float *lse;      // [H, T]
  float *delta;          // [H, T], positions before the filler only
  bf16 *dq, *dk, *dv;    // as q, k, v
  AttentionShape shape;
  Batch b;
} BackwardCall;

// c [16, 8] fragments = 0
template <int n> static __device__ inline void fragments_zero(float c[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
}

// ---- dq: a block takes 128 queries of one head, a warp 32 of them; tiles of 32 keys stream past ----

enum { DQ_QUERIES = 128, DQ_KEYS = 32, DQ_ROWS = DQ_QUERIES / WARPS };

template <int D> struct DqKeys {
  bf16 k[DQ_KEYS * D], v[DQ_KEYS * D];
  int32_t q_start[DQ_KEYS], q_end[DQ_KEYS]; // zeros past the last key: an empty interval
};
template <int D> struct DqShared {
  bf16 q[DQ_QUERIES * D], dout[DQ_QUERIES * D];
  DqKeys<D> keys[2];
  float lse2[DQ_QUERIES], delta[DQ_QUERIES]; // lse log2(e); +inf for filler
};

template <int D>
static __device__ inline void dq_load_keys(DqKeys<D> *tile, const BackwardCall &c, int key, int end, int kv_head) {
  int64_t at = ((int64_t)key * c.shape.G + kv_head) * D;
  tile_load<D, DQ_KEYS, THREADS>(tile->k, c.k + at, c.shape.G * D, end - key);
  tile_load<D, DQ_KEYS, THREADS>(tile->v, c.v + at, c.shape.G * D, end - key);
  line_load<DQ_KEYS>(tile->q_start, c.b.q_start + key, end - key);
  line_load<DQ_KEYS>(tile->q_end, c.b.q_end + key, end - key);
}

// delta of the block's queries, to shared memory and, for the second kernel, to c.delta. The tile of dO has arrived. As
// many threads as a row has chunks share a row.
template <int D>
static __device__ inline void find_delta(DqShared<D> *s, const BackwardCall &c, int first, int end, int head) {
  const int chunks = D / 8, step = THREADS / chunks;
  int chunk = threadIdx.x % chunks;
#pragma unroll 4
  for (int row = threadIdx.x / chunks; row < DQ_QUERIES; row += step) {
    int query = first + row;
    float a[8], b[8], sum = 0;
    if (query < end) {
      load8(c.o + ((int64_t)c.b.row[query] * c.shape.H + head) * D + chunk * 8, a);
      unpack8(*(const uint4 *)(s->dout + tile_at<D>(row, chunk)), b);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
#pragma unroll
    for (int d = chunks / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (chunk) continue;
    int64_t at = (int64_t)head * c.shape.T + query;
    s->delta[row] = sum;
    s->lse2[row] = query < end ? c.lse[at] * LOG2E : INFINITY;
    if (query < end) c.delta[at] = sum;
  }
}

// c [32, DQ_KEYS] = a b^T: a a warp's rows of a query tile, b a key tile, by their places.
template <int D>
static __device__ inline void dq_product(float c[2][DQ_KEYS / 8][4], uint32_t a_place, uint32_t b_place) {
  fragments_zero<DQ_KEYS / 8>(c[0]);
  fragments_zero<DQ_KEYS / 8>(c[1]);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[2][4];
    fragment_a<D>(a[0], a_place, 0, step);
    fragment_a<D>(a[1], a_place, 16, step);
#pragma unroll
    for (int n = 0; n < DQ_KEYS / 8; n += 2) {
      uint32_t b[4];
      fragments_b<D>(b, b_place, 8 * n, step);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_add(c[m][n], a[m], b);
        mma_add(c[m][n + 1], a[m], b + 2);
      }
    }
  }
}

// p [32, DQ_KEYS] = exp2(score scale2 - lse2), 0 where a query does not see a key.
static __device__ inline void dq_probability(float p[2][DQ_KEYS / 8][4], const float *lse2, float scale2, bool partly,
                                             const int32_t *q_start, const int32_t *q_end, int query) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float shift = lse2[16 * m + 8 * h + g];
#pragma unroll
      for (int n = 0; n < DQ_KEYS / 8; n++)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; i++) p[m][n][i] = exp2_fast(p[m][n][i] * scale2 - shift);
    }
  if (!partly) return;
#pragma unroll
  for (int n = 0; n < DQ_KEYS / 8; n++) {
    int2 from = *(const int2 *)(q_start + 8 * n + 2 * t), to = *(const int2 *)(q_end + 8 * n + 2 * t);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int at = query + 16 * m + 8 * h + g;
        if (at < from.x || at >= to.x) p[m][n][2 * h] = 0;
        if (at < from.y || at >= to.y) p[m][n][2 * h + 1] = 0;
      }
  }
}

// Block: head blockIdx % H of query tile blockIdx / H. Writes dq and delta.
template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries(BackwardCall c) {
  extern __shared__ __align__(256) char shared[];
  DqShared<D> *s = (DqShared<D> *)shared;
  const int H = c.shape.H;
  int head = blockIdx.x % H, first = blockIdx.x / H * DQ_QUERIES, end = min(first + DQ_QUERIES, batch_used(c.b));
  int kv_head = head / (H / c.shape.G), row = threadIdx.x / 32 * DQ_ROWS, query = first + row;

  int key = 0, key_end = 0; // keys that some query of the block may see; both bounds never decrease with the query
  if (first < end) {
    key = c.b.doc_start[first];
    key_end = c.b.kv_end[end - 1];
    tile_load<D, DQ_QUERIES, THREADS>(s->q, c.q + ((int64_t)first * H + head) * D, H * D, end - first);
    tile_gather<D, DQ_QUERIES, THREADS>(s->dout, c.dout + head * D, c.b.row + first, H * D, end - first);
    copy_commit();
    dq_load_keys<D>(&s->keys[0], c, key, key_end, kv_head);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    find_delta<D>(s, c, first, end, head);
  }

  float dq[2][D / 8][4];
  fragments_zero<D / 8>(dq[0]);
  fragments_zero<D / 8>(dq[1]);
  for (int stage = 0; key < key_end; key += DQ_KEYS, stage ^= 1) {
    copy_wait<0>();
    __syncthreads(); // the tile is there, and no warp still reads the other stage
    if (key + DQ_KEYS < key_end) dq_load_keys<D>(&s->keys[stage ^ 1], c, key + DQ_KEYS, key_end, kv_head);
    copy_commit();
    const DqKeys<D> *tile = &s->keys[stage];
    TileView view = tile_view<DQ_KEYS>(tile->q_start, tile->q_end, query, query + DQ_ROWS - 1);
    if (view == TILE_HIDDEN) continue;
    float p[2][DQ_KEYS / 8][4], dp[2][DQ_KEYS / 8][4];
    dq_product<D>(p, tile_place<D>(s->q + row * D), tile_place<D>(tile->k));
    dq_probability(p, s->lse2 + row, c.shape.scale * LOG2E, view == TILE_PARTLY, tile->q_start, tile->q_end, query);
    dq_product<D>(dp, tile_place<D>(s->dout + row * D), tile_place<D>(tile->v));
    uint32_t ds[2][DQ_KEYS / 8][2]; // pairs; two neighbouring fragments are an A fragment
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float delta = s->delta[row + 16 * m + 8 * h + ((threadIdx.x & 31) >> 2)];
#pragma unroll
        for (int n = 0; n < DQ_KEYS / 8; n++)
          ds[m][n][h] =
              pack2(p[m][n][2 * h] * (dp[m][n][2 * h] - delta), p[m][n][2 * h + 1] * (dp[m][n][2 * h + 1] - delta));
      }
    uint32_t k_place = tile_place<D>(tile->k);
#pragma unroll
    for (int step = 0; step < DQ_KEYS / 16; step++)
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        fragments_b_rows<D>(b, k_place, 16 * step, n / 2);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_add(dq[m][n], ds[m][2 * step], b);
          mma_add(dq[m][n + 1], ds[m][2 * step], b + 2);
        }
      }
  }

  const float scale[2] = {c.shape.scale, c.shape.scale};
  int lane = threadIdx.x & 31;
  tile_store<D>(s->q, row, dq[0], scale); // only this warp reads these rows
  tile_store<D>(s->q, row + 16, dq[1], scale);
  __syncwarp();
  for (int i = lane; i < DQ_ROWS * D / 8 && query + i / (D / 8) < c.shape.T; i += 32)
    *(uint4 *)(c.dq + ((int64_t)(query + i / (D / 8)) * H + head) * D + i % (D / 8) * 8) = tile_chunk<D>(s->q, row, i);
}

// ---- dk, dv: a block takes 64 keys of one kv head, a warp 16 of them; tiles of 64 queries of each head that shares
// the kv head stream past. Scores are held transposed, so that p and ds are A fragments where they stand. ----

enum { DKV_KEYS = 64, DKV_QUERIES = 64, DKV_ROWS = DKV_KEYS / WARPS };

template <int D> struct DkvQueries {
  bf16 q[DKV_QUERIES * D], dout[DKV_QUERIES * D];
  float lse[DKV_QUERIES], delta[DKV_QUERIES];
};
template <int D> struct DkvShared {
  bf16 k[DKV_KEYS * D], v[DKV_KEYS * D];
  DkvQueries<D> queries[2];
};

template <int D>
static __device__ inline void dkv_load_queries(DkvQueries<D> *tile, const BackwardCall &c, int query, int end,
                                               int head) {
  const int H = c.shape.H;
  int64_t line = (int64_t)head * c.shape.T + query;
  tile_load<D, DKV_QUERIES, THREADS>(tile->q, c.q + ((int64_t)query * H + head) * D, H * D, end - query);
  tile_gather<D, DKV_QUERIES, THREADS>(tile->dout, c.dout + head * D, c.b.row + query, H * D, end - query);
  line_load<DKV_QUERIES>(tile->lse, c.lse + line, end - query);
  line_load<DKV_QUERIES>(tile->delta, c.delta + line, end - query);
}

// c [16, DKV_QUERIES] = a b^T: a a warp's rows of a key tile, b a query tile, by their places.
template <int D>
static __device__ inline void dkv_product(float c[DKV_QUERIES / 8][4], uint32_t a_place, uint32_t b_place) {
  fragments_zero<DKV_QUERIES / 8>(c);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[4];
    fragment_a<D>(a, a_place, 0, step);
#pragma unroll
    for (int n = 0; n < DKV_QUERIES / 8; n += 2) {
      uint32_t b[4];
      fragments_b<D>(b, b_place, 8 * n, step);
      mma_add(c[n], a, b);
      mma_add(c[n + 1], a, b + 2);
    }
  }
}

// sum [16, D] += x b: x [16, DKV_QUERIES] as pairs, b a query tile by its place.
template <int D>
static __device__ inline void dkv_add(float sum[D / 8][4], const uint32_t x[DKV_QUERIES / 8][2], uint32_t b_place) {
#pragma unroll
  for (int step = 0; step < DKV_QUERIES / 16; step++)
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      fragments_b_rows<D>(b, b_place, 16 * step, n / 2);
      mma_add(sum[n], x[2 * step], b);
      mma_add(sum[n + 1], x[2 * step], b + 2);
    }
}

// The queries that see a warp's keys: those of this lane's keys g and g + 8, and bounds over the warp's.
typedef struct KeyRange {
  int from[2], to[2];
  int early_start, late_start, early_end, late_end;
} KeyRange;

static __device__ inline KeyRange key_range(const Batch &b, int key, int T) {
  KeyRange r;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int at = key + 8 * h + ((threadIdx.x & 31) >> 2);
    r.from[h] = at < T ? b.q_start[at] : 0;
    r.to[h] = at < T ? b.q_end[at] : 0;
  }
  r.early_start = __reduce_min_sync(0xffffffffu, min(r.from[0], r.from[1]));
  r.late_start = __reduce_max_sync(0xffffffffu, max(r.from[0], r.from[1]));
  r.early_end = __reduce_min_sync(0xffffffffu, min(r.to[0], r.to[1]));
  r.late_end = __reduce_max_sync(0xffffffffu, max(r.to[0], r.to[1]));
  return r;
}

// p^T [16, DKV_QUERIES] = exp2(score^T scale2 - lse2), 0 where a query does not see a key; also as pairs in bf16.
static __device__ inline void dkv_probability(float p[DKV_QUERIES / 8][4], uint32_t pairs[DKV_QUERIES / 8][2],
                                              const float *lse, float scale2, bool partly, const KeyRange &range,
                                              int query) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < DKV_QUERIES / 8; n++) {
    float2 shift = *(const float2 *)(lse + 8 * n + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      p[n][2 * h] = exp2_fast(p[n][2 * h] * scale2 - shift.x * LOG2E);
      p[n][2 * h + 1] = exp2_fast(p[n][2 * h + 1] * scale2 - shift.y * LOG2E);
    }
  }
  if (partly) {
#pragma unroll
    for (int n = 0; n < DKV_QUERIES / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = query + 8 * n + 2 * t + (i & 1);
        if (at < range.from[i / 2] || at >= range.to[i / 2]) p[n][i] = 0;
      }
  }
#pragma unroll
  for (int n = 0; n < DKV_QUERIES / 8; n++) {
    pairs[n][0] = pack2(p[n][0], p[n][1]);
    pairs[n][1] = pack2(p[n][2], p[n][3]);
  }
}

// Block: kv head blockIdx % G of key tile blockIdx / G. Writes dk and dv.
template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys(BackwardCall c) {
  extern __shared__ __align__(256) char shared[];
  DkvShared<D> *s = (DkvShared<D> *)shared;
  const int G = c.shape.G, share = c.shape.H / G;
  int kv_head = blockIdx.x % G, first = blockIdx.x / G * DKV_KEYS, used = batch_used(c.b);
  int lane = threadIdx.x & 31, row = threadIdx.x / 32 * DKV_ROWS;
  KeyRange range = key_range(c.b, first + row, used);

  int query = 0, query_end = 0; // queries that see some key of the block
  if (first < used) {
    query = c.b.q_start[first]; // never decreases with the key
    for (int i = lane; i < DKV_KEYS && first + i < used; i += 32) query_end = max(query_end, c.b.q_end[first + i]);
    query_end = __reduce_max_sync(0xffffffffu, query_end);
    int64_t at = ((int64_t)first * G + kv_head) * D;
    tile_load<D, DKV_KEYS, THREADS>(s->k, c.k + at, G * D, used - first);
    tile_load<D, DKV_KEYS, THREADS>(s->v, c.v + at, G * D, used - first);
    dkv_load_queries<D>(&s->queries[0], c, query, query_end, kv_head * share);
  }
  copy_commit();

  float dk[D / 8][4], dv[D / 8][4];
  fragments_zero<D / 8>(dk);
  fragments_zero<D / 8>(dv);
  int tiles = ceil_div(query_end - query, DKV_QUERIES);
  for (int i = 0; i < share * tiles; i++) {
    copy_wait<0>();
    __syncthreads(); // the tile is there, and no warp still reads the other stage
    if (i + 1 < share * tiles)
      dkv_load_queries<D>(&s->queries[(i + 1) & 1], c, query + (i + 1) % tiles * DKV_QUERIES, query_end,
                          kv_head * share + (i + 1) / tiles);
    copy_commit();
    int at = query + i % tiles * DKV_QUERIES, last = at + DKV_QUERIES - 1;
    if (range.early_start > last || range.late_end <= at) continue;
    bool partly = range.late_start > at || range.early_end <= last;
    const DkvQueries<D> *tile = &s->queries[i & 1];
    uint32_t q_place = tile_place<D>(tile->q), dout_place = tile_place<D>(tile->dout);
    float p[DKV_QUERIES / 8][4], dp[DKV_QUERIES / 8][4];
    uint32_t pairs[DKV_QUERIES / 8][2];
    dkv_product<D>(p, tile_place<D>(s->k + row * D), q_place);
    dkv_probability(p, pairs, tile->lse, c.shape.scale * LOG2E, partly, range, at);
    dkv_add<D>(dv, pairs, dout_place);
    dkv_product<D>(dp, tile_place<D>(s->v + row * D), dout_place);
#pragma unroll
    for (int n = 0; n < DKV_QUERIES / 8; n++) {
      float2 delta = *(const float2 *)(tile->delta + 8 * n + 2 * (lane & 3));
#pragma unroll
      for (int h = 0; h < 2; h++)
        pairs[n][h] = pack2(p[n][2 * h] * (dp[n][2 * h] - delta.x), p[n][2 * h + 1] * (dp[n][2 * h + 1] - delta.y));
    }
    dkv_add<D>(dk, pairs, q_place);
  }

  copy_wait<0>();
  __syncthreads();
  const float scale[2] = {c.shape.scale, c.shape.scale}, one[2] = {1, 1};
  tile_store<D>(s->k, row, dk, scale); // only this warp reads these rows
  tile_store<D>(s->v, row, dv, one);
  __syncwarp();
  for (int i = lane; i < DKV_ROWS * D / 8 && first + row + i / (D / 8) < c.shape.T; i += 32) {
    int64_t to = ((int64_t)(first + row + i / (D / 8)) * G + kv_head) * D + i % (D / 8) * 8;
    *(uint4 *)(c.dk + to) = tile_chunk<D>(s->k, row, i);
    *(uint4 *)(c.dv + to) = tile_chunk<D>(s->v, row, i);
  }
}

size_t attention_scratch(OpKind kind, const Dims *d, const OpArgs *) {
  return kind == OP_ATTENTION_BWD ? sizeof(float) * d->H * d->T : 0; // delta
}

template <int D> static void launch_backward(const KernelCall *call) {
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
  CUDA_ALLOW_SHARED(attention_backward_queries<D>, sizeof(DqShared<D>));
  CUDA_ALLOW_SHARED(attention_backward_keys<D>, sizeof(DkvShared<D>));
  CUDA_LAUNCH(attention_backward_queries<D>, ceil_div(d->T, DQ_QUERIES) * d->H, THREADS, sizeof(DqShared<D>),
              call_stream(call), c);
  CUDA_LAUNCH(attention_backward_keys<D>, ceil_div(d->T, DKV_KEYS) * d->G, THREADS, sizeof(DkvShared<D>),
              call_stream(call), c);
}

extern "C" void cuda_ATTENTION_BWD(const KernelCall *c) {
  switch (c->dims->D) {
  case 32:
    return launch_backward<32>(c);
  case 64:
    return launch_backward<64>(c);
  default:
    return launch_backward<128>(c);
  }
}
