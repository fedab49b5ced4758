// CPU ops, first half: linear layers, embeddings, conditioning, AdaLN, losses.
//
// Each op runs on random packs with poisoned outputs, and with NaN in every input row it must not read, and is compared
// with a plain reference in double; each backward op with central differences of that reference. The same source is
// built for float and for double.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "tests/ops/op_case.h"

enum { CASES = 20, CHECKED = 60 };
static const int ONE[MODALITIES] = {1, 1};

// Case number `round` of a test, with its pack: `small` of small sizes, then the large ones.
static void make_case(OpCase *c, int round, int small) {
  static const PackKind large[LARGE_CASES] = {PACK_MIXED, PACK_TEXT, PACK_FULL};
  if (round < small)
    op_case_init(c, (uint64_t)round);
  else
    op_case_init_large(c, round - small);
  op_case_pack(c, round < small ? (PackKind)(round % PACK_KINDS) : large[round - small]);
}

// Elements of a gradient that are compared one by one; every one counts along random directions.
static int checked(const OpCase *c) {
  return op_case_is_large(c) ? 6 : CHECKED;
}

#define assert_close(got, want, n) assert_true(relative_error(got, want, n) < CASE_TOL)

// A reference: fn computes out[] from in[], both in double; loss = sum of <seed, out>.
typedef struct Ref {
  OpCase *c;
  OpArgs args;
  void (*fn)(struct Ref *);
  double *in[OP_MAX_IN], *out[OP_MAX_OUT];
  int64_t n_out[OP_MAX_OUT];
  const real *seed[OP_MAX_OUT];
} Ref;

static void ref_run(Ref *f) {
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (f->out[k]) memset(f->out[k], 0, (size_t)f->n_out[k] * sizeof(double));
  f->fn(f);
}

static double ref_loss(void *context) {
  Ref *f = context;
  ref_run(f);
  double sum = 0;
  for (int k = 0; k < OP_MAX_OUT; k++)
    for (int64_t i = 0; f->seed[k] && i < f->n_out[k]; i++)
      if (f->out[k][i] != 0) sum += (double)f->seed[k][i] * f->out[k][i];
  return sum;
}

static void ref_output(Ref *f, int k, int64_t n, const real *seed) {
  f->out[k] = case_zeros(f->c, n);
  f->n_out[k] = n;
  f->seed[k] = seed;
}

static void assert_gradient(Ref *f, int k, const real *grad, int64_t n) {
  assert_true(gradient_error(f->c, ref_loss, f, f->in[k], grad, n, checked(f->c)) < CASE_GRAD_TOL);
}

// NaN in rows [from, to) of a [., width] tensor.
static void poison_rows(real *x, int64_t from, int64_t to, int64_t width) {
  for (int64_t i = from * width; i < to * width; i++) x[i] = (real)NAN;
}

// A random [T, width] tensor with NaN in the rows outside [from, to).
static real *rows_random(OpCase *c, int64_t from, int64_t to, int64_t width) {
  real *x = case_random(c, c->dims.T * width, 1);
  poison_rows(x, 0, from, width);
  poison_rows(x, to, c->dims.T, width);
  return x;
}

// A random [SEG, width] tensor with NaN outside the rows [from, n_segments).
static real *segments_random(OpCase *c, int from, int64_t width) {
  real *x = case_random(c, c->dims.segments * width, 1);
  poison_rows(x, 0, from, width);
  poison_rows(x, c->batch.dims->n_segments, c->dims.segments, width);
  return x;
}

static OpArgs span_args(int64_t count, int accumulate) {
  return (OpArgs){.span = {.count = count, .accumulate = accumulate}};
}

