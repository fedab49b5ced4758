// The engine on a backend with queues, as a GPU's: training steps, evaluation with the EMA and profiled steps leave the
// same bits as on the plain CPU backend, whatever order the lanes run in.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/optimizer.h"
#include "model/program/policy.h"
#include "tests/ops/model_case.h"
#include "tests/unit/queued_cpu.h"
#include "model/update.h"
#include "trainer/engine_internal.h"
#include "trainer/measure.h"
#include "trainer/predict.h"
#include "trainer/slab.h"

#include "base/base.h"
#include "model/program/replay.h"
#include "tests/ops/slab_fill.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { VARIANTS = 5, STEPS = 4, MICRO = 3, PACKS = STEPS * MICRO };
static const Space spaces[] = {SPACE_WEIGHTS, SPACE_ADAM_M, SPACE_ADAM_V, SPACE_EMA};
enum { SPACES = sizeof spaces / sizeof *spaces };

// A model and the packs of a short run.
typedef struct World {
  ModelCase c; // its config, weights and pack sizes
  void *pack[PACKS];
  size_t pack_bytes;
  enum { COMM_WAITS = 1, COMM_AWAITED } unordered; // the comm lane waits for nobody, or nobody for it
  int64_t part; // elements that an op of the update covers at most; 0: as models are made
  int measured; // ops are timed before the first step
} World;

// What a run leaves.
typedef struct Outcome {
  real *state[SPACES];    // [parameters] each
  double *metrics[STEPS]; // of each step
  UpdateStatus status[STEPS];
  double seconds[STEPS]; // of each step
  double elapsed;        // with queues: what the device's clock says all steps took
  int collected;         // steps whose results were read
  float *nll;            // [T] of an evaluation with the EMA, between the last two steps
  size_t elements, metrics_bytes, nll_bytes;
  QueuedCounts first, last; // once every program has run, and before the evaluation
  int opens;                // a graph with the EMA's update, captured when that is due for the first time
} Outcome;

static void world_open(World *w, uint64_t seed, int variant) {
  *w = (World){0};
  model_case_init(&w->c, seed, variant);
  Config *c = &w->c.config;
  c->train.micro_batches = MICRO;
  c->train.ema = 0.9;
  c->train.ema_every = 2;
  c->train.steps = STEPS;
  w->pack_bytes = batch_bind(&(Batch){0}, dims_batch_shape(&w->c.ops.dims), NULL);
  for (int i = 0; i < PACKS; i++) {
    op_case_pack(&w->c.ops, i % 4 == 3 ? PACK_TEXT : PACK_MIXED);
    w->pack[i] = memcpy(xmalloc(w->pack_bytes), w->c.ops.batch.dims, w->pack_bytes);
  }
}

static void world_close(World *w) {
  for (int i = 0; i < PACKS; i++) free(w->pack[i]);
  model_case_free(&w->c);
}

static void outcome_free(Outcome *o) {
  for (int s = 0; s < SPACES; s++) free(o->state[s]);
  for (int s = 0; s < STEPS; s++) free(o->metrics[s]);
  free(o->nll);
}

// Reads the results of all steps before `end` that were not read yet.
static void collect(Engine *e, Outcome *o, OptimizerState *state, int end) {
  Error err;
  for (; o->collected < end; o->collected++) {
    int step = o->collected;
    o->metrics[step] = xmalloc(o->metrics_bytes);
    o->seconds[step] = engine_results(e, &o->status[step], o->metrics[step]);
    assert_int_equal(optimizer_count(e->config, state, &o->status[step], &err), 0);
  }
}

// The device's time when all it was given has run.
static double device_time(void) {
  queued_cpu_drain();
  return queued_cpu_counts().seconds;
}

// Afterwards the time of every op of the training programs is known, and where a plan was chosen of every op that
// another may add: those of everything recomputed.
static void measure(World *w, Engine *e) {
  const Extents extents = {.text = 3, .image = 4, .segments = 1, .targets = 2, .pairs = 20};
  int is_chosen = e->chosen == MEMORY_AUTO, one_queue = e->first.program->one_queue;
  PolicyTable policy = policy_table_new(w->c.config.model.layers, MEMORY_RECOMPUTE);
  const Program *later = e->later.program; // there are several micro-steps
  ModelProgram m =
      transformer_record(&e->model, later ? MODE_TRAIN_MIDDLE : MODE_TRAIN_ONLY, e->slots, e->segments, &policy);
  int timed = measure_train(e, w->pack[1], &extents, 0);
  if (!e->model.backend->queues) {
    assert_int_equal(timed, 0);
  } else {
    assert_true(timed >= 1 + (later != NULL) && e->costs.extents.pairs == extents.pairs);
    assert_int_equal(e->first.program->one_queue, one_queue); // copies are in their lanes again
    assert_true(measure_has(&e->costs, e->first.program) && (!later || measure_has(&e->costs, later)));
    assert_true(is_chosen == (w->c.config.memory.policy == MEMORY_AUTO));
    assert_true(!is_chosen || measure_has(&e->costs, m.program));
    assert_false(measure_has(&e->costs, e->update));
    assert_true(predict_step(e, 0) > 0 && predict_step(e, 1) > predict_step(e, 0));
    int64_t captures = queued_cpu_counts().captures;
    assert_int_equal(measure_train(e, w->pack[1], &extents, 0), 0); // all is known
    assert_int_equal(queued_cpu_counts().captures, captures);
    assert_true(measure_train(e, w->pack[1], &extents, 1) >= 1 + (later != NULL));
  }
  program_free(m.program);
  policy_table_free(&policy);
}

