// memory.policy auto: which saved tensor of which layer is kept, recomputed or offloaded, and how much room the
// optimizer's state makes for that, so that a step is shortest while everything fits.
//
// A menu says what the policies of one layer come to. Prices of a byte that stays and of a byte that is copied, found
// so that the cheapest items at these prices just fit, give a bound that no plan can beat and the few items worth
// mixing. How many layers get which is counted out; the first layers get the copies, for theirs have the longest to be
// made both ways. Each such plan is recorded, scheduled, placed and played, which decides; then single layers change
// while that helps. Of several rooms the one with the lowest bound is searched first, then those whose bounds are below
// what was found. By the same costs the same plan is chosen.
#ifndef TESSERA_CHOOSE_H
#define TESSERA_CHOOSE_H

#include "model/program/menu.h"
#include "model/program/simulate.h"

// What a plan may use, and what a step takes beside its passes then. The more of the optimizer's state lies on the
// host, the more room there is, and the longer an update takes.
typedef struct Room {
  int64_t arena, host; // bytes
  double seconds;
} Room;

typedef struct ChooseTask {
  Program *(*record)(const void *model, const PolicyTable *policy); // a finished training program, the caller's to free
  const void *model;
  int layers, passes; // passes: replays of it in a step
  const Costs *costs;
  MenuRules rules;
} ChooseTask;

// What a plan comes to.
typedef struct PlanOutcome {
  Simulation time;
  int64_t arena, host; // bytes
  int64_t turn;        // bytes of the arena in use when most activations are alive
} PlanOutcome;

typedef struct Chosen {
  PolicyTable policy; // with the task's costs; free with policy_table_free
  PlanOutcome outcome;
  int room;     // which of those it is for
  int fits;     // 0: nothing does, and this is what needs the least memory of all that was tried
  double bound; // seconds: no plan that fits in this room is shorter, by these costs
  int tried;    // plans recorded
} Chosen;

// room: [rooms], rooms > 0; neighbours are alike, and the first is taken where another is hardly better.
Chosen choose(const ChooseTask *task, const Room *room, int rooms);
// What one plan comes to.
PlanOutcome outcome_of(const ChooseTask *task, const PolicyTable *policy);
#endif
