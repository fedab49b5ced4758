// Whatever the memory plan, wherever its copies are scheduled and however late they come, gradients have the bits of
// everything kept; and where an order is missing, they have not.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "model/program/policy.h"
#include "model/program/seconds.h"
#include "tests/ops/model_case.h"
#include "tests/unit/queued_cpu.h"
#include "tests/unit/sketch.h"

enum { VARIANTS = 5, PLANS = 50 };

// Rates by which a copy takes from next to nothing to longer than all ops, so that reloads begin anywhere.
static Costs some_costs(const ModelCase *c, Rng *r) {
  double link = pow(10, 6 + rng_below(r, 6));
  return (Costs){.rates = {.bytes = 1e10, .flops = 1e11},
                 .link = {.d2h = link, .h2d = link, .both_d2h = link / 2, .both_h2d = link / 2, .latency = 1e-6},
                 .extents = {.text = c->ops.dims.T / 2., .image = c->ops.dims.T / 2., .segments = 3, .pairs = 500}};
}

static PolicyTable some_plan(const ModelCase *c, Rng *r) {
  PolicyTable t = policy_table_new(c->config.model.layers, MEMORY_KEEP);
  for (int i = 0; i < t.layers * SAVED_COUNT; i++) {
    Policy policy = (Policy)rng_below(r, POLICY_COUNT);
    if (policy_allowed((Saved)(i % SAVED_COUNT), policy)) t.of[i] = (uint8_t)policy;
  }
  t.slack = rng_below(r, 3) * .3;
  return t;
}

static uint64_t gradients(const ModelCase *c) {
  return hash_bytes(1, model_case_slab(c, SPACE_GRADS), c->model.params.total * (int64_t)sizeof(real));
}

// The gradients of everything kept, in recorded order.
static uint64_t wanted(ModelCase *c) {
  ModelProgram m = model_case_record(c, MODE_TRAIN_ONLY, NULL, 0);
  model_case_reset(c);
  program_replay(m.program, NULL);
  uint64_t h = gradients(c);
  program_free(m.program);
  return h;
}

static int copies(const Program *p) {
  int n = 0;
  for (int i = 0; i < p->n_ops; i++) n += p->ops[i].lane != LANE_COMPUTE;
  return n;
}

// On the CPU in random orders that the waits allow, every range NaN before it is written and after its last use.
static void test_random_orders(void **state) {
  (void)state;
  Rng r = {11};
  int copied = 0;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 70 + (uint64_t)v, v);
    uint64_t want = wanted(&c);
    for (int i = 0; i < PLANS / VARIANTS; i++) {
      Costs costs = some_costs(&c, &r);
      PolicyTable plan = some_plan(&c, &r);
      plan.costs = i % 4 ? &costs : NULL;
      ModelProgram m = model_case_record(&c, MODE_TRAIN_ONLY, &plan, 0);
      copied += copies(m.program);
      for (uint64_t order = 1; order <= 3; order++) {
        model_case_reset(&c);
        program_replay_random(m.program, order + 10 * (uint64_t)i);
        if (gradients(&c) != want) fail_msg("variant %d, plan %d, order %d: other gradients", v, i, (int)order);
      }
      program_free(m.program);
      policy_table_free(&plan);
    }
    model_case_free(&c);
  }
  assert_true(copied > 10 * PLANS);
}

// ---- behind queues ----

// One replay behind queues; `held_back`: a lane that runs only where nothing else can, or LANE_COUNT. Returns the
// gradients; *forced: how often it had to.
static uint64_t replay_queued(ModelCase *c, const PolicyTable *plan, uint64_t seed, QueuedFault fault, int graph,
                              Lane held_back, int64_t *forced) {
  c->model.backend = &backend_queued_cpu;
  queued_cpu_start(seed, fault);
  ModelProgram m = model_case_record(c, MODE_TRAIN_ONLY, plan, 0);
  m.program->use_graph = graph;
  model_case_reset(c);
  queued_cpu_hold_back(held_back);
  program_replay(m.program, NULL);
  queued_cpu_drain();
  *forced = queued_cpu_hold_back(LANE_COUNT);
  uint64_t h = gradients(c);
  program_free(m.program);
  c->model.backend = &backend_cpu;
  return h;
}

