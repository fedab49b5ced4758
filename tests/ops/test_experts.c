// CPU ops: experts, their sum with the site that follows, SwiGLU (see op_reference.h). Every call is repeated with
// other numbers of threads and must give the same bits.
#include "tests/ops/op_check.h"
#include "tests/ops/op_reference.h"

// ---- experts ----

typedef struct ExpertRef {
  const OpCase *c;
  const void *route;
  double *h, *w1[MODALITIES], *w2[MODALITIES], *weights, *add;
  double *pre, *a, *y, *out; // two-sided; [T, C]
  const real *dout;
} ExpertRef;

static double expert_loss(void *context) {
  const ExpertRef *f = context;
  const OpCase *c = f->c;
  const OpArgs none = {0};
  reference_run(c, OP_EXPERT_UP_FWD, none, OP_IN(f->h, f->route, f->w1[0], f->w1[1]), OP_OUT(f->pre, f->a));
  reference_run(c, OP_EXPERT_DOWN_FWD, none, OP_IN(f->a, f->route, f->w2[0], f->w2[1]), OP_OUT(f->y));
  reference_run(c, OP_EXPERT_COMBINE, none, OP_IN(f->y, f->route, f->weights, f->add), OP_OUT(f->out));
  return dot(f->dout, f->out, (int64_t)c->dims.T * c->dims.C);
}

// A routing that is not a router's: random distinct experts, or always the first ones. Returns the experts [T][Kmax].
static int *make_route(OpCase *c, int32_t *memory, bool first_ones) {
  const Dims *d = &c->dims;
  Route route;
  memset(memory, 0xff, (size_t)route_bind(&route, d, memory) * sizeof *memory);
  int kmax = dims_kmax(d), *expert = case_bytes(c, (size_t)(d->T * kmax) * sizeof *expert, 0xff);
  for (int r = 0; r < used_rows(c); r++) {
    int E = d->E[modality_of(c, r)], K = d->K[modality_of(c, r)], all[32];
    for (int e = 0; e < E; e++) all[e] = e;
    for (int j = 0; j < K; j++) {
      int pick = first_ones ? j : case_int(c, j, E - 1), t = all[pick];
      all[pick] = all[j];
      all[j] = t;
      expert[r * kmax + j] = t;
    }
  }
  for (int m = 0; m < MODALITIES; m++) {
    int first = m ? c->batch.dims->n_text : 0, at = first * d->K[m];
    int end = first + (m ? c->batch.dims->n_image : c->batch.dims->n_text);
    for (int e = 0; e < d->E[m]; e++) {
      int g = (m ? d->E[0] : 0) + e;
      route.begin[g] = at;
      for (int r = first; r < end; r++)
        for (int j = 0; j < d->K[m]; j++)
          if (expert[r * kmax + j] == e) {
            route.slot[r * kmax + j] = at;
            route.source[m][at++] = r * kmax + j;
          }
      route.count[g] = at - route.begin[g];
    }
  }
  return expert;
}

// Elements of a per-assignment buffer of these widths that belong to no assignment: they must still hold the poison.
static void check_unused(const OpCase *c, const real *x, const int width[2]) {
  const Dims *d = &c->dims;
  int64_t size = two_sided_size(d->T, d->K, width), image = two_sided_base(d->T, d->K, width, IMAGE);
  int64_t n_text = c->batch.dims->n_text, k1 = d->K[1] * width[1];
  for (int64_t i = 0; i < size; i++) {
    bool used = i < n_text * d->K[0] * width[0] || (i >= image + n_text * k1 && i < image + used_rows(c) * k1);
    assert_true(isnan(x[i]) == !used);
  }
}

