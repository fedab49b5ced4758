// The configuration: every key of the table (wrong type, out of range, misspelt, round trip), the values that depend on
// one another, configs of other versions, and the files in configs/.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/json.h"
#include "base/philox.h"
#include "data/image.h"
#include "model/config/config.h"
#include "model/config/history.h"
#include "model/config/load.h"
#include "tests/unit/assert_text.h"
#include "tests/unit/temp_folder.h"

#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *write_temp(const char *text, size_t n) {
  static char path[96];
  snprintf(path, sizeof path, "%s/config.json", folder);
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
  return path;
}

static int load_text(Config *c, const char *text, Error *err) {
  return config_load(c, write_temp(text, strlen(text)), NULL, 0, err);
}

static int load_set(Config *c, const char *set, Error *err) {
  return config_load(c, NULL, &set, 1, err);
}

// {"a": {"b": VALUE}} for "a.b", malloc'd.
static char *nested(const char *path, const char *value) {
  char *text = xstrdup(value);
  for (const char *end = path + strlen(path); end > path;) {
    const char *begin = end;
    while (begin > path && begin[-1] != '.') begin--;
    char *outer = xasprintf("{\"%.*s\": %s}", (int)(end - begin), begin, text);
    free(text);
    text = outer;
    end = begin > path ? begin - 1 : path;
  }
  return text;
}

// ---- the table ----

static void every_key_refuses_wrong_values(void **state) {
  (void)state;
  for (int k = 0; k < config_key_count; k++) {
    const Key *key = &config_keys[k];
    char below[40], above[40];
    const char *bad[6] = {"null", key->type == KEY_SOURCES ? "{}" : "[]"};
    int n = 2;
    if (key->type == KEY_INT || key->type == KEY_FLOAT) {
      snprintf(below, sizeof below, "%.17g", key->min - 1);
      snprintf(above, sizeof above, "%.17g", key->max * 1.01 + 1);
      bad[n++] = below;
      bad[n++] = above;
      bad[n++] = "\"many\"";
    }
    if (key->type == KEY_INT) bad[n++] = "2.5";
    if (key->type == KEY_BOOL) bad[n++] = "1";
    if (key->type == KEY_STRING) bad[n++] = "7";
    if (key->type == KEY_ENUM || key->type == KEY_WAY) bad[n++] = "\"autos\"";
    if (key->type == KEY_POLICIES) bad[n++] = "{\"x\": \"lose\"}";
    if (key->type == KEY_SOURCES) bad[n++] = "[{\"type\": \"folder\"}]";
    for (int i = 0; i < n; i++) {
      Config c;
      Error err = {0};
      char *text = nested(key->path, bad[i]);
      if (load_text(&c, text, &err) == 0) fail_msg("accepted: %s", text);
      assert_contains(err.text, key->path);
      assert_contains(err.text, "config.json:1");
      if (i < n - 1 || key->type != KEY_SOURCES) assert_contains(err.text, "must be");
      free(text);
      // A bare word is a string on the command line, so those keys take it.
      if (key->type == KEY_STRING && bad[i][0] != '"') continue;
      char *set = xasprintf("%s=%s", key->path, bad[i]);
      if (load_set(&c, set, &err) == 0) fail_msg("accepted: %s", set);
      assert_contains(err.text, "command line");
      free(set);
    }
  }
}

static void every_key_is_found_when_misspelt(void **state) {
  (void)state;
  for (int k = 0; k < config_key_count; k++) {
    Config c;
    Error err;
    char *wrong = xasprintf("%sz", config_keys[k].path), *text = nested(wrong, "1");
    char *expected = xasprintf("the nearest known key is %s;", config_keys[k].path);
    assert_int_equal(load_text(&c, text, &err), -1);
    assert_contains(err.text, wrong);
    assert_contains(err.hint, expected);
    free(wrong);
    free(text);
    free(expected);
  }
  static const char *const cases[][2] = {{"lr=1", "train.lr;"},
                                         {"train.learning_rate=1", "train.lr;"},
                                         {"model.query_heads=1", "model.heads;"},
                                         {"optimizer.lr=1", "train.lr;"},
                                         {"Train.Steps=1", "train.steps;"},
                                         {"model.experts=1", "model.text.experts;"},
                                         {"models=1", "model.dim"},
                                         {"train..steps=1", "train.steps;"}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Config c;
    Error err;
    assert_int_equal(load_set(&c, cases[i][0], &err), -1);
    assert_contains(err.text, "unknown key");
    if (i != 6) assert_contains(err.hint, cases[i][1]);
  }
}

