#include "trainer/predict.h"

#include "model/program/simulate.h"

#include <stdlib.h>

static Simulation play(const Costs *c, const Program *p) {
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds);
  for (int i = 0; i < p->n_ops; i++) seconds[i] = op_seconds(c, p, &p->ops[i]);
  Simulation s = simulate(p, seconds, c, NULL);
  free(seconds);
  return s;
}

static void add(Simulation *sum, double times, const Simulation *s) {
  sum->seconds += times * s->seconds;
  sum->stalled += times * s->stalled;
  for (int l = 0; l < LANE_COUNT; l++) sum->busy[l] += times * s->busy[l];
}

// The micro-steps of a step.
static Simulation play_passes(const Engine *e) {
  Simulation sum = {0}, s = {0};
  const ModelProgram *played = NULL;
  for (int k = 0; k < e->config->train.micro_batches; k++) {
    const ModelProgram *m = engine_micro_step(e, k);
    if (m != played) s = play(&e->costs, m->program);
    played = m;
    add(&sum, 1, &s);
  }
  return sum;
}

double predict_step(const Engine *e, int ema) {
  return play_passes(e).seconds + play(&e->costs, ema ? e->update_ema : e->update).seconds;
}

void predict_print(const Engine *e, FILE *f) {
  Simulation step = play_passes(e), update = {0}, plain = play(&e->costs, e->update);
  double share = e->update_ema ? 1.0 / e->config->train.ema_every : 0;
  add(&update, 1 - share, &plain);
  if (e->update_ema) {
    Simulation ema = play(&e->costs, e->update_ema);
    add(&update, share, &ema);
  }
  add(&step, 1, &update);
  fprintf(f, "a step: predicted %.2f ms, %.2f of them the update; ", 1e3 * step.seconds, 1e3 * update.seconds);
  if (step.busy[LANE_D2H] + step.busy[LANE_H2D] > 0)
    fprintf(f, "copies to the host %.2f ms, from it %.2f ms, %.1f%% hidden\n", 1e3 * step.busy[LANE_D2H],
            1e3 * step.busy[LANE_H2D], 100 * simulation_hidden(&step));
  else
    fputs("no copies\n", f);
}
