// Routers: logits, the choice of experts and its weights, the sort of assignments; the router losses; their gradient.
#include "kernels/cpu/reference/rows.h"

#include <stdlib.h>

static const int one[MODALITIES] = {1, 1};

// Row r's logits [E_m] in the two-sided buffer; filler rows lie in the image view.
static int64_t logits_at(const KernelCall *c, int64_t r) {
  int m = row_modality(c, r);
  return two_sided_base(c->dims->T, one, c->dims->E, m) + r * c->dims->E[m];
}

static int group_of(const KernelCall *c, int m, int64_t e) {
  return (m == IMAGE ? c->dims->E[TEXT] : 0) + (int)e;
}

// log sum exp(s [E])
static double log_sum_exp(const double *s, int E) {
  double top = s[0], sum = 0;
  for (int e = 1; e < E; e++) top = fmax(top, s[e]);
  for (int e = 0; e < E; e++) sum += exp(s[e] - top);
  return top + log(sum);
}

// The j-th largest of s [E] given the j larger ones; ties to the lower index.
static int next_choice(const double *s, int E, const int32_t *chosen, int j) {
  int best = -1;
  for (int e = 0; e < E; e++) {
    int taken = 0;
    for (int i = 0; i < j; i++) taken |= chosen[i] == e;
    if (!taken && (best < 0 || s[e] > s[best])) best = e;
  }
  return best;
}

void reference_ROUTER_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const double *h = c->in.ROUTER_FWD.h;                                            // [T, C]
  double *logits = c->out.ROUTER_FWD.logits, *weights = c->out.ROUTER_FWD.weights; // two-sided [T, E], [T, Kmax]
  const int64_t C = d->C, kmax = dims_kmax(d);
  Route route;
  memset(c->out.ROUTER_FWD.route, -1, (size_t)route_bind(&route, d, c->out.ROUTER_FWD.route) * sizeof(int32_t));
  memset(weights, 0, (size_t)(d->T * kmax) * sizeof *weights);
  for (int64_t r = 0; r < d->T; r++) {
    const int m = row_modality(c, r), E = d->E[m], K = d->K[m];
    const double *Wr = c->in.ROUTER_FWD.wr[m]; // [E, C]
    double *s = logits + logits_at(c, r), chosen_sum = 0;
    int32_t *chosen = route.slot + r * kmax; // experts until the sort below
    for (int e = 0; e < E; e++) {
      s[e] = 0;
      for (int64_t i = 0; i < C && r < used_rows(c); i++) s[e] += h[r * C + i] * Wr[e * C + i];
    }
    if (r >= used_rows(c)) continue;
    const int64_t i = r - (m == TEXT ? 0 : c->batch->dims->n_text); // row of its modality
    for (int j = 0; j < K; j++)
      chosen[j] = c->args->router.even ? (int32_t)((i * K + j) % E) : next_choice(s, E, chosen, j);
    double lse = log_sum_exp(s, E);
    for (int j = 0; j < K; j++) chosen_sum += exp(s[chosen[j]] - lse);
    for (int j = 0; j < K; j++) weights[r * kmax + j] = exp(s[chosen[j]] - lse) / (K == 1 ? 1 : chosen_sum);
  }
  // Slots in order of (expert, row).
  int32_t *expert = xcalloc((size_t)(d->T * kmax), sizeof *expert);
  memcpy(expert, route.slot, (size_t)(d->T * kmax) * sizeof *expert);
  for (int m = 0; m < MODALITIES; m++) {
    int32_t at = m == TEXT ? 0 : c->batch->dims->n_text * d->K[IMAGE];
    for (int e = 0; e < d->E[m]; e++) {
      int g = group_of(c, m, e);
      route.begin[g] = at;
      for (int64_t r = 0; r < used_rows(c); r++) {
        for (int64_t j = 0; j < d->K[m]; j++) {
          if (row_modality(c, r) != m || expert[r * kmax + j] != e) continue;
          route.slot[r * kmax + j] = at;
          route.source[m][at++] = (int32_t)(r * kmax + j);
        }
      }
      route.count[g] = at - route.begin[g];
    }
  }
  free(expert);
}

// Rows of modality m, and the fraction f_e of their assignments that went to expert e.
static double rows_of(const KernelCall *c, int m) {
  return m == TEXT ? c->batch->dims->n_text : c->batch->dims->n_image;
}
static double fraction(const KernelCall *c, const Route *route, int m, int64_t e) {
  return route->count[group_of(c, m, e)] / (rows_of(c, m) * c->dims->K[m]);
}

