#include "model/program/choose.h"

#include "model/program/policy.h"
#include "model/program/prices.h"
#include "model/program/program_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  SHARES = 6,      // of what the link carries, up to a half more
  FINER = 3,       // times that the best share is looked for with half the step
  ROUNDS = 3,      // of learning what else needs memory
  MOVES = 24,      // changes tried before giving up
  RECORDED = 60000 // ops recorded in search of better plans, about: what bounds the time
};
static const double planned_slack = .05;

// ---- what a plan comes to ----

PlanOutcome outcome_of(const ChooseTask *task, const PolicyTable *policy) {
  Program *p = task->record(task->model, policy);
  double *seconds = xmalloc((size_t)p->n_ops * sizeof *seconds);
  for (int i = 0; i < p->n_ops; i++)
    seconds[i] = p->state->seconds ? p->state->seconds[i] : op_seconds(task->costs, p, &p->ops[i]);
  PlanOutcome o = {.time = simulate(p, seconds, task->costs, NULL), .arena = p->arena_bytes, .host = p->host_bytes};
  free(seconds);
  program_free(p);
  return o;
}

// ---- the search ----

typedef struct Search {
  const ChooseTask *task;
  Menu menu;
  int corners;         // of the menu, the first items (prices.h)
  int *item;           // [layers] of the plan at hand
  int *best;           // [layers] of the best plan so far
  PlanOutcome outcome; // of it
  int tried, ops;      // plans, and about how many ops each had
} Search;

static PolicyTable table_of(const Search *s, const int *item) {
  PolicyTable t = policy_table_new(s->task->layers, MEMORY_KEEP);
  t.costs = s->task->costs;
  t.slack = planned_slack;
  t.least_copy = s->task->rules.least_copy;
  for (int l = 0; l < t.layers; l++) memcpy(t.of + l * SAVED_COUNT, s->menu.item[item[l]].of, SAVED_COUNT);
  return t;
}

// How far a plan is from what may be used.
static int64_t excess(const ChooseTask *t, const PlanOutcome *o) {
  return max_i64(0, o->arena - t->arena) + max_i64(0, o->host - t->host);
}

static int is_better(const Search *s, const PlanOutcome *o) {
  if (!s->tried) return 1;
  int64_t over = excess(s->task, o), best = excess(s->task, &s->outcome);
  return over != best ? over < best : o->time.seconds < s->outcome.time.seconds * (1 - 1e-6);
}

// Records and plays the plan at hand; 1: it is the best so far, and kept.
static int try_plan(Search *s, PlanOutcome *o) {
  PolicyTable t = table_of(s, s->item);
  *o = outcome_of(s->task, &t);
  policy_table_free(&t);
  int better = is_better(s, o);
  s->tried++;
  if (!better) return 0;
  s->outcome = *o;
  memcpy(s->best, s->item, (size_t)s->task->layers * sizeof *s->item);
  return 1;
}

static double plan_resident(const Search *s) {
  double sum = 0;
  for (int l = 0; l < s->task->layers; l++) sum += (double)s->menu.item[s->item[l]].resident;
  return sum;
}

// ---- counting out ----

// Whether item a goes to layers before those that have b: the most copied first, what stays most last.
static int goes_before(const MenuItem *a, const MenuItem *b) {
  return a->copied != b->copied ? a->copied > b->copied : a->resident < b->resident;
}

static void mix_lay(Search *s, Mix x) {
  int l = 0;
  for (int placed = 0; placed < MIX_ITEMS; placed++) {
    int next = -1;
    for (int k = 0; k < MIX_ITEMS; k++)
      if (x.count[k] >= 0 && (next < 0 || goes_before(&s->menu.item[x.item[k]], &s->menu.item[x.item[next]]))) next = k;
    for (int n = 0; n < x.count[next]; n++) s->item[l++] = x.item[next];
    x.count[next] = -1;
  }
}