static void forget_comm_waits(const World *w, Engine *e) {
  Program *all[] = {e->first.program,      e->later.program,      e->last.program,      e->update,
                    e->update_ema,         e->flush[DUE_WEIGHTS], e->flush[DUE_UPDATE], e->flush[DUE_UPDATE_EMA],
                    e->opening[0].program, e->opening[1].program};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    for (int i = 0; all[k] && i < all[k]->n_ops; i++) {
      Op *op = &all[k]->ops[i];
      if (op->lane == LANE_COMM && w->unordered == COMM_WAITS) op->n_waits = 0;
      for (int x = op->n_waits - 1; x >= 0 && w->unordered == COMM_AWAITED; x--)
        if (all[k]->ops[op->waits[x].op].lane == LANE_COMM) op->waits[x] = op->waits[--op->n_waits];
    }
}

// Records the updates again, in small parts.
static void cut_updates(Engine *e, int64_t part) {
  e->model.update_part = part;
  Program **updates[] = {&e->update, &e->update_ema};
  for (int ema = 0; ema < 2; ema++) {
    program_free(*updates[ema]);
    *updates[ema] = update_record(&e->model, ema);
    e->bytes[SPACE_ARENA] = max_i64(e->bytes[SPACE_ARENA], engine_arena_need(e, *updates[ema]));
  }
}

// Weights and EMA of the case, whose parameters may lie closer together than the engine's.
static void upload_weights(const World *w, Engine *e) {
  const ParamTable *to = &e->model.params, *from = &w->c.model.params;
  real *slab = xcalloc((size_t)to->total, sizeof *slab), *values = w->c.bases.of[SPACE_WEIGHTS];
  for (int i = 0; i < to->n; i++)
    memcpy(slab + to->of[i].offset, values + from->of[i].offset, (size_t)to->of[i].count * sizeof *slab);
  slab_upload(e, SPACE_WEIGHTS, slab);
  slab_upload(e, SPACE_EMA, slab);
  free(slab);
}

// Of a group of two in which the other process has the same weights (below): after an evaluation and a flush a bucket's
// halves are equal.
static void check_gathered(Engine *e) {
  if (config_shards(e->config) != 2) return;
  engine_use_ema(e, 1);
  engine_use_ema(e, 0);
  engine_flush(e);
  const ParamTable *t = &e->model.params;
  real *weights = xcalloc((size_t)t->total, sizeof *weights);
  engine_slab_read(e, SPACE_WEIGHTS, weights);
  for (const ParamBucket *b = t->bucket; b < t->bucket + t->buckets; b++) {
    int64_t half = (b->end - b->begin) / 2;
    assert_memory_equal(weights + b->begin, weights + b->begin + half, (size_t)half * sizeof *weights);
  }
  free(weights);
}

