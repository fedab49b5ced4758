#include "trainer/engine.h"

#include "base/machine.h"
#include "base/thread.h"
#include "data/loader.h"
#include "kernels/backends.h"
#include "model/placement.h"
#include "model/program/expected.h"
#include "model/program/planner.h"
#include "model/program/replay.h"
#include "model/update.h"
#include "trainer/engine_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SMALLEST_FORWARD = 64 };

static int64_t pack_bytes(const Config *c, int slots, int segments) {
  Dims d = dims_from_config(c, slots, segments);
  return (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&d), NULL);
}

// memory.budget_gb is about the arena; memory.arena: false, which is for sanitizers, takes more.
static int64_t budget_bytes(const Config *c, const Backend *b) {
  return c->memory.budget_gb > 0 ? (int64_t)(c->memory.budget_gb * 1e9) : b->memory();
}

int64_t engine_state_on_host(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++) {
    sum += e->bases.host_bytes[s];
    if (s != SPACE_HOST && engine_on_host(e, (Space)s)) sum += e->bytes[s];
  }
  return sum;
}

int64_t engine_host_budget(const Engine *e) {
  double given = e->config->memory.host_gb;
  return given > 0 ? (int64_t)(given * 1e9) : max_i64(0, e->host_left - engine_state_on_host(e)) / 2;
}

void engine_measure(Engine *e, const Program *p) {
  e->bytes[SPACE_ARENA] = max_i64(e->bytes[SPACE_ARENA], p->arena_bytes);
  e->bytes[SPACE_HOST] = max_i64(e->bytes[SPACE_HOST], p->host_bytes);
  e->bytes[SPACE_SCRATCH] = max_i64(e->bytes[SPACE_SCRATCH], p->scratch_bytes);
}

static void record_forward(Engine *e, Mode mode) {
  const Config *c = e->config;
  for (int slots = SMALLEST_FORWARD;; slots *= 2) {
    if (slots > e->slots) slots = e->slots;
    ForwardProgram *f = &e->forward[e->n_forward++];
    *f = (ForwardProgram){.mode = mode, .slots = slots, .segments = (int)min_i64(e->segments, slots / 2 + 1)};
    f->m = transformer_record(&e->model, mode, slots, f->segments, NULL);
    engine_measure(e, f->m.program);
    e->bytes[SPACE_STAGING] = max_i64(e->bytes[SPACE_STAGING], pack_bytes(c, slots, f->segments));
    if (slots == e->slots) break;
  }
}

int engine_on_host(const Engine *e, Space space) {
  return e->model.backend->queues && space_has(space, SPACE_ON_HOST);
}

// Whether a space counts against the budget. All programs share one arena and one host slab, which counts where host
// and device memory are one.
int engine_counts(const Engine *e, Space space) {
  return !engine_on_host(e, space);
}

int64_t engine_device_bytes(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++)
    if (engine_counts(e, (Space)s)) sum += e->bytes[s];
  return sum;
}

static const char *const memory_policy_name[] = {
    [MEMORY_AUTO] = "auto", [MEMORY_KEEP] = "keep", [MEMORY_RECOMPUTE] = "recompute", [MEMORY_OFFLOAD] = "offload"};

// "the largest: 8 x expert h, 0.201 GB", of what fills the arena.
static void name_largest(const Engine *e, char *text, size_t size) {
  const Program *fullest = NULL;
  const Program *all[ENGINE_FORWARD_PROGRAMS + 3] = {e->first.program, e->later.program, e->last.program};
  for (int i = 0; i < e->n_forward; i++) all[3 + i] = e->forward[i].m.program;
  for (int i = 0; i < e->n_forward + 3; i++)
    if (all[i] && (!fullest || all[i]->arena_bytes > fullest->arena_bytes)) fullest = all[i];
  Peak peak = planner_peak(fullest);
  snprintf(text, size, "the largest: %d x %s, %.3f GB", peak.share[0].count, peak.share[0].name,
           (double)peak.share[0].bytes / 1e9);
}