// Runs an op with `add`, onto random numbers in its outputs: the accumulating ones must then be those plus `first`,
// what the op without accumulation gave.
static void assert_accumulates(OpCase *c, OpKind kind, OpArgs add, const void *const *in, void *const *first,
                               const int64_t n[OP_MAX_OUT], unsigned acc_mask) {
  void *out[OP_MAX_OUT] = {0};
  double *want[OP_MAX_OUT] = {0};
  for (int k = 0; k < OP_MAX_OUT; k++) {
    if (!first[k]) continue;
    real *base = out[k] = case_random(c, n[k], 1);
    want[k] = case_double(c, first[k], n[k]);
    for (int64_t i = 0; acc_mask >> k & 1 && i < n[k]; i++) want[k][i] += (double)base[i];
  }
  op_run(c, kind, add, in, out);
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (first[k]) assert_close(out[k], want[k], n[k]);
}

// ---- linear ----

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

static void ref_linear(Ref *f) {
  const OpCase *c = f->c;
  Extent extent = f->args.linear.extent;
  const int *in = f->args.linear.in_dim, *out = f->args.linear.out_dim;
  int64_t from, to;
  linear_extent(c, extent, &from, &to);
  for (int64_t r = from; r < to; r++) {
    int m = extent == EXT_SPLIT && r >= c->batch.dims->n_text;
    const double *x = f->in[0] + linear_at(c, extent, in, r), *w = f->in[1 + m];
    double *y = f->out[0] + linear_at(c, extent, out, r);
    for (int o = 0; o < out[m]; o++) {
      y[o] = f->in[3] ? f->in[3][o] : 0;
      for (int i = 0; i < in[m]; i++) y[o] += w[o * in[m] + i] * x[i];
    }
  }
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
  add.linear.accumulate = 1;
  int64_t nx = linear_size(c, extent, in), ny = linear_size(c, extent, out);
  int64_t nw[2] = {(int64_t)in[0] * out[0], (int64_t)in[1] * out[1]};
  real *x = linear_random(c, extent, in), *dy = linear_random(c, extent, out), *more = linear_random(c, extent, in);
  int64_t from, to;
  linear_extent(c, extent, &from, &to);
  for (int64_t i = 0; i < from * in[0]; i++) more[i] = (real)case_normal(c); // rows before the extent take it alone
  // A modality without width has no matrix.
  real *w0 = nw[0] ? case_random(c, nw[0], 1) : NULL, *w1 = nw[1] ? case_random(c, nw[1], 1) : NULL;
  real *bias = with_bias ? case_random(c, out[0], 1) : NULL;
  Ref f = {.c = c, .args = a, .fn = ref_linear};
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
    make_case(&c, round, 2 * CASES);
    int same = case_int(&c, 0, 1);
    linear_case(&c, EXT_ROWS, 1, 0);
    linear_case(&c, EXT_SPLIT, same, same && case_int(&c, 0, 1));
    linear_case(&c, EXT_IMAGE, 1, case_int(&c, 0, 1));
    linear_case(&c, EXT_SEGMENTS, 1, case_int(&c, 0, 1));
    op_case_free(&c);
  }
}

// ---- embeddings ----

static void ref_embed(Ref *f) { // E, image rows -> x, pooled
  const Batch *b = &f->c->batch;
  int64_t C = f->c->dims.C;
  const double *E = f->in[0];
  for (int r = 0; r < b->dims->n_text + b->dims->n_image; r++)
    for (int64_t i = 0; i < C; i++)
      f->out[0][r * C + i] = r < b->dims->n_text ? E[b->token[r] * C + i] : f->in[1][r * C + i];
  for (int g = 1; g < b->dims->n_segments; g++) {
    double *u = f->out[1] + g * C, squares = 0;
    for (int r = b->cap_start[g]; r < b->cap_end[g]; r++)
      for (int64_t i = 0; i < C; i++) u[i] += E[b->token[r] * C + i] / (b->cap_end[g] - b->cap_start[g]);
    for (int64_t i = 0; i < C; i++) squares += u[i] * u[i] / (double)C;
    for (int64_t i = 0; i < C; i++) u[i] /= sqrt(squares + 1e-6);
  }
}