// The steps as the trainer runs them: with queues, a step's results are read when the passes of the next are under way.
// The memory of each pack is overwritten by another one as soon as the device has the pack. `profiled`: that step is
// timed op by op; -1: none.
static Outcome run(World *w, const Backend *backend, int profiled) {
  const Config *c = &w->c.config;
  Engine e;
  Error err;
  Outcome o = {0};
  OptimizerState state = {0};
  if (engine_record(&e, c, backend, 1, &err) != 0) fail_msg("%s", err.text);
  if (w->part) cut_updates(&e, w->part);
  if (w->unordered) forget_comm_waits(w, &e);
  if (engine_allocate(&e, &err) != 0) fail_msg("%s", err.text);
  upload_weights(w, &e);
  o.elements = (size_t)e.model.params.total;
  o.metrics_bytes = (size_t)e.bytes[SPACE_METRICS];
  o.nll_bytes = (size_t)e.slots * sizeof *o.nll;
  o.nll = xmalloc(o.nll_bytes);
  void *given[2] = {xmalloc(w->pack_bytes), xmalloc(w->pack_bytes)}; // in turn
  int sent = engine_packs_sent(&e), n = 0;
  assert_int_equal(sent, backend->queues != NULL);
  if (w->measured) measure(w, &e);
  engine_begin_step(&e);
  o.elapsed = -device_time();
  for (int step = 0; step < STEPS; step++) {
    if (step == STEPS - 1) {
      collect(&e, &o, &state, step);
      o.last = queued_cpu_counts();
      o.elapsed += device_time();
      engine_use_ema(&e, 1);
      const ForwardProgram *f = engine_forward(&e, MODE_EVAL, e.slots, e.segments - 1);
      engine_run(&e, &f->m, w->pack[0], NULL);
      engine_read(&e, &f->m, f->m.nll, e.slots, o.nll);
      engine_use_ema(&e, 0);
      engine_begin_step(&e);
      o.elapsed -= device_time();
    }
    for (int m = 0; m < c->train.micro_batches; m++) {
      const ModelProgram *p = engine_micro_step(&e, m);
      OpTime *times = step == profiled ? xcalloc((size_t)p->program->n_ops, sizeof *times) : NULL;
      memcpy(given[n % 2], w->pack[step * MICRO + m], w->pack_bytes);
      engine_run(&e, p, given[n % 2], times);
      engine_await_packs(&e, false);
      memcpy(given[(n + sent) % 2], w->pack[(n + 5) % PACKS], w->pack_bytes);
      n++;
      for (int i = 0; times && i < p->program->n_ops; i++) assert_true(times[i].begin <= times[i].end);
      free(times);
    }
    collect(&e, &o, &state, step);
    StepScalars scalars = optimizer_scalars(c, &state, step);
    engine_update(&e, &scalars, optimizer_ema_due(c, step), NULL);
    if (step == 1) o.first = queued_cpu_counts();
    o.opens = e.opening[1].program && e.opening[1].program->use_graph;
    if (!backend->queues) collect(&e, &o, &state, step + 1);
  }
  collect(&e, &o, &state, STEPS);
  o.elapsed += device_time();
  if (!w->unordered) check_gathered(&e);
  engine_flush(&e);
  for (int s = 0; s < SPACES; s++) {
    o.state[s] = xcalloc(o.elements, sizeof(real)); // of what is shared, this process's part
    int64_t count = engine_slab_bytes(&e, spaces[s]) / (int64_t)space_element(e.model.backend, spaces[s]);
    void *scratch = xmalloc((size_t)count * sizeof(real));
    engine_slab_read_part(&e, spaces[s], 0, count, o.state[s], scratch);
    free(scratch);
  }
  free(given[0]);
  free(given[1]);
  engine_free(&e);
  return o;
}

static int outcomes_equal(const Outcome *a, const Outcome *b) {
  int same = memcmp(a->nll, b->nll, a->nll_bytes) == 0;
  for (int s = 0; s < SPACES; s++) same &= memcmp(a->state[s], b->state[s], a->elements * sizeof(real)) == 0;
  for (int s = 0; s < STEPS; s++) {
    same &= memcmp(a->metrics[s], b->metrics[s], a->metrics_bytes) == 0;
    same &= memcmp(&a->status[s], &b->status[s], sizeof a->status[s]) == 0;
  }
  return same;
}

static const MemoryPolicy memory_policies[] = {MEMORY_OFFLOAD, MEMORY_KEEP, MEMORY_RECOMPUTE};

// Results are read when the passes of the next step are under way, and yet each step's time is its own: the same work
// takes the same time, the evaluation between two steps counts for none, and together they are the time that passed.
static void check_times(const Outcome *o, int profiled) {
  double sum = 0, least = INFINITY, most = 0;
  for (int s = 0; s < STEPS; s++) {
    sum += o->seconds[s];
    if (s == profiled) continue; // times of ops are work of their own
    least = fmin(least, o->seconds[s]);
    most = fmax(most, o->seconds[s]);
  }
  if (!(fabs(sum - o->elapsed) < 1e-9)) fail_msg("steps of %g s, %g s passed", sum, o->elapsed);
  if (!(most <= 1.1 * least)) fail_msg("equal steps took %g to %g s", least, most);
}

