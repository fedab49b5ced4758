#include "trainer/engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SMALLEST_FORWARD = 64 };

static int64_t pack_bytes(const Config *c, int slots, int segments) {
  Dims d = dims_from_config(c, slots, segments);
  return (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&d), NULL);
}

// memory.budget_gb is about the arena; memory.arena: false, which is for sanitizers, takes more.
static int64_t budget_bytes(const Config *c) {
  if (c->memory.budget_gb > 0) return (int64_t)(c->memory.budget_gb * 1e9);
  // "auto" on the CPU: what the machine has, less a fifth for data, decoding and everybody else.
  return (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE) / 5 * 4;
}

static void measure(Engine *e, const Program *p) {
  e->bytes[SPACE_ARENA] = max_i64(e->bytes[SPACE_ARENA], p->arena_bytes);
  e->bytes[SPACE_HOST] = max_i64(e->bytes[SPACE_HOST], p->host_bytes);
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
  e->first = transformer_record(&e->model, MODE_TRAIN_FIRST, e->slots, e->segments, &e->policy);
  if (c->train.micro_batches > 1)
    e->later = transformer_record(&e->model, MODE_TRAIN_LATER, e->slots, e->segments, &e->policy);
  return 0;
}

// Everything that is allocated. All programs share one arena and one host slab; on the CPU the slab is the same memory
// as the rest.
static int64_t total_bytes(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++) sum += e->bytes[s];
  return sum;
}

// Records the training programs under a policy and measures them on top of `rest`, the bytes of all other programs.
static int try_policy(Engine *e, MemoryPolicy policy, const int64_t rest[SPACE_COUNT], Error *err) {
  if (record_train(e, policy, err) != 0) return -1;
  memcpy(e->bytes, rest, sizeof e->bytes);
  measure(e, e->first.program);
  if (e->later.program) measure(e, e->later.program);
  return 0;
}

// "auto" takes the first policy that fits: everything kept, then per-layer checkpoints; on the CPU the host slab is the
// same memory, so offloading never helps there.
static int choose_policy(Engine *e, Error *err) {
  MemoryPolicy want = e->config->memory.policy;
  int64_t rest[SPACE_COUNT];
  memcpy(rest, e->bytes, sizeof rest);
  if (want != MEMORY_AUTO) return try_policy(e, want, rest, err);
  if (try_policy(e, MEMORY_KEEP, rest, err) != 0) return -1;
  return total_bytes(e) <= budget_bytes(e->config) ? 0 : try_policy(e, MEMORY_RECOMPUTE, rest, err);
}

static const char *const memory_policy_name[] = {
    [MEMORY_AUTO] = "auto", [MEMORY_KEEP] = "keep", [MEMORY_RECOMPUTE] = "recompute", [MEMORY_OFFLOAD] = "offload"};

int engine_check_budget(const Engine *e, Error *err) {
  int64_t budget = budget_bytes(e->config), need = total_bytes(e);
  int64_t activations = e->bytes[SPACE_ARENA] + e->bytes[SPACE_HOST];
  if (need <= budget) return 0;
  return error_set(err, "lower data.micro_batch_tokens (--tokens) or raise memory.budget_gb; --plan shows the table",
                   "%.3f GB are needed (%.3f GB of state, %.3f GB of activations under memory.policy %s), %.3f GB more "
                   "than the %.3f GB of memory.budget_gb%s",
                   (double)need / 1e9, (double)(need - activations) / 1e9, (double)activations / 1e9,
                   memory_policy_name[e->chosen], (double)(need - budget) / 1e9, (double)budget / 1e9,
                   e->config->memory.budget_gb > 0 ? "" : " auto, four fifths of the machine's memory");
}

int engine_record(Engine *e, const Config *c, const Backend *backend, int train, Error *err) {
  *e = (Engine){.config = c, .slots = c->data.micro_batch_tokens, .segments = config_max_images(c) + 1};
  e->model = (Model){.config = c, .backend = backend, .params = params_build(c)};
  int64_t n = e->model.params.total;
  int64_t act = (int64_t)backend->dtype_bytes[DT_ACT], real_bytes = (int64_t)backend->dtype_bytes[DT_REAL];
  Dims d = dims_from_config(c, e->slots, e->segments);
  e->bytes[SPACE_WEIGHTS] = n * act;
  e->bytes[SPACE_METRICS] = metrics_size(&d) * (int64_t)sizeof(double);
  e->bytes[SPACE_STAGING] = pack_bytes(c, e->slots, e->segments);
  e->bytes[SPACE_INPUT] = (int64_t)d.T * d.P * act;
  if (c->train.ema > 0) e->bytes[SPACE_EMA] = n * real_bytes;
  record_forward(e, MODE_EVAL);
  record_forward(e, MODE_DRAW);
  record_forward(e, MODE_WRITE);
  e->bytes[SPACE_BATCH] = e->bytes[SPACE_STAGING];
  if (!train) return 0;

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
  return choose_policy(e, err);
}

