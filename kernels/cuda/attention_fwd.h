// What kernels of the forward attention share (attention_fwd_portable.cu, attention_fwd_sm90.cu; attention_fwd_wide.cu
// has only the call of this): a block takes 128 queries of one head as sets of 16 queries a warp; tiles of 64 keys
// stream past, two in shared memory.
#ifndef TESSERA_ATTENTION_FWD_H
#define TESSERA_ATTENTION_FWD_H

#include "kernels/cuda/attention.h"

enum { QUERIES = 128, KEYS = 64, WARPS = 4, THREADS = 32 * WARPS };
static_assert(QUERIES == WARPS * 2 * 16, "a warp has two sets of 16 queries");

template <int D> struct ForwardShared {
  bf16 q[QUERIES * D];
  KeyTile<D, KEYS> keys[2];
  float sum[4][THREADS]; // each lane's share of its rows' sums of p: all registers are taken when D is 128
};

static_assert(offsetof(ForwardShared<128>, keys) % 1024 == 0 && offsetof(ForwardShared<64>, keys) % 1024 == 0,
              "tiles begin on a block of the swizzle");
static_assert(2 * sizeof(ForwardShared<128>) <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");

// q [T, H, D], k, v [T, G, D] in sequence order; o [T, H D] in row order, lse [H, T].
typedef struct ForwardCall {
  const bf16 *q, *k, *v;
  bf16 *o;
  float *lse;
  AttentionShape shape;
  Batch b;
} ForwardCall;

// For head_dim 32, 64 or 128 on any card from sm_80 on.
void attention_fwd_portable(const ForwardCall *c, int D, cudaStream_t stream);

// For head_dim 64 and for 128 on Hopper, and whether this card and this build have them. Bytes of scratch of the
// latter.
bool attention_fwd_sm90_usable(void);
void attention_fwd_sm90(const ForwardCall *c, cudaStream_t stream);
void attention_fwd_wide(const ForwardCall *c, void *scratch, cudaStream_t stream);
size_t attention_fwd_wide_scratch(const Dims *d);

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

template <int D>
static inline void launch_forward(const ForwardCall *c, void (*kernel)(ForwardCall), cudaStream_t stream) {
  CUDA_ALLOW_SHARED(kernel, sizeof(ForwardShared<D>));
  CUDA_LAUNCH(kernel, ceil_div(c->shape.T, QUERIES) * c->shape.H, THREADS, sizeof(ForwardShared<D>), stream, *c);
}
#endif
