// Sampling and evaluation, on tiny models whose answers are known: random ones for what must not depend
// on packing, and ones with rigged heads for what the figures must be.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/json.h"
#include "base/philox.h"
#include "kernels/cpu/cpu.h"
#include "trainer/evaluate.h"
#include "trainer/sampler.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PATCH = 4, P = 3 * PATCH * PATCH, VOCAB = 300 };

typedef struct World {
  Config config;
  Backend backend; // the CPU's, with ops a test may replace
  Engine engine;
  Tokenizer *tokenizer;
} World;

static void world_open(World *w, int slots, int max_images) {
  Error err;
  char tokens[64], images[64];
  snprintf(tokens, sizeof tokens, "data.micro_batch_tokens=%d", slots);
  snprintf(images, sizeof images, "data.max_images=%d", max_images);
  const char *sets[] = {"model.dim=32",
                        "model.layers=2",
                        "model.heads=2",
                        "model.kv_heads=1",
                        "model.head_dim=16",
                        "model.cond_dim=16",
                        "model.patch=4",
                        "model.vocab=300",
                        "model.text.experts=3",
                        "model.text.expert_dim=16",
                        "model.text.top_k=2",
                        "model.image.experts=2",
                        "model.image.expert_dim=24",
                        "model.image.top_k=1",
                        "data.image_size=12",
                        "data.tokenizer=bytes",
                        "data.max_caption=24",
                        "train.ema=0",
                        tokens,
                        images};
  if (config_load(&w->config, NULL, sets, sizeof sets / sizeof *sets, &err) != 0) fail_msg("%s", err.text);
  w->backend = backend_cpu;
  w->tokenizer = tokenizer_load(NULL, VOCAB, &err);
  assert_non_null(w->tokenizer);
  if (engine_record(&w->engine, &w->config, &w->backend, 0, &err) != 0) fail_msg("%s", err.text);
  if (engine_allocate(&w->engine, &err) != 0) fail_msg("%s", err.text);
  params_randomize(&w->engine.model.params, 7, w->backend.dtype_bytes[DT_ACT], engine_slab(&w->engine, SPACE_WEIGHTS));
}

static void world_close(World *w) {
  engine_free(&w->engine);
  tokenizer_free(w->tokenizer);
}

// The image head answers `value` everywhere.
static void world_rig_image(World *w, real value) {
  const ParamTable *t = &w->engine.model.params;
  real *slab = engine_slab(&w->engine, SPACE_WEIGHTS);
  memset(slab + t->of[t->image_head].offset, 0, (size_t)t->of[t->image_head].count * sizeof *slab);
  for (int i = 0; i < P; i++) slab[t->of[t->image_head_bias].offset + i] = value;
}

static const SamplerOptions plain = {
    .kind = SAMPLER_EULER, .steps = 4, .t_end = 1, .guidance = 1, .guidance_from = 0.1};

// Draws and returns the images; n at most 16.
static void draw(World *w, const char *const *captions, int n, ImageGrid grid, uint64_t seed, SamplerOptions o,
                 Image *out) {
  Error err;
  if (sampler_draw(&w->engine, w->tokenizer, captions, n, grid, seed, &o, out, &err) != 0) fail_msg("%s", err.text);
  for (int i = 0; i < n; i++) {
    assert_int_equal(out[i].width, grid.columns * PATCH);
    assert_int_equal(out[i].height, grid.rows * PATCH);
  }
}

// The largest difference of any two pixels.
static int image_distance(const Image *a, const Image *b) {
  assert_int_equal(a->width, b->width);
  assert_int_equal(a->height, b->height);
  int most = 0;
  for (int i = 0; i < 3 * a->width * a->height; i++)
    if (abs(a->rgb[i] - b->rgb[i]) > most) most = abs(a->rgb[i] - b->rgb[i]);
  return most;
}

static void images_free(Image *images, int n) {
  for (int i = 0; i < n; i++) image_free(&images[i]);
}

