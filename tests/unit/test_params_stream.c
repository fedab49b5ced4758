// Initial values: one stream of normals a parameter, with the same bits however many threads draw it.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"
#include "base/hash.h"
#include "base/normals.h"
#include "base/philox.h"
#include "model/config/load.h"
#include "model/params.h"
#include "tests/ops/slab_fill.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

// Parameters shorter than a block of four, with padding behind them, and longer than a piece, cut off and not.
static const char *const sets[] = {"model.dim=512",
                                   "model.layers=1",
                                   "model.head_dim=64",
                                   "model.heads=8",
                                   "model.kv_heads=2",
                                   "model.cond_dim=33",
                                   "model.patch=3",
                                   "model.vocab=9001",
                                   "model.text.experts=17",
                                   "model.image.experts=3",
                                   "data.image_size=9",
                                   "model.text.expert_dim=257",
                                   "model.image.expert_dim=65"};

static ParamTable table(void) {
  Config c;
  Error err;
  if (config_load(&c, NULL, sets, sizeof sets / sizeof *sets, &err) != 0) panic("%s", err.text);
  return params_build(&c);
}

// One number after the other, as model/params.h describes them: what every run was begun with.
static void reference(const ParamTable *t, int index, uint64_t seed, float *out) {
  const Param *p = &t->of[index];
  float normal[4];
  uint32_t block = 0;
  int at = 4;
  for (int64_t i = 0; i < p->count;) {
    if (at == 4) {
      philox_normal4(seed, (uint64_t)index, STREAM_INIT, block++, normal);
      at = 0;
    }
    float v = normal[at++];
    if (p->init == INIT_TRUNCATED && fabsf(v) > 2) continue;
    out[i++] = (float)(p->std * (double)v);
  }
}

static void test_stream(void **state) {
  (void)state;
  static const int threads[] = {1, 2, 5};
  const uint64_t seed = 91;
  ParamTable t = table();
  size_t bytes = (size_t)t.total * sizeof(float);
  float *want = xcalloc((size_t)t.total, sizeof *want), *got = xmalloc(bytes);
  double *wide = xmalloc((size_t)t.total * sizeof *wide);
  int longer[2] = {0}, before = omp_get_max_threads();
  for (int i = 0; i < t.n; i++) {
    const Param *p = &t.of[i];
    if (p->init == INIT_NORMAL || p->init == INIT_TRUNCATED) {
      reference(&t, i, seed, want + p->offset);
      longer[p->init == INIT_TRUNCATED] += p->count > PARAMS_PIECE;
    }
    for (int64_t k = 0; p->init == INIT_ONE && k < p->count; k++) want[p->offset + k] = 1;
  }
  // Text rows of the modulation table: [.., gate] of the two branches of each layer, for one layer here.
  const Param *gates = &t.of[t.mod_base];
  for (int c = 0; c < 512; c++) want[gates->offset + 2 * 512 + c] = want[gates->offset + 5 * 512 + c] = 1;
  assert_true(longer[0] && longer[1]);
  for (size_t k = 0; k < sizeof threads / sizeof *threads; k++) {
    omp_set_num_threads(threads[k]);
    memset(got, 0xFF, bytes);
    params_fill(&t, PARAMS_INITIAL, seed, sizeof *got, got);
    for (int i = 0; i < t.n; i++) {
      int64_t end = i + 1 < t.n ? t.of[i + 1].offset : t.total, n = end - t.of[i].offset; // its padding too
      if (memcmp(got + t.of[i].offset, want + t.of[i].offset, (size_t)n * sizeof *got) != 0)
        fail_msg("%d threads: %s has other values", threads[k], t.of[i].name);
    }
  }
  params_fill(&t, PARAMS_INITIAL, seed, sizeof *wide, wide);
  for (int64_t i = 0; i < t.total; i++)
    if ((float)wide[i] != want[i])
      fail_msg("element %lld in double: %g, not %g", (long long)i, wide[i], (double)want[i]);
  omp_set_num_threads(before);
  free(want);
  free(got);
  free(wide);
  params_free(&t);
}

// Of all the uniforms there are: the same bits on every CPU, close to what this machine's libm makes.
static void test_every_normal(void **state) {
  (void)state;
  const uint32_t cells = 1 << 23;
  uint32_t words[2 * NORMALS_PAIRS];
  float got[2 * NORMALS_PAIRS], want[2];
  uint64_t hash = 0;
  for (uint32_t k = 0; k < cells; k += NORMALS_PAIRS) {
    for (uint32_t i = 0; i < NORMALS_PAIRS; i++) {
      words[2 * i] = (k + i) << 9;
      words[2 * i + 1] = (cells - 1 - k - i) << 9;
    }
    normals_of_words(words, got);
    hash = hash64(got, sizeof got, hash);
    for (int i = 0; i < NORMALS_PAIRS; i++) {
      philox_normal2(words[2 * i], words[2 * i + 1], &want[0], &want[1]);
      for (int j = 0; j < 2; j++)
        if (!(fabsf(got[2 * i + j] - want[j]) <= 4e-7f * fabsf(want[j])))
          fail_msg("word %08x: %g instead of %g", words[2 * i], (double)got[2 * i + j], (double)want[j]);
    }
  }
  assert_int_equal(hash, 0xc76bc1240ac0f828);
}

// Pieces follow each other and are no longer than promised.
typedef struct Seen {
  int64_t at, most;
} Seen;

static void note_piece(void *arg, int64_t offset, int64_t count, const void *values) {
  Seen *seen = arg;
  (void)values;
  assert_int_equal(offset, seen->at);
  seen->at += count;
  seen->most = max_i64(seen->most, count);
}

static void test_pieces(void **state) {
  (void)state;
  ParamTable t = table();
  for (int which = PARAMS_INITIAL; which <= PARAMS_RANDOM; which++) {
    Seen seen = {0};
    params_stream(&t, (ParamValues)which, 1, sizeof(float), note_piece, &seen);
    assert_int_equal(seen.at, t.total);
    assert_in_range(seen.most, PARAMS_PIECE / 2, PARAMS_PIECE);
  }
  params_free(&t);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_normal), cmocka_unit_test(test_stream),
                                     cmocka_unit_test(test_pieces)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
