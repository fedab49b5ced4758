#include "model/config/keys.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(Config, field), sizeof(((Config *)0)->field)
#define ANY 2147483647.0

const Key config_keys[] = {
    {"run.name", KEY_STRING, AT(run.name), "run", 1, 0, NULL, NULL, "name of the run"},
    {"run.dir", KEY_STRING, AT(run.dir), "runs", 1, 0, NULL, NULL, "folder of all runs; this one is DIR/NAME"},
    {"run.folder", KEY_STRING, AT(run.folder), "", 0, 0, NULL, "--run-dir", "this run's folder, instead of DIR/NAME"},
    {"run.seed", KEY_INT, AT(run.seed), "1", 0, 9007199254740992.0, NULL, "--seed", "seed of every random number"},
    {"run.device", KEY_ENUM, AT(run.device), "auto", 0, 0, "auto|cpu|cuda", "--device", "auto: CUDA where it works"},
    {"run.threads", KEY_INT, AT(run.threads), "0", 0, 4096, NULL, NULL,
     "compute threads; 0: as many as there are processors for this process"},

    {"model.dim", KEY_INT, AT(model.dim), "128", 1, 65536, NULL, NULL, "width of the residual stream, C"},
    {"model.layers", KEY_INT, AT(model.layers), "4", 1, 1024, NULL, NULL, "blocks, L"},
    {"model.heads", KEY_INT, AT(model.heads), "4", 1, 1024, NULL, NULL, "query heads, H"},
    {"model.kv_heads", KEY_INT, AT(model.kv_heads), "2", 1, 1024, NULL, NULL, "key and value heads, G; divides heads"},
    {"model.head_dim", KEY_INT, AT(model.head_dim), "32", 2, 1024, NULL, NULL, "width of a head, D; even"},
    {"model.cond_dim", KEY_INT, AT(model.cond_dim), "128", 1, 65536, NULL, NULL, "width of the condition, Z"},
    {"model.patch", KEY_INT, AT(model.patch), "8", 1, 128, NULL, NULL, "pixels of a patch's side, p"},
    {"model.patch_bottleneck", KEY_INT, AT(model.patch_bottleneck), "0", 0, 65536, NULL, NULL,
     "width between pixels and dim; 0: one linear layer"},
    {"model.vocab", KEY_INT, AT(model.vocab), "512", 260, 1048576, NULL, NULL,
     "token ids, V: 256 bytes, merges, 4 specials"},
    {"model.attn_per_modality", KEY_BOOL, AT(model.attn_per_modality), "false", 0, 0, NULL, NULL,
     "attention projections per modality"},
    {"model.tie_embeddings", KEY_BOOL, AT(model.tie_embeddings), "false", 0, 0, NULL, NULL,
     "the output embedding is the input embedding"},
    {"model.text.experts", KEY_INT, AT(model.moe[TEXT].experts), "4", 1, 4096, NULL, NULL, "experts of text tokens, E"},
    {"model.text.expert_dim", KEY_INT, AT(model.moe[TEXT].expert_dim), "128", 1, 65536, NULL, NULL, "width of one, F"},
    {"model.text.shared_dim", KEY_INT, AT(model.moe[TEXT].shared_dim), "0", 0, 65536, NULL, NULL,
     "width of the shared expert, S; 0: none"},
    {"model.text.top_k", KEY_INT, AT(model.moe[TEXT].top_k), "2", 1, 64, NULL, NULL, "experts a token goes to, k"},
    {"model.image.experts", KEY_INT, AT(model.moe[IMAGE].experts), "4", 1, 4096, NULL, NULL,
     "the same of image tokens"},
    {"model.image.expert_dim", KEY_INT, AT(model.moe[IMAGE].expert_dim), "192", 1, 65536, NULL, NULL,
     "width of one, F"},
    {"model.image.shared_dim", KEY_INT, AT(model.moe[IMAGE].shared_dim), "0", 0, 65536, NULL, NULL,
     "width of the shared expert, S; 0: none"},
    {"model.image.top_k", KEY_INT, AT(model.moe[IMAGE].top_k), "2", 1, 64, NULL, NULL, "experts a token goes to, k"},

    {"data.micro_batch_tokens", KEY_INT, AT(data.micro_batch_tokens), "1024", 8, 4194304, NULL, "--tokens",
     "token slots of a micro-batch, T"},
    {"data.image_size", KEY_INT, AT(data.image_size), "32", 1, 8192, NULL, NULL, "pixels of the shorter side"},
    {"data.image_mode", KEY_ENUM, AT(data.image_mode), "square", 0, 0, "square|aspect", NULL,
     "square: centre crop; aspect: proportions kept"},
    {"data.max_image_tokens", KEY_INT, AT(data.max_image_tokens), "0", 0, 1048576, NULL, NULL,
     "aspect: most patches of an image; 0: those of the square"},
    {"data.max_pixels", KEY_INT, AT(data.max_pixels), "67108864", 1, CONFIG_MAX_PIXELS, NULL, NULL,
     "images with more pixels are left out"},
    {"data.flip", KEY_BOOL, AT(data.flip), "false", 0, 0, NULL, NULL,
     "mirror half of the training images left to right"},
    {"data.tokenizer", KEY_STRING, AT(data.tokenizer), "bytes", 1, 0, NULL, NULL,
     "path of a vocab.bpe; train: learned from the captions; bytes: no merges"},
    {"data.cfg_drop", KEY_FLOAT, AT(data.cfg_drop), "0.1", 0, 1, NULL, NULL,
     "share of images generated without a caption"},
    {"data.caption_to_image", KEY_FLOAT, AT(data.caption_to_image), "0.5", 0, 1, NULL, NULL,
     "share of captioned images to generate; the others are described"},
    {"data.held_out", KEY_FLOAT, AT(data.held_out), "0.05", 0, 0.9, NULL, NULL,
     "share of the samples never trained on"},
    {"data.held_out_by", KEY_STRING, AT(data.held_out_by), "key", 1, 0, NULL, NULL,
     "key, caption or a field: samples that share it stay together"},
    {"data.max_text", KEY_INT, AT(data.max_text), "0", 0, 4194304, NULL, NULL, "text rows of a micro-batch; 0: T"},
    {"data.max_images", KEY_INT, AT(data.max_images), "0", 0, 1048576, NULL, NULL,
     "images of a micro-batch; 0: what fits"},
    {"data.max_document", KEY_INT, AT(data.max_document), "0", 0, 4194304, NULL, NULL,
     "longer texts are cut into documents of this many tokens; 0: max_text"},
    {"data.max_caption", KEY_INT, AT(data.max_caption), "64", 1, 65536, NULL, NULL,
     "captions are cut to this many tokens"},
    {"data.cache_mb", KEY_INT, AT(data.cache_mb), "256", 0, 1048576, NULL, NULL, "resized images kept in memory"},
    {"data.max_bad", KEY_INT, AT(data.max_bad), "100", 0, ANY, NULL, NULL,
     "more undecodable images than this end the run, as does a source without any other; 0: no limit"},
    {"data.sources", KEY_SOURCES, AT(data.source), "[]", 0, 0, NULL, NULL,
     "[{\"type\": \"folder|webdataset|text\", \"path\": ..., \"weight\": 1}, ...]"},
    {"data.threads", KEY_INT, AT(data.threads), "2", 1, 256, NULL, NULL, "threads that read and decode images"},

    {"train.steps", KEY_INT, AT(train.steps), "1000", 1, ANY, NULL, "--steps", "optimiser steps, N"},
    {"train.micro_batches", KEY_INT, AT(train.micro_batches), "1", 1, 65536, NULL, NULL,
     "micro-batches of a step; all of a step are decoded before it begins"},
    {"train.batch", KEY_INT, AT(train.batch), "0", 0, 1e12, NULL, "--batch",
     "tokens of a step, rounded up to micro-batches; 0: micro_batches says"},
    {"train.lr", KEY_FLOAT, AT(train.lr), "3e-3", 0, 10, NULL, NULL, "learning rate"},
    {"train.warmup_steps", KEY_INT, AT(train.warmup_steps), "50", 0, ANY, NULL, NULL, "steps of linear warm-up"},
    {"train.decay_fraction", KEY_FLOAT, AT(train.decay_fraction), "0.3", 0, 1, NULL, NULL,
     "last share of the steps, with lr falling to 0"},
    {"train.beta1", KEY_FLOAT, AT(train.beta1), "0.9", 0, 0.999999, NULL, NULL, "AdamW, first moment"},
    {"train.beta2", KEY_FLOAT, AT(train.beta2), "0.95", 0, 0.999999, NULL, NULL, "AdamW, second moment"},
    {"train.moments", KEY_ENUM, AT(train.moments), "fp32", 0, 0, "fp32|bf16", NULL,
     "AdamW's moments; bf16: half the memory, rounded by chance"},
    {"train.weight_decay", KEY_FLOAT, AT(train.weight_decay), "0", 0, 10, NULL, NULL,
     "AdamW, decoupled; matrices only"},
    {"train.clip", KEY_FLOAT, AT(train.clip), "1", 0, 1e9, NULL, NULL, "largest global gradient norm; 0: no limit"},
    {"train.ema", KEY_FLOAT, AT(train.ema), "0.99", 0, 0.9999999, NULL, NULL, "decay of the averaged weights; 0: none"},
    {"train.ema_every", KEY_INT, AT(train.ema_every), "1", 1, 100000, NULL, NULL,
     "steps between updates of the average"},
    {"train.ce_weight", KEY_FLOAT, AT(train.ce_weight), "1", 0, 1e6, NULL, NULL, "weight of the text loss"},
    {"train.max_skipped", KEY_INT, AT(train.max_skipped), "10", 1, ANY, NULL, NULL,
     "non-finite steps in a row that end the run"},
    {"train.spike", KEY_FLOAT, AT(train.spike), "0", 0, 1e9, NULL, NULL,
     "skip a step whose gradient norm is beyond this times the median of the last 64; 0: off"},
    {"train.spike_patience", KEY_INT, AT(train.spike_patience), "5", 1, ANY, NULL, NULL,
     "such steps in a row that send the run back to its newest checkpoint, with the data after them"},
    {"train.spike_rewinds", KEY_INT, AT(train.spike_rewinds), "3", 0, ANY, NULL, NULL,
     "times a run may be sent back before it ends"},
    {"train.verify_every", KEY_INT, AT(train.verify_every), "0", 0, ANY, NULL, "--verify-every",
     "replay the first micro-batch of each step at a multiple of this and compare its gradients' bits; 0: never"},

    {"flow.t_mean", KEY_FLOAT, AT(flow.t_mean), "-0.8", -20, 20, NULL, NULL, "t = sigmoid(N(t_mean, t_std))"},
    {"flow.t_std", KEY_FLOAT, AT(flow.t_std), "1", 0, 20, NULL, NULL,
     "its deviation: wider learns more detail, narrower what is where"},
    {"flow.t_uniform", KEY_FLOAT, AT(flow.t_uniform), "0", 0, 1, NULL, NULL,
     "share of the times that are drawn uniformly instead"},
    {"flow.t_floor", KEY_FLOAT, AT(flow.t_floor), "0.05", 1e-6, 1, NULL, NULL, "least 1-t that the loss divides by"},
    {"router.balance", KEY_FLOAT, AT(router.balance), "0.01", 0, 1e6, NULL, NULL, "weight of the load-balancing loss"},
    {"router.z", KEY_FLOAT, AT(router.z), "0.001", 0, 1e6, NULL, NULL, "weight of the router's z-loss"},
    {"router.even", KEY_BOOL, AT(router.even), "false", 0, 0, NULL, NULL,
     "tokens go to the experts in turn: to measure speed with even loads, not to train"},

    {"eval.every", KEY_INT, AT(eval.every), "250", 0, ANY, NULL, NULL, "steps between evaluations; 0: at the end only"},
    {"eval.samples", KEY_INT, AT(eval.samples), "16", 0, 1024, NULL, NULL, "images generated at each"},
    {"eval.documents", KEY_INT, AT(eval.documents), "64", 0, 1000000, NULL, NULL, "held-out documents measured"},
    {"eval.sampler", KEY_ENUM, AT(eval.sampler), "heun", 0, 0, "heun|euler", NULL, "integrator of the flow"},
    {"eval.sampler_steps", KEY_INT, AT(eval.sampler_steps), "25", 1, 10000, NULL, NULL, "its steps"},
    {"eval.t_end", KEY_FLOAT, AT(eval.t_end), "auto", 0, 1, "auto", NULL,
     "latest flow time it asks for, from where it takes x^; auto: .99 of the training times are earlier"},
    {"eval.guidance", KEY_FLOAT, AT(eval.guidance), "2", 0, 100, NULL, NULL, "classifier-free guidance; 1: none"},
    {"eval.guidance_from", KEY_FLOAT, AT(eval.guidance_from), "0.1", 0, 1, NULL, NULL, "flow time from which it acts"},
    {"eval.temperature", KEY_FLOAT, AT(eval.temperature), "0.8", 0, 100, NULL, NULL, "of text; 0: the likeliest token"},
    {"eval.top_p", KEY_FLOAT, AT(eval.top_p), "0.95", 1e-6, 1, NULL, NULL, "text: smallest set with this probability"},

    {"checkpoint.every", KEY_INT, AT(checkpoint.every), "250", 0, ANY, NULL, NULL, "steps between; 0: at the end only"},
    {"checkpoint.keep_last", KEY_INT, AT(checkpoint.keep_last), "2", 1, 1000000, NULL, NULL, "newest ones kept"},
    {"checkpoint.keep_every", KEY_INT, AT(checkpoint.keep_every), "0", 0, ANY, NULL, NULL,
     "those at multiples of this step stay for good; 0: none"},
    {"checkpoint.copy", KEY_ENUM, AT(checkpoint.copy), "auto", 0, 0, "auto|always|never", NULL,
     "to host memory, then written while training goes on; never: training waits; auto: copied where there is room"},
    {"checkpoint.on_error", KEY_ENUM, AT(checkpoint.on_error), "stop", 0, 0, "stop|continue", NULL,
     "when one cannot be written: stop, or go on to the next with a warning"},

    {"memory.policy", KEY_ENUM, AT(memory.policy), "auto", 0, 0, "auto|keep|recompute|offload", "--memory",
     "what happens to activations that the backward pass needs"},
    {"memory.budget_gb", KEY_FLOAT, AT(memory.budget_gb), "auto", 1e-6, 1e6, "auto", NULL,
     "device memory to plan for, 10^9 bytes; auto: all there is"},
    {"memory.state", KEY_ENUM, AT(memory.state), "auto", 0, 0, "auto|device|ema|moments|gradients", NULL,
     "what lies in host memory and passes through the update: EMA; Adam's moments too; gradients too; auto: what makes "
     "a "
     "step shortest in the budget, with another memory.policy than auto none"},
    {"memory.host_gb", KEY_FLOAT, AT(memory.host_gb), "auto", 1e-6, 1e6, "auto", NULL,
     "host memory that activations may be offloaded to, 10^9 bytes; auto: half of what is left"},
    {"memory.per_tensor", KEY_POLICIES, AT(memory.per_tensor), "{}", 0, 0, "keep|recompute|offload", NULL,
     "exceptions, {\"qkv\": \"offload\", ...}; an unknown name is answered with the list"},
    {"memory.share_gradients", KEY_BOOL, AT(memory.share_gradients), "true", 0, 0, NULL, NULL,
     "in a step of one micro-batch gradients lie where activations have lain: up to 4 bytes a parameter less"},
    {"memory.arena", KEY_BOOL, AT(memory.arena), "true", 0, 0, NULL, NULL,
     "false: an allocation per tensor, for sanitizers"},

    {"kernels.packing", KEY_ENUM, AT(kernels.packing), "varlen", 0, 0, "varlen|padded", "--packing",
     "documents end to end, or each padded to the longest of its pack (baseline)"},
    {"kernels.adaln", KEY_WAY, AT(kernels.adaln), "fused", 0, 0, "fused|unfused", "--adaln",
     "GPU: residual, norm, modulation, activation and mask in one kernel, or each in its own"},
    {"kernels.moe_gemm", KEY_WAY, AT(kernels.moe_gemm), "modality", 0, 0, "modality|grouped|loop", "--moe-gemm",
     "GPU: all experts in one launch, with tiles for each modality or of one kind; or a library product each, no "
     "graphs"},
    {"kernels.tiles.text", KEY_ENUM, AT(kernels.tiles[TEXT]), "auto", 0, 0, "auto|128|256", NULL,
     "GPU: columns of the tiles of text experts' products; auto: as kernels.moe_gemm finds (--profile shows them)"},
    {"kernels.tiles.image", KEY_ENUM, AT(kernels.tiles[IMAGE]), "auto", 0, 0, "auto|128|256", NULL,
     "the same of image experts"},
    {"kernels.streams", KEY_ENUM, AT(kernels.streams), "multi", 0, 0, "multi|single", "--streams",
     "GPU: transfers in queues of their own, or in that of the kernels"},
    {"kernels.graph", KEY_BOOL, AT(kernels.graph), "true", 0, 0, "off|on", "--graph",
     "GPU: a step is launched as captured graphs, or op by op"},
    {"kernels.pdl", KEY_BOOL, AT(kernels.pdl), "true", 0, 0, "off|on", NULL,
     "GPU of Hopper's kind: a kernel is launched while the one before ends (programmatic dependent launch)"},
    {"kernels.update", KEY_ENUM, AT(kernels.update), "sequential", 0, 0, "sequential|overlapped", NULL,
     "weights are updated at a step's end, or bucket by bucket in the next step's forward pass, ahead of their layer"},
    {"kernels.update_share", KEY_INT, AT(kernels.update_share), "32", 1, 64, NULL, NULL,
     "GPU: multiprocessors that an overlapped update has beside the forward pass"},

    {"parallel.zero", KEY_INT, AT(parallel.zero), "1", 0, 2, NULL, NULL,
     "several processes: 1: each has a share of Adam's moments and the EMA; 2: of the gradients too; 0: all of them"},
    {"parallel.collectives", KEY_WAY, AT(parallel.collectives), "nccl", 0, 0, "nccl|host", NULL,
     "several processes on GPUs: by NCCL, a GPU each; or through the host's memory, slow and without graphs"},
};
const int config_key_count = sizeof config_keys / sizeof config_keys[0];
_Static_assert(sizeof config_keys / sizeof config_keys[0] <= CONFIG_KEYS, "CONFIG_KEYS is too small");

