#include "model/program/planner.h"

#include "model/program/program_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void bytes_print(FILE *out, double bytes) {
  if (bytes == 0)
    fprintf(out, " %12s", "-");
  else if (bytes < 1e9)
    fprintf(out, " %9.2f MB", bytes * 1e-6);
  else
    fprintf(out, " %9.2f GB", bytes * 1e-9);
}

static int share_compare(const void *pa, const void *pb) {
  const PeakShare *a = pa, *b = pb;
  return a->bytes != b->bytes ? (a->bytes < b->bytes) - (a->bytes > b->bytes) : strcmp(a->name, b->name);
}

// Counts bytes among those of the same name.
static void share_add(PeakShare *share, int *n, const char *name, int64_t bytes) {
  int k = 0;
  while (k < *n && strcmp(share[k].name, name) != 0) k++;
  if (k == *n) share[(*n)++] = (PeakShare){.name = name};
  share[k].count++;
  share[k].bytes += (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
}

Peak planner_peak(const Program *p) {
  PeakShare *share = xcalloc((size_t)(p->n_tensors + p->state->n_gradients) + 1, sizeof *share);
  int n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0 || x->first > p->fullest || x->last < p->fullest) continue;
    share_add(share, &n, x->name, max_i64(x->bytes, 1));
  }
  for (int i = 0; i < p->state->n_gradients; i++) {
    const GradientRange *g = &p->state->gradients[i];
    if (g->first <= p->fullest) share_add(share, &n, "gradients", g->end - g->begin);
  }
  qsort(share, (size_t)n, sizeof *share, share_compare);
  Peak peak = {.n_shares = n < PEAK_SHARES ? n : PEAK_SHARES};
  memcpy(peak.share, share, (size_t)peak.n_shares * sizeof *share);
  free(share);
  return peak;
}

static void peak_print(const Program *p, FILE *out) {
  Peak peak = planner_peak(p);
  int64_t others = p->live_bytes;
  if (!others) return;
  const Op *op = &p->ops[p->fullest];
  fprintf(out, "alive at the fullest moment, op %d %s", p->fullest, op_info[op->kind].name);
  if (op->layer >= 0) fprintf(out, " of layer %d", op->layer);
  fputs(":\n", out);
  for (int i = 0; i < peak.n_shares; i++) {
    const PeakShare *s = &peak.share[i];
    fprintf(out, "  %-32s %3d x", s->name, s->count);
    bytes_print(out, (double)s->bytes / s->count);
    fputs(" =", out);
    bytes_print(out, (double)s->bytes);
    others -= s->bytes;
    fputc('\n', out);
  }
  fprintf(out, "  %-53s", "others");
  bytes_print(out, (double)others);
  fputc('\n', out);
}

void planner_print(const Program *p, void *out_file) {
  FILE *out = out_file;
  double bytes[SAVED_COUNT][POLICY_COUNT] = {{0}}, total[POLICY_COUNT] = {0}, others = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0) continue;
    Revival revival = p->state->revival[t];
    // What nobody asks for again dies where the forward pass is done with it.
    if (x->saved < 0 || (revival.policy != POLICY_OFFLOAD && !revival.needed))
      others += (double)x->bytes;
    else
      bytes[x->saved][revival.policy] += (double)x->bytes;
  }
  fprintf(out, "program %s: %d ops\n  %-14s %12s %12s %12s\n", p->name, p->n_ops, "saved tensor", "kept", "recomputed",
          "offloaded");
  for (int s = 0; s < SAVED_COUNT; s++) {
    if (bytes[s][0] + bytes[s][1] + bytes[s][2] == 0) continue;
    fprintf(out, "  %-14s", saved_name[s]);
    for (int k = 0; k < POLICY_COUNT; k++) {
      bytes_print(out, bytes[s][k]);
      total[k] += bytes[s][k];
    }
    fputc('\n', out);
  }
  fprintf(out, "  %-14s", "sum");
  for (int k = 0; k < POLICY_COUNT; k++) bytes_print(out, total[k]);
  fprintf(out, "\n  %-14s", "passing");
  bytes_print(out, others);
  fprintf(out, "  (gradients, reloads, rebuilt and other passing tensors, which share memory)\n  %-14s", "arena");
  bytes_print(out, (double)p->arena_bytes);
  fprintf(out, "  %.3f x the largest sum alive at once\n  %-14s",
          p->live_bytes ? (double)p->arena_bytes / (double)p->live_bytes : 1.0, "host slab");
  bytes_print(out, (double)p->host_bytes);
  fputc('\n', out);
  peak_print(p, out);
}

