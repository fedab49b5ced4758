#include "model/program/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const policy_name[POLICY_COUNT] = {"keep", "recompute", "offload"};

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

PolicyTable policy_table_copy(const PolicyTable *t) {
  PolicyTable copy = *t;
  size_t bytes = (size_t)t->layers * SAVED_COUNT;
  copy.of = memcpy(xmalloc(bytes), t->of, bytes);
  return copy;
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
  char list[256], hint[384], all[SAVED_COUNT], allowed[POLICY_COUNT];
  memset(all, 1, sizeof all);
  int s = name_find(saved, saved_name, SAVED_COUNT, all, list);
  if (s < 0) {
    snprintf(hint, sizeof hint, "one of: %s", list);
    return error_set(err, hint, "memory.per_tensor: there is no saved tensor \"%s\"", saved);
  }
  for (int i = 0; i < POLICY_COUNT; i++) allowed[i] = (char)policy_allowed((Saved)s, (Policy)i);
  int chosen = name_find(policy, policy_name, POLICY_COUNT, allowed, list);
  if (chosen < 0) {
    snprintf(hint, sizeof hint, "one of: %s", list);
    return error_set(err, hint, "memory.per_tensor.%s: cannot be \"%s\"", saved, policy);
  }
  for (int l = 0; l < t->layers; l++) t->of[l * SAVED_COUNT + s] = (uint8_t)chosen;
  return 0;
}