#define SOURCE_AT(field) offsetof(SourceConfig, field), sizeof(((SourceConfig *)0)->field)
static const Key source_keys[] = {
    {"type", KEY_STRING, SOURCE_AT(type), NULL, 1, 0, "folder|webdataset|text", NULL, "README.md shows the formats"},
    {"path", KEY_STRING, SOURCE_AT(path), NULL, 1, 0, NULL, NULL, "the file, folder or pattern to read"},
    {"weight", KEY_FLOAT, SOURCE_AT(weight), "1", 1e-9, 1e9, NULL, NULL,
     "share of the documents drawn from this source"},
};
enum { N_SOURCE_KEYS = sizeof source_keys / sizeof source_keys[0] };

// ---- one value ----

// Index of a word of length n in "a|b|c", -1 when it is none of them.
static int word_find(const char *words, const char *word) {
  size_t n = strlen(word);
  for (int i = 0; words; i++) {
    const char *end = strchr(words, '|');
    size_t len = end ? (size_t)(end - words) : strlen(words);
    if (len == n && memcmp(words, word, n) == 0) return i;
    words = end ? end + 1 : NULL;
  }
  return -1;
}

static const char *word_at(const char *words, int index, int *len) {
  while (index-- > 0) words = strchr(words, '|') + 1;
  *len = (int)strcspn(words, "|");
  return words;
}

