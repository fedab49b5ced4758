#include "model/program/schedule.h"

#include "model/program/arena.h"
#include "model/program/ops.h"
#include "model/program/program_internal.h"

#include <stdlib.h>
#include <string.h>

// The stretch that op position i lies in: the last mark at or before it.
static int stretch_of(const ProgramState *s, int i) {
  int k = s->n_marks - 1;
  while (k > 0 && s->marks[k] > i) k--;
  return k;
}

void schedule_reloads(Program *p) {
  ProgramState *s = p->state;
  int n = p->n_ops;
  // Op i goes right before recorded position before[i]; ops that stay have before[i] = i and follow those moved there.
  int *before = xmalloc((size_t)n * sizeof *before);
  int *new_index = xmalloc((size_t)n * sizeof *new_index);
  Op *ops = xmalloc((size_t)n * sizeof *ops);
  for (int i = 0; i < n; i++) {
    before[i] = i;
    if (p->ops[i].lane != LANE_H2D) continue;
    int stretch = stretch_of(s, i);
    before[i] = stretch ? s->marks[stretch - 1] : 0;
    int saved_at = p->tensors[p->ops[i].in[0]].producer;
    if (before[i] <= saved_at) before[i] = saved_at + 1;
  }
  int placed = 0, mark = 0;
  for (int i = 0; i < n; i++) {
    while (mark < s->n_marks && s->marks[mark] == i) s->marks[mark++] = placed;
    for (int k = i; k < n; k++)
      if (p->ops[k].lane == LANE_H2D && before[k] == i) new_index[k] = placed++;
    if (p->ops[i].lane != LANE_H2D) new_index[i] = placed++;
  }
  while (mark < s->n_marks) s->marks[mark++] = placed;
  for (int i = 0; i < n; i++) ops[new_index[i]] = p->ops[i];
  for (TensorId t = 0; t < p->n_tensors; t++)
    if (p->tensors[t].producer >= 0) p->tensors[t].producer = new_index[p->tensors[t].producer];
  memcpy(p->ops, ops, (size_t)n * sizeof *ops);
  free(ops);
  free(new_index);
  free(before);
}

static void lifetime_extend(Tensor *x, int to) {
  if (to > x->last) x->last = to;
}

void schedule_lifetimes(Program *p) {
  const ProgramState *s = p->state;
  for (TensorId t = 0; t < p->n_tensors; t++) p->tensors[t].first = p->tensors[t].last = -1;
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    Operands o = op_operands(op->kind);
    for (int k = 0; k < o.n_in + o.n_out; k++) {
      int out = k - o.n_in;
      TensorId t = out < 0 ? op->in[k] : op->out[out];
      if (t == NO_TENSOR) continue;
      Tensor *x = &p->tensors[t];
      int reads = out < 0 || op->acc >> out & 1;
      if (reads && x->first < 0 && (x->space == SPACE_ARENA || x->space == SPACE_HOST))
        panic("program %s: op %d %s reads operand %s, tensor %s, before anything has written it", p->name, i,
              op_info[op->kind].name, out < 0 ? o.in[k].name : o.out[out].name, x->name);
      if (x->first < 0) x->first = i;
      lifetime_extend(x, i);
    }
    if (op->lane != LANE_D2H) continue;
    int next = stretch_of(s, i) + 2;
    lifetime_extend(&p->tensors[op->in[0]], next < s->n_marks ? s->marks[next] - 1 : p->n_ops - 1);
  }
  for (TensorId t = 0; t < p->n_tensors; t++) {
    Tensor *x = &p->tensors[t];
    if (!x->is_output) continue;
    if (x->first < 0) panic("program %s: output %s is never written", p->name, x->name);
    x->last = p->n_ops;
  }
}

static int64_t space_place(Program *p, Space space, int64_t *live, int *fullest) {
  ArenaItem *items = xmalloc((size_t)p->n_tensors * sizeof *items);
  int n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != space || x->first < 0) continue;
    items[n++] = (ArenaItem){.first = x->first, .last = x->last, .bytes = max_i64(x->bytes, 1)};
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
  p->arena_bytes = space_place(p, SPACE_ARENA, &p->live_bytes, &p->fullest);
  p->host_bytes = space_place(p, SPACE_HOST, NULL, NULL);
}
