#include "model/losses.h"

#include "model/params.h"

#include <math.h>
#include <stdlib.h>

int load_shares(const double *load, const Dims *d, int layer, int m, double *out) {
  int E = d->E[m];
  const double *at = load + (int64_t)layer * (d->E[TEXT] + d->E[IMAGE]) + (m == TEXT ? 0 : d->E[TEXT]); // [E]
  double sum = 0;
  for (int i = 0; i < E; i++) sum += at[i];
  for (int i = 0; i < E && sum > 0; i++) out[i] = at[i] * E / sum;
  return sum > 0 ? E : 0;
}

void load_figures(const double *load, const Dims *d, LoadFigures out[MODALITIES]) {
  for (int m = 0; m < MODALITIES; m++) {
    int E = d->E[m], layers = 0;
    double *share = xmalloc((size_t)E * sizeof *share), entropy = 0, most = 0;
    out[m] = (LoadFigures){.entropy = NAN, .max_over_mean = NAN, .experts = d->L * E};
    for (int l = 0; l < d->L; l++) {
      if (!load_shares(load, d, l, m, share)) {
        out[m].dead += E;
        continue;
      }
      double sum = 0;
      for (int i = 0; i < E; i++) {
        most = fmax(most, share[i]);
        out[m].dead += share[i] == 0;
        if (share[i] > 0) sum -= share[i] / E * log(share[i] / E);
      }
      entropy += E > 1 ? sum / log(E) : 1;
      layers++;
    }
    free(share);
    if (!layers) continue;
    out[m].entropy = entropy / layers;
    out[m].max_over_mean = most;
  }
}

StepLosses losses_of(const Config *c, const double *metrics) {
  Dims d = dims_from_config(c, 1, 1);
  const Metrics *m = (const Metrics *)metrics;
  double targets = m->targets[0] + m->targets[1];
  LoadFigures load[MODALITIES];
  load_figures(metrics_load(metrics), &d, load);
  StepLosses l = {.ce_caption = m->nll[TARGET_CAPTION] / m->targets[TARGET_CAPTION],
                  .ce_text = m->nll[TARGET_TEXT] / m->targets[TARGET_TEXT],
                  .ce = (m->nll[0] + m->nll[1]) / targets,
                  .flow = m->flow / m->flow_elems,
                  .balance = m->balance,
                  .z = m->z,
                  .targets = targets,
                  .noised_tokens = m->flow_elems / d.P,
                  .load_max = fmax(fmax(load[TEXT].max_over_mean, load[IMAGE].max_over_mean), 0)}; // of NAN and x: x
  l.total = (m->flow_elems ? l.flow : 0) + (targets ? c->train.ce_weight * l.ce : 0) + l.balance + l.z;
  return l;
}
