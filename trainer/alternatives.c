#include "trainer/alternatives.h"

#include "model/program/planner.h"
#include "model/program/policy.h"
#include "trainer/engine_internal.h"
#include "trainer/predict.h"

#include <math.h>
#include <stdlib.h>

static void print_rates(const Engine *e, FILE *f) {
  const Costs *c = &e->costs;
  fprintf(f,
          "reckoned with %.2f TB/s, %.0f TFLOP/s, a link of %.1f and %.1f GB/s to and from the host (%.1f, %.1f both "
          "at once)",
          c->rates.bytes / 1e12, c->rates.flops / 1e12, c->link.d2h / 1e9, c->link.h2d / 1e9, c->link.both_d2h / 1e9,
          c->link.both_h2d / 1e9);
  if (c->n_classes)
    fprintf(f, ", %d kinds of ops as measured\n", c->n_classes);
  else
    fputs("; no op was measured yet\n", f);
}

static int fits(const PlanOutcome *o, const Room *r) {
  return o->arena <= r->arena && o->host <= r->host;
}

static void print_policy(const char *name, const PlanOutcome *o, const Room *r, FILE *f) {
  fprintf(f, "  %-10s %9.2f ms  arena %8.3f GB  host %8.3f GB%s\n", name, 1e3 * o->time.seconds, (double)o->arena / 1e9,
          (double)o->host / 1e9, fits(o, r) ? "" : "  does not fit");
}

// What more memory, or none of the state on the host, would make of a step.
static void print_choices(Engine *e, const ChooseTask *task, double step, FILE *f) {
  Place *place;
  Room *room;
  int n = engine_places(e, &place, &room);
  if (e->model.state > STATE_DEVICE && place[0].state == STATE_DEVICE) {
    Chosen c = choose(task, room, 1);
    double seconds = room[0].seconds + task->passes * c.outcome.time.seconds;
    if (c.fits)
      fprintf(f, "  with all of the state on the device a step takes %.2f ms rather than %.2f\n", 1e3 * seconds,
              1e3 * step);
    else
      fputs("  with all of the state on the device nothing fits\n", f);
    policy_table_free(&c.policy);
  }
  for (int i = 0; i < n; i++) room[i].arena += 1000000000;
  Chosen more = choose(task, room, n);
  double seconds = room[more.room].seconds + task->passes * more.outcome.time.seconds;
  if (more.fits) fprintf(f, "  1 GB more of the device buys %.2f ms of a step\n", 1e3 * fmax(0, step - seconds));
  policy_table_free(&more.policy);
  free(place);
  free(room);
}

void alternatives_print(Engine *e, FILE *f) {
  const ChooseTask task = engine_choose_task(e);
  const Room room = engine_room(e);
  const PlanOutcome own = outcome_of(&task, &e->policy);
  print_rates(e, f);
  planner_print_costs(e->first.program, &e->costs, f);
  fprintf(f, "passes of a micro-step, within %.3f GB of arena and %.3f GB of the host:\n", (double)room.arena / 1e9,
          (double)room.host / 1e9);
  print_policy("this plan", &own, &room, f);
  for (int policy = MEMORY_KEEP; policy <= MEMORY_OFFLOAD; policy++) {
    PolicyTable t = policy_table_new(task.layers, (MemoryPolicy)policy);
    t.least_copy = task.rules.least_copy;
    PlanOutcome o = outcome_of(&task, &t);
    print_policy(policy_name[policy - MEMORY_KEEP], &o, &room, f);
    policy_table_free(&t);
  }
  if (e->plan.bound > 0 && fits(&own, &room))
    fprintf(f, "  no plan that fits takes less than %.2f ms (this one %+.1f%%); %d tried in %.2f s\n",
            1e3 * e->plan.bound, 100 * (own.time.seconds / e->plan.bound - 1), e->plan.tried, e->plan.took);
  if (e->chosen == MEMORY_AUTO) print_choices(e, &task, task.passes * own.time.seconds + predict_update(e), f);
}
