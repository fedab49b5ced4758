// The forward attention for any card from sm_80 on, and for head_dim 32: warps multiply (mma.sync). Warp w holds
// queries 32 w + 16 m, m = 0 and 1.
#include "kernels/cuda/attention_fwd.h"

// o += p v; v: the place of the tile's first block. Two neighbouring fragments of pairs are an A fragment.
template <int D>
static __device__ inline void value_tile(Rows<D> r[2], const uint32_t (&p)[2][KEYS / 8][2], uint32_t v) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++)
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      fragments_b_rows<D, KEYS>(b, v, 16 * step, n / 2);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_add(r[m].o[n], p[m][2 * step], b);
        mma_add(r[m].o[n + 1], p[m][2 * step], b + 2);
      }
    }
}

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_forward(ForwardCall c) {
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  ForwardShared<D> *s = (ForwardShared<D> *)shared;
  QueryBlock block = block_begin<D>(s, c);
  const int set = QUERIES / WARPS;
  int row = threadIdx.x / 32 * set, query = block.first + row, g = (threadIdx.x & 31) >> 2;
  Rows<D> rows[2];
  rows_begin(&rows[0]);
  rows_begin(&rows[1]);
  int stage = 0;
  for (int key = block.key; key < block.key_end; key += KEYS, stage ^= 1) {
    copy_wait<0>();
    __syncthreads(); // the tile is there, and no warp still reads the other stage
    if (key + KEYS < block.key_end)
      load_keys<THREADS>(&s->keys[stage ^ 1], c, key + KEYS, block.key_end, block.kv_head);
    copy_commit();
    const KeyTile<D, KEYS> *tile = &s->keys[stage];
    TileView view = tile_view<KEYS>(tile->q_start, tile->q_end, query, query + set - 1);
    if (view == TILE_HIDDEN) continue;
    float score[2][KEYS / 8][4];
    uint32_t p[2][KEYS / 8][2];
    rows_product<D, QUERIES, KEYS>(score, tile_place<D, QUERIES>(s->q) + row * tile_pitch<D>(),
                                   tile_place<D, KEYS>(tile->k));
#pragma unroll
    for (int m = 0; m < 2; m++) {
      if (view == TILE_PARTLY) mask_rows(score[m], -INFINITY, tile->q_start, tile->q_end, query + 16 * m + g);
      softmax_rows<D>(&rows[m], score[m], c.shape.scale * LOG2E, p[m], s->sum + 2 * m);
    }
    value_tile<D>(rows, p, tile_place<D, KEYS>(tile->v));
  }
  copy_wait<0>();
  __syncthreads();
  rows_write<D>(&rows[0], s, 0, row, c);
  rows_write<D>(&rows[1], s, 1, row + 16, c);
}

void attention_fwd_portable(const ForwardCall *c, int D, cudaStream_t stream) {
  if (D == 32) return launch_forward<32>(c, attention_forward<32>, stream);
  if (D == 64) return launch_forward<64>(c, attention_forward<64>, stream);
  launch_forward<128>(c, attention_forward<128>, stream);
}
