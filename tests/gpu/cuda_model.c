// Whole-model gradients on the GPU against the CPU backend whose DT_ACT results are rounded to bf16, at random
// parameters.
//
//   cuda_model [SEED]    exit code 1 when something differs more than it may, 2 without a GPU
//
// A small difference in a router's logits can send a row to another expert, after which nothing compares. So the CPU's
// choices are forced on the GPU where they differ, in a replay op by op; how often they would differ is known from a
// second replay that chooses freely. Then: that replay has the same bits as graphs, and graphs under random memory
// policies, with their copies delayed at random, have the same gradient bits as keeping everything.
#include "tests/gpu/cuda_shapes.h"
#include "trainer/slab.h"

#include "base/base.h"
#include "data/packer.h"
#include "model/config/load.h"
#include "model/program/policy.h"
#include "model/program/replay.h"
#include "tests/ops/slab_fill.h"

#include <stdio.h>
#include <stdlib.h>

enum { LARGE = 1024, POLICIES = 50 };
static const double least_cosine[2] = {0.99, 0.999}; // of parameters with fewer elements than LARGE, and of others
static const double norm_tolerance = 0.01;
// Rows whose choice rounding may change. It was 0.1 to 0.7% where all were free; a router that is wrong changes most.
static const double most_differing = 0.05;

typedef struct ModelConfig {
  const char *name;
  int pack;
  const char *set[24];
} ModelConfig;

static const ModelConfig configs[] = {
    {"tied, shared projections, no shared experts",
     PACK_MIXED,
     {"model.dim=128", "model.layers=4", "model.heads=4", "model.kv_heads=2", "model.head_dim=32", "model.cond_dim=64",
      "model.patch=8", "model.vocab=512", "model.tie_embeddings=true", "model.text.experts=4",
      "model.text.expert_dim=128", "model.text.top_k=2", "model.image.experts=4", "model.image.expert_dim=192",
      "model.image.top_k=2", "data.image_size=32", "data.micro_batch_tokens=640", "data.max_images=64"}},
    {"everything by modality, shared experts, bottleneck",
     PACK_LONG,
     {"model.dim=256",         "model.layers=3",
      "model.heads=4",         "model.kv_heads=2",
      "model.head_dim=64",     "model.cond_dim=96",
      "model.patch=4",         "model.patch_bottleneck=24",
      "model.vocab=1024",      "model.attn_per_modality=true",
      "model.text.experts=16", "model.text.expert_dim=64",
      "model.text.top_k=4",    "model.text.shared_dim=128",
      "model.image.experts=8", "model.image.expert_dim=136",
      "model.image.top_k=2",   "model.image.shared_dim=256",
      "data.image_size=64",    "data.micro_batch_tokens=1777",
      "data.max_images=24"}},
    {"one choice, heads of 128, one shared expert",
     PACK_TRAINING,
     {"model.dim=512", "model.layers=2", "model.heads=4", "model.kv_heads=1", "model.head_dim=128",
      "model.cond_dim=128", "model.patch=8", "model.vocab=2048", "model.attn_per_modality=true", "model.text.experts=8",
      "model.text.expert_dim=256", "model.text.top_k=1", "model.image.experts=6", "model.image.expert_dim=384",
      "model.image.top_k=1", "model.image.shared_dim=128", "data.image_size=128", "data.micro_batch_tokens=2048",
      "data.max_images=16"}},
};
enum { CONFIGS = sizeof configs / sizeof *configs, CHECKED_WITH_POLICIES = 1 };

// Where each layer's router sent the rows, and the weights it gave them.
typedef struct Choices {
  int32_t *route; // [L][route size]
  float *weights; // [L][T * Kmax]
  int64_t route_size, weights_size;
} Choices;

typedef struct ModelTest {
  CudaCase pack; // for its pack and sizes
  Config config;
  Engine cpu, cuda;
  Choices choices; // the CPU's
  int failures;
} ModelTest;

static size_t pack_bytes(const ModelTest *t) {
  return batch_bind(&(Batch){0}, dims_batch_shape(&t->pack.ops.dims), NULL);
}

static void put_pack(ModelTest *t, Engine *e) {
  e->model.backend->upload(e->bases.of[SPACE_STAGING], t->pack.ops.batch.dims, pack_bytes(t));
}

// NaN bytes wherever a step must write before it reads.
static void poison(Engine *e) {
  static const Space spaces[] = {SPACE_ARENA, SPACE_GRADS, SPACE_BATCH, SPACE_METRICS, SPACE_SCRATCH};
  for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
    size_t bytes = (size_t)e->bytes[spaces[i]];
    if (!bytes) continue;
    void *nan = xmalloc(bytes);
    e->model.backend->upload(e->bases.of[spaces[i]], memset(nan, 0xFF, bytes), bytes);
    free(nan);
  }
}

