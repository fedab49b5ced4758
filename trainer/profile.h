// --profile and --trace: when each op ran, as a table by kind of op and as a Chrome trace of one step.
//
// A timed step runs op by op, without captured graphs, and is waited for; times of ops are those of the device. Costs
// are those of the packs that were replayed, not of their capacity.
#ifndef TESSERA_PROFILE_H
#define TESSERA_PROFILE_H

#include "model/program/cost.h"
#include "model/program/replay.h"
#include "trainer/engine.h"

typedef struct Profile Profile;

// Times step `first`, which must have nothing left to warm up, and with `table` every step after it. trace: the file
// for a trace of step `first`, whose replays then follow each other, their times read afterwards; NULL: none. Engine
// and trace are borrowed.
Profile *profile_open(const Engine *e, bool table, const char *trace, int64_t first);
// Memory for the times of a replay of this program in this step, until the next call; NULL: the step is not timed, as
// none is where p is NULL.
OpTime *profile_times(Profile *p, const Program *program, int64_t step);
// Notes the replay that has just filled those times, of a pack with these extents (NULL: of the update). -1 with *err
// when the trace cannot be written.
int profile_note(Profile *p, const Program *program, const Extents *extents, int64_t step, Error *err);
// Logs the table, if one is wanted, and writes the trace; frees p, which may be NULL. -1 with *err likewise.
int profile_close(Profile *p, Error *err);
#endif
