// Linear layers over an extent of rows: the products through gemm.h, which fill the rows that no product has, bias
// gradients by column sums in two passes of fixed order.
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/sums.h"

typedef decltype(((OpArgs *)0)->linear) LinearArgs;

enum {
  THREADS = 256,
  BIAS_PARTS = 128,                // pieces that the rows of a bias gradient are cut into
  BIAS_LANES = 16,                 // rows that a block reads at once,
  BIAS_WIDE = THREADS / BIAS_LANES // 16 bytes of 16 neighbouring places each: 128 columns
};

static_assert(BIAS_WIDE * 8 <= THREADS, "a block's columns have a thread each when lanes are added");
static_assert(BIAS_LANES * (BIAS_WIDE * 8 + 1) * sizeof(float) <= CUDA_STATIC_SHARED,
              "a block's lanes lie in shared memory");

// ---- shapes ----

static int capacity_of(const Dims *d, const LinearArgs *a) {
  return a->extent == EXT_SEGMENTS ? d->segments : d->T;
}

// The op's product without its operands.
static Gemm linear_gemm(OpKind kind, const Dims *d, const OpArgs *args) {
  const LinearArgs *a = &args->linear;
  Gemm g = {};
  g.b_transposed = kind == OP_LINEAR_DGRAD;
  g.settled = 1;
  const int sides = a->extent == EXT_SPLIT ? 2 : 1;
  for (int m = 0; m < sides; m++) {
    GemmSide *s = &g.side[m];
    s->groups = 1;
    s->rows = capacity_of(d, a);
    s->M = a->out_dim[m]; // of a weight gradient
    s->N = kind == OP_LINEAR_FWD ? a->out_dim[m] : a->in_dim[m];
    s->K = kind == OP_LINEAR_FWD ? a->in_dim[m] : a->out_dim[m]; // of the others
  }
  return g;
}

// An op's scratch.
typedef struct LinearScratch {
  float *partial; // [BIAS_PARTS, out] sums over parts of the rows
  void *gemm;
} LinearScratch;

enum { SCRATCH_ALIGN = 256 };

// Lays it out from `base` (NULL to measure); returns its bytes.
static size_t linear_bind(LinearScratch *s, OpKind kind, const Dims *d, const OpArgs *args, void *base) {
  const Gemm g = linear_gemm(kind, d, args);
  const int weights = kind == OP_LINEAR_WGRAD;
  const size_t bytes = weights ? (size_t)BIAS_PARTS * args->linear.out_dim[0] * sizeof(float) : 0;
  const size_t gemm_at = (bytes + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
  s->partial = (float *)base;
  s->gemm = base ? (char *)base + gemm_at : NULL;
  return gemm_at + (weights ? gemm_weights_scratch(&g) : gemm_rows_scratch(&g));
}

size_t linear_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  LinearScratch s;
  return linear_bind(&s, kind, dims, args, NULL);
}

// ---- where an extent lies ----

// First element of side m of a tensor with these widths.
static int64_t side_at(const KernelCall *c, const int width[MODALITIES], int m) {
  const int one[MODALITIES] = {1, 1};
  return c->args->linear.extent == EXT_SPLIT ? two_sided_base(c->dims->T, one, width, m) : 0;
}

// Rows [first, end) that an extent covers, both sides together.
typedef struct RowSpan {
  int64_t first, end;
} RowSpan;
static __device__ RowSpan extent_span(Extent extent, const BatchDims *dims) {
  RowSpan s = {0, dims->n_text + dims->n_image};
  if (extent == EXT_IMAGE) s.first = dims->n_text;
  if (extent == EXT_SEGMENTS) s = {1, dims->n_segments};
  return s;
}

