// Lanes played forward in time: cases worked by hand, and two other ways of playing them.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/program/simulate.h"
#include "tests/unit/sketch.h"

static const Costs alone = {.link = {.d2h = 1, .h2d = 1, .both_d2h = 1, .both_h2d = 1}};
static const Costs halved = {.link = {.d2h = 1, .h2d = 1, .both_d2h = .5, .both_h2d = .5}};

static const Lane C = LANE_COMPUTE, D = LANE_D2H, H = LANE_H2D, U = LANE_UPDATE;
enum { MOST = 64 };

// An op of a lane, what it takes, and up to two ops that it waits for; -1: none.
typedef struct Given {
  Lane lane;
  double seconds;
  int waits[2];
} Given;

typedef struct Case {
  Program p;
  Op ops[MOST];
  double seconds[MOST];
  OpTime times[MOST];
} Case;

static Simulation play(Case *c, const Given *given, int n, const Costs *costs) {
  int one_queue = c->p.one_queue, update_share = c->p.update_share;
  memset(c, 0, sizeof *c);
  c->p = (Program){.ops = c->ops, .n_ops = n, .one_queue = one_queue, .update_share = update_share};
  for (int i = 0; i < n; i++) {
    c->ops[i].lane = given[i].lane;
    c->seconds[i] = given[i].seconds;
    for (int w = 0; w < 2; w++)
      if (given[i].waits[w] >= 0) c->ops[i].waits[c->ops[i].n_waits++] = (Wait){given[i].waits[w]};
  }
  return simulate(&c->p, c->seconds, costs, c->times);
}

static void check(double got, double want) {
  if (fabs(got - want) > 1e-9) fail_msg("%g instead of %g", got, want);
}

// A copy to the host and back beside compute that is long enough: nothing is held up.
static void test_hidden(void **state) {
  (void)state;
  Case c = {0};
  const Given ops[] = {{C, 2, {-1, -1}}, {D, 3, {0, -1}},  {C, 4, {-1, -1}},
                       {H, 2, {1, -1}},  {C, 3, {-1, -1}}, {C, 1, {3, -1}}};
  Simulation s = play(&c, ops, 6, &halved);
  check(s.seconds, 10);
  check(s.stalled, 0);
  check(s.busy[C], 10);
  check(s.busy[D], 3);
  check(s.busy[H], 2);
  check(c.times[1].begin, 2);
  check(c.times[3].begin, 5);
  check(c.times[3].end, 7);
  check(simulation_hidden(&s), 1);
}

// The reload is not there when it is needed: two of five seconds of copies show.
static void test_exposed(void **state) {
  (void)state;
  Case c = {0};
  const Given ops[] = {{C, 2, {-1, -1}}, {D, 3, {0, -1}}, {C, 3, {-1, -1}}, {H, 2, {1, -1}}, {C, 1, {3, -1}}};
  Simulation s = play(&c, ops, 5, &halved);
  check(s.seconds, 8);
  check(s.stalled, 2);
  check(simulation_hidden(&s), .6);
  check(c.times[4].begin, 7);
}

// Both directions at once: for 2 s each gets half, then the longer one all.
static void test_both_directions(void **state) {
  (void)state;
  Case c = {0};
  const Given ops[] = {{D, 1, {-1, -1}}, {H, 4, {-1, -1}}, {C, 1, {-1, -1}}, {C, 1, {1, -1}}};
  Simulation s = play(&c, ops, 4, &halved);
  check(c.times[0].end, 2);
  check(c.times[1].end, 5);
  check(s.seconds, 6);
  check(s.stalled, 4);
  s = play(&c, ops, 4, &alone);
  check(c.times[0].end, 1);
  check(s.seconds, 5);
}

