// Quotients by a product and a shift are those of a division, up to the largest number there is.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/divide.h"

static void check(uint32_t by) {
  const Divisor d = divisor_of(by);
  const int64_t most = INT32_MAX / by;
  // Around each of the first and the last multiples, where a quotient that is off shows first.
  for (int64_t k = 0; k <= most; k = k < 999 || k >= most - 999 ? k + 1 : most - 999)
    for (int64_t i = k * by - 1; i <= k * by + 1; i++)
      if (i >= 0 && i <= INT32_MAX && divide((int)i, &d) != i / by)
        fail_msg("%lld / %u: %d", (long long)i, by, divide((int)i, &d));
  assert_int_equal(divide(INT32_MAX, &d), INT32_MAX / by);
}

static void test_quotients(void **state) {
  (void)state;
  for (uint32_t by = 1; by < 3000; by++) check(by);
  for (int bit = 1; bit < 31; bit++)
    for (int off = -1; off <= 1; off++) check((1u << bit) + (uint32_t)off);
  check(INT32_MAX);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_quotients)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
