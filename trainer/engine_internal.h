// What the engine and its choice of a memory plan share.
#ifndef TESSERA_ENGINE_INTERNAL_H
#define TESSERA_ENGINE_INTERNAL_H

#include "trainer/engine.h"

// Adds what a program needs of the spaces that all share.
void engine_measure(Engine *e, const Program *p);
// Whether a space counts against the budget. All programs share one arena and one host slab, which counts where host
// and device memory are one.
int engine_counts(const Engine *e, Space space);
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

// engine_plan.c: records the training programs as memory.policy says, on top of all others, which are measured. -1 with
// *err when memory.per_tensor names something wrongly.
int engine_choose_policy(Engine *e, Error *err);
void engine_free_train_programs(Engine *e);
// What the engine would need of the device with the smallest training programs that memory.policy allows.
int64_t engine_least_bytes(Engine *e, int train);

// engine_state.c: records the programs between passes for the place of the state that memory.state says, "auto": the
// least that lets the smallest need of activations fit beside it; then the training programs. -1 as above.
int engine_choose_state(Engine *e, int train, Error *err);
void engine_free_state_programs(Engine *e);
// "EMA and moments on the host, 21.327 GB"; empty where all of the state is on the device. malloc'd.
char *engine_state_text(const Engine *e);
// The same for --plan, with what it costs a step.
void engine_print_state(const Engine *e, FILE *f);
#endif
