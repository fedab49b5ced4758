#include "trainer/losses.h"

#include <math.h>
#include <stdlib.h>

static double load_max(const double *load, const Dims *d) {
  double worst = 0;
  for (int l = 0; l < d->L; l++) {
    for (int m = 0; m < MODALITIES; m++) {
      double sum = 0, most = 0;
      for (int i = 0; i < d->E[m]; i++, load++) {
        sum += *load;
        most = fmax(most, *load);
      }
      if (sum > 0) worst = fmax(worst, most * d->E[m] / sum);
    }
  }
  return worst;
}

StepLosses losses_read(const Engine *e) {
  const Config *c = e->config;
  Dims d = dims_from_config(c, 1, 1);
  size_t bytes = (size_t)metrics_size(&d) * sizeof(double);
  double *sums = xmalloc(bytes);
  e->model.backend->download(sums, engine_slab(e, SPACE_METRICS), bytes);
  const Metrics *m = (const Metrics *)sums;
  double targets = m->targets[0] + m->targets[1];
  StepLosses l = {.ce_caption = m->nll[TARGET_CAPTION] / m->targets[TARGET_CAPTION],
                  .ce_text = m->nll[TARGET_TEXT] / m->targets[TARGET_TEXT],
                  .ce = (m->nll[0] + m->nll[1]) / fmax(targets, 1),
                  .flow = m->flow / fmax(m->flow_elems, 1),
                  .balance = m->balance,
                  .z = m->z,
                  .targets = targets,
                  .noised_tokens = m->flow_elems / d.P,
                  .load_max = load_max(sums + sizeof(Metrics) / sizeof(double), &d)};
  l.total = l.flow + c->train.ce_weight * l.ce + l.balance + l.z;
  free(sums);
  return l;
}
