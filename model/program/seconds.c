#include "model/program/seconds.h"

#include "kernels/bits.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- the model ----

// The share of a rate that ops reach, as measured on an H200 at the sizes of the base model (docs/LOG.md). Most ops
// move bytes and do so at nearly the pace of a copy.
typedef struct Share {
  double flops, bytes;
} Share;

static Share kind_share(OpKind kind) {
  switch (kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_SHARED_UP_FWD:
    return (Share){.9, .8};
  case OP_LINEAR_WGRAD:
    return (Share){.85, .8};
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_DOWN_FWD:
  case OP_SHARED_DOWN_BWD:
    return (Share){.8, .8};
  case OP_EXPERT_UP_DGRAD:
    return (Share){.85, .8};
  case OP_EXPERT_DOWN_BWD:
    return (Share){.58, .8};
  case OP_EXPERT_DOWN_WGRAD:
  case OP_EXPERT_UP_WGRAD:
    return (Share){.69, .8};
  case OP_ATTENTION_FWD:
    return (Share){.55, .8};
  case OP_ATTENTION_BWD:
  case OP_ATTENTION_ROPE_BWD:
    return (Share){.36, .8};
  case OP_HEAD_CE:
    return (Share){.75, .8};
  case OP_ROUTER_FWD:
  case OP_ROUTER_BWD:
    return (Share){.05, .6};
  case OP_GRAD_SQUARES:
  case OP_GRAD_HASH:
  case OP_ADAMW:
  case OP_COPY:
  case OP_ZERO:
    return (Share){1, .95};
  default:
    return (Share){1, .8};
  }
}

// Tiles at the mask's edges are computed whole, so the useful share falls with the keys of a query. Heads narrower than
// 128 feed the tensor cores less. Fitted to images of 64 to 4,096 tokens.
static double attention_share(const Program *p, OpKind kind, const Extents *x) {
  double keys = x->pairs / fmax(x->text + x->image, 1), edge = kind == OP_ATTENTION_FWD ? 280 : 200;
  return keys / (keys + edge) * (p->dims.D < 128 ? .85 : 1);
}

static const double launch = 4e-6; // seconds that the smallest op takes

double op_model_seconds(const Costs *c, const Program *p, const Op *op) {
  double flops, bytes;
  op_cost(p, op, &c->extents, &flops, &bytes);
  Share s = kind_share(op->kind);
  if (op->kind == OP_ATTENTION_FWD || op->kind == OP_ATTENTION_BWD || op->kind == OP_ATTENTION_ROPE_BWD)
    s.flops *= attention_share(p, op->kind, &c->extents);
  const double multiplied = flops / (s.flops * c->rates.flops), moved = bytes / (s.bytes * c->rates.bytes);
  if (op->kind == OP_ATTENTION_ROPE_BWD) return launch + multiplied + moved; // attention, then what memory bounds
  return launch + fmax(multiplied, moved);
}

// ---- classes ----

// Order matters: the same numbers elsewhere are another class.
static void mix(uint64_t *h, int64_t value) {
  *h = bits_mix(*h ^ (uint64_t)value, 0);
}

static void mix_operands(uint64_t *h, const Program *p, const TensorId *t, int n) {
  for (int i = 0; i < n; i++) {
    mix(h, t[i] == NO_TENSOR ? -1 : p->tensors[t[i]].count);
    if (t[i] != NO_TENSOR) mix(h, p->tensors[t[i]].dtype);
  }
}

uint64_t op_class(const Program *p, const Op *op) {
  uint64_t h = 0;
  mix(&h, op->kind);
  mix_operands(&h, p, op->in, OP_MAX_IN);
  mix_operands(&h, p, op->out, OP_MAX_OUT);
  mix(&h, op->acc);
  switch (op->kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    mix(&h, op->args.linear.extent);
    for (int m = 0; m < MODALITIES; m++) {
      mix(&h, op->args.linear.in_dim[m]);
      mix(&h, op->args.linear.out_dim[m]);
    }
    break;
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_DOWN_FWD:
  case OP_EXPERT_DOWN_BWD:
  case OP_EXPERT_DOWN_WGRAD:
  case OP_EXPERT_UP_DGRAD:
  case OP_EXPERT_UP_WGRAD:
    for (int m = 0; m < MODALITIES; m++) mix(&h, op->args.experts.tiles[m]);
    break;
  case OP_ADALN_FWD:
  case OP_ADALN_BWD:
  case OP_COMBINE_ADALN_FWD:
  case OP_COMBINE_ADALN_BWD:
    mix(&h, op->args.adaln.silu_image);
    mix(&h, op->args.adaln.x_is_new);
    break;
  case OP_COPY:
  case OP_ZERO:
  case OP_ADD:
  case OP_CAST:
    mix(&h, op->args.span.count);
    break;
  case OP_GRAD_SQUARES:
  case OP_GRAD_DECIDE:
  case OP_GRAD_HASH:
  case OP_ADAMW:
    mix(&h, op->args.params.n);
    mix(&h, op->args.params.bf16_moments);
    for (int i = 0; i < op->args.params.n; i++) mix(&h, params_span(&op->args, i).count);
    break;
  default:
    break;
  }
  return h;
}

