// The backward attention for any card from sm_80 on, and for head_dim 32: warps multiply (mma.sync).
#include "kernels/cuda/attention_bwd.h"

// ---- dq: 128 rows, a warp 32 of them as two sets of 16; 32 keys ----

enum { DQ_ROWS = 128, DQ_KEYS = 32, DQ_SET = DQ_ROWS / WARPS };

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries(BackwardCall c) {
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  auto s = (DqShared<D, DQ_ROWS, DQ_KEYS> *)shared;
  dq_filler(c, D);
  for (int unit = blockIdx.x; unit < tile_units<DQ_ROWS>(c.b, c.shape.H); unit += gridDim.x) {
    if (!dq_begin(s, c, unit)) continue;
    const RowBlock &block = s->block;
    int row = threadIdx.x / 32 * DQ_SET, stage = 0;
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
      TileView view = tile_view<DQ_KEYS>(tile->q_start, tile->q_end, s->position[row], s->position[row + DQ_SET - 1]);
      if (view == TILE_HIDDEN) continue;
      uint32_t place = tile_place<D, DQ_ROWS>(s->q) + row * tile_pitch<D>(), k_place = tile_place<D, DQ_KEYS>(tile->k);
      float p[2][DQ_KEYS / 8][4], dp[2][DQ_KEYS / 8][4];
      uint32_t ds[2][DQ_KEYS / 8][2];
      rows_product<D, DQ_ROWS, DQ_KEYS>(p, place, k_place);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        query_probability(p[m], s->lse2 + row + 16 * m + ((threadIdx.x & 31) >> 2), c.shape.scale * LOG2E);
        const int *at = s->position + row + 16 * m + ((threadIdx.x & 31) >> 2), position[2] = {at[0], at[8]};
        if (view == TILE_PARTLY) mask_rows(p[m], 0, position, tile->q_start, tile->q_end);
      }
      rows_product<D, DQ_ROWS, DQ_KEYS>(dp, place + sizeof s->q, tile_place<D, DQ_KEYS>(tile->v));
#pragma unroll
      for (int m = 0; m < 2; m++)
        query_gradient(ds[m], p[m], dp[m], s->delta + row + 16 * m + ((threadIdx.x & 31) >> 2));
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
    dq_write(dq[0], s, row, c);
    dq_write(dq[1], s, row + 16, c);
    __syncthreads(); // before the next unit's copies
  }
}

// ---- dk, dv ----

// c [16, DKV_ROWS] = a b^T: a a warp's rows of a key tile, b a query tile, by their places.
template <int D>
static __device__ inline void dkv_product(float (&c)[DKV_ROWS / 8][4], uint32_t a_place, uint32_t b_place) {
  fragments_zero(c);
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[4];
    fragment_a<D, DKV_KEYS>(a, a_place, 0, step);
#pragma unroll
    for (int n = 0; n < DKV_ROWS / 8; n += 2) {
      uint32_t b[4];
      fragments_b<D, DKV_ROWS>(b, b_place, 8 * n, step);
      mma_add(c[n], a, b);
      mma_add(c[n + 1], a, b + 2);
    }
  }
}

// sum [16, D] += x b: x [16, DKV_ROWS] as pairs, b a query tile by its place.
template <int D>
static __device__ inline void dkv_add(float (&sum)[D / 8][4], const uint32_t (&x)[DKV_ROWS / 8][2], uint32_t b_place) {
#pragma unroll
  for (int step = 0; step < DKV_ROWS / 16; step++)
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      fragments_b_rows<D, DKV_ROWS>(b, b_place, 16 * step, n / 2);
      mma_add(sum[n], x[2 * step], b);
      mma_add(sum[n + 1], x[2 * step], b + 2);
    }
}

template <int D> static __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys(BackwardCall c) {
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  DkvShared<D> *s = (DkvShared<D> *)shared;
  dkv_filler(c, D);
  for (int unit = blockIdx.x; unit < tile_units<DKV_KEYS>(c.b, c.shape.G); unit += gridDim.x) {
    if (!dkv_begin<D>(s, c, unit)) continue;
    const DkvBlock &block = s->block;
    const int heads = c.shape.heads, own = threadIdx.x / 32 * 16; // the warp's keys
    float dk[D / 8][4], dv[D / 8][4];
    fragments_zero(dk);
    fragments_zero(dv);
    int stage = 0;
    for (int row = block.row; row < block.row_end; row += DKV_ROWS, stage ^= 1) {
      copy_wait<0>();
      __syncthreads(); // the tile is there, and no warp still reads the other stage
      if (row + DKV_ROWS < block.row_end) load_rows<D>(&s->rows[stage ^ 1], c, block, row + DKV_ROWS);
      copy_commit();
      TileView view = tile_view<16>(s->q_start + own, s->q_end + own, row / heads, (row + DKV_ROWS - 1) / heads);
      if (view == TILE_HIDDEN) continue;
      const QueryTile<D> *tile = &s->rows[stage];
      uint32_t place = tile_place<D, DKV_KEYS>(s->k) + own * tile_pitch<D>();
      uint32_t q_place = tile_place<D, DKV_ROWS>(tile->q), dout_place = q_place + sizeof tile->q;
      float p[DKV_ROWS / 8][4], dp[DKV_ROWS / 8][4];
      uint32_t pairs[DKV_ROWS / 8][2];
      dkv_product<D>(p, place, q_place);
      key_probability(p, pairs, tile->lse, c.shape.scale * LOG2E, view == TILE_PARTLY, s->q_start + own, s->q_end + own,
                      row, heads);
      dkv_add<D>(dv, pairs, dout_place);
      dkv_product<D>(dp, place + sizeof s->k, dout_place);
      key_gradient(pairs, p, dp, tile->delta);
      dkv_add<D>(dk, pairs, q_place);
    }
    dkv_write<D>(dk, dv, s, c);
    __syncthreads(); // before the next unit's copies
  }
}

// ---- the host side ----

template <int D> static void launch(const BackwardCall *c, cudaStream_t stream) {
  launch_backward<D>(c, attention_backward_queries<D>, DQ_ROWS, sizeof(DqShared<D, DQ_ROWS, DQ_KEYS>),
                     attention_backward_keys<D>, stream);
}

void attention_bwd_portable(const BackwardCall *c, int D, cudaStream_t stream) {
  if (D == 32) return launch<32>(c, stream);
  if (D == 64) return launch<64>(c, stream);
  launch<128>(c, stream);
}
