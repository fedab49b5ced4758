// A finished program's lanes played forward in time: what a replay is expected to take, and what its transfers hold up.
#ifndef TESSERA_SIMULATE_H
#define TESSERA_SIMULATE_H

#include "model/program/replay.h"
#include "model/program/seconds.h"

typedef struct Simulation {
  double seconds;          // from the beginning to the last lane's end
  double busy[LANE_COUNT]; // of them, with an op of the lane at work
  double stalled;          // of them, with no op of the compute or update lane: it waits for a copy, or is done before
} Simulation;

// Plays the ops: each lane in order, an op from when its waits are over, seconds [n_ops] of each with nothing beside
// it; with one_queue all in recorded order. By the costs' link copies are slower while the other direction is busy too,
// and by copy_drag and the group's drag the compute lane while copies and collectives are; the compute and the update
// lane share the costs' multiprocessors. times [n_ops]: when each ran, or NULL.
Simulation simulate(const Program *p, const double *seconds, const Costs *costs, OpTime *times);
// Seconds that the compute lane loses to each second of a copy beside it: both use the device's memory. 0 where the
// rates are not known.
double copy_drag(const Costs *c);
// Of the seconds that copies ran, the share in which the compute lane went on; 1 without copies.
double simulation_hidden(const Simulation *s);
#endif
