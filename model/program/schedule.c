#include "model/program/schedule.h"

#include "model/program/arena.h"
#include "model/program/program_internal.h"
#include "model/program/seconds.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// The stretch that op position i lies in: the last mark at or before it.
static int stretch_of(const ProgramState *s, int i) {
  int k = s->n_marks - 1;
  while (k > 0 && s->marks[k] > i) k--;
  return k;
}

// ---- by the clock: where costs are known ----

// When a program's ops would run if nothing ever held up the compute lane.
typedef struct Clock {
  double *at;      // [n_ops] when the compute lane gets to this position
  double *drained; // [n_ops] when a copy to the host is done, late rather than early; others: 0
  double idle;     // when the last of them is
} Clock;

static double reckoned_seconds(const Program *p, int i, int both) {
  const Op *op = &p->ops[i];
  return copy_seconds(p->policy.costs, op->lane, (double)op->args.span.count, both) * (1 + p->policy.slack);
}

static Clock clock_new(const Program *p) {
  Clock c = {.at = xmalloc((size_t)p->n_ops * sizeof *c.at), .drained = xcalloc((size_t)p->n_ops, sizeof *c.drained)};
  double now = 0;
  for (int i = 0; i < p->n_ops; i++) {
    c.at[i] = now;
    if (p->ops[i].lane == LANE_COMPUTE) now += p->state->seconds[i];
    if (p->ops[i].lane != LANE_D2H) continue;
    c.idle = fmax(now, c.idle) + reckoned_seconds(p, i, 0);
    c.drained[i] = c.idle;
  }
  return c;
}

static void clock_free(Clock *c) {
  free(c->at);
  free(c->drained);
}

// The last position that the compute lane gets to by then.
static int clock_position(const Clock *c, int n, double then) {
  int low = 0, high = n;
  while (low < high) {
    int middle = (low + high) / 2;
    if (c->at[middle] <= then)
      low = middle + 1;
    else
      high = middle;
  }
  return low ? low - 1 : 0;
}

// What this program offloads is copied to the host slab and back; other copies stay where they were recorded.
static int is_drain(const Program *p, int i) {
  return p->ops[i].lane == LANE_D2H && p->tensors[p->ops[i].out[0]].space == SPACE_HOST;
}

static int is_reload(const Program *p, int i) {
  return p->ops[i].lane == LANE_H2D && p->tensors[p->ops[i].in[0]].space == SPACE_HOST;
}

// before[i] of every reload: so late that each is done when its tensor is needed if all after it are, but not before
// its copy to the host is.
static void reloads_by_clock(const Program *p, int *before) {
  Clock clock = clock_new(p);
  double *begin = xmalloc((size_t)p->n_ops * sizeof *begin), next = INFINITY, earliest = 0;
  for (int i = p->n_ops - 1; i >= 0; i--) {
    if (!is_reload(p, i)) continue;
    double end = fmin(next, clock.at[i]);
    begin[i] = end - reckoned_seconds(p, i, 0);
    if (begin[i] < clock.idle) begin[i] = end - reckoned_seconds(p, i, 1);
    next = begin[i];
  }
  for (int i = 0; i < p->n_ops; i++) {
    if (!is_reload(p, i)) continue;
    earliest = fmax(earliest, clock.drained[p->tensors[p->ops[i].in[0]].producer]);
    before[i] = (int)min_i64(clock_position(&clock, p->n_ops, fmax(begin[i], earliest)), i);
  }
  free(begin);
  clock_free(&clock);
}

// ---- by stretches ----

static void reloads_by_stretch(const Program *p, int *before) {
  const ProgramState *s = p->state;
  for (int i = 0; i < p->n_ops; i++) {
    if (!is_reload(p, i)) continue;
    int stretch = stretch_of(s, i);
    before[i] = stretch ? s->marks[stretch - 1] : 0;
  }
}

// ---- either ----