static const char *const space_label[SPACE_COUNT] = {[SPACE_ARENA] = "activations (arena)",
                                                     [SPACE_HOST] = "offloaded (host slab)",
                                                     [SPACE_WEIGHTS] = "weights",
                                                     [SPACE_GRADS] = "gradients",
                                                     [SPACE_MICRO_GRADS] = "micro-step gradients",
                                                     [SPACE_ADAM_M] = "Adam m",
                                                     [SPACE_ADAM_V] = "Adam v",
                                                     [SPACE_EMA] = "EMA",
                                                     [SPACE_STAGING] = "staged pack",
                                                     [SPACE_BATCH] = "live pack",
                                                     [SPACE_METRICS] = "metrics",
                                                     [SPACE_SCALARS] = "step scalars",
                                                     [SPACE_STATUS] = "update status",
                                                     [SPACE_INPUT] = "sampler input"};

int engine_allocate(Engine *e, Error *err) {
  const Backend *b = e->model.backend;
  if (engine_check_budget(e, err) != 0) return -1;
  for (int s = 0; s < SPACE_COUNT; s++) {
    int laid_out = s == SPACE_ARENA || s == SPACE_HOST; // without an arena program_bind allocates tensor by tensor
    if (!e->bytes[s] || (laid_out && !e->config->memory.arena)) continue;
    e->train_bases.of[s] = b->alloc((size_t)e->bytes[s]);
    if (!e->train_bases.of[s])
      return error_set(
          err, "lower data.micro_batch_tokens (--tokens) or train with --memory recompute; --plan shows the table",
          "out of memory: %s needs %.3f GB", space_label[s], (double)e->bytes[s] / 1e9);
  }
  e->train_bases.separate = !e->config->memory.arena;
  e->forward_bases = e->train_bases;
  if (e->first.program) program_bind(e->first.program, &e->train_bases);
  if (e->later.program) program_bind(e->later.program, &e->train_bases);
  if (e->update) program_bind(e->update, &e->train_bases);
  if (e->update_ema) program_bind(e->update_ema, &e->train_bases);
  engine_use_ema(e, e->config->train.ema > 0);
  return 0;
}

void engine_use_ema(Engine *e, int ema) {
  e->forward_bases.of[SPACE_WEIGHTS] = e->train_bases.of[ema && e->bytes[SPACE_EMA] ? SPACE_EMA : SPACE_WEIGHTS];
  for (int i = 0; i < e->n_forward; i++) program_bind(e->forward[i].m.program, &e->forward_bases);
}

void engine_free(Engine *e) {
  free_train_programs(e);
  program_free(e->update);
  program_free(e->update_ema);
  for (int i = 0; i < e->n_forward; i++) program_free(e->forward[i].m.program);
  for (int s = 0; s < SPACE_COUNT; s++)
    if (e->train_bases.of[s]) e->model.backend->release(e->train_bases.of[s]);
  params_free(&e->model.params);
  *e = (Engine){0};
}

const ForwardProgram *engine_forward(const Engine *e, Mode mode, int tokens, int images) {
  for (int i = 0; i < e->n_forward; i++) {
    const ForwardProgram *f = &e->forward[i];
    if (f->mode == mode && f->slots >= tokens && f->segments > images) return f;
  }
  return NULL;
}

void engine_run(Engine *e, const ModelProgram *m, const void *pack, double *op_seconds) {
  BatchShape shape = dims_batch_shape(&m->program->dims);
  e->model.backend->upload(e->train_bases.of[SPACE_STAGING], pack, batch_bind(&(Batch){0}, shape, NULL));
  program_replay(m->program, op_seconds);
}

void engine_read(const Engine *e, const ModelProgram *m, TensorId t, int64_t count, float *out) {
  const Tensor *tensor = &m->program->tensors[t];
  const Backend *b = e->model.backend;
  size_t element = b->dtype_bytes[tensor->dtype];
  if (element == sizeof(float)) {
    b->download(out, program_address(m->program, t), (size_t)count * sizeof(float));
    return;
  }
  double *wide = xmalloc((size_t)count * sizeof *wide); // the double build, used by tests
  b->download(wide, program_address(m->program, t), (size_t)count * sizeof *wide);
  for (int64_t i = 0; i < count; i++) out[i] = (float)wide[i];
  free(wide);
}

void *engine_slab(const Engine *e, Space space) {
  return e->train_bases.of[space];
}

void engine_print_plan(const Engine *e, FILE *f) {
  fprintf(f, "parameters %.3f M, slots %d, modulation rows %d, micro-batches %d, policy %s\n",
          (double)e->model.params.parameters / 1e6, e->slots, e->segments, e->config->train.micro_batches,
          memory_policy_name[e->chosen]);
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!e->bytes[s]) continue;
    fprintf(f, "  %-24s %14lld bytes  %9.3f MB\n", space_label[s], (long long)e->bytes[s], (double)e->bytes[s] / 1e6);
  }
  int64_t total = total_bytes(e);
  fprintf(f, "  %-24s %14lld bytes  %9.3f MB\n", "total", (long long)total, (double)total / 1e6);
  if (e->first.program) planner_print(e->first.program, f);
}
