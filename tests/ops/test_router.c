// CPU ops: routers (see op_reference.h). Every call is repeated with other numbers of threads and must give the same
// bits.
#include "tests/ops/op_check.h"
#include "tests/ops/op_reference.h"

typedef struct RouterRef {
  const OpCase *c;
  OpArgs args;
  double *h, *wr[MODALITIES];
  const int32_t *chosen, *route; // experts [T, Kmax] and the route, before differences: the gradient holds them fixed
  double *logits, *weights;      // two-sided; [T, Kmax]
  int32_t *other_route;
  double *metrics;
  const real *dweights, *dadd; // [T, Kmax], [T, C]
} RouterRef;

// What the chosen experts weigh by the logits.
static double weights_loss(const RouterRef *f) {
  const Dims *d = &f->c->dims;
  const int one[2] = {1, 1};
  int kmax = dims_kmax(d);
  double loss = 0;
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), E = d->E[m], K = d->K[m];
    const double *s = f->logits + two_sided_base(d->T, one, d->E, m) + r * E;
    double all = 0, sum = 0;
    for (int e = 0; e < E; e++) all += exp(s[e]);
    for (int j = 0; j < K; j++) sum += exp(s[f->chosen[r * kmax + j]]);
    for (int j = 0; j < K; j++)
      loss += (double)f->dweights[r * kmax + j] * exp(s[f->chosen[r * kmax + j]]) / (K == 1 ? all : sum);
  }
  return loss;
}

static double router_loss(void *context) {
  const RouterRef *f = context;
  const Dims *d = &f->c->dims;
  Metrics *m = memset(f->metrics, 0, (size_t)metrics_size(d) * sizeof(double));
  reference_run(f->c, OP_ROUTER_FWD, f->args, OP_IN(f->h, f->wr[0], f->wr[1]),
                OP_OUT(f->logits, f->weights, f->other_route));
  reference_run(f->c, OP_ROUTER_LOSS, f->args, OP_IN(f->logits, f->route), OP_OUT(f->metrics));
  return m->balance + m->z + weights_loss(f) + dot(f->dadd, f->h, (int64_t)used_rows(f->c) * d->C);
}

// The route leads from assignments to slots sorted by (expert, row) and back; the used slots are exactly the packed
// range of each modality; everything else is -1.
static void check_route(const OpCase *c, int32_t *memory) {
  const Dims *d = &c->dims;
  const BatchDims *n = c->batch.dims;
  Route route;
  route_bind(&route, d, memory);
  int kmax = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    int first = (m ? n->n_text : 0) * d->K[m], rows = m ? n->n_image : n->n_text, at = first;
    for (int e = 0; e < d->E[m]; e++) {
      int g = (m ? d->E[0] : 0) + e;
      assert_int_equal(route.begin[g], at);
      for (int s = at; s < at + route.count[g]; s++) {
        int source = route.source[m][s];
        assert_int_equal(route.slot[source], s);
        assert_int_equal(modality_of(c, source / kmax), m);
        if (s > at) assert_true(route.source[m][s - 1] / kmax < source / kmax);
      }
      at += route.count[g];
    }
    assert_int_equal(at, first + rows * d->K[m]);
    for (int s = 0; s < d->T * d->K[m]; s++)
      if (s < first || s >= at) assert_int_equal(route.source[m][s], -1);
  }
  for (int r = 0; r < d->T; r++)
    for (int j = 0; j < kmax; j++)
      if (r >= used_rows(c) || j >= d->K[modality_of(c, r)]) assert_int_equal(route.slot[r * kmax + j], -1);
}

// Makes every row of a modality prefer its expert 0: h becomes positive, and the router's first row too.
static void send_to_first_expert(const OpCase *c, real *h, real *wr) {
  const Dims *d = &c->dims;
  for (int64_t i = 0; i < d->C; i++) wr[i] = (real)(1 + fabs((double)wr[i]));
  for (int64_t i = 0; i < (int64_t)d->T * d->C; i++) h[i] = (real)fabs((double)h[i]);
}

