#include "model/program/waits.h"

#include "model/program/access.h"
#include "model/program/program_internal.h"

#include <stdlib.h>

// What every op touches, computed once.
typedef struct OpAccess {
  int n;
  Access of[OP_MAX_ACCESS];
} OpAccess;

static OpAccess *access_table(const Program *p) {
  OpAccess *table = xmalloc((size_t)p->n_ops * sizeof *table);
  for (int i = 0; i < p->n_ops; i++) table[i].n = op_access(p, &p->ops[i], table[i].of);
  return table;
}

static int ops_conflict(const OpAccess *a, const OpAccess *b) {
  for (int i = 0; i < a->n; i++)
    for (int k = 0; k < b->n; k++)
      if (access_conflicts(&a->of[i], &b->of[k])) return 1;
  return 0;
}

// For each lane, the latest op known to be done.
typedef struct Clock {
  int done[LANE_COUNT];
} Clock;

static void clock_join(Clock *c, const Clock *other) {
  for (int l = 0; l < LANE_COUNT; l++)
    if (other->done[l] > c->done[l]) c->done[l] = other->done[l];
}

void waits_derive(Program *p) {
  int n = p->n_ops;
  OpAccess *access = access_table(p);
  Clock *after = xmalloc((size_t)n * sizeof *after);     // what is done once op i is
  int *previous = xmalloc((size_t)n * sizeof *previous); // the op before on the same lane
  int lane_end[LANE_COUNT];
  for (int l = 0; l < LANE_COUNT; l++) lane_end[l] = -1;
  for (int i = 0; i < n; i++) {
    Op *op = &p->ops[i];
    op->n_waits = 0;
    previous[i] = lane_end[op->lane];
    Clock known;
    for (int l = 0; l < LANE_COUNT; l++) known.done[l] = previous[i] < 0 ? -1 : after[previous[i]].done[l];
    int latest[LANE_COUNT]; // the latest conflict on each other lane that is not known to be done
    for (int l = 0; l < LANE_COUNT; l++) {
      latest[l] = -1;
      if (l == (int)op->lane) continue;
      int k = lane_end[l];
      while (k > known.done[l] && !ops_conflict(&access[i], &access[k])) k = previous[k];
      if (k > known.done[l]) latest[l] = k;
    }
    for (int l = 0; l < LANE_COUNT; l++) {
      int implied = latest[l] < 0;
      for (int m = 0; m < LANE_COUNT && !implied; m++)
        implied = m != l && latest[m] >= 0 && after[latest[m]].done[l] >= latest[l];
      if (!implied) op->waits[op->n_waits++] = (Wait){latest[l]};
    }
    for (int w = 0; w < op->n_waits; w++) clock_join(&known, &after[op->waits[w].op]);
    known.done[op->lane] = i;
    after[i] = known;
    lane_end[op->lane] = i;
  }
  free(previous);
  free(after);
  free(access);
}
