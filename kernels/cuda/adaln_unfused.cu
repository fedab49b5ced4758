// ADALN_FWD and ADALN_BWD as separate kernels for residual, norm, modulation, activation and mask, with a bf16 tensor
// between any two: what the fused kernels (adaln.cu) are compared with. Each kernel is bound by memory; in bytes an
// element, with a branch and dxnew:
//   forward   residual 6, norm 4, modulate 4 (silu 4 on image rows)                              14, fused  8
//   backward  residual 6, normalise 4, modulation 6, norm 6, add 6, gate 6 (silu 6)              34, fused 12
#include "kernels/cuda/adaln.h"

enum { ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32 }; // a warp a row

typedef struct Site {
  const bf16 *mod;          // [SEG, M]
  const float *mean, *rstd; // [T]; backward only
  const int32_t *segment;   // [T]
  const BatchDims *dims;
  int64_t M;
  int T, C, gate, shift, scale;
} Site;

static Site site_of(const KernelCall *c, const void *mod) {
  Site s = {};
  s.mod = (const bf16 *)mod;
  s.segment = c->batch->segment;
  s.dims = c->batch->dims;
  s.M = c->dims->M;
  s.T = c->dims->T;
  s.C = c->dims->C;
  s.gate = c->args->adaln.gate;
  s.shift = c->args->adaln.shift;
  s.scale = c->args->adaln.scale;
  adaln_check_dim(s.C);
  return s;
}

// ---- elementwise kernels: out = f(a, b, the row's modulation and statistics) ----

// Eight columns' surroundings: the modulation row from that column on, and the row's statistics.
typedef struct Place {
  const bf16 *mod; // from this column
  float mean, rstd;
  bool image;
} Place;

struct Residual { // xnew = x + gate * branch
  static constexpr bool binary = true, statistics = false;
  static __device__ void apply(const Site &s, const Place &p, float x[8], const float branch[8]) {
    float gate[8];
    load8(p.mod + s.gate, gate);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fmaf_rn(gate[i], branch[i], x[i]);
  }
};

struct Normalise { // xhat from xnew
  static constexpr bool binary = false, statistics = true;
  static __device__ void apply(const Site &, const Place &p, float x[8], const float *) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = (x[i] - p.mean) * p.rstd;
  }
};

struct Modulate { // n from xhat
  static constexpr bool binary = false, statistics = false;
  static __device__ void apply(const Site &s, const Place &p, float x[8], const float *) {
    float shift[8], scale[8];
    load8(p.mod + s.shift, shift);
    load8(p.mod + s.scale, scale);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = (1.0f + scale[i]) * x[i] + shift[i];
  }
};

struct Silu { // of image rows
  static constexpr bool binary = false, statistics = false;
  static __device__ void apply(const Site &, const Place &p, float x[8], const float *) {
    if (!p.image) return;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= sigmoid(x[i]);
  }
};

struct SiluBackward { // dn from dh and xhat
  static constexpr bool binary = true, statistics = false;
  static __device__ void apply(const Site &s, const Place &p, float dh[8], const float xhat[8]) {
    if (!p.image) return;
    float n[8];
#pragma unroll
    for (int i = 0; i < 8; i++) n[i] = xhat[i];
    Modulate::apply(s, p, n, NULL);
#pragma unroll
    for (int i = 0; i < 8; i++) dh[i] *= silu_slope(n[i]);
  }
};

struct Add {
  static constexpr bool binary = true, statistics = false;
  static __device__ void apply(const Site &, const Place &, float a[8], const float b[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] += b[i];
  }
};

static __device__ inline uint4 load_plain(const bf16 *p, bool there) { // p may be written by this kernel
  return there ? *reinterpret_cast<const uint4 *>(p) : make_uint4(0, 0, 0, 0);
}

