// Binding addresses and running the ops.
#include "model/program/replay.h"

#include "base/philox.h"
#include "model/program/program_internal.h"

#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SHADOW_CLOSE(at, bytes) ASAN_POISON_MEMORY_REGION(at, bytes)
#define SHADOW_OPEN(at, bytes) ASAN_UNPOISON_MEMORY_REGION(at, bytes)
enum { SHADOW = 1 };
#else
#define SHADOW_CLOSE(at, bytes) ((void)(at), (void)(bytes))
#define SHADOW_OPEN(at, bytes) ((void)(at), (void)(bytes))
enum { SHADOW = 0 };
#endif

// Spaces the program lays out itself; elsewhere a tensor's bytes are the trainer's.
static int is_laid_out(const Tensor *x) {
  return x->first >= 0 && space_has(x->space, SPACE_LAID_OUT);
}

// Whether it lies in the arena or the host slab: what is laid out, and gradients that share the arena.
static int is_inside(const Program *p, const Tensor *x) {
  return x->first >= 0 && space_has(tensor_space(p, x), SPACE_LAID_OUT);
}

static void *tensor_allocate(const Program *p, const Tensor *x) {
  void *at = NULL;
  size_t bytes = (size_t)max_i64(x->bytes, 1);
  if (p->backend->queues)
    at = space_has(x->space, SPACE_ON_HOST) ? p->backend->host_alloc(bytes) : p->backend->alloc(bytes);
  else if (posix_memalign(&at, ARENA_ALIGN, bytes) != 0)
    at = NULL;
  if (!at) panic("program %s: out of memory: %lld bytes for %s", p->name, (long long)x->bytes, x->name);
  return at;
}

static void tensors_bind(Program *p, const Bases *bases) {
  ProgramState *s = p->state;
  if (!s->address) s->address = xcalloc((size_t)p->n_tensors, sizeof *s->address);
  if (bases->separate) s->owned = xcalloc((size_t)p->n_tensors, sizeof *s->owned);
  s->arena = bases->separate ? NULL : bases->of[SPACE_ARENA];
  s->host = bases->separate ? NULL : bases->of[SPACE_HOST];
  if (p->shares_gradients && (!s->arena || bases->of[SPACE_GRADS] != s->arena))
    panic("program %s: gradients are to be the arena's beginning, and are bound elsewhere", p->name);
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    s->address[t] = NULL;
    if (x->first < 0) continue;
    if (bases->separate && is_laid_out(x)) {
      s->address[t] = s->owned[t] = tensor_allocate(p, x);
      continue;
    }
    s->address[t] = bases_at(bases, x->space, x->offset);
    if (!s->address[t]) panic("program %s: tensor %s: %s is not bound", p->name, x->name, space_info[x->space].label);
  }
}

static Lane op_queue(const Program *p, const Op *op) {
  return p->one_queue ? LANE_COMPUTE : op->lane;
}

// Multiprocessors of what runs beside the update lane, and of that lane's ops. Until the compute lane has what it waits
// for first, the update has the device to itself; from the last of its waits on, it has nothing to leave.
static void multiprocessors_share(Program *p) {
  int first = p->n_ops, last = 0;
  for (int i = 0; i < p->n_ops && !p->one_queue; i++)
    for (int w = 0; w < p->ops[i].n_waits; w++) {
      if (p->ops[i].lane != LANE_COMPUTE || p->ops[p->ops[i].waits[w].op].lane != LANE_UPDATE) continue;
      if (i < first) first = i;
      last = i;
    }
  for (int i = first; i < p->n_ops; i++) {
    Op *op = &p->ops[i];
    if (op->lane == LANE_UPDATE) op->call.takes = p->update_share;
    if (op->lane == LANE_COMPUTE && i < last) op->call.leaves = p->update_share;
  }
}

void program_bind(Program *p, const Bases *bases) {
  ProgramState *s = p->state;
  if (!s->finished) panic("program %s: bound before program_finish", p->name);
  if (p->scratch_bytes && !bases->of[SPACE_SCRATCH]) panic("program %s: there is no scratch memory", p->name);
  program_unbind(p);
  tensors_bind(p, bases);
  memset(&p->batch, 0, sizeof p->batch);
  if (bases->of[SPACE_BATCH]) batch_bind(&p->batch, dims_batch_shape(&p->dims), bases->of[SPACE_BATCH]);
  for (int i = 0; i < p->n_ops; i++) {
    Op *op = &p->ops[i];
    if (!p->backend->fn[op->kind])
      panic("program %s: backend %s has no %s", p->name, p->backend->name, op_info[op->kind].name);
    if (op_info[op->kind].pack != READS_NONE && !bases->of[SPACE_BATCH])
      panic("program %s: op %d %s reads the live pack, which is not bound", p->name, i, op_info[op->kind].name);
    op->call = (KernelCall){.batch = &p->batch,
                            .dims = &p->dims,
                            .args = &op->args,
                            .scratch = op->lane == LANE_COMPUTE ? bases->of[SPACE_SCRATCH] : NULL};
    if (p->backend->queues) op->call.stream = p->backend->queues->stream(op_queue(p, op));
    for (int k = 0; k < OP_MAX_IN; k++) op->call.in.at[k] = op->in[k] == NO_TENSOR ? NULL : s->address[op->in[k]];
    for (int k = 0; k < OP_MAX_OUT; k++) op->call.out.at[k] = op->out[k] == NO_TENSOR ? NULL : s->address[op->out[k]];
  }
  multiprocessors_share(p);
}

