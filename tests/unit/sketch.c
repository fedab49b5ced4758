#include "tests/unit/sketch.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/program/compile.h"
#include "model/program/planner.h"
#include "model/program/policy.h"
#include "model/program/replay.h"

// ---- random numbers ----

uint64_t rng_next(Rng *r) { // splitmix64 (Steele, Lea and Flood 2014)
  uint64_t z = r->state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
int rng_below(Rng *r, int n) {
  return (int)(rng_next(r) % (uint64_t)n);
}
int rng_chance(Rng *r, int percent) {
  return rng_below(r, 100) < percent;
}

// ---- the hashing backend ----

uint64_t hash_bytes(uint64_t h, const void *at, int64_t n) {
  const uint8_t *b = at;
  for (int64_t i = 0; i < n; i++) h = (h ^ b[i]) * 0x100000001B3u + 0x9E37u;
  return h;
}

static void hash_write(uint64_t h, uint8_t *out, int64_t from, int64_t to, int add) {
  for (int64_t i = from; i < to; i++) {
    uint64_t z = (h + (uint64_t)i) * 0x9E3779B97F4A7C15u;
    uint8_t v = (uint8_t)(z ^ z >> 29 ^ z >> 47);
    out[i] = add ? (uint8_t)(out[i] + v) : v;
  }
}

static const Shape *call_shape(const KernelCall *c) {
  return (const Shape *)(intptr_t)c->args->span.count;
}

// Outputs 0 .. n-1 from all inputs and the pack; `add`: outputs that accumulate when the call says so.
static void kernel_hash(const KernelCall *c, int add_from) {
  const Shape *s = call_shape(c);
  uint64_t h = hash_bytes(s->salt, c->batch->dims, sizeof *c->batch->dims);
  for (int i = 0; i < OP_MAX_IN; i++)
    if (c->in.at[i]) h = hash_bytes(h + (uint64_t)i, c->in.at[i], s->in[i]);
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (c->out.at[i])
      hash_write(h + (uint64_t)i * 0x1234567u, c->out.at[i], s->from[i], s->to[i],
                 i >= add_from && c->args->accumulate);
}

static void hash_pure(const KernelCall *c) {
  kernel_hash(c, OP_MAX_OUT);
}
static void hash_gradient(const KernelCall *c) { // one output, which accumulates
  kernel_hash(c, 0);
}
static void hash_copy(const KernelCall *c) {
  memcpy(c->out.COPY.dst, c->in.COPY.src, (size_t)c->args->span.count);
}
// xnew = f(x, branch); h, mean, rstd = g(xnew, mod), so that x alone rebuilds h.
static void hash_adaln(const KernelCall *c) {
  const Shape *s = call_shape(c);
  const void *xnew = c->in.ADALN_FWD.x;
  if (c->in.ADALN_FWD.branch) {
    uint64_t h = hash_bytes(hash_bytes(s->salt, xnew, s->in[0]), c->in.ADALN_FWD.branch, s->in[1]);
    xnew = c->out.ADALN_FWD.xnew;
    hash_write(h, c->out.ADALN_FWD.xnew, 0, s->out[0], 0);
  }
  uint64_t h = hash_bytes(hash_bytes(s->salt, xnew, s->in[0]), c->in.ADALN_FWD.mod, s->in[2]);
  for (int i = 1; i < 4; i++) hash_write(h + (uint64_t)i, c->out.at[i], 0, s->out[i], 0);
}

const Backend backend_hash = {.name = "hash",
                              .dtype_bytes = {4, 4, 4, 1, 8},
                              .fn = {[OP_COPY] = hash_copy,
                                     [OP_ADALN_FWD] = hash_adaln,
                                     [OP_ADALN_BWD] = hash_pure,
                                     [OP_SILU_FWD] = hash_pure,
                                     [OP_EXPERT_COMBINE] = hash_pure,
                                     [OP_EXPERT_UP_FWD] = hash_pure,
                                     [OP_QKNORM_ROPE_FWD] = hash_pure,
                                     [OP_ATTENTION_FWD] = hash_pure,
                                     [OP_ROUTER_FWD] = hash_pure,
                                     [OP_EXPERT_DOWN_BWD] = hash_pure,
                                     [OP_MOD_BWD] = hash_gradient,
                                     [OP_EMBED_BWD] = hash_gradient}};

const Dims sketch_dims = {.T = 5,
                          .C = 3,
                          .H = 1,
                          .G = 1,
                          .D = 2,
                          .P = 3,
                          .V = 7,
                          .Z = 2,
                          .L = 1,
                          .M = 6,
                          .segments = 2,
                          .E = {1, 1},
                          .F = {1, 1},
                          .K = {1, 1},
                          .S = {0, 0}};

// ---- random programs ----

// Appends an op; `from`, `to` bound the part of its last output that it writes (to < 0: all).
static void sketch_op(Sketch *k, OpKind kind, const TensorId *in, const TensorId *out, int64_t from, int64_t to) {
  assert_true(k->n_shapes < MAX_SHAPES);
  Shape *s = &k->shapes[k->n_shapes++];
  *s = (Shape){.salt = (uint64_t)k->n_shapes};
  for (int i = 0; i < OP_MAX_IN; i++)
    if (in[i] != NO_TENSOR) s->in[i] = k->p->tensors[in[i]].bytes;
  int last = 0;
  for (int i = 0; i < OP_MAX_OUT; i++) {
    if (out[i] == NO_TENSOR) continue;
    s->out[i] = s->to[i] = k->p->tensors[out[i]].bytes;
    last = i;
  }
  if (to >= 0) s->from[last] = from, s->to[last] = to;
  OpArgs args = {.accumulate = k->accumulate, .span = {.count = (int64_t)(intptr_t)s}};
  program_op(k->p, kind, (TensorList){in, op_info[kind].n_in}, (TensorList){out, op_info[kind].n_out}, &args);
}

static TensorId sketch_tensor(Sketch *k) {
  static const Dtype types[] = {DT_ACT, DT_REAL, DT_I32, DT_U8, DT_F64};
  int big = rng_chance(&k->rng, 20);
  return program_tensor(k->p, types[rng_below(&k->rng, 5)], 1 + rng_below(&k->rng, big ? 700 : 90), "t%d",
                        k->p->n_tensors);
}

static TensorId sketch_weight(Sketch *k) {
  return program_external(k->p, SPACE_WEIGHTS, 4 * rng_below(&k->rng, 16), DT_ACT, 1 + rng_below(&k->rng, 40),
                          "weight");
}

static TensorId sketch_gradient(Sketch *k) {
  int n = 1 + rng_below(&k->rng, 20);
  TensorId t = program_external(k->p, SPACE_GRADS, k->grads, DT_REAL, n, "gradient");
  k->grads += 4 * n;
  assert_true(k->grads <= SLAB);
  return t;
}

// Empty lists of operands.
static void operands_clear(TensorId in[OP_MAX_IN], TensorId out[OP_MAX_OUT]) {
  for (int i = 0; i < OP_MAX_IN; i++) in[i] = NONE;
  for (int i = 0; i < OP_MAX_OUT; i++) out[i] = NONE;
}

static void sketch_forward(Sketch *k, int l, TensorId x, TensorId branch) {
  static const struct {
    OpKind kind;
    int in, out;
  } body[] = {{OP_SILU_FWD, 1, 1},        {OP_EXPERT_COMBINE, 4, 1}, {OP_EXPERT_UP_FWD, 4, 2},
              {OP_QKNORM_ROPE_FWD, 3, 3}, {OP_ATTENTION_FWD, 3, 2},  {OP_ROUTER_FWD, 3, 3}};
  Layer *y = &k->layer[l];
  program_layer(k->p, l);
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT];
  operands_clear(in, out);
  in[0] = x, in[1] = branch, in[2] = k->mod;
  if (branch != NONE) out[0] = program_tensor(k->p, k->p->tensors[x].dtype, k->p->tensors[x].count, "x%d", l);
  for (int i = 1; i < 4; i++) out[i] = sketch_tensor(k);
  sketch_op(k, OP_ADALN_FWD, in, out, 0, -1);
  y->x = branch == NONE ? x : out[0];
  y->mean = out[2], y->rstd = out[3];
  program_save(k->p, y->x, SAVED_X);
  program_save(k->p, out[1], SAVED_H1);
  program_save(k->p, y->mean, SAVED_NORM_STATS);
  program_save(k->p, y->rstd, SAVED_NORM_STATS);
  y->n_saved = 0;
  y->saved[y->n_saved++] = y->x;
  y->saved[y->n_saved++] = out[1];
  if (rng_chance(&k->rng, 70)) {
    TensorId rstd = rng_chance(&k->rng, 50) ? NONE : out[3]; // scratch, shaped like its producer's
    // A copy: the recipe must not depend on the table of ops, which moves.
    OpArgs args = k->p->ops[k->p->tensors[out[1]].producer].args;
    program_save_rebuild(k->p, TENSORS(NONE, out[1], out[2], rstd), OP_ADALN_FWD, TENSORS(y->x, NONE, k->mod), &args);
  }
  TensorId known[MAX_LAYER_TENSORS] = {y->x, out[1], out[2], out[3]};
  int n_known = 4;
  for (int i = 1 + rng_below(&k->rng, 7); i > 0; i--) {
    int b = rng_below(&k->rng, 6);
    operands_clear(in, out);
    for (int a = 0; a < body[b].in; a++)
      in[a] = rng_chance(&k->rng, 20) ? sketch_weight(k) : known[rng_below(&k->rng, n_known)];
    if (body[b].kind == OP_EXPERT_COMBINE && rng_chance(&k->rng, 50)) in[2] = NONE;
    for (int a = 0; a < body[b].out; a++) out[a] = sketch_tensor(k);
    sketch_op(k, body[b].kind, in, out, 0, -1);
    for (int a = 0; a < body[b].out; a++) {
      known[n_known++] = out[a];
      if (!rng_chance(&k->rng, 60)) continue;
      program_save(k->p, out[a], (Saved)(SAVED_QKV + rng_below(&k->rng, SAVED_COUNT - SAVED_QKV)));
      y->saved[y->n_saved++] = out[a];
    }
  }
  y->branch = known[n_known - 1];
}