static void test_embed(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, 2 * CASES);
    const BatchDims *b = c.batch.dims;
    int64_t C = c.dims.C, n = c.dims.T * C, nE = c.dims.V * C, ns = c.dims.segments * C;
    int64_t used = b->n_text + b->n_image;
    real *E = case_random(&c, nE, 0.1), *images = rows_random(&c, b->n_text, used, C);
    real *dx = rows_random(&c, 0, b->n_text, C), *dpooled = segments_random(&c, 1, C);
    Ref f = {.c = &c, .fn = ref_embed};
    f.in[0] = case_double(&c, E, nE);
    f.in[1] = case_double(&c, images, n);
    // The gradient of the text rows alone: image rows do not depend on E.
    real *dtext = case_copy(&c, dx, n);
    for (int64_t i = b->n_text * C; i < n; i++) dtext[i] = 0;
    ref_output(&f, 0, n, dtext);
    ref_output(&f, 1, ns, dpooled);
    ref_run(&f);

    real *x = case_poison(&c, n), *pooled = case_poison(&c, ns), *dmean = case_poison(&c, ns);
    op_run(&c, OP_EMBED_FWD, (OpArgs){0}, OP_IN(E, images), OP_OUT(x));
    op_run(&c, OP_POOL_FWD, (OpArgs){0}, OP_IN(E), OP_OUT(pooled));
    assert_close(x, f.out[0], n);
    assert_true(all_zero(x + used * C, n - used * C));
    assert_close(pooled, f.out[1], ns);
    assert_true(all_zero(pooled, C) && all_zero(pooled + b->n_segments * C, ns - b->n_segments * C));

    op_run(&c, OP_POOL_BWD, (OpArgs){0}, OP_IN(dpooled, E), OP_OUT(dmean));
    for (int g = 0; g < c.dims.segments; g++)
      if (c.batch.cap_start[g] == c.batch.cap_end[g]) assert_true(all_zero(dmean + g * C, C));
    void *dE[OP_MAX_OUT] = {case_poison(&c, nE)};
    op_run(&c, OP_EMBED_BWD, span_args(0, 0), OP_IN(dx, dmean), dE);
    assert_gradient(&f, 0, dE[0], nE);
    if (b->n_text) assert_true(norm_of(dE[0], nE) > 0);
    assert_accumulates(&c, OP_EMBED_BWD, span_args(0, 1), OP_IN(dx, dmean), dE, (int64_t[OP_MAX_OUT]){nE}, 1);
    op_case_free(&c);
  }
}

static void test_noise(void **state) {
  (void)state;
  for (int round = 0; round < CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, CASES);
    const Batch *b = &c.batch;
    int64_t P = c.dims.P, n = c.dims.T * P, image = b->dims->n_text, end = image + b->dims->n_image;
    double *want = case_zeros(&c, n);
    for (int64_t r = image; r < end; r++) {
      int g = b->segment[r];
      double t = (double)b->seg_time[g];
      for (int64_t e = 0; e < P; e++) {
        float eps[4];
        int64_t k = (r - b->seg_start[g]) * P + e;
        uint64_t seed = (uint64_t)b->dims->seed_hi << 32 | b->dims->seed_lo;
        philox_normal4(seed, b->seg_doc[g], STREAM_EVAL | (uint32_t)b->seg_ordinal[g] << 8, (uint32_t)(k / 4), eps);
        double x = b->patch[(r - image) * P + e] / 127.5 - 1;
        want[r * P + e] = b->seg_kind[g] == SEGMENT_CLEAN ? x : t * x + (1 - t) * (double)eps[k % 4];
      }
    }
    real *z = case_poison(&c, n);
    op_run(&c, OP_NOISE, (OpArgs){.noise = {.stream = STREAM_EVAL}}, OP_IN(NULL), OP_OUT(z));
    assert_close(z, want, n);
    assert_true(all_zero(z, image * P) && all_zero(z + end * P, n - end * P));
    op_case_free(&c);
  }
}

// ---- conditioning ----

static double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

static void ref_silu(Ref *f) {
  int64_t Z = f->c->dims.Z;
  for (int64_t i = Z; i < f->c->batch.dims->n_segments * Z; i++) f->out[0][i] = f->in[0][i] * sigmoid(f->in[0][i]);
}

