#include "trainer/state.h"

#include "base/hash.h"
#include "base/json.h"
#include "trainer/export.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// The hint where a checkpoint and the config are not of one model.
#define OTHER_MODEL "it belongs to another model: use the config.json of its run, or another run folder"

// Tensors of a slab on the host, named PREFIX + parameter.
typedef struct Slab {
  char *host;
  SafeTensor *tensor;
  char (*name)[72];
} Slab;

static SafeDtype slab_dtype(const Engine *e) {
  return e->model.backend->dtype_bytes[DT_REAL] == sizeof(double) ? SAFE_F64 : SAFE_F32;
}

static Slab slab_new(const Engine *e) {
  const ParamTable *p = &e->model.params;
  return (Slab){.host = xmalloc((size_t)p->total * e->model.backend->dtype_bytes[DT_REAL]),
                .tensor = xcalloc((size_t)p->n, sizeof(SafeTensor)),
                .name = xcalloc((size_t)p->n, sizeof(char[72]))};
}

static void slab_free(Slab *s) {
  free(s->host);
  free(s->tensor);
  free(s->name);
}

static Slab slab_read(const Engine *e, Space space, const char *prefix) {
  const ParamTable *p = &e->model.params;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  Slab s = slab_new(e);
  engine_slab_read(e, space, s.host);
  for (int i = 0; i < p->n; i++) {
    const Param *w = &p->of[i];
    snprintf(s.name[i], sizeof s.name[i], "%s%s", prefix, w->name);
    s.tensor[i] = (SafeTensor){.name = s.name[i],
                               .dtype = slab_dtype(e),
                               .rank = w->rank,
                               .shape = {w->shape[0], w->shape[1], w->shape[2]},
                               .data = s.host + (size_t)w->offset * element};
  }
  return s;
}

// Every parameter's tensor must be there with its shape.
static int slab_write(Engine *e, Space space, const char *prefix, const SafeFile *f, Error *err) {
  const ParamTable *p = &e->model.params;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  Slab s = slab_new(e);
  int bad = 0;
  memset(s.host, 0, (size_t)p->total * element);
  for (int i = 0; i < p->n && !bad; i++) {
    const Param *w = &p->of[i];
    char name[72];
    snprintf(name, sizeof name, "%s%s", prefix, w->name);
    const SafeTensor *t = safetensors_get(f, name, slab_dtype(e), w->rank, w->shape, err);
    if (t)
      memcpy(s.host + (size_t)w->offset * element, t->data, (size_t)w->count * element);
    else
      bad = 1;
  }
  if (!bad) engine_slab_write(e, space, s.host);
  slab_free(&s);
  return bad ? -1 : 0;
}

// Identity of the settings that decide what the stream of documents holds.
static void data_identity(const Config *c, char out[17]) {
  char uniform[32] = ""; // nothing without, as before the key
  if (c->flow.t_uniform > 0) snprintf(uniform, sizeof uniform, " %.17g", c->flow.t_uniform);
  char *text =
      xasprintf("%d %d %d %d %d %.17g %.17g %.17g %s %d %d %d %d %d %.17g %.17g%s", c->data.micro_batch_tokens,
                c->model.patch, c->data.image_size, (int)c->data.image_mode, c->data.max_image_tokens, c->data.cfg_drop,
                c->data.caption_to_image, c->data.held_out, c->data.held_out_by, c->data.max_text, c->data.max_images,
                c->data.max_document, c->data.max_caption, (int)c->data.flip, c->flow.t_mean, c->flow.t_std, uniform);
  uint64_t packing = c->kernels.packing == PACKING_PADDED; // decides which documents a step holds
  snprintf(out, 17, "%016" PRIx64, hash64(text, strlen(text), packing));
  free(text);
}

// [0.51,0.49,...], exact. malloc'd.
static char *norms_json(const OptimizerState *o) {
  char *text = NULL;
  size_t bytes;
  FILE *f = open_memstream(&text, &bytes);
  if (!f) panic("out of memory: gradient norms");
  for (int i = 0; i < o->norms; i++) fprintf(f, "%s%.17g", i ? "," : "[", o->norm[i]);
  fputs(o->norms ? "]" : "[]", f);
  if (fclose(f) != 0) panic("out of memory: gradient norms");
  return text;
}

