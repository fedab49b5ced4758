// The program machinery: proofs on random programs, the rules of recording and scheduling on small ones.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "model/program/compile.h"
#include "model/program/planner.h"
#include "model/program/policy.h"
#include "model/program/simulate.h"
#include "model/program/replay.h"
#include "model/program/schedule.h"
#include "model/program/waits.h"
#include "tests/unit/count_malloc.h"
#include "tests/unit/order_check.h"
#include "tests/unit/sketch.h"

// ---- proofs ----

// Where a tensor is really first written and last touched.
static void tensor_uses(const Program *p, TensorId t, int *first, int *last) {
  *first = *last = -1;
  for (int i = 0; i < p->n_ops; i++) {
    int uses = 0;
    for (int k = 0; k < OP_MAX_IN; k++) uses |= p->ops[i].in[k] == t;
    for (int k = 0; k < OP_MAX_OUT; k++) uses |= p->ops[i].out[k] == t;
    if (!uses) continue;
    if (*first < 0) *first = i;
    *last = i;
  }
}

static int is_disjoint(const Tensor *x, const Tensor *y) {
  return x->offset + x->bytes <= y->offset || y->offset + y->bytes <= x->offset;
}

// A gradient's bytes are its own from its first op on, from the beginning where that adds to them. Returns their end.
static int64_t check_shared_gradients(const Program *p, const Tensor *x, int first) {
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (p->ops[first].acc >> k & 1 && &p->tensors[p->ops[first].out[k]] == x) first = 0;
  for (TensorId u = 0; u < p->n_tensors; u++) {
    const Tensor *y = &p->tensors[u];
    if (y->space == SPACE_ARENA && y->first >= 0 && y->last >= first) assert_true(is_disjoint(x, y));
  }
  return x->offset + x->bytes;
}

static void check_layout(const Program *p) {
  int64_t top[SPACE_COUNT] = {0};
  for (TensorId t = 0; p->shares_gradients && t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    int first, last;
    tensor_uses(p, t, &first, &last);
    if (x->space == SPACE_GRADS && first >= 0)
      top[SPACE_ARENA] = max_i64(top[SPACE_ARENA], (check_shared_gradients(p, x, first) + 255) / 256 * 256);
  }
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA && x->space != SPACE_HOST) continue;
    int first, last;
    tensor_uses(p, t, &first, &last);
    assert_int_equal(x->first, first);
    assert_true(x->last >= last);
    if (x->is_output) assert_int_equal(x->last, p->n_ops);
    if (first < 0) continue;
    top[x->space] = max_i64(top[x->space], x->offset + (x->bytes + 255) / 256 * 256);
    for (TensorId u = 0; u < t; u++) {
      const Tensor *y = &p->tensors[u];
      if (y->space != x->space || y->first < 0 || y->first > x->last || x->first > y->last) continue;
      assert_true(is_disjoint(x, y));
    }
  }
  assert_int_equal(top[SPACE_ARENA], p->arena_bytes);
  assert_int_equal(top[SPACE_HOST], p->host_bytes);
  assert_true(p->live_bytes <= p->arena_bytes);
}

static void test_waits_order_everything(void **state) {
  (void)state;
  Error err;
  int waits = 0;
  double ratio = 0;
  for (uint64_t seed = 0; seed < 300; seed++) {
    PolicyTable policy = random_policy(seed * 7 + 1);
    Sketch k = sketch_new(seed, &policy);
    if (order_check(k.p, &err) != 0) fail_msg("seed %d: %s", (int)seed, err.text);
    check_layout(k.p);
    for (int i = 0; i < k.p->n_ops; i++) waits += k.p->ops[i].n_waits;
    double r = (double)k.p->arena_bytes / (double)k.p->live_bytes;
    if (r > ratio) ratio = r;
    sketch_free(&k);
    policy_table_free(&policy);
  }
  print_message("%d waits verified in 300 programs; arena at most %.3f x the live bound\n", waits, ratio);
  assert_true(waits > 1000);
}

