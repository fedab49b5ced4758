// Compares a run's steps with its plan. Ops are timed before the first step; where the steps after it differ too much
// from the prediction, ops are timed again. So they are in any case where they were timed on first weights, by
// which steps came out 2 to 9% too short on an H200 (docs/LOG.md). Several processes do all of this together, each for
// its own device.
#ifndef TESSERA_WATCH_H
#define TESSERA_WATCH_H

#include "trainer/engine.h"

enum { WATCHED_STEPS = 3 }; // behind one that warms up

typedef struct WatchedStep {
  double predicted, measured; // seconds
} WatchedStep;

typedef struct Watch {
  const char *run;     // its folder, for the costs; borrowed
  int is_on;           // on a device, where ops' times decide something
  int due;             // ops shall be timed before the next step
  int rounds;          // how often that was done
  int on_zeros;        // the last time, on first weights
  int has_again[2];    // the update without and with the EMA's was timed in a second round
  int64_t first;       // step that is watched, from 0
  int wanted, n;       // how many are, and were
  double predicted[2]; // seconds of a step without and with the EMA's update
  WatchedStep step[WATCHED_STEPS];
  OpTime *times; // [ops of the update]
} Watch;

// Of a run that begins with step `from`; with `profiled` its fourth step is timed op by op. Free with watch_close.
Watch watch_open(const Engine *e, const char *run, int64_t from, int profiled);
void watch_close(Watch *w);

// Whether watch_pack has something to do: the steps before must be collected then.
int watch_due(const Watch *w);
// Called before the first micro-step of `step`, with its pack. Times ops where that is due; where memory.policy auto
// chose, plans again by these times and keeps the plan. -1 with *err where there was no memory for another plan.
int watch_pack(Watch *w, Engine *e, const void *pack, const Extents *extents, int64_t step, Error *err);
// Where this step's update is to leave its ops' times, for watch_update; NULL: nowhere.
OpTime *watch_times(Watch *w, const Engine *e, const Program *update, int64_t step);
void watch_update(Watch *w, Engine *e, const Program *update);
// What a step took. After the last that is watched, the log says how well it was predicted, and what memory is in use.
void watch_step(Watch *w, Engine *e, int64_t step, double seconds);
#endif