char *engine_memory_text(const Engine *e) {
  char *state = engine_state_text(e);
  char *text = xasprintf("%.3f GB of the %.3f GB that it may take, policy %s%s%s", (double)engine_device_bytes(e) / 1e9,
                         (double)e->budget / 1e9, memory_policy_name[e->chosen], state[0] ? "; " : "", state);
  free(state);
  return text;
}

// The smallest changes with which what needs too much would fit. `activations`: those bytes of it that fewer slots
// save.
static void name_ways_out(const Engine *e, int64_t need, int64_t activations, char *text, size_t size) {
  enum { STEP = 64 };
  double left = (double)(e->budget - (need - activations)), share = .97 * left / (double)activations;
  int tokens = share > 0 ? (int)(share * e->slots) / STEP * STEP : 0;
  int n = snprintf(text, size, "memory.budget_gb=%.3f is enough", ceil((double)need / 1e6) / 1e3);
  if (tokens)
    n += snprintf(text + n, size - (size_t)n, ", or about --tokens %d (--tokens max finds the most)", tokens);
  else
    n += snprintf(text + n, size - (size_t)n, "; no --tokens is, for state alone needs %.3f GB",
                  (double)(need - activations) / 1e9);
  if (engine_on_host(e, SPACE_HOST) && e->chosen == MEMORY_AUTO && 5 * e->bytes[SPACE_HOST] > 4 * engine_host_budget(e))
    n += snprintf(text + n, size - (size_t)n, "; more of memory.host_gb may help");
  snprintf(text + n, size - (size_t)n, "; --plan shows the table");
}