static float *read_grads(const Engine *e) {
  float *grads = xmalloc((size_t)e->model.params.total * sizeof *grads);
  engine_slab_read(e, SPACE_GRADS, grads);
  return grads;
}

static Metrics read_metrics(const Engine *e) {
  Metrics m;
  e->model.backend->download(&m, e->bases.of[SPACE_METRICS], sizeof m);
  return m;
}

// ---- the CPU, rounding ----

static void cpu_step(ModelTest *t) {
  const Program *p = t->cpu.first.program;
  put_pack(t, &t->cpu);
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    Value out[OP_MAX_OUT] = {0};
    for (int k = 0; k < OP_MAX_OUT; k++) {
      if (op->out[k] == NO_TENSOR) continue;
      const Tensor *x = &p->tensors[op->out[k]];
      out[k] = (Value){.data = op->call.out.at[k], .dtype = x->dtype, .count = x->count};
    }
    cpu_call_rounded(op->kind, &op->call, out);
    if (op->kind != OP_ROUTER_FWD) continue;
    memcpy(t->choices.weights + op->layer * t->choices.weights_size, op->call.out.ROUTER_FWD.weights,
           (size_t)t->choices.weights_size * sizeof(float));
    memcpy(t->choices.route + op->layer * t->choices.route_size, op->call.out.ROUTER_FWD.route,
           (size_t)t->choices.route_size * sizeof(int32_t));
  }
}

// ---- the GPU, op by op ----

static int expert_of(const Route *route, const int32_t *experts, int m, int slot) {
  int first = m == TEXT ? 0 : experts[TEXT];
  for (int g = first; g < first + experts[m]; g++)
    if (slot >= route->begin[g] && slot < route->begin[g] + route->count[g]) return g;
  return -1;
}

// Compares a layer's choices with the CPU's: returns the rows that differ. With `force` those rows then go where the
// CPU's went, with its weights; the others keep the weights the GPU gave them.
static int compare_choices(ModelTest *t, const Op *op, bool force) {
  const Backend *b = &backend_cuda;
  const Dims *d = &t->pack.ops.dims;
  const BatchDims *n = t->pack.ops.batch.dims;
  int kmax = dims_kmax(d), differ = 0;
  int32_t *want = t->choices.route + op->layer * t->choices.route_size;
  const float *weights = t->choices.weights + op->layer * t->choices.weights_size;
  size_t route_bytes = (size_t)t->choices.route_size * sizeof *want;
  size_t weight_bytes = (size_t)t->choices.weights_size * sizeof *weights;
  int32_t *got = xmalloc(route_bytes);
  float *given = xmalloc(weight_bytes);
  b->download(given, op->call.out.ROUTER_FWD.weights, weight_bytes);
  b->download(got, op->call.out.ROUTER_FWD.route, route_bytes);
  Route ours, theirs;
  route_bind(&ours, d, got);
  route_bind(&theirs, d, want);
  for (int r = 0; r < n->n_text + n->n_image; r++) {
    int m = r < n->n_text ? TEXT : IMAGE, same = 1;
    for (int j = 0; j < d->K[m]; j++)
      same &=
          expert_of(&ours, d->E, m, ours.slot[r * kmax + j]) == expert_of(&theirs, d->E, m, theirs.slot[r * kmax + j]);
    if (same) continue;
    differ++;
    memcpy(given + r * kmax, weights + r * kmax, (size_t)kmax * sizeof *given);
  }
  if (force) {
    b->upload(op->call.out.ROUTER_FWD.weights, given, weight_bytes);
    b->upload(op->call.out.ROUTER_FWD.route, want, route_bytes);
  }
  free(got);
  free(given);
  return differ;
}

// Replays a program op by op; returns the rows, over all layers, that chose other experts than on the CPU.
static int cuda_step(ModelTest *t, const Program *p, bool force) {
  int differ = 0;
  put_pack(t, &t->cuda);
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    backend_cuda.fn[op->kind](&op->call);
    if (op->kind == OP_ROUTER_FWD) differ += compare_choices(t, op, force);
  }
  return differ;
}

// ---- comparison ----

static void fail(ModelTest *t, const char *what, const char *name, double number) {
  printf("  FAIL %s: %s %.6f\n", what, name, number);
  t->failures++;
}

