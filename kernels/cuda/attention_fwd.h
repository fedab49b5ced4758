// What kernels of the forward attention share (attention_fwd_portable.cu, attention_fwd_sm90.cu,
// attention_fwd_wide.cu).
#ifndef TESSERA_ATTENTION_FWD_H
#define TESSERA_ATTENTION_FWD_H

#include "kernels/cuda/attention.h"

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

// For head_dim 64 and for 128 on Hopper, and whether this card and this build have them. The latter's scratch is
// ATTENTION_WIDE_SCRATCH bytes.
enum { ATTENTION_WIDE_SCRATCH = sizeof(int) };
bool attention_fwd_sm90_usable(void);
void attention_fwd_sm90(const ForwardCall *c, cudaStream_t stream);
void attention_fwd_wide(const ForwardCall *c, void *scratch, cudaStream_t stream);

// o = 0 and lse = inf for filler; `threads` threads of the grid, of which this is one.
template <int D> static __device__ inline void write_filler(const ForwardCall &c, int thread, int threads) {
  const int H = c.shape.H, T = c.shape.T, used = batch_used(c.b);
  for (int64_t i = (int64_t)used * H * (D / 8) + thread; i < (int64_t)T * H * (D / 8); i += threads)
    ((uint4 *)c.o)[i] = make_uint4(0, 0, 0, 0);
  for (int64_t i = (int64_t)used * H + thread; i < (int64_t)T * H; i += threads) c.lse[i % H * T + i / H] = INFINITY;
}

// ---- on Hopper: 64 rows of a warpgroup, of which a thread has rows g and g + 8 of its warp's 16 ----

// Those two rows.
typedef struct RowPair {
  float top[2], sum[2]; // largest score so far; this lane's share of the sum of p
  int position[2], kv_end[2];
} RowPair;

// score -> p = exp2(scale2 (score - top)) with the new top; keep[h]: what sums so far are multiplied by.
template <int n>
static __device__ inline void raise_scores(float (&score)[n][4], RowPair *r, float keep[2], float scale2) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = r->top[h], added = 0;
#pragma unroll
    for (int j = 0; j < n; j++) top = fmaxf(top, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float shift = top == -INFINITY ? 0 : top * scale2; // nothing seen yet: every term becomes 0
    keep[h] = exp2_fast(r->top[h] * scale2 - shift);
    r->top[h] = top;
#pragma unroll
    for (int j = 0; j < n; j++) {
      score[j][2 * h] = exp2_fast(score[j][2 * h] * scale2 - shift);
      score[j][2 * h + 1] = exp2_fast(score[j][2 * h + 1] * scale2 - shift);
      added += score[j][2 * h] + score[j][2 * h + 1];
    }
    r->sum[h] = r->sum[h] * keep[h] + added;
  }
}

// Where a row of o goes; head < 0: nowhere.
typedef struct RowPlace {
  int head, row; // row in row order
} RowPlace;

// Writes o and lse.
template <int D>
static __device__ inline void write_row_pair(const float (&o)[D / 8][4], const RowPair &r, const ForwardCall &c,
                                             const RowPlace place[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int head = place[h].head;
    float sum = r.sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float inverse = __fdividef(1, sum);
    if ((threadIdx.x & 3) == 0 && head >= 0)
      c.lse[(int64_t)head * c.shape.T + r.position[h]] = r.top[h] * c.shape.scale + logf(sum);
    bf16 *to = c.o + ((int64_t)place[h].row * c.shape.H + head) * D + (threadIdx.x & 3) * 8;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack2(o[n + i][2 * h] * inverse, o[n + i][2 * h + 1] * inverse);
      uint4 out = quad_transpose(w[0], w[1], w[2], w[3]);
      if (head >= 0) *(uint4 *)(to + 8 * n) = out;
    }
  }
}
#endif
