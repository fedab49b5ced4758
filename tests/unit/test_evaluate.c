// Evaluation, on tiny models with rigged heads, for what the figures must be.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/json.h"
#include "base/philox.h"
#include "kernels/cpu/cpu.h"
#include "tests/unit/engine_case.h"
#include "trainer/evaluate.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Nats of a caption's token: a tenth where its letter is the one that the first pixel of the document's image names,
// else one; eos a tenth.
static void rigged_nll(const KernelCall *c) {
  const Batch *b = c->batch;
  real *nll = c->out.HEAD_CE.nll; // [T]
  memset(nll, 0, (size_t)c->dims->T * sizeof *nll);
  for (int i = 0; i < b->dims->n_target; i++) {
    int r = b->target_row[i], image = b->row[b->doc_start[b->seq[r]] + 2];
    nll[r] = 1;
    if (b->target_kind[r] != TARGET_CAPTION) continue;
    int letter = b->patch[(image - b->dims->n_text) * c->dims->P];
    if (b->target[r] == VOCAB - 3 || b->target[r] == letter - '!') nll[r] = (real)0.1;
  }
}

// The quantile by Newton's method, unlike the engine's.
static double quantile(double p) {
  double x = 0;
  for (int i = 0; i < 50; i++) x -= (0.5 * erfc(-x / sqrt(2)) - p) / (exp(-x * x / 2) / sqrt(2 * M_PI));
  return x;
}

enum { ITEMS = 20 };

// Item i is captioned with 6 times its letter; pixels are 0 or 255, so that x^2 = 1, but for the one naming a letter.
static void items_make(EvalItem items[ITEMS], char text[ITEMS][8]) {
  for (int i = 0; i < ITEMS; i++) {
    memset(text[i], 'A' + i, 6);
    text[i][6] = 0;
    ImageGrid grid = {1 + i % 3, 2};
    size_t n = (size_t)(grid.rows * grid.columns) * P;
    items[i] = (EvalItem){.caption = text[i], .caption_bytes = 6, .grid = grid, .patches = xmalloc(n)};
    for (size_t k = 0; k < n; k++) items[i].patches[k] = philox4(1, (uint64_t)i, 0, (uint32_t)k).v[0] & 1 ? 255 : 0;
  }
}

static void test_evaluate_text(void **state) {
  (void)state;
  World w;
  world_open(&w, 128, 8);
  w.engine.backend.fn[OP_HEAD_CE] = rigged_nll;
  EvalItem items[ITEMS];
  char text[ITEMS][8];
  items_make(items, text);
  for (int i = 0; i < ITEMS; i++) items[i].patches[0] = (uint8_t)('A' + i);
  Error err;
  Evaluation e;
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  assert_int_equal(e.documents, ITEMS);
  assert_true(e.retrieval == 1);
  assert_true(isnan(e.retrieval_training));
  assert_true(fabs(e.bits_per_byte[EVAL_TRUE] - 0.7 / log(2) / 6) < 1e-5);
  assert_true(fabs(e.bits_per_byte[EVAL_SHUFFLED] - 6.1 / log(2) / 6) < 1e-5);

  double hits = 0;
  for (int i = 0; i < ITEMS / 2; i++) items[2 * i].patches[0] = (uint8_t)('A' + 2 * i + 1); // half of them misread
  assert_int_equal(evaluate_retrieval(&w.engine, w.tokenizer, items, ITEMS, &hits, &err), 0);
  assert_true(hits == 0.5);
  for (int i = 0; i < ITEMS; i++) items[i].patches[0] = '!'; // all equally unlikely: ties miss
  assert_int_equal(evaluate_retrieval(&w.engine, w.tokenizer, items, ITEMS, &hits, &err), 0);
  assert_true(hits == 0);
  // 16 items, 15 captions: there are not enough others. With one more, the item of the same caption is none of them.
  items[1].caption = items[0].caption;
  for (int i = 0; i < ITEMS; i++) items[i].patches[0] = (uint8_t)items[i].caption[0];
  assert_int_equal(evaluate_retrieval(&w.engine, w.tokenizer, items, 16, &hits, &err), 0);
  assert_true(isnan(hits));
  assert_int_equal(evaluate_retrieval(&w.engine, w.tokenizer, items, 17, &hits, &err), 0);
  assert_true(hits == 1);
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, 2, &e, &err), 0); // one caption: nothing to shuffle
  assert_true(isnan(e.bits_per_byte[EVAL_SHUFFLED]) && isnan(e.x_mse[0][EVAL_SHUFFLED]));
  assert_true(isfinite(e.bits_per_byte[EVAL_TRUE]) && isfinite(e.flow));
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, 0, &e, &err), 0);
  assert_true(isnan(e.flow) && e.documents == 0);
  for (int i = 0; i < ITEMS; i++) free(items[i].patches);
  world_close(&w);
}

