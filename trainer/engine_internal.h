// What the engine and its choice of a memory plan share.
#ifndef TESSERA_ENGINE_INTERNAL_H
#define TESSERA_ENGINE_INTERNAL_H

#include "trainer/engine.h"

// Adds what a program needs of the spaces that all share.
void engine_measure(Engine *e, const Program *p);
// Whether a space counts against the budget. All programs share one arena and one host slab, which counts where host
// and device memory are one.
int engine_counts(const Engine *e, Space space);
// Bytes of pinned host memory that activations may take.
int64_t engine_host_budget(const Engine *e);
void *engine_space_allocate(const Engine *e, Space space);
void engine_space_release(const Engine *e, Space space);
// Binds all programs to the spaces as they are.
void engine_bind(Engine *e);

// engine_plan.c: records the training programs as memory.policy says, on top of all others, which are measured. -1 with
// *err when memory.per_tensor names something wrongly.
int engine_choose_policy(Engine *e, Error *err);
void engine_free_train_programs(Engine *e);
// What the engine would need of the device with the smallest training programs that memory.policy allows.
int64_t engine_least_bytes(Engine *e, int train);
#endif