static const char *const captions[] = {"a red circle",
                                       "blue",
                                       "",
                                       "a very long caption that is cut somewhere",
                                       "small green square",
                                       "x",
                                       "caf\xc3\xa9 \xf0\x9f\x98\x80",
                                       "\xff\xfe",
                                       "two words"};
enum { CAPTIONS = sizeof captions / sizeof *captions };

static void test_draw_deterministic(void **state) {
  (void)state;
  World w;
  world_open(&w, 64, 8);
  ImageGrid grid = {3, 2};
  Image a[CAPTIONS], b[CAPTIONS], c[CAPTIONS];
  SamplerOptions o = {.kind = SAMPLER_HEUN, .steps = 5, .t_end = 0.7, .guidance = 2.5, .guidance_from = 0.1};
  draw(&w, captions, CAPTIONS, grid, 3, o, a);
  draw(&w, captions, CAPTIONS, grid, 3, o, b);
  draw(&w, captions, CAPTIONS, grid, 4, o, c);
  for (int i = 0; i < CAPTIONS; i++) {
    assert_int_equal(image_distance(&a[i], &b[i]), 0);
    assert_true(image_distance(&a[i], &c[i]) > 8); // another seed
    int low = 255, high = 0;
    for (int k = 0; k < 3 * a[i].width * a[i].height; k++) {
      if (a[i].rgb[k] < low) low = a[i].rgb[k];
      if (a[i].rgb[k] > high) high = a[i].rgb[k];
    }
    assert_true(high > low + 16);
  }
  assert_true(image_distance(&a[0], &a[1]) > 8);
  images_free(a, CAPTIONS), images_free(b, CAPTIONS), images_free(c, CAPTIONS);
  world_close(&w);
}

// What is drawn beside an image, and in which packs, changes nothing but rounding.
static void test_draw_packing(void **state) {
  (void)state;
  World wide, narrow;
  world_open(&wide, 512, 32);
  world_open(&narrow, 40, 1); // an image and its unconditional twin do not fit one pack
  ImageGrid grid = {2, 4};
  SamplerOptions o = {.kind = SAMPLER_HEUN, .steps = 4, .t_end = 1, .guidance = 2, .guidance_from = 0.3};
  Image a[CAPTIONS], b[CAPTIONS], one;
  draw(&wide, captions, CAPTIONS, grid, 9, o, a);
  draw(&narrow, captions, CAPTIONS, grid, 9, o, b);
  draw(&wide, captions, 1, grid, 9, o, &one);
  for (int i = 0; i < CAPTIONS; i++) assert_in_range(image_distance(&a[i], &b[i]), 0, 1);
  assert_in_range(image_distance(&a[0], &one), 0, 1);
  images_free(a, CAPTIONS), images_free(b, CAPTIONS), images_free(&one, 1);
  world_close(&wide);
  world_close(&narrow);
}

static void test_draw_guidance(void **state) {
  (void)state;
  World w;
  world_open(&w, 256, 16);
  ImageGrid grid = {2, 2};
  const char *empty[] = {"", "", ""};
  SamplerOptions conditional = plain, late = plain, none = plain, guided = plain;
  late.guidance = 4, late.guidance_from = 1;  // never acts
  none.guidance = 0, none.guidance_from = -1; // the unconditional velocity alone, from t = 0 on
  guided.guidance = 4;
  Image a[3], b[3], c[3], d[3], u[3];
  draw(&w, captions, 3, grid, 1, conditional, a);
  draw(&w, captions, 3, grid, 1, late, b);
  draw(&w, captions, 3, grid, 1, guided, c);
  draw(&w, captions, 3, grid, 1, none, d);
  draw(&w, empty, 3, grid, 1, conditional, u);
  for (int i = 0; i < 3; i++) {
    assert_int_equal(image_distance(&a[i], &b[i]), 0);
    assert_in_range(image_distance(&d[i], &u[i]), 0, 1);
  }
  assert_true(image_distance(&a[0], &c[0]) > 2);
  assert_true(image_distance(&a[0], &u[0]) > 2);
  assert_in_range(image_distance(&a[2], &c[2]), 0, 1); // an empty caption is the unconditional document
  images_free(b, 3), images_free(c, 3);
  guided.guidance_from = 0.75; // the last of the four steps begins there, and guidance later
  draw(&w, captions, 3, grid, 1, guided, b);
  guided.guidance_from = 0.74;
  draw(&w, captions, 3, grid, 1, guided, c);
  for (int i = 0; i < 3; i++) assert_in_range(image_distance(&a[i], &b[i]), 0, 1);
  assert_true(image_distance(&a[0], &c[0]) > 2);
  images_free(a, 3), images_free(b, 3), images_free(c, 3), images_free(d, 3), images_free(u, 3);
  world_close(&w);
}