// out may be a or b: four vectors are loaded, then stored, each by the lane that loaded it. Filler rows are left alone.
template <class Op>
static __global__ void __launch_bounds__(ROW_THREADS) map_rows(const Site s, const bf16 *a, const bf16 *b, bf16 *out) {
  await_previous();
  constexpr int unroll = 4;
  int r = blockIdx.x * ROW_WARPS + threadIdx.x / 32, n_text = s.dims->n_text;
  if (r >= n_text + s.dims->n_image) return;
  Place row = {s.mod + s.segment[r] * s.M, Op::statistics ? s.mean[r] : 0, Op::statistics ? s.rstd[r] : 0, r >= n_text};
  int64_t at = (int64_t)r * s.C;
  for (int first = 8 * (threadIdx.x & 31); first < s.C; first += unroll * 256) {
    uint4 va[unroll], vb[unroll];
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      int column = first + 256 * u;
      va[u] = load_plain(a + at + column, column < s.C);
      if (Op::binary) vb[u] = load_plain(b + at + column, column < s.C);
    }
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      int column = first + 256 * u;
      if (column >= s.C) continue;
      float x[8], y[8];
      unpack8(va[u], x);
      if (Op::binary) unpack8(vb[u], y);
      Place place = row;
      place.mod += column;
      Op::apply(s, place, x, y);
      store8(out + at + column, x);
    }
  }
}

template <class Op> static void map(const KernelCall *c, const Site *s, const bf16 *a, const bf16 *b, bf16 *out) {
  CUDA_LAUNCH(map_rows<Op>, ceil_div(s->T, ROW_WARPS), ROW_THREADS, 0, call_stream(c), *s, a, b, out);
}

// Zeros in the filler rows of two [T, C] tensors and two [T] of statistics; each may be NULL.
static __global__ void __launch_bounds__(ROW_THREADS)
    mask_rows(const BatchDims *dims, int T, int C, bf16 *a, bf16 *b, float *mean, float *rstd) {
  await_previous();
  int r = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (r < dims->n_text + dims->n_image || r >= T) return;
  for (int column = 8 * lane; column < C; column += 256) {
    if (a) *reinterpret_cast<uint4 *>(a + (int64_t)r * C + column) = make_uint4(0, 0, 0, 0);
    if (b) *reinterpret_cast<uint4 *>(b + (int64_t)r * C + column) = make_uint4(0, 0, 0, 0);
  }
  if (mean && lane == 0) mean[r] = rstd[r] = 0;
}

static void mask(const KernelCall *c, const Site *s, bf16 *a, bf16 *b, float *mean, float *rstd) {
  CUDA_LAUNCH(mask_rows, ceil_div(s->T, ROW_WARPS), ROW_THREADS, 0, call_stream(c), s->dims, s->T, s->C, a, b, mean,
              rstd);
}

// ---- LayerNorm over rows held in registers: VEC times 8 columns a lane ----

// xhat, mean, rstd from x.
template <int VEC>
static __global__ void __launch_bounds__(ROW_THREADS)
    norm_forward(const Site s, const bf16 *x, bf16 *xhat, float *mean, float *rstd) {
  await_previous();
  int r = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (r >= s.dims->n_text + s.dims->n_image) return;
  int64_t at = (int64_t)r * s.C + 8 * lane;
  uint4 v[VEC];
  float sum = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < VEC; k++) v[k] = load_once(x + at + 256 * k, 8 * lane + 256 * k < s.C);
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    float a[8];
    unpack8(v[k], a);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += a[i];
  }
  float m = warp_sum(sum) / (float)s.C;
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    if (8 * lane + 256 * k >= s.C) continue;
    float a[8];
    unpack8(v[k], a);
#pragma unroll
    for (int i = 0; i < 8; i++) squares += (a[i] - m) * (a[i] - m);
  }
  float inv = 1.0f / sqrtf(warp_sum(squares) / (float)s.C + ADALN_EPS);
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    if (8 * lane + 256 * k >= s.C) continue;
    float a[8];
    unpack8(v[k], a);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = (a[i] - m) * inv;
    store8(xhat + at + 256 * k, a);
  }
  if (lane == 0) {
    mean[r] = m;
    rstd[r] = inv;
  }
}

// dx from dxhat, which it replaces, and xhat.
template <int VEC>
static __global__ void __launch_bounds__(ROW_THREADS) norm_backward(const Site s, bf16 *dx, const bf16 *xhat) {
  await_previous();
  int r = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (r >= s.dims->n_text + s.dims->n_image) return;
  int64_t at = (int64_t)r * s.C + 8 * lane;
  uint4 vd[VEC], vx[VEC];
  float sum = 0, dot = 0;
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    vd[k] = load_plain(dx + at + 256 * k, 8 * lane + 256 * k < s.C);
    vx[k] = load_once(xhat + at + 256 * k, 8 * lane + 256 * k < s.C);
  }
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    float d[8], x[8];
    unpack8(vd[k], d);
    unpack8(vx[k], x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum += d[i];
      dot += d[i] * x[i];
    }
  }
  float m1 = warp_sum(sum) / (float)s.C, m2 = warp_sum(dot) / (float)s.C, rstd = s.rstd[r];
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    if (8 * lane + 256 * k >= s.C) continue;
    float d[8], x[8];
    unpack8(vd[k], d);
    unpack8(vx[k], x);
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = rstd * (d[i] - m1 - x[i] * m2);
    store8(dx + at + 256 * k, d);
  }
}

