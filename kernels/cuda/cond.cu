// The condition of an image segment and the modulation table: ops over [SEG, .] tensors, row 0 being text.
#include "kernels/cuda/activation.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/sums.h"

enum { THREADS = 256, FREQUENCIES = TIME_FEATURES / 2 };

// Calls f(segment, column) for eight columns at a time of a [SEG, width] tensor, all threads of the grid taking part.
template <typename F> static __device__ inline void for_eights(int segments, int width, F f) {
  int64_t eights = width / 8, step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < segments * eights; i += step)
    f((int)(i / eights), (int)(i % eights) * 8);
}

static __device__ inline void store_zeros(bf16 *p) {
  *(uint4 *)p = make_uint4(0, 0, 0, 0);
}

// ---- features of the flow time ----

// Thread i of a block: frequency i of segment blockIdx.x. The angle reaches 1000, where fp32 would be off by 3e-5; it
// is formed and brought into [-pi, pi] in fp64, and all after it needs no more than fp32.
static __global__ void __launch_bounds__(FREQUENCIES)
    time_features_kernel(const BatchDims *n, const float *seg_time, bf16 *features) {
  await_previous();
  int g = blockIdx.x, i = threadIdx.x;
  float cosine = 0, sine = 0;
  if (g >= 1 && g < n->n_segments) {
    const double ln_10000 = 9.210340371976184, turn = 6.283185307179586;
    double angle = 1000 * (double)seg_time[g] * exp(-ln_10000 * i / FREQUENCIES);
    double turns = angle / turn;
    sincospif(2 * (float)(turns - rint(turns)), &sine, &cosine);
  }
  features[(int64_t)g * 2 * FREQUENCIES + i] = __float2bfloat16_rn(cosine);
  features[(int64_t)g * 2 * FREQUENCIES + FREQUENCIES + i] = __float2bfloat16_rn(sine);
}

extern "C" void cuda_TIME_FEATURES(const KernelCall *c) {
  CUDA_LAUNCH(time_features_kernel, c->dims->segments, FREQUENCIES, 0, call_stream(c), c->batch->dims,
              c->batch->seg_time, (bf16 *)c->out.TIME_FEATURES.features);
}

// ---- activations and the condition, [SEG, Z] ----

static __global__ void __launch_bounds__(THREADS)
    silu_fwd_kernel(const BatchDims *n, int segments, int Z, const bf16 *x, bf16 *y) {
  await_previous();
  for_eights(segments, Z, [&](int g, int column) {
    int64_t at = (int64_t)g * Z + column;
    if (g < 1 || g >= n->n_segments) return store_zeros(y + at);
    float v[8];
    load8(x + at, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = silu(v[i]);
    store8(y + at, v);
  });
}

extern "C" void cuda_SILU_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(silu_fwd_kernel, grid_striding(ceil_div64((int64_t)d->segments * d->Z / 8, THREADS)), THREADS, 0,
              call_stream(c), c->batch->dims, d->segments, d->Z, (const bf16 *)c->in.SILU_FWD.x,
              (bf16 *)c->out.SILU_FWD.y);
}

static __global__ void __launch_bounds__(THREADS)
    silu_bwd_kernel(const BatchDims *n, int segments, int Z, const bf16 *dy, const bf16 *x, bf16 *dx) {
  await_previous();
  for_eights(segments, Z, [&](int g, int column) {
    int64_t at = (int64_t)g * Z + column;
    if (g < 1 || g >= n->n_segments) return store_zeros(dx + at);
    float d[8], v[8];
    load8(dy + at, d);
    load8(x + at, v);
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] *= silu_slope(v[i]);
    store8(dx + at, d);
  });
}

extern "C" void cuda_SILU_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(silu_bwd_kernel, grid_striding(ceil_div64((int64_t)d->segments * d->Z / 8, THREADS)), THREADS, 0,
              call_stream(c), c->batch->dims, d->segments, d->Z, (const bf16 *)c->in.SILU_BWD.dy,
              (const bf16 *)c->in.SILU_BWD.x, (bf16 *)c->out.SILU_BWD.dx);
}

static __global__ void __launch_bounds__(THREADS)
    cond_fwd_kernel(const BatchDims *n, const int32_t *seg_kind, int segments, int Z, const bf16 *time,
                    const bf16 *pool, const bf16 *e_kind, bf16 *sum, bf16 *a) {
  await_previous();
  for_eights(segments, Z, [&](int g, int column) {
    int64_t at = (int64_t)g * Z + column;
    if (g < 1 || g >= n->n_segments) {
      store_zeros(sum + at);
      store_zeros(a + at);
      return;
    }
    float v[8], p[8], k[8];
    load8(time + at, v);
    load8(pool + at, p);
    load8(e_kind + (int64_t)seg_kind[g] * Z + column, k);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += p[i] + k[i];
    store8(sum + at, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = silu(v[i]);
    store8(a + at, v);
  });
}

extern "C" void cuda_COND_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(cond_fwd_kernel, grid_striding(ceil_div64((int64_t)d->segments * d->Z / 8, THREADS)), THREADS, 0,
              call_stream(c), c->batch->dims, c->batch->seg_kind, d->segments, d->Z, (const bf16 *)c->in.COND_FWD.time,
              (const bf16 *)c->in.COND_FWD.pool, (const bf16 *)c->in.COND_FWD.e_kind, (bf16 *)c->out.COND_FWD.c,
              (bf16 *)c->out.COND_FWD.a);
}

