#include "trainer/state.h"

#include "base/hash.h"
#include "base/json.h"
#include "base/text_out.h"
#include "trainer/export.h"
#include "trainer/slab.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// The hint where a checkpoint and the config are not of one model.
#define OTHER_MODEL "it belongs to another model: use the config.json of its run, or another run folder"

// ---- what is in a checkpoint ----

static const struct {
  const char *name;
  int spaces;
  Space space[2];
  const char *prefix[2]; // before the parameter's name
} files[STATE_FILES] = {{"model.safetensors", 1, {SPACE_WEIGHTS}, {""}},
                        {"optimizer-0x1.safetensors", 2, {SPACE_ADAM_M, SPACE_ADAM_V}, {"m.", "v."}},
                        {"ema.safetensors", 1, {SPACE_EMA}, {""}}};

StateLayout state_layout(const Engine *e) {
  const ParamTable *p = &e->model.params;
  StateLayout l = {.params = p->n, .names = xcalloc((size_t)(4 * p->n), sizeof *l.names)};
  char(*name)[72] = l.names;
  for (int f = 0; f < STATE_FILES; f++) {
    if (!engine_slab_bytes(e, files[f].space[0])) continue;
    StateFile *file = &l.file[l.n++];
    *file = (StateFile){.name = files[f].name, .spaces = files[f].spaces, .n = files[f].spaces * p->n};
    memcpy(file->space, files[f].space, sizeof file->space);
    file->tensor = xcalloc((size_t)file->n, sizeof *file->tensor);
    for (int i = 0; i < file->n; i++, name++) {
      const Param *w = &p->of[i % p->n];
      snprintf(*name, sizeof *name, "%s%s", files[f].prefix[i / p->n], w->name);
      file->tensor[i] = slab_tensor(e, i % p->n, *name);
    }
  }
  return l;
}

void state_layout_free(StateLayout *l) {
  for (int f = 0; f < l->n; f++) free(l->file[f].tensor);
  free(l->names);
}

void state_data_identity(const Config *c, char out[17]) {
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
  TextOut out;
  FILE *f = text_begin(&out);
  for (int i = 0; i < o->norms; i++) fprintf(f, "%s%.17g", i ? "," : "[", o->norm[i]);
  fputs(o->norms ? "]" : "[]", f);
  return text_end(&out);
}

char *state_json(const Engine *e, const RunState *s) {
  char data[17];
  state_data_identity(e->config, data);
  char *norms = norms_json(&s->optimizer);
  char *state =
      xasprintf("{\"step\": %" PRId64 ", \"seed\": \"%" PRId64 "\", \"data\": \"%s\", \"tokenizer\": \"%s\""
                ", \"kernels\": \"%s\""
                ", \"applied\": %" PRId64 ", \"skipped\": %" PRId64 ", \"skipped_in_row\": %" PRId64
                ", \"rewinds\": %" PRId64 ", \"norms\": %s, \"loader\": %s}",
                s->step, e->config->run.seed, data, s->tokenizer, e->model.backend->kernels(), s->optimizer.applied,
                s->optimizer.skipped, s->optimizer.skipped_in_row, s->optimizer.rewinds, norms, s->loader);
  free(norms);
  return state;
}

char *state_config(const Engine *e) {
  return export_config(e->config, e->model.backend->dtype_bytes[DT_REAL] == sizeof(double) ? "float64" : "float32");
}

// ---- loading: the counters ----

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

static const char *read_string(const Checkpoint *c, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(c->state, name);
  return cJSON_IsString(item) ? item->valuestring : "";
}

// Refuses a checkpoint whose weights were trained with another tokenizer: -1 with *err.
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
  state_data_identity(config, data);
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

// Checkpoints of older versions do not say what computed.
static void name_other_kernels(const Engine *e, const Checkpoint *c) {
  const char *before = read_string(c, "kernels"), *now = e->model.backend->kernels();
  if (before[0] && strcmp(before, now) != 0)
    log_info(
        "%s was computed by the kernels of %s, here they are those of %s: the run goes on, but not to the same bits",
        c->dir, before, now);
}

// ---- loading: the slabs ----

// Where the tensors of a file go.
typedef struct Target {
  Engine *engine;
  SlabWriter *writer;
  const StateFile *file;
  int params;
  int *mine;   // [n] by index in the file: index in file->tensor
  int ema_too; // the checkpoint has no EMA: the weights go there as well
} Target;