// The same for gemm.h.
static GemmExtent side_extent(const KernelCall *c, int m) {
  const BatchDims *dims = c->batch->dims; // on the device: only addresses are taken
  switch (c->args->linear.extent) {
  case EXT_ROWS:
    return {NULL, &dims->n_text, 0, 0, &dims->n_image};
  case EXT_IMAGE:
    return {&dims->n_text, &dims->n_image, 0, 0, NULL};
  case EXT_SEGMENTS:
    return {NULL, &dims->n_segments, 1, -1, NULL};
  case EXT_SPLIT:
    break;
  }
  if (m == TEXT) return {NULL, &dims->n_text, 0, 0, NULL};
  return {&dims->n_text, &dims->n_image, 0, 0, NULL};
}

// ---- rows without a product ----

// Adds to g's fills those of an op: rows before the extent, rows of a side without terms, and filler, which alone never
// takes `add`. y, add: [rows, width] views of the sides; where there is one side both are the same.
static void rows_fill(Gemm *g, const KernelCall *c, const int from[MODALITIES], const int to[MODALITIES],
                      bf16 *const y[MODALITIES], const bf16 *const add[MODALITIES]) {
  const LinearArgs *a = &c->args->linear;
  GemmFill *f = g->fill;
  g->dims = c->batch->dims;
  g->fill_rows = capacity_of(c->dims, a);
  if (a->extent == EXT_SEGMENTS) *f++ = {GEMM_TEXT_SEGMENT, to[0], y[0], add[0]};
  if (a->extent == EXT_IMAGE || (a->extent == EXT_SPLIT && !from[TEXT]))
    *f++ = {GEMM_TEXT_ROWS, to[TEXT], y[TEXT], add[TEXT]};
  if (a->extent == EXT_SPLIT && !from[IMAGE]) *f++ = {GEMM_IMAGE_ROWS, to[IMAGE], y[IMAGE], add[IMAGE]};
  const int last = a->extent == EXT_SPLIT ? IMAGE : 0;
  *f = {a->extent == EXT_SEGMENTS ? GEMM_UNUSED_SEGMENTS : GEMM_FILLER_ROWS, to[last], y[last], NULL};
}

// ---- forward and input gradient ----

// y = x B (+ bias) (+ add), from rows of width `from` to rows of width `to`; B of side m is made of w[m].
static void rows_product(const KernelCall *c, OpKind kind, const int from[MODALITIES], const int to[MODALITIES],
                         const void *rows, const void *const w[MODALITIES], const void *bias, const bf16 *add,
                         void *out) {
  const bf16 *x = (const bf16 *)rows; // [rows, from]
  bf16 *y = (bf16 *)out;              // [rows, to]
  LinearScratch scratch;
  linear_bind(&scratch, kind, c->dims, c->args, c->scratch);
  Gemm g = linear_gemm(kind, c->dims, c->args);
  g.scratch = scratch.gemm;
  g.leaves = c->leaves;
  GemmStore end[MODALITIES] = {};
  bf16 *views[MODALITIES];
  const bf16 *adds[MODALITIES];
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    const int64_t at = side_at(c, to, s->groups ? m : 0);
    views[m] = y + at;
    adds[m] = add ? add + at : NULL;
    if (!s->groups) continue;
    s->extent = side_extent(c, m);
    s->a = x + side_at(c, from, m);
    s->b = (const bf16 *)w[m]; // [out, in]
    end[m].c = views[m];
    end[m].bias = (const bf16 *)bias;
    end[m].add = adds[m];
  }
  rows_fill(&g, c, from, to, views, adds);
  gemm_rows(&g, end, call_stream(c));
}

extern "C" void cuda_LINEAR_FWD(const KernelCall *c) {
  const LinearArgs *a = &c->args->linear;
  rows_product(c, OP_LINEAR_FWD, a->in_dim, a->out_dim, c->in.LINEAR_FWD.x, c->in.LINEAR_FWD.w, c->in.LINEAR_FWD.bias,
               NULL, c->out.LINEAR_FWD.y);
}

