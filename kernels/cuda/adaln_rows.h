// The rows of a fused AdaLN, for the kernels that differ in where the branch or the gradient comes from (adaln.cu,
// combine_adaln.cu): what they share stands here once, so that they give the same bits.
#ifndef TESSERA_ADALN_ROWS_H
#define TESSERA_ADALN_ROWS_H

#include "kernels/cuda/adaln.h"

// ---- forward: a warp a row, or a block ----

typedef struct AdalnForward {
  const bf16 *x;          // [T, C]
  const bf16 *mod;        // [SEG, M]
  bf16 *xnew, *h;         // [T, C]; xnew NULL without a branch
  float *mean, *rstd;     // [T]
  const int32_t *segment; // [T]
  const BatchDims *dims;
  int64_t M;
  int T, C, gate, shift, scale, silu_image;
  float inv_dim; // 1 / C
} AdalnForward;

// `out`: xnew, h, mean, rstd.
// Of a call of ADALN_FWD, but for the branch.
static inline AdalnForward adaln_forward_of(const KernelCall *c) {
  adaln_check_dim(c->dims->C);
  AdalnForward f = {};
  f.x = (const bf16 *)c->in.ADALN_FWD.x;
  f.mod = (const bf16 *)c->in.ADALN_FWD.mod;
  f.xnew = (bf16 *)c->out.ADALN_FWD.xnew;
  f.h = (bf16 *)c->out.ADALN_FWD.h;
  f.mean = (float *)c->out.ADALN_FWD.mean;
  f.rstd = (float *)c->out.ADALN_FWD.rstd;
  f.segment = c->batch->segment;
  f.dims = c->batch->dims;
  f.M = c->dims->M;
  f.T = c->dims->T;
  f.C = c->dims->C;
  f.gate = c->args->adaln.gate;
  f.shift = c->args->adaln.shift;
  f.scale = c->args->adaln.scale;
  f.silu_image = c->args->adaln.silu_image;
  f.inv_dim = 1.0f / (float)f.C;
  return f;
}

// How a row lies in the registers of its WARPS warps: a lane holds VEC times 8 columns, from 8 lane on and every
// 8 LANES further; which fixes the order of its sums. Rows of a warp share a block; several warps have a block of their
// own, so as to meet at its one barrier: a barrier by number would take all 16 of a block, which few blocks fit with.
template <int VEC_, int WARPS_> struct AdalnLayout {
  static constexpr int VEC = VEC_, WARPS = WARPS_, LANES = 32 * WARPS;
  static constexpr int ROWS = WARPS == 1 ? 4 : 1, THREADS = ROWS * LANES; // of a block
  static constexpr int BLOCKS = 640 / THREADS;                            // of a multiprocessor, at least
  static constexpr int COLUMNS = 8 * VEC * LANES;                         // of a row, at most
};

static_assert(AdalnLayout<4, 4>::COLUMNS >= ADALN_MAX_DIM, "the widest layout holds the longest row");

// Calls launch(layout) with the layout of rows of C columns: at most 4 vectors a lane, so that many rows are on their
// way at once.
template <class Launch> static void adaln_layout(int C, Launch launch) {
  if (C <= 256)
    launch(AdalnLayout<1, 1>());
  else if (C <= 512)
    launch(AdalnLayout<2, 1>());
  else if (C <= 768)
    launch(AdalnLayout<3, 1>());
  else if (C <= 1024)
    launch(AdalnLayout<4, 1>());
  else if (C <= 1536)
    launch(AdalnLayout<3, 2>());
  else if (C <= 2048)
    launch(AdalnLayout<4, 2>());
  else if (C <= 3072)
    launch(AdalnLayout<3, 4>());
  else
    launch(AdalnLayout<4, 4>());
}

// The row of a warp or block, and the lane's place in it.
typedef struct AdalnRow {
  int64_t r;
  int lane, C;
} AdalnRow;

template <class L> static __device__ inline AdalnRow adaln_row_of(const AdalnForward &f) {
  return {(int64_t)blockIdx.x * L::ROWS + threadIdx.x / L::LANES, (int)threadIdx.x % L::LANES, f.C};
}

// The first of the lane's columns v.
template <class L> static __device__ inline int adaln_column(const AdalnRow &row, int v) {
  return 8 * (row.lane + v * L::LANES);
}

