#include "model/program/choose.h"
#include "model/program/policy.h"
#include "trainer/engine_internal.h"
#include "trainer/predict.h"

#include <stdlib.h>
#include <string.h>

void engine_free_train_programs(Engine *e) {
  program_free(e->first.program);
  program_free(e->later.program);
  program_free(e->last.program);
  for (int i = 0; i < 2; i++) {
    program_free(e->opening[i].program);
    e->opening[i] = (ModelProgram){0};
  }
  e->first = e->later = e->last = (ModelProgram){0};
  policy_table_free(&e->policy);
}

// One policy for all tensors but those that memory.per_tensor names. -1 with *err where it names one wrongly; then
// *table is none.
static int policy_of_config(const Config *c, MemoryPolicy policy, PolicyTable *table, Error *err) {
  *table = policy_table_new(c->model.layers, policy);
  for (int i = 0; i < c->memory.per_tensors; i++) {
    const TensorPolicy *t = &c->memory.per_tensor[i];
    if (policy_table_set(table, t->name, t->policy, err) == 0) continue;
    policy_table_free(table);
    return -1;
  }
  return 0;
}

// A copy of fewer bytes is mostly its latency. A power of two, so that links measured twice agree.
static int64_t least_copy(const Costs *c) {
  const double bytes = 4 * c->link.latency * c->link.d2h;
  int64_t least = 1;
  while ((double)least < bytes) least *= 2;
  return least;
}

static Mode first_mode(const Engine *e) {
  return e->config->train.micro_batches > 1 ? MODE_TRAIN_FIRST : MODE_TRAIN_ONLY;
}

// Records the training programs under a policy table, which the engine takes over.
static void record_train(Engine *e, MemoryPolicy policy, PolicyTable table) {
  engine_free_train_programs(e);
  e->chosen = policy;
  e->policy = table;
  e->policy.least_copy = least_copy(&e->costs);
  // The last of several micro-steps is as those in the middle, unless gradients leave in it or are summed over
  // processes.
  const Config *c = e->config;
  int n = c->train.micro_batches, last = n > 1 && (e->model.state == STATE_GRADIENTS || c->processes > 1);
  const struct {
    ModelProgram *to;
    Mode mode;
    int needed;
  } variants[] = {
      {&e->first, first_mode(e), 1}, {&e->later, MODE_TRAIN_MIDDLE, n > 1 + last}, {&e->last, MODE_TRAIN_LAST, last}};
  for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
    if (variants[i].needed)
      *variants[i].to = transformer_record(&e->model, variants[i].mode, e->slots, e->segments, &e->policy);
  for (int ema = 0; engine_overlaps(e) && ema < 1 + (c->train.ema > 0); ema++) {
    Model model = e->model;
    model.opening = ema ? OPEN_UPDATE_EMA : OPEN_UPDATE;
    e->opening[ema] = transformer_record(&model, first_mode(e), e->slots, e->segments, &e->policy);
  }
  Program *all[] = {e->first.program, e->later.program, e->last.program, e->opening[0].program, e->opening[1].program};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (all[i]) engine_in_queues(e, all[i]);
}

// Records the training programs and measures them on top of `others`, the bytes of all other programs. 1: they fit.
static int try_policy(Engine *e, MemoryPolicy policy, PolicyTable table, const int64_t others[SPACE_COUNT]) {
  record_train(e, policy, table);
  memcpy(e->bytes, others, sizeof e->bytes);
  engine_measure(e, e->first.program);
  for (int i = 0; i < 2; i++)
    if (e->opening[i].program) engine_measure(e, e->opening[i].program);
  if (e->later.program) engine_measure(e, e->later.program);
  if (e->last.program) engine_measure(e, e->last.program);
  return engine_device_bytes(e) <= e->budget &&
         (engine_counts(e, SPACE_HOST) || e->bytes[SPACE_HOST] <= engine_host_budget(e));
}

static Program *record_plan(const void *engine, const PolicyTable *table) {
  const Engine *e = engine;
  return engine_in_queues(e, transformer_record(&e->model, first_mode(e), e->slots, e->segments, table).program);
}

