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
  ROOMS = 2,       // that are searched
  STRIDE = 4,      // of rooms that are alike
  RECORDED = 60000 // ops recorded in search of better plans, about: what bounds the time
};
static const double planned_slack = .05;
static const double worth = .003; // of a step's seconds: what looking into another room must promise

// ---- what a plan comes to ----

// Bytes of the gradients that share the arena and are there at op i.
static int64_t gradients_alive(const Program *p, int i) {
  int64_t sum = 0;
  for (int k = 0; k < p->state->n_gradients; k++) {
    const GradientRange *g = &p->state->gradients[k];
    if (g->first <= i) sum += g->end - g->begin;
  }
  return sum;
}

// Bytes alive when most activations are: at the turn from the forward to the backward pass. Where gradients share the
// arena it may be fuller towards the end, by bytes that no plan changes.
static int64_t live_at_turn(const Program *p) {
  if (!p->state->n_gradients) return p->live_bytes;
  int64_t *change = xcalloc((size_t)p->n_ops + 2, sizeof *change), live = 0, most = 0;
  int turn = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0) continue;
    change[x->first] += x->bytes;
    change[x->last + 1] -= x->bytes;
  }
  for (int i = 0; i < p->n_ops; i++) {
    live += change[i];
    if (live <= most) continue;
    most = live;
    turn = i;
  }
  free(change);
  return most + gradients_alive(p, turn);
}

PlanOutcome outcome_of(const ChooseTask *task, const PolicyTable *policy) {
  Program *p = task->record(task->model, policy);
  double *seconds = xmalloc((size_t)p->n_ops * sizeof *seconds);
  for (int i = 0; i < p->n_ops; i++)
    seconds[i] = p->state->seconds ? p->state->seconds[i] : op_seconds(task->costs, p, &p->ops[i]);
  PlanOutcome o = {.time = simulate(p, seconds, task->costs, NULL), .arena = p->arena_bytes, .host = p->host_bytes};
  o.turn = live_at_turn(p) + p->arena_bytes - p->live_bytes; // with what its placing wastes
  free(seconds);
  program_free(p);
  return o;
}

// ---- the search ----

// A plan that was recorded and played.
typedef struct Tried {
  int *item; // [layers] of the menu
  PlanOutcome outcome;
} Tried;

typedef struct Search {
  const ChooseTask *task;
  Menu menu;
  int corners;     // of the menu, the first items (prices.h)
  double carried;  // bytes that the link carries before the arena is fullest
  int ops;         // about how many a plan has
  Tried *plan;     // [tried] all plans so far
  int tried, most; // most: how many are worth their time
  Room room;       // that is searched
  int best;        // of the plans, for this room
  int *item;       // [layers] of the plan at hand
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
static int64_t excess(const Room *r, const PlanOutcome *o) {
  return max_i64(0, o->arena - r->arena) + max_i64(0, o->host - r->host);
}

static int is_better(const Room *r, const PlanOutcome *a, const PlanOutcome *b) {
  int64_t over = excess(r, a), other = excess(r, b);
  return over != other ? over < other : a->time.seconds < b->time.seconds * (1 - 1e-6);
}

static const PlanOutcome *best_outcome(const Search *s) {
  return &s->plan[s->best].outcome;
}

// Records and plays the plan at hand; 1: it is the best so far.
static int try_plan(Search *s) {
  PolicyTable t = table_of(s, s->item);
  size_t bytes = (size_t)s->task->layers * sizeof *s->item;
  s->plan = xrealloc(s->plan, (size_t)(s->tried + 1) * sizeof *s->plan);
  Tried *plan = &s->plan[s->tried++];
  *plan = (Tried){memcpy(xmalloc(bytes), s->item, bytes), outcome_of(s->task, &t)};
  policy_table_free(&t);
  if (s->tried > 1 && !is_better(&s->room, &plan->outcome, best_outcome(s))) return 0;
  s->best = s->tried - 1;
  return 1;
}

static double plan_resident(const Search *s, const int *item) {
  double sum = 0;
  for (int l = 0; l < s->task->layers; l++) sum += (double)s->menu.item[item[l]].resident;
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
  Limits l = {.copied = fmax(fmin(copied, (double)s->room.host), (double)(t->layers * pinned)),
              .link = t->costs->link.d2h,
              .layers = t->layers};
  for (int round = 0; round < ROUNDS; round++) {
    Mix x;
    l.resident = fmax(0, (double)s->room.arena - *other);
    while (!prices_mix(&s->menu, s->corners, &l, &x))
      l.resident += .02 * (double)best_outcome(s)->arena + 1; // how much is missing
    mix_lay(s, x);
    improved |= try_plan(s);
    double found = (double)s->plan[s->tried - 1].outcome.turn - plan_resident(s, s->item);
    if (fabs(found - *other) < 1e-3 * (double)s->room.arena) break;
    *other = found;
  }
  return improved;
}

static void try_all(Search *s, int item) {
  for (int l = 0; l < s->task->layers; l++) s->item[l] = item;
  try_plan(s);
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
  const int *of = s->plan[s->best].item;
  return l == 0 || l == s->task->layers - 1 || of[l - 1] != of[l] || of[l + 1] != of[l];
}

// Notes the move among the most promising ones.
static void move_note(const Search *s, Move m, Move *moves, int *n) {
  const int *of = s->plan[s->best].item;
  int64_t resident = 0;
  int is_last = 0;
  m.gain = 0;
  for (int i = 0; i < 2 && m.layer[i] >= 0; i++) {
    const MenuItem *from = &s->menu.item[of[m.layer[i]]], *to = &s->menu.item[m.to[i]];
    m.gain += from->seconds - to->seconds;
    resident += to->resident - from->resident;
    is_last |= m.layer[i] == s->task->layers - 1; // what it rebuilds lies there at the fullest moment anyway
  }
  if (m.gain <= 1e-7 || (resident > s->room.arena - best_outcome(s)->arena && !is_last)) return;
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
  const int L = s->task->layers, *of = s->plan[s->best].item;
  int n = 0;
  Move moves[MOVES];
  for (int a = 0; a < L; a++) {
    if (!is_edge(s, a)) continue;
    for (int i = 0; i < (pairs ? s->corners : s->menu.n); i++) {
      if (i == of[a]) continue;
      if (!pairs) move_note(s, (Move){{a, -1}, {i, -1}, 0}, moves, &n);
      for (int b = 0; pairs && b < a; b++)
        for (int k = 0; is_edge(s, b) && k < s->corners; k++)
          if (k != of[b]) move_note(s, (Move){{a, b}, {i, k}, 0}, moves, &n);
    }
  }
  qsort(moves, (size_t)n, sizeof *moves, move_compare);
  for (int i = 0; i < n && s->tried < s->most; i++) {
    memcpy(s->item, of, (size_t)L * sizeof *s->item);
    for (int k = 0; k < 2 && moves[i].layer[k] >= 0; k++) s->item[moves[i].layer[k]] = moves[i].to[k];
    if (try_plan(s)) return 1;
  }
  return 0;
}

// ---- a bound ----

// Bytes that lie in the arena at op i whatever the plan: what is no saved tensor, gradients that share it, and what the
// op itself uses of layers from `layer` on.
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
  return sum + (double)gradients_alive(kept, i);
}