// The nats of a caption that was cut go over the bytes of what is left of it.
static void test_cut_captions(void **state) {
  (void)state;
  World w;
  world_open(&w, 128, 8); // captions of 24 tokens at most
  w.engine.backend.fn[OP_HEAD_CE] = rigged_nll;
  EvalItem items[ITEMS];
  char text[ITEMS][8], *longer[ITEMS];
  items_make(items, text);
  double nats = 0, bytes = 0;
  for (int i = 0; i < ITEMS; i++) {
    int n = 15 + i; // the later ones are too long
    longer[i] = xmalloc((size_t)n + 1);
    memset(longer[i], 'A' + i, (size_t)n);
    longer[i][n] = 0;
    items[i].caption = longer[i];
    items[i].caption_bytes = (size_t)n;
    items[i].patches[0] = (uint8_t)('A' + i);
    bytes += n < 24 ? n : 24;
    nats += 0.1 * (n < 24 ? n : 24) + 0.1;
  }
  Error err;
  Evaluation e;
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  assert_true(fabs(e.bits_per_byte[EVAL_TRUE] - nats / log(2) / bytes) < 1e-5);
  for (int i = 0; i < ITEMS; i++) {
    free(longer[i]);
    free(items[i].patches);
  }
  world_close(&w);
}

static void test_evaluate_flow(void **state) {
  (void)state;
  World w;
  world_open(&w, 128, 8);
  EvalItem items[ITEMS];
  char text[ITEMS][8];
  items_make(items, text);
  Error err;
  Evaluation e, random, again;
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &random, &err), 0);
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &again, &err), 0);
  assert_memory_equal(&random.flow_at, &again.flow_at, sizeof random.flow_at);
  for (int k = 0; k < EVAL_TIMES; k++)
    assert_true(random.x_mse[k][EVAL_TRUE] != random.x_mse[k][EVAL_SHUFFLED]); // captions matter

  world_rig_image(&w, 0); // x^ = 0, so that the error is x^2 = 1
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  for (int k = 0; k < EVAL_TIMES; k++)
    for (int p = 0; p < EVAL_PAIRINGS; p++) {
      assert_true(fabs(e.x_mse[k][p] - 1) < 1e-5);
      assert_true(fabs(e.flow_at[k][p] * pow(1 - eval_time[k], 2) - 1) < 1e-5);
    }
  double squares = 0, elements = 0;
  for (int i = 0; i < ITEMS; i++) {
    size_t n = (size_t)(items[i].grid.rows * items[i].grid.columns) * P;
    for (size_t k = 0; k < n && i % 3; k++) items[i].patches[k] = (uint8_t)(100 + 5 * i);
    elements += (double)n;
    squares += (double)n * (i % 3 ? pow((100 + 5 * i) / 127.5 - 1, 2) : 1);
  }
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  assert_true(fabs(e.x_mse[2][EVAL_TRUE] - squares / elements) < 1e-5);
  for (int i = 0; i < ITEMS; i++) {
    memset(items[i].patches, 255, 2 * P);
    items[i].grid.rows = 1; // equal weights
  }
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  double flow = 0;
  for (int i = 0; i < ITEMS; i++) {
    double t = 1 / (1 + exp(-(w.config.flow.t_mean + w.config.flow.t_std * quantile((i + 0.5) / ITEMS))));
    flow += 1 / pow(fmax(1 - t, w.config.flow.t_floor), 2) / ITEMS;
  }
  assert_true(fabs(e.flow / flow - 1) < 1e-5);
  // Where the floor binds it is what the error is divided by, at the fixed times and at the quantiles.
  w.config.flow.t_floor = 0.6;
  assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e, &err), 0);
  for (int k = 0; k < EVAL_TIMES; k++)
    assert_true(fabs(e.flow_at[k][EVAL_TRUE] * pow(fmax(1 - eval_time[k], 0.6), 2) - 1) < 1e-5);
  flow = 0;
  int bound = 0;
  for (int i = 0; i < ITEMS; i++) {
    double t = 1 / (1 + exp(-(w.config.flow.t_mean + w.config.flow.t_std * quantile((i + 0.5) / ITEMS))));
    bound += 1 - t < 0.6;
    flow += 1 / pow(fmax(1 - t, 0.6), 2) / ITEMS;
  }
  assert_true(bound > 2 && bound < ITEMS - 2);
  assert_true(fabs(e.flow / flow - 1) < 1e-5);
  for (int i = 0; i < ITEMS; i++) free(items[i].patches);
  world_close(&w);
}