// With one queue a copy holds up all that was recorded after it; a copy that outlasts the compute lane counts too.
static void test_one_queue(void **state) {
  (void)state;
  Case c = {0};
  const Given ops[] = {{C, 2, {-1, -1}}, {D, 3, {0, -1}}, {C, 1, {-1, -1}}, {H, 2, {1, -1}}};
  Simulation s = play(&c, ops, 4, &halved);
  check(s.seconds, 7);
  check(s.stalled, 4);
  c.p.one_queue = 1;
  s = play(&c, ops, 4, &halved);
  check(s.seconds, 8);
  check(s.stalled, 0);
}

// While copies run the compute lane is slower: each copy takes a quarter of its pace.
static void test_drag(void **state) {
  (void)state;
  Case c = {0};
  const Costs costs = {.rates = {.bytes = 2}, .link = {.d2h = .5, .h2d = .5, .both_d2h = .5, .both_h2d = .5}};
  check(copy_drag(&costs), .25);
  const Given ops[] = {{D, 2, {-1, -1}}, {C, 4, {-1, -1}}, {H, 1, {0, -1}}};
  Simulation s = play(&c, ops, 3, &costs);
  check(c.times[1].end, 4.75); // 3 s at three quarters of its pace
  check(s.seconds, 4.75);
}

// Copies of both directions take half of it.
static void test_both_drag(void **state) {
  (void)state;
  Case c = {0};
  const Costs costs = {.rates = {.bytes = 2}, .link = {.d2h = .5, .h2d = .5, .both_d2h = .5, .both_h2d = .5}};
  const Given ops[] = {{D, 2, {-1, -1}}, {C, 4, {-1, -1}}, {H, 2, {-1, -1}}};
  Simulation s = play(&c, ops, 3, &costs);
  check(c.times[2].end, 2);
  check(s.seconds, 5);
}

// While a collective runs the compute lane is slower by the group's drag.
static void test_group_drag(void **state) {
  (void)state;
  Case c = {0};
  const Costs costs = {.group = {.drag = .25}};
  const Given ops[] = {{LANE_COMM, 2, {-1, -1}}, {C, 4, {-1, -1}}, {LANE_COMM, 1, {1, -1}}};
  Simulation s = play(&c, ops, 3, &costs);
  check(c.times[1].end, 4.5); // of it 1.5 in the first 2 s
  check(s.seconds, 5.5);
  check(s.stalled, 1);
}

// Beside each other the compute lane and an update have 3 and 1 of 4 multiprocessors.
static void test_update_beside(void **state) {
  (void)state;
  Case c = {0};
  const Costs costs = {.link = alone.link, .multiprocessors = 4};
  const Given ops[] = {{U, 1, {-1, -1}}, {C, 3, {-1, -1}}, {C, 1, {0, -1}}};
  Simulation s = play(&c, ops, 3, &costs);
  check(s.seconds, 4); // nothing is shared
  c.p.update_share = 1;
  s = play(&c, ops, 3, &costs);
  check(c.times[0].end, 2.5); // a quarter of the multiprocessors moves 1 / 2.5 of the bytes
  check(c.times[1].end, 2.5 + 3 - 2.5 * 3 / 4 / 1.12);
  check(s.seconds, c.times[1].end + 1);
  check(s.stalled, 0);
}

static void test_nothing(void **state) {
  (void)state;
  Case c = {0};
  Simulation s = play(&c, NULL, 0, &alone);
  check(s.seconds, 0);
  check(simulation_hidden(&s), 1);
}

// ---- the same by other means ----

static void random_case(Rng *r, Given *ops, int n) {
  for (int i = 0; i < n; i++) {
    ops[i] = (Given){(Lane)rng_below(r, LANE_COUNT), rng_below(r, 9), {-1, -1}};
    for (int w = 0; w < 2; w++)
      if (i && rng_chance(r, 50)) ops[i].waits[w] = rng_below(r, i);
  }
}