int engine_check_budget(const Engine *e, Error *err) {
  int64_t budget = e->budget, need = engine_device_bytes(e);
  int64_t activations = e->bytes[SPACE_ARENA] + (engine_counts(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0);
  if (need <= budget) return 0;
  char largest[128], ways[256];
  const char *limit;
  name_largest(e, largest, sizeof largest);
  name_ways_out(e, need, activations, ways, sizeof ways);
  machine_memory("", &limit);
  int given = e->config->memory.budget_gb > 0, device = !given && e->model.backend->queues;
  return error_set(err, ways,
                   "%.3f GB are needed (%.3f GB of state, %.3f GB of activations under memory.policy %s; %s), %.3f GB "
                   "more than the %.3f GB of memory.budget_gb%s%s",
                   (double)need / 1e9, (double)(need - activations) / 1e9, (double)activations / 1e9,
                   memory_policy_name[e->chosen], largest, (double)(need - budget) / 1e9, (double)budget / 1e9,
                   given    ? ""
                   : device ? " auto, what the device has free"
                            : " auto, four fifths of ",
                   given || device ? "" : limit);
}

int engine_check_host(const Engine *e, Error *err) {
  int64_t there = backend_of_host()->memory(), state = engine_state_on_host(e), may = engine_host_budget(e);
  int64_t offloaded = engine_on_host(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0;
  static const char *const hint =
      "lower data.micro_batch_tokens (--tokens), train with --memory recompute or raise memory.budget_gb; --plan shows "
      "the table";
  if (offloaded + state > there)
    return error_set(err, hint,
                     "%.3f GB are to lie in this machine's memory (%.3f GB of activations, %.3f GB of the optimizer's "
                     "state), which has %.3f GB for that",
                     (double)(offloaded + state) / 1e9, (double)offloaded / 1e9, (double)state / 1e9,
                     (double)there / 1e9);
  if (offloaded > may && e->config->memory.host_gb > 0)
    return error_set(err, hint, "%.3f GB of activations are to be offloaded, %.3f GB more than memory.host_gb",
                     (double)offloaded / 1e9, (double)(offloaded - may) / 1e9);
  return 0;
}

int engine_record(Engine *e, const Config *c, const Backend *backend, int train, Error *err) {
  Extents extents = extents_expected(c, c->data.micro_batch_tokens);
  return engine_record_with(e, c, backend, train, costs_new(backend, &extents), NULL, err);
}

int engine_record_with(Engine *e, const Config *c, const Backend *backend, int train, Costs costs,
                       const PolicyTable *given, Error *err) {
  *e = (Engine){.config = c, .costs = costs, .slots = c->data.micro_batch_tokens, .segments = config_max_images(c) + 1};
  e->given = given;
  e->backend = *backend;
  e->budget = budget_bytes(c, backend);
  e->host_left = machine_memory_left("");
  backend_choose(&e->backend, c);
  if (c->processes > 1 && !backend->fn[OP_ALL_REDUCE])
    return error_set(err, "start one process, or train with --device cpu",
                     "%d processes were started, and several cannot train together on the %s yet", c->processes,
                     backend->name);
  e->model = (Model){.config = c, .backend = &e->backend, .params = params_build(c), .update_part = UPDATE_PART};
  Dims d = dims_from_config(c, e->slots, e->segments);
  e->bytes[SPACE_WEIGHTS] = e->model.params.total * (int64_t)space_element(backend, SPACE_WEIGHTS);
  e->bytes[SPACE_METRICS] = metrics_size(&d) * (int64_t)sizeof(double);
  e->bytes[SPACE_STAGING] = pack_bytes(c, e->slots, e->segments);
  e->bytes[SPACE_INPUT] = (int64_t)d.T * d.P * (int64_t)backend->dtype_bytes[DT_ACT];
  record_forward(e, MODE_EVAL);
  record_forward(e, MODE_GENERATE);
  record_forward(e, MODE_WRITE);
  e->bytes[SPACE_BATCH] = e->bytes[SPACE_STAGING];
  return engine_choose_state(e, train, err);
}

void *engine_space_allocate(const Engine *e, Space space) {
  const Backend *b = e->model.backend;
  size_t bytes = (size_t)e->bytes[space];
  return space_has(space, SPACE_ON_HOST) ? b->host_alloc(bytes) : b->alloc(bytes);
}

void engine_space_release(const Engine *e, Space space) {
  const Backend *b = e->model.backend;
  if (space_has(space, SPACE_ON_HOST))
    b->host_release(e->bases.of[space]);
  else
    b->release(e->bases.of[space]);
}

static void bind(Engine *e, Program *p) {
  if (!p) return;
  p->one_queue = e->config->kernels.streams == STREAMS_SINGLE;
  p->use_graph = e->config->kernels.graph && !e->backend.no_graphs;
  program_bind(p, &e->bases);
}

// Host memory that the copies of every step pass through.
static int pin(Engine *e) {
  const Backend *b = e->model.backend;
  e->pinned.scalars = b->host_alloc(sizeof *e->pinned.scalars);
  e->pinned.status = b->host_alloc(sizeof *e->pinned.status);
  e->pinned.metrics = b->host_alloc((size_t)e->bytes[SPACE_METRICS]);
  return e->pinned.scalars && e->pinned.status && e->pinned.metrics;
}

static void unpin(Engine *e) {
  void *all[] = {e->pinned.scalars, e->pinned.status, e->pinned.metrics, e->pinned.stage[0], e->pinned.stage[1]};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (all[i]) e->model.backend->host_release(all[i]);
}

// Says which of the keys about queues are another backend's.
static void name_idle_queues(const Engine *e) {
  const Backend *b = e->model.backend;
  const Config *c = e->config;
  if (!b->queues && c->memory.state > STATE_DEVICE) log_info("memory.state changes nothing on the %s", b->name);
  if (!b->queues && (c->kernels.streams != STREAMS_MULTI || !c->kernels.graph))
    log_info("kernels.streams and kernels.graph change nothing on the %s", b->name);
}

void engine_begin_step(Engine *e) {
  const Queues *q = e->model.backend->queues;
  if (q)
    q->record(LANE_COMPUTE, EVENT_RESULTS + !e->next_results);
  else
    e->clock = time_now();
}

// Names what was allocated last, and could not be.
static int refuse_space(const Engine *e, Space space, Error *err) {
  char largest[128];
  name_largest(e, largest, sizeof largest);
  engine_print_plan(e, stderr);
  return error_set(
      err,
      engine_on_host(e, space)
          ? "close what else uses this machine's memory, or raise memory.budget_gb; the table is above"
          : "lower data.micro_batch_tokens (--tokens) or train with --memory recompute; the table is above",
      "out of memory: %s needs %.3f GB%s%s", space_info[space].label, (double)e->bytes[space] / 1e9,
      space == SPACE_ARENA ? "; " : "", space == SPACE_ARENA ? largest : "");
}

// Slabs that nothing is written to before a step.
static int pinned_last(const Engine *e, Space space) {
  return e->model.backend->queues && space_has(space, SPACE_ON_HOST) && e->bytes[space] &&
         (!space_has(space, SPACE_LAID_OUT) || e->config->memory.arena);
}

static void *pin_host_slabs(void *engine) {
  Engine *e = engine;
  for (int s = 0; s < SPACE_COUNT; s++)
    if (pinned_last(e, (Space)s)) e->bases.of[s] = engine_space_allocate(e, (Space)s);
  return NULL;
}

static void await_host_slab(Engine *e) {
  if (e->is_pinning) pthread_join(e->pinning, NULL);
  e->is_pinning = 0;
}

int engine_allocate_begin(Engine *e, Error *err) {
  const Backend *b = e->model.backend;
  int later = 0;
  if (backend_check_ways(b, e->config, err) != 0) return -1;
  name_idle_queues(e);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!e->bytes[s] || (space_has((Space)s, SPACE_LAID_OUT) && !e->config->memory.arena)) continue;
    if (pinned_last(e, (Space)s)) {
      later = 1;
      continue;
    }
    e->bases.of[s] = engine_space_allocate(e, (Space)s);
    if (!e->bases.of[s]) return refuse_space(e, (Space)s, err);
  }
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!e->bases.host_bytes[s]) continue;
    e->bases.host[s] = b->host_alloc((size_t)e->bases.host_bytes[s]);
    if (!e->bases.host[s])
      return error_set(err, "close what else uses this machine's memory, or raise memory.budget_gb",
                       "out of pinned host memory: %s needs %.3f GB", space_info[s].label,
                       (double)e->bases.host_bytes[s] / 1e9);
  }
  for (int s = 0; s < SPACE_COUNT; s++)
    if (space_has((Space)s, SPACE_CLEARED)) engine_slab_clear(e, (Space)s);
  if (b->queues && !pin(e))
    return error_set(err, "close what else uses this machine's memory", "out of pinned host memory");
  if (later) {
    e->is_pinning = thread_start(&e->pinning, pin_host_slabs, e) == 0;
    if (!e->is_pinning) pin_host_slabs(e);
  }
  return 0;
}

