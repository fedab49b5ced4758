// Address overlaps -> waits.
#ifndef TESSERA_WAITS_H
#define TESSERA_WAITS_H
#include "model/program/program.h"

// Fills ops[].waits: for each op, of every other lane the latest op it conflicts with (ranges that overlap, one of the
// two writing), unless that is implied by what its lane, or another of its waits, already waited for.
void waits_derive(Program *p);
#endif