void schedule_reloads(Program *p) {
  ProgramState *s = p->state;
  int n = p->n_ops;
  if (n == 0) return; // it has no memory for ops either
  // Op i goes right before recorded position before[i]; ops that stay have before[i] = i and follow those moved there.
  int *before = xmalloc((size_t)n * sizeof *before);
  int *new_index = xmalloc((size_t)n * sizeof *new_index);
  Op *ops = xmalloc((size_t)n * sizeof *ops);
  double *seconds = xmalloc((size_t)n * sizeof *seconds);
  if (p->policy.costs)
    reloads_by_clock(p, before);
  else
    reloads_by_stretch(p, before);
  int latest = 0;
  for (int i = 0; i < n; i++) {
    if (!is_reload(p, i)) {
      before[i] = i;
      continue;
    }
    int saved_at = p->tensors[p->ops[i].in[0]].producer;
    latest = before[i] = (int)max_i64(max_i64(before[i], saved_at + 1), latest);
  }
  int placed = 0, mark = 0, reload = 0;
  for (int i = 0; i < n; i++) {
    while (mark < s->n_marks && s->marks[mark] == i) s->marks[mark++] = placed;
    for (; reload < n && (!is_reload(p, reload) || before[reload] == i); reload++)
      if (is_reload(p, reload)) new_index[reload] = placed++;
    if (!is_reload(p, i)) new_index[i] = placed++;
  }
  while (mark < s->n_marks) s->marks[mark++] = placed;
  for (int i = 0; i < n; i++) ops[new_index[i]] = p->ops[i];
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (p->tensors[t].producer >= 0) p->tensors[t].producer = new_index[p->tensors[t].producer];
  memcpy(p->ops, ops, (size_t)n * sizeof *ops);
  if (s->seconds) {
    for (int i = 0; i < n; i++) seconds[new_index[i]] = s->seconds[i];
    memcpy(s->seconds, seconds, (size_t)n * sizeof *seconds);
  }
  free(seconds);
  free(ops);
  free(new_index);
  free(before);
}

static void lifetime_extend(Tensor *x, int to) {
  if (to > x->last) x->last = to;
}

// What is copied to the host lives on until the copy should be done.
static void drains_extend(Program *p) {
  const ProgramState *s = p->state;
  Clock clock = {0};
  if (p->policy.costs) clock = clock_new(p);
  for (int i = 0; i < p->n_ops; i++) {
    if (!is_drain(p, i)) continue;
    int next = stretch_of(s, i) + 2;
    int until = next < s->n_marks ? s->marks[next] - 1 : p->n_ops - 1;
    if (p->policy.costs) until = clock_position(&clock, p->n_ops, clock.drained[i]);
    lifetime_extend(&p->tensors[p->ops[i].in[0]], until);
  }
  clock_free(&clock);
}

void schedule_lifetimes(Program *p) {
  for (TensorId t = 0; t < p->n_tensors; t++) p->tensors[t].first = p->tensors[t].last = -1;
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    const OpInfo *o = &op_info[op->kind];
    for (int k = 0; k < o->n_in + o->n_out; k++) {
      int out = k - o->n_in;
      TensorId t = out < 0 ? op->in[k] : op->out[out];
      if (t == NO_TENSOR) continue;
      Tensor *x = &p->tensors[t];
      int reads = out < 0 || op->acc >> out & 1;
      if (reads && x->first < 0 && space_has(x->space, SPACE_LAID_OUT))
        panic("program %s: op %d %s reads operand %s, tensor %s, before anything has written it", p->name, i,
              op_info[op->kind].name, out < 0 ? o->in[k].name : o->out[out].name, x->name);
      if (x->first < 0) x->first = i;
      lifetime_extend(x, i);
    }
  }
  drains_extend(p);
  for (TensorId t = 0; t < p->n_tensors; t++) {
    Tensor *x = &p->tensors[t];
    if (!x->is_output) continue;
    if (x->first < 0) panic("program %s: output %s is never written", p->name, x->name);
    x->last = p->n_ops;
  }
}

// ---- gradients in the arena ----

// Of those at one address the one that is there first, which says the layer.
static int gradient_compare(const void *pa, const void *pb) {
  const GradientRange *a = pa, *b = pb;
  return a->begin != b->begin ? (a->begin > b->begin) - (a->begin < b->begin) : a->first - b->first;
}

