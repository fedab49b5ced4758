#include "model/config/load.h"

#include "base/ranks.h"
#include "base/text_out.h"
#include "model/config/history.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

enum { CONFIG_MAX_BYTES = 4 << 20, PATH_MAX_BYTES = 120 };

// ---- finding keys ----

static const Key *key_find(const char *path) {
  for (int k = 0; k < config_key_count; k++)
    if (strcmp(config_keys[k].path, path) == 0) return &config_keys[k];
  return NULL;
}

static bool is_group(const char *path) {
  size_t n = strlen(path);
  for (int k = 0; k < config_key_count; k++)
    if (strncmp(config_keys[k].path, path, n) == 0 && config_keys[k].path[n] == '.') return true;
  return false;
}

static const char *leaf(const char *path) {
  const char *dot = strrchr(path, '.');
  return dot ? dot + 1 : path;
}

// Levenshtein distance without regard to case; b is at most PATH_MAX_BYTES long.
static int edit_distance(const char *a, const char *b) {
  int row[PATH_MAX_BYTES + 1], n = (int)strlen(b);
  for (int j = 0; j <= n; j++) row[j] = j;
  for (int i = 1; a[i - 1]; i++) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= n; j++) {
      int cost = diagonal + (tolower((unsigned char)a[i - 1]) != tolower((unsigned char)b[j - 1]));
      diagonal = row[j];
      if (row[j] + 1 < cost) cost = row[j] + 1;
      if (row[j - 1] + 1 < cost) cost = row[j - 1] + 1;
      row[j] = cost;
    }
  }
  return row[n];
}

// Whether `name`, "learning_rate" or "learning-rate", stands in a key's help as words: "learning rate".
static bool help_says(const Key *key, const char *name) {
  enum { SHORTEST = 6 }; // shorter words stand in the help of many keys
  char words[PATH_MAX_BYTES];
  snprintf(words, sizeof words, "%s", name);
  for (char *c = words; *c; c++)
    if (*c == '_' || *c == '-') *c = ' ';
  return strlen(words) >= SHORTEST && strcasestr(key->help, words);
}

const char *config_key_meant(const char *name) {
  char spelt[PATH_MAX_BYTES];
  snprintf(spelt, sizeof spelt, "%s", name);
  for (char *c = spelt; *c; c++)
    if (*c == '-') *c = '_';
  for (int k = 0; k < config_key_count; k++)
    if (strcmp(config_keys[k].path, spelt) == 0 || strcmp(leaf(config_keys[k].path), spelt) == 0)
      return config_keys[k].path;
  for (int k = 0; k < config_key_count; k++)
    if (help_says(&config_keys[k], spelt)) return config_keys[k].path;
  return NULL;
}

// The known key nearest to a path. The right key in the wrong group is as near as one slip of the pen, a key whose help
// says what is looked for as near as three.
static const char *key_nearest(const char *path) {
  const char *best = NULL;
  int least = 0;
  for (int k = 0; k < config_key_count; k++) {
    const char *known = config_keys[k].path;
    int d = 2 * edit_distance(known, path), leaves = 3 + 2 * edit_distance(leaf(known), leaf(path));
    if (leaves < d) d = leaves;
    if (d > 6 && help_says(&config_keys[k], leaf(path))) d = 6;
    if (best && d >= least) continue;
    best = known;
    least = d;
  }
  return best;
}

// ---- loading ----

static int unknown_key(const Place *place, const cJSON *item, Error *err) {
  char where[336], hint[256];
  place_text(place, item, where, sizeof where);
  snprintf(hint, sizeof hint, "the nearest known key is %s; --help lists all", key_nearest(place->path));
  return error_set(err, hint, "%s: unknown key %.120s", where, place->path);
}

// Stores `item` under place->path: a key's value, or an object that holds a group of keys.
static int config_apply(Config *c, const Place *place, const cJSON *item, Error *err) {
  if (former_refuse(config_former, place, item, err)) return -1;
  const Key *key = key_find(place->path);
  if (key) {
    if (key_set(c, key, place, item, err)) return -1;
    c->origin[key - config_keys] = place->file ? json_line(item) : ORIGIN_FLAG;
    return 0;
  }
  bool root = place->path[0] == 0;
  if (!root && !is_group(place->path)) return unknown_key(place, item, err);
  char where[336];
  place_text(place, item, where, sizeof where);
  if (!cJSON_IsObject(item) && root) return error_set(err, "see configs/", "%s: an object of keys is expected", where);
  if (!cJSON_IsObject(item))
    return error_set(err, "--help lists its keys", "%s: %s is a group of keys: an object is expected", where,
                     place->path);
  const cJSON *member;
  cJSON_ArrayForEach(member, item) {
    char path[PATH_MAX_BYTES];
    snprintf(path, sizeof path, "%s%s%.*s", place->path, root ? "" : ".", PATH_MAX_BYTES / 2, member->string);
    Place inner = {place->file, path};
    // A dot inside a name would be a second way to say the same key, unseen by the check for duplicates.
    if (strchr(member->string, '.')) return unknown_key(&inner, member, err);
    if (config_apply(c, &inner, member, err)) return -1;
  }
  return 0;
}