void engine_bind(Engine *e) {
  e->bases.separate = !e->config->memory.arena;
  bind(e, e->first.program);
  bind(e, e->later.program);
  bind(e, e->last.program);
  bind(e, e->update);
  bind(e, e->update_ema);
  bind(e, e->hash);
  bind(e, e->ema_in);
  bind(e, e->ema_out);
  for (int i = 0; i < e->n_forward; i++) bind(e, e->forward[i].m.program);
}

int engine_allocate_end(Engine *e, Error *err) {
  await_host_slab(e);
  for (int s = 0; s < SPACE_COUNT; s++)
    if (pinned_last(e, (Space)s) && !e->bases.of[s]) return refuse_space(e, (Space)s, err);
  engine_bind(e);
  engine_begin_step(e);
  return 0;
}

int engine_allocate(Engine *e, Error *err) {
  return engine_allocate_begin(e, err) != 0 ? -1 : engine_allocate_end(e, err);
}

void engine_use_ema(Engine *e, int ema) {
  if (e->ema_in && ema != e->uses_ema) program_replay(ema ? e->ema_in : e->ema_out, NULL);
  e->uses_ema = ema;
}

void engine_free(Engine *e) {
  await_host_slab(e);
  engine_free_train_programs(e);
  engine_free_state_programs(e);
  for (int i = 0; i < e->n_forward; i++) program_free(e->forward[i].m.program);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (e->bases.of[s]) engine_space_release(e, (Space)s);
    if (e->bases.host[s]) e->model.backend->host_release(e->bases.host[s]);
  }
  unpin(e);
  params_free(&e->model.params);
  costs_free(&e->costs);
  *e = (Engine){0};
}

