// The forward attention for any card from sm_80 on, and for head_dim 32: warps multiply (mma.sync). A block takes 128
// rows of a kv head, warp w rows 32 w + 16 m, m = 0 and 1; tiles of 64 keys stream past, two in shared memory.
#include "kernels/cuda/attention_fwd.h"

enum { ROWS = 128, KEYS = 64, WARPS = 4, THREADS = 32 * WARPS };

template <int D> struct ForwardShared {
  bf16 q[ROWS * D];
  KeyTile<D, KEYS> keys[2];
  float sum[4][THREADS]; // each lane's share of its rows' sums of p: all registers are taken when D is 128
  RowBlock block;        // what the block is at, for the same reason
};

static_assert(offsetof(ForwardShared<128>, keys) % 1024 == 0 && offsetof(ForwardShared<64>, keys) % 1024 == 0,
              "tiles begin on a block of the swizzle");
static_assert(2 * sizeof(ForwardShared<128>) <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");

// Starts copying the rows and the first tile of keys, unless the unit has no rows. s->block is known to all threads
// then.
template <int D> static __device__ inline bool block_begin(ForwardShared<D> *s, const ForwardCall &c, int unit) {
  const RowBlock block = row_block<ROWS>(c.b, c.shape, unit);
  if (block.count <= 0) return false;
  if (threadIdx.x == 0) s->block = block;
  typedef RowChunk<D, ROWS, THREADS> Chunk;
#pragma unroll
  for (int i = 0; i < Chunk::turns; i++) {
    Chunk chunk(c.shape, block.kv_head, block.first, block.count, i);
    copy16_async(shared_address(s->q) + chunk.to, c.q + chunk.element(c.shape, chunk.row.position), chunk.in);
  }
  load_keys<THREADS>(&s->keys[0], c, block.key, block.key_end, block.kv_head);
  copy_commit();
#pragma unroll
  for (int i = 0; i < 4; i++) s->sum[i][threadIdx.x] = 0;
  __syncthreads();
  return true;
}

// 16 rows of a warp: lane 4 g + t holds columns of rows g and g + 8 (C fragments, mma.h).
template <int D> struct Rows {
  float o[D / 8][4]; // sums of p v, unnormalised
  float top[2];      // largest score so far
};

template <int D> static __device__ inline void rows_begin(Rows<D> *r) {
  fragments_zero(r->o);
  r->top[0] = r->top[1] = -INFINITY;
}

// One tile of the running softmax: p = exp2(scale2 (score - top)), rounded to bf16 pairs; what was summed before is
// rescaled.
template <int D>
static __device__ inline void softmax_rows(Rows<D> *r, const float (&score)[KEYS / 8][4], float scale2,
                                           uint32_t (&p)[KEYS / 8][2], float sum[2][THREADS]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = r->top[h];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float shift = top == -INFINITY ? 0 : top * scale2; // nothing seen yet: every term becomes 0
    float keep = exp2_fast(r->top[h] * scale2 - shift), added = 0;
    r->top[h] = top;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      float left = exp2_fast(score[n][2 * h] * scale2 - shift);
      float right = exp2_fast(score[n][2 * h + 1] * scale2 - shift);
      p[n][h] = pack2(left, right);
      added += left + right;
    }
    sum[h][threadIdx.x] = sum[h][threadIdx.x] * keep + added;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      r->o[n][2 * h] *= keep;
      r->o[n][2 * h + 1] *= keep;
    }
  }
}

// Normalises set m of a warp's rows, stages it in its own rows of the query tile, which no one needs any more, and
// writes it: o in row order, lse. `row`: the set's first row in the tile.
template <int D>
static __device__ inline void rows_write(const Rows<D> *r, ForwardShared<D> *s, int m, int row, const ForwardCall &c) {
  const RowBlock &block = s->block;
  int lane = threadIdx.x & 31;
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = s->sum[2 * m + h][threadIdx.x];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    inverse[h] = __fdividef(1, sum);
    int at = row + 8 * h + (lane >> 2);
    if ((lane & 3) != 0 || at >= block.count) continue;
    KvRow to = kv_row(c.shape, block.kv_head, block.first + at);
    c.lse[(int64_t)to.head * c.shape.T + to.position] = r->top[h] * c.shape.scale + logf(sum);
  }
  tile_store<D, ROWS>(s->q, row, r->o, inverse);
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * D / 8; i += 32) {
    int at = row + i / (D / 8);
    if (at >= block.count) continue;
    KvRow to = kv_row(c.shape, block.kv_head, block.first + at);
    *(uint4 *)(c.o + ((int64_t)c.b.row[to.position] * c.shape.H + to.head) * D + i % (D / 8) * 8) =
        tile_chunk<D, ROWS>(s->q, row, i);
  }
}

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
  write_filler<D>(c, blockIdx.x * THREADS + threadIdx.x, gridDim.x * THREADS);
  for (int unit = blockIdx.x; unit < tile_units<ROWS>(c.b, c.shape.H); unit += gridDim.x) {
    if (!block_begin<D>(s, c, unit)) continue;
    const RowBlock &block = s->block;
    const int set = ROWS / WARPS;
    const int heads = c.shape.heads, row = threadIdx.x / 32 * set, first = block.first + row;
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
      TileView view = tile_view<KEYS>(tile->q_start, tile->q_end, first / heads, (first + set - 1) / heads);
      if (view == TILE_HIDDEN) continue;
      float score[2][KEYS / 8][4];
      uint32_t p[2][KEYS / 8][2];
      rows_product<D, ROWS, KEYS>(score, tile_place<D, ROWS>(s->q) + row * tile_pitch<D>(),
                                  tile_place<D, KEYS>(tile->k));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        int g = first + 16 * m + ((threadIdx.x & 31) >> 2), position[2] = {g / heads, (g + 8) / heads};
        if (view == TILE_PARTLY) mask_rows(score[m], -INFINITY, position, tile->q_start, tile->q_end);
        softmax_rows<D>(&rows[m], score[m], c.shape.scale * LOG2E, p[m], s->sum + 2 * m);
      }
      value_tile<D>(rows, p, tile_place<D, KEYS>(tile->v));
    }
    copy_wait<0>();
    __syncthreads();
    rows_write<D>(&rows[0], s, 0, row, c);
    rows_write<D>(&rows[1], s, 1, row + 16, c);
    __syncthreads(); // before the next unit's copies
  }
}

template <int D> static void launch(const ForwardCall *c, cudaStream_t stream) {
  CUDA_ALLOW_SHARED(attention_forward<D>, sizeof(ForwardShared<D>));
  CUDA_LAUNCH(attention_forward<D>, tile_blocks(c->shape.T, ROWS, c->shape.H), THREADS, sizeof(ForwardShared<D>),
              stream, *c);
}

void attention_fwd_portable(const ForwardCall *c, int D, cudaStream_t stream) {
  if (D == 32) return launch<32>(c, stream);
  if (D == 64) return launch<64>(c, stream);
  launch<128>(c, stream);
}