// A value other than the default for every key, together a valid configuration.
static const char *const other_values[] = {
    "run.name=a \"quoted\" name",
    "run.dir=/tmp/x",
    "run.folder=here",
    "run.seed=9007199254740991",
    "run.device=cuda",
    "run.threads=3",
    "model.dim=96",
    "model.layers=3",
    "model.heads=6",
    "model.kv_heads=3",
    "model.head_dim=18",
    "model.cond_dim=40",
    "model.patch=4",
    "model.patch_bottleneck=16",
    "model.vocab=260",
    "model.attn_per_modality=true",
    "model.tie_embeddings=true",
    "model.text.experts=5",
    "model.text.expert_dim=7",
    "model.text.shared_dim=9",
    "model.text.top_k=3",
    "model.image.experts=6",
    "model.image.expert_dim=11",
    "model.image.shared_dim=13",
    "model.image.top_k=1",
    "data.micro_batch_tokens=2000",
    "data.image_size=20",
    "data.image_mode=aspect",
    "data.max_image_tokens=40",
    "data.max_pixels=1000000",
    "data.flip=true",
    "data.tokenizer=vocab.bpe",
    "data.cfg_drop=0.3333333333333333",
    "data.caption_to_image=1",
    "data.held_out=0",
    "data.held_out_by=style",
    "data.max_text=900",
    "data.max_images=17",
    "data.max_document=800",
    "data.max_caption=33",
    "data.cache_mb=0",
    "data.max_bad=3",
    "data.sources=[{\"type\":\"text\",\"path\":\"é\",\"weight\":0.1},{\"path\":\"b\",\"type\":\"folder\"}]",
    "data.threads=1",
    "train.steps=7",
    "train.micro_batches=5",
    "train.batch=9001",
    "train.lr=1e-05",
    "train.warmup_steps=0",
    "train.decay_fraction=0",
    "train.beta1=0.8",
    "train.beta2=0.99",
    "train.moments=bf16",
    "train.weight_decay=0.1",
    "train.clip=0",
    "train.ema=0",
    "train.ema_every=4",
    "train.ce_weight=0.5",
    "train.max_skipped=1",
    "train.spike=8",
    "train.spike_patience=2",
    "train.spike_rewinds=1",
    "train.verify_every=100",
    "flow.t_mean=0",
    "flow.t_std=0.8",
    "flow.t_uniform=0.1",
    "flow.t_floor=0.01",
    "router.balance=0",
    "router.z=0",
    "router.even=true",
    "eval.every=0",
    "eval.samples=0",
    "eval.documents=3",
    "eval.sampler=euler",
    "eval.sampler_steps=50",
    "eval.t_end=1",
    "eval.guidance=1.5",
    "eval.guidance_from=0",
    "eval.temperature=0",
    "eval.top_p=1",
    "checkpoint.every=9",
    "checkpoint.keep_last=1",
    "checkpoint.keep_every=18",
    "checkpoint.copy=never",
    "checkpoint.on_error=continue",
    "memory.policy=offload",
    "memory.budget_gb=79.5",
    "memory.state=moments",
    "memory.host_gb=100",
    "memory.per_tensor={\"qkv\":\"keep\",\"x\":\"offload\"}",
    "memory.share_gradients=false",
    "memory.arena=false",
    "kernels.packing=padded",
    "kernels.adaln=unfused",
    "kernels.moe_gemm=loop",
    "kernels.tiles.text=128",
    "kernels.tiles.image=256",
    "kernels.streams=single",
    "kernels.graph=false",
    "kernels.pdl=false",
    "kernels.update=overlapped",
    "kernels.update_share=16",
    "parallel.zero=0",
    "parallel.collectives=host"};

