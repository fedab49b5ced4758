// The host's side of an update: schedules with their exact ends, EMA decay, and the policy for steps that are skipped.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "model/config/load.h"
#include "model/optimizer.h"

#include <math.h>
#include <string.h>

static Config config_with(const char *const *sets, int n) {
  Config c;
  Error err;
  if (config_load(&c, NULL, sets, n, &err) != 0) fail_msg("%s", err.text);
  return c;
}

static void assert_near(double got, double want) {
  if (!(fabs(got - want) <= 1e-15)) fail_msg("%.17g is not %.17g", got, want);
}

static void test_schedule_ends(void **state) {
  (void)state;
  const char *sets[] = {"train.steps=1000", "train.lr=0.01", "train.warmup_steps=50", "train.decay_fraction=0.3"};
  Config c = config_with(sets, 4);
  assert_near(optimizer_lr(&c, 0), 0.01 / 50);
  assert_near(optimizer_lr(&c, 48), 0.01 * 49 / 50);
  assert_true(optimizer_lr(&c, 49) == 0.01);
  assert_true(optimizer_lr(&c, 700) == 0.01); // the last step at full rate: (N - n) = 0.3 N
  assert_near(optimizer_lr(&c, 701), 0.01 * 299 / 300);
  assert_near(optimizer_lr(&c, 999), 0.01 / 300); // the last step still moves
  assert_true(optimizer_lr(&c, 1000) == 0);
  for (int n = 1; n < 50; n++) assert_true(optimizer_lr(&c, n) > optimizer_lr(&c, n - 1));
  for (int n = 701; n < 1000; n++) assert_true(optimizer_lr(&c, n) < optimizer_lr(&c, n - 1));
}

static void test_constant_rate(void **state) {
  (void)state;
  const char *sets[] = {"train.steps=10", "train.lr=0.5", "train.warmup_steps=0", "train.decay_fraction=0"};
  Config c = config_with(sets, 4);
  for (int n = 0; n < 10; n++) assert_true(optimizer_lr(&c, n) == 0.5);
}

static void test_ema_decay(void **state) {
  (void)state;
  const char *sets[] = {"train.ema=0.99", "train.ema_every=1"};
  Config c = config_with(sets, 2);
  assert_near(optimizer_ema_decay(&c, 0), 0.1);
  assert_near(optimizer_ema_decay(&c, 90), 0.91);
  assert_true(optimizer_ema_decay(&c, 100000) == 0.99);
  for (int n = 0; n < 5; n++) assert_true(optimizer_ema_due(&c, n));
  const char *every[] = {"train.ema=0.99", "train.ema_every=4"};
  c = config_with(every, 2);
  assert_near(optimizer_ema_decay(&c, 100000), pow(0.99, 4));
  int due = 0;
  for (int n = 0; n < 40; n++) due += optimizer_ema_due(&c, n);
  assert_int_equal(due, 10);
  assert_false(optimizer_ema_due(&c, 0));
  assert_true(optimizer_ema_due(&c, 3));
  const char *off[] = {"train.ema=0"};
  c = config_with(off, 1);
  assert_false(optimizer_ema_due(&c, 3));
}

static void test_bias_corrections_count_applied_updates(void **state) {
  (void)state;
  const char *sets[] = {"train.beta1=0.9", "train.beta2=0.95"};
  Config c = config_with(sets, 2);
  OptimizerState s = {.applied = 2, .skipped = 5};
  StepScalars x = optimizer_scalars(&c, &s, 7); // two applied, five skipped: this would be the third
  assert_near(x.bias1, 1 - pow(0.9, 3));
  assert_near(x.bias2, 1 - pow(0.95, 3));
  assert_true(x.lr == optimizer_lr(&c, 7));
}

static void test_skipping_ends(void **state) {
  (void)state;
  const char *sets[] = {"train.max_skipped=3"};
  Config c = config_with(sets, 1);
  OptimizerState s = {0};
  Error err;
  const UpdateStatus good = {.bad = -1}, bad = {.skip = 1, .bad = 4};
  assert_int_equal(optimizer_count(&c, &s, &good, &err), 0);
  assert_int_equal(optimizer_count(&c, &s, &bad, &err), 0);
  assert_int_equal(optimizer_count(&c, &s, &bad, &err), 0);
  assert_int_equal(optimizer_count(&c, &s, &good, &err), 0); // a good step between them begins the count anew
  assert_int_equal(optimizer_count(&c, &s, &bad, &err), 0);
  assert_int_equal(optimizer_count(&c, &s, &bad, &err), 0);
  assert_int_equal(optimizer_count(&c, &s, &bad, &err), -1);
  assert_non_null(strstr(err.text, "3 steps in a row"));
  assert_int_equal(s.applied, 2);
  assert_int_equal(s.skipped, 5);
}

// The median of what was applied, of at most 64 and at least 16; spikes in a row send the run back.
static void test_spikes(void **state) {
  (void)state;
  const char *sets[] = {"train.spike=2", "train.spike_patience=3", "train.max_skipped=2"};
  Config c = config_with(sets, 3);
  OptimizerState s = {0};
  Error err;
  for (int i = 0; i < SPIKE_LEAST; i++) {
    assert_true(optimizer_scalars(&c, &s, i).norm_limit == 0);
    assert_int_equal(optimizer_count(&c, &s, &(UpdateStatus){.norm = i % 2 ? 1 : 3, .bad = -1}, &err), 0);
  }
  assert_true(optimizer_norm_limit(&c, &s) == 4); // between 1 and 3
  const UpdateStatus spike = {.norm = 5, .skip = 1, .bad = -1}, good = {.norm = 7, .bad = -1};
  for (int round = 0; round < 2; round++) {
    assert_int_equal(optimizer_count(&c, &s, &spike, &err), 0);
    assert_int_equal(optimizer_count(&c, &s, &spike, &err), 0); // max_skipped is about steps that are not finite
    if (!round) assert_int_equal(optimizer_count(&c, &s, &good, &err), 0);
  }
  assert_int_equal(optimizer_count(&c, &s, &spike, &err), 1);
  assert_int_equal(s.norms, SPIKE_LEAST + 1); // a spike is not among them
  assert_true(optimizer_norm_limit(&c, &s) == 6);
  for (int i = 0; i < 2 * SPIKE_WINDOW; i++)
    assert_int_equal(optimizer_count(&c, &s, &(UpdateStatus){.norm = i, .bad = -1}, &err), 0);
  assert_int_equal(s.norms, SPIKE_WINDOW);
  assert_true(optimizer_norm_limit(&c, &s) == 2 * (95.0 + 96.0) / 2); // of 64 .. 127
  const char *off[] = {"train.spike=0"};
  c = config_with(off, 1);
  assert_true(optimizer_norm_limit(&c, &s) == 0);
  s.norms = 0;
  optimizer_count(&c, &s, &good, &err);
  assert_int_equal(s.norms, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_schedule_ends), cmocka_unit_test(test_constant_rate),
      cmocka_unit_test(test_ema_decay),     cmocka_unit_test(test_bias_corrections_count_applied_updates),
      cmocka_unit_test(test_skipping_ends), cmocka_unit_test(test_spikes),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