void key_allowed(const Key *key, char *out, size_t room) {
  const char *word = key->words ? key->words : "";
  const char * or = key->words ? " or " : "";
  switch (key->type) {
  case KEY_INT:
    snprintf(out, room, "an integer from %.0f to %.0f%s%s", key->min, key->max, or, word);
    return;
  case KEY_FLOAT:
    snprintf(out, room, "a number from %.7g to %.7g%s%s", key->min, key->max, or, word);
    return;
  case KEY_BOOL:
    snprintf(out, room, key->words ? "true or false, on or off" : "true or false");
    return;
  case KEY_ENUM:
  case KEY_WAY:
    snprintf(out, room, "one of %s", word);
    return;
  case KEY_STRING:
    if (key->words)
      snprintf(out, room, "one of %s", word);
    else
      snprintf(out, room, "a UTF-8 string of %.0f to %zu bytes", key->min, key->bytes - 1);
    return;
  case KEY_SOURCES:
    snprintf(out, room, "a list of at most %d sources", CONFIG_SOURCES);
    return;
  case KEY_POLICIES:
    snprintf(out, room, "an object of at most %d NAME: %s", CONFIG_PER_TENSOR, word);
    return;
  }
}

void place_text(const Place *place, const cJSON *item, char *out, size_t room) {
  if (place->file)
    snprintf(out, room, "%.300s:%d", place->file, json_line(item));
  else
    snprintf(out, room, "command line");
}