// The value of "key=value": JSON where it is JSON, otherwise the bare word; always a string for keys that are one.
static cJSON *parse_value(const Key *key, const char *text) {
  bool word = key && (key->type == KEY_STRING || key->type == KEY_ENUM || key->type == KEY_WAY) && text[0] != '"';
  Error ignored; // what is not JSON is a word
  cJSON *item = word ? NULL : json_parse(text, strlen(text), "command line", JSON_PLAIN, &ignored);
  if (item) return item;
  item = cJSON_CreateString(text);
  if (!item) panic("out of memory");
  return item;
}

static int apply_assignment(Config *c, const char *assignment, Error *err) {
  const char *equals = strchr(assignment, '=');
  const char *hint = "write --set train.steps=100";
  if (!equals || equals == assignment)
    return error_set(err, hint, "command line: \"%.120s\" is not KEY=VALUE", assignment);
  if (equals - assignment >= PATH_MAX_BYTES)
    return error_set(err, hint, "command line: unknown key %.60s...", assignment);
  char path[PATH_MAX_BYTES];
  snprintf(path, sizeof path, "%.*s", (int)(equals - assignment), assignment);
  cJSON *item = parse_value(key_find(path), equals + 1);
  Place place = {NULL, path};
  int rc = config_apply(c, &place, item, err);
  cJSON_Delete(item);
  return rc;
}

static void apply_defaults(Config *c) {
  memset(c, 0, sizeof *c);
  for (int k = 0; k < config_key_count; k++) {
    const Key *key = &config_keys[k];
    cJSON *item = parse_value(key, key->preset);
    Place place = {NULL, key->path};
    Error err;
    if (key_set(c, key, &place, item, &err)) panic("the key table is wrong: %s", err.text);
    cJSON_Delete(item);
  }
}

// ---- values that depend on one another ----

static int *origin_of(Config *c, const char *path) {
  return &c->origin[key_find(path) - config_keys];
}

// train.batch is another way to say train.micro_batches. A flag beats the file; otherwise batch decides, but two
// statements from the same place must agree, unless the program wrote them for another number of processes.
static int resolve_batch(Config *c, Error *err) {
  int *batch_origin = origin_of(c, "train.batch"), *micro_origin = origin_of(c, "train.micro_batches");
  if (c->train.batch == 0) return 0;
  if (*micro_origin == ORIGIN_FLAG && *batch_origin != ORIGIN_FLAG) {
    c->train.batch = 0;
    *batch_origin = ORIGIN_DERIVED;
    return 0;
  }
  int64_t T = c->data.micro_batch_tokens, all = T * c->processes, n = (c->train.batch + all - 1) / all;
  const Key *key = key_find("train.micro_batches");
  if (n > (int64_t)key->max)
    return error_set(err, "raise data.micro_batch_tokens",
                     "train.batch = %lld needs %lld micro-batches of %lld tokens, more than %.0f",
                     (long long)c->train.batch, (long long)n, (long long)all, key->max);
  if (n == c->train.micro_batches) return 0;
  bool same_place =
      *micro_origin == ORIGIN_FLAG || (*micro_origin > 0 && *batch_origin > 0 &&
                                       *origin_of(c, "data.micro_batch_tokens") != ORIGIN_FLAG && !c->version);
  if (same_place)
    return error_set(err, "leave one of them out",
                     "train.batch = %lld is %lld micro-batches of %lld tokens, but train.micro_batches = %d",
                     (long long)c->train.batch, (long long)n, (long long)all, c->train.micro_batches);
  c->train.micro_batches = (int)n;
  *micro_origin = ORIGIN_DERIVED;
  return 0;
}