// With x^ = b the velocity is (b - z) / max(1 - t, floor): every step shrinks z - b by a known factor, and a last step
// from 1 - floor or before leaves nothing of it.
static void test_draw_known(void **state) {
  (void)state;
  World w;
  world_open(&w, 128, 8);
  ImageGrid grid = {1, 3};
  Image image;
  const float b = 0.25f;
  world_rig_image(&w, b);
  for (int steps = 1; steps <= 40; steps += 13) {
    for (int way = 0; way < 4; way++) {
      int heun = way % 2;
      SamplerOptions o = {.kind = heun ? SAMPLER_HEUN : SAMPLER_EULER,
                          .steps = steps,
                          .t_end = way < 2 ? 1 : 0.5,
                          .guidance = 2,
                          .guidance_from = 0};
      draw(&w, captions, 1, grid, 5, o, &image);
      double left = 1;
      for (int s = 0; s < steps; s++) {
        double stride = way < 2 || steps == 1 ? 1.0 / steps : 0.5 / (steps - 1);
        double t = s * stride, next = s + 1 < steps ? t + stride : 1, dt = next - t;
        double slope = 1 / fmax(1 - t, 0.05), slope2 = 1 / fmax(1 - next, 0.05);
        left *= heun && s + 1 < steps ? 1 - dt / 2 * (slope + (1 - dt * slope) * slope2) : 1 - dt * slope;
      }
      if (way >= 2) assert_true(fabs(left) < 1e-9);
      uint8_t patches[3 * P];
      image_to_patches(&image, PATCH, patches);
      for (int i = 0; i < 3 * P; i++) {
        float normal[4];
        philox_normal4(5, 0, STREAM_SAMPLE, (uint32_t)i / 4, normal);
        double x = b + left * ((double)normal[i % 4] - b);
        assert_true(fabs(patches[i] - fmin(fmax((x + 1) * 127.5, 0), 255)) <= 0.51);
      }
      image_free(&image);
    }
  }
  world_rig_image(&w, NAN);
  draw(&w, captions, 1, grid, 5, plain, &image);
  for (int i = 0; i < 3 * image.width * image.height; i++) assert_int_equal(image.rgb[i], 0);
  image_free(&image);
  world_close(&w);
}

static struct {
  float time[64];
  int n;
} seen; // the flow times of the first segment, pack by pack

static void spy_time_features(const KernelCall *c) {
  assert_in_range(seen.n, 0, 63);
  seen.time[seen.n++] = c->batch->seg_time[1];
  for (int g = 2; g < c->batch->dims->n_segments; g++) assert_true(c->batch->seg_time[g] == c->batch->seg_time[1]);
  cpu_TIME_FEATURES(c);
}

