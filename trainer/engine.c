#include "trainer/engine.h"

#include "base/machine.h"
#include "base/ranks.h"
#include "base/thread.h"
#include "kernels/backends.h"
#include "model/placement.h"
#include "model/program/expected.h"
#include "model/program/replay.h"
#include "trainer/engine_internal.h"

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
  // Every process of this host has its own.
  return given > 0 ? (int64_t)(given * 1e9) : max_i64(0, e->host_left / ranks_on_host() - engine_state_on_host(e)) / 2;
}

int64_t engine_arena_need(const Engine *e, const Program *p) {
  return p->arena_bytes + (p->shares_gradients ? 0 : engine_gradients_in_arena(e));
}

Program *engine_in_queues(const Engine *e, Program *p) {
  p->one_queue = e->config->kernels.streams == STREAMS_SINGLE;
  return p;
}

void engine_measure(Engine *e, const Program *p) {
  e->bytes[SPACE_ARENA] = max_i64(e->bytes[SPACE_ARENA], engine_arena_need(e, p));
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

int64_t engine_gradients_in_arena(const Engine *e) {
  return e->trains && gradients_share_arena(&e->model) ? e->bytes[SPACE_GRADS] : 0;
}

int engine_counts(const Engine *e, Space space) {
  return !engine_on_host(e, space) && !(space == SPACE_GRADS && engine_gradients_in_arena(e));
}

static int64_t units_of(const Engine *e, int64_t bytes) {
  int64_t unit = e->backend.alloc_unit;
  return (bytes + unit - 1) / unit * unit;
}

// What all spaces but `beside` take of the device, and the tables by which it finds the state on the host.
static int64_t device_bytes(const Engine *e, Space beside) {
  int64_t sum = 0, shared = 0, entry = e->backend.host_bytes_mapped;
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (s == (int)beside || !engine_counts(e, (Space)s)) continue;
    if (e->bytes[s] < e->backend.alloc_unit / 2)
      shared += e->bytes[s];
    else
      sum += units_of(e, e->bytes[s]);
  }
  return sum + units_of(e, shared) + (entry ? units_of(e, engine_state_on_host(e) / entry) : 0);
}

int64_t engine_device_bytes(const Engine *e) {
  return device_bytes(e, SPACE_COUNT);
}

int64_t engine_arena_room(const Engine *e) {
  int64_t room = max_i64(0, e->budget - device_bytes(e, SPACE_ARENA));
  return room - room % e->backend.alloc_unit;
}

int engine_record(Engine *e, const Config *c, const Backend *backend, int train, Error *err) {
  Extents extents = extents_expected(c, c->data.micro_batch_tokens);
  return engine_record_with(e, c, backend, train, costs_new(backend, &extents), NULL, err);
}

