// Routers: logits, top-k, the sort of assignments by expert, the router losses and their gradient. As plain
// loops: reference/router.c.
#include "kernels/cpu/cpu.h"

enum {
  GRAD_ROWS = 128,    // rows of logit gradients at a time
  GRAD_COLUMNS = 512, // columns of a router weight gradient that one task forms
  LOSS_BLOCKS = 32    // fixed split of the rows for sums over them
};

// Rows [first, first + n) and logits of each modality.
typedef struct Side {
  int64_t first, n, E, K;
  int64_t base; // of its view in the two-sided logits [T, E]
} Side;

static void sides_of(const KernelCall *c, Side side[MODALITIES]) {
  const Dims *d = c->dims;
  const BatchDims *n = c->batch->dims;
  const int one[MODALITIES] = {1, 1};
  for (int m = 0; m < MODALITIES; m++)
    side[m] = (Side){.first = m == TEXT ? 0 : n->n_text,
                     .n = m == TEXT ? n->n_text : n->n_image,
                     .E = d->E[m],
                     .K = d->K[m],
                     .base = two_sided_base(d->T, one, d->E, m)};
}

// p [E] = softmax(s); returns log sum exp(s).
static real softmax_full(const real *s, int64_t E, real *p) {
  real top = s[0], sum = 0;
  for (int64_t e = 1; e < E; e++) top = s[e] > top ? s[e] : top;
  for (int64_t e = 0; e < E; e++) {
    p[e] = real_exp(s[e] - top);
    sum += p[e];
  }
  for (int64_t e = 0; e < E; e++) p[e] /= sum;
  return top + (real)log((double)sum);
}

// The K largest of s [E], ties to the lower index; distinct valid indices also when s holds NaN.
static void choose_top(const real *s, int64_t E, int64_t K, int32_t *chosen) {
  for (int64_t j = 0; j < K; j++) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; e++) {
      int taken = 0;
      for (int64_t i = 0; i < j; i++) taken |= chosen[i] == e;
      if (!taken && (best < 0 || s[e] > s[best])) best = e;
    }
    chosen[j] = (int32_t)best;
  }
}

// Row i of a modality takes the experts in turn.
static void choose_in_turn(int64_t i, int64_t E, int64_t K, int32_t *chosen) {
  for (int64_t j = 0; j < K; j++) chosen[j] = (int32_t)((i * K + j) % E);
}

// weight [K] of the chosen experts: softmax over them, or the full-softmax probability when there is one.
static void chosen_weights(const real *s, int64_t E, int64_t K, const int32_t *chosen, real *weight) {
  real top = s[chosen[0]], sum = 0;
  if (K == 1) {
    for (int64_t e = 0; e < E; e++) sum += real_exp(s[e] - top);
    weight[0] = 1 / sum;
    return;
  }
  for (int64_t j = 0; j < K; j++) {
    weight[j] = real_exp(s[chosen[j]] - top);
    sum += weight[j];
  }
  for (int64_t j = 0; j < K; j++) weight[j] /= sum;
}

// Counting sort of one modality's assignments by (expert, row): route->slot holds the chosen experts and receives
// slots.
static void sort_assignments(const Side *side, int64_t kmax, int32_t *begin, int32_t *count, int32_t *slot,
                             int32_t *source) {
  memset(count, 0, (size_t)side->E * sizeof *count);
  for (int64_t r = side->first; r < side->first + side->n; r++)
    for (int64_t j = 0; j < side->K; j++) count[slot[r * kmax + j]]++;
  int32_t at = (int32_t)(side->first * side->K);
  for (int64_t e = 0; e < side->E; e++) {
    begin[e] = at;
    at += count[e];
  }
  const Scratch scratch = scratch_take(side->E * (int64_t)sizeof(int32_t));
  int32_t *next = scratch_own(&scratch); // [E]
  memcpy(next, begin, (size_t)side->E * sizeof *next);
  for (int64_t r = side->first; r < side->first + side->n; r++) {
    for (int64_t j = 0; j < side->K; j++) {
      int32_t to = next[slot[r * kmax + j]]++;
      source[to] = (int32_t)(r * kmax + j);
      slot[r * kmax + j] = to;
    }
  }
}

