// Saves a run's state while it trains on: training stands still for the copy of the state to host memory alone, and a
// thread writes the checkpoint from there. Where the host has no room for the copy (checkpoint.copy), training stands
// still until it is written, through buffers of 192 MB at most. The files have the same bytes either way.
//
// Several processes write together: each its share of the moments, one the weights, another the EMA, whose shares come
// to it while training stands still. Rank 0 makes it a checkpoint once all have written. All of them call all of these
// functions at the same steps.
#ifndef TESSERA_SAVER_H
#define TESSERA_SAVER_H

#include "trainer/state.h"

typedef struct Saver Saver;

// For an allocated engine that trains, and the run's folder; both are borrowed. The memory of the copy is taken now,
// and found later. NULL with *err when checkpoint.copy is "always" and there is no room.
Saver *saver_open(Engine *e, const char *run, Error *err);

// Finds the memory of the copy on a thread, so that the first save need not; to be called when the first step has run,
// since the system gives many gigabytes slowly and to the loader last.
void saver_warm(Saver *s);

// Saves `state`, between two steps; no save may be under way. `began` (time_now): since when training stands still.
void saver_begin(Saver *s, const RunState *state, double began);

// Whether this process has written what it had to of a save that is under way.
int saver_has_written(const Saver *s);

// What became of the last save: 0 when it is on the disk, with a line in the log the first time, or when there was
// none, or when it is still being written and `wait` is 0. -1 with *err when it failed, once. Of several processes:
// `wait`, or to be called when all have written (saver_has_written); what one could not write is all of their failure,
// and rank 0 calls it once more for the end.
int saver_result(Saver *s, int wait, Error *err);

// Waits for a save that is under way, whose failure is then a warning; with several processes one that not all have
// written is lost. NULL is allowed.
void saver_close(Saver *s);
#endif