const ForwardProgram *engine_forward(const Engine *e, Mode mode, int tokens, int images) {
  for (int i = 0; i < e->n_forward; i++) {
    const ForwardProgram *f = &e->forward[i];
    if (f->mode == mode && f->slots >= tokens && f->segments > images) return f;
  }
  return NULL;
}

// The pack travels from where it lies while the compute lane is busy with what it was given before, and is copied to
// its place when the lane gets there.
static void stage_pack(Engine *e, const void *pack, size_t bytes) {
  const Backend *b = e->model.backend;
  const Queues *q = b->queues;
  if (!q) {
    b->upload(e->bases.of[SPACE_STAGING], pack, bytes);
    return;
  }
  int k = e->next_pack;
  e->next_pack = !k;
  q->wait(LANE_H2D, EVENT_PACK_TAKEN);
  queue_copy(b, LANE_H2D, e->bases.of[SPACE_STAGING], pack, bytes);
  q->record(LANE_H2D, EVENT_PACK_READY + k);
  q->wait(LANE_COMPUTE, EVENT_PACK_READY + k);
}

const ModelProgram *engine_micro_step(const Engine *e, int k) {
  int last = k == e->config->train.micro_batches - 1 && e->last.program;
  return !k ? &e->first : last ? &e->last : &e->later;
}

void engine_run(Engine *e, const ModelProgram *m, const void *pack, OpTime *times) {
  BatchShape shape = dims_batch_shape(&m->program->dims);
  stage_pack(e, pack, batch_bind(&(Batch){0}, shape, NULL));
  program_replay(m->program, times);
}

int engine_packs_sent(const Engine *e) {
  return e->model.backend->queues ? 1 : 0;
}

void engine_await_packs(Engine *e, bool all) {
  const Queues *q = e->model.backend->queues;
  if (q) q->finish(EVENT_PACK_READY + (all ? !e->next_pack : e->next_pack)); // of the last pack, or the one before it
}

void engine_update(Engine *e, const StepScalars *scalars, int ema, OpTime *times) {
  const Backend *b = e->model.backend;
  if (b->queues) {
    *e->pinned.scalars = *scalars; // the results of the update before are here, so its scalars were read
    queue_copy(b, LANE_COMPUTE, e->bases.of[SPACE_SCALARS], e->pinned.scalars, sizeof *scalars);
  } else {
    b->upload(e->bases.of[SPACE_SCALARS], scalars, sizeof *scalars);
  }
  program_replay(ema ? e->update_ema : e->update, times);
  if (!b->queues) return;
  queue_copy(b, LANE_COMPUTE, e->pinned.status, e->bases.of[SPACE_STATUS], sizeof *e->pinned.status);
  queue_copy(b, LANE_COMPUTE, e->pinned.metrics, e->bases.of[SPACE_METRICS], (size_t)e->bytes[SPACE_METRICS]);
  b->queues->record(LANE_COMPUTE, EVENT_RESULTS + e->next_results);
}

double engine_results(Engine *e, UpdateStatus *status, double *metrics) {
  const Backend *b = e->model.backend;
  if (!b->queues) {
    b->download(status, e->bases.of[SPACE_STATUS], sizeof *status);
    b->download(metrics, e->bases.of[SPACE_METRICS], (size_t)e->bytes[SPACE_METRICS]);
    double began = e->clock;
    e->clock = time_now();
    return e->clock - began;
  }
  int end = EVENT_RESULTS + e->next_results, begin = EVENT_RESULTS + !e->next_results;
  b->queues->finish(end);
  e->next_results = !e->next_results;
  *status = *e->pinned.status;
  memcpy(metrics, e->pinned.metrics, (size_t)e->bytes[SPACE_METRICS]);
  return b->queues->seconds(begin, end);
}

