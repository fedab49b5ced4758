#include "trainer/engine.h"

#include "base/machine.h"
#include "base/thread.h"
#include "data/loader.h"
#include "kernels/backends.h"
#include "model/program/expected.h"
#include "model/program/planner.h"
#include "model/program/policy.h"
#include "model/program/replay.h"
#include "model/update.h"

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

static void measure(Engine *e, const Program *p) {
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
    measure(e, f->m.program);
    e->bytes[SPACE_STAGING] = max_i64(e->bytes[SPACE_STAGING], pack_bytes(c, slots, f->segments));
    if (slots == e->slots) break;
  }
}

static void free_train_programs(Engine *e) {
  program_free(e->first.program);
  program_free(e->later.program);
  e->first = e->later = (ModelProgram){0};
  policy_table_free(&e->policy);
}

// Records the training programs under one policy.
static int record_train(Engine *e, MemoryPolicy policy, Error *err) {
  const Config *c = e->config;
  free_train_programs(e);
  e->chosen = policy;
  e->policy = policy_table_new(c->model.layers, policy);
  for (int i = 0; i < c->memory.per_tensors; i++) {
    const TensorPolicy *t = &c->memory.per_tensor[i];
    if (policy_table_set(&e->policy, t->name, t->policy, err) != 0) return -1;
  }
  int several = c->train.micro_batches > 1;
  e->first =
      transformer_record(&e->model, several ? MODE_TRAIN_FIRST : MODE_TRAIN_ONLY, e->slots, e->segments, &e->policy);
  if (several) e->later = transformer_record(&e->model, MODE_TRAIN_MIDDLE, e->slots, e->segments, &e->policy);
  return 0;
}

// Whether a space counts against the budget. All programs share one arena and one host slab, which counts where host
// and device memory are one.
static int counts(const Engine *e, Space space) {
  return !space_has(space, SPACE_ON_HOST) || !e->model.backend->queues;
}

static int64_t total_bytes(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++)
    if (counts(e, (Space)s)) sum += e->bytes[s];
  return sum;
}

// Records the training programs under a policy and measures them on top of `others`, the bytes of all other programs.
static int try_policy(Engine *e, MemoryPolicy policy, const int64_t others[SPACE_COUNT], Error *err) {
  if (record_train(e, policy, err) != 0) return -1;
  memcpy(e->bytes, others, sizeof e->bytes);
  measure(e, e->first.program);
  if (e->later.program) measure(e, e->later.program);
  return 0;
}

// "auto" takes the first policy that fits: everything kept, then per-layer checkpoints; on the CPU the host slab is the
// same memory, so offloading never helps there.
static int choose_policy(Engine *e, Error *err) {
  MemoryPolicy want = e->config->memory.policy;
  int64_t others[SPACE_COUNT];
  memcpy(others, e->bytes, sizeof others);
  if (want != MEMORY_AUTO) return try_policy(e, want, others, err);
  if (try_policy(e, MEMORY_KEEP, others, err) != 0) return -1;
  return total_bytes(e) <= e->budget ? 0 : try_policy(e, MEMORY_RECOMPUTE, others, err);
}

static const char *const memory_policy_name[] = {
    [MEMORY_AUTO] = "auto", [MEMORY_KEEP] = "keep", [MEMORY_RECOMPUTE] = "recompute", [MEMORY_OFFLOAD] = "offload"};

// "the largest: 8 x expert h, 0.201 GB", of what fills the arena.
static void name_largest(const Engine *e, char *text, size_t size) {
  const Program *fullest = NULL;
  const Program *all[ENGINE_FORWARD_PROGRAMS + 2] = {e->first.program, e->later.program};
  for (int i = 0; i < e->n_forward; i++) all[2 + i] = e->forward[i].m.program;
  for (int i = 0; i < e->n_forward + 2; i++)
    if (all[i] && (!fullest || all[i]->arena_bytes > fullest->arena_bytes)) fullest = all[i];
  Peak peak = planner_peak(fullest);
  snprintf(text, size, "the largest: %d x %s, %.3f GB", peak.share[0].count, peak.share[0].name,
           (double)peak.share[0].bytes / 1e9);
}

int64_t engine_device_bytes(const Engine *e) {
  return total_bytes(e);
}

