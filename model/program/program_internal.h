// What recording, compiling and replaying share and nobody else needs.
#ifndef TESSERA_PROGRAM_INTERNAL_H
#define TESSERA_PROGRAM_INTERNAL_H

#include "model/program/program.h"

enum { ARENA_ALIGN = 256 };

// How a tensor comes back in the backward pass.
typedef struct Revival {
  Policy policy;  // of a saved tensor
  TensorId host;  // where it was offloaded to, or NO_TENSOR
  TensorId again; // its reload or rebuilt copy, once it was needed; NO_TENSOR before
  int needed;     // by the backward pass
  int busy;       // being rebuilt right now: a recipe that needs its own result is a bug
} Revival;

// Gradients of a layer, or of what lies outside of layers, in a shared arena: bytes [begin, end) of it, from op `first`
// to the end.
typedef struct GradientRange {
  int64_t begin, end;
  int first, layer;
} GradientRange;

// An op that rebuilds tensors in place of their producer.
typedef struct Recipe {
  OpKind kind;
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT]; // out: the tensors it rebuilds, NO_TENSOR where an output is scratch
  OpArgs args;
} Recipe;

struct ProgramState {
  int cap_tensors, cap_ops;
  Revival *revival;   // [n_tensors]
  TensorId *external; // [cap_external] tensors of other spaces by hash of where they lie, NO_TENSOR where there is none
  int n_external, cap_external;
  Recipe *recipes;
  int n_recipes, cap_recipes;
  GradientRange *gradients; // [n_gradients] where the program shares them, by address
  int n_gradients;
  double *seconds; // [n_ops] of each op by the policy table's costs, or NULL
  int *marks;      // op positions where program_layer changed the layer, ascending; marks[0] = 0
  int n_marks, cap_marks;
  int layer;
  int finished;
  void **address; // [n_tensors] after program_bind
  void **owned;   // [n_tensors] separate allocations, or NULL
  char *host;     // bound bases of the two spaces the program lays out, NULL where separate
  char *arena;
  char *awaited; // [n_ops] ops of another lane wait for it
  int uses_lane[LANE_COUNT];
  void *graph; // captured replay, or NULL
};

// Panics when program_finish was called already.
void program_check_open(const Program *p);
// Frees the separate allocations of program_bind, if any, and the captured graph.
void program_unbind(Program *p);
#endif
