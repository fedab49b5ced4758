// CPU ops: linear layers (see op_reference.h).
#include "tests/ops/op_reference.h"

static const int ONE[MODALITIES] = {1, 1};

// First element of row r of a tensor with these widths.
static int64_t linear_at(const OpCase *c, Extent extent, const int width[MODALITIES], int64_t r) {
  if (extent != EXT_SPLIT) return r * width[0];
  int m = r >= c->batch.dims->n_text;
  return two_sided_base(c->dims.T, ONE, width, m) + r * width[m];
}

static int64_t linear_size(const OpCase *c, Extent extent, const int width[MODALITIES]) {
  if (extent == EXT_SPLIT) return two_sided_size(c->dims.T, ONE, width);
  return (int64_t)(extent == EXT_SEGMENTS ? c->dims.segments : c->dims.T) * width[0];
}

static void linear_extent(const OpCase *c, Extent extent, int64_t *from, int64_t *to) {
  const BatchDims *b = c->batch.dims;
  *from = extent == EXT_IMAGE ? b->n_text : extent == EXT_SEGMENTS;
  *to = extent == EXT_SEGMENTS ? b->n_segments : b->n_text + b->n_image;
}

// Random numbers in the extent's rows, NaN everywhere else.
static real *linear_random(OpCase *c, Extent extent, const int width[MODALITIES]) {
  real *x = case_poison(c, linear_size(c, extent, width));
  int64_t from, to;
  linear_extent(c, extent, &from, &to);
  for (int64_t r = from; r < to; r++) {
    int m = extent == EXT_SPLIT && r >= c->batch.dims->n_text;
    for (int i = 0; i < width[m]; i++) x[linear_at(c, extent, width, r) + i] = (real)case_normal(c);
  }
  return x;
}

// What lies outside the extent's rows is zero.
static void assert_zero_outside(const OpCase *c, Extent extent, const int width[MODALITIES], const real *x) {
  int64_t n = linear_size(c, extent, width), from, to, covered = 0, zeros = 0, zeros_inside = 0;
  linear_extent(c, extent, &from, &to);
  for (int64_t i = 0; i < n; i++) zeros += x[i] == 0;
  for (int64_t r = from; r < to; r++) {
    int m = extent == EXT_SPLIT && r >= c->batch.dims->n_text;
    covered += width[m];
    for (int i = 0; i < width[m]; i++) zeros_inside += x[linear_at(c, extent, width, r) + i] == 0;
  }
  assert_int_equal(zeros - zeros_inside, n - covered);
}

static void linear_case(OpCase *c, Extent extent, int same_width, int with_bias) {
  OpArgs a = {.linear = {.extent = extent}}, add = a;
  int *in = a.linear.in_dim, *out = a.linear.out_dim, large = op_case_is_large(c);
  int least = large ? 65 : 1, most = large ? 100 : 40;
  for (int m = 0; m < (extent == EXT_SPLIT ? 2 : 1); m++) {
    in[m] = m && same_width ? in[0] : case_int(c, least, most);
    out[m] = m && same_width ? out[0] : case_int(c, least, most);
  }
  if (extent == EXT_SPLIT && !same_width) (case_int(c, 0, 1) ? in : out)[case_int(c, 0, 1)] = 0;
  add = a;
  add.accumulate = 1;
  int64_t nx = linear_size(c, extent, in), ny = linear_size(c, extent, out);
  int64_t nw[2] = {(int64_t)in[0] * out[0], (int64_t)in[1] * out[1]};
  real *x = linear_random(c, extent, in), *dy = linear_random(c, extent, out), *more = linear_random(c, extent, in);
  int64_t from, to;
  linear_extent(c, extent, &from, &to);
  for (int64_t i = 0; i < from * in[0]; i++) more[i] = (real)case_normal(c); // rows before the extent take it alone
  // A modality without width has no matrix.
  real *w0 = nw[0] ? case_random(c, nw[0], 1) : NULL, *w1 = nw[1] ? case_random(c, nw[1], 1) : NULL;
  real *bias = with_bias ? case_random(c, out[0], 1) : NULL;
  Ref f = {.c = c, .kind = OP_LINEAR_FWD, .args = a};
  f.in[0] = case_double(c, x, nx);
  if (w0) f.in[1] = case_double(c, w0, nw[0]);
  if (w1) f.in[2] = case_double(c, w1, nw[1]);
  if (bias) f.in[3] = case_double(c, bias, out[0]);
  ref_output(&f, 0, ny, dy);
  ref_run(&f);

  real *y = case_poison(c, ny), *dx = case_poison(c, nx), *dx_more = case_poison(c, nx);
  op_run(c, OP_LINEAR_FWD, a, OP_IN(x, w0, w1, bias), OP_OUT(y));
  assert_close(y, f.out[0], ny);
  assert_zero_outside(c, extent, out, y);

  op_run(c, OP_LINEAR_DGRAD, a, OP_IN(dy, w0, w1, NULL), OP_OUT(dx));
  assert_zero_outside(c, extent, in, dx);
  op_run(c, OP_LINEAR_DGRAD, a, OP_IN(dy, w0, w1, more), OP_OUT(dx_more));
  double *sum = case_double(c, dx, nx);
  for (int64_t i = 0; i < nx; i++) sum[i] += isnan(more[i]) ? 0 : (double)more[i];
  assert_close(dx_more, sum, nx);
  for (int64_t i = 0; i < nx; i++)
    if (isnan(f.in[0][i])) f.in[0][i] = 0;
  assert_gradient(&f, 0, dx, nx);

  void *grads[OP_MAX_OUT] = {w0 ? case_poison(c, nw[0]) : NULL, w1 ? case_poison(c, nw[1]) : NULL,
                             bias ? case_poison(c, out[0]) : NULL};
  int64_t n[OP_MAX_OUT] = {nw[0], nw[1], out[0]};
  op_run(c, OP_LINEAR_WGRAD, a, OP_IN(dy, x), grads);
  if (w0) assert_gradient(&f, 1, grads[0], nw[0]);
  if (w1) assert_gradient(&f, 2, grads[1], nw[1]);
  if (bias) assert_gradient(&f, 3, grads[2], out[0]);
  assert_accumulates(c, OP_LINEAR_WGRAD, add, OP_IN(dy, x), grads, n, 7);
}

static void test_linear(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    case_of_round(&c, round, 2 * CASES);
    int same = case_int(&c, 0, 1);
    linear_case(&c, EXT_ROWS, 1, 0);
    linear_case(&c, EXT_SPLIT, same, same && case_int(&c, 0, 1));
    linear_case(&c, EXT_IMAGE, 1, case_int(&c, 0, 1));
    linear_case(&c, EXT_SEGMENTS, 1, case_int(&c, 0, 1));
    op_case_free(&c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_linear)};
  return cmocka_run_group_tests_name("linear", tests, NULL, NULL);
}