// Which of the file's tensors is which of ours. A file with exactly the tensors that a model of this config has, shapes
// included: one with fewer layers would otherwise take what it finds and ignore all else.
static int match_tensors(Target *t, const Checkpoint *c, Error *err) {
  const StateFile *want = t->file;
  const SafeFile *have = checkpoint_file(c, want->name);
  if (!have) return error_set(err, "take another checkpoint with --from", "%s has no %s", c->dir, want->name);
  if (have->n != want->n)
    return error_set(err, OTHER_MODEL, "%.300s/%s has %d tensors, the model of this config has %d", c->dir, want->name,
                     have->n, want->n);
  t->mine = xmalloc((size_t)want->n * sizeof *t->mine);
  for (int i = 0; i < want->n; i++) {
    const SafeTensor *w = &want->tensor[i], *found = safetensors_get(have, w->name, w->dtype, w->rank, w->shape, err);
    if (found) {
      t->mine[found - have->tensor] = i;
      continue;
    }
    error_prefix(err, "%.200s/%s", c->dir, want->name);
    snprintf(err->hint, sizeof err->hint, "%s", OTHER_MODEL);
    return -1;
  }
  return 0;
}

static void put_part(void *context, int i, size_t at, size_t n, const void *data) {
  Target *t = context;
  Engine *e = t->engine;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  int mine = t->mine[i];
  Space space = t->file->space[mine / t->params];
  int64_t first = e->model.params.of[mine % t->params].offset + (int64_t)(at / element);
  slab_writer_put(t->writer, space, first, (int64_t)(n / element), data);
  if (t->ema_too) slab_writer_put(t->writer, SPACE_EMA, first, (int64_t)(n / element), data);
}

// Reads the files of all targets, each once.
static int read_slabs(Engine *e, Target *targets, int n, const Checkpoint *c, Error *err) {
  // Padding between parameters is zero, as in a slab that begins.
  for (int s = 0; s < SPACE_COUNT; s++)
    if (space_has((Space)s, SPACE_SAVED)) engine_slab_clear(e, (Space)s);
  SlabWriter *writer = slab_writer_open(e, FILE_IN_CHUNK / (int64_t)e->model.backend->dtype_bytes[DT_REAL], err);
  if (!writer) return -1;
  void *memory = xmalloc(checkpoint_memory(c));
  int rc = 0;
  for (int i = 0; i < n && rc == 0; i++) {
    targets[i].writer = writer;
    if (checkpoint_read(c, targets[i].file->name, memory, put_part, &targets[i], err) != 0) rc = STATE_DAMAGED;
  }
  slab_writer_close(writer);
  free(memory);
  return rc;
}

// The targets of a load; their number, or -1 with *err where the checkpoint has not what this engine needs.
static int choose_targets(Engine *e, const StateLayout *l, const Checkpoint *c, int weights_only, Target *targets,
                          Error *err) {
  int n = 0, has_ema = 0, wants_ema = engine_slab_bytes(e, SPACE_EMA) > 0;
  for (int f = 0; f < l->n; f++) {
    const StateFile *file = &l->file[f];
    int is_ema = file->space[0] == SPACE_EMA;
    if (is_ema && !checkpoint_file(c, file->name)) continue;
    if (weights_only && file->space[0] == SPACE_ADAM_M) continue;
    has_ema |= is_ema;
    targets[n] = (Target){.engine = e, .file = file, .params = l->params};
    if (match_tensors(&targets[n++], c, err) != 0) return -1;
  }
  targets[0].ema_too = wants_ema && !has_ema;
  // A run whose EMA was off so far begins its average at the weights.
  if (targets[0].ema_too) log_warn("%s has no EMA; it begins at the weights", c->dir);
  return n;
}

int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err) {
  RunState next = {0};
  if (check_tokenizer(s, c, err) != 0 || (!weights_only && load_counters(&next, e->config, c, err) != 0)) return -1;
  StateLayout layout = state_layout(e);
  Target targets[STATE_FILES] = {0};
  int n = choose_targets(e, &layout, c, weights_only, targets, err), rc = -1;
  Error damage;
  if (n > 0)
    rc = read_slabs(e, targets, n, c, err);
  else if (checkpoint_verify(c, &damage) != 0) { // a header that tells of another model may be a damaged one
    *err = damage;
    rc = STATE_DAMAGED;
  }
  for (int i = 0; i < STATE_FILES; i++) free(targets[i].mine);
  state_layout_free(&layout);
  if (rc == 0 && !weights_only) {
    name_other_kernels(e, c);
    free(s->loader);
    s->loader = next.loader;
    s->step = next.step;
    s->optimizer = next.optimizer;
  } else {
    free(next.loader);
  }
  return rc;
}
