// What the ops and copies of a run take on its device, measured before its first step, and kept in a file beside it.
#ifndef TESSERA_MEASURE_H
#define TESSERA_MEASURE_H

#include "model/program/seconds.h"
#include "trainer/engine.h"

// The file's name in the folder of a run.
#define COSTS_FILE "costs.json"

// Reads what was measured for this device, build and these sizes before, from the folder of a run. 1: *c has it; 0 as
// in costs_load.
int measure_load(const Engine *e, const char *run, Costs *c);
int measure_save(const Engine *e, const char *run, const Costs *c, Error *err);

// Measures the open device's rates and its link, where it has them: before the slabs are allocated, which leave no
// room. Up to half a second.
void measure_device(const Backend *b, Costs *c);

// Times the training programs' ops on a pack with these extents, the first of the run, between engine_allocate and its
// first step: each program as it is and, where that fits in the same memory, with everything recomputed, so that every
// op that a plan may add is there. Only what was not measured yet. Replays leave gradients and metrics, which the step
// overwrites. Backends without queues are not measured: nothing is planned by what their ops take.
void measure_train(Engine *e, const void *pack, const Extents *extents, Costs *c);

// Notes the times of a program's ops in a step that is timed anyway: those of the update, which a replay for nothing
// but times would apply.
void measure_note(const Program *p, const OpTime *times, Costs *c);
#endif
