// The engine: all programs of a run and the memory they run in. Records first (nothing allocated: --plan), then
// allocates and binds. Knows nothing of data, files or schedules.
#ifndef TESSERA_ENGINE_H
#define TESSERA_ENGINE_H

#include "model/program/choose.h"
#include "model/program/policy_file.h"
#include "model/program/replay.h"
#include "model/program/seconds.h"
#include "model/transformer.h"

#include <pthread.h>
#include <stdio.h>

enum { ENGINE_FORWARD_PROGRAMS = 64 };

// A forward-only program at a power of two of slots (or all of them).
typedef struct ForwardProgram {
  Mode mode;
  int slots, segments;
  ModelProgram m;
} ForwardProgram;

// What the last update has left to the next step's first micro-step, which opens with it, or to engine_flush.
typedef enum Due { DUE_NOTHING, DUE_WEIGHTS, DUE_UPDATE, DUE_UPDATE_EMA, DUE_COUNT } Due; // the last three as Opening

typedef struct EnginePlan {
  int was_given; // rather than chosen
  double bound;  // seconds of a micro-step: by the costs no plan that fits is shorter
  double took;   // seconds of choosing
  int tried;     // plans recorded for it
} EnginePlan;

typedef struct Engine {
  const Config *config;
  Backend backend; // as kernels.* chose
  Model model;
  Costs costs; // what a plan reckons with
  PolicyTable policy;
  MemoryPolicy chosen;       // the policy; of "auto" keep where everything is kept
  const PolicyTable *given;  // a plan of before that "auto" goes by where it fits, or NULL; borrowed
  EnginePlan plan;           // how "auto" came to its plan, where something had to be chosen
  int trains;                // it was recorded for training
  int slots, segments;       // capacities of a training pack
  ModelProgram first, later; // micro-steps; later: those of several that no other is for
  ModelProgram last;         // the last of several, where gradients leave in it
  ModelProgram opening[2]; // where updates are overlapped: the first, with the update of the step before; with its EMA
  Program *update, *update_ema; // where they are, only the decision
  Program *flush[DUE_COUNT];    // what is due, at once
  Due due;                      // nobody has done it since
  Program *ema_in, *ema_out;    // with an EMA: puts it in the weights' place, and the weights back
  Program *hash;                // with train.verify_every
  int uses_ema;
  ForwardProgram forward[ENGINE_FORWARD_PROGRAMS];
  int n_forward;
  int64_t budget;             // bytes that all of them may take
  int64_t connections;        // of the device that those to other processes' devices had taken before
  int64_t host_left;          // bytes of host memory that were left when the programs were recorded
  int64_t bytes[SPACE_COUNT]; // of every allocation
  Bases bases;
  int next_pack;     // with queues: which EVENT_PACK_READY the next pack records
  int next_results;  // with queues: which EVENT_RESULTS the next update records; the other one began its step
  double clock;      // without: when its step began
  pthread_t pinning; // a thread that allocates host slabs
  int is_pinning;
  struct { // on a backend with queues: host memory that copies pass through
    StepScalars *scalars;
    UpdateStatus *status;
    double *metrics;
    void *stage[2]; // [stage_bytes] where engine_stage_open was called
    int64_t stage_bytes;
  } pinned;
} Engine;

// Records every program for the config: training when `train` is set, and the forward-only ones. Allocates no slab. The
// config is borrowed. memory.policy auto keeps everything where that fits, and else chooses for each tensor of each
// layer (model/program/choose.h). -1 with *err when memory.per_tensor names something wrongly. The engine must stay
// where it is from here on.
int engine_record(Engine *e, const Config *c, const Backend *backend, int train, Error *err);
// The same with costs to plan with, which the engine takes over; engine_record's are the model's. given: a plan for
// "auto" to go by where it fits, borrowed, or NULL.
int engine_record_with(Engine *e, const Config *c, const Backend *backend, int train, Costs costs,
                       const PolicyTable *given, Error *err);
