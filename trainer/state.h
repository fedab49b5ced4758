// A run's state to and from checkpoints: weights, EMA, moments, counters, loader position.
#ifndef TESSERA_STATE_H
#define TESSERA_STATE_H

#include "model/files/checkpoint.h"
#include "model/optimizer.h"
#include "trainer/engine.h"

typedef struct RunState {
  int64_t step; // steps done
  OptimizerState optimizer;
  char *loader;    // loader_state's JSON, malloc'd; NULL: the beginning
  char *tokenizer; // identity of the tokenizer (hash of what its ids stand for), malloc'd
} RunState;

enum { STATE_FILES = 3 };

// A file of tensors of a checkpoint: tensor i is parameter i % params of slab space[i / params].
typedef struct StateFile {
  const char *name;
  int spaces;
  Space space[2];
  int n;              // spaces * params
  SafeTensor *tensor; // [n] without data
} StateFile;

// The files of an engine's checkpoints. Those of its EMA and moments only where it has them.
typedef struct StateLayout {
  int n, params;
  StateFile file[STATE_FILES];
  char (*names)[72]; // of all tensors
} StateLayout;

StateLayout state_layout(const Engine *e);
void state_layout_free(StateLayout *l);

// state.json's part of what a bit-exact resume needs, and config.json for other tools (malloc'd).
char *state_json(const Engine *e, const RunState *s);
char *state_config(const Engine *e);

enum { STATE_DAMAGED = -2 };

// Restores a run from an open checkpoint. With `weights_only` (--init and the uses of a checkpoint) just weights and,
// where the engine has one, the EMA, leaving *s untouched. -1 with *err: it is not of this model, tokenizer or seed,
// and nothing was changed. STATE_DAMAGED with *err: what was read is not what was saved; the engine's slabs then hold
// parts of it, *s is as it was.
int state_load(Engine *e, RunState *s, const Checkpoint *c, int weights_only, Error *err);

// The identity of the settings that decide what the stream of documents holds, 16 digits: a run that goes on with
// another has not the same bits. Sources, seed and tokenizer have identities of their own.
void state_data_identity(const Config *c, char out[17]);
#endif