static char *value_text(const Config *c, const Key *key) {
  char *text;
  size_t n;
  FILE *f = open_memstream(&text, &n);
  key_write(c, key, f);
  fclose(f);
  return text;
}

static void every_key_round_trips(void **state) {
  (void)state;
  Config defaults, c, again;
  Error err;
  assert_int_equal(config_load(&defaults, NULL, NULL, 0, &err), 0);
  int n = sizeof other_values / sizeof other_values[0];
  if (config_load(&c, NULL, other_values, n, &err)) fail_msg("%s", err.text);
  for (int k = 0; k < config_key_count; k++) {
    char *a = value_text(&defaults, &config_keys[k]), *b = value_text(&c, &config_keys[k]);
    if (strcmp(a, b) == 0) fail_msg("%s is the default, %s", config_keys[k].path, a);
    assert_int_equal(defaults.origin[k], ORIGIN_DEFAULT);
    assert_int_equal(c.origin[k], ORIGIN_FLAG);
    free(a);
    free(b);
  }
  assert_int_equal(c.run.seed, 9007199254740991);
  assert_int_equal(c.data.image_mode, IMAGE_ASPECT);
  assert_int_equal(c.memory.policy, MEMORY_OFFLOAD);
  assert_int_equal(c.model.moe[IMAGE].expert_dim, 11);
  assert_int_equal(c.data.sources, 2);
  assert_true(c.data.source[1].weight == 1);
  assert_string_equal(c.memory.per_tensor[1].name, "x");

  char *text = config_to_json(&c);
  if (load_text(&again, text, &err)) fail_msg("%s", err.text);
  for (int k = 0; k < config_key_count; k++) assert_true(again.origin[k] > 1);
  memcpy(again.origin, c.origin, sizeof c.origin);
  assert_int_equal(again.version, CONFIG_VERSION);
  again.version = c.version;
  assert_memory_equal(&again, &c, sizeof c);
  free(text);

  text = config_to_json(&defaults);
  if (load_text(&again, text, &err)) fail_msg("%s", err.text);
  memcpy(again.origin, defaults.origin, sizeof c.origin);
  again.version = defaults.version;
  assert_memory_equal(&again, &defaults, sizeof c);
  free(text);
}

static void origins_and_order(void **state) {
  (void)state;
  const char *text = "{\n \"train\": {\n \"steps\": 5, // comment\n \"lr\": 0.5}}";
  const char *sets[] = {"train.lr=0.25", "train={\"clip\": 2, \"lr\": 0.125}"};
  Config c;
  Error err;
  assert_int_equal(config_load(&c, write_temp(text, strlen(text)), sets, 2, &err), 0);
  assert_int_equal(c.train.steps, 5);
  assert_true(c.train.lr == 0.125 && c.train.clip == 2);
  char *out;
  size_t n;
  FILE *f = open_memstream(&out, &n);
  config_print(&c, f);
  fclose(f);
  assert_contains(out, "train.steps                line 3    5\n");
  assert_contains(out, "train.lr                   flag      0.125\n");
  assert_contains(out, "memory.budget_gb           default   \"auto\"\n");
  free(out);
  f = open_memstream(&out, &n);
  config_help(f);
  fclose(f);
  for (int k = 0; k < config_key_count; k++) {
    assert_contains(out, config_keys[k].path);
    assert_contains(out, config_keys[k].help);
    if (config_keys[k].flag) assert_string_equal(config_flag_key(config_keys[k].flag), config_keys[k].path);
  }
  free(out);
  assert_string_equal(config_flag_key("--run-dir"), "run.folder");
  assert_null(config_flag_key("--resume"));
}

// ---- other versions ----