static void test_random_orders_give_the_same_bits(void **state) {
  (void)state;
  for (uint64_t seed = 0; seed < 12; seed++) {
    PolicyTable policy = random_policy(seed + 1000);
    Sketch k = sketch_new(seed, &policy);
    Memory m = memory_new(k.p, 0);
    program_bind(k.p, &m.bases);
    uint64_t expected = program_result(k.p, &m, 0);
    for (uint64_t order = 1; order <= 50; order++) assert_true(program_result(k.p, &m, order) == expected);
    memory_free(&m);
    sketch_free(&k);
    policy_table_free(&policy);
  }
}

static void test_policies_give_the_same_bits(void **state) {
  (void)state;
  int moved = 0;
  for (uint64_t seed = 100; seed < 105; seed++) {
    Sketch keep = sketch_new(seed, NULL);
    uint64_t expected = sketch_result(&keep, 0, 0);
    for (uint64_t i = 0; i < 200; i++) {
      PolicyTable policy = random_policy(seed * 1000 + i);
      Sketch k = sketch_new(seed, &policy);
      assert_true(sketch_result(&k, 0, i % 4 ? 0 : i + 1) == expected);
      moved += k.p->n_ops != keep.p->n_ops;
      sketch_free(&k);
      policy_table_free(&policy);
    }
    sketch_free(&keep);
  }
  assert_true(moved > 900); // the policies did change the programs
}

// Wherever the clock puts reloads, and however long it lets ranges live: the order holds, and the bits are the same.
static void test_clocks_give_the_same_bits(void **state) {
  (void)state;
  Error err;
  int unlike = 0;
  for (uint64_t seed = 300; seed < 306; seed++) {
    Sketch keep = sketch_new(seed, NULL);
    uint64_t expected = sketch_result(&keep, 0, 0);
    for (uint64_t i = 0; i < 50; i++) {
      PolicyTable policy = random_policy(seed * 1000 + i);
      Sketch plain = sketch_new(seed, &policy);
      Costs costs = random_costs(i);
      policy.costs = &costs;
      policy.slack = .1 * (double)(i % 4);
      Sketch k = sketch_new(seed, &policy);
      if (order_check(k.p, &err) != 0) fail_msg("seed %d, %d: %s", (int)seed, (int)i, err.text);
      check_layout(k.p);
      assert_true(sketch_result(&k, 0, i % 4 ? i + 1 : 0) == expected);
      for (int o = 0, other = 0; o < k.p->n_ops && !other; o++)
        unlike += other = k.p->ops[o].lane != plain.p->ops[o].lane;
      sketch_free(&plain);
      sketch_free(&k);
      policy_table_free(&policy);
    }
    sketch_free(&keep);
  }
  assert_true(unlike > 50); // reloads did begin elsewhere than a layer ahead
}

static void test_separate_allocations_give_the_same_bits(void **state) {
  (void)state;
  for (uint64_t seed = 200; seed < 230; seed++) {
    PolicyTable policy = random_policy(seed);
    Sketch k = sketch_sharing(seed, &policy, 0);
    uint64_t expected = sketch_result(&k, 0, 0);
    assert_true(sketch_result(&k, 1, 0) == expected);
    assert_true(sketch_result(&k, 1, seed) == expected);
    assert_true(sketch_result(&k, 0, 0) == expected); // bound again, back to the arena
    sketch_free(&k);
    policy_table_free(&policy);
  }
}

// Whether an activation lies where gradients come to lie.
static int uses_gradients_room(const Program *p) {
  for (TensorId g = 0; g < p->n_tensors; g++)
    for (TensorId t = 0; p->tensors[g].space == SPACE_GRADS && t < p->n_tensors; t++)
      if (p->tensors[t].space == SPACE_ARENA && p->tensors[t].first >= 0 &&
          !is_disjoint(&p->tensors[t], &p->tensors[g]))
        return 1;
  return 0;
}