// More rows of each modality and more columns than the gradients' blocks hold, and last blocks of odd sizes.
static void large_router_case(OpCase *c, int number) {
  Dims *d = &c->dims;
  op_case_init_large(c, number);
  d->C = (const int[LARGE_CASES]){531, 70, 1030}[number];
  for (int m = 0; m < MODALITIES; m++) {
    d->K[m] = 1 + (number + m) % 3;
    d->E[m] = d->K[m] + 2 + m;
  }
  d->M = 8 * d->C;
  op_case_pack(c, PACK_EMPTY);
  c->batch.dims->n_text = (const int[LARGE_CASES]){141, 260, 129}[number]; // a router looks at no more of a pack
  c->batch.dims->n_image = (const int[LARGE_CASES]){170, 130, 140}[number];
  c->batch.dims->seed_lo = (uint32_t)(SEEDS + number);
}

static void test_router(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS + LARGE_CASES; seed++) {
    OpCase box, *c = &box;
    if (seed < SEEDS)
      make_case(c, seed);
    else
      large_router_case(c, seed - SEEDS);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1};
    int kmax = dims_kmax(d), groups = d->E[0] + d->E[1];
    int64_t T = d->T, C = d->C, nl = two_sided_size(d->T, one, d->E), nw = T * kmax, nx = T * C;
    real *h = case_random(c, nx, 1), *wr[2];
    for (int m = 0; m < 2; m++) {
      wr[m] = case_random(c, d->E[m] * C, seed < SEEDS ? 0.5 : 0.1);
      if (seed % 6 == 3) send_to_first_expert(c, h, wr[m]);
    }
    size_t route_bytes = (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t);
    real *logits = case_poison(c, nl), *weights = case_poison(c, nw);
    int32_t *route = case_bytes(c, route_bytes, 0x5a);
    const int even = seed % 6 == 4;
    run_same(c, OP_ROUTER_FWD, (OpArgs){.router = {.even = even}}, OP_IN(h, wr[0], wr[1]),
             OP_OUT(logits, weights, route), SIZES(REALS(nl), REALS(nw), route_bytes));

    real *dweights = case_random(c, nw, 1), *add = seed % 2 ? case_random(c, nx, 1) : NULL;
    Route bound;
    route_bind(&bound, d, route);
    int32_t *chosen = case_bytes(c, (size_t)nw * sizeof *chosen, 0xff);
    for (int g = 0; g < groups; g++)
      for (int s = bound.begin[g]; s < bound.begin[g] + bound.count[g]; s++)
        chosen[bound.source[g >= d->E[0]][s]] = g < d->E[0] ? g : g - d->E[0];
    RouterRef f = {.c = c,
                   .chosen = chosen,
                   .args = {.router = {.balance = 0.7, .z = 0.3, .layer = d->L - 1, .even = even}},
                   .h = case_double(c, h, nx),
                   .wr = {case_double(c, wr[0], d->E[0] * C), case_double(c, wr[1], d->E[1] * C)},
                   .route = route,
                   .logits = case_zeros(c, nl),
                   .weights = case_zeros(c, nw),
                   .other_route = case_bytes(c, route_bytes, 0),
                   .metrics = case_zeros(c, metrics_size(d)),
                   .dweights = dweights,
                   .dadd = add ? add : case_random(c, nx, 0)};
    router_loss(&f);
    const Metrics want = *(const Metrics *)f.metrics;
    assert_small(relative_error(weights, f.weights, nw), CASE_TOL);
    assert_true(same_bits(route, f.other_route, route_bytes));
    check_route(c, route);
    if (seed % 6 == 3)
      for (int m = 0; m < 2; m++) // all rows really are on one expert
        assert_int_equal(bound.count[m ? d->E[0] : 0], m ? c->batch.dims->n_image : c->batch.dims->n_text);
    for (int g = 0; g < groups && even; g++) { // no two loads of a modality are further apart than one row
      int m = g >= d->E[0], rows = m ? c->batch.dims->n_image : c->batch.dims->n_text, fair = rows * d->K[m] / d->E[m];
      assert_true(bound.count[g] == fair || bound.count[g] == fair + 1);
    }
    for (int r = 0; r < used_rows(c); r++) {
      int m = modality_of(c, r);
      int64_t at = two_sided_base(d->T, one, d->E, m) + r * d->E[m];
      assert_small(relative_error(logits + at, f.logits + at, d->E[m]), CASE_TOL);
    }
    int64_t filler = (T - used_rows(c)) * d->E[1];
    assert_true(all_zero(logits + nl - filler, filler));

    // Losses and loads add to what is there.
    OpArgs args = f.args;
    double *metrics = case_zeros(c, metrics_size(d));
    for (int64_t i = 0; i < metrics_size(d); i++) metrics[i] = (double)i;
    Metrics *m = (Metrics *)metrics, prior = *m;
    run_same(c, OP_ROUTER_LOSS, args, OP_IN(logits, route), OP_OUT(metrics),
             SIZES((size_t)metrics_size(d) * sizeof(double)));
    assert_true(fabs(m->balance - prior.balance - want.balance) <= CASE_TOL * (1 + want.balance));
    assert_true(fabs(m->z - prior.z - want.z) <= CASE_TOL * (1 + want.z));
    int64_t base = (int64_t)(sizeof(Metrics) / sizeof(double)), layer = base + (d->L - 1) * groups;
    for (int64_t i = base; i < metrics_size(d); i++)
      assert_true(metrics[i] == (double)i + (i >= layer ? bound.count[i - layer] : 0));
    assert_true(same_bits(&prior.nll, &m->nll, offsetof(Metrics, balance)));

    const void *const *in = OP_IN(dweights, logits, weights, route, h, wr[0], wr[1], add);
    real *dh = case_poison(c, nx), *dwr[2] = {case_poison(c, d->E[0] * C), case_poison(c, d->E[1] * C)};
    const size_t *sizes = SIZES(REALS(nx), REALS(d->E[0] * C), REALS(d->E[1] * C));
    run_same(c, OP_ROUTER_BWD, args, in, OP_OUT(dh, dwr[0], dwr[1]), sizes);
    int64_t used = used_rows(c) * C;
    assert_true(all_zero(dh + used, nx - used));
    assert_small(gradient_error(c, router_loss, &f, f.h, dh, nx, seed < SEEDS ? 80 : 6), CASE_GRAD_TOL);
    for (int k = 0; k < 2; k++)
      assert_small(gradient_error(c, router_loss, &f, f.wr[k], dwr[k], d->E[k] * C, seed < SEEDS ? 40 : 6),
                   CASE_GRAD_TOL);

    args.accumulate = 1;
    real *start[2] = {case_random(c, d->E[0] * C, 3), case_random(c, d->E[1] * C, 3)};
    real *more[2] = {case_copy(c, start[0], d->E[0] * C), case_copy(c, start[1], d->E[1] * C)};
    run_same(c, OP_ROUTER_BWD, args, in, OP_OUT(dh, more[0], more[1]), sizes);
    for (int k = 0; k < 2; k++) assert_small(accumulate_error(c, more[k], start[k], dwr[k], d->E[k] * C), CASE_TOL);
    op_case_free(c);
  }
}

