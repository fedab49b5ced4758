// Seconds of ops and copies on a device, which a plan minimises: measured there or, where nothing was, modelled from
// FLOPs, bytes and the device's rates.
#ifndef TESSERA_SECONDS_H
#define TESSERA_SECONDS_H

#include "model/program/cost.h"

// Ops of one class take equally long. They have the same kind, operands (present ones, sizes, accumulation) and
// arguments; columns and layers that arguments name may differ.
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
  GroupRates group;
  int processes;         // of that group
  int multiprocessors;   // that the compute and the update lane share; 0: they do not slow each other
  Extents extents;       // of a pack as the data fill it, which the model reckons with
  ClassSeconds *classes; // [n_classes], ascending by `of`
  int n_classes, room;
  double scale[OP_COUNT]; // of each kind: seconds measured over those of the model; 0: none was measured
} Costs;

// Costs by the model alone: the backend's assumed rates, for packs with these extents. Free with costs_free.
Costs costs_new(const Backend *b, const Extents *extents);
void costs_free(Costs *c);

uint64_t op_class(const Program *p, const Op *op);
// By the rates alone: the longer of FLOPs and bytes, at the share of the rate that this kind of op reaches, and a
// launch.
double op_model_seconds(const Costs *c, const Program *p, const Op *op);
// Seconds of an op while other lanes are idle. Compute lane: its class's measured time, else the model's time by its
// kind's scale. Copy lanes: its transfer. Comm lane: what a process sends, at its group's rates.
double op_seconds(const Costs *c, const Program *p, const Op *op);
// Seconds of a transfer on LANE_D2H or LANE_H2D; both: while the other of the two is busy.
double copy_seconds(const Costs *c, Lane lane, double bytes, int both);
// Whether the op's class was measured.
int costs_have(const Costs *c, const Program *p, const Op *op);
// Sums the compute lane's ops of a program: a step's part without transfers.
double program_seconds(const Costs *c, const Program *p);

// Adds a class, or replaces it.
void costs_put(Costs *c, const ClassSeconds *x);
// Records the measured seconds [n_ops] of a program's ops, copy lanes' excepted, in place of what was measured of their
// classes before.
void costs_note(Costs *c, const Program *p, const double *seconds);
// Ops timed one by one take longer than in a graph, by their events and launches. seconds_gap returns the seconds, at
// least 0, by which each op of the compute lane (with one_queue: of all) has to be shortened so that they sum up to
// `total`; seconds_close shortens all, each by half at most.
double seconds_gap(const Program *p, const double *seconds, double total);
void seconds_close(const Program *p, double *seconds, double gap);
#endif