static void ref_cond(Ref *f) { // time, pool, e_kind -> c, a
  int64_t Z = f->c->dims.Z;
  for (int64_t i = Z; i < f->c->batch.dims->n_segments * Z; i++) {
    double v = f->in[0][i] + f->in[1][i] + f->in[2][f->c->batch.seg_kind[i / Z] * Z + i % Z];
    f->out[0][i] = v;
    f->out[1][i] = v * sigmoid(v);
  }
}

static void ref_mod(Ref *f) { // a, U, S -> mod
  int64_t Z = f->c->dims.Z, M = f->c->dims.M;
  for (int64_t g = 0; g < f->c->batch.dims->n_segments; g++) {
    for (int64_t j = 0; j < M; j++) {
      double *to = &f->out[0][g * M + j];
      *to = f->in[2][(g > 0) * M + j];
      for (int64_t k = 0; g && k < Z; k++) *to += f->in[1][j * Z + k] * f->in[0][g * Z + k];
    }
  }
}

static void silu_case(OpCase *c) {
  int64_t n = c->dims.segments * c->dims.Z;
  real *x = segments_random(c, 1, c->dims.Z), *dy = segments_random(c, 1, c->dims.Z);
  real *y = case_poison(c, n), *dx = case_poison(c, n);
  Ref f = {.c = c, .fn = ref_silu};
  f.in[0] = case_double(c, x, n);
  ref_output(&f, 0, n, dy);
  ref_run(&f);
  op_run(c, OP_SILU_FWD, (OpArgs){0}, OP_IN(x), OP_OUT(y));
  assert_close(y, f.out[0], n);
  op_run(c, OP_SILU_BWD, (OpArgs){0}, OP_IN(dy, x), OP_OUT(dx));
  memset(f.in[0], 0, (size_t)c->dims.Z * sizeof(double)); // differences need numbers where the op must see none
  for (int64_t i = c->batch.dims->n_segments * c->dims.Z; i < n; i++) f.in[0][i] = 0;
  assert_gradient(&f, 0, dx, n);
}

static void cond_case(OpCase *c) {
  int64_t Z = c->dims.Z, n = c->dims.segments * Z, used = c->batch.dims->n_segments * Z;
  real *time = segments_random(c, 1, Z), *pool = segments_random(c, 1, Z), *kind = case_random(c, 2 * Z, 1);
  real *da = segments_random(c, 1, Z), *sum = case_poison(c, n), *a = case_poison(c, n), *dc = case_poison(c, n);
  Ref f = {.c = c, .fn = ref_cond};
  f.in[0] = case_double(c, time, n);
  f.in[1] = case_double(c, pool, n);
  f.in[2] = case_double(c, kind, 2 * Z);
  ref_output(&f, 0, n, NULL);
  ref_output(&f, 1, n, da);
  ref_run(&f);
  op_run(c, OP_COND_FWD, (OpArgs){0}, OP_IN(time, pool, kind), OP_OUT(sum, a));
  assert_close(sum, f.out[0], n);
  assert_close(a, f.out[1], n);
  void *grads[OP_MAX_OUT] = {dc, case_poison(c, 2 * Z)};
  op_run(c, OP_COND_BWD, span_args(0, 0), OP_IN(da, sum), grads);
  assert_true(all_zero(dc, Z) && all_zero(dc + used, n - used));
  if (used > Z) assert_true(gradient_error(c, ref_loss, &f, f.in[0] + Z, dc + Z, used - Z, checked(c)) < CASE_GRAD_TOL);
  assert_gradient(&f, 2, grads[1], 2 * Z);
  assert_accumulates(c, OP_COND_BWD, span_args(0, 1), OP_IN(da, sum), grads, (int64_t[OP_MAX_OUT]){n, 2 * Z}, 2);
}

