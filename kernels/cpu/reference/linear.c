// y = x W^T over the rows of an extent, and its gradients.
#include "kernels/cpu/reference/rows.h"

// The rows of args.linear.extent.
typedef struct Rows {
  int64_t from, to, all; // [from, to) of `all`
  int split;             // image rows have a matrix and widths of their own
} Rows;

static Rows rows_of(const KernelCall *c) {
  const BatchDims *b = c->batch->dims;
  switch (c->args->linear.extent) {
  case EXT_ROWS:
    return (Rows){0, used_rows(c), c->dims->T, 0};
  case EXT_SPLIT:
    return (Rows){0, used_rows(c), c->dims->T, 1};
  case EXT_IMAGE:
    return (Rows){b->n_text, used_rows(c), c->dims->T, 0};
  default: // EXT_SEGMENTS
    return (Rows){1, b->n_segments, c->dims->segments, 0};
  }
}

static int side_of(const KernelCall *c, Rows rows, int64_t r) {
  return rows.split ? row_modality(c, r) : 0;
}

static const int one[MODALITIES] = {1, 1};

// Where row r begins in a tensor of these widths, and how many elements that has.
static int64_t row_at(const KernelCall *c, Rows rows, const int width[MODALITIES], int64_t r) {
  int m = side_of(c, rows, r);
  return (rows.split ? two_sided_base(c->dims->T, one, width, m) : 0) + r * width[m];
}
static int64_t size_of(const KernelCall *c, Rows rows, const int width[MODALITIES]) {
  return rows.split ? two_sided_size(c->dims->T, one, width) : rows.all * width[0];
}

void reference_LINEAR_FWD(const KernelCall *c) {
  const int *in = c->args->linear.in_dim, *out = c->args->linear.out_dim;
  const double *bias = c->in.LINEAR_FWD.bias; // [out]
  const Rows rows = rows_of(c);
  memset(c->out.LINEAR_FWD.y, 0, (size_t)size_of(c, rows, out) * sizeof(double));
  for (int64_t r = rows.from; r < rows.to; r++) {
    int m = side_of(c, rows, r);
    const double *x = (const double *)c->in.LINEAR_FWD.x + row_at(c, rows, in, r),
                 *W = c->in.LINEAR_FWD.w[m]; // [out, in]
    double *y = (double *)c->out.LINEAR_FWD.y + row_at(c, rows, out, r);
    for (int o = 0; o < out[m]; o++) {
      y[o] = bias ? bias[o] : 0;
      for (int i = 0; i < in[m]; i++) y[o] += x[i] * W[o * in[m] + i];
    }
  }
}

void reference_LINEAR_DGRAD(const KernelCall *c) {
  const int *in = c->args->linear.in_dim, *out = c->args->linear.out_dim;
  const double *add = c->in.LINEAR_DGRAD.add;
  double *all = c->out.LINEAR_DGRAD.dx;
  const Rows rows = rows_of(c);
  memset(all, 0, (size_t)size_of(c, rows, in) * sizeof(double));
  for (int64_t i = 0; add && i < rows.from * in[0]; i++) all[i] = add[i];
  for (int64_t r = rows.from; r < rows.to; r++) {
    int m = side_of(c, rows, r);
    int64_t at = row_at(c, rows, in, r);
    const double *dy = (const double *)c->in.LINEAR_DGRAD.dy + row_at(c, rows, out, r);
    const double *W = c->in.LINEAR_DGRAD.w[m]; // [out, in]
    for (int i = 0; i < in[m]; i++) {
      all[at + i] = add ? add[at + i] : 0;
      for (int o = 0; o < out[m]; o++) all[at + i] += dy[o] * W[o * in[m] + i];
    }
  }
}

void reference_LINEAR_WGRAD(const KernelCall *c) {
  const int *in = c->args->linear.in_dim, *out = c->args->linear.out_dim;
  double *const dW[MODALITIES] = {c->out.LINEAR_WGRAD.dw[0], c->out.LINEAR_WGRAD.dw[1]}; // [out, in]
  double *dbias = c->out.LINEAR_WGRAD.dbias;                                             // [out]
  const Rows rows = rows_of(c);
  if (!c->args->accumulate) {
    for (int m = 0; m < MODALITIES; m++)
      if (dW[m]) memset(dW[m], 0, (size_t)(in[m] * out[m]) * sizeof(double));
    if (dbias) memset(dbias, 0, (size_t)out[0] * sizeof(double));
  }
  for (int64_t r = rows.from; r < rows.to; r++) {
    int m = side_of(c, rows, r);
    const double *x = (const double *)c->in.LINEAR_WGRAD.x + row_at(c, rows, in, r);
    const double *dy = (const double *)c->in.LINEAR_WGRAD.dy + row_at(c, rows, out, r);
    for (int o = 0; o < out[m]; o++) {
      for (int i = 0; i < in[m]; i++) dW[m][o * in[m] + i] += dy[o] * x[i];
      if (dbias) dbias[o] += dy[o];
    }
  }
}