// Runs `launch`, which uses the constant VEC, for rows of C columns.
#define FOR_VECTORS(C, launch)                                                                                         \
  do {                                                                                                                 \
    int vectors = ceil_div((C), 256);                                                                                  \
    if (vectors <= 2) {                                                                                                \
      constexpr int VEC = 2;                                                                                           \
      launch;                                                                                                          \
    } else if (vectors <= 4) {                                                                                         \
      constexpr int VEC = 4;                                                                                           \
      launch;                                                                                                          \
    } else if (vectors <= 8) {                                                                                         \
      constexpr int VEC = 8;                                                                                           \
      launch;                                                                                                          \
    } else {                                                                                                           \
      constexpr int VEC = 16;                                                                                          \
      launch;                                                                                                          \
    }                                                                                                                  \
  } while (0)

// ---- kernels with sums over segments: a thread owns 8 columns and walks down the rows of its block's run ----

typedef struct Walk {
  const int32_t *seg_start, *seg_len;
  float *pieces; // [runs + SEG][ADALN_SUMS][C]
  int warps;
} Walk;

struct ModulationBackward { // dxhat = dn (1 + scale); sums of dn and dn xhat
  static constexpr int sums = 2, first = 0;
  static __device__ int column(const Site &s) {
    return s.scale;
  }
  static __device__ void apply(const float scale[8], float dn[8], const float xhat[8], float sum[2][8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum[0][i] += dn[i];
      sum[1][i] += dn[i] * xhat[i];
      dn[i] *= 1.0f + scale[i];
    }
  }
};

struct GateBackward { // dbranch = gate dx; sums of dx branch
  static constexpr int sums = 1, first = 2;
  static __device__ int column(const Site &s) {
    return s.gate;
  }
  static __device__ void apply(const float gate[8], float dx[8], const float branch[8], float sum[1][8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum[0][i] += dx[i] * branch[i];
      dx[i] *= gate[i];
    }
  }
};

// out may be a.
template <class Op>
static __global__ void __launch_bounds__(ADALN_RUN_THREADS, 1)
    walk_rows(const Site s, const Walk w, const bf16 *a, const bf16 *b, bf16 *out) {
  await_previous();
  constexpr int unroll = 4;
  __shared__ __align__(16) float shared[Op::sums * ADALN_SHARED_COLUMNS];
  int threads = 32 * w.warps, group = threadIdx.x / threads, groups = blockDim.x / threads;
  int column = 8 * (threadIdx.x % threads);
  bool there = column < s.C;
  int used = s.dims->n_text + s.dims->n_image, run_rows = adaln_run_rows(s.dims, gridDim.x);
  int begin = min(used, (int)blockIdx.x * run_rows), end = min(used, begin + run_rows);
  for (int piece = begin; piece < end;) {
    int g = s.segment[piece], stop = min(end, w.seg_start[g] + w.seg_len[g]);
    float m[8], sums[Op::sums][8] = {};
    load_mod8(s.mod + g * s.M + Op::column(s) + column, there, m);
    for (int first = piece + group; first < stop; first += unroll * groups) {
      uint4 va[unroll], vb[unroll];
#pragma unroll
      for (int u = 0; u < unroll; u++) {
        int64_t at = (int64_t)(first + u * groups) * s.C + column;
        bool live = there && first + u * groups < stop;
        va[u] = load_plain(a + at, live);
        vb[u] = load_once(b + at, live);
      }
#pragma unroll
      for (int u = 0; u < unroll; u++) {
        if (!there || first + u * groups >= stop) continue;
        float x[8], y[8];
        unpack8(va[u], x);
        unpack8(vb[u], y);
        Op::apply(m, x, y, sums);
        store8(out + (int64_t)(first + u * groups) * s.C + column, x);
      }
    }
    adaln_piece_store<Op::sums>(w.pieces + (((int64_t)blockIdx.x + g) * ADALN_SUMS + Op::first) * s.C, sums, s.C, group,
                                groups, column, shared);
    piece = stop;
  }
}