static void test_draw_times(void **state) {
  (void)state;
  World w;
  world_open(&w, 128, 8);
  w.engine.backend.fn[OP_TIME_FEATURES] = spy_time_features;
  const float euler[] = {0, 0.25f, 0.5f, 0.75f}, heun[] = {0, 0.25f, 0.25f, 0.5f, 0.5f, 0.75f, 0.75f};
  const float early[] = {0, 0.2f, 0.2f, 0.4f, 0.4f, 0.6f, 0.6f};
  for (int k = 0; k < 3; k++) {
    SamplerOptions o = plain;
    if (k) o.kind = SAMPLER_HEUN, o.guidance = 2;
    o.t_end = k == 1 ? 0.75 : k == 2 ? 0.6 : 1; // .75 is where the last step begins anyway
    Image images[2];
    seen.n = 0;
    draw(&w, captions, 2, (ImageGrid){2, 1}, 5, o, images);
    assert_int_equal(seen.n, k ? 7 : 4); // both images and their twins in one pack
    const float *want = k == 2 ? early : k == 1 ? heun : euler;
    for (int i = 0; i < seen.n; i++) assert_float_equal(seen.time[i], want[i], 1e-7);
    images_free(images, 2);
  }
  world_close(&w);
}

// "auto" ends at the quantile of the training times, and at 1 - t_floor at the latest; a number is taken as it is.
static void test_end_time(void **state) {
  (void)state;
  const struct {
    double mean, std, uniform, floor, asked, end;
  } cases[] = {
      {-0.8, 0.8, 0, 0.05, 0, 0.84186}, // -0.8 + 0.8 * 3.0902
      {-0.8, 1.2, 0, 0.05, 0, 0.94827}, //
      {-0.8, 0.8, 0.1, 0.05, 0, 0.95},  // the floor: .99 of them are below 1 - .01 / .1 of the uniform ones
      {-0.8, 0.8, 0.1, 0.001, 0, 0.99}, //
      {-0.8, 0.8, 0.1, 0.05, 1, 1},     //
      {-0.8, 0.8, 0, 0.05, 0.97, 0.97},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    Config c;
    Error err;
    assert_int_equal(config_load(&c, NULL, NULL, 0, &err), 0);
    c.flow.t_mean = cases[i].mean, c.flow.t_std = cases[i].std, c.flow.t_uniform = cases[i].uniform;
    c.flow.t_floor = cases[i].floor, c.eval.t_end = cases[i].asked;
    assert_float_equal(sampler_options(&c).t_end, cases[i].end, 2e-5);
  }
}

static void test_refusals(void **state) {
  (void)state;
  World w;
  world_open(&w, 64, 4);
  Error err = {0};
  Image image = {0};
  assert_int_equal(sampler_draw(&w.engine, w.tokenizer, captions, 1, (ImageGrid){9, 9}, 1, &plain, &image, &err), -1);
  assert_non_null(strstr(err.text, "9 x 9"));
  assert_int_equal(sampler_draw(&w.engine, w.tokenizer, captions, 1, (ImageGrid){0, 3}, 1, &plain, &image, &err), -1);
  assert_int_equal(
      sampler_draw(&w.engine, w.tokenizer, captions, 1, (ImageGrid){1 << 20, 1 << 20}, 1, &plain, &image, &err), -1);
  // The picture would fit, its caption as well, both together do not.
  assert_int_equal(sampler_draw(&w.engine, w.tokenizer, captions + 3, 1, (ImageGrid){10, 6}, 1, &plain, &image, &err),
                   -1);
  assert_null(image.rgb);
  char *text = NULL;
  uint8_t pixels[3 * 5 * 4] = {0};
  Image odd = {5, 4, pixels};
  WriterOptions o = {.max_tokens = 4, .top_p = 1};
  assert_int_equal(sampler_describe(&w.engine, w.tokenizer, &odd, 1, 1, &o, &text, &err), -1);
  assert_null(text);
  Tokenizer *other = tokenizer_load(NULL, VOCAB + 1, &err);
  assert_int_equal(sampler_draw(&w.engine, other, captions, 1, (ImageGrid){1, 1}, 1, &plain, &image, &err), -1);
  tokenizer_free(other);
  world_close(&w);
}

