// CPU ops: QK-norm and rotary (see op_reference.h). Every call is repeated with other numbers of threads and must give
// the same bits.
#include "tests/ops/op_check.h"
#include "tests/ops/op_reference.h"

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
    Ref f = {.c = c, .kind = OP_QKNORM_ROPE_FWD};
    f.in[0] = case_double(c, qkv, nx);
    f.in[1] = case_double(c, wq, 2 * D);
    f.in[2] = case_double(c, wk, 2 * D);
    ref_output(&f, 0, nq, dq);
    ref_output(&f, 1, nk, dk);
    ref_output(&f, 2, nk, dv);
    ref_run(&f);
    assert_small(relative_error(q, f.out[0], nq), CASE_TOL);
    assert_small(relative_error(k, f.out[1], nk), CASE_TOL);
    assert_small(relative_error(v, f.out[2], nk), CASE_TOL);

    const void *const *in = OP_IN(dq, dk, dv, qkv, wq, wk);
    real *dx = case_poison(c, nx), *dwq = case_poison(c, 2 * D), *dwk = case_poison(c, 2 * D);
    const size_t *sizes = SIZES(REALS(nx), REALS(2 * D), REALS(2 * D));
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){0}, in, OP_OUT(dx, dwq, dwk), sizes);
    int64_t used = used_rows(c) * (d->H + 2 * d->G) * D;
    assert_true(all_zero(dx + used, nx - used));
    assert_small(gradient_error(c, ref_loss, &f, f.in[0], dx, nx, 60), CASE_GRAD_TOL);
    assert_small(gradient_error(c, ref_loss, &f, f.in[1], dwq, 2 * D, 20), CASE_GRAD_TOL);
    assert_small(gradient_error(c, ref_loss, &f, f.in[2], dwk, 2 * D, 20), CASE_GRAD_TOL);

    real *prior = case_random(c, 2 * D, 3), *more_q = case_copy(c, prior, 2 * D), *more_k = case_copy(c, prior, 2 * D);
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){.accumulate = 1}, in, OP_OUT(dx, more_q, more_k), sizes);
    assert_small(accumulate_error(c, more_q, prior, dwq, 2 * D), CASE_TOL);
    assert_small(accumulate_error(c, more_k, prior, dwk, 2 * D), CASE_TOL);
    op_case_free(c);
  }
}

// With the backward attention before it: the bits of the two ops.
static void test_attention_rope(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    int64_t nq = (int64_t)d->T * d->H * d->D, nk = (int64_t)d->T * d->G * d->D, nx = nq + 2 * nk, nw = 2 * d->D;
    int64_t nl = (int64_t)d->H * d->T;
    real *qkv = case_random(c, nx, 1), *wq = case_random(c, nw, 1), *wk = case_random(c, nw, 1);
    real *q = case_poison(c, nq), *k = case_poison(c, nk), *v = case_poison(c, nk);
    real *o = case_poison(c, nq), *lse = case_poison(c, nl), *dout = case_random(c, nq, 1);
    op_run(c, OP_QKNORM_ROPE_FWD, (OpArgs){0}, OP_IN(qkv, wq, wk), OP_OUT(q, k, v));
    op_run(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse));
    for (int accumulate = 0; accumulate < 2; accumulate++) {
      const OpArgs a = {.accumulate = accumulate};
      real *dq = case_poison(c, nq), *dk = case_poison(c, nk), *dv = case_poison(c, nk), *work = case_poison(c, nx);
      real *dx = case_poison(c, nx), *dwq = case_random(c, nw, 1), *dwk = case_random(c, nw, 1);
      real *both_x = case_poison(c, nx), *both_q = case_copy(c, dwq, nw), *both_k = case_copy(c, dwk, nw);
      op_run(c, OP_ATTENTION_BWD, a, OP_IN(dout, o, q, k, v, lse), OP_OUT(dq, dk, dv));
      op_run(c, OP_QKNORM_ROPE_BWD, a, OP_IN(dq, dk, dv, qkv, wq, wk), OP_OUT(dx, dwq, dwk));
      run_same(c, OP_ATTENTION_ROPE_BWD, a, OP_IN(dout, o, q, k, v, lse, qkv, wq, wk),
               OP_OUT(both_x, both_q, both_k, work), SIZES(REALS(nx), REALS(nw), REALS(nw), REALS(nx)));
      assert_true(same_bits(both_x, dx, REALS(nx)));
      assert_true(same_bits(both_q, dwq, REALS(nw)) && same_bits(both_k, dwk, REALS(nw)));
    }
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_rope), cmocka_unit_test(test_attention_rope)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
