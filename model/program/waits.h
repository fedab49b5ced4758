// Address overlaps -> waits; and the proof that they are enough.
#ifndef TESSERA_WAITS_H
#define TESSERA_WAITS_H
#include "model/program/program.h"

// Fills ops[].waits: for each op, of every other lane the latest op it conflicts with (ranges that overlap, one of the
// two writing), unless that is implied by what its lane, or another of its waits, already waited for.
void waits_derive(Program *p);

// The proof, by another algorithm: (1) any two ops with overlapping ranges, one writing, are ordered by lanes and
// waits; (2) every read of the arena and the host slab, and every output, sees its own tensor: since that tensor's
// first write nothing else has written to its range. Returns 0, or -1 with the two ops and tensors named in *err.
int waits_verify(const Program *p, Error *err);
#endif