// Where gradients share the arena there are the same bits and never more memory than with a slab of their own; what
// adds to gradients of before finds them.
static void test_shared_gradients(void **state) {
  (void)state;
  int used = 0, added = 0;
  for (uint64_t seed = 400; seed < 460; seed++) {
    PolicyTable policy = random_policy(seed);
    Sketch apart = sketch_sharing(seed, &policy, 0), shared = sketch_sharing(seed, &policy, 1);
    Program *p = shared.p;
    Memory m = memory_new(p, 0);
    program_bind(p, &m.bases);
    uint64_t expected = sketch_result(&apart, 0, 0);
    for (uint64_t order = 0; order < 6; order++) assert_true(program_result(p, &m, order) == expected);
    assert_true(p->arena_bytes <= apart.p->arena_bytes + (shared.grads + 255) / 256 * 256);
    used += uses_gradients_room(p);
    added += shared.accumulate;
    if (shared.accumulate) assert_false(uses_gradients_room(p));
    memory_free(&m);
    sketch_free(&apart);
    sketch_free(&shared);
    policy_table_free(&policy);
  }
  print_message("activations lay where gradients were to come in %d of 60 programs, %d of which add to them\n", used,
                added);
  assert_true(used > 15 && added > 15);
}

static void test_missing_wait_is_caught(void **state) {
  (void)state;
  Error err;
  int planted = 0;
  for (uint64_t seed = 0; seed < 40; seed++) {
    PolicyTable policy = random_policy(seed + 31);
    Sketch k = sketch_new(seed, &policy);
    for (int i = 0; i < k.p->n_ops; i++) {
      Op *op = &k.p->ops[i];
      for (int w = 0; w < op->n_waits; w++) {
        Op whole = *op;
        op->waits[w] = op->waits[--op->n_waits];
        assert_int_equal(order_check(k.p, &err), -1);
        assert_non_null(strstr(err.text, "in no order"));
        *op = whole;
        planted++;
      }
    }
    assert_int_equal(order_check(k.p, &err), 0);
    sketch_free(&k);
    policy_table_free(&policy);
  }
  print_message("%d missing waits caught\n", planted);
  assert_true(planted > 200);
}

// The last op that reads t, or -1.
static int last_read(const Program *p, TensorId t) {
  for (int i = p->n_ops - 1; i >= 0; i--)
    for (int k = 0; k < OP_MAX_IN; k++)
      if (p->ops[i].in[k] == t) return i;
  return -1;
}

static void test_early_free_is_caught(void **state) {
  (void)state;
  Error err;
  int caught = 0, harmless = 0;
  for (uint64_t seed = 0; seed < 25; seed++) {
    PolicyTable policy = random_policy(seed + 77);
    Sketch k = sketch_new(seed, &policy);
    Program *p = k.p;
    for (TensorId t = 0; t < p->n_tensors; t++) {
      Tensor *x = &p->tensors[t];
      int read = last_read(p, t), whole = x->last;
      if (x->space != SPACE_ARENA || x->is_output || read <= x->first) continue;
      x->last = x->first + (read - x->first) / 2;
      schedule_place(p);
      waits_derive(p);
      int overwritten = 0;
      for (TensorId u = 0; u < p->n_tensors; u++) {
        const Tensor *y = &p->tensors[u];
        overwritten |= u != t && y->space == SPACE_ARENA && y->first > x->last && y->first <= read &&
                       y->offset < x->offset + x->bytes && x->offset < y->offset + y->bytes;
      }
      if (overwritten) {
        assert_int_equal(order_check(p, &err), -1);
        caught++;
      } else {
        harmless++;
      }
      x->last = whole;
    }
    schedule_place(p);
    waits_derive(p);
    assert_int_equal(order_check(p, &err), 0);
    sketch_free(&k);
    policy_table_free(&policy);
  }
  print_message("%d early frees caught, %d had no consequence\n", caught, harmless);
  assert_true(caught > 200);
}

#if !defined(__SANITIZE_ADDRESS__) // which owns the allocator: nothing is counted
static void test_replay_allocates_nothing(void **state) {
  (void)state;
  PolicyTable policy = random_policy(3);
  Sketch k = sketch_new(3, &policy);
  Memory m = memory_new(k.p, 0);
  program_bind(k.p, &m.bases);
  OpTime *times = xcalloc((size_t)k.p->n_ops, sizeof *times);
  int64_t before = allocations_counted();
  assert_true(before > 0);
  for (int i = 0; i < 3; i++) program_replay(k.p, times);
  assert_int_equal(allocations_counted(), before);
  for (int i = 0; i < k.p->n_ops; i++) {
    assert_true(times[i].end >= times[i].begin);
    assert_true(times[i].begin >= (i ? times[i - 1].end : 0));
  }
  assert_true(times[k.p->n_ops - 1].end > 0);
  free(times);
  memory_free(&m);
  sketch_free(&k);
  policy_table_free(&policy);
}
#endif