// ---- what policies cost ----

typedef struct KindCosts {
  int layers[POLICY_COUNT];
  double again, copied; // seconds
} KindCosts;

// Seconds of the ops that make tensors again, by the kind they are made for; [SAVED_COUNT]: what is made on the way.
static void again_costs(const Program *p, const Costs *costs, KindCosts kind[SAVED_COUNT + 1]) {
  int *made_for = xmalloc((size_t)p->n_ops * sizeof *made_for);
  for (int i = 0; i < p->n_ops; i++) made_for[i] = -1;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Revival *r = &p->state->revival[t];
    int saved = p->tensors[t].saved;
    if (r->again == NO_TENSOR) continue;
    int op = p->tensors[r->again].producer;
    if (p->ops[op].lane == LANE_COMPUTE && (made_for[op] < 0 || made_for[op] == SAVED_COUNT))
      made_for[op] = saved < 0 ? SAVED_COUNT : saved;
  }
  for (int i = 0; i < p->n_ops; i++)
    if (made_for[i] >= 0) kind[made_for[i]].again += op_seconds(costs, p, &p->ops[i]);
  free(made_for);
}

// Layers by policy, where the backward pass needs something of the kind; and seconds of copies.
static void layer_counts(const Program *p, const Costs *costs, KindCosts kind[SAVED_COUNT + 1]) {
  int last[SAVED_COUNT];
  for (int s = 0; s < SAVED_COUNT; s++) last[s] = -1;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    const Revival *r = &p->state->revival[t];
    if (x->saved < 0 || x->first < 0 || (r->policy != POLICY_OFFLOAD && !r->needed)) continue;
    double bytes = (double)x->bytes;
    if (r->policy == POLICY_OFFLOAD) kind[x->saved].copied += copy_seconds(costs, LANE_D2H, bytes, 0);
    if (x->layer == last[x->saved]) continue; // several tensors are one kind: the first says which policy it is
    last[x->saved] = x->layer;
    kind[x->saved].layers[r->policy]++;
  }
}

// What the policies offload but is too small for a copy of its own.
static void small_print(const Program *p, FILE *out) {
  double bytes = 0;
  int n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->saved < 0 || x->layer < 0 || x->layer >= p->policy.layers) continue;
    if (p->policy.of[x->layer * SAVED_COUNT + x->saved] != POLICY_OFFLOAD) continue;
    if (p->state->revival[t].policy == POLICY_OFFLOAD) continue;
    bytes += (double)x->bytes;
    n++;
  }
  if (n)
    fprintf(out, "  %d tensors to offload, %.3f GB, stay on the device: each is less than the %.3f MB worth a copy\n",
            n, bytes / 1e9, (double)p->policy.least_copy / 1e6);
}

void planner_print_costs(const Program *p, const Costs *costs, void *out_file) {
  FILE *out = out_file;
  KindCosts kind[SAVED_COUNT + 1] = {{{0}, 0, 0}};
  double again = 0, copied = 0;
  layer_counts(p, costs, kind);
  again_costs(p, costs, kind);
  fprintf(out, "  %-14s %6s %10s %9s %8s %9s\n", "layers", "keep", "recompute", "ms", "offload", "ms a way");
  for (int s = 0; s <= SAVED_COUNT; s++) {
    const KindCosts *k = &kind[s];
    again += k->again;
    copied += k->copied;
    if (s == SAVED_COUNT && k->again > 0)
      fprintf(out, "  %-14s %6s %10s %9.3f\n", "on the way", "", "", 1e3 * k->again);
    if (s == SAVED_COUNT || k->layers[POLICY_KEEP] + k->layers[POLICY_RECOMPUTE] + k->layers[POLICY_OFFLOAD] == 0)
      continue;
    fprintf(out, "  %-14s %6d %10d %9.3f %8d %9.3f\n", saved_name[s], k->layers[POLICY_KEEP],
            k->layers[POLICY_RECOMPUTE], 1e3 * k->again, k->layers[POLICY_OFFLOAD], 1e3 * k->copied);
  }
  fprintf(out, "  %-14s %6s %10s %9.3f %8s %9.3f\n", "sum", "", "", 1e3 * again, "", 1e3 * copied);
  small_print(p, out);
}
