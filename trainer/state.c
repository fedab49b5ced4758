#include "trainer/state.h"

#include "base/hash.h"
#include "base/json.h"
#include "base/text_out.h"
#include "trainer/export.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

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

int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err) {
  RunState next = {0};
  if (check_tokenizer(s, c, err) != 0 || (!weights_only && load_counters(&next, e->config, c, err) != 0)) return -1;
  int rc = state_load_slabs(e, c, weights_only, err);
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
