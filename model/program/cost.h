// What an op costs in FLOPs and bytes: the floor that a profile compares it with, and the input of a plan.
#ifndef TESSERA_COST_H
#define TESSERA_COST_H

#include "model/program/program.h"

// How much of a pack's capacity is used; costs are linear in it.
typedef struct Extents {
  double text, image; // rows
  double segments;    // image segments
  double targets;     // text rows with a target
  double pairs;       // (query, key) pairs that the mask allows
} Extents;
// FLOPs and bytes that must move at these extents: each operand once, one that accumulates twice (op_table.h).
void op_cost(const Program *p, const Op *op, const Extents *x, double *flops, double *bytes);
#endif