void cpu_ROUTER_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const real *h = c->in.ROUTER_FWD.h;        // [T, C]
  real *logits = c->out.ROUTER_FWD.logits;   // [T, E], two-sided
  real *weights = c->out.ROUTER_FWD.weights; // [T, Kmax]
  int64_t kmax = dims_kmax(d), C = d->C;
  Side side[MODALITIES];
  sides_of(c, side);
  Route route;
  int64_t route_size = route_bind(&route, d, c->out.ROUTER_FWD.route);
  memset(c->out.ROUTER_FWD.route, -1, (size_t)route_size * sizeof(int32_t));
  memset(weights, 0, (size_t)(d->T * kmax) * sizeof *weights);

  GemmItem items[MODALITIES];
  for (int m = 0; m < MODALITIES; m++)
    items[m] = (GemmItem){.M = side[m].n,
                          .N = side[m].E,
                          .K = C,
                          .lda = C,
                          .ldb = C,
                          .ldc = side[m].E,
                          .A = h + side[m].first * C,
                          .B = c->in.ROUTER_FWD.wr[m], // Wr [E, C]
                          .C = logits + side[m].base + side[m].first * side[m].E};
  gemm_batch(0, 1, 0, items, MODALITIES);
  int64_t used = side[IMAGE].first + side[IMAGE].n, E = side[IMAGE].E;
  memset(logits + side[IMAGE].base + used * E, 0, (size_t)((d->T - used) * E) * sizeof *logits);

#pragma omp parallel for
  for (int64_t r = 0; r < used; r++) {
    const Side *s = &side[r < side[IMAGE].first ? TEXT : IMAGE];
    const real *row = logits + s->base + r * s->E;
    if (c->args->router.even)
      choose_in_turn(r - s->first, s->E, s->K, route.slot + r * kmax);
    else
      choose_top(row, s->E, s->K, route.slot + r * kmax);
    chosen_weights(row, s->E, s->K, route.slot + r * kmax, weights + r * kmax);
  }
  for (int m = 0; m < MODALITIES; m++) {
    int64_t g = m == TEXT ? 0 : d->E[TEXT];
    sort_assignments(&side[m], kmax, route.begin + g, route.count + g, route.slot, route.source[m]);
  }
}

void cpu_ROUTER_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  const real *logits = c->in.ROUTER_LOSS.logits; // [T, E], two-sided
  Route route;
  route_bind(&route, d, (int32_t *)(uintptr_t)c->in.ROUTER_LOSS.route);
  Metrics *metrics = c->out.ROUTER_LOSS.metrics;
  int64_t groups = d->E[TEXT] + d->E[IMAGE];
  double *load = (double *)(metrics + 1) + c->args->router.layer * groups; // [E_0 + E_1]
  for (int64_t g = 0; g < groups; g++) load[g] += route.count[g];

  Side side[MODALITIES];
  sides_of(c, side);
  double scale = (double)c->batch->dims->router_scale;
  for (int m = 0; m < MODALITIES; m++) {
    const Side *s = &side[m];
    if (s->n == 0) continue;
    int64_t E = s->E, block_rows = (s->n + LOSS_BLOCKS - 1) / LOSS_BLOCKS;
    int64_t sums = LOSS_BLOCKS * (E + 1);
    const Scratch scratch = scratch_take((sums + LOSS_BLOCKS * E) * (int64_t)sizeof(double));
    double *partial = scratch_own(&scratch); // [block][E probabilities, lse^2]
    real *rows = (real *)(partial + sums);   // [block][E]
    memset(partial, 0, (size_t)sums * sizeof *partial);
#pragma omp parallel for
    for (int64_t block = 0; block < LOSS_BLOCKS; block++) {
      double *sum = partial + block * (E + 1);
      real *p = rows + block * E;
      int64_t end = (block + 1) * block_rows < s->n ? (block + 1) * block_rows : s->n;
      for (int64_t r = block * block_rows; r < end; r++) {
        double lse = (double)softmax_full(logits + s->base + (s->first + r) * E, E, p);
        for (int64_t e = 0; e < E; e++) sum[e] += (double)p[e];
        sum[E] += lse * lse;
      }
    }
    const int32_t *count = route.count + (m == TEXT ? 0 : d->E[TEXT]);
    double balance = 0, z = 0, n = (double)s->n;
    for (int64_t block = 0; block < LOSS_BLOCKS; block++) {
      const double *sum = partial + block * (E + 1);
      for (int64_t e = 0; e < E; e++) balance += count[e] / (n * (double)s->K) * sum[e] / n;
      z += sum[E] / n;
    }
    metrics->balance += scale * c->args->router.balance * (double)E * balance;
    metrics->z += scale * c->args->router.z * z;
  }
}

