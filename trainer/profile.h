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

// first: the first step to be timed, one that has nothing left to warm up. table: so is every step after it. trace: the
// file for a trace of that step, in which its replays follow each other without the reading of times between them, or
// NULL; borrowed, as is the engine, whose training programs must be recorded.
Profile *profile_open(const Engine *e, bool table, const char *trace, int64_t first);
// Where the replay of a program in this step leaves its times; NULL: it is not timed. p may be NULL: then so are all.
OpTime *profile_times(Profile *p, int64_t step);
// Notes the replay that has just filled those times, of a pack with these extents (NULL: of the update). -1 with *err
// when the trace cannot be written.
int profile_note(Profile *p, const Program *program, const Extents *extents, int64_t step, Error *err);
// Logs the table, if one is wanted, and writes the trace; frees p, which may be NULL. -1 with *err likewise.
int profile_close(Profile *p, Error *err);
#endif