void *program_address(const Program *p, TensorId t) {
  const ProgramState *s = p->state;
  if (!s->address) panic("program %s: not bound", p->name);
  if (t < 0 || t >= p->n_tensors) panic("program %s: there is no tensor %d", p->name, t);
  const Tensor *x = &p->tensors[t];
  if (x->space == SPACE_ARENA && !x->is_output)
    panic("program %s: tensor %s is gone after a replay: it is no output", p->name, x->name);
  return s->address[t];
}

// Calls `visit` for every operand of the op that lies in the arena or the host slab.
static void operands_visit(Program *p, const Op *op, void (*visit)(Program *, TensorId, void *), void *arg) {
  for (int i = 0; i < OP_MAX_IN; i++)
    if (op->in[i] != NO_TENSOR && is_inside(p, &p->tensors[op->in[i]])) visit(p, op->in[i], arg);
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (op->out[i] != NO_TENSOR && is_inside(p, &p->tensors[op->out[i]])) visit(p, op->out[i], arg);
}

// ---- AddressSanitizer: an op may touch its operands only ----

static void operand_open(Program *p, TensorId t, void *arg) {
  (void)arg;
  SHADOW_OPEN(p->state->address[t], (size_t)p->tensors[t].bytes);
}

static void operand_close(Program *p, TensorId t, void *arg) {
  (void)arg;
  SHADOW_CLOSE(p->state->address[t], (size_t)p->tensors[t].bytes);
}

static void shadow_begin(Program *p) {
  if (!SHADOW) return;
  ProgramState *s = p->state;
  if (s->arena) SHADOW_CLOSE(s->arena, (size_t)p->arena_bytes);
  if (s->host) SHADOW_CLOSE(s->host, (size_t)p->host_bytes);
  for (TensorId t = 0; s->owned && t < p->n_tensors; t++)
    if (is_laid_out(&p->tensors[t])) operand_close(p, t, NULL);
}

// The trainer owns this memory: it gets it back readable.
static void shadow_end(Program *p) {
  if (!SHADOW) return;
  ProgramState *s = p->state;
  if (s->arena) SHADOW_OPEN(s->arena, (size_t)p->arena_bytes);
  if (s->host) SHADOW_OPEN(s->host, (size_t)p->host_bytes);
  for (TensorId t = 0; s->owned && t < p->n_tensors; t++)
    if (is_laid_out(&p->tensors[t])) operand_open(p, t, NULL);
}

static void op_run(Program *p, const Op *op) {
  if (SHADOW) operands_visit(p, op, operand_open, NULL);
  p->backend->fn[op->kind](&op->call);
  if (SHADOW) operands_visit(p, op, operand_close, NULL);
}

// ---- replay ----

static void replay_check(const Program *p) {
  if (!p->state->address) panic("program %s: replayed before program_bind", p->name);
}

// Events of a replay: one an op, then the beginning, then each lane's end; with times also two an op.
static int event_op(int op) {
  return EVENT_REPLAY + op;
}
static int event_begin(const Program *p) {
  return event_op(p->n_ops);
}
static int event_end(const Program *p, Lane lane) {
  return event_begin(p) + 1 + (int)lane;
}
static int event_time(const Program *p, int op, int end) {
  return event_begin(p) + 1 + LANE_COUNT + 2 * op + end;
}

// Gives ops from `first` on to the queues. The other lanes begin after what the compute lane was given before, and it
// goes on after them.
static void queues_fill(Program *p, int first, int timed) {
  const Queues *q = p->backend->queues;
  const ProgramState *s = p->state;
  q->record(LANE_COMPUTE, event_begin(p));
  for (int l = 0; l < LANE_COUNT && !p->one_queue; l++)
    if (l != LANE_COMPUTE && s->uses_lane[l]) q->wait((Lane)l, event_begin(p));
  for (int i = first; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    Lane lane = op_queue(p, op);
    // What ran before `first` was given to the compute lane alone, before all of this.
    for (int w = 0; w < op->n_waits && !p->one_queue; w++)
      if (op->waits[w].op >= first) q->wait(lane, event_op(op->waits[w].op));
    if (timed) q->record(lane, event_time(p, i, 0));
    q->range(op_info[op->kind].name);
    p->backend->fn[op->kind](&op->call);
    q->range(NULL);
    if (timed) q->record(lane, event_time(p, i, 1));
    if (s->awaited[i] && !p->one_queue) q->record(lane, event_op(i));
  }
  for (int l = 0; l < LANE_COUNT && !p->one_queue; l++) {
    if (l == LANE_COMPUTE || !s->uses_lane[l]) continue;
    q->record((Lane)l, event_end(p, (Lane)l));
    q->wait(LANE_COMPUTE, event_end(p, (Lane)l));
  }
}