void reference_ROUTER_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  const double *logits = c->in.ROUTER_LOSS.logits; // two-sided [T, E]
  const Route route = route_of(c, c->in.ROUTER_LOSS.route);
  Metrics *metrics = c->out.ROUTER_LOSS.metrics;
  const double scale = (double)c->batch->dims->router_scale;
  double *load = (double *)(metrics + 1) + c->args->router.layer * (d->E[TEXT] + d->E[IMAGE]); // [E_0 + E_1]
  for (int g = 0; g < d->E[TEXT] + d->E[IMAGE]; g++) load[g] += route.count[g];
  // balance E sum_e f_e P_e + z mean(lse^2), P_e and the mean over the modality's rows
  for (int64_t r = 0; r < used_rows(c); r++) {
    const int m = row_modality(c, r), E = d->E[m];
    const double *s = logits + logits_at(c, r), lse = log_sum_exp(s, E), n = rows_of(c, m);
    for (int e = 0; e < E; e++)
      metrics->balance += scale * c->args->router.balance * E * fraction(c, &route, m, e) * exp(s[e] - lse) / n;
    metrics->z += scale * c->args->router.z * lse * lse / n;
  }
}

// ds [E] of row r: through the weights of the chosen, and the router losses.
static void logits_gradient(const KernelCall *c, const Route *route, int64_t r, double *ds) {
  const Dims *d = c->dims;
  const int m = row_modality(c, r), E = d->E[m], K = d->K[m];
  const int64_t kmax = dims_kmax(d);
  const double *s = (const double *)c->in.ROUTER_BWD.logits + logits_at(c, r), lse = log_sum_exp(s, E);
  const double *w = (const double *)c->in.ROUTER_BWD.weights + r * kmax;
  const double *dw = (const double *)c->in.ROUTER_BWD.dweights + r * kmax;
  const double by_row = (double)c->batch->dims->router_scale / rows_of(c, m);
  const double balance = c->args->router.balance * E * by_row, z = c->args->router.z * by_row;
  double mean_fraction = 0, mean_dw = 0;
  for (int e = 0; e < E; e++) mean_fraction += fraction(c, route, m, e) * exp(s[e] - lse);
  for (int j = 0; j < K; j++) mean_dw += w[j] * dw[j];
  for (int e = 0; e < E; e++) {
    double p = exp(s[e] - lse);
    ds[e] = p * (balance * (fraction(c, route, m, e) - mean_fraction) + 2 * z * lse);
    if (K == 1) ds[e] -= p * mean_dw; // the weight is a full-softmax probability
  }
  for (int j = 0; j < K; j++) {
    int64_t e = slot_expert(c, route, m, route->slot[r * kmax + j]);
    ds[e] += K == 1 ? mean_dw : w[j] * (dw[j] - mean_dw);
  }
}

void reference_ROUTER_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const double *h = c->in.ROUTER_BWD.h, *add = c->in.ROUTER_BWD.add; // [T, C]
  const Route route = route_of(c, c->in.ROUTER_BWD.route);
  double *dh = c->out.ROUTER_BWD.dh; // [T, C]
  const int64_t C = d->C;
  double *ds = xcalloc((size_t)(d->E[TEXT] + d->E[IMAGE]), sizeof *ds);
  for (int m = 0; m < MODALITIES && !c->args->accumulate; m++)
    memset(c->out.ROUTER_BWD.dwr[m], 0, (size_t)(d->E[m] * C) * sizeof(double));
  for (int64_t i = 0; i < d->T * C; i++) dh[i] = add && i < used_rows(c) * C ? add[i] : 0;
  for (int64_t r = 0; r < used_rows(c); r++) {
    const int m = row_modality(c, r);
    const double *Wr = c->in.ROUTER_BWD.wr[m]; // [E, C]
    double *dWr = c->out.ROUTER_BWD.dwr[m];    // [E, C]
    logits_gradient(c, &route, r, ds);
    for (int e = 0; e < d->E[m]; e++) {
      for (int64_t i = 0; i < C; i++) {
        dh[r * C + i] += ds[e] * Wr[e * C + i];
        dWr[e * C + i] += ds[e] * h[r * C + i];
      }
    }
  }
  free(ds);
}
