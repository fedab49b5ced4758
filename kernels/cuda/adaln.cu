// Gate + residual + LayerNorm + per-segment scale and shift (+ SiLU) over packed rows, one kernel each way.
//
// Both kernels are bound by memory: forward moves 8 bytes an element (x, branch in; xnew, h out), backward 12 (dh,
// dxnew, x, branch in; dx, dbranch out) and the sums over segments. Everything between load and store stays in
// registers.
#include "kernels/cuda/adaln.h"

// ---- forward: one or two warps a row ----

enum { FORWARD_THREADS = 256 };

typedef struct Forward {
  const bf16 *x, *branch; // [T, C]; branch may be NULL
  const bf16 *mod;        // [SEG, M]
  bf16 *xnew, *h;         // [T, C]
  float *mean, *rstd;     // [T]
  const int32_t *segment; // [T]
  const BatchDims *dims;
  int64_t M;
  int T, C, gate, shift, scale, silu_image;
  float inv_dim; // 1 / C
} Forward;

// Sum over the row's lanes. With two warps they exchange through their own two floats of shared memory and meet at the
// row's own barrier.
template <int WARPS> static __device__ inline float row_sum(float v, float *shared) {
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

// A lane holds VEC times 8 columns: 8 (lane + v lanes) .., as bf16, since the row is normalised as it is stored. The
// arithmetic from xnew on is spelled out, so that h is the same to the bit with a branch and without.
template <int VEC, int WARPS, bool BRANCH>
static __global__ void __launch_bounds__(FORWARD_THREADS) adaln_forward(const Forward f) {
  constexpr int lanes = 32 * WARPS;
  __shared__ float shared[2][FORWARD_THREADS / 32];
  int lane = threadIdx.x % lanes, vectors = f.C / 8;
  int64_t r = (int64_t)blockIdx.x * (FORWARD_THREADS / lanes) + threadIdx.x / lanes;
  if (r >= f.T) return;
  int64_t at = r * f.C + 8 * lane;

  // Rows are asked for first, wherever they lead; filler is told apart while they are on their way.
  uint4 x[VEC], branch[VEC];
#pragma unroll
  for (int v = 0; v < VEC; v++) x[v] = load_once(f.x + at + 8 * v * lanes, lane + v * lanes < vectors);
  if (BRANCH) {
#pragma unroll
    for (int v = 0; v < VEC; v++) branch[v] = load_once(f.branch + at + 8 * v * lanes, lane + v * lanes < vectors);
  }
  const bf16 *mod = f.mod + f.segment[r] * f.M + 8 * lane;
  int n_text = f.dims->n_text;

  if (r >= n_text + f.dims->n_image) {
    for (int v = 0; v < VEC; v++) {
      if (lane + v * lanes >= vectors) continue;
      if (BRANCH) *reinterpret_cast<uint4 *>(f.xnew + at + 8 * v * lanes) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4 *>(f.h + at + 8 * v * lanes) = make_uint4(0, 0, 0, 0);
    }
    if (lane == 0) f.mean[r] = f.rstd[r] = 0;
    return;
  }

  float sum = 0;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    bool there = lane + v * lanes < vectors;
    if (BRANCH) {
      float gate[8];
      load_mod8(mod + f.gate + 8 * v * lanes, there, gate);
      x[v] = adaln_residual(x[v], gate, branch[v]);
      if (there) *reinterpret_cast<uint4 *>(f.xnew + at + 8 * v * lanes) = x[v];
    }
    float a[8];
    unpack8(x[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = __fadd_rn(sum, a[i]);
  }
  float mean = __fmul_rn(row_sum<WARPS>(sum, shared[0]), f.inv_dim), squares = 0;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    if (lane + v * lanes >= vectors) continue;
    float a[8];
    unpack8(x[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float d = __fsub_rn(a[i], mean);
      squares = __fmaf_rn(d, d, squares);
    }
  }
  float variance = __fmul_rn(row_sum<WARPS>(squares, shared[1]), f.inv_dim);
  float rstd = rsqrtf(__fadd_rn(variance, ADALN_EPS));
  if (lane == 0) {
    f.mean[r] = mean;
    f.rstd[r] = rstd;
  }

  bool silu = f.silu_image && r >= n_text;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    bool there = lane + v * lanes < vectors;
    float a[8], shift[8], scale[8];
    load_mod8(mod + f.shift + 8 * v * lanes, there, shift);
    load_mod8(mod + f.scale + 8 * v * lanes, there, scale);
    unpack8(x[v], a);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float xhat = __fmul_rn(__fsub_rn(a[i], mean), rstd);
      a[i] = __fmaf_rn(__fadd_rn(1.0f, scale[i]), xhat, shift[i]);
      if (silu) a[i] = __fmul_rn(a[i], sigmoid(a[i]));
    }
    if (there) store8(f.h + at + 8 * v * lanes, a);
  }
}

