// CPU kernels: QK-norm and rotary. Every op is compared with a naive reference in double written from
// kernels.h, every gradient with central differences of that reference; every call is repeated with other numbers of
// threads and must give the same bits. Built in float and in double.
#include "tests/ops/op_check.h"

typedef struct RopeRef {
  const OpCase *c;
  double *qkv, *wq, *wk;
  double *q, *k, *v;
  const real *dq, *dk, *dv;
} RopeRef;

static void reference_head(const OpCase *c, const double *x, const double *w, int64_t s, double *y) {
  int D = c->dims.D;
  double mean = 0;
  for (int i = 0; i < D; i++) mean += x[i] * x[i] / D;
  for (int j = 0; j < D / 2; j++) {
    float angle = (float)c->batch.position[2 * s + j % 2] * (float)pow(10000.0, -2.0 * j / D);
    double n = sqrt(mean + 1e-6), a = x[2 * j] / n * w[2 * j], b = x[2 * j + 1] / n * w[2 * j + 1];
    y[2 * j] = a * cos((double)angle) - b * sin((double)angle);
    y[2 * j + 1] = a * sin((double)angle) + b * cos((double)angle);
  }
}

static double rope_loss(void *context) {
  RopeRef *f = context;
  const Dims *d = &f->c->dims;
  int D = d->D, H = d->H, G = d->G, T = d->T;
  memset(f->q, 0, (size_t)(T * H * D) * sizeof *f->q);
  memset(f->k, 0, (size_t)(T * G * D) * sizeof *f->k);
  memset(f->v, 0, (size_t)(T * G * D) * sizeof *f->v);
  for (int r = 0; r < used_rows(f->c); r++) {
    int64_t s = f->c->batch.seq[r], m = modality_of(f->c, r);
    const double *x = f->qkv + r * (H + 2 * G) * D;
    for (int h = 0; h < H; h++) reference_head(f->c, x + h * D, f->wq + m * D, s, f->q + (s * H + h) * D);
    for (int g = 0; g < G; g++) {
      reference_head(f->c, x + (H + g) * D, f->wk + m * D, s, f->k + (s * G + g) * D);
      memcpy(f->v + (s * G + g) * D, x + (H + G + g) * D, (size_t)D * sizeof *f->v);
    }
  }
  return dot(f->dq, f->q, T * H * D) + dot(f->dk, f->k, T * G * D) + dot(f->dv, f->v, T * G * D);
}

static void test_rope(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    int64_t T = d->T, D = d->D, nq = T * d->H * D, nk = T * d->G * D, nx = nq + 2 * nk;
    for (int64_t i = 0; i < 2 * T && seed % 4 == 1; i++) // far along a document
      c->batch.position[i] += 2000;
    real *qkv = case_random(c, nx, 1), *wq = case_random(c, 2 * D, 1), *wk = case_random(c, 2 * D, 1);
    real *q = case_poison(c, nq), *k = case_poison(c, nk), *v = case_poison(c, nk);
    run_same(c, OP_QKNORM_ROPE_FWD, (OpArgs){0}, OP_IN(qkv, wq, wk), OP_OUT(q, k, v),
             SIZES(REALS(nq), REALS(nk), REALS(nk)));
    real *dq = case_random(c, nq, 1), *dk = case_random(c, nk, 1), *dv = case_random(c, nk, 1);
    RopeRef f = {.c = c,
                 .qkv = case_double(c, qkv, nx),
                 .wq = case_double(c, wq, 2 * D),
                 .wk = case_double(c, wk, 2 * D),
                 .q = case_zeros(c, nq),
                 .k = case_zeros(c, nk),
                 .v = case_zeros(c, nk),
                 .dq = dq,
                 .dk = dk,
                 .dv = dv};
    rope_loss(&f);
    assert_small(relative_error(q, f.q, nq), CASE_TOL);
    assert_small(relative_error(k, f.k, nk), CASE_TOL);
    assert_small(relative_error(v, f.v, nk), CASE_TOL);

    const void *const *in = OP_IN(dq, dk, dv, qkv, wq, wk);
    real *dx = case_poison(c, nx), *dwq = case_poison(c, 2 * D), *dwk = case_poison(c, 2 * D);
    const size_t *sizes = SIZES(REALS(nx), REALS(2 * D), REALS(2 * D));
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){0}, in, OP_OUT(dx, dwq, dwk), sizes);
    int64_t used = used_rows(c) * (d->H + 2 * d->G) * D;
    assert_true(all_zero(dx + used, nx - used));
    assert_small(gradient_error(c, rope_loss, &f, f.qkv, dx, nx, 60), CASE_GRAD_TOL);
    assert_small(gradient_error(c, rope_loss, &f, f.wq, dwq, 2 * D, 20), CASE_GRAD_TOL);
    assert_small(gradient_error(c, rope_loss, &f, f.wk, dwk, 2 * D, 20), CASE_GRAD_TOL);

    real *prior = case_random(c, 2 * D, 3), *more_q = case_copy(c, prior, 2 * D), *more_k = case_copy(c, prior, 2 * D);
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){.accumulate = 1}, in, OP_OUT(dx, more_q, more_k), sizes);
    assert_small(accumulate_error(c, more_q, prior, dwq, 2 * D), CASE_TOL);
    assert_small(accumulate_error(c, more_k, prior, dwk, 2 * D), CASE_TOL);
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_rope)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
