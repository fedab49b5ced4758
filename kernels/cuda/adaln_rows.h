// The rows of a fused AdaLN, for the kernels that differ in where the branch or the gradient comes from (adaln.cu,
// combine_adaln.cu): what they share stands here once, so that they give the same bits.
#ifndef TESSERA_ADALN_ROWS_H
#define TESSERA_ADALN_ROWS_H

#include "kernels/cuda/adaln.h"

// ---- forward: one or two warps a row ----

enum { ADALN_ROW_THREADS = 256 };

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
static inline AdalnForward adaln_forward_of(const KernelCall *c, const void *x, const void *mod, void *const *out) {
  adaln_check_dim(c->dims->C);
  AdalnForward f = {};
  f.x = (const bf16 *)x;
  f.mod = (const bf16 *)mod;
  f.xnew = (bf16 *)out[0];
  f.h = (bf16 *)out[1];
  f.mean = (float *)out[2];
  f.rstd = (float *)out[3];
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

// How a row lies in the registers of its WARPS warps: a lane holds VEC times 8 columns, 8 (lane + v lanes) ..; which
// fixes the order of its sums.
template <int VEC_, int WARPS_> struct AdalnLayout {
  static constexpr int VEC = VEC_, WARPS = WARPS_, LANES = 32 * WARPS_;
};

// Calls launch(layout) with the layout of rows of C columns.
template <class Launch> static void adaln_layout(int C, Launch launch) {
  int vectors = ceil_div(C, 256); // of 8 columns for each lane of a warp
  if (vectors <= 1)
    launch(AdalnLayout<1, 1>());
  else if (vectors <= 2)
    launch(AdalnLayout<2, 1>());
  else if (vectors <= 3)
    launch(AdalnLayout<3, 1>());
  else if (vectors <= 4)
    launch(AdalnLayout<4, 1>());
  else if (vectors <= 6)
    launch(AdalnLayout<6, 1>());
  else if (vectors <= 8)
    launch(AdalnLayout<8, 1>());
  else if (vectors <= 12)
    launch(AdalnLayout<6, 2>());
  else
    launch(AdalnLayout<8, 2>());
}

// Sum over the row's lanes. With two warps they exchange through their own two floats of shared memory and meet at the
// row's own barrier.
template <int WARPS> static __device__ inline float adaln_row_sum(float v, float *shared) {
  v = warp_sum(v);
  if (WARPS == 1) return v;
  int warp = threadIdx.x >> 5;
  if ((threadIdx.x & 31) == 0) shared[warp] = v;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warp / WARPS), "n"(32 * WARPS) : "memory");
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += shared[warp / WARPS * WARPS + w];
  return sum;
}

// Zeros in a row of `to` [T, C], which may be NULL; `at`: the lane's first element.
template <class L> static __device__ inline void adaln_row_zero(bf16 *to, int64_t at, int lane, int vectors) {
  if (!to) return;
  for (int v = 0; v < L::VEC; v++)
    if (lane + v * L::LANES < vectors) *reinterpret_cast<uint4 *>(to + at + 8 * v * L::LANES) = make_uint4(0, 0, 0, 0);
}

// All outputs but a branch of the filler row r.
template <class L> static __device__ inline void adaln_row_filler(const AdalnForward &f, int64_t r, int lane) {
  int64_t at = r * f.C + 8 * lane;
  adaln_row_zero<L>(f.xnew, at, lane, f.C / 8);
  adaln_row_zero<L>(f.h, at, lane, f.C / 8);
  if (lane == 0) f.mean[r] = f.rstd[r] = 0;
}

// mean, rstd and h of row r from xnew, as it is stored, and the sum of the lane's columns of it, in their order. The
// arithmetic is spelled out, so that h is the same to the bit wherever xnew came from. `mod`: the segment's row of the
// table, at the lane's first column.
template <class L>
static __device__ inline void adaln_row_norm(const AdalnForward &f, const uint4 (&xnew)[L::VEC], float sum,
                                             const bf16 *mod, int64_t r, int lane, int n_text) {
  __shared__ float shared[2][ADALN_ROW_THREADS / 32];
  int vectors = f.C / 8;
  int64_t at = r * f.C + 8 * lane;
  float mean = __fmul_rn(adaln_row_sum<L::WARPS>(sum, shared[0]), f.inv_dim), squares = 0;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    if (lane + v * L::LANES >= vectors) continue;
    float a[8];
    unpack8(xnew[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float d = __fsub_rn(a[i], mean);
      squares = __fmaf_rn(d, d, squares);
    }
  }
  float variance = __fmul_rn(adaln_row_sum<L::WARPS>(squares, shared[1]), f.inv_dim);
  float rstd = rsqrtf(__fadd_rn(variance, ADALN_EPS));
  if (lane == 0) {
    f.mean[r] = mean;
    f.rstd[r] = rstd;
  }

  bool silu = f.silu_image && r >= n_text;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    bool there = lane + v * L::LANES < vectors;
    float a[8], shift[8], scale[8];
    load_mod8(mod + f.shift + 8 * v * L::LANES, there, shift);
    load_mod8(mod + f.scale + 8 * v * L::LANES, there, scale);
    unpack8(xnew[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float xhat = __fmul_rn(__fsub_rn(a[i], mean), rstd);
      a[i] = __fmaf_rn(__fadd_rn(1.0f, scale[i]), xhat, shift[i]);
      if (silu) a[i] = __fmul_rn(a[i], sigmoid(a[i]));
    }
    if (there) store8(f.h + at + 8 * v * L::LANES, a);
  }
}

// The sum of a lane's 8 columns is added to `sum`.
static __device__ inline float adaln_add8(float sum, uint4 x) {
  float a[8];
  unpack8(x, a);
#pragma unroll
  for (int i = 0; i < 8; i++) sum = __fadd_rn(sum, a[i]);
  return sum;
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

// `in`: dxnew, x, branch, mod, mean, rstd.
static inline AdalnBackward adaln_backward_of(const KernelCall *c, const void *const *in) {
  adaln_check_dim(c->dims->C);
  AdalnBackward b = {};
  b.dxnew = (const bf16 *)in[0];
  b.x = (const bf16 *)in[1];
  b.branch = (const bf16 *)in[2];
  b.mod = (const bf16 *)in[3];
  b.mean = (const float *)in[4];
  b.rstd = (const float *)in[5];
  b.dx = (bf16 *)c->out[0];
  b.dbranch = (bf16 *)c->out[1];
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

// dmod of the pieces that the kernel has left; dmod [SEG, M].
static inline void adaln_backward_sums(const KernelCall *c, const AdalnBackward *b) {
  AdalnSums sums = {b->pieces, (bf16 *)c->out[2], {b->shift, b->scale, b->gate}, b->branch ? 3 : 2};
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
