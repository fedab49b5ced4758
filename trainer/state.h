// A run's state to and from checkpoints: weights, EMA, moments, counters, loader position.
#ifndef TESSERA_STATE_H
#define TESSERA_STATE_H

#include "model/optimizer.h"
#include "trainer/state_files.h"

typedef struct RunState {
  int64_t step; // steps done
  OptimizerState optimizer;
  char *loader;    // loader_state's JSON, malloc'd; NULL: the beginning
  char *tokenizer; // identity of the tokenizer (hash of what its ids stand for), malloc'd
} RunState;

// state.json's part of what a bit-exact resume needs, and config.json for other tools (malloc'd).
char *state_json(const Engine *e, const RunState *s);
char *state_config(const Engine *e);

// Restores a run from an open checkpoint. With `weights_only` (--init and the uses of a checkpoint) just weights and,
// where the engine has one, the EMA, leaving *s untouched. -1 with *err: it is not of this model, tokenizer or seed,
// and nothing was changed. STATE_DAMAGED with *err: what was read is not what was saved; the engine's slabs then hold
// parts of it, *s is as it was. All processes call it and get the same.
int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err);

// The identity of the settings that decide what the stream of documents holds, 16 digits: a run that goes on with
// another has not the same bits. Sources, seed and tokenizer have identities of their own.
void state_data_identity(const Config *c, char out[17]);
#endif