// Lanes that run against each other with random delays, and each copy lane as late as it may be: then the backward pass
// gets to what was offloaded before it has left, and has to wait.
static void test_queues(void **state) {
  (void)state;
  Rng r = {12};
  static const Lane late[] = {LANE_COUNT, LANE_D2H, LANE_H2D, LANE_COMPUTE};
  int64_t forced[LANE_COUNT + 1] = {0}, n;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 80 + (uint64_t)v, v);
    uint64_t want = wanted(&c);
    for (int i = 0; i < PLANS / VARIANTS; i++) {
      Costs costs = some_costs(&c, &r);
      PolicyTable plan = some_plan(&c, &r);
      plan.costs = i % 4 ? &costs : NULL;
      for (int k = 0; k < 4; k++) {
        uint64_t got = replay_queued(&c, &plan, (uint64_t)(100 * v + i), FAULT_NONE, (i + k) % 2, late[k], &n);
        forced[late[k]] += n;
        if (got != want) fail_msg("variant %d, plan %d, lane %d held back: other gradients", v, i, (int)late[k]);
      }
      policy_table_free(&plan);
    }
    model_case_free(&c);
  }
  assert_true(forced[LANE_D2H] > PLANS && forced[LANE_H2D] > PLANS); // others did wait for them
}

// The same where lanes do not wait: the gradients are others.
static void test_missing_waits_show(void **state) {
  (void)state;
  static const Lane late[] = {LANE_D2H, LANE_H2D};
  int64_t n;
  ModelCase c;
  model_case_init(&c, 90, 1);
  uint64_t want = wanted(&c);
  PolicyTable plan = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
  for (int k = 0; k < 2; k++) {
    assert_true(replay_queued(&c, &plan, 1, FAULT_NONE, 0, late[k], &n) == want);
    assert_true(replay_queued(&c, &plan, 1, FAULT_WAIT, 0, late[k], &n) != want);
  }
  policy_table_free(&plan);
  model_case_free(&c);
}

// A range that is used again before its copy to the host has read it, and a reload that its reader does not wait for:
// each by itself, in a plan that is right otherwise.
static void test_planted_faults_show(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 91, 1);
  uint64_t want = wanted(&c);
  PolicyTable plan = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
  int shown[LANE_COUNT] = {0}, planted[LANE_COUNT] = {0};
  c.model.backend = &backend_queued_cpu;
  queued_cpu_start(1, FAULT_NONE);
  ModelProgram m = model_case_record(&c, MODE_TRAIN_ONLY, &plan, 0);
  Program *p = m.program;
  for (int i = 0; i < p->n_ops; i++) {
    for (int w = 0; p->ops[i].lane == LANE_COMPUTE && w < p->ops[i].n_waits; w++) {
      Op whole = p->ops[i];
      Lane lane = p->ops[whole.waits[w].op].lane;
      p->ops[i].waits[w] = p->ops[i].waits[--p->ops[i].n_waits];
      model_case_reset(&c);
      queued_cpu_hold_back(lane);
      program_replay(p, NULL);
      queued_cpu_drain();
      planted[lane]++;
      shown[lane] += gradients(&c) != want;
      p->ops[i] = whole;
    }
  }
  queued_cpu_hold_back(LANE_COUNT);
  print_message("waits of compute ops left out: for reloads %d of %d show, for drains %d of %d\n", shown[LANE_H2D],
                planted[LANE_H2D], shown[LANE_D2H], planted[LANE_D2H]);
  assert_true(planted[LANE_H2D] > 5 && shown[LANE_H2D] == planted[LANE_H2D]);
  assert_true(planted[LANE_D2H] > 0 && shown[LANE_D2H] == planted[LANE_D2H]);
  program_free(p);
  policy_table_free(&plan);
  model_case_free(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_random_orders),
      cmocka_unit_test(test_queues),
      cmocka_unit_test(test_missing_waits_show),
      cmocka_unit_test(test_planted_faults_show),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
