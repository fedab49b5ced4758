// The backward attention for any card from sm_80 on, and for head_dim 32: warps multiply (mma.sync).
#include "kernels/cuda/attention_bwd.h"

// ---- dq: 128 queries, a warp 32 of them as two sets of 16; 32 keys ----

enum { DQ_QUERIES = 128, DQ_KEYS = 32, DQ_ROWS = DQ_QUERIES / WARPS };

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries(BackwardCall c) {
  await_previous();
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

// ---- dk, dv ----

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
  await_previous();
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

// ---- the host side ----

template <int D> static void launch(const BackwardCall *c, cudaStream_t stream) {
  launch_backward<D>(c, attention_backward_queries<D>, DQ_QUERIES, sizeof(DqShared<D, DQ_QUERIES, DQ_KEYS>),
                     attention_backward_keys<D>, stream);
}

void attention_bwd_portable(const BackwardCall *c, int D, cudaStream_t stream) {
  if (D == 32) return launch<32>(c, stream);
  if (D == 64) return launch<64>(c, stream);
  launch<128>(c, stream);
}