// Equal logits go to the lower indices; NaN logits still give a valid route.
static void test_router_ties(void **state) {
  (void)state;
  for (int nan = 0; nan < 2; nan++) {
    OpCase box, *c = &box;
    make_case(c, 20);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1};
    int kmax = dims_kmax(d);
    real *h = case_random(c, (int64_t)d->T * d->C, nan ? (double)NAN : 1);
    real *wr[2] = {case_random(c, d->E[0] * d->C, 0), case_random(c, d->E[1] * d->C, 0)};
    real *logits = case_poison(c, two_sided_size(d->T, one, d->E)), *weights = case_poison(c, d->T * kmax);
    int32_t *memory = case_bytes(c, (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t), 0);
    op_run(c, OP_ROUTER_FWD, (OpArgs){0}, OP_IN(h, wr[0], wr[1]), OP_OUT(logits, weights, memory));
    Route route;
    route_bind(&route, d, memory);
    for (int m = 0; m < 2; m++)
      for (int e = 0; e < d->E[m]; e++)
        assert_int_equal(route.count[(m ? d->E[0] : 0) + e],
                         e < d->K[m] ? (m ? c->batch.dims->n_image : c->batch.dims->n_text) : 0);
    for (int r = 0; r < used_rows(c) && !nan; r++) {
      int m = modality_of(c, r), K = d->K[m];
      for (int j = 0; j < K; j++)
        assert_true(fabs((double)weights[r * kmax + j] - 1.0 / (K == 1 ? d->E[m] : K)) < 1e-6);
    }
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_router), cmocka_unit_test(test_router_ties)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