static void check_experts(OpCase *c, int checked, bool first_ones) {
  const Dims *d = &c->dims;
  int kmax = dims_kmax(d), seed = current_seed(c);
  int64_t T = d->T, C = d->C, nx = T * C, nw = T * kmax;
  const int wide[2] = {2 * d->F[0], 2 * d->F[1]}, out_width[2] = {d->C, d->C};
  int64_t na = two_sided_size(d->T, d->K, d->F), np = 2 * na, ny = two_sided_size(d->T, d->K, out_width);
  int32_t *route = case_bytes(c, (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t), 0);
  int *expert = make_route(c, route, first_ones);
  Route bound;
  route_bind(&bound, d, route);
  real *h = case_random(c, nx, 1), *weights = case_random(c, nw, 1), *w1[2], *w2[2];
  int64_t n1[2], n2[2];
  for (int m = 0; m < 2; m++) {
    n1[m] = (int64_t)d->E[m] * 2 * d->F[m] * C;
    n2[m] = (int64_t)d->E[m] * d->F[m] * C;
    w1[m] = case_random(c, n1[m], 0.3);
    w2[m] = case_random(c, n2[m], 0.3);
  }

  // Forward.
  real *pre = case_poison(c, np), *a = case_poison(c, na), *y = case_poison(c, ny), *out = case_poison(c, nx);
  real *add = seed % 2 ? case_random(c, nx, 1) : NULL, *dout = case_random(c, nx, 1);
  run_same(c, OP_EXPERT_UP_FWD, (OpArgs){0}, OP_IN(h, route, w1[0], w1[1]), OP_OUT(pre, a),
           SIZES(REALS(np), REALS(na)));
  run_same(c, OP_EXPERT_DOWN_FWD, (OpArgs){0}, OP_IN(a, route, w2[0], w2[1]), OP_OUT(y), SIZES(REALS(ny)));
  run_same(c, OP_EXPERT_COMBINE, (OpArgs){0}, OP_IN(y, route, weights, add), OP_OUT(out), SIZES(REALS(nx)));
  check_unused(c, pre, wide);
  check_unused(c, a, d->F);
  check_unused(c, y, out_width);
  ExpertRef f = {.c = c,
                 .h = case_double(c, h, nx),
                 .w1 = {case_double(c, w1[0], n1[0]), case_double(c, w1[1], n1[1])},
                 .w2 = {case_double(c, w2[0], n2[0]), case_double(c, w2[1], n2[1])},
                 .weights = case_double(c, weights, nw),
                 .route = route,
                 .add = add ? case_double(c, add, nx) : NULL,
                 .pre = case_zeros(c, np),
                 .a = case_zeros(c, na),
                 .y = case_zeros(c, ny),
                 .out = case_zeros(c, nx),
                 .dout = dout};
  expert_loss(&f);
  assert_small(relative_error(out, f.out, nx), CASE_TOL);
  int64_t used = used_rows(c) * C;
  assert_true(all_zero(out + used, nx - used));
  for (int64_t i = 0; i < nw; i++) {
    if (expert[i] < 0) continue;
    int64_t at = two_sided_base(d->T, d->K, out_width, modality_of(c, i / kmax)) + bound.slot[i] * C;
    assert_small(relative_error(y + at, f.y + at, C), 10 * CASE_TOL);
  }

  // Backward.
  real *dpre = case_poison(c, np), *sa = case_poison(c, na), *dw = case_poison(c, nw);
  run_same(c, OP_EXPERT_DOWN_BWD, (OpArgs){0}, OP_IN(dout, pre, weights, route, w2[0], w2[1]), OP_OUT(dpre, sa, dw),
           SIZES(REALS(np), REALS(na), REALS(nw)));
  check_unused(c, dpre, wide);
  check_unused(c, sa, d->F);
  for (int64_t i = 0; i < nw; i++) assert_true(expert[i] >= 0 || dw[i] == 0);
  real *dslot = case_poison(c, ny), *dh = case_poison(c, nx);
  run_same(c, OP_EXPERT_UP_DGRAD, (OpArgs){0}, OP_IN(dpre, route, w1[0], w1[1]), OP_OUT(dslot), SIZES(REALS(ny)));
  run_same(c, OP_EXPERT_COMBINE, (OpArgs){0}, OP_IN(dslot, route), OP_OUT(dh), SIZES(REALS(nx)));
  real *dw1[2] = {case_poison(c, n1[0]), case_poison(c, n1[1])};
  real *dw2[2] = {case_poison(c, n2[0]), case_poison(c, n2[1])};
  const void *const *in1 = OP_IN(dpre, h, route), *const *in2 = OP_IN(dout, sa, route);
  const size_t *sizes1 = SIZES(REALS(n1[0]), REALS(n1[1])), *sizes2 = SIZES(REALS(n2[0]), REALS(n2[1]));
  run_same(c, OP_EXPERT_UP_WGRAD, (OpArgs){0}, in1, OP_OUT(dw1[0], dw1[1]), sizes1);
  run_same(c, OP_EXPERT_DOWN_WGRAD, (OpArgs){0}, in2, OP_OUT(dw2[0], dw2[1]), sizes2);
  assert_small(gradient_error(c, expert_loss, &f, f.h, dh, nx, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, expert_loss, &f, f.weights, dw, nw, checked), CASE_GRAD_TOL);
  OpArgs more = {.accumulate = 1};
  real *prior1[2], *prior2[2], *sum1[2], *sum2[2];
  for (int m = 0; m < 2; m++) {
    assert_small(gradient_error(c, expert_loss, &f, f.w1[m], dw1[m], n1[m], checked), CASE_GRAD_TOL);
    assert_small(gradient_error(c, expert_loss, &f, f.w2[m], dw2[m], n2[m], checked), CASE_GRAD_TOL);
    for (int e = 0; e < d->E[m]; e++) { // an expert without rows
      if (bound.count[(m ? d->E[0] : 0) + e]) continue;
      assert_true(all_zero(dw1[m] + e * 2 * d->F[m] * C, 2 * d->F[m] * C));
      assert_true(all_zero(dw2[m] + e * d->F[m] * C, d->F[m] * C));
    }
    prior1[m] = case_random(c, n1[m], 3);
    prior2[m] = case_random(c, n2[m], 3);
    sum1[m] = case_copy(c, prior1[m], n1[m]);
    sum2[m] = case_copy(c, prior2[m], n2[m]);
  }
  run_same(c, OP_EXPERT_UP_WGRAD, more, in1, OP_OUT(sum1[0], sum1[1]), sizes1);
  run_same(c, OP_EXPERT_DOWN_WGRAD, more, in2, OP_OUT(sum2[0], sum2[1]), sizes2);
  for (int m = 0; m < 2; m++) {
    assert_small(accumulate_error(c, sum1[m], prior1[m], dw1[m], n1[m]), CASE_TOL);
    assert_small(accumulate_error(c, sum2[m], prior2[m], dw2[m], n2[m]), CASE_TOL);
  }
}