static void replay_queued(Program *p, OpTime *times) {
  const Queues *q = p->backend->queues;
  ProgramState *s = p->state;
  int first = 0;
  if (p->takes_pack) { // outside the graph, so that the next pack may be staged as soon as it has run
    if (times) q->record(LANE_COMPUTE, event_time(p, 0, 0));
    p->backend->fn[p->ops[0].kind](&p->ops[0].call);
    if (times) q->record(LANE_COMPUTE, event_time(p, 0, 1));
    q->record(LANE_COMPUTE, EVENT_PACK_TAKEN);
    first = 1;
  }
  if (times) {
    queues_fill(p, first, 1);
    for (int i = 0; i < p->n_ops; i++)
      for (int end = 0; end < 2; end++)
        *(end ? &times[i].end : &times[i].begin) = q->seconds(event_time(p, 0, 0), event_time(p, i, end));
    return;
  }
  if (!p->use_graph) {
    queues_fill(p, first, 0);
    return;
  }
  if (!s->graph) {
    q->capture_begin();
    queues_fill(p, first, 0);
    s->graph = q->capture_end();
  }
  q->graph_launch(s->graph);
}

void program_replay(Program *p, OpTime *times) {
  replay_check(p);
  if (p->backend->queues) {
    p->backend->queues->range(p->name);
    replay_queued(p, times);
    p->backend->queues->range(NULL);
    return;
  }
  shadow_begin(p);
  double start = times ? time_now() : 0;
  for (int i = 0; i < p->n_ops; i++) {
    if (times) times[i].begin = time_now() - start;
    op_run(p, &p->ops[i]);
    if (times) times[i].end = time_now() - start;
  }
  shadow_end(p);
}

// ---- random legal orders ----

static void tensor_overwrite(Program *p, TensorId t) {
  operand_open(p, t, NULL);
  memset(p->state->address[t], 0xFF, (size_t)p->tensors[t].bytes); // NaN in every floating point type
  operand_close(p, t, NULL);
}

static void user_add(Program *p, TensorId t, void *users) {
  (void)p;
  ((int *)users)[t]++;
}

static void user_remove(Program *p, TensorId t, void *users) {
  const Tensor *x = &p->tensors[t];
  if (--((int *)users)[t] == 0 && !x->is_output && is_laid_out(x)) tensor_overwrite(p, t);
}

// The next op of the lane at or after position i, or n_ops.
static int lane_next(const Program *p, Lane lane, int i) {
  while (i < p->n_ops && p->ops[i].lane != lane) i++;
  return i;
}

static int op_ready(const Program *p, int i, const char *done) {
  if (i >= p->n_ops) return 0;
  for (int w = 0; w < p->ops[i].n_waits; w++)
    if (!done[p->ops[i].waits[w].op]) return 0;
  return 1;
}

void program_replay_random(Program *p, uint64_t seed) {
  replay_check(p);
  int *users = xcalloc((size_t)p->n_tensors, sizeof *users);
  char *done = xcalloc((size_t)p->n_ops, 1);
  int next[LANE_COUNT];
  uint32_t favour[LANE_COUNT] = {0}; // the ready lane with the highest runs; changed now and then, so that lanes
                                     // sometimes run far ahead of each other
  for (int l = 0; l < LANE_COUNT; l++) next[l] = lane_next(p, (Lane)l, 0);
  for (int i = 0; i < p->n_ops; i++) operands_visit(p, &p->ops[i], user_add, users);
  shadow_begin(p);
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (is_laid_out(&p->tensors[t])) tensor_overwrite(p, t);
  for (int step = 0; step < p->n_ops; step++) {
    if (step == 0 || philox4(seed, (uint64_t)step, 1, 0).v[0] % 4 == 0)
      for (int l = 0; l < LANE_COUNT; l++) favour[l] = philox4(seed, (uint64_t)step, 0, (uint64_t)l).v[0];
    int lane = -1;
    for (int l = 0; l < LANE_COUNT; l++)
      if (op_ready(p, next[l], done) && (lane < 0 || favour[l] > favour[lane])) lane = l;
    if (lane < 0) panic("program %s: waits that no order can satisfy", p->name);
    int i = next[lane];
    op_run(p, &p->ops[i]);
    done[i] = 1;
    operands_visit(p, &p->ops[i], user_remove, users);
    next[lane] = lane_next(p, (Lane)lane, i + 1);
  }
  shadow_end(p);
  free(done);
  free(users);
}
