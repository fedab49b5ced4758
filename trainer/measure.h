// Times the ops of a run on its device, before its first step.
#ifndef TESSERA_MEASURE_H
#define TESSERA_MEASURE_H

#include "model/program/seconds.h"
#include "trainer/engine.h"

// Times the training programs' ops on a pack with these extents, after engine_allocate and between steps: each program
// as it is and, where there is a plan to be made again and that fits in the same memory, with everything recomputed, so
// that every op that a plan may add is there. Only what e->costs lack, or with `again` all. Replays leave gradients and
// metrics, which the next step overwrites. Several processes time the same ones together. Returns how many programs
// were timed; none where an op is done when its function returns, since nothing is planned by times there.
int measure_train(Engine *e, const void *pack, const Extents *extents, int again);

// Whether all ops of a program were timed.
int measure_has(const Costs *c, const Program *p);
// Records the times of ops from a step that was timed op by op, and what the link carried in it in both directions at
// once: the update's, since replaying it just to time it would apply it.
void measure_note(const Program *p, const OpTime *times, Costs *c);
#endif
