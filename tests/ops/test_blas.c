// OpenBLAS as this machine has it: which kernels it runs, and that the check of them is passed and short.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/base.h"
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <time.h>

// tests/ops/blas_kinds.sh reads this line.
static void test_kernels_are_named(void **state) {
  (void)state;
  print_message("OpenBLAS kernels: %s\n", blas_kernels());
  assert_true(blas_kernels()[0] != 0);
}

static double processor_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void test_check_is_passed_and_short(void **state) {
  (void)state;
  double least = INFINITY;
  omp_set_num_threads(1); // others would count while they wait
  for (int i = 0; i < 5; i++) {
    Error err;
    double began = processor_ms();
    if (blas_open(&err) != 0) fail_msg("%s", err.text);
    least = fmin(least, processor_ms() - began);
  }
  print_message("the check takes %.2f ms of the processors\n", least);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && defined(__OPTIMIZE__)
  assert_true(least < 10);
#endif
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_kernels_are_named),
      cmocka_unit_test(test_check_is_passed_and_short),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
