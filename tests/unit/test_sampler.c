// Sampling, on tiny models whose answers are known: random ones for what must not depend on packing, and ones with
// rigged heads for what is drawn and written.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "kernels/cpu/cpu.h"
#include "model/config/load.h"
#include "tests/unit/engine_case.h"
#include "trainer/sampler.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const SamplerOptions plain = {
    .kind = SAMPLER_EULER, .steps = 4, .t_end = 1, .guidance = 1, .guidance_from = 0.1};

// Draws and returns the images; n at most 16.
static void draw(World *w, const char *const *captions, int n, ImageGrid grid, uint64_t seed, SamplerOptions o,
                 Image *out) {
  Error err;
  if (sampler_generate(&w->engine, w->tokenizer, captions, n, grid, seed, &o, out, &err) != 0) fail_msg("%s", err.text);
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

// "auto", the default, ends at the quantile of the training times, and at 1 - t_floor at the latest; a number is taken
// as it is.
static void test_end_time(void **state) {
  (void)state;
  const struct {
    double mean, std, uniform, floor, asked, end;
  } cases[] = {
      {-0.8, 0.8, 0, 0.05, 0, 0.74290},   // -0.8 + 0.8 * 2.3263
      {-0.8, 1.2, 0, 0.05, 0, 0.87991},   //
      {-0.8, 1.2, 0, 0.2, 0, 0.8},        // the floor
      {-0.8, 0.8, 0.1, 0.05, 0, 0.90077}, // of the uniform ones a tenth is later, of the others nearly none
      {-0.8, 0.8, 0.1, 0.05, 1, 1},       //
      {-0.8, 0.8, 0, 0.05, 0.97, 0.97},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    Config c;
    Error err;
    assert_int_equal(config_load(&c, NULL, NULL, 0, &err), 0);
    assert_float_equal(sampler_options(&c).t_end, 0.82147, 2e-5); // -0.8 + 2.3263
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
  assert_int_equal(sampler_generate(&w.engine, w.tokenizer, captions, 1, (ImageGrid){9, 9}, 1, &plain, &image, &err),
                   -1);
  assert_non_null(strstr(err.text, "9 x 9"));
  assert_int_equal(sampler_generate(&w.engine, w.tokenizer, captions, 1, (ImageGrid){0, 3}, 1, &plain, &image, &err),
                   -1);
  assert_int_equal(
      sampler_generate(&w.engine, w.tokenizer, captions, 1, (ImageGrid){1 << 20, 1 << 20}, 1, &plain, &image, &err),
      -1);
  // The picture would fit, its caption as well, both together do not.
  assert_int_equal(
      sampler_generate(&w.engine, w.tokenizer, captions + 3, 1, (ImageGrid){10, 6}, 1, &plain, &image, &err), -1);
  assert_null(image.rgb);
  char *text = NULL;
  uint8_t pixels[3 * 5 * 4] = {0};
  Image odd = {5, 4, pixels};
  WriterOptions o = {.max_tokens = 4, .top_p = 1};
  assert_int_equal(sampler_describe(&w.engine, w.tokenizer, &odd, 1, 1, &o, &text, &err), -1);
  assert_null(text);
  Tokenizer *other = tokenizer_load(NULL, VOCAB + 1, &err);
  assert_int_equal(sampler_generate(&w.engine, other, captions, 1, (ImageGrid){1, 1}, 1, &plain, &image, &err), -1);
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
  real *logits = c->out.HEAD_LOGITS.logits; // [n_target, V]
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

int main(void) {
  omp_set_num_threads(1); // nothing here is large enough to share
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_draw_deterministic), cmocka_unit_test(test_draw_packing),
      cmocka_unit_test(test_draw_guidance),      cmocka_unit_test(test_draw_known),
      cmocka_unit_test(test_draw_times),         cmocka_unit_test(test_end_time),
      cmocka_unit_test(test_refusals),           cmocka_unit_test(test_choose),
      cmocka_unit_test(test_describe_packing),   cmocka_unit_test(test_describe_known),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