// The lane's columns of the row of `from` [T, C], which is NULL for zeros.
template <class L>
static __device__ inline void adaln_row_load(uint4 (&to)[L::VEC], const bf16 *from, const AdalnRow &row) {
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    int column = adaln_column<L>(row, v);
    to[v] = load_once(from + row.r * row.C + column, from && column < row.C);
  }
}

// The lane's columns of a row of the modulation table, from `mod` on.
template <class L>
static __device__ inline void adaln_mod_load(uint4 (&to)[L::VEC], const bf16 *mod, const AdalnRow &row) {
#pragma unroll
  for (int v = 0; v < L::VEC; v++) to[v] = load_kept(mod + adaln_column<L>(row, v), adaln_column<L>(row, v) < row.C);
}

// The lane's columns v of the row of `to` [T, C].
template <class L> static __device__ inline void adaln_row_store(bf16 *to, const AdalnRow &row, int v, uint4 x) {
  int column = adaln_column<L>(row, v);
  if (column < row.C) *reinterpret_cast<uint4 *>(to + row.r * row.C + column) = x;
}

// Zeros in the row of `to` [T, C], which may be NULL.
template <class L> static __device__ inline void adaln_row_zero(bf16 *to, const AdalnRow &row) {
  for (int v = 0; to && v < L::VEC; v++) adaln_row_store<L>(to, row, v, make_uint4(0, 0, 0, 0));
}

// All outputs but a branch of a filler row.
template <class L> static __device__ inline void adaln_row_filler(const AdalnForward &f, const AdalnRow &row) {
  adaln_row_zero<L>(f.xnew, row);
  adaln_row_zero<L>(f.h, row);
  if (row.lane == 0) f.mean[row.r] = f.rstd[row.r] = 0;
}

// The sum of a lane's 8 columns is added to `sum`.
static __device__ inline float adaln_add8(float sum, uint4 x) {
  float a[8];
  unpack8(x, a);
#pragma unroll
  for (int i = 0; i < 8; i++) sum = __fadd_rn(sum, a[i]);
  return sum;
}

// x + gate * branch in x and xnew; the sum of the lane's columns v of it is added to `sum`.
template <class L>
static __device__ inline float adaln_row_residual(const AdalnForward &f, const AdalnRow &row, int v, uint4 &x,
                                                  uint4 gate, uint4 branch, float sum) {
  float g[8];
  unpack8(gate, g);
  x = adaln_residual(x, g, branch);
  adaln_row_store<L>(f.xnew, row, v, x);
  return adaln_add8(sum, x);
}

// Sum over the row's lanes; several warps exchange through their floats of shared memory.
template <class L> static __device__ inline float adaln_row_sum(float v, float *shared) {
  v = warp_sum(v);
  if (L::WARPS == 1) return v;
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < L::WARPS; w++) sum += shared[w];
  return sum;
}

// mean, rstd and h of a row from xnew, as it is stored, the sum of the lane's columns of it, in their order, and the
// segment's shift and scale. The arithmetic is spelled out, so that h is the same to the bit wherever xnew came from:
// what one op has made, another rebuilds.
template <class L>
static __device__ inline void adaln_row_norm(const AdalnForward &f, const AdalnRow &row, const uint4 (&xnew)[L::VEC],
                                             float sum, const uint4 (&shift)[L::VEC], const uint4 (&scale)[L::VEC],
                                             int n_text) {
  __shared__ float shared[2][L::WARPS];
  float mean = __fmul_rn(adaln_row_sum<L>(sum, shared[0]), f.inv_dim), squares = 0;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    if (adaln_column<L>(row, v) >= row.C) continue;
    float a[8];
    unpack8(xnew[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float d = __fsub_rn(a[i], mean);
      squares = __fmaf_rn(d, d, squares);
    }
  }
  float variance = __fmul_rn(adaln_row_sum<L>(squares, shared[1]), f.inv_dim);
  float rstd = rsqrtf(__fadd_rn(variance, ADALN_EPS));
  if (row.lane == 0) {
    f.mean[row.r] = mean;
    f.rstd[row.r] = rstd;
  }

  bool silu = f.silu_image && row.r >= n_text;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    float a[8], add[8], times[8];
    unpack8(xnew[v], a);
    unpack8(shift[v], add);
    unpack8(scale[v], times);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float xhat = __fmul_rn(__fsub_rn(a[i], mean), rstd);
      a[i] = __fmaf_rn(__fadd_rn(1.0f, times[i]), xhat, add[i]);
      if (silu) a[i] = __fmul_rn(a[i], sigmoid(a[i]));
    }
    adaln_row_store<L>(f.h, row, v, pack8(a));
  }
}

