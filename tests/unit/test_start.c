// The line that says where a start went.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "trainer/start.h"

#include "base/base.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

// What start_end says.
static void said(StartTimes *s, char text[1024]) {
  FILE *f = tmpfile();
  int standard_error = dup(STDERR_FILENO);
  assert_non_null(f);
  fflush(stderr);
  dup2(fileno(f), STDERR_FILENO);
  start_end(s);
  fflush(stderr);
  dup2(standard_error, STDERR_FILENO);
  close(standard_error);
  rewind(f);
  text[fread(text, 1, 1023, f)] = 0;
  fclose(f);
}

static void test_line(void **state) {
  (void)state;
  char text[1024];
  StartTimes s = {.seconds = {[START_DEVICE] = 0.82, [START_DATA] = 1.25, [START_PLAN] = 0.01, [START_WEIGHTS] = 2.5}};
  said(&s, text);
  assert_string_equal(text,
                      "the first step begins after 4.6 s: opening the device 0.8, indexing data 1.2, weights 2.5\n");
  assert_true(s.ended);
  s = (StartTimes){.seconds = {[START_DATA] = 1.9}}; // nobody waits for that
  said(&s, text);
  assert_string_equal(text, "");
  assert_true(s.ended);
  for (int p = 0; p < START_PARTS; p++) s.seconds[p] = 12345.6; // all of them fit the line
  said(&s, text);
  assert_non_null(strstr(text, "graphs 12345.6\n"));
}

// Marks share the time out without gaps.
static void test_marks(void **state) {
  (void)state;
  StartTimes s;
  double sum = 0;
  start_begin(&s);
  double begin = s.last;
  for (int p = 0; p < START_PARTS; p++) {
    usleep(2000);
    start_mark(&s, (StartPart)p);
    assert_true(s.seconds[p] >= 0.002);
  }
  start_mark(&s, START_DATA); // a part may come twice
  for (int p = 0; p < START_PARTS; p++) sum += s.seconds[p];
  assert_true(sum >= s.last - begin - 1e-6 && sum <= s.last - begin + 1e-6 && s.last <= time_now());
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_line), cmocka_unit_test(test_marks)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