int state_save(const Engine *e, const RunState *s, const char *run, Error *err) {
  const Config *c = e->config;
  int n = e->model.params.n;
  Slab weights = slab_read(e, SPACE_WEIGHTS, ""), m = slab_read(e, SPACE_ADAM_M, "m."),
       v = slab_read(e, SPACE_ADAM_V, "v."), ema = {0};
  if (engine_slab(e, SPACE_EMA)) ema = slab_read(e, SPACE_EMA, "");
  SafeTensor *moments = xcalloc((size_t)(2 * n), sizeof *moments);
  memcpy(moments, m.tensor, (size_t)n * sizeof *moments);
  memcpy(moments + n, v.tensor, (size_t)n * sizeof *moments);
  char *config = export_config(c, slab_dtype(e) == SAFE_F64 ? "float64" : "float32");
  SafeTensor text = {.name = "text", .dtype = SAFE_U8, .rank = 1, .shape = {(int64_t)strlen(config)}, .data = config};
  CheckpointFile files[4] = {{"model.safetensors", weights.tensor, n},
                             {"optimizer-0x1.safetensors", moments, 2 * n},
                             {"config.json", &text, 1}};
  int n_files = 3;
  if (ema.tensor) files[n_files++] = (CheckpointFile){"ema.safetensors", ema.tensor, n};
  char data[17];
  data_identity(c, data);
  char *norms = norms_json(&s->optimizer),
       *state = xasprintf("{\"step\": %" PRId64 ", \"seed\": \"%" PRId64 "\", \"data\": \"%s\", \"tokenizer\": \"%s\""
                          ", \"applied\": %" PRId64 ", \"skipped\": %" PRId64 ", \"skipped_in_row\": %" PRId64
                          ", \"rewinds\": %" PRId64 ", \"norms\": %s, \"loader\": %s}",
                          s->step, c->run.seed, data, s->tokenizer, s->optimizer.applied, s->optimizer.skipped,
                          s->optimizer.skipped_in_row, s->optimizer.rewinds, norms, s->loader);
  CheckpointKeep keep = {c->checkpoint.keep_last, c->checkpoint.keep_every};
  int bad = checkpoint_save(run, s->step, files, n_files, state, keep, err);
  free(norms);
  free(state);
  free(config);
  free(moments);
  slab_free(&weights);
  slab_free(&m);
  slab_free(&v);
  slab_free(&ema);
  return bad;
}

static int read_count(const Checkpoint *c, const char *name, int64_t *out, Error *err) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(c->state, name);
  if (!cJSON_IsNumber(item) || item->valuedouble < 0)
    return error_set(err, "take an older checkpoint with --from", "%s/state.json: \"%s\" is missing or not a count",
                     c->dir, name);
  *out = (int64_t)item->valuedouble;
  return 0;
}

// What train.spike remembers; none in a checkpoint of before there was such a key.
static int load_norms(OptimizerState *o, const Checkpoint *c, Error *err) {
  const cJSON *norms = cJSON_GetObjectItemCaseSensitive(c->state, "norms"), *item;
  o->rewinds = o->norms = 0;
  if (!norms) return 0;
  if (read_count(c, "rewinds", &o->rewinds, err) != 0) return -1;
  int whole = cJSON_IsArray(norms) && cJSON_GetArraySize(norms) <= SPIKE_WINDOW;
  for (item = whole ? norms->child : NULL; item; item = item->next) {
    whole &= cJSON_IsNumber(item) && item->valuedouble >= 0;
    o->norm[o->norms++] = item->valuedouble;
  }
  if (whole) return 0;
  return error_set(err, "take an older checkpoint with --from", "%s/state.json: \"norms\" are no gradient norms",
                   c->dir);
}

