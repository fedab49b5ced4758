// CPU ops: the conditioning vector and its modulation (see op_reference.h).
#include "tests/ops/op_reference.h"

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
  if (used > Z)
    assert_true(gradient_error(c, ref_loss, &f, f.in[0] + Z, dc + Z, used - Z, elements_checked(c)) < CASE_GRAD_TOL);
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
  int64_t n = c->dims.segments * TIME_FEATURES;
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
    case_of_round(&c, round, CASES);
    silu_case(&c);
    cond_case(&c);
    mod_case(&c);
    time_case(&c);
    op_case_free(&c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_condition)};
  return cmocka_run_group_tests_name("cond", tests, NULL, NULL);
}