// ---- backward: a thread owns 8 columns and walks down the rows of its block's run ----

typedef struct AdalnBackward {
  const bf16 *dxnew, *x, *branch; // [T, C]; dxnew, branch may be NULL
  const bf16 *mod;                // [SEG, M]
  const float *mean, *rstd;       // [T]
  bf16 *dx, *dbranch;             // [T, C]
  float *pieces;                  // [runs + SEG][ADALN_SUMS][C]: sums for shift, scale, gate
  const int32_t *segment, *seg_start, *seg_len;
  const BatchDims *dims;
  int64_t M;
  int T, C, warps;
  int gate, shift, scale;
  int add_branch; // x is the stream before the branch was added
} AdalnBackward;

// Of a call of ADALN_BWD, but for dh.
static inline AdalnBackward adaln_backward_of(const KernelCall *c) {
  adaln_check_dim(c->dims->C);
  AdalnBackward b = {};
  b.dxnew = (const bf16 *)c->in.ADALN_BWD.dxnew;
  b.x = (const bf16 *)c->in.ADALN_BWD.x;
  b.branch = (const bf16 *)c->in.ADALN_BWD.branch;
  b.mod = (const bf16 *)c->in.ADALN_BWD.mod;
  b.mean = (const float *)c->in.ADALN_BWD.mean;
  b.rstd = (const float *)c->in.ADALN_BWD.rstd;
  b.dx = (bf16 *)c->out.ADALN_BWD.dx;
  b.dbranch = (bf16 *)c->out.ADALN_BWD.dbranch;
  b.pieces = (float *)c->scratch;
  b.segment = c->batch->segment;
  b.seg_start = c->batch->seg_start;
  b.seg_len = c->batch->seg_len;
  b.dims = c->batch->dims;
  b.M = c->dims->M;
  b.T = c->dims->T;
  b.C = c->dims->C;
  b.warps = adaln_runs(b.C).warps;
  b.gate = c->args->adaln.gate;
  b.shift = c->args->adaln.shift;
  b.scale = c->args->adaln.scale;
  b.add_branch = b.branch && !c->args->adaln.x_is_new;
  return b;
}

// dmod [SEG, M] of such a call, from the pieces that the kernel has left in so many runs.
static inline void adaln_backward_sums(const KernelCall *c, const AdalnBackward *b, int runs) {
  AdalnSums sums = {b->pieces, (bf16 *)c->out.ADALN_BWD.dmod, {b->shift, b->scale, b->gate}, b->branch ? 3 : 2, runs};
  adaln_segment_sums(c, &sums);
}

// A thread's 8 columns of a row, but for dh.
typedef struct AdalnColumns {
  uint4 dxnew, x, branch;
  float mean, rstd;
} AdalnColumns;

template <bool BRANCH>
static __device__ inline void adaln_columns_load(AdalnColumns *q, const AdalnBackward &b, int r, int column,
                                                 bool there) {
  int64_t at = (int64_t)r * b.C + column;
  q->x = load_once(b.x + at, there);
  if (BRANCH) q->branch = load_once(b.branch + at, there);
  q->dxnew = load_once(b.dxnew + at, there && b.dxnew);
  q->mean = __ldg(b.mean + r);
  q->rstd = __ldg(b.rstd + r);
}

// Sums of a and of b over the `warps` warps of a group. `shared` [2][warps of the block] is used by turns, so that one
// barrier a row is enough: nobody writes a turn's half again before everybody has passed the barrier after it.
static __device__ inline float2 adaln_group_sums(float a, float b, float2 *shared, int group, int warps, int turn) {
  float2 v = make_float2(warp_sum(a), warp_sum(b));
  if (warps == 1) return v;
  int lane = threadIdx.x & 31;
  float2 *mine = shared + (turn & 1) * (ADALN_RUN_THREADS / 32);
  if (lane == 0) mine[threadIdx.x >> 5] = v;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * warps) : "memory");
  v = lane < warps ? mine[group * warps + lane] : make_float2(0, 0);
  return make_float2(warp_sum(v.x), warp_sum(v.y));
}