// Every row must be of use to whoever meets it: a key is gone, a value is refused, and what to write instead is known.
static void former_keys_are_gone(void **state) {
  (void)state;
  for (const FormerKey *f = config_former; f->path; f++) {
    Config c;
    Error err;
    char *word = xasprintf("\"%s\"", f->value ? f->value : "1"), *text = nested(f->path, word), *now = NULL;
    assert_int_equal(load_text(&c, text, &err), -1);
    now = xasprintf("is of an older version: since version %d %s", f->since, f->now);
    assert_contains(err.text, f->path);
    assert_contains(err.text, now);
    assert_string_equal(err.hint, f->instead);
    assert_in_range(f->since, 2, CONFIG_VERSION);
    for (int k = 0; k < config_key_count && !f->value; k++) {
      size_t n = strlen(f->path);
      const char *path = config_keys[k].path;
      if (strncmp(path, f->path, n) == 0 && (path[n] == 0 || path[n] == '.')) fail_msg("%s is a key", path);
    }
    free(word);
    free(text);
    free(now);
  }
}

static void former_keys_say_what_changed(void **state) {
  (void)state;
  static const FormerKey table[] = {
      {"train.learning_rate", NULL, 3, "it is train.lr", "write train.lr"},
      {"eval.sampler", "midpoint", 4, "there is none", "write heun, which is as exact"},
      {"optimizer", NULL, 2, "its keys are in train", "write train.beta1 and so on"},
      {0},
  };
  static const struct {
    const char *path, *value, *expected; // NULL: not in the table
    int hint;
  } cases[] = {
      {"train.learning_rate", "1",
       "c.json:1: train.learning_rate is of an older version: since version 3 it is train.lr", 0},
      {"eval.sampler", "\"midpoint\"",
       "c.json:1: eval.sampler = midpoint is of an older version: since version 4 there is none", 1},
      {"optimizer", "{}", "c.json:1: optimizer is of an older version: since version 2 its keys are in train", 2},
      {"optimizer.beta1", "0.9", "optimizer.beta1 is of an older version", 2},
      {"eval.sampler", "\"heun\"", NULL, 0},
      {"eval.sampler", "7", NULL, 0},
      {"train.learning_rates", "1", NULL, 0},
      {"optimizers", "{}", NULL, 0},
      {"train", "{}", NULL, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Error err;
    Place place = {"c.json", cases[i].path};
    cJSON *item = json_parse(cases[i].value, strlen(cases[i].value), "t", JSON_PLAIN, &err);
    assert_int_equal(former_refuse(table, &place, item, &err), cases[i].expected ? -1 : 0);
    if (cases[i].expected) assert_contains(err.text, cases[i].expected);
    if (cases[i].expected) assert_string_equal(err.hint, table[cases[i].hint].instead);
    cJSON_Delete(item);
  }
}

static void versions(void **state) {
  (void)state;
  static const struct {
    const char *text, *expected; // NULL: valid
    int version;
  } cases[] = {
      {"{}", NULL, 0},
      {"{\"train\": {\"steps\": 3}, \"tessera\": 1}", NULL, 1},
      {"{\"tessera\": 2}", NULL, 2},
      {"{\"tessera\": 6}", NULL, 6},
      {"{\"tessera\": 0}", "config.json:1: tessera must be an integer from 1 to 7", 0},
      {"{\"tessera\": 1.5}", "tessera must be an integer from 1 to 7", 0},
      {"{\"tessera\": \"2\"}", "tessera must be an integer from 1 to 7", 0},
      {"{\"tessera\": null}", "tessera must be an integer from 1 to 7", 0},
      // Said before the keys that only the newer version knows.
      {"{\"train\": {\"stepz\": 3},\n\"tessera\": 8}",
       "config.json:2: tessera = 8: this config is of a newer version than this program, which knows 1 to 7", 0},
      {"{\"model\": {\"tessera\": 2}}", "unknown key model.tessera", 0},
  };
  assert_int_equal(CONFIG_VERSION, 7); // the cases above name it
  Config c;
  Error err;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    err = (Error){0};
    int rc = load_text(&c, cases[i].text, &err);
    if (rc != (cases[i].expected ? -1 : 0)) fail_msg("%s: %d %s", cases[i].text, rc, err.text);
    if (cases[i].expected) assert_contains(err.text, cases[i].expected);
    if (!cases[i].expected) assert_int_equal(c.version, cases[i].version);
  }
  assert_int_equal(load_set(&c, "tessera=2", &err), -1);
  assert_contains(err.text, "unknown key tessera");
}

