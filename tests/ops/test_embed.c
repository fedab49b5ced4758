// CPU ops: embeddings, the pooled caption, noised patches (see op_reference.h).
#include "base/philox.h"
#include "tests/ops/op_reference.h"

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
    case_of_round(&c, round, 2 * CASES);
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
    case_of_round(&c, round, CASES);
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

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_embed), cmocka_unit_test(test_noise)};
  return cmocka_run_group_tests_name("embed", tests, NULL, NULL);
}
