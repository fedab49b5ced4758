// The backward attention on Hopper for head_dim 64: one warpgroup multiplies (wgmma).
#include "kernels/cuda/attention_bwd.h"
#include "kernels/cuda/attention_wgmma.h"

// ---- dq: 64 rows, 64 keys; of the last tile 32 keys are left out if they can be ----

enum { GROUP_ROWS = 64 };
static_assert(GROUP_ROWS == 16 * WARPS, "a warp has 16 rows");
static_assert(4 * sizeof(DqShared<64, GROUP_ROWS, GROUP_ROWS>) <= CUDA_HOPPER_SHARED,
              "four blocks share a multiprocessor");

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What a lane's two rows, g and g + 8 of its warp's 16, are.
typedef struct DqLane {
  int row, position[2], kv_end[2]; // the first one of the tile; where they stand and their keys end
  int last, least_end;             // the tile's last position; all rows see keys to there, but for ends_before
} DqLane;

// dq += what the first 8 n keys of a tile add.
template <int D, int n>
static __device__ inline void add_dq(float (&dq)[D / 8][4], const DqShared<D, GROUP_ROWS, GROUP_ROWS> *s,
                                     const KeyTile<D, GROUP_ROWS> *tile, const DqLane &lane, int key, float scale2) {
  float p[n][4], dp[n][4];
  uint32_t ds[n][2];
  start_scores<D, GROUP_ROWS>(p, s->q, tile->k);
  start_scores<D, GROUP_ROWS>(dp, s->dout, tile->v);
  bool intervals = ends_before(tile->q_end, s->block.key_end - key, lane.last);
  wgmma_wait<1>();
  wgmma_keep(p);
  query_probability(p, s->lse2 + lane.row, scale2);
  if (intervals || lane.least_end < key + 8 * n)
    hide_keys(p, 0, lane.position, lane.kv_end, tile->q_end, intervals, key);
  wgmma_wait<0>();
  wgmma_keep(dp);
  query_gradient(ds, p, dp, s->delta + lane.row);
  start_sum<D>(dq, ds, tile->k);
  wgmma_wait<0>();
  wgmma_keep(dq);
}

// dv and dk += what the first 8 n rows of a tile, `row` and on, add.
template <int D, int n>
static __device__ inline void add_dkv(float (&dk)[D / 8][4], float (&dv)[D / 8][4], const DkvShared<D> *s,
                                      const QueryTile<D> *tile, int row, int heads, float scale2) {
  const bool partly = s->block.late_start > row || s->block.early_end < min(row + 8 * n, s->block.row_end);
  const int own = threadIdx.x / 32 * 16; // the warp's keys
  float p[n][4], dp[n][4];
  uint32_t pairs[n][2], ds[n][2];
  start_scores<D, DKV_KEYS>(p, s->k, tile->q);
  start_scores<D, DKV_KEYS>(dp, s->v, tile->dout);
  wgmma_wait<1>();
  wgmma_keep(p);
  key_probability(p, pairs, tile->lse, scale2, partly, s->q_start + own, s->q_end + own, row, heads);
  start_sum<D>(dv, pairs, tile->dout);
  wgmma_wait<1>(); // dp is there; dv is under way
  wgmma_keep(dp);
  key_gradient(ds, pairs, dp, tile->delta);
  start_sum<D>(dk, ds, tile->q);
  wgmma_wait<0>();
  wgmma_keep(dv);
  wgmma_keep(dk);
}
#endif

template <int D> static __global__ void __launch_bounds__(THREADS, 4) attention_backward_rows_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  auto s = (DqShared<D, GROUP_ROWS, GROUP_ROWS> *)shared;
  dq_filler(c, D);
  for (int unit = blockIdx.x; unit < tile_units<GROUP_ROWS>(c.b, c.shape.H); unit += gridDim.x) {
    if (!dq_begin(s, c, unit)) continue;
    const RowBlock &block = s->block;
    const int row = threadIdx.x / 32 * 16;
    DqLane lane = {row + ((int)threadIdx.x & 31) / 4, {}, {}, s->position[block.count - 1], c.b.kv_end[s->position[0]]};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      lane.position[h] = s->position[lane.row + 8 * h];
      lane.kv_end[h] = lane.row + 8 * h < block.count ? c.b.kv_end[lane.position[h]] : 0;
    }
    int stage = 0;
    float dq[D / 8][4];
    fragments_zero(dq);
    for (int key = block.key; key < block.key_end; key += GROUP_ROWS, stage ^= 1) {
      copy_wait<0>();
      fence_async_proxy();
      __syncthreads(); // the tile is there for the tensor cores, and no warp still reads the other stage
      if (key + GROUP_ROWS < block.key_end)
        load_keys<THREADS>(&s->tiles[stage ^ 1], c, key + GROUP_ROWS, block.key_end, block.kv_head);
      copy_commit();
      if (block.key_end - key > GROUP_ROWS / 2)
        add_dq<D, GROUP_ROWS / 8>(dq, s, &s->tiles[stage], lane, key, c.shape.scale * LOG2E);
      else
        add_dq<D, GROUP_ROWS / 16>(dq, s, &s->tiles[stage], lane, key, c.shape.scale * LOG2E);
    }
    __syncthreads(); // the tensor cores have read every warp's rows
    dq_write(dq, s, row, c);
    __syncthreads(); // before the next unit's copies
  }
#endif
}

// ---- dk, dv ----

template <int D> static __global__ void __launch_bounds__(THREADS, 3) attention_backward_keys_sm90(BackwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  DkvShared<D> *s = (DkvShared<D> *)shared;
  dkv_filler(c, D);
  for (int unit = blockIdx.x; unit < tile_units<DKV_KEYS>(c.b, c.shape.G); unit += gridDim.x) {
    if (!dkv_begin<D>(s, c, unit)) continue;
    const DkvBlock &block = s->block;
    const int heads = c.shape.heads;
    float dk[D / 8][4], dv[D / 8][4];
    fragments_zero(dk);
    fragments_zero(dv);
    int stage = 0;
    for (int row = block.row; row < block.row_end; row += DKV_ROWS, stage ^= 1) {
      copy_wait<0>();
      fence_async_proxy();
      __syncthreads(); // the tile is there for the tensor cores, and no warp still reads the other stage
      if (row + DKV_ROWS < block.row_end) load_rows<D>(&s->rows[stage ^ 1], c, block, row + DKV_ROWS);
      copy_commit();
      if (block.row_end - row > DKV_ROWS / 2)
        add_dkv<D, DKV_ROWS / 8>(dk, dv, s, &s->rows[stage], row, heads, c.shape.scale * LOG2E);
      else
        add_dkv<D, DKV_ROWS / 16>(dk, dv, s, &s->rows[stage], row, heads, c.shape.scale * LOG2E);
    }
    dkv_write<D>(dk, dv, s, c);
    __syncthreads(); // before the next unit's copies
  }
#endif
}

// ---- the host side ----

template <int D> static void launch(const BackwardCall *c, cudaStream_t stream) {
  launch_backward<D>(c, attention_backward_rows_sm90<D>, GROUP_ROWS, sizeof(DqShared<D, GROUP_ROWS, GROUP_ROWS>),
                     attention_backward_keys_sm90<D>, stream);
}

bool attention_bwd_sm90_usable(void) {
  static const bool usable = built_for_sm90((const void *)attention_backward_keys_sm90<64>);
  return usable;
}

void attention_bwd_sm90(const BackwardCall *c, cudaStream_t stream) {
  launch<64>(c, stream);
}
