// What ops and copies take on a device, in seconds: as measured there, or where nothing was, by a model from FLOPs,
// bytes and the device's rates. What a plan minimises.
#ifndef TESSERA_SECONDS_H
#define TESSERA_SECONDS_H

#include "model/program/cost.h"

// Ops of one class take equally long whatever their layer: equal kind, operands (which are there, their sizes, which
// accumulate) and arguments, but for the columns and layers that these name.
typedef struct ClassSeconds {
  uint64_t of; // op_class
  OpKind kind;
  double seconds; // of one op; the mean of those measured
  double model;   // of the same, by the model
  int measured;   // ops in that mean
} ClassSeconds;

typedef struct Costs {
  DeviceRates rates;
  LinkRates link;
  Extents extents;       // of a pack as the data fill it, which the model reckons with
  ClassSeconds *classes; // [n_classes], ascending by `of`
  int n_classes, room;
  double scale[OP_COUNT]; // of each kind: seconds measured over those of the model; 0: none was measured
} Costs;

// Costs by the model alone: the backend's assumed rates, for packs with these extents. Free with costs_free.
Costs costs_new(const Backend *b, const Extents *extents);
void costs_free(Costs *c);

uint64_t op_class(const Program *p, const Op *op);
// By the rates alone: the larger of FLOPs and bytes at the share of the rate that the kind of op reaches, and a launch.
double op_model_seconds(const Costs *c, const Program *p, const Op *op);
// What an op of the compute lane takes with nothing beside it: its class's measured time, else the model's times the
// scale of its kind. Of a copy lane: its transfer with the other direction at rest.
double op_seconds(const Costs *c, const Program *p, const Op *op);
// A transfer on LANE_D2H or LANE_H2D; both: while the other lane is busy too.
double copy_seconds(const Costs *c, Lane lane, double bytes, int both);
// Whether the op's class was measured.
int costs_have(const Costs *c, const Program *p, const Op *op);
// The compute lane's ops of a program one after the other: a step's part without transfers.
double program_seconds(const Costs *c, const Program *p);

// Adds a class, or replaces it.
void costs_put(Costs *c, const ClassSeconds *x);
// Notes what the ops of a program took, seconds [n_ops]; copy lanes' are left out. Classes that the program has lose
// what was measured of them before.
void costs_note(Costs *c, const Program *p, const double *seconds);
// Ops that are timed one by one take longer than in a graph: by the events around them, and where the device waits for
// their launch. The seconds that have to be taken from each of the compute lane's ops, so that they sum up to `total`;
// at least 0. No op loses more than half.
double seconds_gap(const Program *p, const double *seconds, double total);
void seconds_close(const Program *p, double *seconds, double gap);
#endif