// ---- schedule ----

// Three layers of one op and one offloaded x each, then backward. Checks where copies went and how long tensors live.
static void test_reloads_move_one_layer_earlier(void **state) {
  (void)state;
  enum { L = 3 };
  PolicyTable policy = policy_table_new(L, MEMORY_KEEP);
  Error err;
  assert_int_equal(policy_table_set(&policy, "x", "offload", &err), 0);
  Program *p = program_new("chain", &sketch_dims, &backend_hash, &policy);
  Shape shapes[2 * L + 1];
  TensorId x[L + 1], dx[L + 1];
  OpArgs args[2 * L + 1];
  for (int i = 0; i < 2 * L + 1; i++) args[i] = (OpArgs){.span = {.count = (int64_t)(intptr_t)&shapes[i]}};
  x[0] = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "input");
  int forward[L], backward[L];
  for (int l = 0; l < L; l++) {
    program_layer(p, l);
    x[l + 1] = program_tensor(p, DT_ACT, 8, "x%d", l + 1);
    forward[l] = program_op(p, OP_SILU_FWD, TENSORS(x[l]), TENSORS(x[l + 1]), &args[l]);
    program_save(p, x[l + 1], SAVED_X);
  }
  program_layer(p, L);
  dx[L] = program_tensor(p, DT_ACT, 8, "dx%d", L);
  program_op(p, OP_SILU_FWD, TENSORS(x[L]), TENSORS(dx[L]), &args[L]);
  for (int l = L - 1; l >= 0; l--) {
    program_layer(p, l);
    dx[l] = program_tensor(p, DT_ACT, 8, "dx%d", l);
    TensorId again = program_need(p, x[l + 1]);
    backward[l] =
        program_op(p, OP_EXPERT_COMBINE, TENSORS(dx[l + 1], again, NONE, NONE), TENSORS(dx[l]), &args[2 * L - l]);
  }
  program_output(p, dx[0]);
  program_finish(p);
  // recorded:  F0 d0 | F1 d1 | F2 d2 | loss | r2 B2 | r1 B1 | r0 B0
  // scheduled: F0 d0 | F1 d1 | F2 d2 | r2 loss | r1 B2 | r0 B1 | B0
  static const Lane lanes[] = {LANE_COMPUTE, LANE_D2H, LANE_COMPUTE, LANE_D2H, LANE_COMPUTE, LANE_D2H,    LANE_H2D,
                               LANE_COMPUTE, LANE_H2D, LANE_COMPUTE, LANE_H2D, LANE_COMPUTE, LANE_COMPUTE};
  assert_int_equal(p->n_ops, 13);
  for (int i = 0; i < p->n_ops; i++) assert_int_equal(p->ops[i].lane, lanes[i]);
  assert_int_equal(forward[0] + 2 * L, forward[L - 1] + 2);
  assert_true(backward[0] > backward[L - 1]);
  // x1, copied in the first layer, lives until the end of the second, not just until its last reader at op 2.
  assert_int_equal(p->tensors[x[1]].last, 3);
  assert_int_equal(p->tensors[x[2]].last, 5);
  assert_int_equal(order_check(p, &err), 0);
  // Each reload waits for its copy to the host, each reader for its reload, and for nothing more.
  for (int i = 0; i < p->n_ops; i++) {
    if (p->ops[i].lane == LANE_D2H) assert_int_equal(p->ops[i].n_waits, 1);
    if (p->ops[i].kind == OP_EXPERT_COMBINE) assert_int_equal(p->ops[i].n_waits, 1);
  }
  program_free(p);
  policy_table_free(&policy);
}