// The op that leaves least of the device to what lies beside it.
typedef struct Narrow {
  double anyway; // bytes
  double copied; // bytes that can be on the host by then
  int layers;    // whose saved tensors lie beside it; 0: there is no such op
} Narrow;

// At an op of the last layer, forward or backward, lies what lies there anyway and what stays of the layers before; at
// one of the heads, what stays of all layers; and only so much can have been copied by then.
typedef struct Bounds {
  double passes; // seconds of everything kept
  Narrow at[2];  // of all layers but the last, of all
} Bounds;

static Bounds bounds_of(const ChooseTask *t, const Program *kept) {
  Bounds b = {0};
  double most[2] = {-INFINITY, -INFINITY};
  for (int i = 0; i < kept->n_ops; i++) {
    const Op *op = &kept->ops[i];
    for (int all = 0; all < 2; all++) {
      if (op->layer < t->layers - 1 + all || t->layers - 1 + all == 0) continue;
      Narrow n = {bytes_anyway(kept, i, t->layers - 1 + all), t->rules.offload ? b.passes * t->costs->link.d2h : 0,
                  t->layers - 1 + all};
      if (n.anyway - n.copied <= most[all]) continue;
      most[all] = n.anyway - n.copied;
      b.at[all] = n;
    }
    if (op->lane == LANE_COMPUTE) b.passes += op_seconds(t->costs, kept, op);
  }
  return b;
}

// No plan that fits in the room is shorter.
static double plan_bound(const Search *s, const Bounds *b, const Room *room) {
  double most = 0;
  for (int all = 0; all < 2; all++) {
    const Narrow *n = &b->at[all];
    if (!n->layers) continue;
    Limits l = {.resident = (double)room->arena - n->anyway,
                .copied = fmin(n->copied, (double)room->host),
                .link = s->task->costs->link.d2h,
                .layers = n->layers};
    most = fmax(most, prices_bound(&s->menu, s->corners, &l));
  }
  return b->passes + most;
}

// Seconds of a step that no plan in a room can beat: of every STRIDE-th room and of those about the best of them;
// others: infinite. xmalloc'd.
static double *least_seconds(const Search *s, const Bounds *b, const Room *room, int rooms) {
  double *least = xmalloc((size_t)rooms * sizeof *least);
  int best = 0;
  for (int r = 0; r < rooms; r++) {
    least[r] = INFINITY;
    if (r % STRIDE == 0) least[r] = room[r].seconds + s->task->passes * plan_bound(s, b, &room[r]);
    if (least[r] < least[best]) best = r;
  }
  for (int r = best - STRIDE + 1; r < best + STRIDE; r++)
    if (r >= 0 && r < rooms && r % STRIDE) least[r] = room[r].seconds + s->task->passes * plan_bound(s, b, &room[r]);
  return least;
}