static int check_model(const Config *c, Error *err) {
  if (c->model.heads % c->model.kv_heads)
    return error_set(err, "every key head serves the same number of query heads",
                     "model.heads = %d is not a multiple of model.kv_heads = %d", c->model.heads, c->model.kv_heads);
  if (c->model.head_dim % 2)
    return error_set(err, "rotary embedding turns pairs", "model.head_dim = %d must be even", c->model.head_dim);
  for (int m = 0; m < MODALITIES; m++)
    if (c->model.moe[m].top_k > c->model.moe[m].experts)
      return error_set(err, "a token goes to top_k different experts",
                       "model.%s.top_k = %d is more than the %d experts", m == TEXT ? "text" : "image",
                       c->model.moe[m].top_k, c->model.moe[m].experts);
  return 0;
}

static int check_data(const Config *c, Error *err) {
  int T = c->data.micro_batch_tokens;
  if (c->data.image_size % c->model.patch)
    return error_set(err, "an image is cut into whole patches",
                     "data.image_size = %d is not a multiple of model.patch = %d", c->data.image_size, c->model.patch);
  if (c->data.max_image_tokens && c->data.image_mode != IMAGE_ASPECT)
    return error_set(err, "set data.image_mode to aspect, or leave it out",
                     "data.max_image_tokens = %d has no effect on square images", c->data.max_image_tokens);
  // [bos][boi] image [eoi] caption [eos]
  int text = 4 + c->data.max_caption;
  int64_t longest = (int64_t)text + config_max_image_tokens(c);
  if (longest > T)
    return error_set(
        err, "raise it, or lower data.max_caption or the image size",
        "data.micro_batch_tokens = %d cannot hold an image of %d tokens with a caption of %d: %lld are needed", T,
        config_max_image_tokens(c), c->data.max_caption, (long long)longest);
  if (c->data.max_text && c->data.max_text < text)
    return error_set(err, "raise it, or lower data.max_caption",
                     "data.max_text = %d is less than the %d text tokens of a captioned image", c->data.max_text, text);
  if (c->data.max_text > T || c->data.max_document > T || c->data.max_images > T)
    return error_set(err, "0 takes what fits",
                     "data.max_text = %d, data.max_document = %d and data.max_images = %d cannot exceed "
                     "data.micro_batch_tokens = %d",
                     c->data.max_text, c->data.max_document, c->data.max_images, T);
  // [bos] text [eos]
  if (c->data.max_document && (c->data.max_document < 3 || c->data.max_document > config_max_text(c)))
    return error_set(err, "0 takes what fits",
                     "data.max_document = %d must be from 3 to %d, the text rows of a micro-batch",
                     c->data.max_document, config_max_text(c));
  return 0;
}

static int config_check(Config *c, Error *err) {
  if (strchr(c->run.name, '/') || strcmp(c->run.name, ".") == 0 || strcmp(c->run.name, "..") == 0)
    return error_set(err, "run.folder (--run-dir) takes a path", "run.name = \"%s\" must be a plain name, without '/'",
                     c->run.name);
  if (check_model(c, err) || check_data(c, err)) return -1;
  return resolve_batch(c, err);
}

// What to do about a file that is no JSON. One whose first byte is wrong already is hardly a slip of the pen.
static int not_json(const char *path, Error *err) {
  char *start = xasprintf("%s:1:1: ", path);
  if (strncmp(err->text, start, strlen(start)) == 0)
    snprintf(err->hint, sizeof err->hint,
             "this is no config: one is a JSON file, {\"model\": {...}, ...}; configs/ has examples");
  else if (!err->hint[0])
    snprintf(err->hint, sizeof err->hint, "a config is JSON, with // and /* */ comments; configs/ has examples");
  free(start);
  return -1;
}

int config_load(Config *c, const char *path, const char *const *sets, int n_sets, Error *err) {
  apply_defaults(c);
  c->processes = ranks_size();
  if (path) {
    cJSON *root = json_parse_file(path, CONFIG_MAX_BYTES, JSON_WITH_COMMENTS, err);
    if (!root) return not_json(path, err);
    Place place = {path, ""};
    int rc = config_version_take(root, path, &c->version, err) || config_apply(c, &place, root, err);
    cJSON_Delete(root);
    if (rc) return -1;
  }
  for (int i = 0; i < n_sets; i++)
    if (apply_assignment(c, sets[i], err)) return -1;
  if (config_check(c, err)) return path ? error_prefix(err, "%.200s", path) : -1;
  return 0;
}

const char *config_flag_key(const char *flag) {
  for (int k = 0; k < config_key_count; k++)
    if (config_keys[k].flag && strcmp(config_keys[k].flag, flag) == 0) return config_keys[k].path;
  return NULL;
}

// ---- writing ----

// Length of the group of a path, up to its last dot.
static size_t group_length(const char *path) {
  return (size_t)(leaf(path) - path);
}

