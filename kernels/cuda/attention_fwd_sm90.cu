// The forward attention on Hopper for head_dim 64: one warpgroup multiplies (wgmma). Warp w holds queries 64 m + 16 w,
// m = 0 and 1.
#include "kernels/cuda/attention_fwd.h"
#include "kernels/cuda/attention_wgmma.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What the 64 queries of set m make of a tile of scores: the mask, the softmax.
template <int D>
static __device__ inline void group_softmax(Rows<D> *r, float (&score)[KEYS / 8][4], uint32_t (&p)[KEYS / 8][2],
                                            const KeyTile<D, KEYS> *tile, TileView view, int query, ForwardShared<D> *s,
                                            int m, float scale2) {
  wgmma_keep(score);
  int row = query + 64 * m + (threadIdx.x / 32) * 16 + ((threadIdx.x & 31) >> 2);
  if (view == TILE_PARTLY) mask_rows(score, -INFINITY, tile->q_start, tile->q_end, row);
  softmax_rows<D>(r, score, scale2, p, s->sum + 2 * m);
}

// A tile that only set m sees.
template <int D, int m>
static __device__ inline void group_one(Rows<D> rows[2], const KeyTile<D, KEYS> *tile, TileView view, int query,
                                        ForwardShared<D> *s, float scale2) {
  float score[KEYS / 8][4];
  uint32_t p[KEYS / 8][2];
  start_scores<D, QUERIES>(score, s->q + m * 64 * 64, tile->k);
  wgmma_wait<0>();
  group_softmax<D>(&rows[m], score, p, tile, view, query, s, m, scale2);
  start_sum<D>(rows[m].o, p, tile->v);
  wgmma_wait<0>();
  wgmma_keep(rows[m].o);
}

// A tile that both sets see: the tensor cores work for one set while the other takes its softmax.
template <int D>
static __device__ inline void group_both(Rows<D> rows[2], const KeyTile<D, KEYS> *tile, const TileView view[2],
                                         int query, ForwardShared<D> *s, float scale2) {
  float score[2][KEYS / 8][4];
  uint32_t p[2][KEYS / 8][2];
  start_scores<D, QUERIES>(score[0], s->q, tile->k);
  start_scores<D, QUERIES>(score[1], s->q + 64 * 64, tile->k);
  wgmma_wait<1>();
  group_softmax<D>(&rows[0], score[0], p[0], tile, view[0], query, s, 0, scale2);
  start_sum<D>(rows[0].o, p[0], tile->v);
  wgmma_wait<1>();
  group_softmax<D>(&rows[1], score[1], p[1], tile, view[1], query, s, 1, scale2);
  start_sum<D>(rows[1].o, p[1], tile->v);
  wgmma_wait<0>();
  wgmma_keep(rows[0].o);
  wgmma_keep(rows[1].o);
}
#endif

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_forward_sm90(ForwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  ForwardShared<D> *s = (ForwardShared<D> *)shared;
  QueryBlock block = block_begin<D>(s, c);
  float scale2 = c.shape.scale * LOG2E;
  Rows<D> rows[2];
  rows_begin(&rows[0]);
  rows_begin(&rows[1]);
  int stage = 0;
  for (int key = block.key; key < block.key_end; key += KEYS, stage ^= 1) {
    copy_wait<0>();
    fence_async_proxy();
    __syncthreads(); // the tile is there for the tensor cores, and no warp still reads the other stage
    if (key + KEYS < block.key_end)
      load_keys<THREADS>(&s->keys[stage ^ 1], c, key + KEYS, block.key_end, block.kv_head);
    copy_commit();
    const KeyTile<D, KEYS> *tile = &s->keys[stage];
    int query = block.first;
    TileView view[2] = {tile_view<KEYS>(tile->q_start, tile->q_end, query, query + 63),
                        tile_view<KEYS>(tile->q_start, tile->q_end, query + 64, query + 127)};
    if (view[0] && view[1])
      group_both<D>(rows, tile, view, query, s, scale2);
    else if (view[0])
      group_one<D, 0>(rows, tile, view[0], query, s, scale2);
    else if (view[1])
      group_one<D, 1>(rows, tile, view[1], query, s, scale2);
  }
  copy_wait<0>();
  __syncthreads();
  int row = threadIdx.x / 32 * 16;
  rows_write<D>(&rows[0], s, 0, row, c);
  rows_write<D>(&rows[1], s, 1, row + 64, c);
#endif
}

bool attention_fwd_sm90_usable(void) {
  static const bool usable = built_for_sm90((const void *)attention_forward_sm90<64>);
  return usable;
}

void attention_fwd_sm90(const ForwardCall *c, cudaStream_t stream) {
  launch_forward<64>(c, attention_forward_sm90<64>, stream);
}