// A run's config of an older version: what it has is kept, what it lacks is named with its default.
static void older_config_lacks_keys(void **state) {
  (void)state;
  Config c;
  Error err;
  assert_int_equal(config_load(&c, NULL, NULL, 0, &err), 0);
  char *text = config_to_json(&c);
  if (load_text(&c, text, &err)) fail_msg("%s", err.text);
  assert_null(config_new_keys(&c)); // of this version
  static const char *const gone[] = {"\"tessera\": 7,", "\"max_bad\": 100,", ",\n    \"on_error\": \"stop\""};
  for (int i = 0; i < 3; i++) { // blanked out, as if they had never been
    char *at = strstr(text, gone[i]);
    assert_non_null(at);
    memset(at, ' ', strlen(gone[i]));
  }
  const char *set = "data.max_bad=7";
  for (int given = 0; given < 2; given++) {
    if (config_load(&c, write_temp(text, strlen(text)), &set, given, &err)) fail_msg("%s", err.text);
    char *keys = config_new_keys(&c);
    assert_string_equal(keys, given ? "checkpoint.on_error=\"stop\"" : "data.max_bad=100 checkpoint.on_error=\"stop\"");
    free(keys);
  }
  free(text);
}

static void structure_errors(void **state) {
  (void)state;
  static const char *const cases[][2] = {
      {"[]", "config.json:1: an object of keys is expected"},
      {"{\"train\": 3}", "train is a group of keys"},
      {"{\"train\":\n {\"steps\": 3,\n \"steps\": 4}}", "config.json:3: key \"steps\" again"},
      {"{\"train.steps\": 3}", "unknown key train.steps"},
      {"{\"data\": {\"sources\": [{\"type\": \"tar\", \"path\": \"a\"}]}}",
       "data.sources[0].type = \"tar\": must be one of"},
      {"{\"data\": {\"sources\": [{\"type\": \"text\", \"path\": \"a\"}, {\"typ\": \"text\"}]}}",
       "unknown key data.sources[1].typ"},
      {"{\"data\": {\"sources\": [{\"type\": \"text\", \"path\": \"a\", \"weight\": 0}]}}",
       "data.sources[0].weight = 0: must be"},
      {"{\"data\": {\"sources\": [3]}}", "data.sources[0] = 3"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Config c;
    Error err;
    assert_int_equal(load_text(&c, cases[i][0], &err), -1);
    assert_contains(err.text, cases[i][1]);
  }
  Config c;
  Error err;
  assert_int_equal(config_load(&c, "/nonexistent/c.json", NULL, 0, &err), -1);
  assert_contains(err.text, "/nonexistent/c.json");
  static const char *const sets[] = {"train.steps", "=3", "", "train.steps="};
  for (int i = 0; i < 4; i++) assert_int_equal(load_set(&c, sets[i], &err), -1);
  char long_set[400] = {0};
  memset(long_set, 'a', 390);
  long_set[200] = '=';
  assert_int_equal(load_set(&c, long_set, &err), -1);
  // A path that does not fit is refused, one that just fits is taken.
  char *path = xmalloc(CONFIG_PATH + 16);
  for (int extra = 0; extra < 2; extra++) {
    int at = snprintf(path, 16, "run.dir=");
    memset(path + at, 'x', CONFIG_PATH - 1 + extra);
    path[at + CONFIG_PATH - 1 + extra] = 0;
    assert_int_equal(load_set(&c, path, &err), -extra);
  }
  free(path);
}

static void dependent_values(void **state) {
  (void)state;
  static const struct {
    const char *sets[4];
    const char *expected; // NULL: valid
  } cases[] = {
      {{"data.image_size=36"}, "data.image_size = 36 is not a multiple of model.patch = 8"},
      {{"model.heads=5"}, "model.heads = 5 is not a multiple of model.kv_heads = 2"},
      {{"model.head_dim=33"}, "model.head_dim = 33 must be even"},
      {{"model.text.top_k=5"}, "model.text.top_k = 5 is more than the 4 experts"},
      {{"model.image.experts=1"}, "model.image.top_k = 2 is more than the 1 experts"},
      {{"data.micro_batch_tokens=84"}, NULL}, // 4 + 64 + 16
      {{"data.micro_batch_tokens=83"}, "84 are needed"},
      {{"data.image_mode=aspect", "data.max_image_tokens=957"}, "1025 are needed"},
      {{"data.max_image_tokens=16"}, "no effect on square images"},
      {{"data.max_text=67"}, "data.max_text = 67 is less than the 68"},
      {{"data.max_text=1025"}, "cannot exceed"},
      {{"data.max_document=2"}, "data.max_document = 2 must be from 3 to 1024"},
      {{"data.max_document=101", "data.max_text=100"}, "data.max_document = 101 must be from 3 to 100"},
      {{"data.max_document=100", "data.max_text=100"}, NULL},
      {{"run.name=a/b"}, "run.name"},
      {{"run.name=.."}, "run.name"},
      {{"train.batch=4096", "train.micro_batches=4"}, NULL},
      {{"train.batch=4096", "train.micro_batches=3"}, "train.micro_batches = 3"},
      {{"train.batch=1000000000000"}, "more than 65536"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Config c;
    Error err = {0};
    int n = 0;
    while (cases[i].sets[n]) n++;
    int rc = config_load(&c, NULL, cases[i].sets, n, &err);
    if (rc != (cases[i].expected ? -1 : 0)) fail_msg("case %zu: %d %s", i, rc, err.text);
    if (cases[i].expected) assert_contains(err.text, cases[i].expected);
  }
}

static void batch_says_micro_batches(void **state) {
  (void)state;
  for (int i = 0; i < 200; i++) {
    Philox4 r = philox4(3, (uint64_t)i, 0, 0);
    long T = 100 + r.v[0] % 3000, batch = 1 + r.v[1] % 50000;
    char tokens[32], set[32];
    snprintf(tokens, sizeof tokens, "data.micro_batch_tokens=%ld", T);
    snprintf(set, sizeof set, "train.batch=%ld", batch);
    const char *sets[] = {tokens, set};
    Config c;
    Error err;
    assert_int_equal(config_load(&c, NULL, sets, 2, &err), 0);
    assert_true(c.train.micro_batches * T >= batch && (c.train.micro_batches - 1) * T < batch);
  }
  // Over a file: --batch beats its micro_batches, --tokens keeps its batch, --set train.micro_batches ends it.
  const char *text = "{\"train\": {\"batch\": 4096, \"micro_batches\": 4}}";
  static const struct {
    const char *set;
    int micro_batches, batch;
  } cases[] = {
      {"train.batch=2000", 2, 2000}, {"data.micro_batch_tokens=512", 8, 4096}, {"train.micro_batches=3", 3, 0}};
  for (int i = 0; i < 3; i++) {
    Config c;
    Error err;
    if (config_load(&c, write_temp(text, strlen(text)), &cases[i].set, 1, &err)) fail_msg("%s", err.text);
    assert_int_equal(c.train.micro_batches, cases[i].micro_batches);
    assert_int_equal(c.train.batch, cases[i].batch);
  }
}

static void changes_are_named(void **state) {
  (void)state;
  Config before, after;
  Error err;
  const char *const files[2] = {
      "{\"run\": {\"name\": \"a\"}, \"data\": {\"sources\": [{\"type\": \"text\", \"path\": \"a.txt\"}, {\"type\": "
      "\"folder\", \"path\": \"b\", \"weight\": 2}]}, \"memory\": {\"per_tensor\": {\"h1\": \"keep\"}}}",
      "{\"run\": {\"name\": \"c\"}, \"data\": {\"sources\": [{\"type\": \"folder\", \"path\": \"b\", \"weight\": "
      "2}]}, \"train\": {\"steps\": 7, \"clip\": 0.5}}"};
  if (load_text(&before, files[0], &err) != 0 || load_text(&after, files[1], &err) != 0) fail_msg("%s", err.text);
  assert_null(config_changes(&before, &before));
  char *changes = config_changes(&before, &after);
  assert_string_equal(changes, "data.sources[0] text a.txt (weight 1) -> folder b (weight 2), data.sources[1] folder b "
                               "(weight 2) -> none, train.steps 1000 -> 7, train.clip 1 -> 0.5, memory.per_tensor "
                               "{\"h1\": \"keep\"} -> {}");
  free(changes);
}

static void derived_sizes(void **state) {
  (void)state;
  const char *sets[] = {"run.name=n", "run.dir=d", "data.max_text=500"};
  Config c;
  Error err;
  assert_int_equal(config_load(&c, NULL, sets, 3, &err), 0);
  char *run = config_run_folder(&c);
  assert_string_equal(run, "d/n");
  free(run);
  assert_int_equal(config_max_image_tokens(&c), 16);
  assert_int_equal(config_max_images(&c), 1024 / 17);
  assert_int_equal(config_max_text(&c), 500);
  assert_int_equal(config_max_document(&c), 500);
  const char *aspect[] = {"data.image_mode=aspect", "data.max_image_tokens=64", "run.folder=f"};
  assert_int_equal(config_load(&c, NULL, aspect, 3, &err), 0);
  run = config_run_folder(&c);
  assert_string_equal(run, "f");
  free(run);
  assert_int_equal(config_max_image_tokens(&c), 64);
  assert_int_equal(config_max_images(&c), 1024 / 33);
  ImageFit fit = image_fit_of(&c);
  assert_true(fit.mode == IMAGE_ASPECT && fit.size == 32 && fit.patch == 8 && fit.max_tokens == 64);
}

static void shipped_configs_load(void **state) {
  (void)state;
  glob_t found;
  assert_int_equal(glob("configs/*.json", 0, NULL, &found), 0);
  assert_true(found.gl_pathc >= 7);
  for (size_t i = 0; i < found.gl_pathc; i++) {
    Config c;
    Error err;
    if (config_load(&c, found.gl_pathv[i], NULL, 0, &err)) fail_msg("%s (%s)", err.text, err.hint);
    // Its name is that of the file, so that runs/NAME tells where a run came from.
    char *file = xasprintf("configs/%s.json", c.run.name);
    assert_string_equal(file, found.gl_pathv[i]);
    free(file);
  }
  globfree(&found);
}

// Damaged files are refused with a message or are still valid: nothing else happens.
static void mutations(void **state) {
  (void)state;
  Error err;
  size_t n;
  char *text = file_read("configs/base.json", 1 << 20, &n, &err);
  assert_non_null(text);
  int refused = 0;
  for (int i = 0; i < 2000; i++) {
    char *copy = xmalloc(n + 1);
    memcpy(copy, text, n + 1);
    size_t bytes = n;
    for (int flips = 0; flips <= i % 4; flips++) {
      Philox4 r = philox4(11, (uint64_t)i, 0, (uint32_t)flips);
      copy[r.v[0] % n] = r.v[2] % 2 ? (char)r.v[1] : "{}[]\",:0-e."[r.v[1] % 11];
    }
    if (i % 10 == 0) bytes = philox4(11, (uint64_t)i, 1, 0).v[0] % n;
    Config c;
    memset(&err, 0, sizeof err);
    int rc = config_load(&c, write_temp(copy, bytes), NULL, 0, &err);
    assert_true(rc == 0 || (rc == -1 && err.text[0]));
    refused += rc != 0;
    free(copy);
  }
  assert_true(refused > 500 && refused < 2000);
  free(text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_key_refuses_wrong_values),
      cmocka_unit_test(every_key_is_found_when_misspelt),
      cmocka_unit_test(every_key_round_trips),
      cmocka_unit_test(origins_and_order),
      cmocka_unit_test(former_keys_are_gone),
      cmocka_unit_test(former_keys_say_what_changed),
      cmocka_unit_test(versions),
      cmocka_unit_test(older_config_lacks_keys),
      cmocka_unit_test(structure_errors),
      cmocka_unit_test(dependent_values),
      cmocka_unit_test(batch_says_micro_batches),
      cmocka_unit_test(changes_are_named),
      cmocka_unit_test(derived_sizes),
      cmocka_unit_test(shipped_configs_load),
      cmocka_unit_test(mutations),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