// ---- image to caption ----

static void test_choose(void **state) {
  (void)state;
  Error err;
  Tokenizer *t = tokenizer_load(NULL, VOCAB, &err);
  float logits[VOCAB];
  int counts[2] = {0};
  for (uint32_t i = 0; i < 400; i++) {
    for (int v = 0; v < VOCAB; v++) logits[v] = 3 * philox_uniform(philox4(i, 0, 0, (uint32_t)v).v[0]);
    for (int v = 256; v < VOCAB; v++) logits[v] = v == VOCAB - 3 ? 1.f : 50.f; // unused and specials beckon
    float u = philox_uniform(philox4(i, 1, 0, 0).v[0]);
    int32_t id = sampler_choose(logits, t, 0.25 * (i % 5), i % 3 ? 1 : 0.3, u);
    assert_true((id >= 0 && id < 256) || id == VOCAB - 3);
    int top = 0;
    for (int v = 0; v < 256; v++) top = logits[v] > logits[top] ? v : top;
    if (i % 5 == 0) assert_int_equal(id, top);
    assert_int_equal(sampler_choose(logits, t, 1, 1e-6, u), top);
  }
  // Probabilities 1/2, 1/4, 1/4 of three ids.
  for (int v = 0; v < VOCAB; v++) logits[v] = -INFINITY;
  logits[5] = logf(2), logits[9] = 0, logits[VOCAB - 3] = 0;
  for (int i = 0; i < 1000; i++) {
    float u = ((float)i + 0.5f) / 1000;
    assert_int_equal(sampler_choose(logits, t, 1, 1, u), u < 0.5f ? 5 : u < 0.75f ? 9 : VOCAB - 3);
    assert_int_equal(sampler_choose(logits, t, 1, 0.7, u), u < 2.f / 3 ? 5 : 9);
    counts[sampler_choose(logits, t, 0.5, 0.7, u) == 9]++; // 4 : 1 : 1, the first two hold .83
  }
  assert_in_range(counts[1], 198, 202);
  for (int v = 0; v < VOCAB; v++) logits[v] = NAN;
  logits[77] = -1e30f;
  assert_int_equal(sampler_choose(logits, t, 1, 0.9, 0.99f), 77);
  logits[77] = NAN;
  int32_t id = sampler_choose(logits, t, 1, 0.9, 0.5f);
  assert_true((id >= 0 && id < 256) || id == VOCAB - 3);
  tokenizer_free(t);
}

static Image image_random(int rows, int columns, uint64_t seed) {
  Image image = {.width = columns * PATCH, .height = rows * PATCH};
  int n = 3 * image.width * image.height;
  image.rgb = xmalloc((size_t)n);
  for (int i = 0; i < n; i++) image.rgb[i] = (uint8_t)philox4(seed, 0, 0, (uint32_t)i).v[0];
  return image;
}

static void describe(World *w, const Image *images, int n, WriterOptions o, char **out) {
  Error err;
  if (sampler_describe(&w->engine, w->tokenizer, images, n, 6, &o, out, &err) != 0) fail_msg("%s", err.text);
}

static void test_describe_packing(void **state) {
  (void)state;
  enum { N = 7 };
  World wide, narrow;
  world_open(&wide, 512, 16);
  world_open(&narrow, 48, 2);
  Image images[N];
  char *a[N], *b[N], *c[N];
  int different = 0;
  for (int i = 0; i < N; i++) images[i] = image_random(1 + i % 3, 1 + i % 4, (uint64_t)i);
  for (int greedy = 0; greedy < 2; greedy++) {
    WriterOptions o = {.temperature = greedy ? 0 : 1, .top_p = 0.9, .max_tokens = 9};
    describe(&wide, images, N, o, a);
    describe(&narrow, images, N, o, b);
    describe(&wide, images, N, o, c);
    for (int i = 0; i < N; i++) {
      assert_string_equal(a[i], b[i]);
      assert_string_equal(a[i], c[i]);
      assert_true(strlen(a[i]) <= 9);
      different += strcmp(a[i], a[0]) != 0;
    }
    for (int i = 0; i < N; i++) free(a[i]), free(b[i]), free(c[i]);
  }
  assert_true(different > N); // captions depend on their images
  images_free(images, N);
  world_close(&wide);
  world_close(&narrow);
}