static void mod_case(OpCase *c) {
  int64_t Z = c->dims.Z, M = c->dims.M, n = c->dims.segments * M;
  real *a = segments_random(c, 1, Z), *U = case_random(c, M * Z, 1), *S = case_random(c, 2 * M, 1);
  real *dmod = segments_random(c, 0, M), *mod = case_poison(c, n);
  Ref f = {.c = c, .fn = ref_mod};
  f.in[0] = case_double(c, a, c->dims.segments * Z);
  f.in[1] = case_double(c, U, M * Z);
  f.in[2] = case_double(c, S, 2 * M);
  ref_output(&f, 0, n, dmod);
  ref_run(&f);
  op_run(c, OP_MOD_FWD, (OpArgs){0}, OP_IN(a, U, S), OP_OUT(mod));
  assert_close(mod, f.out[0], n);
  int64_t used = c->batch.dims->n_segments * M;
  assert_true(all_zero(mod + used, n - used));
  void *dS[OP_MAX_OUT] = {case_poison(c, 2 * M)};
  op_run(c, OP_MOD_BWD, span_args(0, 0), OP_IN(dmod), dS);
  assert_gradient(&f, 2, dS[0], 2 * M);
  assert_accumulates(c, OP_MOD_BWD, span_args(0, 1), OP_IN(dmod), dS, (int64_t[OP_MAX_OUT]){2 * M}, 1);
}

static void time_case(OpCase *c) {
  int64_t n = c->dims.segments * 256;
  double *want = case_zeros(c, n);
  for (int g = 1; g < c->batch.dims->n_segments; g++) {
    for (int i = 0; i < 128; i++) {
      double angle = 1000 * (double)c->batch.seg_time[g] * exp(-log(10000) * i / 128);
      want[g * 256 + i] = cos(angle);
      want[g * 256 + 128 + i] = sin(angle);
    }
  }
  real *features = case_poison(c, n);
  op_run(c, OP_TIME_FEATURES, (OpArgs){0}, OP_IN(NULL), OP_OUT(features));
  assert_close(features, want, n);
}

static void test_condition(void **state) {
  (void)state;
  for (int round = 0; round < CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, CASES);
    silu_case(&c);
    cond_case(&c);
    mod_case(&c);
    time_case(&c);
    op_case_free(&c);
  }
}

// ---- AdaLN ----

static void ref_adaln(Ref *f) { // x, branch?, mod -> xnew, h, mean, rstd
  const OpCase *c = f->c;
  int64_t C = c->dims.C;
  for (int64_t r = 0; r < c->batch.dims->n_text + c->batch.dims->n_image; r++) {
    const double *mod = f->in[2] + c->batch.segment[r] * c->dims.M;
    double *xnew = f->out[0] + r * C, *h = f->out[1] + r * C, mean = 0, var = 0;
    for (int64_t i = 0; i < C; i++) {
      xnew[i] = f->in[0][r * C + i] + (f->in[1] ? mod[f->args.adaln.gate + i] * f->in[1][r * C + i] : 0);
      mean += xnew[i] / (double)C;
    }
    for (int64_t i = 0; i < C; i++) var += (xnew[i] - mean) * (xnew[i] - mean) / (double)C;
    double rstd = 1 / sqrt(var + 1e-6);
    for (int64_t i = 0; i < C; i++) {
      double n = (1 + mod[f->args.adaln.scale + i]) * (xnew[i] - mean) * rstd + mod[f->args.adaln.shift + i];
      h[i] = f->args.adaln.silu_image && r >= c->batch.dims->n_text ? n * sigmoid(n) : n;
    }
    f->out[2][r] = mean;
    f->out[3][r] = rstd;
  }
}