template <int VEC, int WARPS> static void forward_launch(const Forward *f, cudaStream_t stream) {
  int grid = ceil_div(f->T, FORWARD_THREADS / (32 * WARPS));
  if (f->branch)
    CUDA_LAUNCH((adaln_forward<VEC, WARPS, true>), grid, FORWARD_THREADS, 0, stream, *f);
  else
    CUDA_LAUNCH((adaln_forward<VEC, WARPS, false>), grid, FORWARD_THREADS, 0, stream, *f);
}

static Forward forward_of(const KernelCall *c) {
  Forward f = {};
  f.x = (const bf16 *)c->in[0];
  f.branch = (const bf16 *)c->in[1];
  f.mod = (const bf16 *)c->in[2];
  f.xnew = (bf16 *)c->out[0];
  f.h = (bf16 *)c->out[1];
  f.mean = (float *)c->out[2];
  f.rstd = (float *)c->out[3];
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

extern "C" void cuda_ADALN_FWD(const KernelCall *c) {
  Forward f = forward_of(c);
  adaln_check_dim(f.C);
  cudaStream_t stream = call_stream(c);
  int vectors = ceil_div(f.C, 256); // of 8 columns for each lane of a warp
  if (vectors <= 1)
    forward_launch<1, 1>(&f, stream);
  else if (vectors <= 2)
    forward_launch<2, 1>(&f, stream);
  else if (vectors <= 3)
    forward_launch<3, 1>(&f, stream);
  else if (vectors <= 4)
    forward_launch<4, 1>(&f, stream);
  else if (vectors <= 6)
    forward_launch<6, 1>(&f, stream);
  else if (vectors <= 8)
    forward_launch<8, 1>(&f, stream);
  else if (vectors <= 12)
    forward_launch<6, 2>(&f, stream);
  else
    forward_launch<8, 2>(&f, stream);
}

// ---- backward: a thread owns 8 columns and walks down the rows of its block's run ----

typedef struct Backward {
  const bf16 *dh, *dxnew, *x, *branch; // [T, C]; dxnew, branch may be NULL
  const bf16 *mod;                     // [SEG, M]
  const float *mean, *rstd;            // [T]
  bf16 *dx, *dbranch;                  // [T, C]
  float *pieces;                       // [runs + SEG][ADALN_SUMS][C]: sums for shift, scale, gate
  const int32_t *segment, *seg_start, *seg_len;
  const BatchDims *dims;
  int64_t M;
  int T, C, warps;
  int gate, shift, scale;
  int add_branch; // x is the stream before the branch was added
} Backward;

// A thread's 8 columns of a row.
typedef struct Columns {
  uint4 dh, dxnew, x, branch;
  float mean, rstd;
} Columns;

template <bool BRANCH>
static __device__ inline void columns_load(Columns *q, const Backward &b, int r, int column, bool there) {
  int64_t at = (int64_t)r * b.C + column;
  q->x = load_once(b.x + at, there);
  if (BRANCH) q->branch = load_once(b.branch + at, there);
  q->dh = load_once(b.dh + at, there);
  q->dxnew = load_once(b.dxnew + at, there && b.dxnew);
  q->mean = __ldg(b.mean + r);
  q->rstd = __ldg(b.rstd + r);
}

// Sums of a and of b over the `warps` warps of a group. `shared` [2][warps of the block] is used by turns, so that one
// barrier a row is enough: nobody writes a turn's half again before everybody has passed the barrier after it.
static __device__ inline float2 group_sums(float a, float b, float2 *shared, int group, int warps, int turn) {
  float2 v = make_float2(warp_sum(a), warp_sum(b));
  if (warps == 1) return v;
  int lane = threadIdx.x & 31;
  float2 *mine = shared + (turn & 1) * (ADALN_RUN_THREADS / 32);
  if (lane == 0) mine[threadIdx.x >> 5] = v;
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * warps) : "memory");
  v = lane < warps ? mine[group * warps + lane] : make_float2(0, 0);
  return make_float2(warp_sum(v.x), warp_sum(v.y));
}