static int reads_first(const Program *p, TensorId t) {
  const Op *op = &p->ops[p->tensors[t].first];
  int reads = 0;
  for (int i = 0; i < OP_MAX_IN; i++) reads |= op->in[i] == t;
  for (int i = 0; i < OP_MAX_OUT; i++) reads |= op->out[i] == t && op->acc >> i & 1;
  return reads;
}

// The op before which nothing needs a gradient's bytes: its first, unless that reads what a program before has left.
// Processes sum gradients of many parameters as one: what that reads this program has written, less what lies between.
static int gradient_begins(const Program *p, const TensorId *gradient, int n, TensorId t) {
  const Tensor *x = &p->tensors[t];
  int finds = !reads_first(p, t);
  for (int i = 0; i < n && !finds; i++) {
    const Tensor *y = &p->tensors[gradient[i]];
    finds = y->first < x->first && y->offset < x->offset + x->bytes && x->offset < y->offset + y->bytes;
  }
  return finds ? x->first : 0;
}

// Whether b, which does not lie below a, overlaps it or, but for padding between parameters, is the next of the same
// layer: then they are one range, needed from the earlier of their first ops on.
static int is_joined(const GradientRange *a, const GradientRange *b) {
  return b->begin < a->end || (b->layer == a->layer && b->begin <= a->end + ARENA_ALIGN);
}

// Finds the ranges of the gradients that share the arena.
static void gradient_ranges(Program *p) {
  ProgramState *s = p->state;
  if (!p->shares_gradients) return;
  GradientRange *all = xrealloc(s->gradients, (size_t)(p->n_tensors + 1) * sizeof *all);
  TensorId *gradient = xmalloc((size_t)(p->n_tensors + 1) * sizeof *gradient);
  int n = 0;
  s->gradients = all;
  s->n_gradients = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space == SPACE_GRADS && x->first >= 0 && x->bytes > 0) gradient[n++] = t;
  }
  for (int i = 0; i < n; i++) {
    const Tensor *x = &p->tensors[gradient[i]];
    int64_t begin = x->offset / ARENA_ALIGN * ARENA_ALIGN, end = x->offset + x->bytes;
    all[i] = (GradientRange){begin, (end + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN,
                             gradient_begins(p, gradient, n, gradient[i]), x->layer};
  }
  free(gradient);
  qsort(all, (size_t)n, sizeof *all, gradient_compare);
  for (int i = 0; i < n; i++) {
    GradientRange *last = &all[s->n_gradients - 1];
    if (!s->n_gradients || !is_joined(last, &all[i])) {
      all[s->n_gradients++] = all[i];
      continue;
    }
    last->end = max_i64(last->end, all[i].end);
    last->first = (int)min_i64(last->first, all[i].first);
  }
}

// ---- places ----

static int64_t space_place(Program *p, Space space, int64_t *live, int *fullest) {
  const ProgramState *s = p->state;
  ArenaItem *items = xmalloc((size_t)(p->n_tensors + s->n_gradients) * sizeof *items);
  int n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != space || x->first < 0) continue;
    items[n++] = (ArenaItem){.first = x->first, .last = x->last, .bytes = max_i64(x->bytes, 1)};
  }
  for (int i = 0; space == SPACE_ARENA && i < s->n_gradients; i++) {
    const GradientRange *g = &s->gradients[i];
    items[n++] =
        (ArenaItem){.first = g->first, .last = p->n_ops, .bytes = g->end - g->begin, .offset = g->begin, .is_fixed = 1};
  }
  int64_t peak = arena_place(items, n, ARENA_ALIGN, live, fullest);
  n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    Tensor *x = &p->tensors[t];
    if (x->space == space && x->first >= 0) x->offset = items[n++].offset;
  }
  free(items);
  return peak;
}

void schedule_place(Program *p) {
  gradient_ranges(p);
  p->arena_bytes = space_place(p, SPACE_ARENA, &p->live_bytes, &p->fullest);
  p->host_bytes = space_place(p, SPACE_HOST, NULL, NULL);
}
