// The files of tensors of a checkpoint, and where in the slabs each tensor belongs, of however many processes they are.
#ifndef TESSERA_STATE_FILES_H
#define TESSERA_STATE_FILES_H

#include "model/files/checkpoint.h"
#include "trainer/engine.h"

enum { STATE_FILES = 3 };

// A tensor of a file: elements [first, first + count) of a parameter of a slab.
typedef struct StatePiece {
  Space space;
  int param;
  int64_t first, count;
  int64_t at; // its first element in this process's slab, or in the whole that was put together
} StatePiece;

// Moments of which each process has a share lie in a file for each, optimizer-RANKxN, N being the processes. Of a
// parameter that is cut it holds elements as a row of numbers, named m.NAME[FIRST:END].
typedef struct StateFile {
  char name[48];
  int n;
  StatePiece *piece;  // [n]
  SafeTensor *tensor; // [n] without data
} StateFile;

// The files that this process writes of its engine's checkpoints. Those of EMA and moments only where it has them.
typedef struct StateLayout {
  int n;
  StateFile file[STATE_FILES];
} StateLayout;

StateLayout state_layout(const Engine *e);
void state_layout_free(StateLayout *l);

enum { STATE_DAMAGED = -2 };

// Loads the weights and the EMA, unless `weights_only` the moments too, into the engine's slabs: the part of state_load
// that concerns them, with what it returns.
int state_load_slabs(Engine *e, const Checkpoint *c, int weights_only, Error *err);
#endif
