// Recording: tensors, ops, and how saved activations come back.
#include "model/program/program.h"

#include "model/program/program_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const saved_name[SAVED_COUNT] = {"x",          "norm_stats", "h1", "qkv", "qkv_rotated",
                                             "attention",  "b1",         "x2", "h2",  "router",
                                             "shared_pre", "expert_pre", "b2"};

// ---- program ----

Program *program_new(const char *name, const Dims *dims, const Backend *backend, const PolicyTable *policy) {
  Program *p = xcalloc(1, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", name);
  p->backend = backend;
  p->dims = *dims;
  if (policy) p->policy = *policy;
  ProgramState *s = p->state = xcalloc(1, sizeof *s);
  s->layer = -1;
  s->cap_marks = 16;
  s->marks = xcalloc((size_t)s->cap_marks, sizeof *s->marks);
  s->n_marks = 1;
  return p;
}

static void tensor_release(const Program *p, TensorId t) {
  void *at = p->state->owned[t];
  if (!at) return;
  if (!p->backend->queues)
    free(at);
  else if (space_has(p->tensors[t].space, SPACE_ON_HOST))
    p->backend->host_release(at);
  else
    p->backend->release(at);
}

void program_unbind(Program *p) {
  ProgramState *s = p->state;
  if (s->graph) p->backend->queues->graph_free(s->graph);
  s->graph = NULL;
  if (s->owned)
    for (TensorId t = 0; t < p->n_tensors; t++) tensor_release(p, t);
  free(s->owned);
  s->owned = NULL;
}

int program_has_copies(const Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (op_is_copy(&p->ops[i])) return 1;
  return 0;
}

void program_free(Program *p) {
  if (!p) return;
  ProgramState *s = p->state;
  program_unbind(p);
  free(s->address);
  free(s->awaited);
  free(s->gradients);
  free(s->seconds);
  free(s->marks);
  free(s->recipes);
  free(s->revival);
  free(s->external);
  free(s);
  free(p->tensors);
  free(p->ops);
  free(p);
}

void program_check_open(const Program *p) {
  if (p->state->finished) panic("program %s: recorded to after program_finish", p->name);
}

static Tensor *tensor_check(const Program *p, TensorId t, const char *what) {
  if (t < 0 || t >= p->n_tensors) panic("program %s: %s: there is no tensor %d", p->name, what, t);
  return &p->tensors[t];
}

static TensorId tensor_add(Program *p, Space space, int64_t offset, Dtype dtype, int64_t count, const char *name) {
  ProgramState *s = p->state;
  program_check_open(p);
  if (count < 0 || offset < 0)
    panic("program %s: tensor %s: %lld elements at byte %lld", p->name, name, (long long)count, (long long)offset);
  if (p->n_tensors == s->cap_tensors) {
    s->cap_tensors = s->cap_tensors ? 2 * s->cap_tensors : 256;
    p->tensors = xrealloc(p->tensors, (size_t)s->cap_tensors * sizeof *p->tensors);
    s->revival = xrealloc(s->revival, (size_t)s->cap_tensors * sizeof *s->revival);
  }
  TensorId t = p->n_tensors++;
  p->tensors[t] = (Tensor){.dtype = dtype,
                           .space = space,
                           .count = count,
                           .bytes = count * (int64_t)p->backend->dtype_bytes[dtype],
                           .offset = offset,
                           .layer = s->layer,
                           .saved = -1,
                           .producer = -1,
                           .rebuild = -1,
                           .first = -1,
                           .last = -1};
  snprintf(p->tensors[t].name, sizeof p->tensors[t].name, "%s", name);
  s->revival[t] = (Revival){.policy = POLICY_KEEP, .host = NO_TENSOR, .again = NO_TENSOR};
  return t;
}

TensorId program_tensor(Program *p, Dtype dtype, int64_t count, const char *fmt, ...) {
  char name[sizeof p->tensors->name];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(name, sizeof name, fmt, ap);
  va_end(ap);
  return tensor_add(p, SPACE_ARENA, 0, dtype, count, name);
}

// Where in `external` such a tensor is, or would have to be put.
static int external_at(const Program *p, Space space, int64_t offset, Dtype dtype, int64_t count) {
  const ProgramState *s = p->state;
  uint64_t h =
      (uint64_t)offset * 0x9E3779B97F4A7C15u ^ (uint64_t)count * 0xC2B2AE3D27D4EB4Fu ^ (uint64_t)space << 8 ^ dtype;
  int at = (int)((h ^ h >> 29) % (uint64_t)s->cap_external);
  for (;; at = (at + 1) % s->cap_external) {
    if (s->external[at] == NO_TENSOR) return at;
    const Tensor *x = &p->tensors[s->external[at]];
    if (x->space == space && x->offset == offset && x->count == count && x->dtype == dtype) return at;
  }
}

static void external_grow(Program *p) {
  ProgramState *s = p->state;
  TensorId *old = s->external;
  int n = s->cap_external;
  s->cap_external = n ? 2 * n : 256;
  s->external = xmalloc((size_t)s->cap_external * sizeof *s->external);
  for (int i = 0; i < s->cap_external; i++) s->external[i] = NO_TENSOR;
  for (int i = 0; i < n; i++) {
    if (old[i] == NO_TENSOR) continue;
    const Tensor *x = &p->tensors[old[i]];
    s->external[external_at(p, x->space, x->offset, x->dtype, x->count)] = old[i];
  }
  free(old);
}

TensorId program_external(Program *p, Space space, int64_t offset, Dtype dtype, int64_t count, const char *name) {
  ProgramState *s = p->state;
  if (space_has(space, SPACE_LAID_OUT))
    panic("program %s: tensor %s: the program itself lays out this space", p->name, name);
  if (2 * s->n_external >= s->cap_external) external_grow(p);
  int at = external_at(p, space, offset, dtype, count);
  if (s->external[at] != NO_TENSOR) return s->external[at];
  s->n_external++;
  return s->external[at] = tensor_add(p, space, offset, dtype, count, name);
}

// A tensor of the arena or the host slab shaped like another.
static TensorId tensor_like(Program *p, TensorId t, Space space, const char *suffix) {
  Tensor like = p->tensors[t]; // a copy: tensor_add may move the table
  char name[2 * sizeof like.name];
  snprintf(name, sizeof name, "%.38s%s", like.name, suffix);
  return tensor_add(p, space, 0, like.dtype, like.count, name);
}

// A whole list of operands.
static void operands_check(const Program *p, OpKind kind, const char *what, int n, TensorList given) {
  if (given.n != n)
    panic("program %s: op %d %s has %d %s, %d are given", p->name, p->n_ops, op_info[kind].name, n, what, given.n);
}

// One list of operands into op->in or op->out, checked against the table.
static void operands_take(const Program *p, OpKind kind, const OperandInfo *operand, TensorList given, TensorId *to,
                          int max) {
  for (int i = 0; i < max; i++) {
    to[i] = i < given.n ? given.of[i] : NO_TENSOR;
    if (i >= given.n) continue;
    if (to[i] == NO_TENSOR && !(operand[i].marks & OPTIONAL))
      panic("program %s: op %d %s: operand %s is missing", p->name, p->n_ops, op_info[kind].name, operand[i].name);
    if (to[i] < NO_TENSOR || to[i] >= p->n_tensors)
      panic("program %s: op %d %s: operand %s: there is no tensor %d", p->name, p->n_ops, op_info[kind].name,
            operand[i].name, to[i]);
  }
}

static int op_add(Program *p, Lane lane, OpKind kind, TensorList in, TensorList out, const OpArgs *args) {
  ProgramState *s = p->state;
  program_check_open(p);
  const OpInfo *o = &op_info[kind];
  Op op = {.kind = kind, .lane = lane, .layer = s->layer};
  if (args) op.args = *args;
  operands_check(p, kind, "inputs", o->n_in, in);
  operands_check(p, kind, "outputs", o->n_out, out);
  operands_take(p, kind, o->in, in, op.in, OP_MAX_IN);
  operands_take(p, kind, o->out, out, op.out, OP_MAX_OUT);
  for (int i = 0; i < o->n_out; i++) {
    if (op.out[i] == NO_TENSOR) continue;
    if (op_accumulates(kind, i, &op.args)) op.acc |= 1u << i;
    for (int k = 0; k < o->n_in; k++)
      if (op.in[k] == op.out[i])
        panic("program %s: op %d %s: tensor %s is input %s and output %s", p->name, p->n_ops, op_info[kind].name,
              p->tensors[op.in[k]].name, o->in[k].name, o->out[i].name);
    for (int k = 0; k < i; k++)
      if (op.out[k] == op.out[i])
        panic("program %s: op %d %s: tensor %s is output %s and output %s", p->name, p->n_ops, op_info[kind].name,
              p->tensors[op.out[k]].name, o->out[k].name, o->out[i].name);
    if (p->tensors[op.out[i]].producer < 0) p->tensors[op.out[i]].producer = p->n_ops;
  }
  if (p->n_ops == s->cap_ops) {
    s->cap_ops = s->cap_ops ? 2 * s->cap_ops : 256;
    p->ops = xrealloc(p->ops, (size_t)s->cap_ops * sizeof *p->ops);
  }
  p->ops[p->n_ops] = op;
  return p->n_ops++;
}

int program_op(Program *p, OpKind kind, TensorList in, TensorList out, const OpArgs *args) {
  return program_op_on(p, LANE_COMPUTE, kind, in, out, args);
}

int program_op_on(Program *p, Lane lane, OpKind kind, TensorList in, TensorList out, const OpArgs *args) {
  return op_add(p, lane, kind, in, out, args);
}

void program_copy(Program *p, Lane lane, TensorId from, TensorId to) {
  OpArgs args = {.span = {.count = p->tensors[from].bytes}};
  op_add(p, lane, OP_COPY, TENSORS(from), TENSORS(to), &args);
}

void program_collective(Program *p, OpKind kind, TensorId values) {
  const Tensor *x = &p->tensors[values];
  OpArgs args = {.group = {.count = x->count, .is_f64 = x->dtype == DT_F64}};
  op_add(p, LANE_COMM, kind, TENSORS(), TENSORS(values), &args);
}

void program_layer(Program *p, int layer) {
  ProgramState *s = p->state;
  program_check_open(p);
  if (layer == s->layer) return;
  s->layer = layer;
  if (s->n_marks == s->cap_marks) {
    s->cap_marks *= 2;
    s->marks = xrealloc(s->marks, (size_t)s->cap_marks * sizeof *s->marks);
  }
  if (s->marks[s->n_marks - 1] != p->n_ops) s->marks[s->n_marks++] = p->n_ops;
}

// ---- saved activations ----

void program_save(Program *p, TensorId t, Saved saved) {
  ProgramState *s = p->state;
  Tensor *x = tensor_check(p, t, saved_name[saved]);
  if (x->space != SPACE_ARENA || x->producer < 0 || x->saved >= 0)
    panic("program %s: save of %s as %s: %s", p->name, x->name, saved_name[saved],
          x->saved >= 0     ? "it is saved already"
          : x->producer < 0 ? "nothing has written it"
                            : "only tensors of the arena are saved");
  x->saved = (int)saved;
  x->layer = s->layer;
  if (s->layer < 0 || s->layer >= p->policy.layers) return;
  Policy policy = (Policy)p->policy.of[s->layer * SAVED_COUNT + (int)saved];
  if (saved == SAVED_X && policy == POLICY_RECOMPUTE)
    panic("program %s: layer %d: block inputs x are kept or offloaded, never recomputed", p->name, s->layer);
  if (policy == POLICY_OFFLOAD && x->bytes < p->policy.least_copy) policy = POLICY_KEEP;
  s->revival[t].policy = policy;
  if (policy != POLICY_OFFLOAD) return;
  TensorId host = tensor_like(p, t, SPACE_HOST, " (host)");
  s->revival[t].host = host;
  program_copy(p, LANE_D2H, t, host);
}

void program_save_rebuild(Program *p, TensorList t_of_out, OpKind kind, TensorList in, const OpArgs *args) {
  ProgramState *s = p->state;
  const OpInfo *o = &op_info[kind];
  Recipe r = {.kind = kind};
  if (args) r.args = *args;
  operands_check(p, kind, "inputs", o->n_in, in);
  operands_check(p, kind, "outputs", o->n_out, t_of_out);
  operands_take(p, kind, o->in, in, r.in, OP_MAX_IN);
  for (int i = 0; i < OP_MAX_OUT; i++) {
    r.out[i] = i < o->n_out ? t_of_out.of[i] : NO_TENSOR;
    if (r.out[i] != NO_TENSOR) tensor_check(p, r.out[i], "rebuild")->rebuild = s->n_recipes;
  }
  if (s->n_recipes == s->cap_recipes) {
    s->cap_recipes = s->cap_recipes ? 2 * s->cap_recipes : 32;
    s->recipes = xrealloc(s->recipes, (size_t)s->cap_recipes * sizeof *s->recipes);
  }
  s->recipes[s->n_recipes++] = r;
}

// An intermediate of a layer that was not saved: when something above it is rebuilt, so is it.
static int is_intermediate(const Tensor *x) {
  return x->space == SPACE_ARENA && x->saved < 0 && x->layer >= 0;
}

static int is_rebuilt(const Program *p, TensorId t) {
  const Tensor *x = &p->tensors[t];
  return x->saved < 0 ? is_intermediate(x) : p->state->revival[t].policy == POLICY_RECOMPUTE;
}

// The op that makes t: its recipe, or its producer.
static Recipe recipe_of(const Program *p, TensorId t) {
  const Tensor *x = &p->tensors[t];
  if (x->rebuild >= 0) return p->state->recipes[x->rebuild];
  if (x->producer < 0) panic("program %s: tensor %s is needed and nothing has written it", p->name, x->name);
  const Op *op = &p->ops[x->producer];
  Recipe r = {.kind = op->kind, .args = op->args};
  memcpy(r.in, op->in, sizeof r.in);
  memcpy(r.out, op->out, sizeof r.out);
  return r;
}

// A tensor shaped like output i of a recipe: what it rebuilds there, or the same output of a sibling's producer.
static TensorId recipe_shape(const Program *p, const Recipe *r, int i, const char *operand) {
  if (r->out[i] != NO_TENSOR) return r->out[i];
  for (int k = 0; k < OP_MAX_OUT; k++) {
    if (r->out[k] == NO_TENSOR) continue;
    const Op *producer = &p->ops[p->tensors[r->out[k]].producer];
    if (producer->kind == r->kind && producer->out[i] != NO_TENSOR) return producer->out[i];
  }
  panic("program %s: rebuild by %s: the shape of its output %s is unknown", p->name, op_info[r->kind].name, operand);
}

static TensorId tensor_need(Program *p, TensorId t, int nested);

static TensorId tensor_rebuild(Program *p, TensorId t) {
  ProgramState *s = p->state;
  if (s->revival[t].busy)
    panic("program %s: rebuilding %s needs %s itself", p->name, p->tensors[t].name, p->tensors[t].name);
  s->revival[t].busy = 1;
  Recipe r = recipe_of(p, t);
  const OpInfo *o = &op_info[r.kind];
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT];
  for (int i = 0; i < o->n_in; i++) in[i] = r.in[i] == NO_TENSOR ? NO_TENSOR : tensor_need(p, r.in[i], 1);
  for (int i = 0; i < o->n_out; i++) {
    out[i] = NO_TENSOR;
    if (r.out[i] == NO_TENSOR && o->out[i].marks & OPTIONAL) continue;
    TensorId like = recipe_shape(p, &r, i, o->out[i].name);
    if (o->out[i].marks & (ADDS_ALWAYS | ADDS_IF_ASKED) || p->tensors[like].space != SPACE_ARENA)
      panic("program %s: tensor %s cannot be rebuilt: output %s of %s must not be written again", p->name,
            p->tensors[t].name, o->out[i].name, op_info[r.kind].name);
    int wanted = r.out[i] != NO_TENSOR && is_rebuilt(p, r.out[i]) && s->revival[r.out[i]].again == NO_TENSOR;
    out[i] = tensor_like(p, like, SPACE_ARENA, wanted ? " (again)" : " (scratch)");
    if (wanted) s->revival[r.out[i]].again = out[i];
  }
  op_add(p, LANE_COMPUTE, r.kind, (TensorList){in, o->n_in}, (TensorList){out, o->n_out}, &r.args);
  s->revival[t].busy = 0;
  return s->revival[t].again;
}

// `nested`: for an op that is recorded again, so that intermediates are rebuilt too.
static TensorId tensor_need(Program *p, TensorId t, int nested) {
  ProgramState *s = p->state;
  const Tensor *x = tensor_check(p, t, "need");
  if (x->saved < 0 && !(nested && is_intermediate(x))) return t;
  s->revival[t].needed = 1;
  if (s->revival[t].again != NO_TENSOR) return s->revival[t].again;
  if (is_rebuilt(p, t)) return tensor_rebuild(p, t);
  if (s->revival[t].policy == POLICY_KEEP) return t;
  TensorId again = tensor_like(p, t, SPACE_ARENA, " (reload)");
  program_copy(p, LANE_H2D, s->revival[t].host, again);
  return s->revival[t].again = again;
}

TensorId program_need(Program *p, TensorId t) {
  return tensor_need(p, t, 0);
}

void program_output(Program *p, TensorId t) {
  tensor_check(p, t, "output")->is_output = 1;
}