// ---- sums over segments ----

enum { COND_EIGHTS = 2, MOD_EIGHTS = 32 }; // eights of columns in a block; its threads share the rows of each eight

static __global__ void __launch_bounds__(THREADS)
    cond_bwd_kernel(const BatchDims *n, const int32_t *seg_kind, int segments, int Z, int accumulate, const bf16 *da,
                    const bf16 *sum, bf16 *dc, float *de_kind) {
  await_previous();
  __shared__ __align__(16) float shared[shares_floats(THREADS, COND_EIGHTS)];
  int column0 = blockIdx.x * COND_EIGHTS * 8, column = column0 + threadIdx.x % COND_EIGHTS * 8;
  float kinds[2][8] = {}; // sums of dc by seg_kind
  for (int g = threadIdx.x / COND_EIGHTS; g < segments && column < Z; g += THREADS / COND_EIGHTS) {
    int64_t at = (int64_t)g * Z + column;
    if (g < 1 || g >= n->n_segments) {
      store_zeros(dc + at);
      continue;
    }
    float d[8], v[8];
    load8(da + at, d);
    load8(sum + at, v);
    int clean = seg_kind[g] == SEGMENT_CLEAN;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      d[i] *= silu_slope(v[i]);
      kinds[SEGMENT_NOISED][i] += clean ? 0 : d[i];
      kinds[SEGMENT_CLEAN][i] += clean ? d[i] : 0;
    }
    store8(dc + at, d);
  }
#pragma unroll
  for (int k = 0; k < 2; k++)
    add_shares<THREADS, COND_EIGHTS>(kinds[k], shared, Z - column0, accumulate, de_kind + k * Z + column0);
}

extern "C" void cuda_COND_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(cond_bwd_kernel, ceil_div(d->Z, COND_EIGHTS * 8), THREADS, 0, call_stream(c), c->batch->dims,
              c->batch->seg_kind, d->segments, d->Z, c->args->accumulate, (const bf16 *)c->in.COND_BWD.da,
              (const bf16 *)c->in.COND_BWD.c, (bf16 *)c->out.COND_BWD.dc, (float *)c->out.COND_BWD.de_kind);
}

// ---- the modulation table, [SEG, M] ----

extern "C" void cuda_MOD_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const bf16 *S = (const bf16 *)c->in.MOD_FWD.S; // [2, M]
  Gemm product = {};                             // rows [1, n_segments): a U^T + S[IMAGE]; row 0: S[TEXT]
  GemmSide *side = &product.side[0];
  side->groups = 1;
  side->extent.count = &c->batch->dims->n_segments;
  side->extent.begin_fixed = 1;
  side->extent.count_fixed = -1;
  side->rows = d->segments;
  side->a = (const bf16 *)c->in.MOD_FWD.a; // [SEG, Z]
  side->b = (const bf16 *)c->in.MOD_FWD.U; // U [M, Z]
  side->N = d->M;
  side->K = d->Z;
  GemmStore end[MODALITIES] = {};
  end[0].c = (bf16 *)c->out.MOD_FWD.mod; // [SEG, M]
  end[0].bias = S + (int64_t)IMAGE * d->M;
  product.settled = 1;
  product.dims = c->batch->dims;
  product.fill_rows = d->segments;
  product.fill[0] = {GEMM_TEXT_SEGMENT, d->M, end[0].c, S + (int64_t)TEXT * d->M};
  product.fill[1] = {GEMM_UNUSED_SEGMENTS, d->M, end[0].c, NULL};
  gemm_rows(&product, end, call_stream(c));
}

static __global__ void __launch_bounds__(THREADS)
    mod_bwd_kernel(const BatchDims *n, int M, int accumulate, const bf16 *dmod, float *dS) {
  await_previous();
  __shared__ __align__(16) float shared[shares_floats(THREADS, MOD_EIGHTS)];
  int column0 = blockIdx.x * MOD_EIGHTS * 8, column = column0 + threadIdx.x % MOD_EIGHTS * 8;
  int share = threadIdx.x / MOD_EIGHTS, used = n->n_segments;
  float text[8] = {}, image[8] = {}, x[8];
  if (share == 0 && column < M) load8(dmod + column, text);
  if (column < M) {
#pragma unroll 4
    for (int g = 1 + share; g < used; g += THREADS / MOD_EIGHTS) {
      load8(dmod + (int64_t)g * M + column, x);
#pragma unroll
      for (int i = 0; i < 8; i++) image[i] += x[i];
    }
  }
  add_shares<THREADS, MOD_EIGHTS>(text, shared, M - column0, accumulate, dS + TEXT * (int64_t)M + column0);
  add_shares<THREADS, MOD_EIGHTS>(image, shared, M - column0, accumulate, dS + IMAGE * (int64_t)M + column0);
}

extern "C" void cuda_MOD_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(mod_bwd_kernel, ceil_div(d->M, MOD_EIGHTS * 8), THREADS, 0, call_stream(c), c->batch->dims, d->M,
              c->args->accumulate, (const bf16 *)c->in.MOD_BWD.dmod, (float *)c->out.MOD_BWD.dS);
}