// A file with exactly the tensors that a model of this config has, their shapes apart. A model with fewer layers would
// otherwise take what it finds and leave the rest.
static const SafeFile *need_file(const Checkpoint *c, const char *name, int tensors, Error *err) {
  const SafeFile *f = checkpoint_file(c, name);
  if (!f) {
    error_set(err, "take another checkpoint with --from", "%s has no %s", c->dir, name);
  } else if (f->n != tensors) {
    error_set(err, OTHER_MODEL, "%.300s/%s has %d tensors, the model of this config has %d", c->dir, name, f->n,
              tensors);
    f = NULL;
  }
  return f;
}

static const char *read_string(const Checkpoint *c, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(c->state, name);
  return cJSON_IsString(item) ? item->valuestring : "";
}

// The weights speak the ids of one tokenizer. -1 with *err when it is not the one in use.
static int check_tokenizer(const RunState *s, const Checkpoint *c, Error *err) {
  if (!s->tokenizer || strcmp(s->tokenizer, read_string(c, "tokenizer")) == 0) return 0;
  return error_set(err, "data.tokenizer must be the one its run began with: tokenizer.bpe in the run's folder",
                   "%s was trained with another tokenizer than the one in use", c->dir);
}

static int load_counters(RunState *s, const Config *config, const Checkpoint *c, Error *err) {
  char data[17], *seed = xasprintf("%" PRId64, config->run.seed);
  int same_seed = strcmp(seed, read_string(c, "seed")) == 0;
  free(seed);
  if (!same_seed)
    return error_set(err, "go on with that seed; --init starts anew from its weights with any",
                     "%s was trained with run.seed %s, not %" PRId64, c->dir, read_string(c, "seed"), config->run.seed);
  data_identity(config, data);
  if (strcmp(data, read_string(c, "data")) != 0)
    log_warn("the data or flow settings are not those that %s was trained with: the stream goes on with the new ones, "
             "and not to the same bits",
             c->dir);
  if (read_count(c, "step", &s->step, err) != 0 || read_count(c, "applied", &s->optimizer.applied, err) != 0 ||
      read_count(c, "skipped", &s->optimizer.skipped, err) != 0 ||
      read_count(c, "skipped_in_row", &s->optimizer.skipped_in_row, err) != 0 || load_norms(&s->optimizer, c, err) != 0)
    return -1;
  char *text = cJSON_PrintUnformatted(cJSON_GetObjectItemCaseSensitive(c->state, "loader"));
  if (!text)
    return error_set(err, "take an older checkpoint with --from", "%s/state.json: \"loader\" is missing", c->dir);
  free(s->loader);
  s->loader = text;
  return 0;
}

static int load_slab(Engine *e, Space space, const char *prefix, const Checkpoint *c, const char *name, int tensors,
                     Error *err) {
  const SafeFile *f = need_file(c, name, tensors, err);
  if (!f) return -1;
  if (slab_write(e, space, prefix, f, err) == 0) return 0;
  error_prefix(err, "%.200s/%s", c->dir, name);
  snprintf(err->hint, sizeof err->hint, "%s", OTHER_MODEL);
  return -1;
}

int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err) {
  static const char model[] = "model.safetensors", ema[] = "ema.safetensors", moments[] = "optimizer-0x1.safetensors";
  int n = e->model.params.n;
  if (check_tokenizer(s, c, err) != 0) return -1;
  if (load_slab(e, SPACE_WEIGHTS, "", c, model, n, err) != 0) return -1;
  if (engine_slab(e, SPACE_EMA)) {
    // A run whose EMA was off so far begins its average at the weights.
    int has_ema = checkpoint_file(c, ema) != NULL;
    if (load_slab(e, SPACE_EMA, "", c, has_ema ? ema : model, n, err) != 0) return -1;
    if (!has_ema) log_warn("%s has no EMA; it begins at the weights", c->dir);
  }
  if (weights_only) return 0;
  if (load_slab(e, SPACE_ADAM_M, "m.", c, moments, 2 * n, err) != 0 ||
      load_slab(e, SPACE_ADAM_V, "v.", c, moments, 2 * n, err) != 0)
    return -1;
  return load_counters(s, e->config, c, err);
}