// The same three layers by the clock, an op a second and a copy a second: a reload begins as late as it may, and where
// its copy to the host is not done, as soon as that is.
static void test_reloads_begin_by_the_clock(void **state) {
  (void)state;
  enum { L = 3 };
  PolicyTable policy = policy_table_new(L, MEMORY_KEEP);
  Error err;
  Costs costs = {.link = {.d2h = 32, .h2d = 32, .both_d2h = 32, .both_h2d = 32}};
  assert_int_equal(policy_table_set(&policy, "x", "offload", &err), 0);
  policy.costs = &costs;
  Program *p = program_new("clock", &sketch_dims, &backend_hash, &policy);
  TensorId x[L + 1], dx[L + 1];
  x[0] = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "input");
  for (int l = 0; l < L; l++) {
    program_layer(p, l);
    x[l + 1] = program_tensor(p, DT_ACT, 8, "x%d", l + 1);
    program_op(p, OP_SILU_FWD, TENSORS(x[l]), TENSORS(x[l + 1]), NULL);
    program_save(p, x[l + 1], SAVED_X);
  }
  program_layer(p, L);
  dx[L] = program_tensor(p, DT_ACT, 8, "dx%d", L);
  program_op(p, OP_SILU_FWD, TENSORS(x[L]), TENSORS(dx[L]), NULL);
  for (int l = L - 1; l >= 0; l--) {
    program_layer(p, l);
    dx[l] = program_tensor(p, DT_ACT, 8, "dx%d", l);
    TensorId again = program_need(p, x[l + 1]);
    program_op(p, OP_EXPERT_COMBINE, TENSORS(dx[l + 1], again, NONE, NONE), TENSORS(dx[l]), NULL);
  }
  program_output(p, dx[0]);
  for (int i = 0; i < p->n_ops; i++)
    costs_put(&costs, &(ClassSeconds){op_class(p, &p->ops[i]), p->ops[i].kind, 1, 1, 1});
  program_finish(p);
  // recorded: F0 d0 | F1 d1 | F2 d2 | loss | r2 B2 | r1 B1 | r0 B0, compute ops at 0, 1, .. 6; d2 is done at 4
  // by the clock: F0 d0 F1 d1 F2 d2 loss r2 r1 B2 r0 B1 B0
  static const Lane lanes[] = {LANE_COMPUTE, LANE_D2H, LANE_COMPUTE, LANE_D2H, LANE_COMPUTE, LANE_D2H,    LANE_COMPUTE,
                               LANE_H2D,     LANE_H2D, LANE_COMPUTE, LANE_H2D, LANE_COMPUTE, LANE_COMPUTE};
  assert_int_equal(p->n_ops, 13);
  for (int i = 0; i < p->n_ops; i++) assert_int_equal(p->ops[i].lane, lanes[i]);
  // x1 is copied from 1 to 2, and lives until the op that begins at 2; x3 from 3 to 4.
  assert_int_equal(p->tensors[x[1]].last, 4);
  assert_int_equal(p->tensors[x[3]].last, 9);
  assert_int_equal(order_check(p, &err), 0);
  double seconds[13];
  for (int i = 0; i < 13; i++) seconds[i] = op_seconds(&costs, p, &p->ops[i]);
  Simulation s = simulate(p, seconds, &costs, NULL);
  assert_true(fabs(s.seconds - 8) < 1e-9 && fabs(s.stalled - 1) < 1e-9); // of r2
  program_free(p);
  costs_free(&costs);
  policy_table_free(&policy);
}

// What is smaller than policy.least_copy is kept instead of offloaded.
static void test_small_tensors_stay(void **state) {
  (void)state;
  for (int least = 32; least <= 33; least++) {
    PolicyTable policy = policy_table_new(1, MEMORY_KEEP);
    policy.least_copy = least;
    policy.of[SAVED_X] = POLICY_OFFLOAD;
    Program *p = program_new("small", &sketch_dims, &backend_hash, &policy);
    TensorId w = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "w"), x = program_tensor(p, DT_ACT, 8, "x");
    program_layer(p, 0);
    program_op(p, OP_SILU_FWD, TENSORS(w), TENSORS(x), NULL);
    program_save(p, x, SAVED_X);
    assert_int_equal(program_need(p, x) == x, least == 33);
    program_free(p);
    policy_table_free(&policy);
  }
}

