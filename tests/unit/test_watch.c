// The plan of a run held against its steps, on a backend with queues: when ops are timed, and what lies beside the run.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "tests/ops/model_case.h"
#include "tests/unit/queued_cpu.h"
#include "tests/unit/temp_folder.h"
#include "trainer/costs.h"
#include "trainer/measure.h"
#include "trainer/predict.h"
#include "trainer/slab.h"
#include "trainer/watch.h"

static LinkRates device_link(void) {
  return (LinkRates){.d2h = 2e9, .h2d = 2e9, .both_d2h = 1e9, .both_h2d = 1e9};
}

static int64_t device_in_use(void) {
  return 12345678;
}

// An engine that is about to begin its first step.
typedef struct Ready {
  ModelCase c;
  Backend backend;
  Engine e;
  Watch w;
} Ready;

static const Extents extents = {.text = 3, .image = 4, .segments = 1, .targets = 2, .pairs = 20};

static void ready_open(Ready *r, int profiled) {
  Error err;
  memset(r, 0, sizeof *r);
  model_case_init(&r->c, 50, 0);
  Config *c = &r->c.config;
  c->train.ema = 0.9;
  c->train.ema_every = 2;
  op_case_pack(&r->c.ops, PACK_MIXED);
  r->backend = backend_queued_cpu;
  r->backend.link = device_link;
  r->backend.in_use = device_in_use;
  queued_cpu_start(50, FAULT_NONE);
  Costs costs = costs_open(c, &r->backend, folder);
  assert_true(costs.link.d2h == 2e9); // measured, or as it was
  if (engine_record_with(&r->e, c, &r->backend, 1, costs, NULL, &err) != 0 || engine_allocate(&r->e, &err) != 0)
    fail_msg("%s", err.text);
  int64_t n = r->e.model.params.total;
  SlabWriter *writer = slab_writer_open(&r->e, n, &err);
  slab_writer_put(writer, SPACE_WEIGHTS, 0, n, r->c.bases.of[SPACE_WEIGHTS]);
  slab_writer_close(writer);
  r->w = watch_open(&r->e, folder, 10, profiled);
}

static void ready_close(Ready *r) {
  watch_close(&r->w);
  engine_free(&r->e);
  model_case_free(&r->c);
}

// Ops timed before step `step`, and its update after it as the trainer does both.
static void pack_and_update(Ready *r, int64_t step, int ema, int expect_times) {
  const Program *update = ema ? r->e.update_ema : r->e.update;
  Error err;
  assert_int_equal(watch_pack(&r->w, &r->e, r->c.ops.batch.dims, &extents, step, &err), 0);
  OpTime *times = watch_times(&r->w, &r->e, update, step);
  assert_int_equal(times != NULL, expect_times);
  if (!times) return;
  for (int i = 0; i < update->n_ops; i++) times[i] = (OpTime){i, i + .001};
  watch_update(&r->w, &r->e, update);
  assert_true(fabs(op_seconds(&r->e.costs, update, &update->ops[0]) - .001) < 1e-9);
  assert_true(fabs(r->w.predicted[ema] / predict_step(&r->e, ema) - 1) < 1e-9); // by what the update has taught
}

static void test_as_predicted(void **state) {
  (void)state;
  for (int start = 0; start < 2; start++) { // the second finds what the first has left
    Ready r;
    ready_open(&r, 0);
    assert_int_equal(r.e.costs.n_classes > 0, start);
    assert_true(watch_due(&r.w));
    int64_t captures = queued_cpu_counts().captures;
    pack_and_update(&r, 10, 0, 0); // its first step warms up
    assert_int_equal(queued_cpu_counts().captures > captures, !start);
    assert_false(watch_due(&r.w));
    assert_true(measure_has(&r.e.costs, r.e.first.program));
    assert_true(fabs(r.w.predicted[0] / predict_step(&r.e, 0) - 1) < 1e-9);
    assert_true(start || r.w.predicted[1] > r.w.predicted[0]); // then each op took what pack_and_update says
    watch_step(&r.w, &r.e, 10, 99);                            // so it does not count
    assert_int_equal(r.w.n, 0);
    pack_and_update(&r, 11, 1, !start);
    watch_step(&r.w, &r.e, 11, 1.5 * r.w.predicted[1]); // of the three, the one in the middle does
    pack_and_update(&r, 12, 0, !start);                 // without the EMA AdamW is of another class
    watch_step(&r.w, &r.e, 12, 1.015 * r.w.predicted[0]);
    assert_int_equal(r.w.n, 2);
    watch_step(&r.w, &r.e, 13, .5 * r.w.predicted[1]);
    assert_int_equal(r.w.n, 3);
    assert_false(watch_due(&r.w));
    watch_step(&r.w, &r.e, 14, 99);
    assert_false(watch_due(&r.w));
    ready_close(&r);
  }
}

