// Linear layers over an extent of rows: y = x W^T, its input gradient, its weight gradient. As
// plain loops: reference/linear.c.
#include "kernels/cpu/cpu.h"

// Where the rows of an extent lie in a tensor: at most two parts (text and image with weights of their own), each
// `rows` rows of `width` from element `at`. Everything else of the `size` elements is outside the extent.
typedef struct Part {
  int64_t rows, width, at;
} Part;
typedef struct Parts {
  Part part[MODALITIES];
  int n;
  int64_t size;
} Parts;

// The parts of a tensor with these widths by modality ([1] read only with EXT_SPLIT).
static Parts extent_parts(const KernelCall *c, const int width[MODALITIES]) {
  const BatchDims *b = c->batch->dims;
  int64_t T = c->dims->T, W = width[0], text = b->n_text, image = b->n_image;
  switch (c->args->linear.extent) {
  case EXT_ROWS:
    return (Parts){.n = 1, .size = T * W, .part = {{.rows = text + image, .width = W}}};
  case EXT_IMAGE:
    return (Parts){.n = 1, .size = T * W, .part = {{.rows = image, .width = W, .at = text * W}}};
  case EXT_SEGMENTS:
    return (Parts){.n = 1, .size = c->dims->segments * W, .part = {{.rows = b->n_segments - 1, .width = W, .at = W}}};
  case EXT_SPLIT:
    break;
  }
  static const int one[MODALITIES] = {1, 1};
  int64_t base = two_sided_base(c->dims->T, one, width, IMAGE);
  return (Parts){
      .n = 2,
      .size = two_sided_size(c->dims->T, one, width),
      .part = {{.rows = text, .width = W}, {.rows = image, .width = width[1], .at = base + text * width[1]}}};
}

// Writes zeros before, between and after the parts.
static void zero_outside(Parts p, real *y) {
  int64_t at = 0;
  for (int k = 0; k < p.n; k++) {
    memset(y + at, 0, (size_t)(p.part[k].at - at) * sizeof *y);
    at = p.part[k].at + p.part[k].rows * p.part[k].width;
  }
  memset(y + at, 0, (size_t)(p.size - at) * sizeof *y);
}

void cpu_LINEAR_FWD(const KernelCall *c) {
  const real *x = c->in.LINEAR_FWD.x, *bias = c->in.LINEAR_FWD.bias; // [rows, in], [out]
  real *y = c->out.LINEAR_FWD.y;                                     // [rows, out]
  Parts in = extent_parts(c, c->args->linear.in_dim), out = extent_parts(c, c->args->linear.out_dim);
  GemmItem items[MODALITIES];
  zero_outside(out, y);
  for (int k = 0; k < in.n; k++) {
    int64_t rows = out.part[k].rows, width = out.part[k].width;
    real *to = y + out.part[k].at;
    for (int64_t r = 0; bias && r < rows; r++) memcpy(to + r * width, bias, (size_t)width * sizeof *y);
    items[k] = (GemmItem){.M = rows,
                          .N = width,
                          .K = in.part[k].width,
                          .A = x + in.part[k].at,
                          .lda = in.part[k].width,
                          .B = c->in.LINEAR_FWD.w[k], // [out, in]
                          .ldb = in.part[k].width,
                          .C = to,
                          .ldc = width};
  }
  gemm_batch(0, 1, bias ? 1 : 0, items, in.n);
}

void cpu_LINEAR_DGRAD(const KernelCall *c) {
  const real *dy = c->in.LINEAR_DGRAD.dy, *add = c->in.LINEAR_DGRAD.add; // [rows, out], [rows, in]
  real *dx = c->out.LINEAR_DGRAD.dx;                                     // [rows, in]
  Parts in = extent_parts(c, c->args->linear.in_dim), out = extent_parts(c, c->args->linear.out_dim);
  GemmItem items[MODALITIES];
  zero_outside(in, dx);
  // Rows before the extent (text rows of EXT_IMAGE) take `add` alone; those behind it are filler.
  if (add) memcpy(dx, add, (size_t)in.part[0].at * sizeof *dx);
  for (int k = 0; k < in.n; k++) {
    Part p = in.part[k];
    if (add) memcpy(dx + p.at, add + p.at, (size_t)(p.rows * p.width) * sizeof *dx);
    items[k] = (GemmItem){.M = p.rows,
                          .N = p.width,
                          .K = out.part[k].width,
                          .A = dy + out.part[k].at,
                          .lda = out.part[k].width,
                          .B = c->in.LINEAR_DGRAD.w[k], // [out, in]
                          .ldb = p.width,
                          .C = dx + p.at,
                          .ldc = p.width};
  }
  gemm_batch(0, 0, add ? 1 : 0, items, in.n);
}

// dbias [out] (+)= column sums of dy over its parts, which have one width; in fp64, a block of columns at a time.
static void bias_gradient(const real *dy, Parts p, int accumulate, real *dbias) {
  enum { BLOCK = 64 };
  int64_t width = p.part[0].width;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < width; first += BLOCK) {
    int64_t n = width - first < BLOCK ? width - first : BLOCK;
    double sum[BLOCK] = {0};
    for (int k = 0; k < p.n; k++) {
      for (int64_t r = 0; r < p.part[k].rows; r++) {
        const real *row = dy + p.part[k].at + r * width + first;
        for (int64_t j = 0; j < n; j++) sum[j] += (double)row[j];
      }
    }
    for (int64_t j = 0; j < n; j++) dbias[first + j] = (real)sum[j] + (accumulate ? dbias[first + j] : 0);
  }
}

void cpu_LINEAR_WGRAD(const KernelCall *c) {
  const real *dy = c->in.LINEAR_WGRAD.dy, *x = c->in.LINEAR_WGRAD.x; // [rows, out], [rows, in]
  int accumulate = c->args->accumulate;
  Parts in = extent_parts(c, c->args->linear.in_dim), out = extent_parts(c, c->args->linear.out_dim);
  GemmItem items[MODALITIES];
  for (int k = 0; k < in.n; k++)
    items[k] = (GemmItem){.M = out.part[k].width,
                          .N = in.part[k].width,
                          .K = in.part[k].rows,
                          .A = dy + out.part[k].at,
                          .lda = out.part[k].width,
                          .B = x + in.part[k].at,
                          .ldb = in.part[k].width,
                          .C = c->out.LINEAR_WGRAD.dw[k], // [out, in]
                          .ldc = in.part[k].width};
  gemm_batch(1, 0, accumulate ? 1 : 0, items, in.n);
  if (c->out.LINEAR_WGRAD.dbias) bias_gradient(dy, out, accumulate, c->out.LINEAR_WGRAD.dbias);
}
