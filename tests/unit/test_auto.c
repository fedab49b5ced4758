// The engine under memory.policy auto: a plan is chosen within its budget, made again when costs change, kept in a file
// and taken from it, and gradients have the same bits all along.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/program/policy.h"
#include "tests/ops/model_case.h"
#include "tests/unit/queued_cpu.h"
#include "tests/unit/sketch.h"
#include "tests/unit/temp_folder.h"
#include "trainer/engine.h"
#include "trainer/slab.h"

typedef struct World {
  ModelCase c;
  Backend backend;
  Engine e;
} World;

static int64_t allocated; // bytes of the device

static void *counted_alloc(size_t bytes) {
  allocated += (int64_t)bytes;
  return backend_queued_cpu.alloc(bytes);
}

static void world_open(World *w, uint64_t seed, int variant) {
  memset(w, 0, sizeof *w);
  model_case_init(&w->c, seed, variant);
  w->c.config.train.ema = 0;
  w->c.config.memory.host_gb = 1;
  w->c.config.memory.state = STATE_DEVICE; // what it makes room for is tests/unit/test_places.c's
  w->backend = backend_queued_cpu;
  w->backend.alloc = counted_alloc;
  // A GPU's, a thousandth of it, and a launch that is short beside.
  w->backend.assumed = (DeviceRates){4e7, 4e9, 0};
  w->backend.assumed_link = (LinkRates){5e7, 5e7, 5e7, 5e7, 0};
  queued_cpu_start(seed, FAULT_NONE);
}

static void record(World *w, MemoryPolicy policy, int64_t budget, const PolicyTable *given) {
  Config *c = &w->c.config;
  Error err;
  c->memory.policy = policy;
  c->memory.budget_gb = (double)budget / 1e9;
  Extents x = {.text = w->c.ops.dims.T / 2., .image = w->c.ops.dims.T / 2., .segments = 3, .targets = 20, .pairs = 900};
  if (engine_record_with(&w->e, c, &w->backend, 1, costs_new(&w->backend, &x), given, &err) != 0)
    fail_msg("%s", err.text);
}

static int64_t bytes_under(World *w, MemoryPolicy policy) {
  record(w, policy, (int64_t)1 << 40, NULL);
  int64_t bytes = engine_device_bytes(&w->e);
  engine_free(&w->e);
  return bytes;
}

// Allocates what is said to be needed, to the byte.
static void allocate(World *w) {
  Error err;
  allocated = 0;
  if (engine_allocate(&w->e, &err) != 0) fail_msg("%s", err.text);
  assert_int_equal(allocated, engine_device_bytes(&w->e));
  int64_t n = w->e.model.params.total;
  SlabWriter *writer = slab_writer_open(&w->e, n, &err);
  slab_writer_put(writer, SPACE_WEIGHTS, 0, n, w->c.bases.of[SPACE_WEIGHTS]);
  slab_writer_close(writer);
}

static uint64_t gradients(World *w) {
  engine_run(&w->e, &w->e.first, w->c.ops.batch.dims, NULL);
  queued_cpu_drain();
  const ParamTable *t = &w->e.model.params;
  const real *slab = engine_slab(&w->e, SPACE_GRADS);
  uint64_t h = 1; // between parameters there may be anything
  for (int i = 0; i < t->n; i++) h = hash_bytes(h, slab + t->of[i].offset, t->of[i].count * (int64_t)sizeof(real));
  return h;
}

static void check_plans(int shares_gradients) {
  World w;
  Error err;
  world_open(&w, 50, !shares_gradients); // where gradients share the arena, a model with larger activations
  w.c.config.memory.share_gradients = shares_gradients;
  int64_t keep = bytes_under(&w, MEMORY_KEEP), recompute = bytes_under(&w, MEMORY_RECOMPUTE);
  int64_t between = (keep + recompute) / 2;
  assert_true(recompute < keep);
  record(&w, MEMORY_KEEP, keep, NULL);
  allocate(&w);
  uint64_t want = gradients(&w);
  assert_int_equal(engine_plan_again(&w.e, &err), 0); // nothing was chosen
  engine_free(&w.e);

  record(&w, MEMORY_AUTO, keep, NULL);
  assert_int_equal(w.e.chosen, MEMORY_KEEP);
  engine_free(&w.e);

  record(&w, MEMORY_AUTO, between, NULL);
  assert_int_equal(w.e.chosen, MEMORY_AUTO);
  assert_true(engine_device_bytes(&w.e) <= between && w.e.plan.tried > 1 && !w.e.plan.was_given);
  assert_int_equal(engine_check_budget(&w.e, &err), 0);
  allocate(&w);
  assert_true(gradients(&w) == want);
  assert_int_equal(engine_plan_again(&w.e, &err), 0); // by the same costs it is the same

  // Copies that cost nothing, then ops that cost nothing beside them.
  int changed = 0;
  for (int round = 0; round < 4; round++) {
    double link = round % 2 ? 1e2 : 1e12;
    w.e.costs.link = (LinkRates){link, link, link, link, 0};
    int again = engine_plan_again(&w.e, &err);
    assert_true(again >= 0);
    changed += again;
    assert_true(engine_device_bytes(&w.e) <= between);
    assert_true(gradients(&w) == want);
    int copied = 0;
    for (int i = 0; i < w.e.policy.layers * SAVED_COUNT; i++) copied += w.e.policy.of[i] == POLICY_OFFLOAD;
    if (round % 2) assert_int_equal(copied, 0);
    if (!(round % 2)) assert_true(copied > 0);
  }
  assert_true(changed >= 2);
  engine_free(&w.e);
  model_case_free(&w.c);
}

