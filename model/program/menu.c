#include "model/program/menu.h"

#include "model/program/policy.h"
#include "model/program/program_internal.h"
#include "model/program/simulate.h"

#include <stdlib.h>
#include <string.h>

enum { MOST = 64 }; // tensors, and ops that make them: bits of a word

// A tensor of the layer.
typedef struct Node {
  TensorId t;
  int saved; // Saved, or -1: an intermediate
  int asked; // by the backward pass, whatever the policies
  int maker; // index into Layer.maker
  int64_t bytes;
} Node;

// An op that rebuilds tensors: a recipe, or the producer again.
typedef struct Maker {
  int recipe, producer; // the other: -1
  double seconds;
  int n, of[OP_MAX_IN]; // nodes that it reads
} Maker;

typedef struct Layer {
  const Program *p;
  const Costs *costs;
  int number;
  Node node[MOST];
  Maker maker[MOST];
  int nodes, makers;
} Layer;

// What a combination uses: bits of nodes and makers.
typedef struct Uses {
  uint64_t kept, copied, made;
} Uses;

// ---- the layer's tensors ----

static int node_of(Layer *y, TensorId t);

static Op maker_op(const Program *p, int recipe, int producer) {
  if (recipe < 0) return p->ops[producer];
  const Recipe *r = &p->state->recipes[recipe];
  Op op = {.kind = r->kind, .lane = LANE_COMPUTE, .args = r->args};
  memcpy(op.in, r->in, sizeof r->in);
  memcpy(op.out, r->out, sizeof r->out);
  return op;
}

static int maker_of(Layer *y, int recipe, int producer) {
  for (int i = 0; i < y->makers; i++)
    if (y->maker[i].recipe == recipe && y->maker[i].producer == producer) return i;
  if (y->makers == MOST) panic("menu: a layer of more than %d ops", MOST);
  int m = y->makers++;
  Op op = maker_op(y->p, recipe, producer);
  y->maker[m] = (Maker){.recipe = recipe, .producer = producer, .seconds = op_seconds(y->costs, y->p, &op)};
  int n = 0, of[OP_MAX_IN];
  for (int i = 0; i < OP_MAX_IN; i++) {
    int node = op.in[i] == NO_TENSOR ? -1 : node_of(y, op.in[i]);
    if (node >= 0) of[n++] = node;
  }
  y->maker[m].n = n;
  memcpy(y->maker[m].of, of, sizeof of);
  return m;
}

// The node of a tensor of this layer, with all that rebuilding it may take; -1: it stays where it is in any case.
static int node_of(Layer *y, TensorId t) {
  const Tensor *x = &y->p->tensors[t];
  if (x->space != SPACE_ARENA || x->layer != y->number) return -1;
  for (int i = 0; i < y->nodes; i++)
    if (y->node[i].t == t) return i;
  if (y->nodes == MOST) panic("menu: a layer of more than %d tensors", MOST);
  int i = y->nodes++;
  y->node[i] = (Node){.t = t, .saved = x->saved, .bytes = x->bytes, .maker = -1};
  if (x->saved >= 0) y->node[i].asked = y->p->state->revival[t].needed;
  if (x->saved != SAVED_X)
    y->node[i].maker = x->rebuild >= 0 ? maker_of(y, x->rebuild, -1) : maker_of(y, -1, x->producer);
  return i;
}

// ---- one combination ----

static void node_need(const Layer *y, const MenuItem *item, int i, const MenuRules *rules, Uses *u) {
  const Node *n = &y->node[i];
  uint64_t bit = (uint64_t)1 << i;
  int policy = n->saved < 0 ? POLICY_RECOMPUTE : item->of[n->saved];
  if (policy == POLICY_OFFLOAD && n->bytes < rules->least_copy) policy = POLICY_KEEP;
  if (policy == POLICY_KEEP) u->kept |= bit;
  if (policy != POLICY_RECOMPUTE) return;
  uint64_t maker = (uint64_t)1 << n->maker;
  if (u->made & maker) return;
  u->made |= maker;
  const Maker *m = &y->maker[n->maker];
  for (int k = 0; k < m->n; k++) node_need(y, item, m->of[k], rules, u);
}