static int value_error(const Key *key, const Place *place, const cJSON *item, Error *err) {
  char allowed[160], where[336];
  key_allowed(key, allowed, sizeof allowed);
  place_text(place, item, where, sizeof where);
  char *value = cJSON_PrintUnformatted(item);
  error_set(err, key->help, "%s: %.120s = %.80s: must be %s", where, place->path, value ? value : "?", allowed);
  cJSON_free(value);
  return -1;
}

static int string_set(const Key *key, char *field, const cJSON *item) {
  size_t n = cJSON_IsString(item) ? strlen(item->valuestring) : 0;
  if (!cJSON_IsString(item) || n >= key->bytes || n < (size_t)key->min) return -1;
  if (key->words && word_find(key->words, item->valuestring) < 0) return -1;
  if (!json_is_utf8(item->valuestring)) return -1; // the command line can say what no saved config.json could
  memset(field, 0, key->bytes);                    // so that equal configurations are equal bytes
  memcpy(field, item->valuestring, n);
  return 0;
}

static int number_set(const Key *key, char *field, const cJSON *item) {
  double v = item->valuedouble;
  if (cJSON_IsString(item) && key->words && word_find(key->words, item->valuestring) == 0)
    v = 0;
  else if (!cJSON_IsNumber(item) || !(v >= key->min && v <= key->max))
    return -1;
  if (key->type == KEY_FLOAT) {
    v += 0.0; // no negative zero
    memcpy(field, &v, sizeof v);
    return 0;
  }
  if (v != floor(v)) return -1;
  int narrow = key->bytes == sizeof(int) ? (int)v : 0;
  int64_t wide = (int64_t)v;
  memcpy(field, key->bytes == sizeof narrow ? (void *)&narrow : (void *)&wide, key->bytes);
  return 0;
}