// Where copies do not slow each other: an op begins when the last of what it follows has ended.
static void test_against_recursion(void **state) {
  (void)state;
  Rng r = {3};
  for (int round = 0; round < 500; round++) {
    Given ops[MOST];
    Case c = {0};
    double end[MOST], lane_end[LANE_COUNT] = {0}, total = 0, works = 0;
    int n = 1 + rng_below(&r, MOST);
    random_case(&r, ops, n);
    Simulation s = play(&c, ops, n, &alone);
    for (int i = 0; i < n; i++) {
      double begin = lane_end[ops[i].lane];
      for (int w = 0; w < 2; w++)
        if (ops[i].waits[w] >= 0) begin = fmax(begin, end[ops[i].waits[w]]);
      end[i] = lane_end[ops[i].lane] = begin + ops[i].seconds;
      check(c.times[i].begin, begin);
      check(c.times[i].end, end[i]);
      total = fmax(total, end[i]);
      if (ops[i].lane == LANE_COMPUTE || ops[i].lane == LANE_UPDATE) works += ops[i].seconds;
      for (int k = 0; k <= i; k++) { // what of two lanes' work is at the same time counts once
        if (ops[i].lane + ops[k].lane != LANE_COMPUTE + LANE_UPDATE || ops[i].lane == ops[k].lane) continue;
        if (ops[i].lane != LANE_COMPUTE && ops[i].lane != LANE_UPDATE) continue;
        works -= fmax(0, fmin(end[i], end[k]) - fmax(c.times[i].begin, c.times[k].begin));
      }
    }
    check(s.seconds, total);
    check(s.stalled, total - works);
  }
}

// In small steps of time, in which every lane with something to do does a little of it.
static double play_in_steps(const Given *ops, int n, const LinkRates *link, double step) {
  double left[MOST], now = 0;
  for (int i = 0; i < n; i++) left[i] = ops[i].seconds;
  for (;; now += step) {
    int at[LANE_COUNT], seen[LANE_COUNT] = {0}, remaining = 0;
    for (int l = 0; l < LANE_COUNT; l++) at[l] = -1;
    for (int i = 0; i < n; i++) {
      if (left[i] <= 0 && ops[i].seconds > 0) continue;
      int ready = 1;
      for (int w = 0; w < 2; w++) ready &= ops[i].waits[w] < 0 || left[ops[i].waits[w]] <= 0;
      if (left[i] <= 0 && ready && !seen[ops[i].lane]) continue; // takes no time
      remaining += left[i] > 0;
      if (!seen[ops[i].lane] && ready) at[ops[i].lane] = i;
      seen[ops[i].lane] = 1;
    }
    if (!remaining) return now;
    int both = at[LANE_D2H] >= 0 && at[LANE_H2D] >= 0;
    for (int l = 0; l < LANE_COUNT; l++) {
      double pace = both && l == LANE_D2H   ? link->both_d2h / link->d2h
                    : both && l == LANE_H2D ? link->both_h2d / link->h2d
                                            : 1;
      if (at[l] >= 0) left[at[l]] -= step * pace;
    }
  }
}

static void test_against_steps(void **state) {
  (void)state;
  Rng r = {4};
  const Costs uneven = {.link = {.d2h = 4, .h2d = 3, .both_d2h = 3, .both_h2d = 1}};
  for (int round = 0; round < 60; round++) {
    Given ops[MOST];
    Case c = {0};
    int n = 1 + rng_below(&r, 20);
    random_case(&r, ops, n);
    for (int i = 0; i < n; i++) ops[i].seconds += 1; // steps order what takes no time otherwise
    Simulation s = play(&c, ops, n, &uneven);
    double want = play_in_steps(ops, n, &uneven.link, 1e-3);
    if (fabs(s.seconds - want) > 2e-3 * n + 1e-3) fail_msg("round %d: %g instead of %g", round, s.seconds, want);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_hidden),          cmocka_unit_test(test_exposed),
      cmocka_unit_test(test_both_directions), cmocka_unit_test(test_one_queue),
      cmocka_unit_test(test_nothing),         cmocka_unit_test(test_drag),
      cmocka_unit_test(test_group_drag),      cmocka_unit_test(test_both_drag),
      cmocka_unit_test(test_update_beside),   cmocka_unit_test(test_against_recursion),
      cmocka_unit_test(test_against_steps),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