// More than 2% off: once more, and not again.
static void test_off(void **state) {
  (void)state;
  Ready r;
  Error err;
  ready_open(&r, 1);
  pack_and_update(&r, 10, 0, 0);
  for (int round = 0; round < 2; round++) {
    int64_t first = 11 + 10 * round, launches = queued_cpu_counts().launches;
    for (int i = 0; i < 2; i++) { // the third step is a profile's
      assert_false(watch_due(&r.w));
      watch_step(&r.w, &r.e, first + i, .97 * r.w.predicted[(first + i) % 2]);
    }
    assert_int_equal(watch_due(&r.w), !round);
    assert_int_equal(watch_pack(&r.w, &r.e, r.c.ops.batch.dims, &extents, first + 9, &err), 0);
    assert_int_equal(queued_cpu_counts().launches > launches, !round);
    for (int ema = 0; ema < 2; ema++) pack_and_update(&r, first + 9 + ema, ema, !round); // from its first step on
    for (int ema = 0; ema < 2; ema++) pack_and_update(&r, first + 9 + ema, ema, 0);
  }
  ready_close(&r);
}

// Within 2%, but timed on the weights that a run begins with: once more, and not again.
static void test_first_weights(void **state) {
  (void)state;
  for (int start = 0; start < 2; start++) { // the second finds times of the first, which are no longer those
    Ready r;
    Error err;
    int64_t step = 0;
    ready_open(&r, 0);
    watch_close(&r.w);
    r.w = watch_open(&r.e, folder, step, 0);
    for (int round = 0; round < 3; round++) {
      assert_int_equal(watch_due(&r.w), round == 0 || (round == 1 && !start));
      assert_int_equal(watch_pack(&r.w, &r.e, r.c.ops.batch.dims, &extents, step, &err), 0);
      for (int i = 0; i < 4; i++, step++) watch_step(&r.w, &r.e, step, 1.01 * r.w.predicted[step % 2]);
    }
    ready_close(&r);
  }
}

// What copies beside copies of the other direction carried, without their latency; but not from a few of them, nor
// where all ran in one queue.
static void test_link(void **state) {
  (void)state;
  const struct {
    Lane lane;
    double begin, end;
  } ran[] = {{LANE_D2H, 0, 9}, {LANE_H2D, 0, 4}, {LANE_H2D, 4, 9}, {LANE_H2D, 9, 11}, {LANE_D2H, 10.5, 14}};
  enum { COPIES = sizeof ran / sizeof *ran };
  const LinkRates before = {.d2h = 1, .h2d = 2, .both_d2h = 3, .both_h2d = 4, .latency = 1};
  for (int way = 0; way < 3; way++) {
    Op op[COPIES] = {0};
    OpTime times[COPIES];
    const int64_t bytes = way == 1 ? 1 << 20 : 128 << 20;
    Program p = {.ops = op, .n_ops = COPIES, .one_queue = way == 2};
    Costs costs = {.link = before};
    for (int i = 0; i < COPIES; i++) {
      op[i] = (Op){.kind = OP_COPY, .lane = ran[i].lane, .args = {.span = {.count = bytes}}};
      times[i] = (OpTime){ran[i].begin, ran[i].end};
    }
    measure_note(&p, times, &costs);
    assert_true(costs.link.d2h == before.d2h && costs.link.h2d == before.h2d);
    assert_float_equal(costs.link.both_d2h, way ? before.both_d2h : (double)bytes / 8, 1e-6);
    assert_float_equal(costs.link.both_h2d, way ? before.both_h2d : 2.0 * (double)bytes / 7, 1e-6);
  }
}

static void test_idle(void **state) {
  (void)state;
  Ready r;
  ready_open(&r, 0);
  Engine *e = &r.e;
  const Queues *queues = e->backend.queues;
  e->backend.queues = NULL; // where an op is done when its function returns
  Watch w = watch_open(e, folder, 0, 0);
  assert_false(watch_due(&w));
  assert_null(watch_times(&w, e, e->update, 1));
  for (int i = 0; i < 5; i++) watch_step(&w, e, i, 99);
  assert_int_equal(w.n, 0);
  watch_close(&w);
  e->backend.queues = queues;
  ready_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test_setup(test_as_predicted, empty_folder),
                                     cmocka_unit_test_setup(test_off, empty_folder),
                                     cmocka_unit_test_setup(test_first_weights, empty_folder),
                                     cmocka_unit_test_setup(test_idle, empty_folder), cmocka_unit_test(test_link)};
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
