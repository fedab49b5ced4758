// Initial values: mean, deviation, cut and weight decay of every parameter, for a small model and for one that is wide
// enough for the other rule; the table here is written from the description of the model, not from the code.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"
#include "model/config/load.h"
#include "model/params.h"
#include "tests/ops/slab_fill.h"

enum { LAYERS = 3, HEADS = 2, HEAD_DIM = 12, COND = 40, PATCH = 4, BOTTLENECK = 30, VOCAB = 300 };
enum { EXPERT_TEXT = 24, EXPERT_IMAGE = 36, SHARED_TEXT = 20, SHARED_IMAGE = 28, FEATURES = 256 };

typedef enum Values { ZEROS, ONES, NORMAL, GATES } Values;

// What a parameter whose name ends so must be. fan_in 0: `std` as it is, whatever the width.
typedef struct Rule {
  const char *ends;
  Values values;
  int residual; // 1/sqrt(2L), as it writes into the residual stream
  int fan_in;   // -1: the model's width; a matrix that is 1/sqrt(fan_in) when narrow, .02 cut at 2 deviations when wide
  double std;   // of NORMAL without a fan_in
  int decay;
} Rule;

// The first that fits.
static const Rule rules[] = {
    {"image_head.weight", ZEROS, 0, 0, 0, 0},
    {"embed.weight", NORMAL, 0, 0, -1, 0}, // .1, or .02 when wide
    {"head.weight", NORMAL, 0, 0, -2, 0},  // 1/sqrt(C) at any width
    {"router.weight", NORMAL, 0, 0, 0.02, 0},
    {"patch.down.weight", NORMAL, 0, 3 * PATCH *PATCH, 0, 1},
    {"patch.in.weight", NORMAL, 0, BOTTLENECK, 0, 1},
    {"time1.weight", NORMAL, 0, FEATURES, 0, 1},
    {"time2.weight", NORMAL, 0, COND, 0, 1},
    {"pool.weight", NORMAL, 0, -1, 0, 1},
    {"attn.qkv.weight", NORMAL, 0, -1, 0, 1},
    {"attn.qkv.text.weight", NORMAL, 0, -1, 0, 1},
    {"attn.qkv.image.weight", NORMAL, 0, -1, 0, 1},
    {"attn.out.weight", NORMAL, 1, HEADS *HEAD_DIM, 0, 1},
    {"attn.out.text.weight", NORMAL, 1, HEADS *HEAD_DIM, 0, 1},
    {"attn.out.image.weight", NORMAL, 1, HEADS *HEAD_DIM, 0, 1},
    {"experts.w1", NORMAL, 0, -1, 0, 1},
    {"text.experts.w2", NORMAL, 1, EXPERT_TEXT, 0, 1},
    {"image.experts.w2", NORMAL, 1, EXPERT_IMAGE, 0, 1},
    {"shared.w1", NORMAL, 0, -1, 0, 1},
    {"text.shared.w2", NORMAL, 1, SHARED_TEXT, 0, 1},
    {"image.shared.w2", NORMAL, 1, SHARED_IMAGE, 0, 1},
    {"q_norm", ONES, 0, 0, 0, 0},
    {"k_norm", ONES, 0, 0, 0, 0},
    {"mod.base", GATES, 0, 0, 0, 0},
    {"mod.weight", ZEROS, 0, 0, 0, 1},
    {"cond.kind", ZEROS, 0, 0, 0, 0},
    {"bias", ZEROS, 0, 0, 0, 0},
};
enum { RULES = sizeof rules / sizeof *rules };

static int rule_find(const char *name) {
  for (int i = 0; i < RULES; i++) {
    size_t n = strlen(name), m = strlen(rules[i].ends);
    if (n >= m && strcmp(name + n - m, rules[i].ends) == 0) return i;
  }
  fail_msg("no rule for %s: say here how it begins", name);
  return -1;
}

