// CPU ops: AdaLN sites (see op_reference.h).
#include "tests/ops/op_reference.h"

static void adaln_case(OpCase *c, int with_branch, int with_dxnew, int silu_image, int x_is_new) {
  const BatchDims *b = c->batch.dims;
  int64_t C = c->dims.C, T = c->dims.T, M = c->dims.M, n = T * C, nm = c->dims.segments * M;
  int64_t used = b->n_text + b->n_image, used_mod = b->n_segments * M;
  int site = case_int(c, 0, c->dims.L - 1) * 6 * (int)C; // columns in an order of their own: shift, gate, scale
  OpArgs a = {.adaln = {.shift = site, .gate = site + (int)C, .scale = site + 2 * (int)C, .silu_image = silu_image}};
  real *x = rows_random(c, 0, used, C), *branch = with_branch ? rows_random(c, 0, used, C) : NULL;
  real *mod = segments_random(c, 0, M), *dh = rows_random(c, 0, used, C);
  real *dxnew = with_dxnew ? rows_random(c, 0, used, C) : NULL;
  Ref f = {.c = c, .kind = OP_ADALN_FWD, .args = a};
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
  assert_true(gradient_error(c, ref_loss, &f, f.in[0], dx, used * C, elements_checked(c)) < CASE_GRAD_TOL);
  if (branch) {
    assert_true(all_zero(dbranch + used * C, n - used * C));
    assert_true(gradient_error(c, ref_loss, &f, f.in[1], dbranch, used * C, elements_checked(c)) < CASE_GRAD_TOL);
  }
  for (int64_t i = 0; i < nm; i++) { // other columns and rows keep their bits; the gradient there is zero
    int64_t column = i % M - site;
    int own = i < used_mod && column >= 0 && column < 3 * C && (branch || column < C || column >= 2 * C);
    if (own) continue;
    assert_true(same_bits(&dmod[i], &before[i], sizeof dmod[i]));
    dmod[i] = 0;
  }
  assert_true(gradient_error(c, ref_loss, &f, f.in[2], dmod, used_mod, 4 * elements_checked(c)) < CASE_GRAD_TOL);
  if (used) assert_true(norm_of(dmod, nm) > 0);
}

static void test_adaln(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    case_of_round(&c, round, 2 * CASES);
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

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_adaln)};
  return cmocka_run_group_tests_name("adaln", tests, NULL, NULL);
}