// What the gradient of a modality's logits depends on.
typedef struct LogitGradient {
  const Side *side;
  const real *logits, *weights, *dweights; // logits: the modality's view
  const int32_t *slot, *begin, *count;
  int64_t kmax;
  real balance, z; // router loss coefficients, all scales applied, by row
} LogitGradient;

// The expert an assignment went to: the last with begin <= slot that has rows.
static int64_t expert_of(const LogitGradient *g, int32_t slot) {
  int64_t e = 0;
  while (slot >= g->begin[e] + g->count[e]) e++;
  return e;
}

// out [E] = gradient of row r's logits.
static void logit_gradient(const LogitGradient *g, int64_t r, real *out) {
  int64_t E = g->side->E, K = g->side->K;
  const real *w = g->weights + r * g->kmax, *dw = g->dweights + r * g->kmax;
  real *p = out, lse = softmax_full(g->logits + r * E, E, p), mean_load = 0, dot = 0;
  real assignments = (real)(g->side->n * K);
  for (int64_t e = 0; e < E; e++) mean_load += (real)g->count[e] / assignments * p[e];
  for (int64_t j = 0; j < K; j++) dot += w[j] * dw[j];
  // A single choice is weighted by its full-softmax probability, which every logit moves.
  real spread = K == 1 ? dot : 0;
  for (int64_t e = 0; e < E; e++) {
    real excess = (real)g->count[e] / assignments - mean_load;
    out[e] = p[e] * (g->balance * excess + g->z * 2 * lse - spread);
  }
  for (int64_t j = 0; j < K; j++) out[expert_of(g, g->slot[r * g->kmax + j])] += K == 1 ? dot : w[j] * (dw[j] - dot);
}

// Columns [c0, c0 + width) of dWr [E, C] of one modality, over all its rows. dlogits: room for [GRAD_ROWS, E].
static void weight_gradient(const KernelCall *c, const LogitGradient *g, int m, int64_t c0, int64_t width,
                            real *dlogits) {
  const real *h = c->in.ROUTER_BWD.h;   // [T, C]
  real *dwr = c->out.ROUTER_BWD.dwr[m]; // [E, C]
  const Side *s = g->side;
  int64_t C = c->dims->C;
  real keep = c->args->accumulate ? 1 : 0;
  if (s->n == 0) gemm_serial(1, 0, s->E, width, 0, 1, dlogits, s->E, h, C, keep, dwr + c0, C);
  for (int64_t r = s->first; r < s->first + s->n; r += GRAD_ROWS) {
    int64_t left = s->first + s->n - r, rows = left < GRAD_ROWS ? left : GRAD_ROWS;
    for (int64_t i = 0; i < rows; i++) logit_gradient(g, r + i, dlogits + i * s->E);
    gemm_serial(1, 0, s->E, width, rows, 1, dlogits, s->E, h + r * C + c0, C, keep, dwr + c0, C);
    keep = 1;
  }
}