static Config config_of(int dim, int per_modality) {
  char width[32];
  snprintf(width, sizeof width, "model.dim=%d", dim);
  const char *sets[] = {width,
                        per_modality ? "model.attn_per_modality=true" : "model.attn_per_modality=false",
                        "model.layers=3",
                        "model.heads=2",
                        "model.kv_heads=1",
                        "model.head_dim=12",
                        "model.cond_dim=40",
                        "model.patch=4",
                        "model.patch_bottleneck=30",
                        "model.vocab=300",
                        "model.text.expert_dim=24",
                        "model.image.expert_dim=36",
                        "model.text.shared_dim=20",
                        "model.image.shared_dim=28",
                        "data.image_size=8"};
  Config c;
  Error err;
  if (config_load(&c, NULL, sets, sizeof sets / sizeof *sets, &err) != 0) fail_msg("%s", err.text);
  return c;
}

static void check_normal(const Param *p, const Rule *rule, int dim, const double *x) {
  int wide = dim >= 512, fan_in = rule->fan_in < 0 ? dim : rule->fan_in, cut = fan_in && wide;
  double want = rule->std;
  if (fan_in) want = (wide ? 0.02 : 1 / sqrt(fan_in)) * (rule->residual ? 1 / sqrt(2.0 * LAYERS) : 1);
  if (rule->std == -1) want = wide ? 0.02 : 0.1;
  if (rule->std == -2) want = 1 / sqrt(dim);
  double sum = 0, squares = 0, cubes = 0, most = 0, n = (double)p->count;
  for (int64_t i = 0; i < p->count; i++) {
    double v = x[i] / want;
    sum += v;
    squares += v * v;
    cubes += v * v * v;
    most = fmax(most, fabs(v));
  }
  // A normal cut at two deviations has .8796 of the deviation. Five standard errors.
  double std = sqrt(squares / n), expected = cut ? 0.8796256610342398 : 1;
  if (fabs(sum / n) > 5 / sqrt(n)) fail_msg("%s (dim %d): mean %g deviations", p->name, dim, sum / n);
  if (fabs(std / expected - 1) > 5 / sqrt(2 * n))
    fail_msg("%s (dim %d): deviation %g, expected %g", p->name, dim, std * want, expected * want);
  if (fabs(cubes / n) > 5 * sqrt(15 / n)) fail_msg("%s (dim %d): skewed, %g", p->name, dim, cubes / n);
  if (cut ? most > 2.0001 || most < 1.7 : most < 2.0001 || most > 6)
    fail_msg("%s (dim %d): the largest value is %g deviations", p->name, dim, most);
}

// Text gates are 1, everything else 0. Columns: a layer has shift, scale, gate of each of two sites; the last site has
// no gate.
static void check_gates(const Param *p, int dim, const double *x) {
  int64_t M = p->shape[1];
  assert_int_equal(M, 6 * dim * LAYERS + 2 * dim);
  for (int row = 0; row < 2; row++)
    for (int64_t j = 0; j < M; j++) {
      int gate = j < 6 * dim * LAYERS && j / dim % 3 == 2;
      assert_true(x[row * M + j] == (row == TEXT && gate));
    }
}

