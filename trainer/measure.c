#include "trainer/measure.h"

#include "base/ranks.h"
#include "model/program/policy.h"

#include <math.h>
#include <stdlib.h>

enum { SAMPLES = 5 };            // replays of each way, at most
static const double enough = .2; // seconds in which they begin: long replays vary less, and one is enough

// Whether another sample is to follow the n so far, which began at this time: rank 0 says.
static int goes_on(int n, double began) {
  int more = n < SAMPLES && (n == 0 || time_now() - began < enough);
  ranks_broadcast(&more, sizeof more);
  return more;
}

// Medians over replays, op by op, of the pack that was staged last. seconds: [n_ops].
static void time_ops(Program *p, double *seconds) {
  size_t ops = (size_t)p->n_ops;
  OpTime *times = xcalloc(ops, sizeof *times);
  double(*samples)[SAMPLES] = xcalloc(ops, sizeof *samples), began = time_now();
  int n = 0;
  for (; goes_on(n, began); n++) {
    program_replay(p, times);
    for (size_t i = 0; i < ops; i++) samples[i][n] = times[i].end - times[i].begin;
  }
  for (size_t i = 0; i < ops; i++) seconds[i] = median_f64(samples[i], n);
  free(samples);
  free(times);
}

// The median of whole replays, as training does them.
static double time_replays(const Queues *q, Program *p) {
  double samples[SAMPLES], began = time_now();
  int n = 0;
  for (; goes_on(n, began); n++) {
    q->record(LANE_COMPUTE, EVENT_TIMED);
    program_replay(p, NULL);
    q->record(LANE_COMPUTE, EVENT_TIMED + 1);
    q->finish(EVENT_TIMED + 1);
    samples[n] = q->seconds(EVENT_TIMED, EVENT_TIMED + 1);
  }
  return median_f64(samples, n);
}

// Measures a bound program; `alone`: with all lanes in the ops' queue.
static void measure_program(Engine *e, const ModelProgram *m, const void *pack, int alone) {
  Program *p = m->program;
  int one_queue = p->one_queue, binds = alone && !one_queue;
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds);
  p->one_queue |= binds;
  if (binds) program_bind(p, &e->bases);
  engine_run(e, m, pack, NULL); // loads kernels, captures the graph, wakes the clocks
  time_ops(p, seconds);
  seconds_close(p, seconds, seconds_gap(p, seconds, time_replays(e->model.backend->queues, p)));
  costs_note(&e->costs, p, seconds);
  engine_await(e);
  p->one_queue = one_queue;
  if (binds) program_bind(p, &e->bases);
  free(seconds);
}

int measure_has(const Costs *c, const Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane == LANE_COMPUTE && !costs_have(c, p, &p->ops[i])) return 0;
  return 1;
}

static int fits(const Engine *e, const Program *p) {
  return p->arena_bytes <= e->bytes[SPACE_ARENA] && p->host_bytes <= e->bytes[SPACE_HOST] &&
         p->scratch_bytes <= e->bytes[SPACE_SCRATCH];
}

// Has the copies carry next to nothing. All that passes through them here are gradients, which the step to come makes
// again, and a large model's would take as long as its ops, each time.
static void copies_empty(Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (op_is_copy(&p->ops[i])) p->ops[i].args.span.count = min_i64(p->ops[i].args.span.count, 256);
}

// Measures the program of a mode with everything recomputed, where it fits; returns how many were.
static int measure_recomputed(Engine *e, Mode mode, const void *pack, int again, int alone) {
  PolicyTable policy = policy_table_new(e->config->model.layers, MEMORY_RECOMPUTE);
  ModelProgram m = transformer_record(&e->model, mode, e->slots, e->segments, &policy);
  int measures = !ranks_any(!fits(e, m.program)) && ranks_any(again || !measure_has(&e->costs, m.program));
  if (measures) {
    m.program->one_queue = e->first.program->one_queue;
    m.program->use_graph = e->first.program->use_graph;
    copies_empty(m.program);
    program_bind(m.program, &e->bases);
    measure_program(e, &m, pack, alone);
  }
  program_free(m.program);
  policy_table_free(&policy);
  return measures;
}

int measure_train(Engine *e, const void *pack, const Extents *extents, int again) {
  const struct {
    const ModelProgram *of;
    Mode mode;
  } own[] = {{&e->first, e->config->train.micro_batches > 1 ? MODE_TRAIN_FIRST : MODE_TRAIN_ONLY},
             {&e->later, MODE_TRAIN_MIDDLE},
             {&e->last, MODE_TRAIN_LAST}};
  double began = time_now();
  int n = 0, alone = 0;
  if (!e->model.backend->queues || e->bases.separate) return 0;
  // Beside copies ops are slower, by which share the simulation says, and how long the whole takes depends on what
  // waits for what. Beside collectives they are timed as they run: what they lose there is no one share.
  for (size_t i = 0; i < sizeof own / sizeof *own; i++)
    alone |= own[i].of->program && program_has_copies(own[i].of->program);
  e->costs.group.drag = alone ? e->model.backend->assumed_group.drag : 0;
  e->costs.extents = *extents;
  for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
    if (!own[i].of->program) continue;
    if (ranks_any(e->chosen == MEMORY_AUTO)) n += measure_recomputed(e, own[i].mode, pack, again, alone);
    if (!ranks_any(again || !measure_has(&e->costs, own[i].of->program))) continue;
    measure_program(e, own[i].of, pack, alone);
    n++;
  }
  if (n) log_info("%d kinds of ops timed in %.1f s", e->costs.n_classes, time_now() - began);
  return n;
}

// The share of a copy's time in which copies of the other direction ran as well.
static double share_beside(const Program *p, const OpTime *times, int copy) {
  const Lane other = p->ops[copy].lane == LANE_D2H ? LANE_H2D : LANE_D2H;
  const OpTime *own = &times[copy];
  double sum = 0;
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane == other) sum += fmax(0, fmin(own->end, times[i].end) - fmax(own->begin, times[i].begin));
  return own->end > own->begin ? sum / (own->end - own->begin) : 0;
}

// What copies in both directions at once carried, if there were enough of them: on an H200 47.5 to 51.6 GB/s to the
// device at different times of the same day.
static void note_link(const Program *p, const OpTime *times, LinkRates *link) {
  const double enough_bytes = 128 << 20;
  double *const rate[] = {[LANE_D2H] = &link->both_d2h, [LANE_H2D] = &link->both_h2d};
  for (int lane = LANE_D2H; !p->one_queue && lane <= LANE_H2D; lane++) {
    double bytes = 0, seconds = 0;
    for (int i = 0; i < p->n_ops; i++) {
      if ((int)p->ops[i].lane != lane || share_beside(p, times, i) < .9) continue;
      bytes += (double)p->ops[i].args.span.count;
      seconds += times[i].end - times[i].begin - link->latency;
    }
    if (bytes >= enough_bytes && seconds > 0) *rate[lane] = bytes / seconds;
  }
}

void measure_note(const Program *p, const OpTime *times, Costs *c) {
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds);
  for (int i = 0; i < p->n_ops; i++) seconds[i] = times[i].end - times[i].begin;
  costs_note(c, p, seconds);
  note_link(p, times, &c->link);
  free(seconds);
}