// Every parameter's gradient against `scale` times the CPU's.
static void compare_grads(ModelTest *t, const char *what, const float *want, double scale) {
  const ParamTable *params = &t->cuda.model.params;
  float *got = read_grads(&t->cuda);
  double worst_cosine[2] = {1, 1}, worst_norm = 0;
  const char *where[2] = {"", ""}, *norm_where = "";
  for (int i = 0; i < params->n; i++) {
    const Param *p = &params->of[i];
    double gg = 0, ww = 0, gw = 0;
    for (int64_t j = p->offset; j < p->offset + p->count; j++) {
      double g = (double)got[j], w = scale * (double)want[j];
      gg += g * g;
      ww += w * w;
      gw += g * w;
    }
    int large = p->count >= LARGE;
    double cosine = gw / sqrt(gg * ww), norm = fabs(sqrt(gg / ww) - 1);
    if (!(ww > 0)) fail(t, p->name, "the CPU's gradient is zero:", ww);
    if (!(cosine >= least_cosine[large])) fail(t, p->name, "cosine", cosine);
    if (!(norm <= norm_tolerance)) fail(t, p->name, "norms differ by a factor 1 +-", norm);
    if (!(cosine >= worst_cosine[large])) {
      worst_cosine[large] = cosine;
      where[large] = p->name;
    }
    if (!(norm <= worst_norm)) {
      worst_norm = norm;
      norm_where = p->name;
    }
  }
  printf("  %s: %d parameters; least cosine %.6f (%s), of small ones %.6f (%s); norms within %.3f%% (%s)\n", what,
         params->n, worst_cosine[1], where[1], worst_cosine[0], where[0], 100 * worst_norm, norm_where);
  free(got);
}

static void compare_metrics(ModelTest *t, Metrics want) {
  Metrics got = read_metrics(&t->cuda);
  const struct {
    const char *name;
    double got, want, tolerance;
  } of[] = {{"nll of text", got.nll[0], want.nll[0], norm_tolerance},
            {"nll of captions", got.nll[1], want.nll[1], norm_tolerance},
            {"targets of text", got.targets[0], want.targets[0], 0},
            {"targets of captions", got.targets[1], want.targets[1], 0},
            {"flow", got.flow, want.flow, norm_tolerance},
            {"flow elements", got.flow_elems, want.flow_elems, 0},
            {"balance", got.balance, want.balance, norm_tolerance},
            {"router z", got.z, want.z, norm_tolerance}};
  printf("  losses, relative to the CPU's:");
  for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
    double error = of[i].want != 0 ? of[i].got / of[i].want - 1 : of[i].got;
    printf("%s %s %+.1e", i ? "," : "", of[i].name, error);
    if (!(fabs(error) <= of[i].tolerance)) fail(t, "losses", of[i].name, error);
  }
  printf("\n");
}

static void compare_bits(ModelTest *t, const char *what, const float *want) {
  float *got = read_grads(&t->cuda);
  const ParamTable *params = &t->cuda.model.params;
  for (int i = 0; i < params->n; i++) {
    const Param *p = &params->of[i];
    if (memcmp(got + p->offset, want + p->offset, (size_t)p->count * sizeof *got) == 0) continue;
    printf("  FAIL %s: the gradient of %s has other bits\n", what, p->name);
    t->failures++;
    break;
  }
  free(got);
}

// A micro-batch all of whose documents were lost adds nothing.
static void add_empty_pack(ModelTest *t) {
  BatchShape shape = dims_batch_shape(&t->pack.ops.dims);
  Batch b;
  size_t bytes = batch_bind(&b, shape, NULL);
  void *block = aligned_alloc(64, bytes);
  if (!block) panic("no memory for a pack");
  Error err;
  batch_bind(&b, shape, block);
  if (pack_layout(NULL, 0, shape, &b, &err) != 0) fatal(&err);
  pack_scale(&b, shape, 1, 1, 1, 2, 7);
  float *before = read_grads(&t->cuda);
  engine_run(&t->cuda, &t->cuda.later, block, NULL);
  float *after = read_grads(&t->cuda);
  int64_t other = 0; // by value: -0 + 0 is 0
  for (int k = 0; k < t->cuda.model.params.n; k++) {
    const Param *p = &t->cuda.model.params.of[k];
    for (int64_t i = p->offset; i < p->offset + p->count; i++) other += !(after[i] == before[i]);
  }
  if (other) fail(t, "an empty micro-batch, added", "gradients with other values", (double)other);
  free(before);
  free(after);
  free(block);
}

// ---- memory policies ----

// The copy, up to 15 times more: how often follows from where it writes.
static void copy_slowly(const KernelCall *c) {
  uint64_t hash = (uint64_t)(uintptr_t)c->out.COPY.dst * 0x9E3779B97F4A7C15u;
  for (uint64_t i = 0; i <= hash >> 60; i++) backend_cuda.fn[OP_COPY](c);
}