// Up to GRAD_ROWS rows of dh [T, C] from row r on, all of one modality. dlogits: likewise.
static void input_gradient(const KernelCall *c, const LogitGradient *g, int m, int64_t r, real *dlogits) {
  const real *wr = c->in.ROUTER_BWD.wr[m]; // [E, C]
  const real *add = c->in.ROUTER_BWD.add;  // [T, C] or NULL
  real *dh = c->out.ROUTER_BWD.dh;         // [T, C]
  const Side *s = g->side;
  int64_t C = c->dims->C, left = s->first + s->n - r, rows = left < GRAD_ROWS ? left : GRAD_ROWS;
  for (int64_t i = 0; i < rows; i++) logit_gradient(g, r + i, dlogits + i * s->E);
  if (add) memcpy(dh + r * C, add + r * C, (size_t)(rows * C) * sizeof *dh);
  gemm_serial(0, 0, rows, C, s->E, 1, dlogits, s->E, wr, C, add ? 1 : 0, dh + r * C, C);
}

void cpu_ROUTER_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  real *dh = c->out.ROUTER_BWD.dh; // [T, C]
  int64_t C = d->C;
  Route route;
  route_bind(&route, d, (int32_t *)(uintptr_t)c->in.ROUTER_BWD.route);
  Side side[MODALITIES];
  sides_of(c, side);
  LogitGradient gradient[MODALITIES];
  int64_t row_blocks[MODALITIES], column_blocks = (C + GRAD_COLUMNS - 1) / GRAD_COLUMNS;
  for (int m = 0; m < MODALITIES; m++) {
    const Side *s = &side[m];
    int64_t g = m == TEXT ? 0 : d->E[TEXT];
    double by_row = s->n ? (double)c->batch->dims->router_scale / (double)s->n : 0;
    gradient[m] = (LogitGradient){.side = s,
                                  .logits = (const real *)c->in.ROUTER_BWD.logits + s->base,
                                  .weights = c->in.ROUTER_BWD.weights,
                                  .dweights = c->in.ROUTER_BWD.dweights,
                                  .slot = route.slot,
                                  .begin = route.begin + g,
                                  .count = route.count + g,
                                  .kmax = dims_kmax(d),
                                  .balance = (real)(c->args->router.balance * (double)s->E * by_row),
                                  .z = (real)(c->args->router.z * by_row)};
    row_blocks[m] = (s->n + GRAD_ROWS - 1) / GRAD_ROWS;
  }
  // Both kinds of task form the logit gradients they need, E numbers a row; the longer kind comes first.
  int64_t weight_tasks = MODALITIES * column_blocks, most = d->E[TEXT] > d->E[IMAGE] ? d->E[TEXT] : d->E[IMAGE];
  const Scratch scratch = scratch_take(GRAD_ROWS * most * (int64_t)sizeof(real));
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < weight_tasks + row_blocks[TEXT] + row_blocks[IMAGE]; task++) {
    real *dlogits = scratch_own(&scratch);
    if (task < weight_tasks) {
      int64_t c0 = task / MODALITIES * GRAD_COLUMNS;
      int m = (int)(task % MODALITIES);
      weight_gradient(c, &gradient[m], m, c0, C - c0 < GRAD_COLUMNS ? C - c0 : GRAD_COLUMNS, dlogits);
      continue;
    }
    int64_t block = task - weight_tasks;
    int m = block < row_blocks[TEXT] ? TEXT : IMAGE;
    if (m == IMAGE) block -= row_blocks[TEXT];
    input_gradient(c, &gradient[m], m, side[m].first + block * GRAD_ROWS, dlogits);
  }
  int64_t used = side[IMAGE].first + side[IMAGE].n;
  memset(dh + used * C, 0, (size_t)((d->T - used) * C) * sizeof *dh);
}
