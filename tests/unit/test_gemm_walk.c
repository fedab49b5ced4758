// The walk of grouped products on the GPU (kernels/cuda/gemm_walk.h), on the host: every element of every product is
// made by one tile, whatever the counts; what takes longest comes first; what is stored in parts has room.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/base.h"
#include "kernels/cuda/gemm_walk.h"

enum { DEPTH = 64, BLOCKS = 132 };

typedef struct Walk {
  uint64_t state;
  int kind;
  GemmShape shape;
  GemmTiles tiles;
} Walk;

static int draw(Walk *w, int below) {
  w->state = w->state * 6364136223846793005ull + 1442695040888963407ull;
  return (int)((w->state >> 33) % (uint64_t)below);
}

// ---- shapes and counts ----

typedef enum Routing { ROUTE_DRAWN, ROUTE_EVEN, ROUTE_ONE, ROUTE_NONE, ROUTE_ONE_ROW, ROUTINGS } Routing;

static void set_counts(Walk *w, Routing routing) {
  GemmShape *s = &w->shape;
  for (int m = 0, i = 0; m < MODALITIES; m++) {
    const int n = s->groups[m], chosen = n ? draw(w, n) : 0;
    int left = s->rows[m], at = n ? draw(w, 7) : 0;
    for (int e = 0; e < n; e++, i++) {
      int count = 0;
      if (routing == ROUTE_DRAWN) count = draw(w, 3) ? draw(w, gemm_less(left, 1 + 4 * s->rows[m] / n) + 1) : 0;
      if (routing == ROUTE_EVEN) count = s->rows[m] / n;
      if (routing == ROUTE_ONE) count = e == chosen ? s->rows[m] : 0;
      if (routing == ROUTE_ONE_ROW) count = e == chosen;
      w->tiles.begin[i] = at;
      w->tiles.count[i] = count;
      at += count;
      left -= count;
    }
  }
}

static void set_shape(Walk *w, int kind, const int groups[MODALITIES], int rows) {
  w->kind = kind;
  w->shape.adds = draw(w, 2);
  w->shape.blocks = draw(w, 2) ? BLOCKS : 0;
  for (int m = 0; m < MODALITIES; m++) {
    GemmShape *s = &w->shape;
    s->groups[m] = groups[m];
    s->rows[m] = rows;
    s->bn[m] = draw(w, 2) ? 128 : 256;
    s->M[m] = 8 * (1 + draw(w, 60));
    s->N[m] = 8 * (1 + draw(w, 80));
    s->K[m] = 8 * (1 + draw(w, 300));
    s->parts[m] = kind == GEMM_TN ? draw(w, 4) > 0 ? 0 : 1 : groups[m] == 1 ? 1 + draw(w, 3) : 1;
  }
}

// ---- what has to hold ----

// Each tile once over all blocks and rounds; each group's elements once in each part, its inner dimension once.
static void check_covered(const Walk *w) {
  const GemmShape *s = &w->shape;
  const int groups = gemm_groups(s), total = gemm_tiles_total(&w->shape, &w->tiles);
  uint8_t *taken = xcalloc((size_t)total + 1, 1);
  int64_t *area = xcalloc((size_t)groups + 1, sizeof *area), *volume = xcalloc((size_t)groups + 1, sizeof *volume);
  for (int block = 0; block < BLOCKS; block++)
    for (int round = 0; round * BLOCKS < total; round++) {
      const int number = gemm_tile_number(round, block, BLOCKS);
      assert_true(number >= 0);
      if (number >= total) continue;
      assert_false(taken[number]);
      taken[number] = 1;
      const GemmTile t = gemm_tile_at(w->kind, s, &w->tiles, number, DEPTH);
      const int g = t.group + (t.side == IMAGE ? s->groups[TEXT] : 0), parts = w->tiles.parts[g];
      assert_in_range(t.group, 0, s->groups[t.side] - 1);
      assert_in_range(t.part, 0, parts - 1);
      assert_int_equal(t.partial, parts > 1);
      const int row0 = w->kind == GEMM_TN ? 0 : w->tiles.begin[g];
      const int rows = w->kind == GEMM_TN ? s->M[t.side] : w->tiles.count[g];
      const int inner0 = w->kind == GEMM_TN ? w->tiles.begin[g] : 0;
      const int inner = w->kind == GEMM_TN ? w->tiles.count[g] : s->K[t.side];
      assert_int_equal((t.m - row0) % GEMM_BM, 0);
      const bool half = number >= total - 2 * w->tiles.halved;
      assert_int_equal(t.bn, half ? s->bn[t.side] / 2 : s->bn[t.side]);
      assert_int_equal(t.n % t.bn, 0);
      assert_true(t.m >= row0 && t.m < t.m_end && t.n >= 0 && t.n < s->N[t.side] + (half ? t.bn : 0));
      assert_int_equal(t.m_end, row0 + rows);
      assert_true(t.inner >= inner0 && t.inner_end <= inner0 + inner && t.inner <= t.inner_end);
      assert_int_equal((t.inner - inner0) % DEPTH, 0);
      const int64_t own =
          (int64_t)gemm_less(GEMM_BM, t.m_end - t.m) * gemm_less(t.bn, s->N[t.side] > t.n ? s->N[t.side] - t.n : 0);
      area[g] += own;
      volume[g] += own * (t.inner_end - t.inner);
    }
  for (int i = 0; i < total; i++) assert_true(taken[i]);
  for (int g = 0; g < groups; g++) {
    const int m = gemm_group_side(s, g), count = w->tiles.count[g];
    const int64_t all = (int64_t)(w->kind == GEMM_TN ? s->M[m] : count) * s->N[m];
    const bool none = w->kind == GEMM_TN && s->adds && count == 0; // nothing is added there
    assert_int_equal(area[g], none ? 0 : all * w->tiles.parts[g]);
    assert_int_equal(volume[g], all * (w->kind == GEMM_TN ? count : s->K[m]));
  }
  free(taken);
  free(area);
  free(volume);
}