// Graphs or not, transfers in lanes of their own or not, every memory policy, updates at the end of a step or in the
// next one, many orders.
static void test_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    World w;
    world_open(&w, 40 + (uint64_t)v, v);
    Config *c = &w.c.config;
    c->train.moments = v % 2 ? MOMENTS_BF16 : MOMENTS_FP32;
    c->memory.policy = MEMORY_KEEP;
    Outcome want = run(&w, &backend_cpu, -1);
    for (int s = 0; s < STEPS; s++) assert_int_equal(want.status[s].skip, 0);
    for (int i = 0; i < 12; i++) {
      c->memory.policy = memory_policies[i % 3];
      c->kernels.graph = i / 3 % 2;
      c->kernels.update = i % 2 ? UPDATE_OVERLAPPED : UPDATE_SEQUENTIAL;
      c->kernels.streams = i < 9 ? STREAMS_MULTI : STREAMS_SINGLE;
      queued_cpu_start((uint64_t)(100 * v + i), FAULT_NONE);
      int profiled = i == 4 ? 2 : -1;
      Outcome got = run(&w, &backend_queued_cpu, profiled);
      if (!outcomes_equal(&got, &want)) fail_msg("variant %d, order %d: other bits", v, i);
      // Nothing is allocated or captured once every program has run, and the host waits for no copy.
      assert_int_equal(got.last.allocations, got.first.allocations);
      assert_int_equal(got.last.captures, got.first.captures + got.opens);
      assert_int_equal(got.last.uploads, got.first.uploads);
      assert_int_equal(got.last.downloads, got.first.downloads);
      assert_true(c->kernels.graph ? got.last.launches > got.first.launches : got.last.launches == 0);
      assert_int_equal(queued_cpu_counts().open_ranges, 0);
      if (c->kernels.update == UPDATE_SEQUENTIAL) check_times(&got, profiled); // else a step has the update before
      outcome_free(&got);
    }
    outcome_free(&want);
    world_close(&w);
  }
}

// Gigabytes of the device under one policy.
static double needs(World *w, MemoryPolicy policy) {
  Engine e;
  Error err;
  w->c.config.memory.policy = policy;
  if (engine_record(&e, &w->c.config, &backend_queued_cpu, 1, &err) != 0) fail_msg("%s", err.text);
  double bytes = (double)engine_device_bytes(&e);
  engine_free(&e);
  return bytes / 1e9;
}

// Where the gradients of a step's only micro-batch lie changes no bit, nor what an evaluation with the EMA finds, for
// which the weights are laid aside among them; and it takes less memory.
static void test_shared_gradients(void **state) {
  (void)state;
  int chosen = 0;
  for (int v = 0; v < VARIANTS; v++) {
    World w;
    world_open(&w, 70 + (uint64_t)v, v);
    Config *c = &w.c.config;
    c->train.micro_batches = 1;
    c->memory.policy = MEMORY_KEEP;
    Outcome want = run(&w, &backend_cpu, -1);
    double apart = needs(&w, MEMORY_KEEP), least = needs(&w, MEMORY_RECOMPUTE);
    c->memory.share_gradients = true;
    double most = needs(&w, MEMORY_KEEP), smallest = needs(&w, MEMORY_RECOMPUTE);
    assert_true(most < apart && smallest < least);
    for (int i = -1; i < 12; i += v ? 2 : 1) { // -1: on the CPU's own backend
      int chooses = i % 4 == 3 && smallest < most;
      chosen += chooses;
      c->memory.policy = chooses ? MEMORY_AUTO : memory_policies[(i + 3) % 3];
      c->memory.budget_gb = chooses ? .5 * (most + smallest) : 0;
      c->memory.state = i < 6 || chooses ? STATE_DEVICE : (MemoryState)(STATE_EMA + i % 2);
      c->kernels.graph = i / 3 % 2;
      c->kernels.streams = i < 9 ? STREAMS_MULTI : STREAMS_SINGLE;
      w.measured = i % 4 > 1;
      if (i >= 0) queued_cpu_start((uint64_t)(800 + 20 * v + i), FAULT_NONE);
      Outcome got = run(&w, i < 0 ? &backend_cpu : &backend_queued_cpu, i == 4 ? 2 : -1);
      if (!outcomes_equal(&got, &want)) fail_msg("variant %d, order %d: other bits", v, i);
      outcome_free(&got);
    }
    outcome_free(&want);
    world_close(&w);
  }
  assert_true(chosen > 0);
}

// Ops that are timed before the first step leave nothing behind. In the smallest budget of four layers their gradients
// leave, but not while ops are timed.
static void test_measured(void **state) {
  (void)state;
  for (int v = 1; v < 4; v += 2) {
    World w;
    world_open(&w, 43, v);
    Config *c = &w.c.config;
    c->memory.policy = MEMORY_KEEP;
    Outcome want = run(&w, &backend_cpu, -1);
    double least = needs(&w, MEMORY_RECOMPUTE), most = needs(&w, MEMORY_KEEP);
    c->memory.budget_gb = 1e-9;
    double smallest = needs(&w, MEMORY_AUTO);
    w.measured = 1;
    const MemoryPolicy policies[] = {MEMORY_AUTO, MEMORY_OFFLOAD, MEMORY_RECOMPUTE};
    for (int i = 0; i < 6; i++) {
      c->memory.policy = policies[i % 3];
      c->memory.budget_gb = i % 3 ? 0 : i ? smallest : least + .7 * (most - least);
      c->kernels.graph = i / 3;
      queued_cpu_start((uint64_t)(300 + i), FAULT_NONE);
      Outcome got = run(&w, &backend_queued_cpu, -1);
      if (!outcomes_equal(&got, &want)) fail_msg("variant %d, order %d: other bits", v, i);
      outcome_free(&got);
    }
    outcome_free(&want);
    world_close(&w);
  }
}