template <class Op>
static void walk(const KernelCall *c, const Site *s, float *pieces, const bf16 *a, const bf16 *b, bf16 *out) {
  AdalnRuns runs = adaln_runs(s->C);
  Walk w = {c->batch->seg_start, c->batch->seg_len, pieces, runs.warps};
  CUDA_LAUNCH(walk_rows<Op>, runs.blocks, 32 * runs.warps * runs.groups, 0, call_stream(c), *s, w, a, b, out);
}

// ---- the ops ----

extern "C" void cuda_ADALN_FWD_unfused(const KernelCall *c) {
  const bf16 *x = (const bf16 *)c->in.ADALN_FWD.x, *branch = (const bf16 *)c->in.ADALN_FWD.branch; // [T, C]
  bf16 *xnew = (bf16 *)c->out.ADALN_FWD.xnew, *h = (bf16 *)c->out.ADALN_FWD.h;                     // [T, C]
  float *mean = (float *)c->out.ADALN_FWD.mean, *rstd = (float *)c->out.ADALN_FWD.rstd;            // [T]
  Site s = site_of(c, c->in.ADALN_FWD.mod);
  if (branch) map<Residual>(c, &s, x, branch, xnew);
  FOR_VECTORS(s.C, CUDA_LAUNCH(norm_forward<VEC>, ceil_div(s.T, ROW_WARPS), ROW_THREADS, 0, call_stream(c), s,
                               branch ? xnew : x, h, mean, rstd));
  map<Modulate>(c, &s, h, NULL, h);
  if (c->args->adaln.silu_image) map<Silu>(c, &s, h, NULL, h);
  mask(c, &s, h, xnew, mean, rstd);
}

// xhat [T, C] and the pieces' sums.
static int64_t xhat_bytes(const Dims *d) {
  return ceil_div64((int64_t)d->T * d->C * (int64_t)sizeof(bf16), 256) * 256;
}

size_t adaln_unfused_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return kind == OP_ADALN_BWD ? (size_t)xhat_bytes(dims) + (size_t)adaln_pieces_size(dims) * sizeof(float) : 0;
}

extern "C" void cuda_ADALN_BWD_unfused(const KernelCall *c) {
  const bf16 *dh = (const bf16 *)c->in.ADALN_BWD.dh, *dxnew = (const bf16 *)c->in.ADALN_BWD.dxnew,
             *x = (const bf16 *)c->in.ADALN_BWD.x;                                     // [T, C]
  const bf16 *branch = (const bf16 *)c->in.ADALN_BWD.branch;                           // [T, C]
  bf16 *dx = (bf16 *)c->out.ADALN_BWD.dx, *dbranch = (bf16 *)c->out.ADALN_BWD.dbranch; // [T, C]
  bf16 *xhat = (bf16 *)c->scratch;                                                     // [T, C]
  float *pieces = (float *)((char *)c->scratch + xhat_bytes(c->dims));
  Site s = site_of(c, c->in.ADALN_BWD.mod);
  s.mean = (const float *)c->in.ADALN_BWD.mean;
  s.rstd = (const float *)c->in.ADALN_BWD.rstd;

  // dx serves as workspace until it is formed: xnew, then dn, then dxhat.
  bool rebuild = branch && !c->args->adaln.x_is_new;
  if (rebuild) map<Residual>(c, &s, x, branch, dx);
  map<Normalise>(c, &s, rebuild ? dx : x, NULL, xhat);
  bool silu = c->args->adaln.silu_image;
  if (silu) map<SiluBackward>(c, &s, dh, xhat, dx);
  walk<ModulationBackward>(c, &s, pieces, silu ? dx : dh, xhat, dx);
  FOR_VECTORS(s.C,
              CUDA_LAUNCH(norm_backward<VEC>, ceil_div(s.T, ROW_WARPS), ROW_THREADS, 0, call_stream(c), s, dx, xhat));
  if (dxnew) map<Add>(c, &s, dx, dxnew, dx);
  if (branch) walk<GateBackward>(c, &s, pieces, dx, branch, dbranch);
  mask(c, &s, dx, dbranch, NULL, NULL);

  AdalnSums sums = {
      pieces, (bf16 *)c->out.ADALN_BWD.dmod, {s.shift, s.scale, s.gate}, branch ? 3 : 2, adaln_runs(s.C).blocks};
  adaln_segment_sums(c, &sums);
}