int engine_record_with(Engine *e, const Config *c, const Backend *backend, int train, Costs costs,
                       const PolicyTable *given, Error *err) {
  *e = (Engine){.config = c,
                .costs = costs,
                .trains = train,
                .slots = c->data.micro_batch_tokens,
                .segments = config_max_images(c) + 1};
  e->costs.processes = c->processes;
  e->given = given;
  e->backend = *backend;
  e->budget = budget_bytes(c, backend);
  if (c->processes > 1 && backend->in_use && backend->kernels()[0]) e->connections = backend->in_use();
  e->host_left = machine_memory_left("");
  backend_choose(&e->backend, c);
  e->model = (Model){.config = c, .backend = &e->backend, .params = params_build(c), .update_part = UPDATE_PART};
  if (config_shards(c) > 1) e->model.shard = ranks_rank();
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
  engine_in_queues(e, p);
  p->use_graph = e->config->kernels.graph && engine_captures(e, p);
  Bases bases = e->bases;
  if (!p->shares_gradients && bases.of[SPACE_ARENA])
    bases.of[SPACE_ARENA] = (char *)bases.of[SPACE_ARENA] + engine_gradients_in_arena(e);
  program_bind(p, &bases);
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

// Says which of the keys about queues and kernels are another backend's.
static void name_idle_queues(const Engine *e) {
  const Backend *b = e->model.backend;
  const Config *c = e->config;
  if (!b->queues && c->memory.state > STATE_DEVICE) log_info("memory.state changes nothing on the %s", b->name);
  if (c->kernels.update == UPDATE_OVERLAPPED && e->update && !engine_overlaps(e))
    log_info("kernels.update: the optimizer's state is on the host, and is updated at each step's end");
  if (!b->queues && (c->kernels.streams != STREAMS_MULTI || !c->kernels.graph || !c->kernels.pdl))
    log_info("kernels.streams, kernels.graph and kernels.pdl change nothing on the %s", b->name);
  if (!b->note && (c->kernels.tiles[TEXT] || c->kernels.tiles[IMAGE]))
    log_info("kernels.tiles changes nothing on the %s", b->name);
}

void engine_begin_step(Engine *e) {
  const Queues *q = e->model.backend->queues;
  if (q)
    q->record(LANE_COMPUTE, EVENT_RESULTS + !e->next_results);
  else
    e->clock = time_now();
}

// Slabs that nothing is written to before a step.
static int pinned_last(const Engine *e, Space space) {
  return e->model.backend->queues && space_has(space, SPACE_ON_HOST) && e->bytes[space] &&
         (!space_has(space, SPACE_LAID_OUT) || e->config->memory.arena);
}

// Of a space whose first part is on the host.
static void host_part_clear(const Engine *e, Space space) {
  OpArgs args = {.span = {.count = e->bases.host_bytes[space]}};
  backend_of_host()->fn[OP_ZERO](&(KernelCall){.out.ZERO.dst = e->bases.host[space], .args = &args});
}

static void host_part_allocate(Engine *e, Space space) {
  e->bases.host[space] = e->model.backend->host_alloc((size_t)e->bases.host_bytes[space]);
  if (e->bases.host[space] && space_has(space, SPACE_CLEARED)) host_part_clear(e, space);
}

// Whether it is there, if there is to be one; -1 with *err.
static int host_part_check(const Engine *e, Space space, Error *err) {
  if (!e->bases.host_bytes[space] || e->bases.host[space]) return 0;
  return error_set(err, "close what else uses this machine's memory, or raise memory.budget_gb",
                   "out of pinned host memory: %s needs %.3f GB", space_info[space].label,
                   (double)e->bases.host_bytes[space] / 1e9);
}

// Moments begin as zeros, which nothing reads before the first update.
static int part_pinned_last(const Engine *e, Space space) {
  return e->bases.host_bytes[space] && space_has(space, SPACE_CLEARED);
}

static void *pin_host_slabs(void *engine) {
  Engine *e = engine;
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (pinned_last(e, (Space)s)) e->bases.of[s] = engine_space_allocate(e, (Space)s);
    if (part_pinned_last(e, (Space)s)) host_part_allocate(e, (Space)s);
  }
  return NULL;
}

static void await_host_slabs(Engine *e) {
  if (e->is_pinning) pthread_join(e->pinning, NULL);
  e->is_pinning = 0;
}

int engine_await_host(Engine *e, Error *err) {
  await_host_slabs(e);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (pinned_last(e, (Space)s) && !e->bases.of[s]) return engine_refuse_space(e, (Space)s, err);
    if (host_part_check(e, (Space)s, err) != 0) return -1;
  }
  return 0;
}