// A reload never moves before the copy it reads, even where a whole stretch of lead would take it there.
static void test_reload_follows_its_copy(void **state) {
  (void)state;
  PolicyTable policy = policy_table_new(1, MEMORY_KEEP);
  Error err;
  assert_int_equal(policy_table_set(&policy, "x", "offload", &err), 0);
  Program *p = program_new("short", &sketch_dims, &backend_hash, &policy);
  TensorId w = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "w");
  TensorId x = program_tensor(p, DT_ACT, 8, "x"), y = program_tensor(p, DT_ACT, 8, "y");
  program_layer(p, 0);
  program_op(p, OP_SILU_FWD, TENSORS(w), TENSORS(x), NULL);
  program_save(p, x, SAVED_X);
  program_layer(p, 1);
  TensorId again = program_need(p, x);
  program_op(p, OP_SILU_FWD, TENSORS(again), TENSORS(y), NULL);
  program_finish(p);
  static const Lane lanes[] = {LANE_COMPUTE, LANE_D2H, LANE_H2D, LANE_COMPUTE};
  assert_int_equal(p->n_ops, 4);
  for (int i = 0; i < p->n_ops; i++) assert_int_equal(p->ops[i].lane, lanes[i]);
  assert_int_equal(order_check(p, &err), 0);
  program_free(p);
  policy_table_free(&policy);
}

// The same where the copy is the first thing of a layer: the lead would place the reload right there.
static void test_reload_follows_a_copy_that_opens_a_layer(void **state) {
  (void)state;
  PolicyTable policy = policy_table_new(2, MEMORY_KEEP);
  Error err;
  assert_int_equal(policy_table_set(&policy, "x", "offload", &err), 0);
  Program *p = program_new("opening", &sketch_dims, &backend_hash, &policy);
  TensorId w = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "w");
  TensorId x = program_tensor(p, DT_ACT, 8, "x"), y = program_tensor(p, DT_ACT, 8, "y");
  program_layer(p, 0);
  program_op(p, OP_SILU_FWD, TENSORS(w), TENSORS(x), NULL);
  program_layer(p, 1);
  program_save(p, x, SAVED_X);
  program_layer(p, 2);
  TensorId again = program_need(p, x);
  program_op(p, OP_SILU_FWD, TENSORS(again), TENSORS(y), NULL);
  program_finish(p);
  static const Lane lanes[] = {LANE_COMPUTE, LANE_D2H, LANE_H2D, LANE_COMPUTE};
  assert_int_equal(p->n_ops, 4);
  for (int i = 0; i < p->n_ops; i++) assert_int_equal(p->ops[i].lane, lanes[i]);
  assert_int_equal(order_check(p, &err), 0);
  program_free(p);
  policy_table_free(&policy);
}

// One op, recorded again, serves all of its outputs that were not kept; a need is answered once.
static void test_rebuild_is_shared(void **state) {
  (void)state;
  PolicyTable policy = policy_table_new(1, MEMORY_KEEP);
  Error err;
  assert_int_equal(policy_table_set(&policy, "x2", "recompute", &err), 0);
  assert_int_equal(policy_table_set(&policy, "h2", "recompute", &err), 0);
  Program *p = program_new("shared", &sketch_dims, &backend_hash, &policy);
  TensorId w = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "w"), out[4];
  program_layer(p, 0);
  for (int i = 0; i < 4; i++) out[i] = program_tensor(p, DT_ACT, 8, "out%d", i);
  TensorId b = program_external(p, SPACE_WEIGHTS, 64, DT_ACT, 8, "b");
  program_op(p, OP_ADALN_FWD, TENSORS(w, b, w), (TensorList){out, 4}, NULL);
  program_save(p, out[0], SAVED_X2);
  program_save(p, out[1], SAVED_H2);
  program_save(p, out[2], SAVED_NORM_STATS);
  program_save(p, out[3], SAVED_NORM_STATS);
  TensorId h2 = program_need(p, out[1]), x2 = program_need(p, out[0]);
  assert_int_equal(p->n_ops, 2);
  assert_int_equal(p->ops[1].out[0], x2);
  assert_int_equal(p->ops[1].out[1], h2);
  assert_true(x2 != out[0] && h2 != out[1]);
  assert_int_equal(program_need(p, out[1]), h2);
  assert_int_equal(program_need(p, out[2]), out[2]);
  assert_true(p->ops[1].out[2] != out[2]); // scratch: the kept statistics are not written again
  assert_int_equal(program_need(p, w), w);
  assert_int_equal(p->n_ops, 2);
  program_finish(p);
  assert_int_equal(order_check(p, &err), 0);
  program_free(p);
  policy_table_free(&policy);
}

