// What the ops of a run take on its device, timed before its first step.
#ifndef TESSERA_MEASURE_H
#define TESSERA_MEASURE_H

#include "model/program/seconds.h"
#include "trainer/engine.h"

// Times the training programs' ops on a pack with these extents, after engine_allocate and between steps: each program
// as it is and, where there is a plan to be made again and that fits in the same memory, with everything recomputed, so
// that every op that a plan may add is there. Only what e->costs lack, or with `again` all. Replays leave gradients and
// metrics, which the next step overwrites. Returns how many programs were timed; none where an op is done when its
// function returns, since nothing is planned by times there.
int measure_train(Engine *e, const void *pack, const Extents *extents, int again);

// Whether all ops of a program were timed.
int measure_has(const Costs *c, const Program *p);
// Notes the times of ops in a step that is timed anyway: those of the update, which a replay for its times would apply.
void measure_note(const Program *p, const OpTime *times, Costs *c);
#endif