// Plans that copy up to `copied` bytes. `other`: bytes of the arena that are of no item, which each plan teaches the
// next. 1: one of them is the best so far.
static int search_copied(Search *s, double copied, double *other) {
  const ChooseTask *t = s->task;
  int improved = 0;
  int64_t pinned = INT64_MAX; // bytes that a layer copies at least
  for (int i = 0; i < s->menu.n; i++) pinned = min_i64(pinned, s->menu.item[i].copied);
  Limits l = {.copied = fmax(fmin(copied, (double)t->host), (double)(t->layers * pinned)),
              .link = t->costs->link.d2h,
              .layers = t->layers};
  for (int round = 0; round < ROUNDS; round++) {
    Mix x;
    PlanOutcome o;
    l.resident = fmax(0, (double)t->arena - *other);
    while (!prices_mix(&s->menu, s->corners, &l, &x))
      l.resident += .02 * (double)s->outcome.arena + 1; // how much is missing
    mix_lay(s, x);
    improved |= try_plan(s, &o);
    double found = (double)o.arena - plan_resident(s);
    if (fabs(found - *other) < 1e-3 * (double)t->arena) break;
    *other = found;
  }
  return improved;
}

static void try_all(Search *s, int item) {
  PlanOutcome o;
  for (int l = 0; l < s->task->layers; l++) s->item[l] = item;
  try_plan(s, &o);
}

// ---- single changes ----

typedef struct Move {
  int layer[2], to[2]; // layer[1] -1: one layer alone
  double gain;         // seconds less, if nothing is waited for
} Move;

static int move_compare(const void *pa, const void *pb) {
  const Move *a = pa, *b = pb;
  if (a->gain != b->gain) return a->gain > b->gain ? -1 : 1;
  return memcmp(a->layer, b->layer, sizeof a->layer + sizeof a->to);
}

// Of layers in a row that have the same item only the first and the last are worth changing.
static int is_edge(const Search *s, int l) {
  return l == 0 || l == s->task->layers - 1 || s->best[l - 1] != s->best[l] || s->best[l + 1] != s->best[l];
}

// Notes the move among the most promising ones.
static void move_note(const Search *s, Move m, Move *moves, int *n) {
  int64_t resident = 0;
  int is_last = 0;
  m.gain = 0;
  for (int i = 0; i < 2 && m.layer[i] >= 0; i++) {
    const MenuItem *from = &s->menu.item[s->best[m.layer[i]]], *to = &s->menu.item[m.to[i]];
    m.gain += from->seconds - to->seconds;
    resident += to->resident - from->resident;
    is_last |= m.layer[i] == s->task->layers - 1; // what it rebuilds lies there at the fullest moment anyway
  }
  if (m.gain <= 1e-7 || (resident > s->task->arena - s->outcome.arena && !is_last)) return;
  int at = *n;
  if (*n < MOVES) {
    (*n)++;
  } else {
    at = 0;
    for (int i = 1; i < *n; i++)
      if (move_compare(&moves[i], &moves[at]) > 0) at = i;
    if (move_compare(&m, &moves[at]) > 0) return;
  }
  moves[at] = m;
}

// Tries changes of the best plan, the most promising first, of one layer or of two at once. 1: one helped.
static int improve(Search *s, int pairs) {
  const int L = s->task->layers;
  int n = 0;
  Move moves[MOVES];
  for (int a = 0; a < L; a++) {
    if (!is_edge(s, a)) continue;
    for (int i = 0; i < (pairs ? s->corners : s->menu.n); i++) {
      if (i == s->best[a]) continue;
      if (!pairs) move_note(s, (Move){{a, -1}, {i, -1}, 0}, moves, &n);
      for (int b = 0; pairs && b < a; b++)
        for (int k = 0; is_edge(s, b) && k < s->corners; k++)
          if (k != s->best[b]) move_note(s, (Move){{a, b}, {i, k}, 0}, moves, &n);
    }
  }
  qsort(moves, (size_t)n, sizeof *moves, move_compare);
  for (int i = 0; i < n && s->tried * s->ops < RECORDED; i++) {
    PlanOutcome o;
    memcpy(s->item, s->best, (size_t)L * sizeof *s->item);
    for (int k = 0; k < 2 && moves[i].layer[k] >= 0; k++) s->item[moves[i].layer[k]] = moves[i].to[k];
    if (try_plan(s, &o)) return 1;
  }
  return 0;
}

// ---- a bound ----

