// What a step of an engine's programs will take, by its costs: its lanes played forward in time.
#ifndef TESSERA_PREDICT_H
#define TESSERA_PREDICT_H

#include "model/program/simulate.h"
#include "trainer/engine.h"

// One replay of a finished program.
Simulation predict_program(const Costs *c, const Program *p);
// Seconds of the mean update: with the EMA's, as often as that runs.
double predict_update(const Engine *e);
// Seconds of a step, with or without the EMA's update.
double predict_step(const Engine *e, int ema);
// Appends the line of --plan: what a step takes with its update and the mean share of the EMA's, the part of it that is
// spent on the update, and for the passes (activations, gradients that leave) and the update (state) the transfers and
// the share of them that ops hide.
void predict_print(const Engine *e, FILE *f);

// Of several processes: seconds of a mean step's collectives, and of those that no op hides: without queues, all.
typedef struct Collectives {
  double seconds, exposed;
} Collectives;
Collectives predict_collectives(const Engine *e);
// Appends the line of --plan about them, and the rates that they are reckoned with.
void predict_print_group(const Engine *e, FILE *f);
#endif
