// CPU kernels: routers, experts, SwiGLU. Every op is compared with a naive reference in double written from
// kernels.h, every gradient with central differences of that reference; every call is repeated with other numbers of
// threads and must give the same bits. Built in float and in double.
#include "tests/ops/op_check.h"

#include <stdlib.h>

// ---- routers ----

typedef struct RouterRef {
  const OpCase *c;
  double *h, *wr[MODALITIES];
  int *chosen;             // [T][Kmax], fixed by the first evaluation
  double *weight, *counts; // [T][Kmax]; [E_0 + E_1]
  double balance, z, balance_loss, z_loss;
  const real *dweights, *add_seed;
} RouterRef;

static void reference_logits(const RouterRef *f, int r, double *s) {
  int m = modality_of(f->c, r), C = f->c->dims.C;
  for (int e = 0; e < f->c->dims.E[m]; e++) {
    s[e] = 0;
    for (int i = 0; i < C; i++) s[e] += f->h[r * C + i] * f->wr[m][e * C + i];
  }
}

// Chooses by sorting: descending logits, ties to the lower index.
static void reference_choice(RouterRef *f) {
  const Dims *d = &f->c->dims;
  int kmax = dims_kmax(d);
  double s[32];
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), order[32];
    reference_logits(f, r, s);
    for (int e = 0; e < d->E[m]; e++) order[e] = e;
    for (int i = 1; i < d->E[m]; i++)
      for (int j = i; j > 0 && s[order[j]] > s[order[j - 1]]; j--) {
        int t = order[j];
        order[j] = order[j - 1];
        order[j - 1] = t;
      }
    for (int j = 0; j < d->K[m]; j++) {
      f->chosen[r * kmax + j] = order[j];
      f->counts[(m ? d->E[0] : 0) + order[j]]++;
    }
  }
}

static double router_loss(void *context) {
  RouterRef *f = context;
  const Dims *d = &f->c->dims;
  const BatchDims *n = f->c->batch.dims;
  int kmax = dims_kmax(d);
  double s[32], P[MODALITIES][32] = {{0}}, total = 0;
  double rows[MODALITIES] = {n->n_text, n->n_image};
  memset(f->weight, 0, (size_t)(d->T * kmax) * sizeof *f->weight);
  f->balance_loss = f->z_loss = 0;
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), E = d->E[m], K = d->K[m];
    const int *chosen = f->chosen + r * kmax;
    double all = 0, sum = 0;
    reference_logits(f, r, s);
    for (int e = 0; e < E; e++) all += exp(s[e]);
    for (int e = 0; e < E; e++) P[m][e] += exp(s[e]) / all / rows[m];
    for (int j = 0; j < K; j++) sum += exp(s[chosen[j]]);
    for (int j = 0; j < K; j++) f->weight[r * kmax + j] = exp(s[chosen[j]]) / (K == 1 ? all : sum);
    f->z_loss += (double)n->router_scale * f->z * log(all) * log(all) / rows[m];
    for (int i = 0; i < d->C; i++) total += (double)f->add_seed[r * d->C + i] * f->h[r * d->C + i];
  }
  for (int m = 0; m < MODALITIES; m++)
    for (int e = 0; e < d->E[m] && rows[m] > 0; e++)
      f->balance_loss += (double)n->router_scale * f->balance * d->E[m] * P[m][e] * f->counts[(m ? d->E[0] : 0) + e] /
                         (rows[m] * d->K[m]);
  return total + f->balance_loss + f->z_loss + dot(f->dweights, f->weight, d->T * kmax);
}

