// The place of the optimizer's state and the plan of activations, chosen together on a device on paper: as short a step
// as any place by itself allows, in the memory that there is.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model/config/load.h"
#include "model/program/expected.h"
#include "model/program/policy.h"
#include "tests/unit/order_check.h"
#include "tests/unit/paper_device.h"
#include "trainer/engine_internal.h"
#include "trainer/predict.h"

// Small enough for all of its state to find room on the host of a test.
static const char *const base_of_four[] = {"data.tokenizer=bytes", "model.layers=4", "model.vocab=4096"};
static const char *const medium[] = {"data.tokenizer=bytes"};
static const struct {
  const char *file;
  const char *const *sets;
  int n;
} models[] = {{"configs/base.json", base_of_four, 3}, {"configs/medium.json", medium, 1}};
enum { MODELS = sizeof models / sizeof *models };

static void open_config(Config *c, int model) {
  Error err;
  if (config_load(c, models[model].file, models[model].sets, models[model].n, &err) != 0) fail_msg("%s", err.text);
  c->memory.host_gb = 10;
}

static void record(Engine *e, const Backend *b, Config *c, MemoryPolicy policy, MemoryState state, double budget,
                   const PolicyTable *given) {
  Error err;
  Extents x = extents_expected(c, c->data.micro_batch_tokens);
  c->memory.policy = policy;
  c->memory.state = state;
  c->memory.budget_gb = budget;
  if (engine_record_with(e, c, b, 1, costs_new(b, &x), given, &err) != 0) fail_msg("%s", err.text);
}

// Of a mean step; infinite where it does not fit.
static double seconds_of(const Engine *e) {
  double ema = 1.0 / e->config->train.ema_every;
  if (engine_device_bytes(e) > e->budget) return INFINITY;
  return (1 - ema) * predict_step(e, 0) + ema * predict_step(e, 1);
}

static double needs(const Backend *b, Config *c, MemoryPolicy policy, MemoryState state) {
  Engine e;
  record(&e, b, c, policy, state, 1e3, NULL);
  double gb = (double)engine_device_bytes(&e) / 1e9;
  engine_free(&e);
  return gb;
}

// Whatever the budget, and whether an update comes after one pass or four and the EMA's with each or seldom.
static void test_best_of_places(void **state) {
  (void)state;
  const Backend b = paper_device();
  int seen[STATE_GRADIENTS + 1] = {0}, gains = 0;
  for (int m = 0; m < MODELS; m++)
    for (int variant = 0; variant < 2; variant++) {
      static Config c;
      open_config(&c, m);
      c.train.ema_every = variant ? 1 : 10;
      c.train.micro_batches = variant ? 4 : 1;
      const double least[] = {needs(&b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS),
                              needs(&b, &c, MEMORY_RECOMPUTE, STATE_DEVICE)},
                   most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE);
      double before = INFINITY;
      // Three budgets below what the device alone can do with, at last all that keep needs; of long steps half of them.
      for (int i = 0; i <= 6; i += 1 + variant) {
        double from = i < 3 ? least[0] : least[1], to = i < 3 ? least[1] : most,
               budget = from + (to - from) * (i < 6 ? i % 3 : 3) / 3 + 1e-3;
        double best = INFINITY, on_device = INFINITY;
        Engine e;
        record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, budget, NULL);
        double got = seconds_of(&e);
        seen[e.model.state]++;
        engine_free(&e);
        for (MemoryState s = STATE_DEVICE; s <= STATE_GRADIENTS; s++) {
          record(&e, &b, &c, MEMORY_AUTO, s, budget, NULL);
          best = fmin(best, seconds_of(&e));
          if (s == STATE_DEVICE) on_device = seconds_of(&e);
          engine_free(&e);
        }
        if (!(got <= 1.01 * best)) fail_msg("%s in %g GB: %g s, %g", models[m].file, budget, got, best);
        if (!(got <= 1.01 * before)) fail_msg("%s in %g GB: %g s, %g with less", models[m].file, budget, got, before);
        gains += isfinite(on_device) && got < .99 * on_device;
        before = got;
      }
    }
  assert_true(seen[STATE_DEVICE] > 0 && seen[STATE_EMA] > 0 && seen[STATE_MOMENTS] > 0);
  assert_true(gains > 0); // it leaves where it need not
}