// Bytes that lie in the arena at op i whatever the plan: what is no saved tensor, and what the op itself uses of layers
// from `layer` on.
static double bytes_anyway(const Program *kept, int i, int layer) {
  const Op *op = &kept->ops[i];
  double sum = 0;
  for (TensorId t = 0; t < kept->n_tensors; t++) {
    const Tensor *x = &kept->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0 || x->first > i || x->last < i) continue;
    int used = x->saved < 0;
    for (int k = 0; k < OP_MAX_IN; k++) used |= op->in[k] == t && x->layer >= layer;
    for (int k = 0; k < OP_MAX_OUT; k++) used |= op->out[k] == t && x->layer >= layer;
    if (used) sum += (double)x->bytes;
  }
  return sum;
}

// No plan that fits is shorter. At an op of the last layer, forward or backward, lies what lies there anyway and what
// stays of the layers before; at one of the heads, what stays of all layers; and only so much can have been copied by
// then. Of both, the op that leaves least.
static double plan_bound(const Search *s, const Program *kept) {
  const ChooseTask *t = s->task;
  double now = 0, best = 0;
  Limits least[2] = {{.resident = INFINITY}, {.resident = INFINITY}}; // of all layers but the last, of all
  for (int i = 0; i < kept->n_ops; i++) {
    const Op *op = &kept->ops[i];
    for (int all = 0; all < 2; all++) {
      if (op->layer < t->layers - 1 + all) continue;
      Limits l = {.resident = (double)t->arena - bytes_anyway(kept, i, t->layers - 1 + all),
                  .copied = t->rules.offload ? fmin(now * t->costs->link.d2h, (double)t->host) : 0,
                  .link = t->costs->link.d2h,
                  .layers = t->layers - 1 + all};
      if (l.resident + l.copied < least[all].resident + least[all].copied) least[all] = l;
    }
    if (op->lane == LANE_COMPUTE) now += op_seconds(t->costs, kept, op);
  }
  for (int all = 0; all < 2; all++)
    if (least[all].layers && isfinite(least[all].resident))
      best = fmax(best, prices_bound(&s->menu, s->corners, &least[all]));
  return now + best;
}

// ---- all of it ----

Chosen choose(const ChooseTask *task) {
  Search s = {.task = task};
  PolicyTable keep = policy_table_new(task->layers, MEMORY_KEEP);
  Program *kept = task->record(task->model, &keep);
  PlanOutcome o;
  double now = 0, peak = 0; // seconds of the step, and of them before the arena is fullest
  for (int i = 0; i < kept->n_ops; i++) {
    if (i == kept->fullest) peak = now;
    if (kept->ops[i].lane == LANE_COMPUTE) now += op_seconds(task->costs, kept, &kept->ops[i]);
  }
  s.menu = menu_new(kept, task->layers / 2, task->costs, &task->rules); // layers are alike
  s.corners = prices_corners(&s.menu);
  s.ops = kept->n_ops * 3 / 2;
  s.item = xcalloc((size_t)task->layers, sizeof *s.item);
  s.best = xcalloc((size_t)task->layers, sizeof *s.best);
  try_plan(&s, &o); // what is pinned, and all else kept
  if (excess(task, &o)) {
    double carried = task->rules.offload ? peak * task->costs->link.d2h : 0,
           other = (double)o.arena - plan_resident(&s);
    double best = 0, step = carried * 1.5 / SHARES;
    for (int share = 0; share <= (carried > 0 ? SHARES : 0); share++)
      if (search_copied(&s, share * step, &other)) best = share * step;
    for (int finer = 0; finer < FINER && carried > 0 && s.tried * s.ops < RECORDED; finer++) {
      step /= 2;
      if (search_copied(&s, best + step, &other))
        best += step;
      else if (best > 0 && search_copied(&s, best - step, &other))
        best -= step;
    }
    for (int copies = 0; copies < 2 && excess(task, &s.outcome); copies++) try_all(&s, prices_leanest(&s.menu, copies));
    while (improve(&s, 0) || improve(&s, 1)) continue;
  }
  Chosen c = {.policy = table_of(&s, s.best),
              .outcome = s.outcome,
              .fits = excess(task, &s.outcome) == 0,
              .bound = plan_bound(&s, kept),
              .tried = s.tried};
  program_free(kept);
  policy_table_free(&keep);
  menu_free(&s.menu);
  free(s.item);
  free(s.best);
  return c;
}