char *engine_memory_text(const Engine *e) {
  return xasprintf("%.3f GB of the %.3f GB that it may take, policy %s", (double)total_bytes(e) / 1e9,
                   (double)e->budget / 1e9, memory_policy_name[e->chosen]);
}

int engine_check_budget(const Engine *e, Error *err) {
  int64_t budget = e->budget, need = total_bytes(e);
  int64_t activations = e->bytes[SPACE_ARENA] + (counts(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0);
  if (need <= budget) return 0;
  char largest[128];
  const char *limit;
  name_largest(e, largest, sizeof largest);
  machine_memory("", &limit);
  int given = e->config->memory.budget_gb > 0, device = !given && e->model.backend->queues;
  return error_set(err, "lower data.micro_batch_tokens (--tokens) or raise memory.budget_gb; --plan shows the table",
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
  int64_t there = backend_of_host()->memory();
  if (counts(e, SPACE_HOST) || e->bytes[SPACE_HOST] <= there) return 0;
  return error_set(err,
                   "lower data.micro_batch_tokens (--tokens) or train with --memory recompute; --plan shows the table",
                   "%.3f GB of activations are to be offloaded to this machine, which has %.3f GB for that",
                   (double)e->bytes[SPACE_HOST] / 1e9, (double)there / 1e9);
}

int engine_record(Engine *e, const Config *c, const Backend *backend, int train, Error *err) {
  Extents extents = extents_expected(c, c->data.micro_batch_tokens);
  return engine_record_with(e, c, backend, train, costs_new(backend, &extents), err);
}

int engine_record_with(Engine *e, const Config *c, const Backend *backend, int train, Costs costs, Error *err) {
  *e = (Engine){.config = c, .costs = costs, .slots = c->data.micro_batch_tokens, .segments = config_max_images(c) + 1};
  e->backend = *backend;
  e->budget = budget_bytes(c, backend);
  backend_choose(&e->backend, c);
  e->model = (Model){.config = c, .backend = &e->backend, .params = params_build(c)};
  int64_t n = e->model.params.total;
  int64_t act = (int64_t)backend->dtype_bytes[DT_ACT], real_bytes = (int64_t)backend->dtype_bytes[DT_REAL];
  Dims d = dims_from_config(c, e->slots, e->segments);
  e->bytes[SPACE_WEIGHTS] = n * act;
  e->bytes[SPACE_METRICS] = metrics_size(&d) * (int64_t)sizeof(double);
  e->bytes[SPACE_STAGING] = pack_bytes(c, e->slots, e->segments);
  e->bytes[SPACE_INPUT] = (int64_t)d.T * d.P * act;
  if (c->train.ema > 0) e->bytes[SPACE_EMA] = n * real_bytes;
  record_forward(e, MODE_EVAL);
  record_forward(e, MODE_GENERATE);
  record_forward(e, MODE_WRITE);
  e->bytes[SPACE_BATCH] = e->bytes[SPACE_STAGING];
  if (c->train.ema > 0) {
    e->bytes[SPACE_GRADS] = n * act; // where the weights lie while the EMA is in their place
    e->ema_in = ema_record(&e->model, 1);
    e->ema_out = ema_record(&e->model, 0);
  }
  if (!train) return 0;

  e->bytes[SPACE_REST] = n * backend->remainder_bytes;
  e->bytes[SPACE_GRADS] = e->bytes[SPACE_ADAM_M] = e->bytes[SPACE_ADAM_V] = n * real_bytes;
  if (c->train.micro_batches > 1 && backend->gradient_per_micro) e->bytes[SPACE_MICRO_GRADS] = n * real_bytes;
  e->bytes[SPACE_SCALARS] = sizeof(StepScalars);
  e->bytes[SPACE_STATUS] = sizeof(UpdateStatus);
  e->update = update_record(&e->model, 0);
  measure(e, e->update);
  if (c->train.ema > 0) {
    e->update_ema = update_record(&e->model, 1);
    measure(e, e->update_ema);
  }
  if (c->train.verify_every) {
    e->hash = hash_record(&e->model, &e->hashes);
    measure(e, e->hash);
  }
  return choose_policy(e, err);
}

static void *space_allocate(const Backend *b, Space space, int64_t bytes) {
  return space_has(space, SPACE_ON_HOST) ? b->host_alloc((size_t)bytes) : b->alloc((size_t)bytes);
}

static void space_release(const Backend *b, Space space, void *at) {
  if (space_has(space, SPACE_ON_HOST))
    b->host_release(at);
  else
    b->release(at);
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
  return error_set(err, "lower data.micro_batch_tokens (--tokens) or train with --memory recompute; the table is above",
                   "out of memory: %s needs %.3f GB%s%s", space_info[space].label, (double)e->bytes[space] / 1e9,
                   space == SPACE_ARENA ? "; " : "", space == SPACE_ARENA ? largest : "");
}

static void *pin_host_slab(void *engine) {
  Engine *e = engine;
  e->bases.of[SPACE_HOST] = e->model.backend->host_alloc((size_t)e->bytes[SPACE_HOST]);
  return NULL;
}

static void await_host_slab(Engine *e) {
  if (e->is_pinning) pthread_join(e->pinning, NULL);
  e->is_pinning = 0;
}

int engine_allocate_begin(Engine *e, Error *err) {
  const Backend *b = e->model.backend;
  if (backend_check_ways(b, e->config, err) != 0) return -1;
  name_idle_queues(e);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!e->bytes[s] || (space_has((Space)s, SPACE_LAID_OUT) && !e->config->memory.arena)) continue;
    if (s == SPACE_HOST && b->queues) continue; // last
    e->bases.of[s] = space_allocate(b, (Space)s, e->bytes[s]);
    if (!e->bases.of[s]) return refuse_space(e, (Space)s, err);
  }
  for (int s = 0; s < SPACE_COUNT; s++)
    if (e->bases.of[s] && space_has((Space)s, SPACE_CLEARED)) b->clear(e->bases.of[s], (size_t)e->bytes[s]);
  if (b->queues && !pin(e))
    return error_set(err, "close what else uses this machine's memory", "out of pinned host memory");
  if (b->queues && e->bytes[SPACE_HOST] && e->config->memory.arena) {
    e->is_pinning = thread_start(&e->pinning, pin_host_slab, e) == 0;
    if (!e->is_pinning) pin_host_slab(e);
  }
  return 0;
}