// Budgets from the `first` to the `last` of `parts` steps from the least with the moments on the host to the least
// without: no step takes more than `slack` times one with less, and no gradients leave.
static void compare_with_less(const Backend *b, Config *c, int first, int last, int parts, double slack) {
  double least = needs(b, c, MEMORY_RECOMPUTE, STATE_MOMENTS), most = needs(b, c, MEMORY_RECOMPUTE, STATE_DEVICE),
         before = INFINITY;
  for (int i = first; i <= last; i++) {
    Engine e;
    record(&e, b, c, MEMORY_AUTO, STATE_AUTO, least + (most - least) * i / parts, NULL);
    double seconds = seconds_of(&e);
    assert_true(e.model.state < STATE_GRADIENTS);
    if (!(seconds <= slack * before)) fail_msg("in %g GB: %g s, %g with less", c->memory.budget_gb, seconds, before);
    before = seconds;
    engine_free(&e);
  }
}

// Where a place ends within a bucket the update's parts need a little more of the arena than the place was listed with:
// then another place is chosen, rather than that gradients leave too, which takes twice as long.
static void test_places_in_vain(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  Error err;
  if (config_load(&c, "configs/small.json", medium, 1, &err) != 0) fail_msg("%s", err.text);
  c.memory.host_gb = 10;
  compare_with_less(&b, &c, 1, 24, 24, 1.01);
}

// The places whose bounds are lowest may be too small for any plan; what searching them comes to must not decide what
// is found for the others, or a step takes longer in some budgets than in smaller ones.
static void test_places_too_small(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  open_config(&c, 0);
  c.train.ema_every = 1;
  compare_with_less(&b, &c, 33, 42, 48, 1.005);
}

// What --plan says of a state on the host, of programs whose ops need not have what copies have.
static void test_state_is_said(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  Engine e;
  char *said = NULL;
  size_t length;
  open_config(&c, 1);
  record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS, 1e3, NULL);
  FILE *f = open_memstream(&said, &length);
  engine_print_state(&e, f);
  fclose(f);
  if (!strstr(said, "EMA and moments on the host")) fail_msg("%s", said);
  free(said);
  engine_free(&e);
}

// What a place is said to cost and leave is what its programs do.
static void test_rooms(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  for (int i = 0; i < 2 * MODELS; i++) {
    const int m = i / 2;
    Engine e;
    Place *place;
    Room *room;
    int64_t forward[SPACE_COUNT];
    open_config(&c, m);
    c.train.ema_every = 3;
    c.kernels.streams = i % 2 ? STREAMS_SINGLE : STREAMS_MULTI;
    record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, 1e3, NULL);
    memcpy(forward, e.bytes, sizeof forward);
    forward[SPACE_ARENA] = 0;
    int n = engine_places(&e, &place, &room);
    assert_int_equal(n, 1 + 2 * STATE_SHARES);
    assert_int_equal(e.model.state, STATE_DEVICE);
    for (int p = 0; p < n; p++) {
      engine_place_state(&e, place[p], forward, 1);
      Room real = engine_room(&e);
      assert_int_equal(room[p].arena, real.arena);
      double seconds = predict_update(&e);
      if (!(fabs(room[p].seconds / seconds - 1) < .1))
        fail_msg("%s, state %d, %lld kept: %g s, %g", models[m].file, place[p].state, (long long)place[p].kept,
                 room[p].seconds, seconds);
      if (p) assert_true(room[p].arena >= room[p - 1].arena && room[p].seconds >= room[p - 1].seconds * (1 - 1e-9));
    }
    free(place);
    free(room);
    engine_free(&e);
  }
}

// What does not travel is worked on while what does travels: a little of the EMA on the host costs nothing.
static void test_hidden_by_the_rest(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  open_config(&c, 0);
  Engine e;
  record(&e, &b, &c, MEMORY_KEEP, STATE_DEVICE, 1e3, NULL);
  int64_t forward[SPACE_COUNT];
  memcpy(forward, e.bytes, sizeof forward);
  for (MemoryState s = STATE_DEVICE; s <= STATE_MOMENTS; s++) {
    engine_place_state(&e, (Place){s, s > STATE_DEVICE ? e.model.params.total * 15 / 16 / 64 * 64 : 0}, forward, 1);
    const Program *p = s == STATE_MOMENTS ? e.update : e.update_ema;
    Simulation x = predict_program(&e.costs, p);
    if (s > STATE_DEVICE) assert_true(x.busy[LANE_H2D] > 0 && x.busy[LANE_D2H] > 0);
    // Of moments more travels than the ops of this update hide.
    double one_by_one = x.busy[LANE_COMPUTE] + fmax(x.busy[LANE_H2D], x.busy[LANE_D2H]);
    assert_true(s < STATE_MOMENTS ? x.stalled <= .02 * x.seconds : x.seconds < .85 * one_by_one);
  }
  // With all of it there the link is what takes the time, in both directions at once.
  engine_place_state(&e, (Place){STATE_MOMENTS, 0}, forward, 1);
  Simulation x = predict_program(&e.costs, e.update);
  assert_true(x.busy[LANE_H2D] > .95 * x.seconds && x.busy[LANE_D2H] > .95 * x.seconds);
  engine_free(&e);
}