static int noised_elements;

// The noise that an evaluation draws: of seed 1, the item's number and a stream that training does not use.
static void check_noise(const KernelCall *c) {
  backend_cpu.fn[OP_NOISE](c);
  const Batch *b = c->batch;
  const real *z = c->out.NOISE.z; // [T, P]
  for (int g = 1; g < b->dims->n_segments; g++) {
    if (b->seg_kind[g] != SEGMENT_NOISED) continue;
    assert_true(b->seg_doc[g] < ITEMS);
    double t = (double)b->seg_time[g];
    for (int k = 0; k < b->seg_len[g] * P; k++) {
      float eps[4];
      philox_normal4(1, b->seg_doc[g], STREAM_EVAL, (uint32_t)(k / 4), eps);
      double x = b->patch[(b->seg_start[g] - b->dims->n_text) * P + k] / 127.5 - 1;
      double want = t * x + (1 - t) * (double)eps[k % 4], found = (double)z[b->seg_start[g] * P + k];
      if (fabs(found - want) > 1e-5) fail_msg("item %d: z[%d] is %g, not %g", (int)b->seg_doc[g], k, found, want);
      noised_elements++;
    }
  }
}

// Runs of other seeds and other packs are measured with the same noise.
static void test_noise(void **state) {
  (void)state;
  Evaluation e[3];
  for (int run = 0; run < 3; run++) {
    World w;
    world_open(&w, run == 2 ? 64 : 128, 8);
    w.config.run.seed = 1 + 5 * run;
    w.engine.backend.fn[OP_NOISE] = check_noise;
    EvalItem items[ITEMS];
    char text[ITEMS][8];
    items_make(items, text);
    Error err;
    noised_elements = 0;
    assert_int_equal(evaluate(&w.engine, w.tokenizer, items, ITEMS, &e[run], &err), 0);
    assert_true(noised_elements > 10000);
    for (int i = 0; i < ITEMS; i++) free(items[i].patches);
    world_close(&w);
  }
  assert_memory_equal(e[0].flow_at, e[1].flow_at, sizeof e[0].flow_at);
  for (int k = 0; k < EVAL_TIMES; k++)
    for (int p = 0; p < EVAL_PAIRINGS; p++) assert_true(fabs(e[2].flow_at[k][p] / e[0].flow_at[k][p] - 1) < 1e-5);
}

static void test_load_figures(void **state) {
  (void)state;
  // 2 layers of 2 text and 3 image experts
  double load[] = {5, 5, 0, 0, 0, 8, 0, 1, 1, 2};
  Dims d = {.L = 2, .E = {2, 3}};
  LoadFigures f[MODALITIES];
  load_figures(load, &d, f);
  assert_true(fabs(f[TEXT].entropy - 0.5) < 1e-12);
  assert_true(f[TEXT].max_over_mean == 2 && f[TEXT].dead == 1 && f[TEXT].experts == 4);
  assert_true(fabs(f[IMAGE].entropy - 1.5 * log(2) / log(3)) < 1e-12); // of the second layer; the first saw none
  assert_true(f[IMAGE].max_over_mean == 1.5 && f[IMAGE].dead == 3 && f[IMAGE].experts == 6);
  double none[10] = {0};
  load_figures(none, &d, f);
  assert_true(isnan(f[TEXT].entropy) && isnan(f[IMAGE].max_over_mean) && f[TEXT].dead == 4);
}

