// Flow times: what is drawn has the distribution that the quantiles describe, whatever the share of uniform ones.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/flow_time.h"

#include <math.h>

enum { DRAWS = 40000 };

static const FlowTimes cases[] = {
    {-0.8, 0.8, 0}, {-0.8, 0.8, 0.1}, {-0.8, 0.8, 1}, {0, 1.5, 0.5}, {2, 0.3, 0.02}, {-0.5, 0, 0.25},
};
enum { CASES = sizeof cases / sizeof *cases };

// The share of the draws below the quantile of p is p, within 4 of its deviations.
static void test_draws_have_the_quantiles(void **state) {
  (void)state;
  for (int k = 0; k < CASES; k++) {
    const double p[] = {0.001, 0.05, 0.3, 0.5, 0.9, 0.99, 0.999};
    for (int i = 0; i < 7; i++) {
      double t = flow_time_quantile(&cases[k], p[i]);
      assert_true(t > 0 && t < 1);
      if (cases[k].std == 0 && p[i] > 0.05 && p[i] < 0.9) continue; // inside its one jump, tested below
      int below = 0;
      for (uint64_t draw = 0; draw < DRAWS; draw++) below += flow_time_draw(&cases[k], 3, draw, k) < t;
      assert_float_equal((double)below / DRAWS, p[i], 4 * sqrt(p[i] * (1 - p[i]) / DRAWS) + 1e-9);
    }
  }
  double constant = 1 / (1 + exp(0.5)); // three in four of the last case, .5 normals and all at one time
  assert_float_equal(flow_time_quantile(&cases[CASES - 1], 0.5), constant, 1e-12);
  // Known ones: the normal's median and its .8413447 quantile, and the uniform's.
  assert_float_equal(flow_time_quantile(&cases[0], 0.5), 1 / (1 + exp(0.8)), 1e-12);
  assert_float_equal(flow_time_quantile(&cases[0], 0.84134474606854), 0.5, 1e-12);
  assert_float_equal(flow_time_quantile(&cases[2], 0.37), 0.37, 1e-12);
}

// Without uniform ones the draws are the normals of the document's stream, and a share of uniform ones changes no
// other; each of a document's images has its own.
static void test_draws_by_document(void **state) {
  (void)state;
  int uniform = 0;
  for (uint64_t i = 0; i < DRAWS; i++) {
    uint64_t draw = i << 30 | 7;
    float normal[4], plain = flow_time_draw(&cases[0], 9, draw, 2), mixed = flow_time_draw(&cases[1], 9, draw, 2);
    philox_normal4(9, draw, STREAM_TIME | 2 << 8, 0, normal);
    assert_float_equal(plain, 1 / (1 + exp(0.8 - 0.8 * (double)normal[0])), 1e-6);
    assert_true(plain != flow_time_draw(&cases[0], 9, draw, 1) && plain != flow_time_draw(&cases[0], 8, draw, 2));
    assert_true(mixed > 0 && mixed < 1);
    uniform += mixed != plain;
  }
  assert_in_range(uniform, (int)(0.1 * DRAWS) - 240, (int)(0.1 * DRAWS) + 240); // 4 deviations
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_draws_have_the_quantiles),
      cmocka_unit_test(test_draws_by_document),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
