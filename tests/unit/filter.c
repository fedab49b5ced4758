// TESSERA_TEST=PATTERN runs only the tests of a program whose names match (* and ?), as tests/scripts/mutants.py does.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>

__attribute__((constructor)) static void filter_tests(void) {
  const char *pattern = getenv("TESSERA_TEST");
  if (pattern) cmocka_set_test_filter(pattern);
}
