#include "model/program/policy_file.h"

#include "base/json.h"
#include "base/text_out.h"
#include "model/program/policy.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char letter[POLICY_COUNT + 1] = "KRO";
static const size_t most_bytes = 1 << 20;

int policy_file_save(const PolicyTable *t, const char *path, Error *err) {
  TextOut out;
  FILE *f = text_begin(&out);
  fputs("{\"tensors\": [", f);
  for (int s = 0; s < SAVED_COUNT; s++) fprintf(f, "%s\"%s\"", s ? ", " : "", saved_name[s]);
  fputs("],\n \"layers\": [", f);
  for (int l = 0; l < t->layers; l++) {
    fputs(l ? ",\n            \"" : "\"", f);
    for (int s = 0; s < SAVED_COUNT; s++) fputc(letter[t->of[l * SAVED_COUNT + s]], f);
    fputc('"', f);
  }
  fputs("],\n \"slack\": ", f);
  json_write_number(f, t->slack);
  fputs("}\n", f);
  char *text = text_end(&out);
  int bad = file_replace(path, text, out.bytes, err);
  free(text);
  return bad;
}

static int read_layer(const cJSON *item, uint8_t of[SAVED_COUNT]) {
  if (!cJSON_IsString(item) || strlen(item->valuestring) != SAVED_COUNT) return 0;
  for (int s = 0; s < SAVED_COUNT; s++) {
    const char *at = strchr(letter, item->valuestring[s]);
    if (!at || !policy_allowed((Saved)s, (Policy)(at - letter))) return 0;
    of[s] = (uint8_t)(at - letter);
  }
  return 1;
}

static int read_all(const cJSON *root, PolicyTable *t) {
  const cJSON *tensors = cJSON_GetObjectItemCaseSensitive(root, "tensors");
  const cJSON *layers = cJSON_GetObjectItemCaseSensitive(root, "layers");
  const cJSON *slack = cJSON_GetObjectItemCaseSensitive(root, "slack"), *item;
  int n = 0;
  if (!cJSON_IsArray(tensors) || cJSON_GetArraySize(tensors) != SAVED_COUNT) return 0;
  cJSON_ArrayForEach(item, tensors) {
    if (!cJSON_IsString(item) || strcmp(item->valuestring, saved_name[n++]) != 0) return 0;
  }
  if (!cJSON_IsArray(layers) || cJSON_GetArraySize(layers) != t->layers) return 0;
  n = 0;
  cJSON_ArrayForEach(item, layers) {
    if (!read_layer(item, t->of + n++ * SAVED_COUNT)) return 0;
  }
  if (!cJSON_IsNumber(slack) || slack->valuedouble < 0 || slack->valuedouble > 10) return 0;
  t->slack = slack->valuedouble;
  return 1;
}

int policy_file_load(PolicyTable *t, int layers, const char *path) {
  Error err;
  if (access(path, F_OK) != 0) return 0;
  cJSON *root = json_parse_file(path, most_bytes, JSON_PLAIN, &err);
  *t = policy_table_new(layers, MEMORY_KEEP);
  int good = root && read_all(root, t);
  cJSON_Delete(root);
  if (good) return 1;
  policy_table_free(t);
  log_info("%s is %s: planning again", path, root ? "of another model" : "damaged");
  return 0;
}