static void adaln_case(OpCase *c, int with_branch, int with_dxnew, int silu_image, int x_is_new) {
  const BatchDims *b = c->batch.dims;
  int64_t C = c->dims.C, T = c->dims.T, M = c->dims.M, n = T * C, nm = c->dims.segments * M;
  int64_t used = b->n_text + b->n_image, used_mod = b->n_segments * M;
  int site = case_int(c, 0, c->dims.L - 1) * 6 * (int)C; // columns in an order of their own: shift, gate, scale
  OpArgs a = {.adaln = {.shift = site, .gate = site + (int)C, .scale = site + 2 * (int)C, .silu_image = silu_image}};
  real *x = rows_random(c, 0, used, C), *branch = with_branch ? rows_random(c, 0, used, C) : NULL;
  real *mod = segments_random(c, 0, M), *dh = rows_random(c, 0, used, C);
  real *dxnew = with_dxnew ? rows_random(c, 0, used, C) : NULL;
  Ref f = {.c = c, .args = a, .fn = ref_adaln};
  f.in[0] = case_double(c, x, n);
  if (branch) f.in[1] = case_double(c, branch, n);
  f.in[2] = case_double(c, mod, nm);
  ref_output(&f, 0, n, dxnew);
  ref_output(&f, 1, n, dh);
  ref_output(&f, 2, T, NULL);
  ref_output(&f, 3, T, NULL);
  ref_run(&f);

  real *xnew = branch ? case_poison(c, n) : NULL, *h = case_poison(c, n);
  real *mean = case_poison(c, T), *rstd = case_poison(c, T);
  op_run(c, OP_ADALN_FWD, a, OP_IN(x, branch, mod), OP_OUT(xnew, h, mean, rstd));
  if (branch) assert_close(xnew, f.out[0], n);
  if (branch) assert_true(all_zero(xnew + used * C, n - used * C));
  assert_close(h, f.out[1], n);
  assert_true(all_zero(h + used * C, n - used * C));
  assert_close(mean, f.out[2], T);
  assert_close(rstd, f.out[3], T);
  if (branch) { // recomputing h from xnew alone gives the same bits
    real *again = case_poison(c, n), *mean2 = case_poison(c, T), *rstd2 = case_poison(c, T);
    op_run(c, OP_ADALN_FWD, a, OP_IN(xnew, NULL, mod), OP_OUT(NULL, again, mean2, rstd2));
    assert_true(same_bits(h, again, (size_t)n * sizeof *h) && same_bits(mean, mean2, (size_t)T * sizeof *mean) &&
                same_bits(rstd, rstd2, (size_t)T * sizeof *rstd));
  }

  real *dx = case_poison(c, n), *dbranch = branch ? case_poison(c, n) : NULL, *dmod = case_random(c, nm, 1);
  real *before = case_copy(c, dmod, nm);
  a.adaln.x_is_new = branch && x_is_new;
  const real *from = a.adaln.x_is_new ? xnew : x;
  op_run(c, OP_ADALN_BWD, a, OP_IN(dh, dxnew, from, branch, mod, mean, rstd), OP_OUT(dx, dbranch, dmod));
  assert_true(all_zero(dx + used * C, n - used * C));
  assert_true(gradient_error(c, ref_loss, &f, f.in[0], dx, used * C, checked(c)) < CASE_GRAD_TOL);
  if (branch) {
    assert_true(all_zero(dbranch + used * C, n - used * C));
    assert_true(gradient_error(c, ref_loss, &f, f.in[1], dbranch, used * C, checked(c)) < CASE_GRAD_TOL);
  }
  for (int64_t i = 0; i < nm; i++) { // other columns and rows keep their bits; the gradient there is zero
    int64_t column = i % M - site;
    int own = i < used_mod && column >= 0 && column < 3 * C && (branch || column < C || column >= 2 * C);
    if (own) continue;
    assert_true(same_bits(&dmod[i], &before[i], sizeof dmod[i]));
    dmod[i] = 0;
  }
  assert_true(gradient_error(c, ref_loss, &f, f.in[2], dmod, used_mod, 4 * checked(c)) < CASE_GRAD_TOL);
  if (used) assert_true(norm_of(dmod, nm) > 0);
}

static void test_adaln(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, 2 * CASES);
    if (round % 4 == 0 && !op_case_is_large(&c)) { // more than one block of columns
      c.dims.C = case_int(&c, 65, 140);
      c.dims.L = 1;
      c.dims.M = 8 * c.dims.C;
      op_case_pack(&c, (PackKind)(round % PACK_KINDS));
    }
    for (int branch = 0; branch < 2 && op_case_is_large(&c); branch++)
      adaln_case(&c, branch, branch, !branch, case_int(&c, 0, 1));
    adaln_case(&c, case_int(&c, 0, 1), case_int(&c, 0, 1), case_int(&c, 0, 1), case_int(&c, 0, 1));
    op_case_free(&c);
  }
}

