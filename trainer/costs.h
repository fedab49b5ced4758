// Costs of a run's ops and copies: from the file in its folder or, before there is one, from the device's rates.
#ifndef TESSERA_COSTS_H
#define TESSERA_COSTS_H

#include "model/config/config.h"
#include "model/program/seconds.h"

// The file's name in the folder of a run.
#define COSTS_FILE "costs.json"

// Costs to plan with: those that a run in this folder measured before on this device, with this build, these sizes and
// as many processes; else the model's for the open device's link, where one is, and for the collectives of several
// processes, as both are measured here, which takes up to half a second. Every process of a group calls it. Free with
// costs_free.
Costs costs_open(const Config *c, const Backend *b, const char *run);
// The same for --plan, where no op will be timed: measures the device's rates too, in half a gigabyte of its memory.
// Collectives are assumed where processes have no devices, or cannot connect them.
Costs costs_open_plan(const Config *c, const Backend *b, const char *run);
// Writes them for the next start. -1 with *err where it cannot.
int costs_keep(const Config *c, const Backend *b, const char *run, const Costs *costs, Error *err);
#endif