// ---- wrong programs ----

// Runs `body` in a child; returns what it printed to standard error, and whether it failed.
static int child_fails(void (*body)(void), char *text, size_t bytes) {
  int pipe_ends[2];
  assert_int_equal(pipe(pipe_ends), 0);
  fflush(NULL);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    body();
    _exit(0);
  }
  close(pipe_ends[1]);
  size_t used = 0;
  char spare[4096];
  for (ssize_t got; (got = read(pipe_ends[0], used < bytes - 1 ? text + used : spare,
                                used < bytes - 1 ? bytes - 1 - used : sizeof spare)) > 0;)
    if (used < bytes - 1) used += (size_t)got;
  text[used] = 0;
  close(pipe_ends[0]);
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static Program *wrong_program(void) {
  return program_new("wrong", &sketch_dims, &backend_hash, NULL);
}

static void wrong_read_before_write(void) {
  Program *p = wrong_program();
  TensorId a = program_tensor(p, DT_ACT, 8, "early bird"), b = program_tensor(p, DT_ACT, 8, "b");
  program_op(p, OP_SILU_FWD, TENSORS(a), TENSORS(b), NULL);
  program_finish(p);
}
static void wrong_missing_operand(void) {
  Program *p = wrong_program();
  TensorId a = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "a"), b = program_tensor(p, DT_ACT, 8, "b");
  TensorId c = program_tensor(p, DT_ACT, 8, "c");
  program_op(p, OP_COND_BWD, TENSORS(a, NONE), TENSORS(b, c), NULL);
}
static void wrong_input_left_out(void) {
  Program *p = wrong_program();
  TensorId x = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "x"), y = program_tensor(p, DT_ACT, 8, "y");
  program_op(p, OP_LINEAR_FWD, TENSORS(x, x, NONE), TENSORS(y), NULL); // the bias, which may be absent
}
static void wrong_output_too_many(void) {
  Program *p = wrong_program();
  TensorId x = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "x"), y = program_tensor(p, DT_ACT, 8, "y");
  program_op(p, OP_SILU_FWD, TENSORS(x), TENSORS(y, NONE), NULL);
}
static void wrong_rebuild_list(void) {
  Program *p = wrong_program();
  TensorId x = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "x"), y = program_tensor(p, DT_ACT, 8, "y");
  program_op(p, OP_SILU_FWD, TENSORS(x), TENSORS(y), NULL);
  program_save_rebuild(p, TENSORS(y), OP_COND_BWD, TENSORS(x, x), NULL);
}
static void wrong_in_place(void) {
  Program *p = wrong_program();
  TensorId a = program_external(p, SPACE_INPUT, 0, DT_ACT, 8, "both");
  program_op(p, OP_SILU_FWD, TENSORS(a), TENSORS(a), NULL);
}
static void wrong_rebuild_of_gradient(void) {
  PolicyTable policy = policy_table_new(1, MEMORY_RECOMPUTE);
  Program *p = program_new("wrong", &sketch_dims, &backend_hash, &policy);
  TensorId a = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "a"), b = program_tensor(p, DT_ACT, 8, "b");
  program_layer(p, 0);
  program_op(p, OP_EMBED_BWD, TENSORS(a, a), TENSORS(b), NULL);
  program_save(p, b, SAVED_QKV);
  program_need(p, b);
}
static void wrong_address(void) {
  Program *p = wrong_program();
  TensorId a = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "a"), b = program_tensor(p, DT_ACT, 8, "passing");
  program_op(p, OP_SILU_FWD, TENSORS(a), TENSORS(b), NULL);
  program_finish(p);
  Memory m = memory_new(p, 0);
  program_bind(p, &m.bases);
  program_address(p, b);
}