static TensorId sketch_backward(Sketch *k, int l, TensorId dx) {
  Layer *y = &k->layer[l];
  program_layer(k->p, l);
  for (int i = 1 + rng_below(&k->rng, 5); i > 0; i--) {
    TensorId in[OP_MAX_IN], out[OP_MAX_OUT], next = sketch_tensor(k);
    TensorId a = program_need(k->p, y->saved[rng_below(&k->rng, y->n_saved)]);
    TensorId b = program_need(k->p, y->saved[rng_below(&k->rng, y->n_saved)]);
    operands_clear(in, out);
    switch (rng_below(&k->rng, 3)) {
    case 0:
      in[0] = a, in[1] = b, in[3] = dx, out[0] = next;
      sketch_op(k, OP_EXPERT_COMBINE, in, out, 0, -1);
      break;
    case 1:
      in[0] = dx, in[1] = a, in[2] = b, in[3] = dx, in[4] = in[5] = sketch_weight(k);
      out[0] = next, out[1] = sketch_tensor(k), out[2] = sketch_tensor(k);
      sketch_op(k, OP_EXPERT_DOWN_BWD, in, out, 0, -1);
      break;
    default:
      in[0] = dx, in[1] = a, out[0] = sketch_gradient(k);
      sketch_op(k, OP_EMBED_BWD, in, out, 0, -1);
      continue;
    }
    dx = next;
  }
  // One column of dmod a layer.
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT], next = sketch_tensor(k);
  operands_clear(in, out);
  in[0] = dx, in[2] = program_need(k->p, y->x), in[4] = k->mod;
  in[5] = program_need(k->p, y->mean), in[6] = program_need(k->p, y->rstd);
  if (l && k->p->tensors[k->layer[l - 1].branch].saved >= 0) in[3] = program_need(k->p, k->layer[l - 1].branch);
  out[0] = next, out[2] = k->dmod;
  sketch_op(k, OP_ADALN_BWD, in, out, 16 * l, 16 * l + 16);
  return next;
}

