// Dumps training steps of small random models on random packs, in the format of ./train --dump, for
// tests/ops/parity_model.py: between them every way a model can be put together, every memory policy and documents of
// every kind.
//
//   dump_model DIR [CASES]    writes DIR/model_0, DIR/model_1, ..
#include "model/config/load.h"
#include "tests/ops/op_case.h"
#include "trainer/dump.h"
#include "tests/ops/slab_fill.h"

#include <stdio.h>
#include <stdlib.h>

// The packs of a step, one per micro-batch, and how the model differs from the common one.
typedef struct Variant {
  PackKind packs[2];
  const char *sets[10];
} Variant;

static const char *const common[] = {"run.device=cpu",       "model.dim=24",       "model.layers=2",
                                     "model.head_dim=8",     "model.heads=4",      "model.kv_heads=2",
                                     "model.cond_dim=12",    "model.patch=2",      "model.vocab=300",
                                     "data.image_size=4",    "data.max_images=14", "data.micro_batch_tokens=96",
                                     "train.micro_batches=2"};

static const Variant variants[] = {
    {{PACK_MIXED, PACK_MIXED},
     {"model.tie_embeddings=true", "model.text.experts=3", "model.text.expert_dim=10", "model.text.top_k=1",
      "model.image.experts=4", "model.image.expert_dim=14", "model.image.top_k=2", "router.balance=0.02"}},
    {{PACK_MIXED, PACK_FULL},
     {"model.attn_per_modality=true", "model.patch_bottleneck=7", "model.text.shared_dim=6",
      "model.image.shared_dim=10", "model.text.experts=6", "model.text.top_k=3", "model.text.expert_dim=8",
      "model.image.top_k=1", "model.image.expert_dim=6", "train.ce_weight=0.5"}},
    {{PACK_TEXT, PACK_IMAGE}, // each micro-batch lacks a modality
     {"model.kv_heads=4", "model.text.experts=4", "model.text.top_k=4", "model.text.expert_dim=12",
      "model.image.experts=5", "model.image.top_k=3", "model.image.expert_dim=6", "model.image.shared_dim=4"}},
    {{PACK_FULL, PACK_MIXED}, // more experts than some packs can feed: groups without rows
     {"model.kv_heads=1", "model.layers=3", "model.tie_embeddings=true", "model.text.experts=40", "model.text.top_k=2",
      "model.text.expert_dim=4", "model.image.experts=48", "model.image.top_k=1", "model.image.expert_dim=4",
      "model.text.shared_dim=5"}},
    {{PACK_MIXED, PACK_TEXT}, // one expert: nothing to route
     {"model.attn_per_modality=true", "model.layers=1", "model.text.experts=1", "model.text.top_k=1",
      "model.text.expert_dim=8", "model.image.experts=3", "model.image.top_k=3", "model.image.expert_dim=6",
      "model.image.shared_dim=8", "router.z=0.05"}},
    {{PACK_TEXT, PACK_TEXT}, // text alone
     {"model.text.experts=4", "model.text.top_k=2", "model.text.expert_dim=8", "model.image.experts=2",
      "model.image.top_k=1", "model.image.expert_dim=6", "model.text.shared_dim=7", "model.head_dim=6"}},
};
enum { VARIANTS = sizeof variants / sizeof *variants, COMMON = sizeof common / sizeof *common, SETS = 10 };

static int64_t noised_tokens(const Batch *b) {
  int64_t n = 0;
  for (int g = 1; g < b->dims->n_segments; g++) n += b->seg_kind[g] == SEGMENT_NOISED ? b->seg_len[g] : 0;
  return n;
}

static void dump_variant(int k, const char *folder) {
  const Variant *v = &variants[k % VARIANTS];
  static const char *const policies[] = {"memory.policy=keep", "memory.policy=recompute", "memory.policy=offload"};
  const char *sets[COMMON + SETS + 1];
  int n_sets = COMMON;
  memcpy(sets, common, sizeof common);
  while (n_sets < COMMON + SETS && v->sets[n_sets - COMMON]) sets[n_sets] = v->sets[n_sets - COMMON], n_sets++;
  sets[n_sets++] = policies[(k + k / VARIANTS) % 3];
  Error err;
  Config config;
  Engine e;
  if (config_load(&config, NULL, sets, n_sets, &err) || engine_record(&e, &config, &backend_cpu, 1, &err) ||
      engine_allocate(&e, &err))
    fatal(&err);
  params_fill(&e.model.params, PARAMS_RANDOM, (uint64_t)k + 1, sizeof(real), engine_slab(&e, SPACE_WEIGHTS));

  OpCase packs[2];
  int64_t targets = 0, noised = 0;
  for (int i = 0; i < 2; i++) {
    op_case_init(&packs[i], (uint64_t)(2 * k + i) + 100);
    packs[i].dims = dims_from_config(&config, e.slots, e.segments);
    op_case_pack(&packs[i], v->packs[i]);
    targets += packs[i].batch.dims->n_target;
    noised += noised_tokens(&packs[i].batch);
  }
  for (int i = 0; i < 2; i++) {
    BatchDims *d = packs[i].batch.dims;
    d->ce_scale = (float)(config.train.ce_weight / (double)max_i64(targets, 1));
    d->flow_scale = (float)(1 / (double)(max_i64(noised, 1) * packs[i].dims.P));
    d->router_scale = 0.5f;
    d->seed_lo = (uint32_t)config.run.seed;
    d->seed_hi = (uint32_t)(config.run.seed >> 32);
  }
  char *path = xasprintf("%s/model_%d", folder, k);
  if (dump_step(&e, (const Batch *const[]){&packs[0].batch, &packs[1].batch}, 2, path, &err)) fatal(&err);
  free(path);
  for (int i = 0; i < 2; i++) op_case_free(&packs[i]);
  engine_free(&e);
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: dump_model DIR [CASES]\n");
    return 2;
  }
  int cases = argc == 3 ? atoi(argv[2]) : VARIANTS;
  for (int k = 0; k < cases; k++) dump_variant(k, argv[1]);
  return 0;
}
