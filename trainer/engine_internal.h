// What the engine and its choice of a memory plan share.
#ifndef TESSERA_ENGINE_INTERNAL_H
#define TESSERA_ENGINE_INTERNAL_H

#include "trainer/engine.h"

// Has a program run, and be predicted, in as many queues as kernels.streams names; returns it.
Program *engine_in_queues(const Engine *e, Program *p);
// Adds what a program needs of the spaces that all share.
void engine_measure(Engine *e, const Program *p);
// Bytes at the arena's beginning where the gradients are (memory.share_gradients), behind which all programs but the
// step's have their arena; 0: they have a slab of their own.
int64_t engine_gradients_in_arena(const Engine *e);
// Bytes of the arena with which a program can run.
int64_t engine_arena_need(const Engine *e, const Program *p);
// Whether a space is memory of its own that counts against the budget. All programs share one arena and one host slab,
// which counts where host and device memory are one.
int engine_counts(const Engine *e, Space space);
// The largest arena with which engine_device_bytes is within the budget.
int64_t engine_arena_room(const Engine *e);
// Bytes of the optimizer's state in the host's memory, beside a device.
int64_t engine_state_on_host(const Engine *e);
// Bytes of pinned host memory that activations may take.
int64_t engine_host_budget(const Engine *e);
void *engine_space_allocate(const Engine *e, Space space);
void engine_space_release(const Engine *e, Space space);
// Binds all programs to the spaces as they are.
void engine_bind(Engine *e);

// engine_memory.c: names a space that could not be allocated; -1.
int engine_refuse_space(const Engine *e, Space space, Error *err);

// engine_plan.c: records the training programs as memory.policy says, on top of all others, which are measured; with
// "auto" for both, the optimizer's state goes where that makes a step shortest, else it stays where it is. `forward`:
// bytes of the forward-only programs. -1 with *err when memory.per_tensor names something wrongly.
int engine_choose_policy(Engine *e, const int64_t forward[SPACE_COUNT], Error *err);
void engine_free_train_programs(Engine *e);
// What the engine would need of the device with the smallest training programs that memory.policy allows.
int64_t engine_least_bytes(Engine *e, int train);
// What is left to the training programs beside all else.
Room engine_room(const Engine *e);
// Whether a program is to be a captured graph where kernels.graph has them.
int engine_captures(const Engine *e, const Program *p);

// engine_state.c: where the optimizer's state lies.
typedef struct Place {
  MemoryState state;
  int64_t kept; // model.h
} Place;
// Records the programs between passes for a place of the state, on top of `forward`; no bytes of training programs.
void engine_place_state(Engine *e, Place place, const int64_t forward[SPACE_COUNT], int train);
// Where the state may lie for training, and the room that this leaves: one place where memory.state says which; else
// the device, then more and more of it on the host, of the EMA and of the moments in STATE_SHARES steps, gradients
// excepted. Returns the number; free both.
enum { STATE_SHARES = 64 };
int engine_places(Engine *e, Place **place, Room **room);
// Whether any of it can be on the host: beside a device, and not shared out; and whether that is to be chosen.
int engine_may_leave(const Engine *e);
int engine_chooses_state(const Engine *e);
// Gradients on the host too, but for what fits beside the smallest need of activations.
Place engine_last_place(Engine *e, const int64_t forward[SPACE_COUNT]);
// Records all programs but the forward-only ones. -1 as above.
int engine_choose_state(Engine *e, int train, Error *err);
void engine_free_state_programs(Engine *e);
// Whether steps open with the update of the one before: not where that passes through the arena.
int engine_overlaps(const Engine *e);
// "EMA and moments on the host, 21.327 GB"; empty where all of the state is on the device. malloc'd.
char *engine_state_text(const Engine *e);
// The same for --plan, with what it costs a step.
void engine_print_state(const Engine *e, FILE *f);
#endif