// Sets one field of `base` whose type is not a list.
static int scalar_set(const Key *key, void *base, const Place *place, const cJSON *item, Error *err) {
  char *field = (char *)base + key->offset;
  int rc = -1;
  if (key->type == KEY_STRING) rc = string_set(key, field, item);
  if (key->type == KEY_INT || key->type == KEY_FLOAT) rc = number_set(key, field, item);
  int named =
      key->type == KEY_BOOL && key->words && cJSON_IsString(item) ? word_find(key->words, item->valuestring) : -1;
  if (key->type == KEY_BOOL && (cJSON_IsBool(item) || named >= 0)) {
    bool v = cJSON_IsTrue(item) || named == 1;
    memcpy(field, &v, sizeof v);
    rc = 0;
  }
  if ((key->type == KEY_ENUM || key->type == KEY_WAY) && cJSON_IsString(item)) {
    int v = word_find(key->words, item->valuestring);
    if (v >= 0) memcpy(field, &v, sizeof v);
    rc = v >= 0 ? 0 : -1;
  }
  return rc ? value_error(key, place, item, err) : 0;
}

static int source_set(SourceConfig *source, const Key *list, const Place *place, const cJSON *item, Error *err) {
  if (!cJSON_IsObject(item)) return value_error(list, place, item, err);
  memset(source, 0, sizeof *source);
  source->weight = 1;
  const cJSON *member;
  cJSON_ArrayForEach(member, item) {
    int k = 0;
    while (k < N_SOURCE_KEYS && strcmp(source_keys[k].path, member->string) != 0) k++;
    char path[160], where[336];
    snprintf(path, sizeof path, "%.64s.%.64s", place->path, member->string);
    place_text(place, member, where, sizeof where);
    if (k == N_SOURCE_KEYS)
      return error_set(err, "a source has type, path and weight", "%s: unknown key %s", where, path);
    Place inner = {place->file, path};
    if (scalar_set(&source_keys[k], source, &inner, member, err)) return -1;
  }
  if (source->type[0] && source->path[0]) return 0;
  char where[336];
  place_text(place, item, where, sizeof where);
  return error_set(err, list->help, "%s: %s: a source needs a type and a path", where, place->path);
}