// The task of choosing a plan for an engine that was recorded for training; memory other than the arena stays as it is.
ChooseTask engine_choose_task(const Engine *e);
// -1 with *err naming the shortfall when what was recorded needs more than memory.budget_gb, or than
// memory.host_gb where that is a number.
int engine_check_budget(const Engine *e, Error *err);
// The same for the host slab beside a device: memory of this machine that is not there is noticed by nobody until the
// process is killed for it.
int engine_check_host(const Engine *e, Error *err);
// "0.072 GB of the 12.600 GB that it may take, policy keep"; malloc'd.
char *engine_memory_text(const Engine *e);
// Allocates the slabs (Adam's moments as zeros, all else with any content) and binds the programs.
// -1 with *err naming what did not fit.
int engine_allocate(Engine *e, Error *err);
// The same in two parts: pinning large host slabs takes seconds, in which weights and the EMA can be written
// (trainer/slab.h), moments after engine_await_host, but nothing replayed.
int engine_allocate_begin(Engine *e, Error *err);
int engine_await_host(Engine *e, Error *err);
int engine_allocate_end(Engine *e, Error *err);
void engine_free(Engine *e);

// Where memory.policy auto chose, chooses again by the costs as they are now, between steps whose results were read.
// Returns 1 where another plan is worth it: the training programs are others then, in memory as large as they need; 0
// where nothing changed; -1 with *err when the memory could not be had.
int engine_plan_again(Engine *e, Error *err);

// The smallest forward-only program with room for this many tokens and image segments; NULL when none has.
const ForwardProgram *engine_forward(const Engine *e, Mode mode, int tokens, int images);

// The program of micro-step k, from 0, of a step, after all that came before that micro-step.
const ModelProgram *engine_micro_step(const Engine *e, int k);
// The first one's after an update, with or without the EMA's.
const ModelProgram *engine_first_step(const Engine *e, int ema);
// Stages a laid-out pack (batch_bind's block for the program's capacities) and replays. On a backend with queues the
// device fetches the pack later, at full speed from the backend's host_alloc: it stays as it is until
// engine_await_packs or what waits for the replay itself (engine_read, engine_hash, engine_results).
void engine_run(Engine *e, const ModelProgram *m, const void *pack, OpTime *times);
// Packs that may be on their way while the next one is made ready: 1 on a backend with queues, else 0.
int engine_packs_sent(const Engine *e);
// Waits until the device has all packs it was given but the last engine_packs_sent, or `all` of them.
void engine_await_packs(Engine *e, bool all);
// Replays the update, with the EMA's where `ema`. On a backend with queues this and engine_run return before the device
// is done; engine_results waits for the last update, so between two updates there must be one of it.
void engine_update(Engine *e, const StepScalars *scalars, int ema, OpTime *times);
// What the last update found, and the step's metrics [metrics_size]. Returns the step's own seconds: from the end of
// the update before it, or from engine_begin_step, to the end of this one, by the device's clock where it has queues,
// since the host may look late. So the times of steps in a row add up to the time that passed.
double engine_results(Engine *e, UpdateStatus *status, double *metrics);
// The next step's time begins here, and not at engine_allocate or where the last update ended: for what else was done
// since (an evaluation).
void engine_begin_step(Engine *e);

// Hashes of the gradients as they are now, one a parameter [params.n]. Needs train.verify_every. Waits for the device.
void engine_hash(Engine *e, uint64_t *hash);

// Copies a result of the last replay to host memory: `count` elements, DT_ACT and DT_REAL as float.
void engine_read(const Engine *e, const ModelProgram *m, TensorId t, int64_t count, float *out);

// Does what the last update has left to the next step, for whoever else reads weights and state: brings weights that
// are in shares together, or updates them. All processes call it.
void engine_flush(Engine *e);
// Puts the EMA, where there is one, in the place of the weights (1) or the weights back (0). Between steps only, and
// nothing is trained or saved meanwhile. All processes call it.
void engine_use_ema(Engine *e, int ema);

// Bytes of the device that all slabs take, as it gives them out.
int64_t engine_device_bytes(const Engine *e);

// What of a space is on the device, as allocated.
void *engine_slab(const Engine *e, Space space);
// Bytes of one in all: on the device and, of the optimizer's state, on the host (engine.bases).
int64_t engine_slab_bytes(const Engine *e, Space space);
// Whether a space is memory of the host, beside a device.
int engine_on_host(const Engine *e, Space space);
// Fills one with zeros, if it is there, after what was replayed before.
void engine_slab_clear(Engine *e, Space space);
// Waits until all that was replayed has been done.
void engine_await(const Engine *e);

// The memory table of --plan.
void engine_print_plan(const Engine *e, FILE *f);
#endif