static void test_experts(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    check_experts(c, 20, seed % 4 == 2);
    op_case_free(c);
  }
}

// More rows and columns than one block of any kind holds, of each modality.
static void test_experts_large(void **state) {
  (void)state;
  for (int m = TEXT; m <= IMAGE; m++) {
    OpCase box, *c = &box;
    op_case_init(c, 50);
    Dims *d = &c->dims;
    d->T = 650;
    d->C = 530;
    d->segments = 100;
    for (int k = 0; k < 2; k++) {
      d->E[k] = 2 + (k != m);
      d->K[k] = 1 + (k != m);
      d->F[k] = 3 + k;
    }
    op_case_pack(c, PACK_EMPTY);
    c->batch.dims->n_text = m == TEXT ? 620 : 21; // experts look at no more of a pack than this
    c->batch.dims->n_image = m == TEXT ? 21 : 620;
    c->batch.dims->seed_lo = 50;
    check_experts(c, 6, true); // 620 rows on one expert: two chunks of a weight gradient
    op_case_free(c);
  }
}

// ---- the sum over the experts with the site that follows ----

// The ops one by one give the same bits.
static void check_combine_adaln(OpCase *c) {
  const Dims *d = &c->dims;
  const int width[2] = {d->C, d->C}, kept = current_seed(c) % 2;
  int64_t T = d->T, n = T * d->C, ny = two_sided_size(T, d->K, width), nm = (int64_t)d->segments * d->M;
  int32_t *route = case_bytes(c, (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t), 0);
  make_route(c, route, false);
  real *y = case_random(c, ny, 1), *weights = case_random(c, T * dims_kmax(d), 1), *mod = case_random(c, nm, 1);
  real *add = case_random(c, n, 1), *shared = current_seed(c) % 3 ? add : NULL, *x = case_random(c, n, 1);
  OpArgs a = {.adaln = {.gate = 0, .shift = d->C, .scale = 2 * d->C, .silu_image = current_seed(c) / 2 % 2}};
  real *b2 = case_poison(c, n), *want[4], *got[4];
  const int64_t rows[4] = {n, n, T, T}; // xnew, h, mean, rstd
  for (int k = 0; k < 4; k++) {
    want[k] = case_poison(c, rows[k]);
    got[k] = case_poison(c, rows[k]);
  }
  op_run(c, OP_EXPERT_COMBINE, a, OP_IN(y, route, weights, shared), OP_OUT(b2));
  op_run(c, OP_ADALN_FWD, a, OP_IN(x, b2, mod), OP_OUT(want[0], want[1], want[2], want[3]));
  real *sum = case_poison(c, n);
  op_run(c, OP_COMBINE_ADALN_FWD, a, OP_IN(y, route, weights, shared, x, mod),
         OP_OUT(kept ? sum : NULL, got[0], got[1], got[2], got[3]));
  assert_true(!kept || same_bits(sum, b2, REALS(n)));
  for (int k = 0; k < 4; k++) assert_true(same_bits(got[k], want[k], REALS(rows[k])));

  a.adaln.silu_image = 0;
  real *dh = case_poison(c, n), *dxnew = case_random(c, n, 1), *one[3], *both[3];
  const int64_t counts[3] = {n, n, nm}; // dx, dbranch, dmod
  for (int k = 0; k < 3; k++) {
    one[k] = case_poison(c, counts[k]);
    both[k] = case_poison(c, counts[k]);
  }
  op_run(c, OP_EXPERT_COMBINE, a, OP_IN(y, route, NULL, add), OP_OUT(dh));
  op_run(c, OP_ADALN_BWD, a, OP_IN(dh, dxnew, x, b2, mod, want[2], want[3]), OP_OUT(one[0], one[1], one[2]));
  run_same(c, OP_COMBINE_ADALN_BWD, a, OP_IN(y, route, add, dxnew, x, b2, mod, want[2], want[3]),
           OP_OUT(both[0], both[1], both[2]), SIZES(REALS(n), REALS(n), REALS(nm)));
  for (int k = 0; k < 3; k++) assert_true(same_bits(both[k], one[k], REALS(counts[k])));
}