static void test_wrong_programs_are_named(void **state) {
  (void)state;
  static const struct {
    void (*body)(void);
    const char *says[3];
  } cases[] = {{wrong_read_before_write, {"SILU_FWD", "operand x", "early bird"}},
               {wrong_missing_operand, {"COND_BWD", "operand c", "missing"}},
               {wrong_input_left_out, {"LINEAR_FWD", "has 4 inputs", "3 are given"}},
               {wrong_output_too_many, {"SILU_FWD", "has 1 outputs", "2 are given"}},
               {wrong_rebuild_list, {"COND_BWD", "has 2 outputs", "1 are given"}},
               {wrong_in_place, {"SILU_FWD", "both", "input x and output y"}},
               {wrong_rebuild_of_gradient, {"EMBED_BWD", "output dE", "must not be written again"}},
               {wrong_address, {"passing", "no output", "gone"}}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char text[2048];
    assert_true(child_fails(cases[i].body, text, sizeof text));
    for (int k = 0; k < 3; k++)
      if (!strstr(text, cases[i].says[k])) fail_msg("case %d: \"%s\" lacks \"%s\"", (int)i, text, cases[i].says[k]);
  }
}

#if defined(__SANITIZE_ADDRESS__)
// A kernel that reads the byte past its input.
static void kernel_past_the_end(const KernelCall *c) {
  memset(c->out.SILU_FWD.y, ((const char *)c->in.SILU_FWD.x)[8], 8);
}
static void wrong_kernel(void) {
  Backend greedy = backend_hash;
  greedy.fn[OP_SILU_FWD] = kernel_past_the_end;
  Program *p = program_new("greedy", &sketch_dims, &greedy, NULL);
  TensorId w = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, 8, "w"), a = program_tensor(p, DT_U8, 8, "a"),
           b = program_tensor(p, DT_U8, 8, "b");
  Shape s = {.in = {32}, .out = {8}, .to = {8}};
  OpArgs args = {.span = {.count = (int64_t)(intptr_t)&s}};
  program_op(p, OP_SILU_FWD, TENSORS(w), TENSORS(a), &args);
  program_op(p, OP_SILU_FWD, TENSORS(a), TENSORS(b), &args);
  program_finish(p);
  Memory m = memory_new(p, 0);
  program_bind(p, &m.bases);
  program_replay(p, NULL);
}

static void test_sanitizer_sees_arena_bounds(void **state) {
  (void)state;
  char text[4096];
  assert_true(child_fails(wrong_kernel, text, sizeof text));
  if (!strstr(text, "use-after-poison")) fail_msg("%s", text);
}
#endif

int main(void) {
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_waits_order_everything),
    cmocka_unit_test(test_random_orders_give_the_same_bits),
    cmocka_unit_test(test_policies_give_the_same_bits),
    cmocka_unit_test(test_clocks_give_the_same_bits),
    cmocka_unit_test(test_separate_allocations_give_the_same_bits),
    cmocka_unit_test(test_shared_gradients),
    cmocka_unit_test(test_missing_wait_is_caught),
    cmocka_unit_test(test_early_free_is_caught),
    cmocka_unit_test(test_reloads_move_one_layer_earlier),
    cmocka_unit_test(test_reloads_begin_by_the_clock),
    cmocka_unit_test(test_small_tensors_stay),
    cmocka_unit_test(test_reload_follows_its_copy),
    cmocka_unit_test(test_reload_follows_a_copy_that_opens_a_layer),
    cmocka_unit_test(test_rebuild_is_shared),
    cmocka_unit_test(test_wrong_programs_are_named),
#if defined(__SANITIZE_ADDRESS__)
    cmocka_unit_test(test_sanitizer_sees_arena_bounds),
#else
    cmocka_unit_test(test_replay_allocates_nothing),
#endif
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
