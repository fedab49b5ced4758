#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "kernels/cpu/cpu.h"
#include "model/config/load.h"
#include "tests/unit/engine_case.h"
#include "tests/ops/slab_fill.h"

#include <stdio.h>
#include <string.h>

void world_open(World *w, int slots, int max_images) {
  Error err;
  char tokens[64], images[64];
  snprintf(tokens, sizeof tokens, "data.micro_batch_tokens=%d", slots);
  snprintf(images, sizeof images, "data.max_images=%d", max_images);
  const char *sets[] = {"model.dim=32",
                        "model.layers=2",
                        "model.heads=2",
                        "model.kv_heads=1",
                        "model.head_dim=16",
                        "model.cond_dim=16",
                        "model.patch=4",
                        "model.vocab=300",
                        "model.text.experts=3",
                        "model.text.expert_dim=16",
                        "model.text.top_k=2",
                        "model.image.experts=2",
                        "model.image.expert_dim=24",
                        "model.image.top_k=1",
                        "data.image_size=12",
                        "data.tokenizer=bytes",
                        "data.max_caption=24",
                        "train.ema=0",
                        tokens,
                        images};
  if (config_load(&w->config, NULL, sets, sizeof sets / sizeof *sets, &err) != 0) fail_msg("%s", err.text);
  w->backend = backend_cpu;
  w->tokenizer = tokenizer_load(NULL, VOCAB, &err);
  assert_non_null(w->tokenizer);
  if (engine_record(&w->engine, &w->config, &w->backend, 0, &err) != 0) fail_msg("%s", err.text);
  if (engine_allocate(&w->engine, &err) != 0) fail_msg("%s", err.text);
  params_fill(&w->engine.model.params, PARAMS_RANDOM, 7, w->backend.dtype_bytes[DT_ACT],
              engine_slab(&w->engine, SPACE_WEIGHTS));
}

void world_close(World *w) {
  engine_free(&w->engine);
  tokenizer_free(w->tokenizer);
}

void world_rig_image(World *w, real value) {
  const ParamTable *t = &w->engine.model.params;
  real *slab = engine_slab(&w->engine, SPACE_WEIGHTS);
  memset(slab + t->of[t->image_head].offset, 0, (size_t)t->of[t->image_head].count * sizeof *slab);
  for (int i = 0; i < P; i++) slab[t->of[t->image_head_bias].offset + i] = value;
}

Image image_random(int rows, int columns, uint64_t seed) {
  Image image = {.width = columns * PATCH, .height = rows * PATCH};
  int n = 3 * image.width * image.height;
  image.rgb = xmalloc((size_t)n);
  for (int i = 0; i < n; i++) image.rgb[i] = (uint8_t)philox4(seed, 0, 0, (uint32_t)i).v[0];
  return image;
}