// What of the state lies on the host changes no bit, whatever passes through the update at once.
static void test_state_on_host(void **state) {
  (void)state;
  for (int v = 0; v < 4; v += 1 + (v == 1)) { // the last has more layers than there are slots for their gradients
    World w;
    world_open(&w, 50 + (uint64_t)v, v);
    Config *c = &w.c.config;
    c->train.moments = v % 2 ? MOMENTS_BF16 : MOMENTS_FP32;
    c->memory.policy = MEMORY_KEEP;
    Outcome want = run(&w, &backend_cpu, -1);
    for (int i = 0; i < 15; i++) {
      c->memory.state = (MemoryState)(STATE_EMA + i % 3);
      c->memory.policy = memory_policies[i / 3 % 3];
      c->kernels.update = i % 3 ? UPDATE_OVERLAPPED : UPDATE_SEQUENTIAL; // not where state passes through the arena
      c->kernels.graph = i % 2;
      c->kernels.streams = i < 12 ? STREAMS_MULTI : STREAMS_SINGLE;
      w.part = (int64_t[]){0, 4096, 20 * 1000 * 64}[i % 5 % 3];
      queued_cpu_start((uint64_t)(500 + 20 * v + i), FAULT_NONE);
      Outcome got = run(&w, &backend_queued_cpu, -1);
      if (!outcomes_equal(&got, &want)) fail_msg("variant %d, state %d, order %d: other bits", v, c->memory.state, i);
      assert_int_equal(got.last.allocations, got.first.allocations);
      assert_int_equal(got.last.uploads, got.first.uploads);
      assert_int_equal(got.last.downloads, got.first.downloads);
      outcome_free(&got);
    }
    outcome_free(&want);
    world_close(&w);
  }
}

// A device that gives memory out in units and has tables of the host's pages: any plan is within the budget with these,
// and what is left of that is less than a unit where the arena was to fill it.
static void test_units(void **state) {
  (void)state;
  World w;
  Engine e;
  Error err;
  Backend coarse = backend_queued_cpu;
  int64_t most, exact, found = 0;
  coarse.alloc_unit = 4096;
  coarse.host_bytes_mapped = 64;
  world_open(&w, 54, 3);
  Config *c = &w.c.config;
  c->memory.policy = MEMORY_AUTO;
  c->memory.host_gb = 1;
  queued_cpu_start(1, FAULT_NONE);
  assert_int_equal(engine_record(&e, c, &backend_queued_cpu, 1, &err), 0);
  exact = engine_device_bytes(&e);
  engine_free(&e);
  assert_int_equal(engine_record(&e, c, &coarse, 1, &err), 0);
  most = engine_device_bytes(&e);
  assert_true(most > exact && most < exact + SPACE_COUNT * coarse.alloc_unit);
  e.backend.alloc_unit = (int64_t)1 << 50; // which all of them share
  assert_int_equal(engine_device_bytes(&e), e.backend.alloc_unit);
  engine_free(&e);
  for (int64_t budget = most; budget > most / 2; budget -= most / 23) {
    c->memory.budget_gb = (double)budget / 1e9;
    assert_int_equal(engine_record(&e, c, &coarse, 1, &err), 0);
    int64_t took = engine_device_bytes(&e), room = engine_room(&e).arena, arena = e.bytes[SPACE_ARENA];
    assert_true(took <= e.budget && took % coarse.alloc_unit == 0 && room % coarse.alloc_unit == 0);
    assert_true(arena <= room);
    e.backend.host_bytes_mapped = 0;
    assert_int_equal(e.model.state > STATE_DEVICE, engine_device_bytes(&e) < took);
    found += e.model.state > STATE_DEVICE;
    e.backend.host_bytes_mapped = coarse.host_bytes_mapped;
    e.bytes[SPACE_ARENA] = room;
    assert_true(engine_device_bytes(&e) <= e.budget && engine_device_bytes(&e) + coarse.alloc_unit > e.budget);
    engine_free(&e);
  }
  assert_true(found > 3);
  world_close(&w);
}