static PolicyTable random_policy(CudaCase *c, int layers, int i) {
  PolicyTable t = policy_table_new(layers, i == 0 ? MEMORY_OFFLOAD : i == 1 ? MEMORY_RECOMPUTE : MEMORY_KEEP);
  for (int s = 0; s < layers * SAVED_COUNT && i > 1; s++) {
    Policy p = (Policy)case_int(&c->ops, POLICY_KEEP, POLICY_OFFLOAD);
    t.of[s] = (uint8_t)(policy_allowed((Saved)(s % SAVED_COUNT), p) ? p : POLICY_KEEP);
  }
  return t;
}

static void check_policies(ModelTest *t, const float *want) {
  Backend slow = backend_cuda;
  slow.fn[OP_COPY] = copy_slowly;
  const Engine *e = &t->cuda;
  Model model = {.config = &t->config, .backend = &slow, .params = e->model.params};
  int before = t->failures;
  for (int i = 0; i < POLICIES && t->failures == before; i++) {
    char what[32];
    snprintf(what, sizeof what, "policy %d", i);
    PolicyTable policy = random_policy(&t->pack, t->config.model.layers, i);
    ModelProgram m = transformer_record(&model, MODE_TRAIN_FIRST, e->slots, e->segments, &policy);
    Bases bases = e->bases;
    size_t bytes = (size_t)max_i64(m.program->arena_bytes, 256);
    void *nan = xmalloc(bytes);
    bases.of[SPACE_ARENA] = slow.alloc(bytes);
    bases.of[SPACE_HOST] = slow.host_alloc((size_t)max_i64(m.program->host_bytes, 256));
    bases.of[SPACE_SCRATCH] = slow.alloc((size_t)max_i64(m.program->scratch_bytes, 256));
    if (!bases.of[SPACE_ARENA] || !bases.of[SPACE_HOST] || !bases.of[SPACE_SCRATCH]) panic("no memory for %s", what);
    slow.upload(bases.of[SPACE_ARENA], memset(nan, 0xFF, bytes), bytes);
    m.program->use_graph = 1;
    program_bind(m.program, &bases);
    for (int run = 0; run < 2; run++) {
      poison(&t->cuda);
      put_pack(t, &t->cuda);
      program_replay(m.program, NULL);
      compare_bits(t, what, want);
    }
    program_free(m.program);
    slow.release(bases.of[SPACE_ARENA]);
    slow.host_release(bases.of[SPACE_HOST]);
    slow.release(bases.of[SPACE_SCRATCH]);
    policy_table_free(&policy);
    free(nan);
  }
  if (t->failures == before)
    printf("  %d random memory policies with delayed copies: the same gradient bits\n", POLICIES);
}

// ---- workspace ----

// With routers of zeros all rows go to the first experts: a step takes no more memory than with any other routing.
// (That no op writes beyond the scratch memory it asked for is seen by the guards of cuda_ops.)
static void check_one_expert(ModelTest *t) {
  const Engine *e = &t->cuda;
  const ParamTable *params = &e->model.params;
  int64_t element = (int64_t)backend_cuda.dtype_bytes[DT_ACT], before = backend_cuda.in_use(), wrong = 0;
  for (int l = 0; l < t->config.model.layers; l++)
    for (int m = 0; m < MODALITIES; m++) {
      const Param *p = &params->of[params->layer[l].router[m]];
      backend_cuda.clear((char *)e->bases.of[SPACE_WEIGHTS] + p->offset * element, (size_t)(p->count * element));
    }
  poison(&t->cuda);
  engine_run(&t->cuda, &t->cuda.first, t->pack.ops.batch.dims, NULL);
  float *grads = read_grads(e);
  for (int i = 0; i < params->n; i++)
    for (int64_t k = 0; k < params->of[i].count; k++) wrong += !isfinite(grads[params->of[i].offset + k]);
  free(grads);
  if (wrong) fail(t, "all rows at the first experts", "gradients that are not finite", (double)wrong);
  int64_t more = backend_cuda.in_use() - before;
  if (more) fail(t, "all rows at the first experts", "bytes of device memory more", (double)more);
  printf("  all rows at the first experts: in the same memory, of which %.2f MB are scratch\n",
         (double)e->bytes[SPACE_SCRATCH] / 1e6);
}

// ---- one model ----

