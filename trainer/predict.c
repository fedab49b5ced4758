#include "trainer/predict.h"

#include <stdlib.h>

Simulation predict_program(const Costs *c, const Program *p) {
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
static Simulation play_passes(const Engine *e, const Costs *c, int ema) {
  Simulation sum = {0}, s = {0};
  const ModelProgram *played = NULL;
  for (int k = 0; k < e->config->train.micro_batches; k++) {
    const ModelProgram *m = k ? engine_micro_step(e, k) : engine_first_step(e, ema);
    if (m != played) s = predict_program(c, m->program);
    played = m;
    add(&sum, 1, &s);
  }
  return sum;
}

double predict_step(const Engine *e, int ema) {
  return play_passes(e, &e->costs, ema).seconds + predict_program(&e->costs, ema ? e->update_ema : e->update).seconds;
}

// Updates with and without EMA, as they take turns.
static Simulation play_update(const Engine *e, const Costs *c) {
  Simulation update = {0}, plain = predict_program(c, e->update);
  double share = e->update_ema ? 1.0 / e->config->train.ema_every : 0;
  add(&update, 1 - share, &plain);
  if (e->update_ema) {
    Simulation ema = predict_program(c, e->update_ema);
    add(&update, share, &ema);
  }
  return update;
}

double predict_update(const Engine *e) {
  return play_update(e, &e->costs).seconds;
}

// "; copies of the update: to the host 8.15 ms, from it 8.15 ms, 52.1% hidden"
static void print_copies(const char *of, const Simulation *s, FILE *f) {
  if (s->busy[LANE_D2H] + s->busy[LANE_H2D] == 0) return;
  fprintf(f, "; copies of %s: to the host %.2f ms, from it %.2f ms, %.1f%% hidden", of, 1e3 * s->busy[LANE_D2H],
          1e3 * s->busy[LANE_H2D], 100 * simulation_hidden(s));
}

void predict_print(const Engine *e, FILE *f) {
  Simulation passes = play_passes(e, &e->costs, 0), update = play_update(e, &e->costs), step = passes;
  add(&step, 1, &update);
  fprintf(f, "a step: predicted %.2f ms, %.2f of them the update", 1e3 * step.seconds, 1e3 * update.seconds);
  print_copies("the passes", &passes, f);
  print_copies("the update", &update, f);
  fputc('\n', f);
}

Collectives predict_collectives(const Engine *e) {
  Simulation with = play_passes(e, &e->costs, 0), update = play_update(e, &e->costs);
  add(&with, 1, &update);
  Costs alone = e->costs;
  alone.processes = 1; // what is left of a step's time when they take none
  Simulation without = play_passes(e, &alone, 0);
  update = play_update(e, &alone);
  add(&without, 1, &update);
  double seconds = with.busy[LANE_COMM];
  return (Collectives){seconds, e->model.backend->queues ? with.stalled - without.stalled : seconds};
}

void predict_print_group(const Engine *e, FILE *f) {
  const GroupRates *g = &e->costs.group;
  const Collectives of_step = predict_collectives(e);
  fprintf(f,
          "collectives of %d processes: %.4g GB/s reduced, %.4g gathered, %.0f us each (%s); %.2f ms of a step, %.2f "
          "ms of them exposed\n",
          e->config->processes, g->reduce / 1e9, g->gather / 1e9, 1e6 * g->latency,
          g->measured ? "measured" : "assumed", 1e3 * of_step.seconds, 1e3 * of_step.exposed);
}
