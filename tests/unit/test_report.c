// The figures of a step: what they are made of, where they are described; and the progress bar on a terminal.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "trainer/output/report.h"

#include "base/base.h"

#include <math.h>
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
  const StepReport step_report = {.step = step, .figure = {[FIGURE_LOSS] = 1, [FIGURE_SECONDS] = seconds}};
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

// The figures of sums whose means are known by hand, and of a step of text alone.
static void test_figures(void **state) {
  (void)state;
  Config c = {.model = {.dim = 1, .layers = 1, .heads = 1, .kv_heads = 1, .head_dim = 1, .vocab = 8, .patch = 2},
              .train = {.ce_weight = 0.5}};
  for (int m = 0; m < MODALITIES; m++) c.model.moe[m] = (ExpertConfig){.experts = 2, .expert_dim = 1, .top_k = 1};
  union {
    Metrics m;
    double all[sizeof(Metrics) / sizeof(double) + 4];
  } metrics = {.m = {.nll = {[TARGET_CAPTION] = 6, [TARGET_TEXT] = 10},
                     .targets = {[TARGET_CAPTION] = 3, [TARGET_TEXT] = 2},
                     .flow = 36,
                     .flow_elems = 24,
                     .balance = .25,
                     .z = .125}};
  const double load[] = {3, 1, 2, 2}; // [L][E_0 + E_1]
  memcpy(metrics.all + sizeof(Metrics) / sizeof(double), load, sizeof load);
  StepSums s = {.tokens = 90, .slots = 100, .flops = 200, .seconds = .5, .peak_flops = 800, .lr = 1e-3};
  double f[FIGURES];
  figures_sum(&c, metrics.all, &s);
  figures_of(&c, &s, f);
  const struct {
    FigureId id;
    double value;
  } expected[] = {{FIGURE_CE_CAPTION, 2},   {FIGURE_CE_TEXT, 5},   {FIGURE_CE, 16. / 5},
                  {FIGURE_FLOW, 1.5},       {FIGURE_ROUTER, .375}, {FIGURE_LOSS, 1.5 + .5 * 16 / 5 + .375},
                  {FIGURE_TARGETS, 5},      {FIGURE_FILL, .9},     {FIGURE_NOISED_TOKENS, 2},
                  {FIGURE_TOKEN_RATE, 180}, {FIGURE_MFU, .5},      {FIGURE_LOAD_MAX, 1.5},
                  {FIGURE_FLOP_RATE, 400},  {FIGURE_LR, 1e-3}};
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
    assert_true(fabs(f[expected[i].id] - expected[i].value) < 1e-12);
  s.m.flow = s.m.flow_elems = s.m.nll[TARGET_CAPTION] = s.m.targets[TARGET_CAPTION] = s.peak_flops = 0;
  figures_of(&c, &s, f);
  assert_true(isnan(f[FIGURE_FLOW]) && isnan(f[FIGURE_CE_CAPTION]) && isnan(f[FIGURE_MFU]));
  assert_true(fabs(f[FIGURE_LOSS] - (.5 * 5 + .375)) < 1e-12);
  char text[512] = "";
  FILE *out = fmemopen(text, sizeof text, "w");
  figures_print(out, f);
  fclose(out);
  assert_non_null(strstr(text, "  flow -  ce_caption -  ce_text 5.000  balance 0.3750  "));
  assert_null(strstr(text, "MFU"));
}

// docs/metrics.md has a row for every key, with its unit, and names every tag.
static void test_described(void **state) {
  (void)state;
  Error err;
  size_t n;
  char *page = file_read("docs/metrics.md", 1 << 20, &n, &err);
  if (!page) fail_msg("%s", err.text);
  for (int i = 0; i < FIGURES; i++) {
    const FigureInfo *info = &figure_info[i];
    char *key = xasprintf("`%s`", info->key ? info->key : ""), *tag = xasprintf("`%s`", info->tag ? info->tag : "");
    char *unit = xasprintf("|%s%s |", info->unit[0] ? " " : "", info->unit);
    int described = !info->key, named = !info->tag;
    for (char *line = page, *end; (end = strchr(line, '\n')); line = end + 1) {
      *end = 0;
      if (!described && line[0] == '|' && strstr(line, key)) described = strstr(line, unit) ? 1 : -1;
      named |= line[0] == '|' && strstr(line, tag) != NULL;
      *end = '\n';
    }
    if (described != 1 || !named) fail_msg("docs/metrics.md: %s or its unit, or %s, is missing", key, tag);
    free(unit);
    free(tag);
    free(key);
  }
  free(page);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_time_left), cmocka_unit_test(test_figures),
                                     cmocka_unit_test(test_described)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
