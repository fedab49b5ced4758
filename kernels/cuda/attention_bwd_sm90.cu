// The backward attention on Hopper for head_dim 64: one warpgroup multiplies (wgmma).
#include "kernels/cuda/attention_bwd.h"
#include "kernels/cuda/attention_wgmma.h"

// ---- dq: 64 queries, 64 keys ----

enum { GROUP_ROWS = 64 };
static_assert(GROUP_ROWS == 16 * WARPS, "a warp has 16 queries");
static_assert(3 * sizeof(DqShared<64, GROUP_ROWS, GROUP_ROWS>) <= CUDA_HOPPER_SHARED,
              "three blocks share a multiprocessor");

template <int D> static __global__ void __launch_bounds__(THREADS, 3) attention_backward_queries_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  await_previous();
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

// ---- dk, dv ----

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
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

template <int D> static void launch(const BackwardCall *c, cudaStream_t stream) {
  launch_backward<D>(c, attention_backward_queries_sm90<D>, GROUP_ROWS, sizeof(DqShared<D, GROUP_ROWS, GROUP_ROWS>),
                     attention_backward_keys_sm90<D>, stream);
}

bool attention_bwd_sm90_usable(void) {
  static const bool usable = built_for_sm90((const void *)attention_backward_keys_sm90<64>);
  return usable;
}

void attention_bwd_sm90(const BackwardCall *c, cudaStream_t stream) {
  launch<64>(c, stream);
}
