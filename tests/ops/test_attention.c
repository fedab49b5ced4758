// CPU ops: attention (see op_reference.h). Every call is repeated with other numbers of threads and must give the same
// bits.
#include "tests/ops/op_check.h"
#include "tests/ops/op_reference.h"

typedef struct AttentionRef {
  const OpCase *c;
  double *q, *k, *v;
  double *o, *lse;
  const real *dout;
} AttentionRef;

static double attention_loss(void *context) {
  const AttentionRef *f = context;
  const Dims *d = &f->c->dims;
  reference_run(f->c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(f->q, f->k, f->v), OP_OUT(f->o, f->lse));
  return dot(f->dout, f->o, (int64_t)d->T * d->H * d->D);
}

// Forward and backward of one pack; differences too when `checked` elements of each input are to be compared so.
static void check_attention(OpCase *c, int checked) {
  const Dims *d = &c->dims;
  int64_t T = d->T, D = d->D, nq = T * d->H * D, nk = T * d->G * D, nl = T * d->H, used = used_rows(c);
  real *q = case_random(c, nq, 1.5), *k = case_random(c, nk, 1.5), *v = case_random(c, nk, 1);
  real *o = case_poison(c, nq), *lse = case_poison(c, nl), *dout = case_random(c, nq, 1);
  run_same(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse), SIZES(REALS(nq), REALS(nl)));
  AttentionRef f = {.c = c,
                    .q = case_double(c, q, nq),
                    .k = case_double(c, k, nk),
                    .v = case_double(c, v, nk),
                    .o = case_zeros(c, nq),
                    .lse = case_zeros(c, nl),
                    .dout = dout};
  attention_loss(&f);
  assert_small(relative_error(o, f.o, nq), CASE_TOL);
  assert_true(all_zero(o + used * d->H * D, (T - used) * d->H * D));
  for (int64_t i = 0; i < nl; i++) {
    if (i % T >= used)
      assert_true(isinf(lse[i]) && lse[i] > 0);
    else
      assert_true(fabs((double)lse[i] - f.lse[i]) <= CASE_TOL * (1 + fabs(f.lse[i])));
  }

  real *dq = case_poison(c, nq), *dk = case_poison(c, nk), *dv = case_poison(c, nk);
  run_same(c, OP_ATTENTION_BWD, (OpArgs){0}, OP_IN(dout, o, q, k, v, lse), OP_OUT(dq, dk, dv),
           SIZES(REALS(nq), REALS(nk), REALS(nk)));
  double *want_q = case_zeros(c, nq), *want_k = case_zeros(c, nk), *want_v = case_zeros(c, nk);
  reference_run(c, OP_ATTENTION_BWD, (OpArgs){0}, OP_IN(case_double(c, dout, nq), f.o, f.q, f.k, f.v, f.lse),
                OP_OUT(want_q, want_k, want_v));
  assert_small(relative_error(dq, want_q, nq), CASE_TOL);
  assert_small(relative_error(dk, want_k, nk), CASE_TOL);
  assert_small(relative_error(dv, want_v, nk), CASE_TOL);
  assert_true(all_zero(dq + used * d->H * D, (T - used) * d->H * D));
  assert_true(all_zero(dk + used * d->G * D, (T - used) * d->G * D));
  assert_true(all_zero(dv + used * d->G * D, (T - used) * d->G * D));
  if (checked == 0) return;
  assert_small(gradient_error(c, attention_loss, &f, f.q, dq, nq, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, attention_loss, &f, f.k, dk, nk, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, attention_loss, &f, f.v, dv, nk, checked), CASE_GRAD_TOL);
}

static void test_attention(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    check_attention(c, 25);
    op_case_free(c);
  }
}