static void test_combine_adaln(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    Dims *d = &c->dims;
    if (seed % 10 == 5) { // more rows than a segment's are summed at a time
      d->T = 271;
      op_case_pack(c, seed == 5 ? PACK_TEXT : PACK_FULL);
      c->batch.dims->seed_lo = (uint32_t)seed;
    }
    d->C = 1 + seed * 7; // beyond the blocks of columns that a row is taken in
    d->M = 6 * d->C * d->L + 2 * d->C;
    check_combine_adaln(c);
    op_case_free(c);
  }
}

// ---- the shared expert ----

static void test_shared(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1}, wide[2] = {2 * d->S[0], 2 * d->S[1]};
    const OpArgs down = {.linear = {EXT_SPLIT, {d->S[0], d->S[1]}, {d->C, d->C}}};
    int64_t na = two_sided_size(d->T, one, d->S), np = two_sided_size(d->T, one, wide), n = (int64_t)d->T * d->C;
    real *h = case_random(c, n, 1), *dout = case_random(c, n, 1), *w1[2], *w2[2];
    real *pre = case_poison(c, np), *a = case_poison(c, na), *dpre = case_poison(c, np), *again = case_poison(c, na);
    real *da = case_poison(c, na);
    for (int m = 0; m < MODALITIES; m++) {
      w1[m] = d->S[m] ? case_random(c, (int64_t)2 * d->S[m] * d->C, 0.5) : NULL;
      w2[m] = d->S[m] ? case_random(c, (int64_t)d->S[m] * d->C, 0.5) : NULL;
    }
    run_same(c, OP_SHARED_UP_FWD, (OpArgs){0}, OP_IN(h, w1[0], w1[1]), OP_OUT(pre, a), SIZES(REALS(np), REALS(na)));
    run_same(c, OP_SHARED_DOWN_BWD, (OpArgs){0}, OP_IN(dout, pre, w2[0], w2[1]), OP_OUT(dpre, again),
             SIZES(REALS(np), REALS(na)));
    op_run(c, OP_LINEAR_DGRAD, down, OP_IN(dout, w2[0], w2[1], NULL), OP_OUT(da));
    for (int m = 0; m < MODALITIES; m++) {
      int64_t first = m ? c->batch.dims->n_text : 0, rows = m ? c->batch.dims->n_image : c->batch.dims->n_text;
      int64_t S = d->S[m], at = two_sided_base(d->T, one, d->S, m) + first * S, pre_at = 2 * at;
      pre_at = two_sided_base(d->T, one, wide, m) + first * 2 * S;
      assert_true(same_bits(a + at, again + at, REALS(rows * S)));
      for (int64_t i = 0; i < rows * S; i++) { // by central differences of silu(gate) * up
        double gate = (double)pre[pre_at + 2 * i], up = (double)pre[pre_at + 2 * i + 1], e = 1e-5;
        double silu = gate / (1 + exp(-gate)),
               slope = ((gate + e) / (1 + exp(-gate - e)) - (gate - e) / (1 + exp(e - gate))) / (2 * e);
        double dA = (double)da[at + i];
        assert_small(fabs((double)a[at + i] - silu * up), CASE_TOL * (1 + fabs(silu * up)));
        assert_small(fabs((double)dpre[pre_at + 2 * i] - dA * up * slope), CASE_GRAD_TOL * (1 + fabs(dA * up)));
        assert_small(fabs((double)dpre[pre_at + 2 * i + 1] - dA * silu), CASE_GRAD_TOL * (1 + fabs(dA * silu)));
      }
    }
    int64_t filler = (d->T - used_rows(c)) * d->S[1];
    assert_true(all_zero(a + na - filler, filler) && all_zero(again + na - filler, filler));
    assert_true(all_zero(pre + np - 2 * filler, 2 * filler) && all_zero(dpre + np - 2 * filler, 2 * filler));
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_experts), cmocka_unit_test(test_experts_large),
                                     cmocka_unit_test(test_combine_adaln), cmocka_unit_test(test_shared)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