// In one queue nothing hides a copy: what is planned with, and said before a run, is what a run takes then.
static void test_one_queue(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  Engine e;
  open_config(&c, 0);
  for (int overlapped = 0; overlapped < 2; overlapped++) {
    c.kernels.streams = STREAMS_SINGLE;
    c.kernels.update = overlapped ? UPDATE_OVERLAPPED : UPDATE_SEQUENTIAL;
    record(&e, &b, &c, MEMORY_OFFLOAD, overlapped ? STATE_DEVICE : STATE_MOMENTS, 1e3, NULL);
    const Program *played[] = {e.first.program, e.opening[1].program, e.update, e.update_ema};
    for (size_t i = 0; i < sizeof played / sizeof *played; i++) {
      if (!played[i]) continue;
      Simulation s = predict_program(&e.costs, played[i]);
      double sum = 0;
      for (int k = 0; k < played[i]->n_ops; k++) sum += op_seconds(&e.costs, played[i], &played[i]->ops[k]);
      assert_true(fabs(s.seconds - sum) <= 1e-6 * sum);
    }
    engine_free(&e);
  }
  c.kernels.update = UPDATE_SEQUENTIAL;
  double least = needs(&b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS), most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE),
         before = INFINITY;
  for (int i = 1; i <= 8; i++) {
    record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, least + (most - least) * i / 8, NULL);
    double seconds = seconds_of(&e);
    if (!(seconds <= 1.01 * before)) fail_msg("in %g GB: %g s, %g with less", c.memory.budget_gb, seconds, before);
    before = seconds;
    engine_free(&e);
  }
}

// Every program but the step's own has its arena behind them.
static void check_behind_gradients(const Engine *e) {
  const Program *beside[] = {e->update, e->update_ema, e->ema_in, e->ema_out};
  for (size_t i = 0; i < sizeof beside / sizeof *beside; i++)
    assert_true(engine_gradients_in_arena(e) + beside[i]->arena_bytes <= e->bytes[SPACE_ARENA]);
  for (int i = 0; i < e->n_forward; i++) {
    const Program *p = e->forward[i].m.program; // weights may be laid aside there meanwhile
    assert_true(!p->shares_gradients && engine_gradients_in_arena(e) + p->arena_bytes <= e->bytes[SPACE_ARENA]);
  }
}

// Gradients that lie where activations have lain leave room for as much of the state, which then need not be on the
// host; and what passes through the update there lies beside them.
static void test_shared_gradients(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  int less_away = 0;
  open_config(&c, 0);
  for (MemoryState s = STATE_DEVICE; s <= STATE_GRADIENTS; s++) {
    double gb[2];
    for (int shares = 0; shares < 2; shares++) {
      c.memory.share_gradients = shares;
      gb[shares] = needs(&b, &c, MEMORY_KEEP, s);
    }
    Engine e;
    record(&e, &b, &c, MEMORY_KEEP, s, 1e3, NULL);
    const int64_t gradients = engine_gradients_in_arena(&e);
    assert_int_equal(gradients > 0, s < STATE_GRADIENTS); // which leave in the backward pass
    assert_true(gradients == 0 || (gradients == e.bytes[SPACE_GRADS] && !engine_counts(&e, SPACE_GRADS)));
    assert_true(gb[1] <= gb[0] - .6e-9 * (double)gradients && gb[1] >= gb[0] - 1e-9 * (double)gradients);
    check_behind_gradients(&e);
    engine_free(&e);
  }
  // Be there ever so few activations.
  for (int tokens = 512; tokens <= 4096; tokens *= 2) {
    Engine e;
    c.data.micro_batch_tokens = tokens;
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, 1e3, NULL);
    check_behind_gradients(&e);
    engine_free(&e);
  }
  open_config(&c, 0);
  double most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE), least = needs(&b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS);
  for (int i = 1; i < 5; i++) {
    double away[2], seconds[2];
    for (int shares = 0; shares < 2; shares++) {
      Engine e;
      c.memory.share_gradients = shares;
      record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, least + .2 * i * (most - least), NULL);
      assert_true(engine_device_bytes(&e) <= e.budget);
      away[shares] = (double)engine_state_on_host(&e);
      seconds[shares] = seconds_of(&e);
      engine_free(&e);
    }
    assert_true(away[1] <= away[0] && seconds[1] < 1.002 * seconds[0]);
    less_away += away[1] < away[0] && seconds[1] < .95 * seconds[0];
  }
  assert_true(less_away > 1);
}

