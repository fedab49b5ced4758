#include "model/program/simulate.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

// A lane as it is played: its next op, and what is left of the one at work.
typedef struct LaneState {
  int next;    // n_ops: none
  int at_work; // next has begun
  double left; // seconds of it, with nothing beside it
} LaneState;

static Lane op_queue(const Program *p, int i) {
  return p->one_queue ? LANE_COMPUTE : p->ops[i].lane;
}

// following[i]: the op after i on its lane, n_ops for the last; first[lane] likewise.
static void lanes_link(const Program *p, int *following, LaneState lane[LANE_COUNT]) {
  for (int l = 0; l < LANE_COUNT; l++) lane[l] = (LaneState){.next = p->n_ops};
  for (int i = p->n_ops - 1; i >= 0; i--) {
    LaneState *l = &lane[op_queue(p, i)];
    following[i] = l->next;
    l->next = i;
  }
}

static int waits_over(const Program *p, int i, const char *done) {
  for (int w = 0; !p->one_queue && w < p->ops[i].n_waits; w++)
    if (!done[p->ops[i].waits[w].op]) return 0;
  return 1;
}

double copy_drag(const Costs *c) {
  // Of the memory's time that a copy takes. On an H200 base's ops take 1 to 7% longer beside a copy from the host, and
  // offloading 1.1 GB each way costs a step .3 ms: between .5 and 2.
  const double felt = 1;
  return c->rates.bytes > 0 ? felt * c->link.d2h / c->rates.bytes : 0;
}

// How many times longer an op takes on `share` of the multiprocessors than on all of them: a product, and an update,
// for which a part of them is enough where it has them to itself.
static double slower_product(const Costs *c, int share) {
  return c->multiprocessors > 0 ? (double)c->multiprocessors / share : 1;
}
static double slower_update(const Costs *c, int share) {
  // On an H200, beside base's forward pass: a multiprocessor moves 48 GB/s, where all of them have 30 each.
  return fmax(1, slower_product(c, share) * 30 / 48);
}

// How many times longer the lane's op takes than alone, as things are.
static double slowness(const Program *p, const LaneState lane[LANE_COUNT], int l, const Costs *c) {
  const LinkRates *link = &c->link;
  int copies = lane[LANE_D2H].at_work + lane[LANE_H2D].at_work;
  int shares = lane[LANE_COMPUTE].at_work && lane[LANE_UPDATE].at_work && p->update_share > 0;
  if (l == LANE_UPDATE) return shares ? slower_update(c, p->update_share) : 1;
  // Beside an update small's, medium's and base's forward passes are slower still, by a clock that power lowers.
  const double clock = c->multiprocessors > 0 ? 1.12 : 1;
  if (l == LANE_COMPUTE)
    return (shares ? clock * slower_product(c, c->multiprocessors - p->update_share) : 1) /
           (1 - copy_drag(c) * copies - c->group.drag * lane[LANE_COMM].at_work);
  if (copies < 2) return 1;
  return l == LANE_D2H ? link->d2h / link->both_d2h : l == LANE_H2D ? link->h2d / link->both_h2d : 1;
}

Simulation simulate(const Program *p, const double *seconds, const Costs *costs, OpTime *times) {
  Simulation s = {0};
  int *following = xmalloc(((size_t)p->n_ops + 1) * sizeof *following);
  char *done = xcalloc((size_t)p->n_ops + 1, 1);
  LaneState lane[LANE_COUNT];
  lanes_link(p, following, lane);
  for (int remaining = p->n_ops; remaining;) {
    double step = DBL_MAX, slow[LANE_COUNT];
    for (int l = 0; l < LANE_COUNT; l++) {
      LaneState *a = &lane[l];
      if (a->next == p->n_ops || a->at_work || !waits_over(p, a->next, done)) continue;
      a->at_work = 1;
      a->left = seconds[a->next];
      if (times) times[a->next].begin = s.seconds;
    }
    for (int l = 0; l < LANE_COUNT; l++) {
      slow[l] = slowness(p, lane, l, costs);
      if (lane[l].at_work) step = fmin(step, lane[l].left * slow[l]);
    }
    if (step == DBL_MAX) panic("program %s: waits that no order can satisfy", p->name);
    s.seconds += step;
    if (!lane[LANE_COMPUTE].at_work && !lane[LANE_UPDATE].at_work) s.stalled += step;
    for (int l = 0; l < LANE_COUNT; l++) {
      LaneState *a = &lane[l];
      if (!a->at_work) continue;
      s.busy[l] += step;
      if (a->left * slow[l] > step) {
        a->left -= step / slow[l];
        continue;
      }
      if (times) times[a->next].end = s.seconds;
      done[a->next] = 1;
      a->at_work = 0;
      a->next = following[a->next];
      remaining--;
    }
  }
  free(done);
  free(following);
  return s;
}

double simulation_hidden(const Simulation *s) {
  double copies = s->busy[LANE_D2H] + s->busy[LANE_H2D];
  return copies > 0 ? 1 - fmin(s->stalled / copies, 1) : 1;
}