ChooseTask engine_choose_task(const Engine *e) {
  const Config *c = e->config;
  PolicyTable keep, recompute;
  Error never; // memory.per_tensor was checked when the programs were recorded
  ChooseTask t = {.record = record_plan,
                  .model = e,
                  .layers = c->model.layers,
                  .passes = c->train.micro_batches,
                  .costs = &e->costs,
                  .rules = {.offload = !engine_counts(e, SPACE_HOST), .least_copy = least_copy(&e->costs)}};
  if (policy_of_config(c, MEMORY_KEEP, &keep, &never) != 0) panic("%s", never.text);
  if (policy_of_config(c, MEMORY_RECOMPUTE, &recompute, &never) != 0) panic("%s", never.text);
  for (int s = 0; s < SAVED_COUNT; s++) // what no policy for all changes is pinned; x is kept by both, and free
    t.rules.pinned[s] = keep.of[s] == recompute.of[s] && (s != SAVED_X || keep.of[s]) ? keep.of[s] : POLICY_COUNT;
  policy_table_free(&keep);
  policy_table_free(&recompute);
  return t;
}

int64_t engine_least_bytes(Engine *e, int train) {
  MemoryPolicy want = e->config->memory.policy;
  PolicyTable table;
  Error named_wrongly; // engine_choose_policy says it
  int64_t bytes[SPACE_COUNT], least;
  if (!train || policy_of_config(e->config, want == MEMORY_AUTO ? MEMORY_RECOMPUTE : want, &table, &named_wrongly) != 0)
    return engine_device_bytes(e);
  memcpy(bytes, e->bytes, sizeof bytes);
  Program *p = transformer_record(&e->model, first_mode(e), e->slots, e->segments, &table).program;
  engine_measure(e, p);
  least = engine_device_bytes(e);
  memcpy(e->bytes, bytes, sizeof bytes);
  program_free(p);
  policy_table_free(&table);
  return least;
}

// Whether a plan of before has what is pinned now, and offloads nothing where that helps nothing.
static int plan_obeys(const PolicyTable *t, const MenuRules *rules) {
  for (int i = 0; i < t->layers * SAVED_COUNT; i++) {
    int pinned = rules->pinned[i % SAVED_COUNT];
    if (pinned < POLICY_COUNT ? t->of[i] != pinned : t->of[i] == POLICY_OFFLOAD && !rules->offload) return 0;
  }
  return 1;
}

Room engine_room(const Engine *e) {
  return (Room){.arena = engine_arena_room(e), .host = engine_host_budget(e)};
}

// The place that costs least of those with room for the training programs as they are, or -1.
static int cheapest_place(const Engine *e, const Room *room, int n) {
  int64_t arena = 0, host = 0;
  int best = -1;
  const Program *all[] = {e->first.program, e->later.program, e->last.program};
  for (int i = 0; i < 3; i++) {
    if (all[i]) arena = max_i64(arena, all[i]->arena_bytes);
    if (all[i]) host = max_i64(host, all[i]->host_bytes);
  }
  for (int i = 0; i < n; i++)
    if (room[i].arena >= arena && room[i].host >= host && (best < 0 || room[i].seconds < room[best].seconds)) best = i;
  return best;
}

// Puts the state at `place` and takes the table for the training programs. 1: all fits.
static int go_by(Engine *e, Place place, PolicyTable table, const int64_t forward[SPACE_COUNT]) {
  int64_t others[SPACE_COUNT];
  engine_place_state(e, place, forward, 1);
  memcpy(others, e->bytes, sizeof others);
  table.costs = &e->costs;
  return try_policy(e, MEMORY_AUTO, table, others);
}

// The plan of before, where it is one of this config and there is a place with room for it. 1: taken.
static int take_given(Engine *e, const ChooseTask *task, const Place *place, const Room *room, int n,
                      const int64_t forward[SPACE_COUNT]) {
  if (!e->given || !plan_obeys(e->given, &task->rules)) return 0;
  PolicyTable table = policy_table_copy(e->given);
  table.costs = &e->costs;
  record_train(e, MEMORY_AUTO, table);
  int at = cheapest_place(e, room, n);
  e->plan.was_given = at >= 0 && go_by(e, place[at], policy_table_copy(e->given), forward);
  return e->plan.was_given;
}

// Chooses among these places, of which the list keeps those that were not in vain. 1: a plan fits.
static int choose_among(Engine *e, Place *place, Room *room, int n, const int64_t forward[SPACE_COUNT]) {
  enum { IN_VAIN = 4 }; // choices
  const ChooseTask task = engine_choose_task(e);
  double began = time_now();
  if (take_given(e, &task, place, room, n, forward)) return 1;
  for (int vain = 0, tried = 0;; vain++) {
    Chosen c = choose(&task, room, n);
    int fits = go_by(e, place[c.room], c.policy, forward);
    tried += c.tried;
    e->plan = (EnginePlan){.bound = c.bound, .tried = tried, .took = time_now() - began};
    if (fits || !c.fits || n == 1 || vain == IN_VAIN - 1) return fits;
    // The passes fit, but where a place ends within a bucket, what the update has in the arena may need more of it than
    // the place was listed with.
    n--;
    memmove(&place[c.room], &place[c.room + 1], (size_t)(n - c.room) * sizeof *place);
    memmove(&room[c.room], &room[c.room + 1], (size_t)(n - c.room) * sizeof *room);
  }
}