// Where the class is, or would have to be inserted.
static int class_at(const Costs *c, uint64_t of) {
  int low = 0, high = c->n_classes;
  while (low < high) {
    int middle = (low + high) / 2;
    if (c->classes[middle].of < of)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static int class_found(const Costs *c, int at, uint64_t of) {
  return at < c->n_classes && c->classes[at].of == of;
}

void costs_put(Costs *c, const ClassSeconds *x) {
  int at = class_at(c, x->of);
  if (!class_found(c, at, x->of)) {
    if (c->n_classes == c->room) {
      c->room = c->room ? 2 * c->room : 64;
      c->classes = xrealloc(c->classes, (size_t)c->room * sizeof *c->classes);
    }
    memmove(c->classes + at + 1, c->classes + at, (size_t)(c->n_classes - at) * sizeof *c->classes);
    c->n_classes++;
  }
  c->classes[at] = *x;
  double seconds = 0, model = 0;
  for (int i = 0; i < c->n_classes; i++) {
    if (c->classes[i].kind != x->kind) continue;
    seconds += c->classes[i].seconds * c->classes[i].measured;
    model += c->classes[i].model * c->classes[i].measured;
  }
  c->scale[x->kind] = model > 0 ? seconds / model : 0;
}

Costs costs_new(const Backend *b, const Extents *extents) {
  return (Costs){.rates = b->assumed,
                 .link = b->assumed_link,
                 .group = b->assumed_group,
                 .multiprocessors = b->multiprocessors,
                 .extents = *extents};
}

void costs_free(Costs *c) {
  free(c->classes);
  *c = (Costs){0};
}

// ---- asking ----

double copy_seconds(const Costs *c, Lane lane, double bytes, int both) {
  const LinkRates *l = &c->link;
  double rate = lane == LANE_D2H ? (both ? l->both_d2h : l->d2h) : (both ? l->both_h2d : l->h2d);
  return l->latency + bytes / rate;
}

// Of N shares a process sends N - 1; a sum that everybody gets is scattered and gathered.
static double collective_seconds(const Costs *c, const Program *p, const Op *op) {
  const GroupRates *g = &c->group;
  if (c->processes < 2 || g->reduce <= 0 || g->gather <= 0) return 0;
  double sent = (double)p->tensors[op->out[0]].bytes * (c->processes - 1) / c->processes, seconds = g->latency;
  if (op->kind != OP_ALL_GATHER) seconds += sent / g->reduce;
  if (op->kind != OP_REDUCE_SCATTER) seconds += sent / g->gather;
  return seconds;
}

double op_seconds(const Costs *c, const Program *p, const Op *op) {
  if (op->lane == LANE_COMM) return collective_seconds(c, p, op);
  if (op_is_copy(op)) return copy_seconds(c, op->lane, (double)op->args.span.count, 0);
  uint64_t of = op_class(p, op);
  int at = class_at(c, of);
  if (class_found(c, at, of)) return c->classes[at].seconds;
  return op_model_seconds(c, p, op) * (c->scale[op->kind] > 0 ? c->scale[op->kind] : 1);
}

int costs_have(const Costs *c, const Program *p, const Op *op) {
  uint64_t of = op_class(p, op);
  return class_found(c, class_at(c, of), of);
}

double program_seconds(const Costs *c, const Program *p) {
  double sum = 0;
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane == LANE_COMPUTE) sum += op_seconds(c, p, &p->ops[i]);
  return sum;
}

// ---- measured ----

static int class_compare(const void *a, const void *b) {
  const ClassSeconds *x = a, *y = b;
  return (x->of > y->of) - (x->of < y->of);
}

void costs_note(Costs *c, const Program *p, const double *seconds) {
  ClassSeconds *noted = xcalloc((size_t)p->n_ops + 1, sizeof *noted);
  int n = 0;
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    if (op->lane == LANE_COMPUTE)
      noted[n++] = (ClassSeconds){op_class(p, op), op->kind, seconds[i], op_model_seconds(c, p, op), 1};
  }
  qsort(noted, (size_t)n, sizeof *noted, class_compare);
  for (int i = 0, end; i < n; i = end) {
    ClassSeconds mean = noted[i];
    for (end = i + 1; end < n && noted[end].of == mean.of; end++) {
      mean.seconds += noted[end].seconds;
      mean.measured++;
    }
    mean.seconds /= mean.measured;
    costs_put(c, &mean);
  }
  free(noted);
}

static double closed(double seconds, double gap) {
  return fmax(seconds - gap, seconds / 2);
}

static double closed_sum(const Program *p, const double *seconds, double gap) {
  double sum = 0;
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane == LANE_COMPUTE || p->one_queue) sum += closed(seconds[i], gap);
  return sum;
}

double seconds_gap(const Program *p, const double *seconds, double total) {
  double low = 0, high = 0;
  if (closed_sum(p, seconds, 0) <= total) return 0;
  for (int i = 0; i < p->n_ops; i++) high = fmax(high, seconds[i]);
  for (int round = 0; round < 60; round++) { // the sum falls as the gap grows
    double gap = (low + high) / 2;
    *(closed_sum(p, seconds, gap) > total ? &low : &high) = gap;
  }
  return high;
}

void seconds_close(const Program *p, double *seconds, double gap) {
  for (int i = 0; i < p->n_ops; i++) seconds[i] = closed(seconds[i], gap);
}