static void item_cost(const Layer *y, MenuItem *item, const MenuRules *rules) {
  Uses u = {0};
  for (int i = 0; i < y->nodes; i++) {
    const Node *n = &y->node[i];
    if (n->asked) node_need(y, item, i, rules, &u);
    // The copy to the host is made whether or not the backward pass reads it.
    if (n->saved >= 0 && item->of[n->saved] == POLICY_OFFLOAD && n->bytes >= rules->least_copy)
      u.copied |= (uint64_t)1 << i;
  }
  item->resident = item->copied = 0;
  item->seconds = 0;
  for (int i = 0; i < y->nodes; i++) {
    if (u.kept >> i & 1) item->resident += y->node[i].bytes;
    if (u.copied >> i & 1) item->copied += y->node[i].bytes;
  }
  for (int i = 0; i < y->makers; i++)
    if (u.made >> i & 1) item->seconds += y->maker[i].seconds;
  double copying = (double)item->copied / y->costs->link.d2h + (double)item->copied / y->costs->link.h2d;
  if (item->copied) item->seconds += copying * copy_drag(y->costs);
}

// ---- all combinations ----

// Policies that a kind may have, as bits. Of what is small, all is kept or all rebuilt: `small` says which.
static int policies_of(const Layer *y, int saved, const MenuRules *rules, int small) {
  int asked = 0, copies = 0, all = 0;
  if (rules->pinned[saved] < POLICY_COUNT) return 1 << rules->pinned[saved];
  for (int i = 0; i < y->nodes; i++) {
    if (y->node[i].saved != saved) continue;
    asked |= y->node[i].asked;
    copies |= y->node[i].bytes >= rules->least_copy;
  }
  if (!asked) return 1 << POLICY_KEEP; // costs nothing
  if (saved == SAVED_NORM_STATS || saved == SAVED_ROUTER) return 1 << small;
  for (int k = 0; k < POLICY_COUNT; k++)
    if (policy_allowed((Saved)saved, (Policy)k) && (k != POLICY_OFFLOAD || (rules->offload && copies))) all |= 1 << k;
  return all;
}

// A list of items, none at least as costly as another in all three.
typedef struct Front {
  MenuItem *item;
  int n, room;
} Front;

static int is_as_good(const MenuItem *a, const MenuItem *b) {
  return a->resident <= b->resident && a->copied <= b->copied && a->seconds <= b->seconds;
}

static void front_add(Front *f, const MenuItem *item) {
  for (int i = 0; i < f->n; i++) {
    if (!is_as_good(&f->item[i], item)) continue;
    MenuItem better = f->item[i]; // the next one is probably worse than this one too
    f->item[i] = f->item[i / 2];
    f->item[i / 2] = better;
    return;
  }
  int n = 0;
  for (int i = 0; i < f->n; i++)
    if (!is_as_good(item, &f->item[i])) f->item[n++] = f->item[i];
  f->n = n;
  if (f->n == f->room) {
    f->room = 2 * f->room + 64;
    f->item = xrealloc(f->item, (size_t)f->room * sizeof *f->item);
  }
  f->item[f->n++] = *item;
}

static void combine(const Layer *y, const MenuRules *rules, const int *policies, MenuItem *item, int saved, Front *f) {
  if (saved == SAVED_COUNT) {
    item_cost(y, item, rules);
    front_add(f, item);
    return;
  }
  // Of what comes to the same, the earliest are offloaded, which are needed last: so those come first.
  for (int k = POLICY_COUNT - 1; k >= 0; k--) {
    if (!(policies[saved] >> k & 1)) continue;
    item->of[saved] = (uint8_t)k;
    combine(y, rules, policies, item, saved + 1, f);
  }
}

static int item_compare(const void *pa, const void *pb) {
  const MenuItem *a = pa, *b = pb;
  if (a->seconds != b->seconds) return a->seconds < b->seconds ? -1 : 1;
  if (a->copied != b->copied) return a->copied < b->copied ? -1 : 1;
  return memcmp(a->of, b->of, sizeof a->of);
}

Menu menu_new(const Program *kept, int layer, const Costs *costs, const MenuRules *rules) {
  Layer *y = xcalloc(1, sizeof *y);
  *y = (Layer){.p = kept, .costs = costs, .number = layer};
  for (TensorId t = 0; t < kept->n_tensors; t++)
    if (kept->tensors[t].saved >= 0) node_of(y, t);
  Front f = {0};
  for (int small = POLICY_KEEP; small <= POLICY_RECOMPUTE; small++) {
    MenuItem item = {0};
    int policies[SAVED_COUNT];
    for (int s = 0; s < SAVED_COUNT; s++) policies[s] = policies_of(y, s, rules, small);
    combine(y, rules, policies, &item, 0, &f);
  }
  free(y);
  qsort(f.item, (size_t)f.n, sizeof *f.item, item_compare);
  return (Menu){f.item, f.n};
}

void menu_free(Menu *m) {
  free(m->item);
  *m = (Menu){0};
}