template <bool BRANCH, bool SILU>
static __global__ void __launch_bounds__(ADALN_RUN_THREADS, 1) adaln_backward(const Backward b) {
  constexpr int SUMS = BRANCH ? 3 : 2;
  __shared__ float2 exchange[2 * (ADALN_RUN_THREADS / 32)];
  __shared__ __align__(16) float shared[SUMS * ADALN_SHARED_COLUMNS];
  int threads = 32 * b.warps, group = threadIdx.x / threads, groups = blockDim.x / threads;
  int column = 8 * (threadIdx.x % threads);
  bool there = column < b.C;
  int used = b.dims->n_text + b.dims->n_image, run_rows = adaln_run_rows(b.dims, gridDim.x);
  int begin = min(used, (int)blockIdx.x * run_rows), end = min(used, begin + run_rows);
  float inv_dim = 1.0f / (float)b.C;

  // The next row is on its way while this one is worked on; across pieces too.
  Columns ahead;
  int fetched = begin + group, turn = 0;
  if (fetched < end) columns_load<BRANCH>(&ahead, b, fetched, column, there);

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
      if (fetched != r) columns_load<BRANCH>(&ahead, b, r, column, there); // the piece before was shorter than a round
      Columns now = ahead;
      fetched = r + groups < stop ? r + groups : stop + group;
      if (fetched < end) columns_load<BRANCH>(&ahead, b, fetched, column, there);

      float xhat[8], d[8], sum = 0, dot = 0; // d: dn, then dn (1 + scale)
      unpack8(BRANCH && b.add_branch ? adaln_residual(now.x, gate, now.branch) : now.x, xhat);
      unpack8(now.dh, d);
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
      float2 m = group_sums(sum, dot, exchange, group, b.warps, turn++);
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

static Backward backward_of(const KernelCall *c) {
  Backward b = {};
  b.dh = (const bf16 *)c->in[0];
  b.dxnew = (const bf16 *)c->in[1];
  b.x = (const bf16 *)c->in[2];
  b.branch = (const bf16 *)c->in[3];
  b.mod = (const bf16 *)c->in[4];
  b.mean = (const float *)c->in[5];
  b.rstd = (const float *)c->in[6];
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

extern "C" void cuda_ADALN_BWD(const KernelCall *c) {
  Backward b = backward_of(c);
  adaln_check_dim(b.C);
  AdalnRuns runs = adaln_runs(b.C);
  int threads = 32 * runs.warps * runs.groups, silu = c->args->adaln.silu_image;
  cudaStream_t stream = call_stream(c);
  if (b.branch && silu)
    CUDA_LAUNCH((adaln_backward<true, true>), runs.blocks, threads, 0, stream, b);
  else if (b.branch)
    CUDA_LAUNCH((adaln_backward<true, false>), runs.blocks, threads, 0, stream, b);
  else if (silu)
    CUDA_LAUNCH((adaln_backward<false, true>), runs.blocks, threads, 0, stream, b);
  else
    CUDA_LAUNCH((adaln_backward<false, false>), runs.blocks, threads, 0, stream, b);

  AdalnSums sums = {b.pieces, (bf16 *)c->out[2], {b.shift, b.scale, b.gate}, b.branch ? 3 : 2};
  adaln_segment_sums(c, &sums);
}

// ---- sums over segments ----

// As many warps as the row has 256 columns; short rows share a block of up to 8 warps.
AdalnRuns adaln_runs(int C) {
  AdalnRuns r;
  r.warps = ceil_div(C, 256);
  // A group's columns in shared memory are ADALN_SHARED_COLUMNS / groups: a power of two of groups keeps them aligned.
  r.groups = r.warps == 1 ? 8 : r.warps == 2 ? 4 : r.warps <= 4 ? 2 : 1;
  // Two blocks of up to 8 warps fit on a multiprocessor; longer rows have it to themselves.
  r.blocks = cuda_sm_count() * (r.warps > 8 ? 1 : 2);
  return r;
}

int64_t adaln_pieces_size(const Dims *dims) {
  return ((int64_t)adaln_runs(dims->C).blocks + dims->segments) * ADALN_SUMS * dims->C;
}

size_t adaln_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return kind == OP_ADALN_BWD ? (size_t)adaln_pieces_size(dims) * sizeof(float) : 0;
}

// A block sums 4 SUM_COLUMNS columns of one segment, a thread 4 of them over a share of its pieces.
enum { SUM_COLUMNS = 64, SUM_PARTS = 4 };

static __global__ void __launch_bounds__(SUM_COLUMNS *SUM_PARTS)
    segment_sums(const AdalnSums s, const BatchDims *dims, const int32_t *seg_start, const int32_t *seg_len, int runs,
                 int C, int64_t M) {
  __shared__ float4 shared[SUM_PARTS][SUM_COLUMNS];
  int part = threadIdx.y, g = blockIdx.x, first = 4 * (blockIdx.y * SUM_COLUMNS + threadIdx.x); // of [sums][C]
  int start = seg_start[g], len = seg_len[g], run_rows = adaln_run_rows(dims, runs);
  if (g >= dims->n_segments) return;
  bool there = first < s.sums * C;
  int run = len ? start / run_rows : 0, pieces = len ? (start + len - 1) / run_rows - run + 1 : 0;
  int begin = pieces * part / SUM_PARTS, end = pieces * (part + 1) / SUM_PARTS;
  const float *from = s.pieces + (int64_t)(run + g) * ADALN_SUMS * C + first;
  float4 sum = make_float4(0, 0, 0, 0);
  if (!there) end = begin;
#pragma unroll 8
  for (int p = begin; p < end; p++) {
    float4 v = *reinterpret_cast<const float4 *>(from + (int64_t)p * ADALN_SUMS * C);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  shared[part][threadIdx.x] = sum;
  __syncthreads();
  if (part || !there) return;
#pragma unroll
  for (int other = 1; other < SUM_PARTS; other++) {
    float4 v = shared[other][threadIdx.x];
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  int k = first / C, column = (k == 0 ? s.columns[0] : k == 1 ? s.columns[1] : s.columns[2]) + first - k * C;
  *reinterpret_cast<uint2 *>(s.dmod + g * M + column) = make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
}

void adaln_segment_sums(const KernelCall *c, const AdalnSums *s) {
  const Dims *d = c->dims;
  dim3 grid((unsigned)d->segments, (unsigned)ceil_div(s->sums * d->C / 4, SUM_COLUMNS));
  CUDA_LAUNCH(segment_sums, grid, dim3(SUM_COLUMNS, SUM_PARTS), 0, call_stream(c), *s, c->batch->dims,
              c->batch->seg_start, c->batch->seg_len, adaln_runs(d->C).blocks, d->C, d->M);
}
