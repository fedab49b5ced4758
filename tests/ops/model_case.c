#include "tests/ops/model_case.h"

#include "base/base.h"
#include "model/config/load.h"
#include "model/program/replay.h"
#include "tests/ops/slab_fill.h"

#include <stdlib.h>
#include <string.h>

static void config_for(ModelCase *c, int variant) {
  static const char *const common[] = {
      "model.dim=24",       "model.layers=2",     "model.head_dim=8", "model.heads=4",     "model.kv_heads=2",
      "model.cond_dim=12",  "model.patch=2",      "model.vocab=300",  "data.image_size=4", "data.micro_batch_tokens=96",
      "data.max_images=14", "data.max_caption=20"};
  static const char *const variants[][8] = {
      {"model.tie_embeddings=true", "model.text.experts=3", "model.text.expert_dim=10", "model.text.top_k=1",
       "model.image.experts=4", "model.image.expert_dim=14", "model.image.top_k=2", "router.balance=0.02"},
      {"model.attn_per_modality=true", "model.patch_bottleneck=7", "model.text.shared_dim=6",
       "model.image.shared_dim=10", "model.text.top_k=3", "model.text.experts=6", "model.text.expert_dim=8",
       "model.image.top_k=1"},
      {"model.kv_heads=4", "model.text.top_k=4", "model.text.experts=4", "model.image.experts=5", "model.image.top_k=3",
       "model.image.shared_dim=4", "model.image.expert_dim=6", "model.text.expert_dim=12"},
      {"model.kv_heads=1", "model.layers=4", "model.tie_embeddings=true", "model.text.experts=12", "model.text.top_k=2",
       "model.text.expert_dim=4", "model.image.expert_dim=4", "model.text.shared_dim=5"},
      {"model.attn_per_modality=true", "model.text.experts=2", "model.text.top_k=2", "model.text.expert_dim=8",
       "model.image.experts=3", "model.image.top_k=3", "model.image.expert_dim=6", "model.image.shared_dim=8"}};
  enum { COMMON = sizeof common / sizeof *common, EACH = 8 };
  const char *sets[COMMON + EACH];
  memcpy(sets, common, sizeof common);
  memcpy(sets + COMMON, variants[variant % 5], EACH * sizeof *sets);
  Error err;
  if (config_load(&c->config, NULL, sets, COMMON + EACH, &err) != 0) panic("test config: %s", err.text);
  c->config.memory.share_gradients = false; // ModelCase.bases has a slab for them
}

static void need_bytes(ModelCase *c, Space space, int64_t bytes) {
  if ((size_t)bytes <= c->bytes[space]) return;
  free(c->bases.of[space]);
  c->bytes[space] = ((size_t)bytes + 255) / 256 * 256;
  c->bases.of[space] = aligned_alloc(256, c->bytes[space]);
}

void model_case_fit_pack(ModelCase *c) {
  int64_t pack = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&c->ops.dims), NULL);
  need_bytes(c, SPACE_STAGING, pack);
  need_bytes(c, SPACE_BATCH, pack);
}

void model_case_init(ModelCase *c, uint64_t seed, int variant) {
  memset(c, 0, sizeof *c);
  config_for(c, variant);
  c->model = (Model){
      .config = &c->config, .backend = &backend_cpu, .params = params_build(&c->config), .update_part = UPDATE_PART};
  op_case_init(&c->ops, seed);
  c->ops.dims = dims_from_config(&c->config, c->config.data.micro_batch_tokens, config_max_images(&c->config) + 1);
  op_case_pack(&c->ops, PACK_MIXED);
  int64_t slab = c->model.params.total * (int64_t)sizeof(real);
  const Space slabs[] = {SPACE_WEIGHTS, SPACE_GRADS, SPACE_MICRO_GRADS, SPACE_ADAM_M, SPACE_ADAM_V, SPACE_EMA};
  for (size_t i = 0; i < sizeof slabs / sizeof *slabs; i++) {
    need_bytes(c, slabs[i], slab);
    memset(c->bases.of[slabs[i]], 0, (size_t)slab);
  }
  params_fill(&c->model.params, PARAMS_RANDOM, seed, sizeof(real), c->bases.of[SPACE_WEIGHTS]);
  model_case_fit_pack(c);
  need_bytes(c, SPACE_METRICS, metrics_size(&c->ops.dims) * (int64_t)sizeof(double));
  need_bytes(c, SPACE_SCALARS, sizeof(StepScalars));
  need_bytes(c, SPACE_STATUS, sizeof(UpdateStatus));
  need_bytes(c, SPACE_INPUT, (int64_t)c->ops.dims.T * c->ops.dims.P * (int64_t)sizeof(real));
}

void model_case_free(ModelCase *c) {
  for (int s = 0; s < SPACE_COUNT; s++) free(c->bases.of[s]);
  params_free(&c->model.params);
  op_case_free(&c->ops);
}

ModelProgram model_case_record(ModelCase *c, Mode mode, const PolicyTable *policy, int separate) {
  ModelProgram m = transformer_record(&c->model, mode, c->ops.dims.T, c->ops.dims.segments, policy);
  need_bytes(c, SPACE_ARENA, m.program->arena_bytes);
  need_bytes(c, SPACE_HOST, m.program->host_bytes);
  Bases b = c->bases;
  b.separate = separate;
  if (separate) b.of[SPACE_ARENA] = NULL;
  program_bind(m.program, &b);
  return m;
}

void model_case_reset(ModelCase *c) {
  memcpy(c->bases.of[SPACE_STAGING], c->ops.batch.dims, batch_bind(&(Batch){0}, dims_batch_shape(&c->ops.dims), NULL));
  const Space poisoned[] = {SPACE_ARENA, SPACE_HOST, SPACE_GRADS, SPACE_MICRO_GRADS, SPACE_BATCH};
  for (size_t i = 0; i < sizeof poisoned / sizeof *poisoned; i++)
    if (c->bases.of[poisoned[i]]) memset(c->bases.of[poisoned[i]], 0xFF, c->bytes[poisoned[i]]);
}

double model_case_loss(const ModelCase *c) {
  const Metrics *m = c->bases.of[SPACE_METRICS];
  const BatchDims *d = c->ops.batch.dims;
  return (double)d->ce_scale * (m->nll[0] + m->nll[1]) + (double)d->flow_scale * m->flow + m->balance + m->z;
}

real *model_case_slab(const ModelCase *c, Space space) {
  return c->bases.of[space];
}
