// The table of spaces: complete, and what holds of spaces together.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "model/program/spaces.h"

static void test_rows(void **state) {
  (void)state;
  for (int s = 0; s < SPACE_COUNT; s++) {
    const SpaceInfo *space = &space_info[s];
    if (!space->label) fail_msg("space %d has no row", s);
    for (int k = 0; k < s; k++)
      if (strcmp(space->label, space_info[k].label) == 0) fail_msg("two spaces are \"%s\"", space->label);
    // What a checkpoint holds is of parameters, and nothing saved is laid out anew by every program.
    if (space_has((Space)s, SPACE_SAVED) && (space->element == SPACE_BYTES || space_has((Space)s, SPACE_LAID_OUT)))
      fail_msg("%s cannot be saved", space->label);
  }
}

static void test_elements(void **state) {
  (void)state;
  const Backend half = {.dtype_bytes = {[DT_ACT] = 2, [DT_REAL] = 4, [DT_MOMENT] = 4}, .remainder_bytes = 2};
  size_t saved = 0;
  for (int s = 0; s < SPACE_COUNT; s++)
    if (space_has((Space)s, SPACE_SAVED)) saved += space_element(&half, (Space)s);
  assert_int_equal(saved, 16); // weight, remainder, two moments, EMA
  assert_int_equal(space_element(&half, SPACE_WEIGHTS), 2);
  assert_int_equal(space_element(&half, SPACE_METRICS), 0);
  assert_int_equal(space_element(&backend_cpu, SPACE_REMAINDER), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_rows), cmocka_unit_test(test_elements)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