// "auto" keeps everything where that fits. Else it takes the plan that was given, where that still does, or chooses.
int engine_choose_policy(Engine *e, const int64_t forward[SPACE_COUNT], Error *err) {
  MemoryPolicy want = e->config->memory.policy;
  int64_t others[SPACE_COUNT], elsewhere[SPACE_COUNT]; // bytes of all other programs, of those that no place changes
  PolicyTable table;
  Place *place;
  Room *room;
  memcpy(others, e->bytes, sizeof others);
  memcpy(elsewhere, forward, sizeof elsewhere);
  if (policy_of_config(e->config, want, &table, err) != 0) return -1;
  if (want == MEMORY_AUTO) table.costs = &e->costs; // what is pinned to be offloaded is copied by the clock
  e->plan = (EnginePlan){0};
  if (try_policy(e, want == MEMORY_AUTO ? MEMORY_KEEP : want, table, others) || want != MEMORY_AUTO) return 0;
  // Any plan's ops are these, and so is their scratch, which a room for activations must leave.
  others[SPACE_SCRATCH] = elsewhere[SPACE_SCRATCH] = e->bytes[SPACE_SCRATCH];
  memcpy(e->bytes, others, sizeof others);
  int n = engine_places(e, &place, &room), fits = choose_among(e, place, room, n, elsewhere);
  if (!fits && engine_chooses_state(e)) {
    Place last = engine_last_place(e, elsewhere);
    Room left = engine_room(e);
    fits = choose_among(e, &last, &left, 1, elsewhere);
  }
  free(place);
  free(room);
  if (e->given && fits && !e->plan.was_given) log_info("the run's plan (" PLAN_FILE ") does not fit: planning again");
  return 0;
}

// Gives a laid out space as many bytes as it needs now.
static int space_fit(Engine *e, Space space, int64_t had) {
  if (e->bytes[space] <= had || !e->config->memory.arena) return 0;
  if (e->bases.of[space]) engine_space_release(e, space);
  e->bases.of[space] = engine_space_allocate(e, space);
  return e->bases.of[space] ? 0 : -1;
}

int engine_plan_again(Engine *e, Error *err) {
  if (e->chosen != MEMORY_AUTO) return 0;
  const double worth = .997; // of a micro-step's time: below that graphs need not be captured again
  const ChooseTask task = engine_choose_task(e);
  const Room room = engine_room(e);
  PlanOutcome present = outcome_of(&task, &e->policy);
  double began = time_now();
  Chosen c = choose(&task, &room, 1);
  if (!c.fits || c.outcome.time.seconds > worth * present.time.seconds) {
    policy_table_free(&c.policy);
    return 0;
  }
  int64_t had[SPACE_COUNT];
  memcpy(had, e->bytes, sizeof had);
  try_policy(e, MEMORY_AUTO, c.policy, had);
  e->plan = (EnginePlan){.bound = c.bound, .tried = c.tried, .took = time_now() - began};
  if (space_fit(e, SPACE_ARENA, had[SPACE_ARENA]) != 0 || space_fit(e, SPACE_HOST, had[SPACE_HOST]) != 0)
    return error_set(err, "lower memory.budget_gb or memory.host_gb", "out of memory for the plan by measured times");
  engine_bind(e);
  log_info("planned again by measured times: %.2f ms a micro-step instead of %.2f ms", 1e3 * c.outcome.time.seconds,
           1e3 * present.time.seconds);
  return 1;
}

static int host_waits(const Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (p->backend->host_waits[p->ops[i].kind]) return 1;
  return 0;
}

// Whether copies hold its ops up for more than a hundredth of its time, and these are so long that launching each is
// hidden behind them. Captured, such a program took 5% longer (base in 16.5 GB: ops of 270 us on an H200); one of ops
// of 14 us (small in 2.08 GB) did not. Of several processes each would go by its own predictions, and they launch what
// they do together in one way: all capture.
static int faster_op_by_op(const Engine *e, const Program *p) {
  const double long_op = 50e-6; // seconds, some ten times what a launch takes of the host
  if (!program_has_copies(p) || e->config->processes > 1) return 0;
  Simulation s = predict_program(&e->costs, p);
  return s.stalled > .01 * s.seconds && s.seconds > long_op * p->n_ops;
}

int engine_captures(const Engine *e, const Program *p) {
  return !host_waits(p) && !faster_op_by_op(e, p);
}
