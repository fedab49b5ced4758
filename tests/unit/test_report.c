// The progress bar on a terminal: steps done and the time left.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "trainer/report.h"

#include "base/base.h"

#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { REDRAW_US = 120000 }; // a bar is drawn again after a tenth of a second

// A report whose standard error is a terminal of 100 columns.
typedef struct Screen {
  int master, standard_error;
  char folder[32];
  Report *report;
} Screen;

static void screen_open(Screen *s, int64_t from, int64_t steps) {
  struct winsize size = {.ws_row = 25, .ws_col = 100};
  int slave;
  Error err;
  snprintf(s->folder, sizeof s->folder, "/tmp/report.XXXXXX");
  assert_non_null(mkdtemp(s->folder));
  assert_int_equal(openpty(&s->master, &slave, NULL, NULL, &size), 0);
  s->standard_error = dup(STDERR_FILENO);
  dup2(slave, STDERR_FILENO);
  close(slave);
  s->report = report_open(s->folder, from, steps, &err);
  if (!s->report) fail_msg("%s", err.text);
}

static void screen_close(Screen *s) {
  report_close(s->report);
  dup2(s->standard_error, STDERR_FILENO);
  close(s->standard_error);
  close(s->master);
  char *command = xasprintf("rm -r %s", s->folder);
  assert_int_equal(system(command), 0);
  free(command);
}

// A step of `seconds`; returns what is left by the bar that was drawn after it, in seconds, or -1 where there is none.
static int step_left(Screen *s, int64_t step, double seconds, int64_t *done) {
  static const char end[] = " left";
  const StepReport step_report = {.step = step, .loss = 1, .tokens = 100, .seconds = seconds};
  char shown[4096];
  size_t n = 0;
  ssize_t got;
  long long of_step = -1;
  int hours = 0, minutes = -1, left = -1;
  usleep(REDRAW_US);
  report_step(s->report, &step_report);
  do {
    got = read(s->master, shown + n, sizeof shown - 1 - n);
    if (got <= 0) return -1;
    n += (size_t)got;
    shown[n] = 0;
  } while (!strstr(shown, end));
  const char *bar = strrchr(shown, ']');
  if (!bar) return -1;
  int fields = sscanf(bar, "] %lld/%*d %d:%d:%d left", &of_step, &hours, &minutes, &left);
  if (fields == 3) fields = sscanf(bar, "] %lld/%*d %d:%d left", &of_step, &minutes, &left), hours = 0;
  if (fields < 3) return -1;
  *done = of_step;
  return (hours * 60 + minutes) * 60 + left;
}

// What is left is the steps that are left, each as long as the ones before, also of a run that was resumed.
static void test_time_left(void **state) {
  (void)state;
  static const int64_t begins[] = {0, 40};
  for (int i = 0; i < 2; i++) {
    Screen s;
    int64_t begin = begins[i], steps = begin + 60, done[3];
    int left[3], middle, after, slow, last;
    screen_open(&s, begin, steps);
    for (int k = 0; k < 3; k++) left[k] = step_left(&s, begin + k, 2, &done[k]);
    middle = step_left(&s, begin + 29, 2, &done[0]);
    after = step_left(&s, begin + 30, 4, &done[0]);
    for (int k = 31; k < 35; k++) slow = step_left(&s, begin + k, 4, &done[0]);
    last = step_left(&s, steps - 1, 4, &done[0]);
    screen_close(&s); // from here on a failure is seen
    for (int k = 0; k < 3; k++) assert_int_equal(left[k], 2 * (59 - k));
    assert_int_equal(done[1], begin + 2);
    assert_int_equal(done[2], begin + 3);
    assert_int_equal(middle, 60);
    // One slow step among many is no forecast; steps that stay slow are.
    assert_in_range(after, 58, 70);
    assert_in_range(slow, 25 * 2 + 5, 25 * 4);
    assert_int_equal(last, 0);
    assert_int_equal(done[0], steps);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_time_left)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
