// A device on paper: programs can be recorded for it and planned, nothing runs.
#ifndef TESSERA_PAPER_DEVICE_H
#define TESSERA_PAPER_DEVICE_H

#include "model/program/choose.h"
#include "model/transformer.h"

// Stores as a GPU does and has an H200's rates.
Backend paper_device(void);

// A model recorded on it, and the task of planning its training.
typedef struct Paper {
  Config config;
  Backend backend;
  Model model;
  Costs costs;
  ChooseTask task; // any policy
  Room room;       // any amount of memory
} Paper;
// Fails the test where the config is wrong. The paper must stay where it is.
void paper_open(Paper *p, const char *file, const char *const *sets, int n_sets);
void paper_close(Paper *p);
// What one policy for all tensors comes to.
PlanOutcome paper_outcome(const Paper *p, MemoryPolicy policy);
#endif