static int sources_set(Config *c, const Key *key, const Place *place, const cJSON *item, Error *err) {
  int n = cJSON_IsArray(item) ? cJSON_GetArraySize(item) : -1;
  if (n < 0 || n > CONFIG_SOURCES) return value_error(key, place, item, err);
  memset(c->data.source, 0, sizeof c->data.source);
  c->data.sources = 0;
  const cJSON *element;
  cJSON_ArrayForEach(element, item) {
    char path[64];
    snprintf(path, sizeof path, "%s[%d]", place->path, c->data.sources);
    Place inner = {place->file, path};
    if (source_set(&c->data.source[c->data.sources++], key, &inner, element, err)) return -1;
  }
  return 0;
}

static int policies_set(Config *c, const Key *key, const Place *place, const cJSON *item, Error *err) {
  int n = cJSON_IsObject(item) ? cJSON_GetArraySize(item) : -1;
  if (n < 0 || n > CONFIG_PER_TENSOR) return value_error(key, place, item, err);
  memset(c->memory.per_tensor, 0, sizeof c->memory.per_tensor);
  c->memory.per_tensors = 0;
  const cJSON *member;
  cJSON_ArrayForEach(member, item) {
    TensorPolicy *entry = &c->memory.per_tensor[c->memory.per_tensors++];
    bool ok = cJSON_IsString(member) && word_find(key->words, member->valuestring) >= 0;
    if (!ok || strlen(member->string) >= sizeof entry->name) return value_error(key, place, item, err);
    snprintf(entry->name, sizeof entry->name, "%s", member->string);
    snprintf(entry->policy, sizeof entry->policy, "%s", member->valuestring);
  }
  return 0;
}