// Of two tiles of one part of one place no two overlap, since areas add up; here the corners are told apart.
static void check_distinct(const Walk *w) {
  const int total = gemm_tiles_total(&w->shape, &w->tiles);
  for (int i = 0; i < total && i < 300; i++)
    for (int j = 0; j < i; j++) {
      const GemmTile a = gemm_tile_at(w->kind, &w->shape, &w->tiles, i, DEPTH);
      const GemmTile b = gemm_tile_at(w->kind, &w->shape, &w->tiles, j, DEPTH);
      if (a.side == b.side && a.group == b.group && a.part == b.part) assert_true(a.m != b.m || a.n != b.n);
    }
}

// Of rows, the side of the longer inner dimension comes first; of weight gradients, the groups by what a tile sums.
static void check_order(const Walk *w) {
  int64_t last = INT64_MAX;
  for (int number = 0; number < gemm_tiles_total(&w->shape, &w->tiles); number++) {
    const GemmTile t = gemm_tile_at(w->kind, &w->shape, &w->tiles, number, DEPTH);
    const int g = t.group + (t.side == IMAGE ? w->shape.groups[TEXT] : 0), parts = w->tiles.parts[g];
    const int64_t length = w->kind == GEMM_TN ? gemm_up(w->tiles.count[g], parts) : 6 * w->shape.K[t.side] / parts;
    assert_true(length <= last); // parts are 1, 2 or 3
    last = length;
  }
}

// Parts' sums lie one after the other, and there are no more of them than the plan has room for.
static void check_parts(const Walk *w) {
  const GemmShape *s = &w->shape;
  const int groups = gemm_groups(s);
  int64_t end = 0;
  int cut = 0;
  for (int g = 0; g < groups; g++) {
    const int m = gemm_group_side(s, g), parts = w->tiles.parts[g];
    assert_in_range(parts, 1, w->kind == GEMM_TN ? INT16_MAX : GEMM_MAX_PARTS);
    end += parts > 1 ? parts * gemm_part_size(w->kind, s, m) : 0;
    assert_int_equal(w->tiles.partial[g], end);
    if (w->kind != GEMM_TN || s->parts[m] || parts == 1) continue;
    cut += parts * gemm_weight_tiles(s, m);
    assert_true(w->tiles.count[g] > (parts * GEMM_SHORTEST_PART - 1) * GEMM_SHARE_DEPTH);
  }
  assert_true(cut <= GEMM_SHARE_UNITS);
}

// What adds the parts finds them where the walk has left them.
static void check_parts_alone(const Walk *w) {
  GemmTiles *t = xcalloc(1, sizeof *t);
  const size_t groups = (size_t)gemm_groups(&w->shape);
  memcpy(t->count, w->tiles.count, sizeof t->count);
  gemm_parts_build(w->kind, &w->shape, t);
  assert_memory_equal(t->parts, w->tiles.parts, groups * sizeof *t->parts);
  assert_memory_equal(t->partial, w->tiles.partial, groups * sizeof *t->partial);
  free(t);
}

// A last round has its tiles halved where that shortens it.
static void check_last_round(const Walk *w) {
  const GemmShape *s = &w->shape;
  const int halved = w->tiles.halved, total = gemm_tiles_total(s, &w->tiles), whole = total - 2 * halved;
  bool wide = s->blocks > 0;
  for (int m = 0; m < MODALITIES; m++) wide &= s->groups[m] == 0 || s->bn[m] == 256;
  if (halved) assert_true(wide && whole % BLOCKS == 0 && 2 * halved <= BLOCKS);
  if (!halved && wide && total) assert_true(total % BLOCKS == 0 || total % BLOCKS > BLOCKS / 2);
}

