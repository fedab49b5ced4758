// Between recording and replay: where copies run, how long tensors live, where they lie. Called by program_finish in
// this order.
//
// program_layer leaves marks in the op order; what lies between two marks is a stretch (a layer, forward or backward).
#ifndef TESSERA_SCHEDULE_H
#define TESSERA_SCHEDULE_H
#include "model/program/program.h"

// Moves every reload (copy of an offloaded tensor back, on the h2d lane) from where its tensor is needed to where it
// must begin, so that it runs while others compute; never before the copy to the host it reads. Reloads keep their
// order. With costs in the policy table: as late as the link allows without holding up the compute lane, all of them
// taken together. Without: to the beginning of the stretch before, whose lead bounds what is in flight: reloads that
// wait for use never hold more than the largest stretch needs.
void schedule_reloads(Program *p);

// First and last op position of every tensor. An output lives on to n_ops. A tensor copied to the host lives on until
// its copy is done by the costs, the link taking copies one after the other; without costs to the end of the stretch
// after the one that records the copy, so that the copy has a whole layer's time before its memory is wanted. A tensor
// that is read before anything has written it panics, naming op, operand and tensor.
void schedule_lifetimes(Program *p);

// Offsets of the arena's and the host slab's tensors from their lifetimes; arena_bytes, live_bytes, fullest,
// host_bytes.
void schedule_place(Program *p);
#endif