int engine_allocate_end(Engine *e, Error *err) {
  await_host_slab(e);
  if (e->bytes[SPACE_HOST] && e->config->memory.arena && !e->bases.of[SPACE_HOST])
    return refuse_space(e, SPACE_HOST, err);
  e->bases.separate = !e->config->memory.arena;
  bind(e, e->first.program);
  bind(e, e->later.program);
  bind(e, e->update);
  bind(e, e->update_ema);
  bind(e, e->hash);
  bind(e, e->ema_in);
  bind(e, e->ema_out);
  for (int i = 0; i < e->n_forward; i++) bind(e, e->forward[i].m.program);
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
  free_train_programs(e);
  program_free(e->update);
  program_free(e->update_ema);
  program_free(e->hash);
  program_free(e->ema_in);
  program_free(e->ema_out);
  for (int i = 0; i < e->n_forward; i++) program_free(e->forward[i].m.program);
  for (int s = 0; s < SPACE_COUNT; s++)
    if (e->bases.of[s]) space_release(e->model.backend, (Space)s, e->bases.of[s]);
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
  return k ? &e->later : &e->first;
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
  program_replay(e->hash, NULL);
  e->model.backend->download(hash, program_address(e->hash, e->hashes), (size_t)e->model.params.n * sizeof *hash);
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
    if (space_has((Space)s, SPACE_SAVED)) sum += e->bytes[s];
  return sum;
}

void *engine_slab(const Engine *e, Space space) {
  return e->bases.of[space];
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
  for (int s = 0; s < SPACE_COUNT; s++)
    if (e->bytes[s]) print_row(f, space_info[s].label, e->bytes[s], counts(e, (Space)s) ? "" : OF_HOST);
  if (e->first.program)
    print_row(f, "packs decoded ahead",
              loader_packs(c->train.micro_batches, c->data.threads, engine_packs_sent(e) + 1) * e->bytes[SPACE_STAGING],
              OF_HOST);
  print_row(f, "total", total_bytes(e), "");
  SaveCopy copy = config_save_copy(c);
  if (e->bytes[SPACE_ADAM_M] && copy != COPY_NEVER)
    print_row(f, "copy for checkpoints", state_bytes(e),
              copy == COPY_AUTO ? OF_HOST "; without that room a save holds up training" : OF_HOST);
  if (e->first.program) planner_print(e->first.program, f);
}