void engine_hash(Engine *e, uint64_t *hash) {
  size_t bytes = (size_t)e->model.params.n * sizeof *hash;
  program_replay(e->hash, NULL);
  e->model.backend->download(hash, (char *)e->bases.of[SPACE_PARAM_SUMS] + SUMS_OF_BITS * bytes, bytes);
}

void engine_read(const Engine *e, const ModelProgram *m, TensorId t, int64_t count, float *out) {
  const Tensor *tensor = &m->program->tensors[t];
  const Backend *b = e->model.backend;
  size_t element = b->dtype_bytes[tensor->dtype];
  void *wide = xmalloc((size_t)count * element);
  b->download(wide, program_address(m->program, t), (size_t)count * element);
  floats_from(wide, element, count, out);
  free(wide);
}

static int64_t state_bytes(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++)
    if (space_has((Space)s, SPACE_SAVED)) sum += engine_slab_bytes(e, (Space)s);
  return sum;
}

int64_t engine_slab_bytes(const Engine *e, Space space) {
  return e->bytes[space] + e->bases.host_bytes[space];
}

void *engine_slab(const Engine *e, Space space) {
  return e->bases.of[space];
}

void engine_await(const Engine *e) {
  const Queues *q = e->model.backend->queues;
  if (!q) return;
  q->record(LANE_COMPUTE, EVENT_SLAB_FREE);
  q->finish(EVENT_SLAB_FREE);
}

void engine_slab_clear(Engine *e, Space space) {
  if (e->bases.of[space]) e->model.backend->clear(e->bases.of[space], (size_t)e->bytes[space]);
  if (!e->bases.host[space]) return;
  OpArgs args = {.span = {.count = e->bases.host_bytes[space]}};
  engine_await(e);
  backend_of_host()->fn[OP_ZERO](&(KernelCall){.out.ZERO.dst = e->bases.host[space], .args = &args});
}

#define OF_HOST " of the host, not in the total"

// A row of the memory table; `note` is text behind it.
static void print_row(FILE *f, const char *label, int64_t bytes, const char *note) {
  fprintf(f, "  %-24s %14lld bytes  %9.3f MB%s\n", label, (long long)bytes, (double)bytes / 1e6, note);
}

void engine_print_plan(const Engine *e, FILE *f) {
  const Config *c = e->config;
  fprintf(f, "parameters %.3f M, slots %d, modulation rows %d, micro-batches %d, policy %s\n",
          (double)e->model.params.parameters / 1e6, e->slots, e->segments, c->train.micro_batches,
          memory_policy_name[e->chosen]);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (e->bytes[s]) print_row(f, space_info[s].label, e->bytes[s], engine_counts(e, (Space)s) ? "" : OF_HOST);
    if (e->bases.host_bytes[s]) print_row(f, space_info[s].label, e->bases.host_bytes[s], OF_HOST);
  }
  if (e->first.program)
    print_row(f, "packs decoded ahead",
              loader_packs(c->train.micro_batches, c->data.threads, engine_packs_sent(e) + 1) * e->bytes[SPACE_STAGING],
              OF_HOST);
  print_row(f, "total", engine_device_bytes(e), "");
  SaveCopy copy = config_save_copy(c);
  if (engine_slab_bytes(e, SPACE_ADAM_M) && copy != COPY_NEVER)
    print_row(f, "copy for checkpoints", state_bytes(e),
              copy == COPY_AUTO ? OF_HOST "; without that room a save holds up training" : OF_HOST);
  engine_print_state(e, f);
  if (e->first.program) planner_print(e->first.program, f);
}
