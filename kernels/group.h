// Collectives over the process group (base/ranks.h) of tensors that pass through host memory, piece by piece. Sums are
// added in the order of ranks, so that they do not depend on who adds them, and are those of one process that adds the
// same values one by one.
#ifndef TESSERA_GROUP_H
#define TESSERA_GROUP_H

#include <stddef.h>
#include <stdint.h>

typedef struct GroupTensor {
  void *values; // [count]
  int64_t count;
  size_t element; // of sums 4 or 8: float or double
  int64_t share;  // elements of a rank's share that travel at a time
  char *room;     // host memory of group_room bytes
  // Copies bytes between values and room, either way; done when it returns.
  void (*copy)(void *to, const void *from, size_t bytes, void *stream);
  void *stream;
} GroupTensor;

size_t group_room(size_t element, int64_t share);

// As the ops of these names (op_table.h); called by all processes in the same order, from their main threads.
void group_all_reduce(const GroupTensor *t);
void group_reduce_scatter(const GroupTensor *t);
void group_all_gather(const GroupTensor *t);
#endif
