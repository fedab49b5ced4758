// --verify-every: silent data corruption shows where a replay of the same micro-step gives other bits.
//
// A step is a function of its bits, with no float atomics and fixed orders of summation, so that the gradients of a
// micro-step that is replayed have the same hash, parameter by parameter. Where one differs the hardware computed
// wrong, or a kernel has a race; then what is needed to look into it is saved apart in the run's folder.
#ifndef TESSERA_VERIFY_H
#define TESSERA_VERIFY_H

#include "trainer/engine.h"

// To be called when `pack` was just run by e->first, before anything else is: replays it once and compares the hashes
// of all gradients. The engine is left as after the first run. 0: they are equal. -1 with *err naming step, parameters
// and backend: they are not; a third replay then decides, and run/corrupted-STEP gets what dump_step writes of it and
// hashes.json, {"step", "backend", "parameters": {NAME: [hash of each replay]}}. Both steps count from 1, as in the
// log.
int verify_micro_step(Engine *e, const Batch *pack, int64_t step, const char *run, Error *err);
#endif