// Programs are launched op by op where copies hold up long ops, and captured where these are short or wait for nothing.
static void test_captured(void **state) {
  (void)state;
  World w;
  Engine e;
  Error err;
  int seen[2][2] = {{0}};
  world_open(&w, 55, 3);
  w.c.config.memory.policy = MEMORY_OFFLOAD;
  w.c.config.kernels.graph = 1;
  queued_cpu_start(1, FAULT_NONE);
  assert_int_equal(engine_record(&e, &w.c.config, &backend_queued_cpu, 1, &err), 0);
  assert_int_equal(engine_allocate(&e, &err), 0);
  for (double rate = 1e15; rate > 1e3; rate /= 4) {
    e.costs.link = (LinkRates){rate, rate, rate, rate, 0};
    engine_bind(&e);
    const Program *p = e.first.program;
    Simulation s = predict_program(&e.costs, p);
    int held = s.stalled > .01 * s.seconds, lengthy = s.seconds > 50e-6 * p->n_ops;
    assert_int_equal(p->use_graph, !(held && lengthy));
    w.c.config.processes = 2; // which do it in one way
    assert_true(engine_captures(&e, p));
    w.c.config.processes = 1;
    assert_true(e.forward[0].m.program->use_graph); // without copies
    seen[held][lengthy]++;
  }
  assert_true(seen[0][0] > 0 && seen[1][0] > 0 && seen[1][1] > 0);
  engine_free(&e);
  world_close(&w);
}

// Each further state takes less of the device. With a policy of its own "auto" leaves all there; where both are chosen,
// ever more of it goes as the budget falls, and the bits are the same.
static void test_state_auto(void **state) {
  (void)state;
  World w;
  Engine e;
  Error err;
  int64_t need[STATE_GRADIENTS + 1];
  world_open(&w, 53, 3); // four layers
  Config *c = &w.c.config;
  c->memory.policy = MEMORY_KEEP;
  Outcome want = run(&w, &backend_cpu, -1);
  for (MemoryState s = STATE_DEVICE; s <= STATE_GRADIENTS; s++) {
    c->memory.state = s;
    queued_cpu_start(1, FAULT_NONE);
    assert_int_equal(engine_record(&e, c, &backend_queued_cpu, 1, &err), 0);
    need[s] = engine_device_bytes(&e);
    assert_int_equal(e.bases.host_bytes[SPACE_EMA] > 0, s >= STATE_EMA);
    assert_int_equal(e.bases.host_bytes[SPACE_ADAM_M] > 0, s >= STATE_MOMENTS);
    assert_int_equal(e.bytes[SPACE_HOST_GRADS] > 0, s == STATE_GRADIENTS);
    assert_int_equal(engine_slab_bytes(&e, SPACE_ADAM_V), e.model.params.total * (int64_t)sizeof(real));
    engine_free(&e);
  }
  c->memory.state = STATE_AUTO;
  c->memory.policy = MEMORY_KEEP;
  c->memory.budget_gb = (double)need[STATE_EMA] / 1e9;
  assert_int_equal(engine_record(&e, c, &backend_queued_cpu, 1, &err), 0);
  assert_int_equal(e.model.state, STATE_DEVICE);
  assert_int_equal(engine_check_budget(&e, &err), -1);
  assert_non_null(strstr(err.hint, "memory.state=ema"));
  engine_free(&e);
  c->memory.policy = MEMORY_AUTO;
  c->memory.host_gb = 1;
  int seen[STATE_GRADIENTS + 1] = {0}, kept = 0;
  for (double budget = (double)need[STATE_DEVICE]; budget > .52 * (double)need[STATE_DEVICE]; budget *= .94) {
    c->memory.budget_gb = (budget + 100) / 1e9;
    queued_cpu_start((uint64_t)budget, FAULT_NONE);
    assert_int_equal(engine_record(&e, c, &backend_queued_cpu, 1, &err), 0);
    assert_true(engine_device_bytes(&e) <= e.budget);
    seen[e.model.state]++;
    kept += e.model.kept > 0;
    engine_free(&e);
    Outcome got = run(&w, &backend_queued_cpu, -1);
    if (!outcomes_equal(&got, &want)) fail_msg("%g bytes: other bits", budget);
    outcome_free(&got);
  }
  assert_true(seen[STATE_DEVICE] > 0 && seen[STATE_EMA] > 0 && seen[STATE_MOMENTS] > 0);
  assert_true(kept > 2);
  outcome_free(&want);
  world_close(&w);
}