// Overwrites the attention arrays of an empty pack with documents of random length up to `longest`: runs of text, clean
// images, and noised images hidden from what follows. Rows are a random permutation: attention must not care.
static void long_documents(OpCase *c, int longest) {
  Batch *b = &c->batch;
  int at = 0, used = c->dims.T - case_int(c, 0, 20);
  while (at < used) {
    int start = at, want = at + (longest < used ? case_int(c, 1, longest) : used), end = want < used ? want : used;
    while (at < end) {
      int kind = case_int(c, 0, 3), n = case_int(c, 1, 150), stop = at + n < end ? at + n : end; // 2: clean, 3: noised
      for (int s = at; s < stop; s++) {
        b->doc_start[s] = start;
        b->kv_end[s] = kind < 2 ? s + 1 : stop;
        b->q_start[s] = kind < 2 ? s : at;
        b->q_end[s] = kind == 3 ? stop : end;
      }
      at = stop;
    }
  }
  for (int s = 0; s < used; s++) {
    int other = case_int(c, 0, s);
    b->row[s] = b->row[other];
    b->row[other] = s;
  }
  for (int s = 0; s < used; s++) b->seq[b->row[s]] = s;
  b->dims->n_text = used;
}

// Documents of many tiles, on both sides of the length where the backward pass changes its way, with one kv head and
// several, each of one query head and several, and widths on both sides of a tile's.
static void test_attention_long(void **state) {
  (void)state;
  static const struct {
    int longest, G, R, D; // R query heads to a kv head
  } shape[] = {{140, 1, 1, 6},  {300, 1, 2, 32},  {500, 1, 4, 6},   {5000, 1, 2, 32}, {5000, 1, 1, 6},
               {700, 1, 3, 32}, {5000, 2, 1, 18}, {5000, 3, 2, 10}, {5000, 2, 3, 66}, {500, 3, 2, 34}};
  for (int seed = 0; seed < (int)(sizeof shape / sizeof *shape); seed++) {
    OpCase box, *c = &box;
    op_case_init(c, (uint64_t)(1000 + seed));
    Dims *d = &c->dims;
    d->T = seed < 2 ? 300 : case_int(c, 530, 800);
    d->D = shape[seed].D;
    d->G = shape[seed].G;
    d->H = shape[seed].G * shape[seed].R;
    op_case_pack(c, PACK_EMPTY);
    c->batch.dims->seed_lo = (uint32_t)(1000 + seed);
    long_documents(c, shape[seed].longest);
    check_attention(c, 0);
    op_case_free(c);
  }
}

// More query heads to a kv head than a tile has rows.
static void test_attention_many_heads(void **state) {
  (void)state;
  OpCase box, *c = &box;
  op_case_init(c, 77);
  c->dims.G = 1;
  c->dims.H = 70;
  c->dims.D = 4;
  op_case_pack(c, PACK_MIXED);
  c->batch.dims->seed_lo = 77;
  check_attention(c, 5);
  c->dims.G = 2;
  c->dims.H = 2 * 35; // a tile of one query and 29 rows to spare
  op_case_pack(c, PACK_MIXED);
  c->batch.dims->seed_lo = 77;
  check_attention(c, 5);
  op_case_free(c);
}

// Large scores neither overflow nor lose the sum; NaN in a query reaches its output.
static void test_attention_extremes(void **state) {
  (void)state;
  OpCase box, *c = &box;
  op_case_init(c, 78);
  c->dims.G = c->dims.H = 1;
  c->dims.D = 8;
  op_case_pack(c, PACK_FULL);
  int64_t n = c->dims.T * 8;
  real *q = case_random(c, n, 60), *k = case_random(c, n, 60), *v = case_random(c, n, 1);
  real *o = case_poison(c, n), *lse = case_poison(c, c->dims.T);
  op_run(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse));
  for (int64_t i = 0; i < n; i++) assert_true(isfinite(o[i]));
  int query = c->dims.T / 2;
  q[query * 8] = (real)NAN;
  op_run(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse));
  for (int64_t i = 0; i < n; i++) assert_true(isnan(o[i]) == (i / 8 == c->batch.row[query]));
  op_case_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_attention), cmocka_unit_test(test_attention_long),
                                     cmocka_unit_test(test_attention_many_heads),
                                     cmocka_unit_test(test_attention_extremes)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
