#include "model/program/compile.h"

#include "model/program/program_internal.h"
#include "model/program/schedule.h"
#include "model/program/seconds.h"
#include "model/program/waits.h"

#include <stdlib.h>

void program_finish(Program *p) {
  program_check_open(p);
  if (p->policy.costs) {
    p->state->seconds = xmalloc((size_t)p->n_ops * sizeof *p->state->seconds);
    for (int i = 0; i < p->n_ops; i++) p->state->seconds[i] = op_seconds(p->policy.costs, p, &p->ops[i]);
  }
  schedule_reloads(p);
  schedule_lifetimes(p);
  schedule_place(p);
  waits_derive(p);
  p->state->awaited = xcalloc((size_t)p->n_ops + 1, 1);
  for (int i = 0; i < p->n_ops; i++) {
    Op *op = &p->ops[i];
    p->scratch_bytes = max_i64(p->scratch_bytes, (int64_t)kernel_scratch(p->backend, op->kind, &p->dims, &op->args));
    p->state->uses_lane[op->lane] = 1;
    for (int w = 0; w < op->n_waits; w++) p->state->awaited[op->waits[w].op] = 1;
  }
  p->state->finished = 1;
}
