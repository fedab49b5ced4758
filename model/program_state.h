// What program.c, schedule.c and replay.c share and nobody else needs.
#ifndef TESSERA_PROGRAM_STATE_H
#define TESSERA_PROGRAM_STATE_H

#include "model/program.h"

enum { ARENA_ALIGN = 256 };

// How a tensor comes back in the backward pass.
typedef struct Revival {
  Policy policy;  // of a saved tensor
  TensorId host;  // where it was offloaded to, or NO_TENSOR
  TensorId again; // its reload or rebuilt copy, once asked for; NO_TENSOR before
  int needed;     // asked for
  int busy;       // being rebuilt right now: a recipe that needs its own result is a bug
} Revival;

// An op that rebuilds tensors in place of their producer.
typedef struct Recipe {
  OpKind kind;
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT]; // out: the tensors it rebuilds, NO_TENSOR where an output is scratch
  OpArgs args;
} Recipe;

struct ProgramState {
  int cap_tensors, cap_ops;
  Revival *revival; // [n_tensors]
  Recipe *recipes;
  int n_recipes, cap_recipes;
  int *marks; // op positions where program_layer changed the layer, ascending; marks[0] = 0
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

// Frees the separate allocations of program_bind, if any.
void program_unbind(Program *p);

// Operands of an op kind, from its table entry: 'name', 'name?' optional, 'name+' accumulating.
typedef struct Operand {
  char name[24];
  int optional, accumulates;
} Operand;
typedef struct Operands {
  int n_in, n_out;
  Operand in[OP_MAX_IN], out[OP_MAX_OUT];
} Operands;
Operands op_operands(OpKind kind);

// Bytes [begin, end) of a space that an op touches.
typedef struct Access {
  Space space;
  int64_t begin, end;
  int read, write;
  TensorId tensor; // NO_TENSOR: the live pack
} Access;
enum { OP_MAX_ACCESS = OP_MAX_IN + OP_MAX_OUT + 1 };
// Everything an op reads and writes, the live pack included; returns how many.
int op_access(const Program *p, const Op *op, Access access[OP_MAX_ACCESS]);

// Two accesses that must not be reordered: they overlap and one of them writes.
static inline int access_conflicts(const Access *a, const Access *b) {
  return (a->write || b->write) && a->space == b->space && a->begin < b->end && b->begin < a->end;
}
#endif
