#include "model/planner.h"

#include "model/program_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { POLICIES = POLICY_OFFLOAD + 1 };
static const char *const policy_name[POLICIES] = {"keep", "recompute", "offload"};

int policy_allowed(Saved saved, Policy policy) {
  if (policy == POLICY_RECOMPUTE) return saved != SAVED_X;
  if (policy == POLICY_OFFLOAD) return saved != SAVED_NORM_STATS && saved != SAVED_ROUTER;
  return 1;
}

// What a memory policy means for one saved tensor.
static Policy policy_of(MemoryPolicy memory, Saved saved) {
  if (memory == MEMORY_RECOMPUTE) return policy_allowed(saved, POLICY_RECOMPUTE) ? POLICY_RECOMPUTE : POLICY_KEEP;
  if (memory != MEMORY_OFFLOAD) return POLICY_KEEP;
  switch (saved) {
  case SAVED_H1: // one cheap op away from what is offloaded
  case SAVED_QKV_ROTATED:
  case SAVED_X2:
  case SAVED_H2:
    return POLICY_RECOMPUTE;
  default:
    return policy_allowed(saved, POLICY_OFFLOAD) ? POLICY_OFFLOAD : POLICY_KEEP;
  }
}

PolicyTable policy_table_new(int layers, MemoryPolicy policy) {
  PolicyTable t = {.layers = layers, .of = xmalloc((size_t)layers * SAVED_COUNT)};
  for (int l = 0; l < layers; l++)
    for (int s = 0; s < SAVED_COUNT; s++) t.of[l * SAVED_COUNT + s] = (uint8_t)policy_of(policy, (Saved)s);
  return t;
}

void policy_table_free(PolicyTable *t) {
  free(t->of);
  *t = (PolicyTable){0};
}

// Index of name in names, or -1; then *list holds all allowed names, separated by commas.
static int name_find(const char *name, const char *const *names, int n, const char *allowed, char list[256]) {
  list[0] = 0;
  for (int i = 0; i < n; i++) {
    if (!allowed[i]) continue;
    if (strcmp(name, names[i]) == 0) return i;
    size_t used = strlen(list);
    snprintf(list + used, 256 - used, "%s%s", used ? ", " : "", names[i]);
  }
  return -1;
}

int policy_table_set(PolicyTable *t, const char *saved, const char *policy, Error *err) {
  char list[256], hint[384], all[SAVED_COUNT], allowed[POLICIES];
  memset(all, 1, sizeof all);
  int s = name_find(saved, saved_name, SAVED_COUNT, all, list);
  if (s < 0) {
    snprintf(hint, sizeof hint, "one of: %s", list);
    return error_set(err, hint, "memory.per_tensor: there is no saved tensor \"%s\"", saved);
  }
  for (int i = 0; i < POLICIES; i++) allowed[i] = (char)policy_allowed((Saved)s, (Policy)i);
  int chosen = name_find(policy, policy_name, POLICIES, allowed, list);
  if (chosen < 0) {
    snprintf(hint, sizeof hint, "one of: %s", list);
    return error_set(err, hint, "memory.per_tensor.%s: cannot be \"%s\"", saved, policy);
  }
  for (int l = 0; l < t->layers; l++) t->of[l * SAVED_COUNT + s] = (uint8_t)chosen;
  return 0;
}

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

Peak planner_peak(const Program *p) {
  PeakShare *share = xcalloc((size_t)p->n_tensors + 1, sizeof *share);
  int n = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0 || x->first > p->fullest || x->last < p->fullest) continue;
    int k = 0;
    while (k < n && strcmp(share[k].name, x->name) != 0) k++;
    if (k == n) share[n++] = (PeakShare){.name = x->name};
    share[k].count++;
    share[k].bytes += (max_i64(x->bytes, 1) + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
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
  double bytes[SAVED_COUNT][POLICIES] = {{0}}, total[POLICIES] = {0}, rest = 0;
  for (TensorId t = 0; t < p->n_tensors; t++) {
    const Tensor *x = &p->tensors[t];
    if (x->space != SPACE_ARENA || x->first < 0) continue;
    Revival revival = p->state->revival[t];
    // What nobody asks for again dies where the forward pass is done with it.
    if (x->saved < 0 || (revival.policy != POLICY_OFFLOAD && !revival.needed))
      rest += (double)x->bytes;
    else
      bytes[x->saved][revival.policy] += (double)x->bytes;
  }
  fprintf(out, "program %s: %d ops\n  %-14s %12s %12s %12s\n", p->name, p->n_ops, "saved tensor", "kept", "recomputed",
          "offloaded");
  for (int s = 0; s < SAVED_COUNT; s++) {
    if (bytes[s][0] + bytes[s][1] + bytes[s][2] == 0) continue;
    fprintf(out, "  %-14s", saved_name[s]);
    for (int k = 0; k < POLICIES; k++) {
      bytes_print(out, bytes[s][k]);
      total[k] += bytes[s][k];
    }
    fputc('\n', out);
  }
  fprintf(out, "  %-14s", "sum");
  for (int k = 0; k < POLICIES; k++) bytes_print(out, total[k]);
  fprintf(out, "\n  %-14s", "passing");
  bytes_print(out, rest);
  fprintf(out, "  (gradients, reloads, rebuilt and other passing tensors, which share memory)\n  %-14s", "arena");
  bytes_print(out, (double)p->arena_bytes);
  fprintf(out, "  %.3f x the largest sum alive at once\n  %-14s",
          p->live_bytes ? (double)p->arena_bytes / (double)p->live_bytes : 1.0, "host slab");
  bytes_print(out, (double)p->host_bytes);
  fputc('\n', out);
  peak_print(p, out);
}
