#include "trainer/output/figures.h"

#include "model/expert_load.h"

#include <math.h>
#include <string.h>

static double targets(const StepSums *s) {
  return s->m.targets[0] + s->m.targets[1];
}

static double noised_tokens(const Config *c, const StepSums *s) {
  return s->m.flow_elems / (3.0 * c->model.patch * c->model.patch);
}

static double mean_ce_of(const StepSums *s, int target_kind) {
  return s->m.nll[target_kind] / s->m.targets[target_kind];
}

static double mean_ce(const StepSums *s) {
  return (s->m.nll[0] + s->m.nll[1]) / targets(s);
}

static double mean_flow(const StepSums *s) {
  return s->m.flow / s->m.flow_elems;
}

// What is minimised: of the losses that there are.
static double total_loss(const Config *c, const StepSums *s) {
  return (s->m.flow_elems ? mean_flow(s) : 0) + (targets(s) ? c->train.ce_weight * mean_ce(s) : 0) + s->m.balance +
         s->m.z;
}

static double mfu(const StepSums *s) {
  return s->peak_flops > 0 ? s->flops / s->seconds / s->peak_flops : NAN;
}

const FigureInfo figure_info[FIGURES] = {
#define FIGURE_ROW(id, unit, key, tag, dump, line, scale, value) {unit, key, tag, dump, line, scale},
    STEP_FIGURES(FIGURE_ROW)
#undef FIGURE_ROW
};

void figures_sum(const Config *c, const double *metrics, StepSums *s) {
  Dims d = dims_from_config(c, 1, 1);
  LoadFigures load[MODALITIES];
  memcpy(&s->m, metrics, sizeof s->m);
  load_figures(metrics_load(metrics), &d, load);
  s->load_max = fmax(fmax(load[TEXT].max_over_mean, load[IMAGE].max_over_mean), 0); // of NAN and x: x
}

void figures_of(const Config *c, const StepSums *s, double figure[FIGURES]) {
#define FIGURE_VALUE(id, unit, key, tag, dump, line, scale, value) figure[FIGURE_##id] = value;
  STEP_FIGURES(FIGURE_VALUE)
#undef FIGURE_VALUE
}

void figures_print(FILE *f, const double figure[FIGURES]) {
  for (int i = 0; i < FIGURES; i++) {
    const char *line = figure_info[i].line;
    if (!line) continue;
    if (isfinite(figure[i]))
      fprintf(f, line, figure_info[i].scale * figure[i]);
    else if (line[1] != '(')
      fprintf(f, "%.*s-", (int)strcspn(line, "%"), line);
  }
}