// The route leads from assignments to slots sorted by (expert, row) and back; the used slots are exactly the packed
// range of each modality; everything else is -1.
static void check_route(const OpCase *c, const int *chosen, const double *counts, int32_t *memory) {
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
      assert_int_equal(route.count[g], (int)counts[g]);
      for (int s = at; s < at + route.count[g]; s++) {
        int source = route.source[m][s];
        assert_int_equal(chosen[source], e);
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

// More rows of each modality and more columns than the gradients' blocks hold, and rests that are odd.
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
    run_same(c, OP_ROUTER_FWD, (OpArgs){0}, OP_IN(h, wr[0], wr[1]), OP_OUT(logits, weights, route),
             SIZES(REALS(nl), REALS(nw), route_bytes));

    real *dweights = case_random(c, nw, 1), *add = seed % 2 ? case_random(c, nx, 1) : NULL;
    RouterRef f = {.c = c,
                   .h = case_double(c, h, nx),
                   .wr = {case_double(c, wr[0], d->E[0] * C), case_double(c, wr[1], d->E[1] * C)},
                   .chosen = case_bytes(c, (size_t)nw * sizeof(int), 0xff),
                   .weight = case_zeros(c, nw),
                   .counts = case_zeros(c, groups),
                   .balance = 0.7,
                   .z = 0.3,
                   .dweights = dweights,
                   .add_seed = add ? add : case_random(c, nx, 0)};
    reference_choice(&f);
    router_loss(&f);
    assert_small(relative_error(weights, f.weight, nw), CASE_TOL);
    check_route(c, f.chosen, f.counts, route);
    if (seed % 6 == 3)
      for (int m = 0; m < 2; m++) // all rows really are on one expert
        assert_int_equal((int)f.counts[m ? d->E[0] : 0], m ? c->batch.dims->n_image : c->batch.dims->n_text);
    for (int r = 0; r < used_rows(c); r++) {
      double s[32];
      int m = modality_of(c, r);
      reference_logits(&f, r, s);
      assert_small(relative_error(logits + two_sided_base(d->T, one, d->E, m) + r * d->E[m], s, d->E[m]), CASE_TOL);
    }
    int64_t filler = (T - used_rows(c)) * d->E[1];
    assert_true(all_zero(logits + nl - filler, filler));

    // Losses and loads add to what is there.
    OpArgs args = {.router = {.balance = f.balance, .z = f.z, .layer = d->L - 1}};
    double *metrics = case_zeros(c, metrics_size(d));
    for (int64_t i = 0; i < metrics_size(d); i++) metrics[i] = (double)i;
    Metrics *m = (Metrics *)metrics, prior = *m;
    run_same(c, OP_ROUTER_LOSS, args, OP_IN(logits, route), OP_OUT(metrics),
             SIZES((size_t)metrics_size(d) * sizeof(double)));
    assert_true(fabs(m->balance - prior.balance - f.balance_loss) <= CASE_TOL * (1 + f.balance_loss));
    assert_true(fabs(m->z - prior.z - f.z_loss) <= CASE_TOL * (1 + f.z_loss));
    int64_t base = (int64_t)(sizeof(Metrics) / sizeof(double)), layer = base + (d->L - 1) * groups;
    for (int64_t i = base; i < metrics_size(d); i++)
      assert_true(metrics[i] == (double)i + (i >= layer ? f.counts[i - layer] : 0));
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

    args.router.accumulate = 1;
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

// ---- experts ----

typedef struct ExpertRef {
  const OpCase *c;
  double *h, *w1[MODALITIES], *w2[MODALITIES], *weights;
  const int *expert; // [T][Kmax]
  double *out, *y;   // [T, C]; [T][Kmax][C] before weighting
  const real *dout, *add;
} ExpertRef;

static double expert_loss(void *context) {
  ExpertRef *f = context;
  const Dims *d = &f->c->dims;
  int C = d->C, kmax = dims_kmax(d);
  memset(f->out, 0, (size_t)(d->T * C) * sizeof *f->out);
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), F = d->F[m];
    for (int i = 0; i < C && f->add; i++) f->out[r * C + i] = (double)f->add[r * C + i];
    for (int j = 0; j < d->K[m]; j++) {
      int e = f->expert[r * kmax + j];
      const double *w1 = f->w1[m] + e * 2 * F * C, *w2 = f->w2[m] + e * C * F;
      double *y = f->y + (r * kmax + j) * C, a[32];
      for (int k = 0; k < F; k++) {
        double gate = 0, up = 0;
        for (int i = 0; i < C; i++) {
          gate += f->h[r * C + i] * w1[2 * k * C + i];
          up += f->h[r * C + i] * w1[(2 * k + 1) * C + i];
        }
        a[k] = gate / (1 + exp(-gate)) * up;
      }
      for (int i = 0; i < C; i++) {
        y[i] = 0;
        for (int k = 0; k < F; k++) y[i] += a[k] * w2[i * F + k];
        f->out[r * C + i] += f->weights[r * kmax + j] * y[i];
      }
    }
  }
  return dot(f->dout, f->out, d->T * C);
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
                 .expert = expert,
                 .out = case_zeros(c, nx),
                 .y = case_zeros(c, nw * C),
                 .dout = dout,
                 .add = add};
  expert_loss(&f);
  assert_small(relative_error(out, f.out, nx), CASE_TOL);
  int64_t used = used_rows(c) * C;
  assert_true(all_zero(out + used, nx - used));
  for (int64_t i = 0; i < nw; i++) {
    if (expert[i] < 0) continue;
    int m = modality_of(c, i / kmax);
    const real *row = y + two_sided_base(d->T, d->K, out_width, m) + bound.slot[i] * C;
    assert_small(relative_error(row, f.y + i * C, C), 10 * CASE_TOL);
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
  OpArgs more = {.span = {.accumulate = 1}};
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

// ---- the shared expert's activation ----

static void test_swiglu(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1}, wide[2] = {2 * d->S[0], 2 * d->S[1]};
    int64_t na = two_sided_size(d->T, one, d->S), np = two_sided_size(d->T, one, wide);
    real *pre = case_random(c, np, 2), *da = case_random(c, na, 1);
    real *a = case_poison(c, na), *dpre = case_poison(c, np), *again = case_poison(c, na);
    run_same(c, OP_SWIGLU_FWD, (OpArgs){0}, OP_IN(pre), OP_OUT(a), SIZES(REALS(na)));
    run_same(c, OP_SWIGLU_BWD, (OpArgs){0}, OP_IN(da, pre), OP_OUT(dpre, again), SIZES(REALS(np), REALS(na)));
    double worst = 0;
    for (int r = 0; r < used_rows(c); r++) {
      int m = modality_of(c, r), S = d->S[m];
      int64_t at = two_sided_base(d->T, one, d->S, m) + r * S, pre_at = two_sided_base(d->T, one, wide, m) + r * 2 * S;
      for (int i = 0; i < S; i++) {
        double gate = (double)pre[pre_at + 2 * i], up = (double)pre[pre_at + 2 * i + 1], g = (double)da[at + i];
        double sigmoid = 1 / (1 + exp(-gate)), h = 1e-5;
        double down = (gate - h) / (1 + exp(h - gate)), plus = (gate + h) / (1 + exp(-gate - h));
        worst = fmax(worst, fabs((double)a[at + i] - gate * sigmoid * up));
        worst = fmax(worst, fabs((double)again[at + i] - gate * sigmoid * up));
        worst = fmax(worst, 0.01 * fabs((double)dpre[pre_at + 2 * i] - g * up * (plus - down) / (2 * h)));
        worst = fmax(worst, fabs((double)dpre[pre_at + 2 * i + 1] - g * gate * sigmoid));
      }
    }
    assert_small(worst, CASE_DOUBLE ? 1e-10 : 2e-5);
    int64_t filler = (d->T - used_rows(c)) * d->S[1];
    assert_true(all_zero(a + na - filler, filler) && all_zero(again + na - filler, filler));
    assert_true(all_zero(dpre + np - 2 * filler, 2 * filler));
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_router),        cmocka_unit_test(test_router_ties),   cmocka_unit_test(test_experts),
      cmocka_unit_test(test_experts_large), cmocka_unit_test(test_combine_adaln), cmocka_unit_test(test_swiglu),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
