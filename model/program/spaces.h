// The memories that tensors live in, and what holds of each: one table, which all that allocates, places, prints,
// clears or saves them goes through.
#ifndef TESSERA_SPACES_H
#define TESSERA_SPACES_H

#include "kernels/kernels.h"

// The program lays out ARENA and HOST; the others are allocations of the trainer, and a tensor there has a fixed byte
// offset. In the order of the memory table.
typedef enum Space {
  SPACE_ARENA,
  SPACE_HOST, // where offloaded tensors go
  SPACE_WEIGHTS,
  SPACE_REMAINDER, // what the weights lack of their fp32 masters
  SPACE_GRADS,
  SPACE_MICRO_GRADS, // the gradient of one micro-step, where it is formed apart and then added
  SPACE_HOST_GRADS,  // gradients of layers, where they leave the device
  SPACE_PARAM_SUMS,  // a few numbers a parameter: sums over its gradient
  SPACE_ADAM_M,
  SPACE_ADAM_V,
  SPACE_EMA,
  SPACE_STAGING, // the next pack, as uploaded
  SPACE_BATCH,   // the live pack
  SPACE_METRICS,
  SPACE_SCALARS,
  SPACE_STATUS,
  SPACE_INPUT,   // what sampling feeds in place of the noised patches
  SPACE_SCRATCH, // what an op of the compute lane may use while it runs
  SPACE_COUNT
} Space;

enum {
  SPACE_LAID_OUT = 1, // by the program; without an arena, an allocation a tensor
  SPACE_ON_HOST =
      2, // beside a device memory of the host, which copy lanes reach at full speed, not in memory.budget_gb
  SPACE_CLEARED = 4, // zeros when a run begins; all others are written before they are read
  SPACE_SAVED = 8    // part of a checkpoint
};

// What an allocation holds.
typedef enum SpaceElement {
  SPACE_BYTES,     // tensors of any kind
  SPACE_ACT,       // DT_ACT for every parameter
  SPACE_REAL,      // DT_REAL for every parameter
  SPACE_MOMENTS,   // DT_MOMENT for every parameter
  SPACE_REMAINDERS // Backend.remainder_bytes for every parameter
} SpaceElement;

typedef struct SpaceInfo {
  const char *label; // in tables and messages
  SpaceElement element;
  int marks;
} SpaceInfo;
extern const SpaceInfo space_info[SPACE_COUNT];

static inline int space_has(Space space, int mark) {
  return (space_info[space].marks & mark) != 0;
}
// Bytes that a parameter takes there; 0: its bytes are no parameter's, or the backend keeps none.
size_t space_element(const Backend *b, Space space);
#endif