// Equal bits are no matter of course: where lanes do not wait for each other, or the host not for the device, some
// order gives other bits.
static void test_faults_show(void **state) {
  (void)state;
  World w;
  world_open(&w, 40, 0);
  w.c.config.memory.policy = MEMORY_KEEP;
  Outcome want = run(&w, &backend_cpu, -1);
  w.c.config.memory.policy = MEMORY_OFFLOAD;
  const QueuedFault faults[] = {FAULT_WAIT, FAULT_FINISH};
  for (int f = 0; f < 2; f++) {
    int differ = 0;
    for (int i = 0; i < 10 && !differ; i++) {
      queued_cpu_start((uint64_t)i, faults[f]);
      Outcome got = run(&w, &backend_queued_cpu, -1);
      differ += !outcomes_equal(&got, &want);
      outcome_free(&got);
    }
    if (!differ) fail_msg("fault %d does not show", f);
  }
  outcome_free(&want);
  world_close(&w);
}

// ---- several processes ----

// A group of two whose other process has the same as this one of rank 0: sums are twice what is there, and the other's
// share of the weights is the same as this one's.
static void twice(real *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= 2;
}

static void all_reduce_twice(const KernelCall *c) {
  double *wide = c->out.ALL_REDUCE.values;
  if (!c->args->group.is_f64) twice(c->out.ALL_REDUCE.values, c->args->group.count);
  for (int64_t i = 0; c->args->group.is_f64 && i < c->args->group.count; i++) wide[i] *= 2;
}

static void reduce_scatter_twice(const KernelCall *c) {
  twice(c->out.REDUCE_SCATTER.values, c->args->group.count / 2);
}

static void all_gather_same(const KernelCall *c) {
  real *x = c->out.ALL_GATHER.values;
  memcpy(x + c->args->group.count / 2, x, (size_t)(c->args->group.count / 2) * sizeof *x);
}

// `late`: the comm lane runs only when no other can.
static int group_differs(World *w, const Backend *group, const Outcome *want, uint64_t seed, int late) {
  queued_cpu_start(seed, FAULT_NONE);
  queued_cpu_hold_back(late ? LANE_COMM : LANE_COUNT);
  queued_cpu_group(group);
  Outcome got = run(w, &backend_queued_cpu, -1);
  int differ = !outcomes_equal(&got, want);
  outcome_free(&got);
  return differ;
}

// What the processes sum and share comes in time for what reads it, whenever the comm lane gets to it, also where
// gradients leave; and where that lane does not wait for others, or they not for it, it shows. Of twelve orders every
// `stride`th.
static Outcome check_group(World *w, uint64_t seed, int stride) {
  Config *c = &w->c.config;
  Backend group = backend_cpu;
  group.fn[OP_ALL_REDUCE] = all_reduce_twice;
  group.fn[OP_REDUCE_SCATTER] = reduce_scatter_twice;
  group.fn[OP_ALL_GATHER] = all_gather_same;
  c->memory.policy = MEMORY_KEEP;
  c->memory.state = STATE_DEVICE;
  c->processes = 1;
  c->kernels.streams = STREAMS_MULTI;
  c->kernels.update = UPDATE_SEQUENTIAL;
  w->unordered = 0;
  Outcome alone = run(w, &backend_cpu, -1);
  c->processes = 2;
  Outcome want = run(w, &group, -1);
  for (int s = 0; s < STEPS; s++) {
    assert_int_equal(want.status[s].skip, 0);
    assert_true(((Metrics *)want.metrics[s])->targets[0] == 2 * ((Metrics *)alone.metrics[s])->targets[0]);
  }
  // Of the first step, whose weights are equal. A share's squares are those of one half, which count for both. Four
  // times an exact sum lies otherwise in its words, so it is rounded otherwise.
  double norm = want.status[0].norm, twice_alone = 2 * alone.status[0].norm;
  if (!c->parallel.zero) assert_true(fabs(norm - twice_alone) <= 1e-14 * twice_alone);
  for (int i = 0; i < 12; i += stride) {
    c->memory.policy = memory_policies[i % 3];
    c->memory.state = i % 4 == 3 ? STATE_GRADIENTS : STATE_DEVICE; // where they are shared, they stay
    c->kernels.graph = i / 3 % 2;
    c->kernels.update = i / 2 % 2 ? UPDATE_OVERLAPPED : UPDATE_SEQUENTIAL;
    c->kernels.streams = i < 9 ? STREAMS_MULTI : STREAMS_SINGLE;
    if (group_differs(w, &group, &want, seed + (uint64_t)i, i % 2))
      fail_msg("zero %d, order %d: other bits", c->parallel.zero, i);
  }
  c->kernels.streams = STREAMS_MULTI;
  for (w->unordered = COMM_WAITS; stride == 1 && w->unordered <= COMM_AWAITED; w->unordered++) {
    int differ = 0;
    for (int i = 0; i < 10 && !differ; i++) differ = group_differs(w, &group, &want, (uint64_t)i, i % 2);
    if (!differ) fail_msg("zero %d: missing waits do not show", c->parallel.zero);
  }
  w->unordered = 0;
  outcome_free(&alone);
  return want;
}