static void check_table(int dim, int per_modality) {
  Config c = config_of(dim, per_modality);
  ParamTable t = params_build(&c);
  double *slab = xmalloc((size_t)t.total * sizeof *slab), *other = xmalloc((size_t)t.total * sizeof *other);
  float *narrow = xmalloc((size_t)t.total * sizeof *narrow);
  char used[RULES] = {0};
  memset(slab, 0xff, (size_t)t.total * sizeof *slab);
  params_fill(&t, PARAMS_INITIAL, 5, sizeof(double), slab);
  params_fill(&t, PARAMS_INITIAL, 6, sizeof(double), other);
  params_fill(&t, PARAMS_INITIAL, 5, sizeof(float), narrow);
  int64_t covered = 0;
  for (int i = 0; i < t.n; i++) {
    const Param *p = &t.of[i];
    const Rule *rule = &rules[rule_find(p->name)];
    const double *x = slab + p->offset;
    used[rule - rules] = 1;
    if (p->decay != rule->decay || t.spans[i].decay != rule->decay)
      fail_msg("%s: weight decay %d, expected %d", p->name, p->decay, rule->decay);
    assert_true(t.spans[i].offset == p->offset && t.spans[i].count == p->count && p->offset == covered);
    for (int64_t j = 0; j < p->count && rule->values <= ONES; j++)
      if (x[j] != (rule->values == ONES)) fail_msg("%s: begins with %g", p->name, x[j]);
    if (rule->values == GATES) check_gates(p, dim, x);
    if (rule->values == NORMAL) {
      check_normal(p, rule, dim, x);
      assert_true(memcmp(x, other + p->offset, (size_t)p->count * sizeof *x) != 0); // the seed counts
    }
    for (int64_t j = 0; j < p->count; j++) assert_true(narrow[p->offset + j] == (float)x[j]);
    // Padding up to the next parameter is zero.
    covered = i + 1 < t.n ? t.of[i + 1].offset : t.total;
    for (int64_t j = p->offset + p->count; j < covered; j++) assert_true(slab[j] == 0);
    for (int k = 0; k < i; k++) // no parameter repeats another's numbers
      if (rule->values == NORMAL && rules[rule_find(t.of[k].name)].values == NORMAL)
        assert_true(x[0] * slab[t.of[k].offset + 1] != x[1] * slab[t.of[k].offset]);
  }
  for (int k = 0; k < RULES; k++) {
    int other_layout = strstr(rules[k].ends, per_modality ? "attn.qkv.weight" : "attn.qkv.text") ||
                       strstr(rules[k].ends, per_modality ? "attn.out.weight" : "attn.out.text") ||
                       (!per_modality && (strstr(rules[k].ends, "qkv.image") || strstr(rules[k].ends, "out.image")));
    if (!used[k] && !other_layout) fail_msg("there is no parameter %s any more", rules[k].ends);
  }
  free(slab);
  free(other);
  free(narrow);
  params_free(&t);
}

static void test_initial_values(void **state) {
  (void)state;
  const int dims[] = {48, 511, 512, 600};
  for (int i = 0; i < 4; i++) check_table(dims[i], i % 2);
}

// What a token multiplies with, counted by hand.
static void test_active(void **state) {
  (void)state;
  Config c = config_of(48, 0);
  int64_t attention = 48 * (HEADS + 2) * HEAD_DIM + HEADS * HEAD_DIM * 48;
  for (int m = 0; m < MODALITIES; m++) {
    int64_t F = m ? EXPERT_IMAGE : EXPERT_TEXT, S = m ? SHARED_IMAGE : SHARED_TEXT;
    int64_t layer = attention + 3 * 48 * (2 * F + S) + 48 * 4;
    int64_t patch = 3 * PATCH * PATCH, ends = m ? BOTTLENECK * (patch + 48) + 48 * patch : 48 * VOCAB;
    assert_int_equal(params_active(&c, m), LAYERS * layer + ends);
  }
}

// Buckets share out the slabs: a layer's parameters, and no others, are one; the modulation table's U is the last.
static void test_buckets(void **state) {
  (void)state;
  for (int tied = 0; tied < 2; tied++) {
    Config c = config_of(48, 1);
    c.model.tie_embeddings = tied;
    ParamTable t = params_build(&c);
    int layers = 0;
    assert_int_equal(t.buckets, LAYERS + 3);
    for (int b = 0; b < t.buckets; b++) {
      const ParamBucket *k = &t.bucket[b], *before = b ? k - 1 : NULL;
      assert_int_equal(k->first, before ? before->first + before->n : 0);
      assert_int_equal(k->begin, before ? before->end : 0);
      assert_true(k->n > 0 && k->begin == t.of[k->first].offset);
      for (int i = k->first; i < k->first + k->n; i++) {
        int layer = -1;
        sscanf(t.of[i].name, "layers.%d.", &layer);
        assert_int_equal(layer, k->layer);
        assert_true(t.of[i].offset + t.of[i].count <= k->end);
      }
      layers += k->layer >= 0;
    }
    const ParamBucket *last = &t.bucket[t.buckets - 1];
    assert_int_equal(layers, LAYERS);
    assert_int_equal(last->end, t.total);
    assert_true(last->n == 1 && last->first == t.mod_weight && last->first == t.n - 1);
    params_free(&t);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_initial_values), cmocka_unit_test(test_active),
                                     cmocka_unit_test(test_buckets)};
  return cmocka_run_group_tests_name("parameters", tests, NULL, NULL);
}
