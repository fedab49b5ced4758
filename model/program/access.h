// What an op reads and writes, as ranges of the spaces.
#ifndef TESSERA_ACCESS_H
#define TESSERA_ACCESS_H

#include "model/program/program.h"

// Bytes [begin, end) of a space that an op touches.
typedef struct Access {
  Space space;
  int64_t begin, end;
  int read, write;
  TensorId tensor; // NO_TENSOR: the live pack
} Access;
enum { OP_MAX_ACCESS = OP_MAX_IN + OP_MAX_OUT + 1 };
// Everything an op reads and writes, the live pack included; returns how many. Of gradients that share the arena the
// space is the arena.
int op_access(const Program *p, const Op *op, Access access[OP_MAX_ACCESS]);

// Two accesses that must not be reordered: they overlap and one of them writes.
static inline int access_conflicts(const Access *a, const Access *b) {
  return (a->write || b->write) && a->space == b->space && a->begin < b->end && b->begin < a->end;
}
#endif