Sketch sketch_new(uint64_t seed, const PolicyTable *policy) {
  return sketch_sharing(seed, policy, seed % 2 == 1);
}

Sketch sketch_sharing(uint64_t seed, const PolicyTable *policy, int shares) {
  Sketch k = {.rng = {seed}, .shapes = xcalloc(MAX_SHAPES, sizeof(Shape))};
  k.layers = 1 + rng_below(&k.rng, MAX_LAYERS);
  k.accumulate = rng_chance(&k.rng, 50);
  Program *p = k.p = program_new("sketch", &sketch_dims, &backend_hash, policy);
  int64_t pack = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&sketch_dims), NULL);
  TensorId staged = program_external(p, SPACE_STAGING, 0, DT_U8, pack, "staged pack");
  TensorId live = program_external(p, SPACE_BATCH, 0, DT_U8, pack, "pack");
  OpArgs copy = {.span = {.count = pack}};
  program_op(p, OP_COPY, TENSORS(staged), TENSORS(live), &copy);
  k.mod = sketch_tensor(&k);
  TensorId x = sketch_tensor(&k), branch = NONE, in[OP_MAX_IN], out[OP_MAX_OUT];
  operands_clear(in, out);
  in[0] = sketch_weight(&k), out[0] = k.mod;
  sketch_op(&k, OP_SILU_FWD, in, out, 0, -1);
  in[0] = k.mod, out[0] = x;
  sketch_op(&k, OP_SILU_FWD, in, out, 0, -1);
  for (int l = 0; l < k.layers; l++) {
    sketch_forward(&k, l, x, branch);
    x = k.layer[l].x;
    branch = k.layer[l].branch;
  }
  program_layer(p, k.layers);
  k.dmod = program_tensor(p, DT_U8, 16 * k.layers, "dmod");
  TensorId dx = sketch_tensor(&k);
  operands_clear(in, out);
  in[0] = x, in[1] = branch, out[0] = dx;
  sketch_op(&k, OP_EXPERT_COMBINE, in, out, 0, -1);
  for (int l = k.layers - 1; l >= 0; l--) dx = sketch_backward(&k, l, dx);
  program_layer(p, -1);
  operands_clear(in, out);
  in[0] = k.dmod, out[0] = sketch_gradient(&k);
  sketch_op(&k, OP_MOD_BWD, in, out, 0, -1);
  program_output(p, dx);
  program_output(p, x);
  p->shares_gradients = shares;
  program_finish(p);
  return k;
}