int engine_allocate_begin(Engine *e, Error *err) {
  const Backend *b = e->model.backend;
  int later = 0;
  if (backend_check_ways(b, e->config, err) != 0) return -1;
  name_idle_queues(e);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!e->bytes[s] || (space_has((Space)s, SPACE_LAID_OUT) && !e->config->memory.arena)) continue;
    if (s == SPACE_GRADS && engine_gradients_in_arena(e)) continue;
    if (pinned_last(e, (Space)s)) {
      later = 1;
      continue;
    }
    e->bases.of[s] = engine_space_allocate(e, (Space)s);
    if (!e->bases.of[s]) return engine_refuse_space(e, (Space)s, err);
  }
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (part_pinned_last(e, (Space)s)) {
      later = 1;
      continue;
    }
    if (e->bases.host_bytes[s]) host_part_allocate(e, (Space)s);
    if (host_part_check(e, (Space)s, err) != 0) return -1;
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
  const Queues *q = e->model.backend->queues;
  e->bases.separate = !e->config->memory.arena;
  if (engine_gradients_in_arena(e)) e->bases.of[SPACE_GRADS] = e->bases.of[SPACE_ARENA];
  if (q && q->overlap) q->overlap(e->config->kernels.pdl);
  bind(e, e->first.program);
  bind(e, e->later.program);
  bind(e, e->last.program);
  bind(e, e->update);
  bind(e, e->update_ema);
  for (int i = 0; i < DUE_COUNT; i++) bind(e, e->flush[i]);
  for (int i = 0; i < 2; i++) bind(e, e->opening[i].program);
  bind(e, e->hash);
  bind(e, e->ema_in);
  bind(e, e->ema_out);
  for (int i = 0; i < e->n_forward; i++) bind(e, e->forward[i].m.program);
}

int engine_allocate_end(Engine *e, Error *err) {
  if (engine_await_host(e, err) != 0) return -1;
  engine_bind(e);
  engine_begin_step(e);
  return 0;
}

int engine_allocate(Engine *e, Error *err) {
  return engine_allocate_begin(e, err) != 0 ? -1 : engine_allocate_end(e, err);
}

void engine_flush(Engine *e) {
  Program *p = e->flush[e->due];
  if (p) program_replay(p, NULL);
  e->due = DUE_NOTHING;
}

void engine_use_ema(Engine *e, int ema) {
  if (!e->ema_in || e->due > DUE_WEIGHTS) engine_flush(e); // else ema_in does with the shares as they are
  if (e->ema_in && ema != e->uses_ema) {
    program_replay(ema ? e->ema_in : e->ema_out, NULL);
    e->due = !ema && e->flush[DUE_WEIGHTS] ? DUE_WEIGHTS : DUE_NOTHING;
  }
  e->uses_ema = ema;
}

void engine_free(Engine *e) {
  await_host_slabs(e);
  engine_free_train_programs(e);
  engine_free_state_programs(e);
  for (int i = 0; i < e->n_forward; i++) program_free(e->forward[i].m.program);
  if (engine_gradients_in_arena(e)) e->bases.of[SPACE_GRADS] = NULL;
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
  if (k == 0 && e->due > DUE_WEIGHTS) return &e->opening[e->due - DUE_UPDATE];
  return !k ? &e->first : last ? &e->last : &e->later;
}

const ModelProgram *engine_first_step(const Engine *e, int ema) {
  return e->opening[ema].program ? &e->opening[ema] : &e->first;
}

// What a program does of what is due.
static Due program_does(const Engine *e, const Program *p) {
  for (int i = 0; i < 2; i++)
    if (p == e->opening[i].program) return i ? DUE_UPDATE_EMA : DUE_UPDATE;
  return p == e->first.program ? DUE_WEIGHTS : DUE_NOTHING;
}

void engine_run(Engine *e, const ModelProgram *m, const void *pack, OpTime *times) {
  BatchShape shape = dims_batch_shape(&m->program->dims);
  Due does = program_does(e, m->program);
  if (does > DUE_WEIGHTS && does != e->due) panic("an update that is not due");
  if (does != e->due) engine_flush(e);
  e->due = DUE_NOTHING;
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
  Due update = ema ? DUE_UPDATE_EMA : DUE_UPDATE;
  e->due = e->flush[update] ? update : e->flush[DUE_WEIGHTS] ? DUE_WEIGHTS : DUE_NOTHING;
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
  e->model.backend->download(
      hash, (char *)e->bases.of[SPACE_PARAM_SUMS] + param_sums_offset(&e->model.params, SUMS_OF_BITS), bytes);
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
  engine_await(e);
  host_part_clear(e, space);
}
