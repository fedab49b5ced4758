// What a checkpoint holds beside tensors: texts, the metadata of its weights, and config.json for other tools.
#include "base/philox.h"
#include "model/config/load.h"
#include "model/files/checkpoint.h"
#include "tests/unit/checkpoint_case.h"
#include "tests/unit/files_case.h"
#include "tests/unit/temp_folder.h"
#include "trainer/export.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const CheckpointKeep keep = {1, 0};

static uint32_t rnd(uint64_t draw, uint32_t block) {
  return philox4(7, draw, 3, block).v[0];
}

static SafeTensor text_tensor(const char *text, size_t n) {
  return (SafeTensor){.name = "text", .dtype = SAFE_U8, .rank = 1, .shape = {(int64_t)n}, .data = text};
}

// A text comes back as it was, in its own file and in the header of the weights.
static void texts_are_kept(void **state) {
  (void)state;
  static const float numbers[] = {1, 2, 3};
  SafeTensor weight = {"w", SAFE_F32, 1, {3}, numbers};
  char text[2001];
  for (uint32_t round = 0; round < 20; round++) {
    size_t n = round ? rnd(round, 0) % 2000 : 0;
    for (size_t i = 0; i < n; i++)
      text[i] = (char)(i % 7 ? 32 + (int)(rnd(round, (uint32_t)i) % 95) : "\n\t\"\\"[i % 4]);
    text[n] = 0;
    SafeTensor content = text_tensor(text, n);
    CheckpointFile files[] = {{"config.json", &content, 1, NULL, false},
                              {"model.safetensors", &weight, 1, NULL, false}};
    Error err;
    if (checkpoint_save(folder, round, files, 2, "{}", keep, &err)) fail_msg("%s", err.text);
    Checkpoint *c;
    int64_t below = INT64_MAX;
    if (checkpoint_find(folder, &below, &c, &err) != 1) fail_msg("%s", err.text);
    assert_int_equal(below, round);
    assert_int_equal(c->step, round);
    assert_int_equal(c->n_files, 2);
    assert_null(checkpoint_file(c, "config.json"));
    const SafeFile *model = checkpoint_file(c, "model.safetensors");
    assert_non_null(safetensors_find(model, "w"));
    assert_int_equal(model->n_metadata, 2);
    assert_string_equal(metadata_value(model, "format"), "pt");
    assert_string_equal(metadata_value(model, "config.json"), text);
    char *path = xasprintf("%s/config.json", c->dir);
    size_t found;
    char *bytes = file_read(path, 4000, &found, &err);
    assert_int_equal(found, n);
    assert_memory_equal(bytes, text, n);
    free(bytes);
    free(path);
    checkpoint_close(c);
  }
}

static void damaged_texts_are_found(void **state) {
  (void)state;
  char text[] = "{\"model_type\": \"tessera\"}\n";
  size_t n = strlen(text);
  SafeTensor content = text_tensor(text, n);
  CheckpointFile file = {"config.json", &content, 1, NULL, false};
  Error err;
  if (checkpoint_save(folder, 100, &file, 1, "{}", keep, &err)) fail_msg("%s", err.text);
  char *dir = xasprintf("%s/ckpt-100", folder), *path = xasprintf("%s/config.json", dir);
  for (size_t i = 0; i < n; i++) {
    text[i] ^= 1;
    write_bytes(path, text, i % 2 ? n : i); // a flip, or cut off
    text[i] ^= 1;
    assert_null(checkpoint_open(dir, &err));
    assert_non_null(strstr(err.text, "config.json"));
  }
  assert_int_equal(unlink(path), 0);
  assert_null(checkpoint_open(dir, &err));
  assert_non_null(strstr(err.text, "config.json"));
  write_bytes(path, text, n);
  Checkpoint *c = checkpoint_open(dir, &err);
  assert_non_null(c);
  checkpoint_close(c);
  free(path);
  free(dir);
}

static void texts_are_bytes(void **state) {
  (void)state;
  static const float number = 1;
  SafeTensor bytes = text_tensor("ab", 2), pair[] = {bytes, bytes}, wide = {"w", SAFE_F32, 0, {0}, &number};
  CheckpointFile bad[] = {{"config.json", &wide, 1, NULL, false},
                          {"config.json", pair, 2, NULL, false},
                          {"safetensors", pair, 2, NULL, false}};
  Error err;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(checkpoint_save(folder, 200, &bad[i], 1, "{}", keep, &err), -1);
    assert_non_null(strstr(err.text, bad[i].name));
  }
}

static double number_of(const cJSON *object, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
  if (!cJSON_IsNumber(item)) fail_msg("%s is missing", name);
  return item->valuedouble;
}

static void config_follows_the_model(void **state) {
  (void)state;
  const char *sets[] = {"model.dim=96",         "model.layers=3",
                        "model.vocab=700",      "model.tie_embeddings=true",
                        "model.text.experts=5", "model.image.shared_dim=40",
                        "model.image.top_k=1",  "flow.t_floor=0.0625"};
  for (int n = 0; n <= 8; n += 8) {
    Config c;
    Error err;
    if (config_load(&c, NULL, sets, n, &err)) fail_msg("%s", err.text);
    char *text = export_config(&c, "float32");
    cJSON *root = json_parse(text, strlen(text), "config.json", JSON_PLAIN, &err);
    if (!root) fail_msg("%s", err.text);
    assert_string_equal(cJSON_GetObjectItem(root, "model_type")->valuestring, "tessera");
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(root, "architectures")), 1);
    assert_int_equal(atoi(cJSON_GetObjectItem(root, "tessera_version")->valuestring), CHECKPOINT_FORMAT);
    assert_true(number_of(root, "hidden_size") == c.model.dim);
    assert_true(number_of(root, "num_hidden_layers") == c.model.layers);
    assert_true(number_of(root, "vocab_size") == c.model.vocab);
    assert_true(number_of(root, "bos_token_id") == c.model.vocab - 4);
    assert_true(number_of(root, "eoi_token_id") == c.model.vocab - 1);
    assert_true(number_of(root, "flow_time_floor") == c.flow.t_floor);
    assert_int_equal(cJSON_IsTrue(cJSON_GetObjectItem(root, "tie_word_embeddings")), c.model.tie_embeddings);
    for (int m = 0; m < MODALITIES; m++) {
      const cJSON *experts = cJSON_GetObjectItemCaseSensitive(root, m == TEXT ? "text" : "image");
      assert_true(number_of(experts, "num_experts") == c.model.moe[m].experts);
      assert_true(number_of(experts, "num_experts_per_tok") == c.model.moe[m].top_k);
      assert_true(number_of(experts, "moe_intermediate_size") == c.model.moe[m].expert_dim);
      assert_true(number_of(experts, "shared_expert_intermediate_size") == c.model.moe[m].shared_dim);
    }
    cJSON_Delete(root);
    free(text);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(texts_are_kept),
      cmocka_unit_test(damaged_texts_are_found),
      cmocka_unit_test(texts_are_bytes),
      cmocka_unit_test(config_follows_the_model),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