void sketch_free(Sketch *k) {
  program_free(k->p);
  free(k->shapes);
}

PolicyTable random_policy(uint64_t seed) {
  Rng r = {seed};
  PolicyTable t = policy_table_new(MAX_LAYERS, MEMORY_KEEP);
  for (int i = 0; i < MAX_LAYERS * SAVED_COUNT; i++) {
    Policy policy = (Policy)rng_below(&r, 3);
    int is_x = i % SAVED_COUNT == SAVED_X;
    t.of[i] = is_x && policy == POLICY_RECOMPUTE ? POLICY_OFFLOAD : policy;
  }
  return t;
}

Costs random_costs(uint64_t seed) {
  Rng r = {seed};
  double link = 1e3 * pow(10, rng_below(&r, 6)); // bytes a second; an op's launch takes the model 3 us
  return (Costs){.rates = {.bytes = 1e9, .flops = 1e9},
                 .link = {.d2h = link, .h2d = 2 * link, .both_d2h = link / 2, .both_h2d = link, .latency = 1e-6},
                 .extents = {.text = 3, .image = 2, .segments = 1, .targets = 2, .pairs = 6}};
}

// ---- running them ----

Memory memory_new(const Program *p, int separate) {
  Memory m = {.pack = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&p->dims), NULL)};
  m.bases.separate = separate;
  int64_t bytes[SPACE_COUNT] = {[SPACE_WEIGHTS] = SLAB,
                                [SPACE_GRADS] = p->shares_gradients ? 0 : SLAB,
                                [SPACE_STAGING] = m.pack,
                                [SPACE_BATCH] = m.pack};
  if (!separate) bytes[SPACE_ARENA] = p->arena_bytes, bytes[SPACE_HOST] = p->host_bytes;
  for (int s = 0; s < SPACE_COUNT; s++) {
    if (!bytes[s]) continue;
    int rc = posix_memalign(&m.bases.of[s], 256, (size_t)bytes[s]);
    assert_int_equal(rc, 0);
  }
  if (p->shares_gradients) m.bases.of[SPACE_GRADS] = m.bases.of[SPACE_ARENA];
  return m;
}

void memory_free(Memory *m) {
  if (m->bases.of[SPACE_GRADS] == m->bases.of[SPACE_ARENA]) m->bases.of[SPACE_GRADS] = NULL;
  for (int s = 0; s < SPACE_COUNT; s++) free(m->bases.of[s]);
}

static int is_gradient(const Program *p, TensorId t) {
  return p->tensors[t].space == SPACE_GRADS && p->tensors[t].first >= 0;
}

static char *gradient_at(const Program *p, const Memory *m, TensorId t) {
  return (char *)m->bases.of[SPACE_GRADS] + p->tensors[t].offset;
}

// The same weights, pack and starting gradients for everyone; leftovers in the arena.
static void memory_fill(const Program *p, Memory *m) {
  Rng r = {99};
  for (int i = 0; i < SLAB; i++) ((uint8_t *)m->bases.of[SPACE_WEIGHTS])[i] = (uint8_t)rng_next(&r);
  memset(m->bases.of[SPACE_STAGING], 3, (size_t)m->pack);
  memset(m->bases.of[SPACE_BATCH], 9, (size_t)m->pack);
  if (m->bases.of[SPACE_ARENA]) memset(m->bases.of[SPACE_ARENA], 0xA5, (size_t)p->arena_bytes);
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (is_gradient(p, t)) memset(gradient_at(p, m, t), 1, (size_t)p->tensors[t].bytes);
}

uint64_t program_result(Program *p, Memory *m, uint64_t order) {
  memory_fill(p, m);
  if (order)
    program_replay_random(p, order);
  else
    program_replay(p, NULL);
  uint64_t h = 1;
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (is_gradient(p, t)) h = hash_bytes(h, gradient_at(p, m, t), p->tensors[t].bytes);
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (p->tensors[t].is_output) h = hash_bytes(h, program_address(p, t), p->tensors[t].bytes);
  return h;
}

uint64_t sketch_result(Sketch *k, int separate, uint64_t order) {
  Memory m = memory_new(k->p, separate);
  program_bind(k->p, &m.bases);
  uint64_t h = program_result(k->p, &m, order);
  memory_free(&m);
  return h;
}