static void check_walk(Walk *w) {
  gemm_tiles_build(w->kind, &w->shape, &w->tiles);
  check_covered(w);
  check_distinct(w);
  check_order(w);
  check_last_round(w);
  check_parts(w);
  check_parts_alone(w);
}

// ---- tests ----

static void test_any_routing(void **state) {
  (void)state;
  static const int groups[][MODALITIES] = {{1, 0}, {0, 1}, {1, 1}, {3, 5}, {16, 8}, {64, 0}, {256, 256}};
  static const int rows[] = {1, 63, 129, 1024, 5000};
  Walk *w = xcalloc(1, sizeof *w);
  for (int kind = GEMM_NT; kind <= GEMM_TN; kind++)
    for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
      for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (int routing = 0; routing < ROUTINGS; routing++) {
          memset(&w->tiles, 0xa5, sizeof w->tiles);
          set_shape(w, kind, groups[g], rows[r]);
          set_counts(w, (Routing)routing);
          check_walk(w);
        }
  free(w);
}

// The side of the longer inner dimension is walked first, each side's groups in their order.
static void test_longest_side_first(void **state) {
  (void)state;
  Walk *w = xcalloc(1, sizeof *w);
  w->kind = GEMM_NT;
  const int counts[] = {200, 129, 64, 0, 300};
  memcpy(w->tiles.count, counts, sizeof counts);
  for (int image_first = 0; image_first < 2; image_first++) {
    const int order[2][5] = {{0, 1, 2, 3, 4}, {2, 3, 4, 0, 1}};
    w->shape = (GemmShape){
        .groups = {2, 3}, .rows = {512, 512}, .N = {128, 128}, .K = {512, 512}, .bn = {128, 128}, .parts = {1, 1}};
    w->shape.K[IMAGE] += image_first;
    gemm_tiles_build(w->kind, &w->shape, &w->tiles);
    assert_int_equal(gemm_tiles_total(&w->shape, &w->tiles), 2 + 2 + 1 + 3);
    for (int i = 0; i < 5; i++) assert_int_equal(w->tiles.group[i], order[image_first][i]);
  }
  free(w);
}

// A gradient that is stored becomes zeros where there are no rows; one that is added to is left alone.
static void test_groups_without_rows(void **state) {
  (void)state;
  Walk *w = xcalloc(1, sizeof *w);
  w->kind = GEMM_TN;
  for (int adds = 0; adds < 2; adds++)
    for (int rows = 0; rows < 2; rows++) {
      w->shape = (GemmShape){.groups = {4, 0}, .rows = {64, 64}, .M = {256}, .N = {256}, .bn = {128}, .adds = adds};
      memset(w->tiles.count, 0, sizeof w->tiles.count);
      w->tiles.count[2] = 40 * rows;
      gemm_tiles_build(w->kind, &w->shape, &w->tiles);
      assert_int_equal(gemm_tiles_total(&w->shape, &w->tiles), adds ? 4 * rows : 16);
      for (int i = 0; i < gemm_tiles_total(&w->shape, &w->tiles); i++) {
        const GemmTile t = gemm_tile_at(w->kind, &w->shape, &w->tiles, i, DEPTH);
        assert_int_equal(t.inner_end - t.inner, t.group == 2 ? 40 * rows : 0);
      }
    }
  free(w);
}

// Parts follow from the counts alone: whether empty groups are stored or left alone makes no other sums.
static void test_parts_do_not_depend_on_adding(void **state) {
  (void)state;
  Walk *w = xcalloc(1, sizeof *w);
  int several = 0;
  for (int seed = 0; seed < 200; seed++) {
    int16_t parts[2][GEMM_MAX_GROUPS];
    for (int adds = 0; adds < 2; adds++) {
      w->state = (uint64_t)seed;
      const int groups[MODALITIES] = {1 + draw(w, 9), draw(w, 9)};
      set_shape(w, GEMM_TN, groups, 6000);
      set_counts(w, ROUTE_DRAWN);
      w->shape.parts[TEXT] = w->shape.parts[IMAGE] = 0;
      w->shape.adds = adds;
      check_walk(w);
      memcpy(parts[adds], w->tiles.parts, sizeof *parts);
    }
    const int n = gemm_groups(&w->shape);
    assert_memory_equal(parts[0], parts[1], (size_t)n * sizeof **parts);
    for (int g = 0; g < n; g++) several += parts[0][g] > 1;
  }
  assert_true(several > 100);
  free(w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_any_routing),
      cmocka_unit_test(test_longest_side_first),
      cmocka_unit_test(test_groups_without_rows),
      cmocka_unit_test(test_parts_do_not_depend_on_adding),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