// ---- losses ----

static void ref_head(Ref *f) { // h, wout -> nll, logits of the target rows
  const OpCase *c = f->c;
  int64_t C = c->dims.C, V = c->dims.V;
  for (int j = 0; j < c->batch.dims->n_target; j++) {
    int64_t r = c->batch.target_row[j];
    double *logits = f->out[1] + j * V, sum = 0;
    for (int64_t v = 0; v < V; v++) {
      for (int64_t i = 0; i < C; i++) logits[v] += f->in[0][r * C + i] * f->in[1][v * C + i];
      sum += exp(logits[v]);
    }
    f->out[0][r] = log(sum) - logits[c->batch.target[r]];
  }
}

static void test_head(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, 2 * CASES);
    const BatchDims *b = c.batch.dims;
    int64_t T = c.dims.T, C = c.dims.C, V = c.dims.V, n = T * C;
    OpArgs a = {.head = {.chunk = round % 3 ? case_int(&c, 1, 20) : (int)T}}, add = a;
    add.head.accumulate = 1;
    real *h = rows_random(&c, 0, b->n_text, C), *wout = case_random(&c, V * C, 0.5), *scale = case_random(&c, T, 0);
    for (int64_t r = 0; r < T; r++) scale[r] = (real)b->ce_scale;
    Ref f = {.c = &c, .fn = ref_head};
    f.in[0] = case_double(&c, h, n);
    f.in[1] = case_double(&c, wout, V * C);
    ref_output(&f, 0, T, scale);
    ref_output(&f, 1, T * V, NULL);
    ref_run(&f);

    Metrics metrics = {.nll = {1, 2}, .targets = {3, 4}}, want = metrics, loss_only = metrics, other = metrics;
    for (int j = 0; j < b->n_target; j++) {
      int r = c.batch.target_row[j], kind = c.batch.target_kind[r];
      want.nll[kind] += f.out[0][r];
      want.targets[kind] += 1;
    }
    real *work = case_poison(&c, a.head.chunk * V), *nll = case_poison(&c, T), *dh = case_poison(&c, n);
    real *dw = case_poison(&c, V * C);
    op_run(&c, OP_HEAD_CE, a, OP_IN(h, wout), OP_OUT(nll, dh, dw, &metrics, work));
    assert_close(nll, f.out[0], T);
    for (int64_t r = 0; r < T; r++)
      if (c.batch.target[r] < 0) assert_true(nll[r] == 0 && all_zero(dh + r * C, C));
    for (int k = 0; k < 2; k++) {
      assert_true(fabs(metrics.nll[k] - want.nll[k]) <= CASE_TOL * want.nll[k]);
      assert_true(metrics.targets[k] == want.targets[k]);
    }
    assert_true(gradient_error(&c, ref_loss, &f, f.in[0], dh, b->n_text * C, checked(&c)) < CASE_GRAD_TOL);
    assert_gradient(&f, 1, dw, V * C);
    if (b->n_target) assert_true(norm_of(dh, n) > 0 && norm_of(dw, V * C) > 0);

    real *base = case_random(&c, V * C, 1), *nll2 = case_poison(&c, T), *dh2 = case_poison(&c, n);
    double *sum = case_double(&c, base, V * C);
    for (int64_t i = 0; i < V * C; i++) sum[i] += (double)dw[i];
    op_run(&c, OP_HEAD_CE, add, OP_IN(h, wout), OP_OUT(nll2, dh2, base, &other, work));
    assert_close(base, sum, V * C);
    assert_true(same_bits(dh, dh2, (size_t)n * sizeof *dh));
    op_run(&c, OP_HEAD_CE, a, OP_IN(h, wout), OP_OUT(nll2, NULL, NULL, &loss_only, work));
    assert_true(same_bits(nll, nll2, (size_t)T * sizeof *nll) && same_bits(&metrics, &loss_only, sizeof metrics));

    real *logits = case_poison(&c, b->n_target * V);
    op_run(&c, OP_HEAD_LOGITS, (OpArgs){0}, OP_IN(h, wout), OP_OUT(logits));
    ref_run(&f);
    assert_close(logits, f.out[1], b->n_target * V);
    op_case_free(&c);
  }
}

