// A run's state to and from checkpoints: weights, EMA, moments, counters, loader position.
#ifndef TESSERA_STATE_H
#define TESSERA_STATE_H

#include "model/checkpoint.h"
#include "model/optimizer.h"
#include "trainer/engine.h"

typedef struct RunState {
  int64_t step; // steps done
  OptimizerState optimizer;
  char *loader;    // loader_state's JSON, malloc'd; NULL: the beginning
  char *tokenizer; // identity of the tokenizer (hash of what its ids stand for), malloc'd
} RunState;

// Saves everything a bit-exact resume needs to run/ckpt-STEP.
int state_save(const Engine *e, const RunState *s, const char *run, Error *err);
// Restores it from an open checkpoint. With `weights_only` (--init and the uses of a checkpoint) just weights and,
// where both sides have one, the EMA, leaving *s untouched.
int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err);
#endif
