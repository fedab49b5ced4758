// CPU ops: the head with its cross-entropy, the flow loss (see op_reference.h).
#include "tests/ops/op_reference.h"

static void test_head(void **state) {
  (void)state;
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCase c;
    case_of_round(&c, round, 2 * CASES);
    const BatchDims *b = c.batch.dims;
    int64_t T = c.dims.T, C = c.dims.C, V = c.dims.V, n = T * C;
    OpArgs a = {.head = {.chunk = round % 3 ? case_int(&c, 1, 20) : (int)T}}, add = a;
    add.accumulate = 1;
    real *h = rows_random(&c, 0, b->n_text, C), *wout = case_random(&c, V * C, 0.5), *scale = case_random(&c, T, 0);
    for (int64_t r = 0; r < T; r++) scale[r] = (real)b->ce_scale;
    Ref f = {.c = &c, .kind = OP_HEAD_CE, .args = a};
    f.in[0] = case_double(&c, h, n);
    f.in[1] = case_double(&c, wout, V * C);
    ref_output(&f, 0, T, scale);
    ref_output(&f, OUT_AT(HEAD_CE, metrics), metrics_size(&c.dims), NULL);
    ref_output(&f, OUT_AT(HEAD_CE, work), V, NULL);
    ref_run(&f);

    Metrics metrics = {.nll = {1, 2}, .targets = {3, 4}}, loss_only = metrics, other = metrics;
    const Metrics want = *(const Metrics *)f.out[OUT_AT(HEAD_CE, metrics)];
    real *work = case_poison(&c, a.head.chunk * V), *nll = case_poison(&c, T), *dh = case_poison(&c, n);
    real *dw = case_poison(&c, V * C);
    op_run(&c, OP_HEAD_CE, a, OP_IN(h, wout), OP_OUT(nll, dh, dw, &metrics, work));
    assert_close(nll, f.out[0], T);
    for (int64_t r = 0; r < T; r++)
      if (c.batch.target[r] < 0) assert_true(nll[r] == 0 && all_zero(dh + r * C, C));
    for (int k = 0; k < 2; k++) {
      assert_true(fabs(metrics.nll[k] - (1 + k) - want.nll[k]) <= CASE_TOL * want.nll[k]);
      assert_true(metrics.targets[k] == 3 + k + want.targets[k]);
    }
    assert_true(gradient_error(&c, ref_loss, &f, f.in[0], dh, b->n_text * C, elements_checked(&c)) < CASE_GRAD_TOL);
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
    double *want_logits = case_zeros(&c, b->n_target * V);
    reference_run(&c, OP_HEAD_LOGITS, a, OP_IN(f.in[0], f.in[1]), OP_OUT(want_logits));
    assert_close(logits, want_logits, b->n_target * V);
    op_case_free(&c);
  }
}

static void test_flow(void **state) {
  (void)state;
  for (int round = 0; round < CASES + LARGE_CASES; round++) {
    OpCase c;
    case_of_round(&c, round, CASES);
    const BatchDims *b = c.batch.dims;
    int64_t P = c.dims.P, n = c.dims.T * P, S = c.dims.segments;
    OpArgs a = {.flow = {.t_floor = 0.05}};
    real *xhat = rows_random(&c, b->n_text, b->n_text + b->n_image, P),
         *scale = case_random(&c, metrics_size(&c.dims), 0);
    scale[offsetof(Metrics, flow) / sizeof(double)] = (real)b->flow_scale;
    Ref f = {.c = &c, .kind = OP_FLOW_LOSS, .args = a};
    f.in[0] = case_double(&c, xhat, n);
    ref_output(&f, OUT_AT(FLOW_LOSS, seg_error), S, NULL);
    ref_output(&f, OUT_AT(FLOW_LOSS, metrics), metrics_size(&c.dims), scale);
    ref_run(&f);
    const Metrics want = *(const Metrics *)f.out[OUT_AT(FLOW_LOSS, metrics)];

    real *dxhat = case_poison(&c, n), *error = case_poison(&c, S), *error2 = case_poison(&c, S);
    Metrics metrics = {.flow = 5, .flow_elems = 7}, loss_only = metrics;
    op_run(&c, OP_FLOW_LOSS, a, OP_IN(xhat), OP_OUT(dxhat, error, &metrics));
    assert_close(error, f.out[OUT_AT(FLOW_LOSS, seg_error)], S);
    assert_true(fabs(metrics.flow - 5 - want.flow) <= CASE_TOL * (5 + want.flow));
    assert_true(metrics.flow_elems == 7 + want.flow_elems);
    for (int64_t r = 0; r < c.dims.T; r++)
      if (c.batch.segment[r] == 0 || c.batch.seg_kind[c.batch.segment[r]] == SEGMENT_CLEAN)
        assert_true(all_zero(dxhat + r * P, P));
    assert_true(gradient_error(&c, ref_loss, &f, f.in[0] + b->n_text * P, dxhat + b->n_text * P, b->n_image * P,
                               elements_checked(&c)) < CASE_GRAD_TOL);
    op_run(&c, OP_FLOW_LOSS, a, OP_IN(xhat), OP_OUT(NULL, error2, &loss_only));
    assert_true(same_bits(error, error2, (size_t)S * sizeof *error) && same_bits(&metrics, &loss_only, sizeof metrics));
    op_case_free(&c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_head), cmocka_unit_test(test_flow)};
  return cmocka_run_group_tests_name("loss", tests, NULL, NULL);
}