static void ref_flow(Ref *f) { // xhat -> weighted squared errors [T, P], plain sums [SEG]
  const Batch *b = &f->c->batch;
  int64_t P = f->c->dims.P, first = b->dims->n_text;
  for (int64_t i = first * P; i < (first + b->dims->n_image) * P; i++) {
    int g = b->segment[i / P];
    if (b->seg_kind[g] != SEGMENT_NOISED) continue;
    double error = f->in[0][i] - (b->patch[i - first * P] / 127.5 - 1), left = fmax(1 - (double)b->seg_time[g], 0.05);
    f->out[0][i] = error * error / (left * left);
    f->out[1][g] += error * error / (double)(b->seg_len[g] * P);
  }
}

static void test_flow(void **state) {
  (void)state;
  for (int round = 0; round < CASES + LARGE_CASES; round++) {
    OpCase c;
    make_case(&c, round, CASES);
    const BatchDims *b = c.batch.dims;
    int64_t P = c.dims.P, n = c.dims.T * P, S = c.dims.segments;
    OpArgs a = {.flow = {.t_floor = 0.05}};
    real *xhat = rows_random(&c, b->n_text, b->n_text + b->n_image, P), *scale = case_random(&c, n, 0);
    for (int64_t i = 0; i < n; i++) scale[i] = (real)b->flow_scale;
    Ref f = {.c = &c, .fn = ref_flow};
    f.in[0] = case_double(&c, xhat, n);
    ref_output(&f, 0, n, scale);
    ref_output(&f, 1, S, NULL);
    ref_run(&f);
    double flow = 5, elements = 7;
    for (int64_t i = 0; i < n; i++) flow += f.out[0][i];
    for (int g = 1; g < b->n_segments; g++)
      elements += c.batch.seg_kind[g] == SEGMENT_NOISED ? (double)(c.batch.seg_len[g] * P) : 0;

    real *dxhat = case_poison(&c, n), *error = case_poison(&c, S), *error2 = case_poison(&c, S);
    Metrics metrics = {.flow = 5, .flow_elems = 7}, loss_only = metrics;
    op_run(&c, OP_FLOW_LOSS, a, OP_IN(xhat), OP_OUT(dxhat, error, &metrics));
    assert_close(error, f.out[1], S);
    assert_true(fabs(metrics.flow - flow) <= CASE_TOL * flow);
    assert_true(metrics.flow_elems == elements);
    for (int64_t r = 0; r < c.dims.T; r++)
      if (c.batch.segment[r] == 0 || c.batch.seg_kind[c.batch.segment[r]] == SEGMENT_CLEAN)
        assert_true(all_zero(dxhat + r * P, P));
    assert_true(gradient_error(&c, ref_loss, &f, f.in[0] + b->n_text * P, dxhat + b->n_text * P, b->n_image * P,
                               checked(&c)) < CASE_GRAD_TOL);
    op_run(&c, OP_FLOW_LOSS, a, OP_IN(xhat), OP_OUT(NULL, error2, &loss_only));
    assert_true(same_bits(error, error2, (size_t)S * sizeof *error) && same_bits(&metrics, &loss_only, sizeof metrics));
    op_case_free(&c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_linear),    cmocka_unit_test(test_embed), cmocka_unit_test(test_noise),
      cmocka_unit_test(test_condition), cmocka_unit_test(test_adaln), cmocka_unit_test(test_head),
      cmocka_unit_test(test_flow),
  };
  return cmocka_run_group_tests_name("ops a", tests, NULL, NULL);
}