// ---- all of it ----

// Where a search begins, by what one before has learnt: bytes that are copied, and bytes of the arena that are of no
// item.
typedef struct Start {
  double copied, other;
} Start;

// The best plan for s->room.
static void search_room(Search *s, Start *at) {
  int is_first = s->tried == 0;
  double step = s->carried * 1.5 / SHARES;
  if (is_first) try_all(s, 0); // what is pinned, and all else kept
  for (int i = 0; i < s->tried; i++)
    if (is_better(&s->room, &s->plan[i].outcome, best_outcome(s))) s->best = i;
  if (s->best == 0 && !excess(&s->room, best_outcome(s))) return;
  // Where no plan so far fits, what a search elsewhere has learnt is a poor start: all shares are tried.
  int is_new = excess(&s->room, best_outcome(s)) > 0;
  if (is_first)
    at->other = (double)best_outcome(s)->turn - plan_resident(s, s->item);
  else
    search_copied(s, at->copied, &at->other);
  for (int share = 0; is_new && share <= (s->carried > 0 ? SHARES : 0); share++)
    if (search_copied(s, share * step, &at->other)) at->copied = share * step;
  for (int finer = 0; finer < FINER && s->carried > 0 && s->tried < s->most; finer++) {
    step /= 2;
    if (search_copied(s, at->copied + step, &at->other))
      at->copied += step;
    else if (at->copied > 0 && search_copied(s, at->copied - step, &at->other))
      at->copied -= step;
  }
  for (int copies = 0; copies < 2 && excess(&s->room, best_outcome(s)); copies++)
    try_all(s, prices_leanest(&s->menu, copies));
  while (improve(s, 0) || improve(s, 1)) continue;
}

// A plan in a room that holds it, as a whole step.
typedef struct Pair {
  int plan, room;
  int64_t excess;
  double seconds;
} Pair;

static Pair best_pair(const Search *s, const Room *room, int rooms) {
  Pair best = {.excess = INT64_MAX};
  for (int r = 0; r < rooms; r++)
    for (int i = 0; i < s->tried; i++) {
      const PlanOutcome *o = &s->plan[i].outcome;
      Pair p = {i, r, excess(&room[r], o), room[r].seconds + s->task->passes * o->time.seconds};
      double more = best.room == 0 && r > 0 ? worth : 1e-6; // the first is not left for nothing
      if (p.excess != best.excess ? p.excess < best.excess : p.seconds < best.seconds * (1 - more)) best = p;
    }
  return best;
}

Chosen choose(const ChooseTask *task, const Room *room, int rooms) {
  Search s = {.task = task};
  PolicyTable keep = policy_table_new(task->layers, MEMORY_KEEP);
  Program *kept = task->record(task->model, &keep);
  double now = 0;
  for (int i = 0; i < kept->fullest; i++)
    if (kept->ops[i].lane == LANE_COMPUTE) now += op_seconds(task->costs, kept, &kept->ops[i]);
  s.carried = task->rules.offload ? now * task->costs->link.d2h : 0;
  s.menu = menu_new(kept, task->layers / 2, task->costs, &task->rules); // layers are alike
  s.corners = prices_corners(&s.menu);
  s.ops = kept->n_ops * 3 / 2;
  s.item = xcalloc((size_t)task->layers, sizeof *s.item);
  const Bounds bounds = bounds_of(task, kept);
  double *least = least_seconds(&s, &bounds, room, rooms);
  char *searched = xcalloc((size_t)rooms, 1);
  Start at = {0};
  Pair best = {0};
  for (int n = 0; n < ROOMS; n++) {
    int next = -1;
    for (int r = 0; r < rooms; r++)
      if (!searched[r] && (next < 0 || least[r] < least[next])) next = r;
    if (next < 0 || (n && !best.excess && least[next] > best.seconds * (1 - worth))) break;
    s.room = room[next];
    s.most = s.tried + RECORDED / s.ops / (n ? 2 : 1);
    search_room(&s, &at);
    searched[next] = 1;
    best = best_pair(&s, room, rooms);
  }
  Chosen c = {.policy = table_of(&s, s.plan[best.plan].item),
              .outcome = s.plan[best.plan].outcome,
              .room = best.room,
              .fits = best.excess == 0,
              .bound = plan_bound(&s, &bounds, &room[best.room]),
              .tried = s.tried};
  program_free(kept);
  policy_table_free(&keep);
  menu_free(&s.menu);
  for (int i = 0; i < s.tried; i++) free(s.plan[i].item);
  free(s.plan);
  free(s.item);
  free(least);
  free(searched);
  return c;
}