// As much is saved where processes sum them, bucket by bucket, or share them out.
static void test_sharing_processes(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  open_config(&c, 0);
  for (c.parallel.zero = 0; c.parallel.zero < 3; c.parallel.zero++) {
    double gb[2];
    c.processes = 2;
    for (int shares = 0; shares < 2; shares++) {
      c.memory.share_gradients = shares;
      gb[shares] = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE);
    }
    Engine e;
    record(&e, &b, &c, MEMORY_KEEP, STATE_DEVICE, 1e3, NULL);
    assert_true(gb[1] <= gb[0] - .6e-9 * (double)engine_gradients_in_arena(&e));
    engine_free(&e);
  }
  // Sums are of what lies between parameters and behind them too, where nothing else may then.
  static const char *const odd[] = {"data.tokenizer=bytes", "model.dim=24", "model.head_dim=10", "model.cond_dim=12"};
  Error err;
  for (int zero = 0; zero < 3; zero++) {
    Engine e;
    assert_int_equal(config_load(&c, "configs/demo.json", odd, 4, &err), 0);
    c.processes = 5;
    c.parallel.zero = zero;
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, 1e3, NULL);
    assert_true(e.first.program->shares_gradients);
    if (order_check(e.first.program, &err) != 0) fail_msg("zero %d: %s", zero, err.text);
    engine_free(&e);
  }
}

// Gradients have a slab of their own where an update beside the next forward pass reads them, where those of several
// micro-batches add up, and without an arena.
static void test_not_shared(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  for (int i = 0; i < 3; i++) {
    Engine e;
    open_config(&c, 0);
    c.kernels.update = i == 0 ? UPDATE_OVERLAPPED : UPDATE_SEQUENTIAL;
    c.train.micro_batches = i == 1 ? 2 : 1;
    c.memory.arena = i != 2;
    record(&e, &b, &c, MEMORY_KEEP, STATE_DEVICE, 1e3, NULL);
    assert_true(engine_gradients_in_arena(&e) == 0 && engine_counts(&e, SPACE_GRADS));
    assert_false(e.first.program->shares_gradients);
    engine_free(&e);
  }
}

// With as many tokens as are named where memory is short it is enough, be what fills the arena gradients or not.
static void test_ways_out(void **state) {
  (void)state;
  const Backend b = paper_device();
  for (int i = 0; i < 8; i++) {
    static Config c;
    Engine e;
    Error err;
    int tokens = 0;
    open_config(&c, 0);
    c.memory.share_gradients = i % 2;
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, 1e3, NULL);
    double need = (double)engine_device_bytes(&e),
           save = (double)(e.bytes[SPACE_ARENA] - engine_gradients_in_arena(&e));
    engine_free(&e);
    const double budget = 1e-9 * (need - (.1 + .2 * (i / 2)) * save);
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, budget, NULL);
    assert_int_equal(engine_check_budget(&e, &err), -1);
    engine_free(&e);
    assert_true((strstr(err.text, " GB of activations and gradients under ") != NULL) == i % 2);
    const char *at = strstr(err.hint, "about --tokens ");
    assert_true(at && sscanf(at, "about --tokens %d", &tokens) == 1 && tokens < c.data.micro_batch_tokens);
    c.data.micro_batch_tokens = tokens;
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, budget, NULL);
    if (engine_check_budget(&e, &err) != 0) fail_msg("%d tokens: %s", tokens, err.text);
    engine_free(&e);
    record(&e, &b, &c, MEMORY_RECOMPUTE, STATE_DEVICE, 1e-9 * (need - 1.2 * save), NULL);
    assert_int_equal(engine_check_budget(&e, &err), -1);
    assert_non_null(strstr(err.hint, i % 2 ? "no --tokens is, for state and gradients alone need "
                                           : "no --tokens is, for state alone needs "));
    engine_free(&e);
  }
}

static size_t much_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)kind, (void)dims, (void)args;
  return 3 << 28;
}

