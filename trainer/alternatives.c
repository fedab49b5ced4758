#include "trainer/alternatives.h"

#include "model/program/planner.h"
#include "model/program/policy.h"

#include <math.h>

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

static void print_policy(const char *name, const PlanOutcome *o, const ChooseTask *t, FILE *f) {
  fprintf(f, "  %-10s %9.2f ms  arena %8.3f GB  host %8.3f GB%s\n", name, 1e3 * o->time.seconds, (double)o->arena / 1e9,
          (double)o->host / 1e9, o->arena > t->arena || o->host > t->host ? "  does not fit" : "");
}

void alternatives_print(const Engine *e, FILE *f) {
  ChooseTask task = engine_choose_task(e);
  const PlanOutcome own = outcome_of(&task, &e->policy);
  print_rates(e, f);
  planner_print_costs(e->first.program, &e->costs, f);
  fprintf(f, "passes of a micro-step, within %.3f GB of arena and %.3f GB of the host:\n", (double)task.arena / 1e9,
          (double)task.host / 1e9);
  print_policy("this plan", &own, &task, f);
  for (int policy = MEMORY_KEEP; policy <= MEMORY_OFFLOAD; policy++) {
    PolicyTable t = policy_table_new(task.layers, (MemoryPolicy)policy);
    t.least_copy = task.rules.least_copy;
    PlanOutcome o = outcome_of(&task, &t);
    print_policy(policy_name[policy - MEMORY_KEEP], &o, &task, f);
    policy_table_free(&t);
  }
  if (e->plan.bound > 0)
    fprintf(f, "  no plan that fits takes less than %.2f ms (this one %+.1f%%); %d tried in %.2f s\n",
            1e3 * e->plan.bound, 100 * (own.time.seconds / e->plan.bound - 1), e->plan.tried, e->plan.took);
  if (e->chosen != MEMORY_AUTO) return;
  task.arena += 1000000000;
  Chosen more = choose(&task);
  if (more.fits)
    fprintf(f, "  1 GB more of the device buys %.2f ms\n", 1e3 * fmax(0, own.time.seconds - more.outcome.time.seconds));
  policy_table_free(&more.policy);
}