// Gradient says where dh [T, C] comes from: load() asks for what a row's columns are made of and value() makes them,
// rounded to bf16.
template <class Gradient, bool BRANCH, bool SILU>
static __global__ void __launch_bounds__(ADALN_RUN_THREADS, 1)
    adaln_backward(const AdalnBackward b, const Gradient gradient) {
  await_previous();
  constexpr int SUMS = BRANCH ? 3 : 2;
  __shared__ float2 exchange[2 * (ADALN_RUN_THREADS / 32)];
  __shared__ __align__(16) float shared[SUMS * ADALN_SHARED_COLUMNS];
  int threads = 32 * b.warps, group = threadIdx.x / threads, groups = blockDim.x / threads;
  int column = 8 * (threadIdx.x % threads);
  bool there = column < b.C;
  int n_text = b.dims->n_text, used = n_text + b.dims->n_image, run_rows = adaln_run_rows(b.dims, gridDim.x);
  int begin = min(used, (int)blockIdx.x * run_rows), end = min(used, begin + run_rows);
  float inv_dim = 1.0f / (float)b.C;

  // The next row is on its way while this one is worked on; across pieces too.
  AdalnColumns ahead;
  typename Gradient::Ahead dh_ahead;
  auto fetch = [&](int r) {
    gradient.load(&dh_ahead, r, n_text, b.C, column, there);
    adaln_columns_load<BRANCH>(&ahead, b, r, column, there);
  };
  int fetched = begin + group, turn = 0;
  if (fetched < end) fetch(fetched);

  for (int piece = begin; piece < end;) {
    int g = b.segment[piece], stop = min(end, b.seg_start[g] + b.seg_len[g]);
    const bf16 *mod = b.mod + g * b.M + column;
    float scale1[8], gate[8], shift[8], sums[SUMS][8] = {}; // scale1: 1 + scale
    load_mod8(mod + b.scale, there, scale1);
#pragma unroll
    for (int i = 0; i < 8; i++) scale1[i] += 1.0f;
    if (BRANCH) load_mod8(mod + b.gate, there, gate);
    if (SILU) load_mod8(mod + b.shift, there, shift);

    for (int r = piece + group; r < stop; r += groups) {
      if (fetched != r) fetch(r); // the piece before was shorter than a round
      AdalnColumns now = ahead;
      uint4 dh = gradient.value(dh_ahead, r, n_text, b.C, column, there);
      fetched = r + groups < stop ? r + groups : stop + group;
      if (fetched < end) fetch(fetched);

      float xhat[8], d[8], sum = 0, dot = 0; // d: dn, then dn (1 + scale)
      unpack8(BRANCH && b.add_branch ? adaln_residual(now.x, gate, now.branch) : now.x, xhat);
      unpack8(dh, d);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        xhat[i] = (xhat[i] - now.mean) * now.rstd;
        if (SILU && g) d[i] *= silu_slope(scale1[i] * xhat[i] + shift[i]);
        sums[0][i] += d[i];
        sums[1][i] += d[i] * xhat[i];
        d[i] *= scale1[i];
        sum += d[i];
        dot += d[i] * xhat[i];
      }
      float2 m = adaln_group_sums(sum, dot, exchange, group, b.warps, turn++);
      float m1 = m.x * inv_dim, m2 = m.y * inv_dim, up[8];
      unpack8(now.dxnew, up);
#pragma unroll
      for (int i = 0; i < 8; i++) d[i] = now.rstd * (d[i] - m1 - xhat[i] * m2) + up[i];
      int64_t at = (int64_t)r * b.C + column;
      if (there) store8(b.dx + at, d);
      if (BRANCH) {
        float branch[8];
        unpack8(now.branch, branch);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums[2][i] += d[i] * branch[i];
          d[i] *= gate[i];
        }
        if (there) store8(b.dbranch + at, d);
      }
    }
    adaln_piece_store<SUMS>(b.pieces + ((int64_t)blockIdx.x + g) * ADALN_SUMS * b.C, sums, b.C, group, groups, column,
                            shared);
    piece = stop;
  }

  int64_t filler = (int64_t)used * b.C / 8, all = (int64_t)b.T * b.C / 8;
  for (int64_t i = filler + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all;
       i += (int64_t)gridDim.x * blockDim.x) {
    reinterpret_cast<uint4 *>(b.dx)[i] = make_uint4(0, 0, 0, 0);
    if (BRANCH) reinterpret_cast<uint4 *>(b.dbranch)[i] = make_uint4(0, 0, 0, 0);
  }
}
#endif