static void test_group(void **state) {
  (void)state;
  for (int v = 0; v < 3; v++) {
    Outcome of[3];
    for (int zero = 0; zero < 3; zero++) {
      World w;
      world_open(&w, 60 + (uint64_t)v, v);
      w.c.config.parallel.zero = zero;
      if (v == 1) w.c.config.train.micro_batches = 1; // whose gradients share the arena
      w.c.config.memory.share_gradients = true;
      of[zero] = check_group(&w, (uint64_t)(700 + 20 * v), v ? 5 : 1);
      world_close(&w);
    }
    // Of two processes with the same gradients the order of sums is not seen.
    assert_true(outcomes_equal(&of[1], &of[2]));
    for (int zero = 0; zero < 3; zero++) outcome_free(&of[zero]);
  }
}

// ---- writing slabs ----

// A slab of every kind written in pieces whose memory is overwritten at once, on a backend whose weights are bf16 with
// a remainder or are what they are; returns whether what is read back is what was written.
static int slabs_arrive(World *w, int remainders, QueuedFault fault, uint64_t seed) {
  enum { PIECE = 700 };
  Backend backend = backend_queued_cpu;
  Engine e;
  Error err;
  int same = 1;
  if (remainders) backend_store_bf16(&backend);
  queued_cpu_start(seed, fault);
  if (engine_record(&e, &w->c.config, &backend, 1, &err) != 0 || engine_allocate(&e, &err) != 0)
    fail_msg("%s", err.text);
  int64_t total = e.model.params.total;
  size_t bytes = (size_t)total * sizeof(real);
  real *want = xmalloc(bytes), *got = xmalloc(bytes), *given = xmalloc(PIECE * sizeof *given);
  for (int64_t i = 0; i < total; i++) want[i] = (real)((double)(i % 9973) * 1.1e-4 - 0.31);
  SlabWriter *writer = slab_writer_open(&e, PIECE, &err);
  assert_non_null(writer);
  for (int64_t first = 0, n; first < total; first += n) {
    n = min_i64(1 + first % PIECE, total - first);
    for (int s = 0; s < SPACES; s++) {
      memcpy(given, want + first, (size_t)n * sizeof *given);
      slab_writer_put(writer, spaces[s], first, n, given);
      memset(given, 0xFF, PIECE * sizeof *given);
    }
  }
  slab_writer_close(writer);
  for (int s = 0; s < SPACES; s++) {
    engine_slab_read(&e, spaces[s], got);
    same &= memcmp(got, want, bytes) == 0;
  }
  engine_free(&e);
  free(want);
  free(got);
  free(given);
  return same;
}

static void test_slab_writer(void **state) {
  (void)state;
  World w;
  world_open(&w, 41, 1);
  for (int i = 0; i < 6; i++) assert_true(slabs_arrive(&w, i % 2, FAULT_NONE, (uint64_t)i));
  int differ = 0;
  for (int i = 0; i < 6; i++) differ += !slabs_arrive(&w, i % 2, FAULT_FINISH, (uint64_t)i);
  assert_true(differ > 0);
  world_close(&w);
}

// A host slab that this machine has no memory for is refused, rather than killed for.
static void test_host_slab(void **state) {
  (void)state;
  World w;
  Engine e;
  Error err;
  world_open(&w, 42, 0);
  w.c.config.memory.policy = MEMORY_OFFLOAD;
  queued_cpu_start(1, FAULT_NONE);
  assert_int_equal(engine_record(&e, &w.c.config, &backend_queued_cpu, 1, &err), 0);
  assert_true(e.bytes[SPACE_HOST] > 0);
  assert_int_equal(engine_check_host(&e, &err), 0);
  e.bytes[SPACE_HOST] = (int64_t)1 << 50;
  assert_int_equal(engine_check_host(&e, &err), -1);
  assert_non_null(strstr(err.text, "are to lie in this machine's memory"));
  engine_free(&e);
  world_close(&w);
}

int main(void) {
  omp_set_num_threads(1); // bits do not depend on it (test_threads), and these loops are too short for more
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_same_bits),   cmocka_unit_test(test_measured),    cmocka_unit_test(test_state_on_host),
      cmocka_unit_test(test_state_auto),  cmocka_unit_test(test_units),       cmocka_unit_test(test_captured),
      cmocka_unit_test(test_faults_show), cmocka_unit_test(test_slab_writer), cmocka_unit_test(test_shared_gradients),
      cmocka_unit_test(test_group),       cmocka_unit_test(test_host_slab)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
