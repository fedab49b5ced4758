// A compiled program's addresses, and its ops run.
#ifndef TESSERA_REPLAY_H
#define TESSERA_REPLAY_H

#include "model/program/program.h"

// Memory of a program's spaces. A NULL arena with `separate` set: each arena tensor gets its own allocation
// (memory.arena: false), so that sanitizers see every bound.
//
// A slab may lie in two memories: its first host_bytes in host[], all others in of[].
typedef struct Bases {
  void *of[SPACE_COUNT], *host[SPACE_COUNT];
  int64_t host_bytes[SPACE_COUNT];
  int separate;
} Bases;
// Where the byte at an offset of a space is; NULL: the space is not bound.
static inline char *bases_at(const Bases *b, Space space, int64_t offset) {
  int64_t first = b->host_bytes[space];
  char *base = offset < first ? b->host[space] : b->of[space];
  return base ? base + (offset < first ? offset : offset - first) : NULL;
}

// Gives every operand its address. The arena and the host slab need arena_bytes and host_bytes, aligned to 256. May be
// called again with other bases. Panics when a space the program uses has no base.
void program_bind(Program *p, const Bases *bases);
// Address of a tensor after program_bind. A tensor of the arena must be a program_output: others are gone when a replay
// ends (panics).
void *program_address(const Program *p, TensorId t);

// When an op ran, in seconds from the beginning of its replay.
typedef struct OpTime {
  double begin, end;
} OpTime;

// Runs the ops in recorded order; makes no allocation. times: [n_ops], or NULL. A backend with queues gets all ops at
// once, each lane's in its own queue with the waits between them, and may still be at work when this returns; with
// `times` it is waited for, and no graph is used. When built with AddressSanitizer, an op can touch its own operands
// and no other byte of the arena and the host slab.
void program_replay(Program *p, OpTime *times);

// Replays in a random order that lanes and waits allow. Every range of the arena and the host slab holds NaN bytes
// before its tensor is written and again after its last user has run. For tests; host memory only.
void program_replay_random(Program *p, uint64_t seed);
#endif