// What only the ops of training need as scratch is no room for activations.
static void test_scratch(void **state) {
  (void)state;
  Backend b = paper_device();
  static Config c;
  open_config(&c, 0);
  b.scratch[OP_ATTENTION_ROPE_BWD] = much_scratch;
  double most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE), least = needs(&b, &c, MEMORY_RECOMPUTE, STATE_DEVICE);
  for (int i = 0; i < 4; i++) {
    Engine e;
    record(&e, &b, &c, MEMORY_AUTO, i % 2 ? STATE_AUTO : STATE_DEVICE, least + (most - least) * (i + 1) / 5, NULL);
    assert_true(engine_device_bytes(&e) <= e.budget && e.plan.tried > 0);
    assert_true(e.model.state < STATE_GRADIENTS);
    engine_free(&e);
  }
}

// A plan of before goes where there is room for it, and gives way where there is none.
static void test_given(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  open_config(&c, 0);
  double most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE), least = needs(&b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS);
  double budget = .6 * least + .4 * most;
  Engine e;
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, budget, NULL);
  assert_true(e.model.state > STATE_DEVICE);
  const Place place = {e.model.state, e.model.kept};
  PolicyTable plan = policy_table_copy(&e.policy);
  engine_free(&e);
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, budget, &plan);
  assert_true(e.plan.was_given && e.model.state == place.state && e.model.kept == place.kept);
  engine_free(&e);
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, budget + .2 * (most - least), &plan);
  assert_true(e.plan.was_given);
  assert_true(e.model.state < place.state || (e.model.state == place.state && e.model.kept >= place.kept));
  engine_free(&e);
  memset(plan.of, POLICY_KEEP, (size_t)plan.layers * SAVED_COUNT);
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, least + 1e-3, &plan);
  assert_true(!e.plan.was_given && engine_device_bytes(&e) <= e.budget);
  engine_free(&e);
  policy_table_free(&plan);
}

// More than most hosts have: gradients leave, and that is the only place there is.
static void test_no_room_anywhere(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  Error err;
  const char *sets[] = {"data.tokenizer=bytes", "model.layers=2", "model.vocab=1048576", "model.dim=4096"};
  if (config_load(&c, "configs/base.json", sets, 4, &err) != 0) fail_msg("%s", err.text);
  Engine e;
  Place *place;
  Room *room;
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, 10, NULL);
  assert_int_equal(e.model.state, STATE_GRADIENTS);
  assert_int_equal(engine_places(&e, &place, &room), 1);
  assert_int_equal(place[0].state, STATE_GRADIENTS);
  free(place);
  free(room);
  engine_free(&e);
  // Nor is it one where the device has room for what stays with the moments on the host.
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, needs(&b, &c, MEMORY_RECOMPUTE, STATE_MOMENTS) + 1, NULL);
  assert_int_equal(e.model.state, STATE_GRADIENTS);
  engine_free(&e);
}

static double cpu_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void test_takes_little_time(void **state) {
  (void)state;
  const Backend b = paper_device();
  static Config c;
  Error err;
  const char *sets[] = {"data.tokenizer=bytes", "model.layers=64", "model.dim=512", "model.heads=4"};
  if (config_load(&c, "configs/base.json", sets, 4, &err) != 0) fail_msg("%s", err.text);
  double most = needs(&b, &c, MEMORY_KEEP, STATE_DEVICE), least = needs(&b, &c, MEMORY_RECOMPUTE, STATE_DEVICE);
  Engine e;
  double before = cpu_seconds();
  record(&e, &b, &c, MEMORY_AUTO, STATE_AUTO, .3 * most + .7 * least, NULL);
  double took = cpu_seconds() - before;
  print_message("64 layers, state and activations: %d plans tried in %.2f s of one core\n", e.plan.tried, took);
  assert_true(e.plan.tried > 1 && engine_device_bytes(&e) <= e.budget && took < 5); // sanitizers take many times that
  engine_free(&e);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_best_of_places),
      cmocka_unit_test(test_places_in_vain),
      cmocka_unit_test(test_places_too_small),
      cmocka_unit_test(test_state_is_said),
      cmocka_unit_test(test_rooms),
      cmocka_unit_test(test_hidden_by_the_rest),
      cmocka_unit_test(test_one_queue),
      cmocka_unit_test(test_shared_gradients),
      cmocka_unit_test(test_sharing_processes),
      cmocka_unit_test(test_not_shared),
      cmocka_unit_test(test_ways_out),
      cmocka_unit_test(test_scratch),
      cmocka_unit_test(test_given),
      cmocka_unit_test(test_no_room_anywhere),
      cmocka_unit_test(test_takes_little_time),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