// As many letters as the first pixel of the row's own image says, then eos; ids that must not be written always lead.
static void rigged_logits(const KernelCall *c) {
  const Batch *b = c->batch;
  real *logits = c->out[0]; // [n_target, V]
  for (int i = 0; i < b->dims->n_target; i++, logits += c->dims->V) {
    int q = b->seq[b->target_row[i]], first = b->doc_start[q] + 2, image = b->row[first];
    int want = b->patch[(image - b->dims->n_text) * c->dims->P], len = b->seg_len[b->segment[image]];
    int written = q - first - len; // 0 at eoi
    for (int v = 0; v < c->dims->V; v++) logits[v] = v < 256 ? 0 : 100;
    logits[VOCAB - 3] = -100;
    logits[written < want ? 'x' - '!' : VOCAB - 3] = 60;
  }
}

static void test_describe_known(void **state) {
  (void)state;
  enum { N = 5 };
  World w;
  world_open(&w, 96, 8);
  w.engine.backend.fn[OP_HEAD_LOGITS] = rigged_logits;
  Image images[N];
  char *out[N];
  for (int i = 0; i < N; i++) {
    images[i] = image_random(2, 1 + i, (uint64_t)i);
    images[i].rgb[0] = (uint8_t)(4 * i);
  }
  describe(&w, images, N, (WriterOptions){.temperature = 0.7, .top_p = 0.95, .max_tokens = 14}, out);
  for (int i = 0; i < N; i++) {
    assert_int_equal(strlen(out[i]), 4 * i < 14 ? 4 * i : 14);
    assert_int_equal(strspn(out[i], "x"), strlen(out[i]));
    free(out[i]);
  }
  images_free(images, N);
  world_close(&w);
}

// ---- evaluation ----

// Nats of a caption's token: a tenth where its letter is the one that the first pixel of the document's image names,
// else one; eos a tenth.
static void rigged_nll(const KernelCall *c) {
  const Batch *b = c->batch;
  real *nll = c->out[0]; // [T]
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

static void file_write(const char *folder, const char *name, const void *bytes, size_t n) {
  char *path = xasprintf("%s/%s", folder, name);
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  fclose(f);
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
    file_write(folder, name, png, i == 4 ? 40 : n); // one has a header and no pixels
    snprintf(index + strlen(index), sizeof index - strlen(index), "%s\tcaption %d\n", name, i);
    free(png);
    image_free(&image);
  }
  file_write(folder, "captions.tsv", index, strlen(index));
  Source *source = source_open("folder", folder, NULL, &err);
  if (!source) fail_msg("%s", err.text);
  HeldOut *list;
  int64_t n = stream_held_out(&source, 1, 1, 1 << 20, &list);
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
  assert_int_equal(split[1] + stream_held_out(&source, 1, 0.4, 1 << 20, &list), 6);
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
      cmocka_unit_test(test_draw_deterministic), cmocka_unit_test(test_draw_packing),
      cmocka_unit_test(test_draw_guidance),      cmocka_unit_test(test_draw_known),
      cmocka_unit_test(test_draw_times),         cmocka_unit_test(test_end_time),
      cmocka_unit_test(test_refusals),           cmocka_unit_test(test_choose),
      cmocka_unit_test(test_describe_packing),   cmocka_unit_test(test_describe_known),
      cmocka_unit_test(test_evaluate_text),      cmocka_unit_test(test_evaluate_flow),
      cmocka_unit_test(test_load_figures),       cmocka_unit_test(test_json),
      cmocka_unit_test(test_items_load),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