int key_set(Config *c, const Key *key, const Place *place, const cJSON *item, Error *err) {
  if (key->type == KEY_SOURCES) return sources_set(c, key, place, item, err);
  if (key->type == KEY_POLICIES) return policies_set(c, key, place, item, err);
  return scalar_set(key, c, place, item, err);
}

static void scalar_write(const Key *key, const void *base, FILE *f) {
  const char *field = (const char *)base + key->offset;
  double d = 0;
  int i = 0, len;
  int64_t wide = 0;
  switch (key->type) {
  case KEY_STRING:
    json_write_string(f, field);
    return;
  case KEY_BOOL:
    fputs(*(const bool *)field ? "true" : "false", f);
    return;
  case KEY_ENUM:
  case KEY_WAY:
    memcpy(&i, field, sizeof i);
    const char *word = word_at(key->words, i, &len);
    fprintf(f, "\"%.*s\"", len, word);
    return;
  case KEY_INT:
    memcpy(key->bytes == sizeof i ? (void *)&i : (void *)&wide, field, key->bytes);
    fprintf(f, "%lld", key->bytes == sizeof i ? (long long)i : (long long)wide);
    return;
  default:
    memcpy(&d, field, sizeof d);
    if (d == 0 && key->words)
      json_write_string(f, key->words);
    else
      json_write_number(f, d);
  }
}

void key_write(const Config *c, const Key *key, FILE *f) {
  if (key->type == KEY_SOURCES) {
    fputc('[', f);
    for (int i = 0; i < c->data.sources; i++) {
      for (int k = 0; k < N_SOURCE_KEYS; k++) {
        fprintf(f, "%s\"%s\": ", k ? ", " : i ? ", {" : "{", source_keys[k].path);
        scalar_write(&source_keys[k], &c->data.source[i], f);
      }
      fputc('}', f);
    }
    fputc(']', f);
  } else if (key->type == KEY_POLICIES) {
    fputc('{', f);
    for (int i = 0; i < c->memory.per_tensors; i++) {
      fputs(i ? ", " : "", f);
      json_write_string(f, c->memory.per_tensor[i].name);
      fprintf(f, ": \"%s\"", c->memory.per_tensor[i].policy);
    }
    fputc('}', f);
  } else {
    scalar_write(key, c, f);
  }
}

int config_ways(const Config *c, ConfigWay ways[CONFIG_WAYS]) {
  int n = 0;
  for (const Key *key = config_keys; key < config_keys + config_key_count; key++) {
    if (key->type != KEY_WAY) continue;
    int i, len;
    if (n == CONFIG_WAYS) panic("CONFIG_WAYS is too small");
    memcpy(&i, (const char *)c + key->offset, sizeof i);
    const char *word = word_at(key->words, i, &len);
    ways[n] = (ConfigWay){.key = key->path, .is_own = i == 0};
    snprintf(ways[n++].word, sizeof ways->word, "%.*s", len, word);
  }
  return n;
}