static int levels(const char *path, size_t n) {
  int dots = 0;
  for (size_t i = 0; i < n; i++) dots += path[i] == '.';
  return dots;
}

static void indent(FILE *f, int level) {
  fprintf(f, "\n%*s", 2 * level, "");
}

char *config_to_json(const Config *c) {
  TextOut out;
  FILE *f = text_begin(&out);
  const char *last = "";
  fprintf(f, "{\n  \"tessera\": %d,", CONFIG_VERSION);
  for (int k = 0; k < config_key_count; k++) {
    const char *path = config_keys[k].path;
    // What the groups of this key and of the one before have in common stays open.
    size_t shared = 0, group = group_length(path), before = group_length(last);
    for (size_t i = 0; i < group && i < before && path[i] == last[i]; i++)
      if (path[i] == '.') shared = i + 1;
    for (int level = levels(last, before); level > levels(path, shared); level--) {
      indent(f, level);
      fputc('}', f);
    }
    fputs(k ? "," : "", f);
    for (size_t i = shared; i < group;) {
      size_t n = strcspn(path + i, ".");
      indent(f, levels(path, i) + 1);
      fprintf(f, "\"%.*s\": {", (int)n, path + i);
      i += n + 1;
    }
    indent(f, levels(path, group) + 1);
    fprintf(f, "\"%s\": ", leaf(path));
    key_write(c, &config_keys[k], f);
    last = path;
  }
  for (int level = levels(last, group_length(last)); level >= 0; level--) {
    indent(f, level);
    fputc('}', f);
  }
  fputc('\n', f);
  return text_end(&out);
}

void config_print(const Config *c, FILE *f) {
  for (int k = 0; k < config_key_count; k++) {
    int origin = c->origin[k];
    char from[32];
    if (origin > 0)
      snprintf(from, sizeof from, "line %d", origin);
    else
      snprintf(from, sizeof from, "%s",
               origin == ORIGIN_FLAG      ? "flag"
               : origin == ORIGIN_DERIVED ? "derived"
                                          : "default");
    fprintf(f, "%-26s %-9s ", config_keys[k].path, from);
    key_write(c, &config_keys[k], f);
    fputc('\n', f);
  }
}

// ---- comparing ----

static char *value_text(const Config *c, const Key *key) {
  TextOut out;
  FILE *f = text_begin(&out);
  key_write(c, key, f);
  return text_end(&out);
}

static char *source_text(const Config *c, int i) {
  const SourceConfig *s = &c->data.source[i];
  return i < c->data.sources ? xasprintf("%s %s (weight %g)", s->type, s->path, s->weight) : xstrdup("none");
}

// Writes "NAME BEFORE -> AFTER" where they differ, and frees both.
static void write_change(FILE *f, const char *name, char *before, char *after) {
  if (strcmp(before, after) != 0) fprintf(f, "%s%s %s -> %s", ftell(f) > 0 ? ", " : "", name, before, after);
  free(before);
  free(after);
}

static void write_source_changes(FILE *f, const Config *before, const Config *after) {
  for (int i = 0; i < before->data.sources || i < after->data.sources; i++) {
    char name[32];
    snprintf(name, sizeof name, "data.sources[%d]", i);
    write_change(f, name, source_text(before, i), source_text(after, i));
  }
}

char *config_changes(const Config *before, const Config *after) {
  static const char *const places[] = {"run.name", "run.dir", "run.folder"};
  TextOut out;
  FILE *f = text_begin(&out);
  for (int k = 0; k < config_key_count; k++) {
    const Key *key = &config_keys[k];
    bool place = false;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) place = place || strcmp(key->path, places[i]) == 0;
    if (strcmp(key->path, "data.sources") == 0)
      write_source_changes(f, before, after);
    else if (!place)
      write_change(f, key->path, value_text(before, key), value_text(after, key));
  }
  char *text = text_end(&out);
  if (out.bytes) return text;
  free(text);
  return NULL;
}

void config_help(FILE *f) {
  fprintf(f, "%-26s %-10s %-10s %s\n", "key", "default", "flag", "meaning, and what is allowed");
  for (int k = 0; k < config_key_count; k++) {
    const Key *key = &config_keys[k];
    char allowed[160];
    key_allowed(key, allowed, sizeof allowed);
    fprintf(f, "%-26s %-10s %-10s %s", key->path, key->preset[0] ? key->preset : "\"\"", key->flag ? key->flag : "",
            key->help);
    fprintf(f, key->type == KEY_BOOL || (key->type == KEY_STRING && !key->words) ? "\n" : " (%s)\n", allowed);
  }
}
