// Attention over packed documents, forward: FlashAttention-2 (Dao, 2023) with the mask of kernels/batch.h. A block
// takes 128 queries of one head; tiles of 64 keys stream past, two in shared memory. Queries whose rows lie together
// leave out the tiles that none of them sees and compare intervals only in those that some see in part.
//
// One kernel multiplies with warpgroups (sm_90a), the other, for other targets and D = 32, with warps. In either a warp
// holds two sets of 16 queries, m = 0 and 1.
#include "kernels/cuda/attention_wgmma.h"

enum { QUERIES = 128, KEYS = 64, WARPS = 4, THREADS = 32 * WARPS };

template <int D> struct ForwardShared {
  bf16 q[QUERIES * D];
  KeyTile<D, KEYS> keys[2];
  float sum[4][THREADS]; // each lane's share of its rows' sums of p: all registers are taken when D is 128
};

// q [T, H, D], k, v [T, G, D] in sequence order; o [T, H D] in row order, lse [H, T].
typedef struct ForwardCall {
  const bf16 *q, *k, *v;
  bf16 *o;
  float *lse;
  AttentionShape shape;
  Batch b;
} ForwardCall;

// Starts copying the queries and the first tile of keys.
template <int D> static __device__ inline QueryBlock block_begin(ForwardShared<D> *s, const ForwardCall &c) {
  const int H = c.shape.H;
  int head = blockIdx.x % H, first = blockIdx.x / H * QUERIES, used = batch_used(c.b);
  int key = c.b.doc_start[first], key_end = c.b.kv_end[min(first + QUERIES, c.shape.T) - 1];
  QueryBlock block = {head, head / (H / c.shape.G), first, 0, 0};
  if (first < used) {
    block.key = key;
    block.key_end = min(key_end, used); // filler's end is its own place; before it the last document ends at `used`
    tile_load<D, QUERIES, THREADS>(s->q, c.q + ((int64_t)first * H + head) * D, H * D, used - first);
    load_keys<THREADS>(&s->keys[0], c, block.key, block.key_end, block.kv_head);
  }
  copy_commit();
#pragma unroll
  for (int i = 0; i < 4; i++) s->sum[i][threadIdx.x] = 0;
  return block;
}

// 16 queries of a warp: lane 4 g + t holds columns of rows g and g + 8 (C fragments, mma.h).
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

// Normalises set m of a warp's queries, stages it in its own rows of the query tile, which no one needs any more, and
// writes it: o in row order, lse. `row`: the set's first row in the tile.
template <int D>
static __device__ inline void rows_write(const Rows<D> *r, ForwardShared<D> *s, int m, int row, const ForwardCall &c) {
  int block = (int)recompute(blockIdx.x), lane = threadIdx.x & 31, used = batch_used(c.b);
  int head = block % c.shape.H, query = block / c.shape.H * QUERIES + row;
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = s->sum[2 * m + h][threadIdx.x];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    int at = query + 8 * h + (lane >> 2);
    bool filler = at >= used;
    inverse[h] = filler ? 0 : __fdividef(1, sum);
    if ((lane & 3) == 0 && at < c.shape.T)
      c.lse[(int64_t)head * c.shape.T + at] = filler ? INFINITY : r->top[h] * c.shape.scale + logf(sum);
  }
  tile_store<D, QUERIES>(s->q, row, r->o, inverse);
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * D / 8; i += 32) {
    int at = query + i / (D / 8);
    int64_t to = at < used ? c.b.row[at] : at;
    if (at < c.shape.T)
      *(uint4 *)(c.o + (to * c.shape.H + head) * D + i % (D / 8) * 8) = tile_chunk<D, QUERIES>(s->q, row, i);
  }
}

// ---- with warps: warp w holds queries 32 w + 16 m .. ----

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

// ---- with one warpgroup: warp w holds queries 64 m + 16 w .. ----

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

template <int D> static void launch_forward(const KernelCall *call, void (*kernel)(ForwardCall)) {
  const Dims *d = call->dims;
  ForwardCall c = {.q = (const bf16 *)call->in[0],
                   .k = (const bf16 *)call->in[1],
                   .v = (const bf16 *)call->in[2],
                   .o = (bf16 *)call->out[0],
                   .lse = (float *)call->out[1],
                   .shape = {d->T, d->H, d->G, 1 / sqrtf((float)D)},
                   .b = *call->batch};
  CUDA_ALLOW_SHARED(kernel, sizeof(ForwardShared<D>));
  CUDA_LAUNCH(kernel, ceil_div(d->T, QUERIES) * d->H, THREADS, sizeof(ForwardShared<D>), call_stream(call), c);
}

extern "C" void cuda_ATTENTION_FWD(const KernelCall *c) {
  static const bool groups = built_for_sm90((const void *)attention_forward_sm90<128>);
  switch (c->dims->D) {
  case 32:
    return launch_forward<32>(c, attention_forward<32>);
  case 64:
    return launch_forward<64>(c, groups ? attention_forward_sm90<64> : attention_forward<64>);
  default:
    return launch_forward<128>(c, groups ? attention_forward_sm90<128> : attention_forward<128>);
  }
}