extern "C" void cuda_LINEAR_DGRAD(const KernelCall *c) {
  const LinearArgs *a = &c->args->linear;
  rows_product(c, OP_LINEAR_DGRAD, a->out_dim, a->in_dim, c->in.LINEAR_DGRAD.dy, c->in.LINEAR_DGRAD.w, NULL,
               (const bf16 *)c->in.LINEAR_DGRAD.add, c->out.LINEAR_DGRAD.dx);
}

// ---- weight and bias gradient ----

// partial [BIAS_PARTS, width]: sums over one part of the rows each. Block (x, y): columns 128 x .. of part y.
static __global__ void __launch_bounds__(THREADS)
    bias_partial(Extent extent, const BatchDims *dims, const bf16 *__restrict__ dy, int width, float *partial) {
  await_previous();
  __shared__ float sum[BIAS_LANES][BIAS_WIDE * 8 + 1];
  const RowSpan span = extent_span(extent, dims);
  const int64_t rows = span.end > span.first ? span.end - span.first : 0;
  const int64_t first = span.first + rows * blockIdx.y / BIAS_PARTS;
  const int64_t end = span.first + rows * (blockIdx.y + 1) / BIAS_PARTS;
  const int piece = threadIdx.x % BIAS_WIDE, lane = threadIdx.x / BIAS_WIDE;
  const int column = (blockIdx.x * BIAS_WIDE + piece) * 8;
  float own[8] = {0}, x[8];
  if (column < width) {
    for (int64_t r = first + lane; r < end; r += BIAS_LANES) {
      load8(dy + r * width + column, x);
#pragma unroll
      for (int j = 0; j < 8; j++) own[j] += x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) sum[lane][piece * 8 + j] = own[j];
  __syncthreads();
  const int mine = blockIdx.x * BIAS_WIDE * 8 + threadIdx.x;
  if (threadIdx.x >= BIAS_WIDE * 8 || mine >= width) return;
  float total = 0;
  for (int l = 0; l < BIAS_LANES; l++) total += sum[l][threadIdx.x];
  partial[(int64_t)blockIdx.y * width + mine] = total;
}

static __global__ void __launch_bounds__(THREADS)
    bias_total(const float *__restrict__ partial, int width, int accumulate, float *dbias) {
  await_previous();
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= width) return;
  dbias[column] = slots_sum<BIAS_PARTS>(partial + column, width) + (accumulate ? dbias[column] : 0);
}

extern "C" void cuda_LINEAR_WGRAD(const KernelCall *c) {
  const LinearArgs *a = &c->args->linear;
  const bf16 *dy = (const bf16 *)c->in.LINEAR_WGRAD.dy,
             *x = (const bf16 *)c->in.LINEAR_WGRAD.x; // [rows, out], [rows, in]
  float *dbias = (float *)c->out.LINEAR_WGRAD.dbias;  // [out] or NULL
  LinearScratch scratch;
  linear_bind(&scratch, OP_LINEAR_WGRAD, c->dims, c->args, c->scratch);
  Gemm g = linear_gemm(OP_LINEAR_WGRAD, c->dims, c->args);
  g.scratch = scratch.gemm;
  GemmStoreWeights end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    if (!s->groups) continue;
    s->extent = side_extent(c, m);
    s->a = dy + side_at(c, a->out_dim, m);
    s->b = x + side_at(c, a->in_dim, m);
    end[m].accumulate = c->args->accumulate;
    end[m].dw = (float *)c->out.LINEAR_WGRAD.dw[m]; // dW [out, in]
  }
  gemm_weights(&g, end, call_stream(c));
  if (!dbias) return;
  // With a bias both sides have one width, so that their views are one tensor.
  const int width = a->out_dim[0];
  const dim3 grid(ceil_div(width, BIAS_WIDE * 8), BIAS_PARTS);
  CUDA_LAUNCH(bias_partial, grid, THREADS, 0, call_stream(c), a->extent, c->batch->dims, dy, width, scratch.partial);
  CUDA_LAUNCH(bias_total, ceil_div(width, THREADS), THREADS, 0, call_stream(c), scratch.partial, width,
              c->args->accumulate, dbias);
}
