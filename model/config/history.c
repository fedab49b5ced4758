#include "model/config/history.h"

#include "base/text_out.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// So far keys have only been added.
const FormerKey config_former[] = {{0}};

// Whether a path is that of the row, or lies in a group of that name.
static bool is_under(const char *path, const char *row) {
  size_t n = strlen(row);
  return strncmp(path, row, n) == 0 && (path[n] == 0 || path[n] == '.');
}

int former_refuse(const FormerKey *table, const Place *place, const cJSON *item, Error *err) {
  for (const FormerKey *f = table; f->path; f++) {
    if (!is_under(place->path, f->path)) continue;
    if (f->value && !(cJSON_IsString(item) && strcmp(item->valuestring, f->value) == 0)) continue;
    char where[336];
    place_text(place, item, where, sizeof where);
    return error_set(err, f->instead, "%s: %.120s%s%.80s is of an older version: since version %d %s", where,
                     place->path, f->value ? " = " : "", f->value ? f->value : "", f->since, f->now);
  }
  return 0;
}

int config_version_take(cJSON *root, const char *file, int *version, Error *err) {
  cJSON *item = cJSON_DetachItemFromObjectCaseSensitive(root, "tessera");
  *version = 0;
  if (!item) return 0;
  double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
  int bad = 0, line = json_line(item);
  if (!(v >= 1) || v != floor(v))
    bad = error_set(err, "it is the version of the config's format; a config of your own needs none",
                    "%.300s:%d: tessera must be an integer from 1 to %d", file, line, CONFIG_VERSION);
  else if (v > CONFIG_VERSION)
    bad = error_set(err, "use the program that wrote it, or a newer one",
                    "%.300s:%d: tessera = %.0f: this config is of a newer version than this program, which knows 1 to "
                    "%d",
                    file, line, v, CONFIG_VERSION);
  else
    *version = (int)v;
  cJSON_Delete(item);
  return bad;
}

char *config_new_keys(const Config *c) {
  if (c->version == CONFIG_VERSION) return NULL;
  TextOut out;
  FILE *f = text_begin(&out);
  for (int k = 0; k < config_key_count; k++) {
    if (c->origin[k] != ORIGIN_DEFAULT) continue;
    fprintf(f, "%s%s=", ftell(f) > 0 ? " " : "", config_keys[k].path);
    key_write(c, &config_keys[k], f);
  }
  char *text = text_end(&out);
  if (out.bytes) return text;
  free(text);
  return NULL;
}