static void test_plans(void **state) {
  (void)state;
  for (int shares = 0; shares < 2; shares++) check_plans(shares);
}

static void test_plan_file(void **state) {
  (void)state;
  World w;
  Error err;
  char *path = xasprintf("%s/" PLAN_FILE, folder);
  PolicyTable t;
  assert_int_equal(policy_file_load(&t, 2, path), 0); // there is none
  world_open(&w, 51, 1);
  int64_t between = (bytes_under(&w, MEMORY_KEEP) + bytes_under(&w, MEMORY_RECOMPUTE)) / 2;
  record(&w, MEMORY_AUTO, between, NULL);
  assert_int_equal(policy_file_save(&w.e.policy, path, &err), 0);
  PolicyTable chosen = policy_table_copy(&w.e.policy);
  engine_free(&w.e);
  assert_int_equal(policy_file_load(&t, chosen.layers + 1, path), 0); // another model's
  assert_int_equal(policy_file_load(&t, chosen.layers, path), 1);
  size_t n = (size_t)chosen.layers * SAVED_COUNT;
  assert_memory_equal(t.of, chosen.of, n);
  assert_true(t.slack == chosen.slack);
  record(&w, MEMORY_AUTO, between, &t);
  assert_true(w.e.plan.was_given && w.e.plan.tried == 0);
  assert_memory_equal(w.e.policy.of, chosen.of, n);
  engine_free(&w.e);
  // One that has not what is pinned now gives way to another, and so does one that does not fit any more.
  TensorPolicy *pin = &w.c.config.memory.per_tensor[0];
  int qkv = t.of[SAVED_QKV];
  snprintf(pin->name, sizeof pin->name, "qkv");
  snprintf(pin->policy, sizeof pin->policy, "%s", policy_name[(qkv + 1) % POLICY_COUNT]);
  w.c.config.memory.per_tensors = 1;
  record(&w, MEMORY_AUTO, between, &t);
  assert_false(w.e.plan.was_given);
  for (int l = 0; l < w.e.policy.layers; l++)
    assert_int_equal(w.e.policy.of[l * SAVED_COUNT + SAVED_QKV], (qkv + 1) % POLICY_COUNT);
  engine_free(&w.e);
  w.c.config.memory.per_tensors = 0;
  memset(t.of, POLICY_KEEP, n);
  record(&w, MEMORY_AUTO, between, &t);
  assert_true(!w.e.plan.was_given && w.e.plan.tried > 0 && engine_device_bytes(&w.e) <= between);
  engine_free(&w.e);
  policy_table_free(&t);
  policy_table_free(&chosen);
  static const char *const damaged[] = {"", "{", "[]", "{\"tensors\": [\"x\"]}",
                                        "{\"tensors\": 3, \"layers\": [], \"slack\": 0}"};
  for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
    FILE *f = fopen(path, "w");
    fputs(damaged[i], f);
    fclose(f);
    assert_int_equal(policy_file_load(&t, 2, path), 0);
  }
  unlink(path);
  free(path);
  model_case_free(&w.c);
}

// What is short of memory says what would do: that much is enough.
static void test_ways_out(void **state) {
  (void)state;
  World w;
  Error err;
  world_open(&w, 52, 1);
  int64_t recompute = bytes_under(&w, MEMORY_RECOMPUTE);
  record(&w, MEMORY_AUTO, recompute - recompute / 50, NULL);
  if (engine_check_budget(&w.e, &err) != 0) {
    double enough = 0;
    const char *at = strstr(err.hint, "memory.budget_gb=");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "memory.budget_gb=%lf", &enough), 1);
    assert_true(enough * 1e9 >= (double)engine_device_bytes(&w.e));
    engine_free(&w.e);
    record(&w, MEMORY_AUTO, (int64_t)(enough * 1e9), NULL);
    assert_int_equal(engine_check_budget(&w.e, &err), 0);
  }
  engine_free(&w.e);
  record(&w, MEMORY_AUTO, 1000, NULL);
  assert_int_equal(engine_check_budget(&w.e, &err), -1);
  assert_non_null(strstr(err.hint, "no --tokens is"));
  assert_null(strstr(err.hint, "memory.host_gb"));
  // As where the state takes all of the machine: nothing is left for activations, so none is there.
  w.c.config.memory.host_gb = w.e.host_left = w.e.bytes[SPACE_HOST] = 0;
  assert_int_equal(engine_check_budget(&w.e, &err), -1);
  assert_non_null(strstr(err.hint, "more of memory.host_gb than 0.000 may help"));
  engine_free(&w.e);
  model_case_free(&w.c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_plans), cmocka_unit_test_setup(test_plan_file, empty_folder),
                                     cmocka_unit_test(test_ways_out)};
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