static void open_model(ModelTest *t, const ModelConfig *m, uint64_t seed) {
  static const char *const common[] = {"train.micro_batches=2", "memory.policy=keep", "router.balance=0.05",
                                       "router.z=0.02", "data.max_caption=96"};
  enum { COMMON = sizeof common / sizeof *common };
  const char *sets[24 + COMMON];
  int n = 0;
  Error err;
  memcpy(sets, common, sizeof common);
  while (m->set[n]) n++;
  memcpy(sets + COMMON, m->set, (size_t)n * sizeof *sets);
  if (config_load(&t->config, NULL, sets, COMMON + n, &err) != 0) fatal(&err);
  if (engine_record(&t->cpu, &t->config, &backend_cpu, 1, &err) != 0 || engine_allocate(&t->cpu, &err) != 0 ||
      engine_record(&t->cuda, &t->config, &backend_cuda, 1, &err) != 0 || engine_allocate(&t->cuda, &err) != 0)
    fatal(&err);
  CudaShape shape = {.name = m->name, .pack = m->pack, .dims = t->cpu.first.program->dims};
  cuda_shape_open(&t->pack, &shape, seed);
  const Dims *d = &t->pack.ops.dims;
  Choices *c = &t->choices;
  c->route_size = route_bind(&(Route){0}, d, NULL);
  c->weights_size = (int64_t)d->T * dims_kmax(d);
  c->route = xmalloc((size_t)(d->L * c->route_size) * sizeof *c->route);
  c->weights = xmalloc((size_t)(d->L * c->weights_size) * sizeof *c->weights);

  int64_t total = t->cpu.model.params.total;
  Value weights = {.data = xmalloc((size_t)total * sizeof(float)), .dtype = DT_ACT, .count = total};
  params_fill(&t->cpu.model.params, PARAMS_RANDOM, seed, sizeof(float), weights.data);
  value_round(weights);
  slab_upload(&t->cpu, SPACE_WEIGHTS, weights.data);
  slab_upload(&t->cuda, SPACE_WEIGHTS, weights.data);
  free(weights.data);
}

static void close_model(ModelTest *t) {
  engine_free(&t->cpu);
  engine_free(&t->cuda);
  op_case_free(&t->pack.ops);
  free(t->choices.route);
  free(t->choices.weights);
}

static int test_model(int config, uint64_t seed) {
  ModelTest *t = xcalloc(1, sizeof *t);
  double start = time_now();
  open_model(t, &configs[config], seed);
  const BatchDims *n = t->pack.ops.batch.dims;
  int rows = (n->n_text + n->n_image) * t->pack.ops.dims.L;
  printf("%s: %d text, %d image, %d filler rows, %d layers\n", configs[config].name, n->n_text, n->n_image,
         t->pack.ops.dims.T - n->n_text - n->n_image, t->pack.ops.dims.L);
  poison(&t->cpu);
  cpu_step(t);
  float *want = read_grads(&t->cpu);

  poison(&t->cuda);
  int differ = cuda_step(t, t->cuda.first.program, true);
  compare_metrics(t, read_metrics(&t->cpu));
  compare_grads(t, "gradients", want, 1);
  cuda_step(t, t->cuda.later.program, true);
  compare_grads(t, "a second micro-batch, added", want, 2);
  add_empty_pack(t);

  poison(&t->cuda);
  int free_differ = cuda_step(t, t->cuda.first.program, false);
  printf("  rows that chose other experts: %.3f%% where the layers before were forced, %.3f%% where all were free\n",
         100.0 * differ / rows, 100.0 * free_differ / rows);
  double most = fmax(differ, free_differ) / rows;
  if (!(most <= most_differing)) fail(t, "routers", "part of the rows that chose other experts", most);
  float *op_by_op = read_grads(&t->cuda);
  int before = t->failures;
  for (int i = 0; i < 3; i++) {
    poison(&t->cuda);
    engine_run(&t->cuda, &t->cuda.first, t->pack.ops.batch.dims, NULL);
    compare_bits(t, "graph", op_by_op);
  }
  if (t->failures == before) printf("  graph: the same gradient bits as op by op, three times\n");
  if (config == CHECKED_WITH_POLICIES) check_policies(t, op_by_op);
  check_one_expert(t);
  int failures = t->failures;
  printf("  %s in %.1f s\n", failures ? "FAIL" : "pass", time_now() - start);
  fflush(stdout);
  free(want);
  free(op_by_op);
  close_model(t);
  free(t);
  return failures;
}

int main(int argc, char **argv) {
  Error err;
  int failures = 0;
  if (backend_cuda.open(&err) != 0) fatal(&err);
  for (int i = 0; i < CONFIGS; i++) failures += test_model(i, argc > 1 ? strtoull(argv[1], NULL, 10) : 1);
  return failures ? 1 : 0;
}