static void test_json(void **state) {
  (void)state;
  World w;
  world_open(&w, 64, 8);
  Error err;
  Evaluation e;
  assert_int_equal(evaluate(&w.engine, w.tokenizer, NULL, 0, &e, &err), 0);
  e.flow = 0.25;
  e.x_mse[3][EVAL_SHUFFLED] = 1.5;
  char *text = evaluation_json(&e, 41);
  assert_null(strchr(text, '\n'));
  cJSON *json = json_parse(text, strlen(text), "line", JSON_PLAIN, &err);
  if (!json) fail_msg("%s", err.text);
  const cJSON *eval = cJSON_GetObjectItem(json, "eval");
  assert_true(cJSON_GetObjectItem(json, "step")->valuedouble == 41);
  assert_true(cJSON_GetObjectItem(eval, "flow")->valuedouble == 0.25);
  assert_true(cJSON_IsNull(cJSON_GetObjectItem(eval, "retrieval")));
  const cJSON *mse = cJSON_GetObjectItem(eval, "x_mse_shuffled");
  assert_int_equal(cJSON_GetArraySize(mse), EVAL_TIMES);
  assert_true(cJSON_GetArrayItem(mse, 3)->valuedouble == 1.5 && cJSON_IsNull(cJSON_GetArrayItem(mse, 2)));
  cJSON_Delete(json);
  free(text);
  world_close(&w);
}

static void file_in(const char *folder, const char *name, const void *bytes, size_t n) {
  Error err;
  char *path = xasprintf("%s/%s", folder, name);
  if (file_write(path, bytes, n, &err) != 0) fail_msg("%s", err.text);
  free(path);
}

static void test_items_load(void **state) {
  (void)state;
  World w;
  world_open(&w, 64, 8);
  Error err;
  char folder[] = "/tmp/tessera-test-XXXXXX", index[1024] = "";
  assert_non_null(mkdtemp(folder));
  for (int i = 0; i < 6; i++) {
    char name[32];
    snprintf(name, sizeof name, "%d.png", i);
    Image image = image_random(3, 3 + i % 2, (uint64_t)i);
    size_t n;
    uint8_t *png = image_encode_png(&image, &n, &err);
    assert_non_null(png);
    file_in(folder, name, png, i == 4 ? 50 : n); // one has a header and hardly a pixel
    snprintf(index + strlen(index), sizeof index - strlen(index), "%s\tcaption %d\n", name, i);
    free(png);
    image_free(&image);
  }
  file_in(folder, "captions.tsv", index, strlen(index));
  Source *source = source_open("folder", folder, NULL, &err);
  if (!source) fail_msg("%s", err.text);
  HeldOut *list;
  int64_t n = stream_held_out(&source, 1, 1, &list);
  assert_int_equal(n, 6);
  EvalItem *items;
  int count = eval_items_load(&w.config, &source, list, n, 100, &items);
  assert_int_equal(count, 5);
  for (int i = 0; i < count; i++) {
    assert_int_equal(items[i].grid.rows * items[i].grid.columns, 9);
    assert_memory_equal(items[i].caption, "caption ", 8);
    assert_int_equal(items[i].caption_bytes, 9);
    if (items[i].caption[8] % 2) continue; // wider than high: resized and cut
    uint8_t want[9 * P];
    Image image = image_random(3, 3, (uint64_t)(items[i].caption[8] - '0'));
    image_to_patches(&image, PATCH, want);
    assert_memory_equal(items[i].patches, want, sizeof want);
    image_free(&image);
  }
  eval_items_free(items, count);
  count = eval_items_load(&w.config, &source, list, n, 2, &items);
  assert_int_equal(count, 2);
  eval_items_free(items, count);
  free(list);
  int64_t split[2];
  for (int k = 0; k < 2; k++) {
    w.config.data.held_out = k ? 0.4 : 0;
    split[k] = eval_list_training(&w.config, &source, 1, 100, &list);
    for (int64_t i = 0; i < split[k]; i++)
      assert_false(sample_is_held_out(source_sample(source, list[i].sample)->group, w.config.data.held_out));
    free(list);
  }
  assert_int_equal(split[0], 6);
  assert_int_equal(split[1] + stream_held_out(&source, 1, 0.4, &list), 6);
  free(list);
  source_close(source);
  char *command = xasprintf("rm -r %s", folder);
  assert_int_equal(system(command), 0);
  free(command);
  world_close(&w);
}

int main(void) {
  omp_set_num_threads(1); // nothing here is large enough to share
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_evaluate_text), cmocka_unit_test(test_cut_captions), cmocka_unit_test(test_evaluate_flow),
      cmocka_unit_test(test_noise),         cmocka_unit_test(test_load_figures), cmocka_unit_test(test_json),
      cmocka_unit_test(test_items_load),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
