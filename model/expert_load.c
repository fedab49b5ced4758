#include "model/expert_load.h"

#include "base/base.h"

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
