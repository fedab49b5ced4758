#include "trainer/watch.h"

#include "base/ranks.h"
#include "model/optimizer.h"
#include "trainer/costs.h"
#include "trainer/measure.h"
#include "trainer/predict.h"

#include <math.h>
#include <stdlib.h>

static const double too_much = .02; // of the prediction; as much as a device's pace changes from run to run

// ---- for the next start, rank 0's ----

static void keep_costs(const Watch *w, const Engine *e) {
  Error err;
  if (ranks_rank() == 0 && costs_keep(e->config, e->model.backend, w->run, &e->costs, &err) != 0)
    log_warn("%s: the next start times ops again", err.text);
}

static void keep_plan(const Watch *w, const Engine *e) {
  Error err;
  if (e->chosen != MEMORY_AUTO || ranks_rank() > 0) return;
  char *path = xasprintf("%s/" PLAN_FILE, w->run);
  if (policy_file_save(&e->policy, path, &err) != 0) log_warn("%s: a resume plans again", err.text);
  free(path);
}

Watch watch_open(const Engine *e, const char *run, int64_t from, int profiled) {
  int is_on = e->model.backend->queues && e->config->memory.arena;
  Watch w = {
      .run = run, .is_on = is_on, .due = is_on, .first = from + 1, .wanted = WATCHED_STEPS - ranks_any(profiled)};
  if (!is_on && e->costs.group.measured) keep_costs(&w, e); // no op will be timed
  return w;
}

void watch_close(Watch *w) {
  free(w->times);
  w->times = NULL;
}

int watch_due(const Watch *w) {
  return w->due;
}

// ---- timing ----

static void predict(Watch *w, const Engine *e) {
  for (int ema = 0; ema < 2; ema++) w->predicted[ema] = predict_step(e, ema && e->update_ema);
}

int watch_pack(Watch *w, Engine *e, const void *pack, const Extents *extents, int64_t step, Error *err) {
  if (!w->due) return 0;
  int timed = measure_train(e, pack, extents, w->rounds > 0);
  if (timed) keep_costs(w, e);
  if (timed && engine_plan_again(e, err) < 0) return -1; // by the same times the plan is the same
  keep_plan(w, e);
  predict(w, e);
  w->due = 0;
  w->rounds++;
  w->on_zeros = timed && step == 0;
  w->first = step + 1;
  w->n = 0;
  engine_begin_step(e);
  return 0;
}

// In a first round updates whose ops have no times yet, from the second step on; in a second one each once more.
static int update_due(const Watch *w, const Engine *e, const Program *update, int64_t step) {
  int again = w->rounds > 1 && !w->has_again[update == e->update_ema];
  return w->is_on && (again || (step >= w->first && !measure_has(&e->costs, update)));
}

OpTime *watch_times(Watch *w, const Engine *e, const Program *update, int64_t step) {
  if (!update_due(w, e, update, step)) return NULL;
  free(w->times);
  return w->times = xcalloc((size_t)update->n_ops, sizeof *w->times);
}

void watch_update(Watch *w, Engine *e, const Program *update) {
  measure_note(update, w->times, &e->costs);
  if (w->rounds > 1) w->has_again[update == e->update_ema] = 1;
  predict(w, e);
  if (w->n == w->wanted) keep_costs(w, e); // else they are once that is so
}

// ---- the comparison ----

static double percent(double x, double of) {
  return 100 * (x / of - 1);
}

static int step_compare(const void *pa, const void *pb) {
  const WatchedStep *a = pa, *b = pb;
  double x = a->measured / a->predicted, y = b->measured / b->predicted;
  return (x > y) - (x < y);
}

static void log_comparison(const Watch *w, const Engine *e, const WatchedStep *s) {
  const Backend *b = e->model.backend;
  const int every = e->config->train.ema_every;
  char memory[160] = "", ema[64] = "", group[96] = "";
  if (e->update_ema && every > 1)
    snprintf(ema, sizeof ema, "; every %d steps the EMA takes %.2f ms more", every,
             1e3 * (w->predicted[1] - w->predicted[0]));
  if (b->in_use) {
    double planned = (double)engine_device_bytes(e), used = (double)(b->in_use() - e->connections);
    int n = snprintf(memory, sizeof memory, "; device memory: planned %.3f GB, in use %.3f GB (%+.2f%%)", planned / 1e9,
                     used / 1e9, percent(used, planned));
    if (e->connections)
      snprintf(memory + n, sizeof memory - (size_t)n, ", besides %.3f GB of connections", (double)e->connections / 1e9);
  }
  if (e->config->processes > 1) {
    const Collectives c = predict_collectives(e);
    snprintf(group, sizeof group, " (collectives %.2f ms, %.2f of them exposed)", 1e3 * c.seconds, 1e3 * c.exposed);
  }
  log_info("a step: predicted %.2f ms%s, measured %.2f ms (%+.1f%%)%s%s", 1e3 * s->predicted, group, 1e3 * s->measured,
           percent(s->measured, s->predicted), ema, memory);
}

void watch_step(Watch *w, Engine *e, int64_t step, double seconds) {
  if (!w->is_on || w->due || step < w->first || w->n == w->wanted) return;
  w->step[w->n++] = (WatchedStep){w->predicted[optimizer_ema_due(e->config, step)], seconds};
  if (w->n < w->wanted) return;
  qsort(w->step, (size_t)w->n, sizeof *w->step, step_compare);
  const WatchedStep *middle = &w->step[w->n / 2];
  log_comparison(w, e, middle);
  keep_costs(w, e);
  // The processes of a group do the same at the same step.
  int is_off = ranks_any(fabs(middle->measured / middle->predicted - 1) > too_much);
  if (w->rounds > 1 || !(is_off || w->on_zeros)) return;
  if (is_off)
    log_info("that is more than %.0f%% off: ops are timed again", 100 * too_much);
  else
    log_info("ops are timed again: many of the first weights were zeros");
  w->due = 1;
}
