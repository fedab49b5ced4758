// keep / recompute / offload: which policy every saved tensor of every layer has.
#ifndef TESSERA_POLICY_H
#define TESSERA_POLICY_H

#include "model/config/config.h"
#include "model/program/program.h"

extern const char *const policy_name[POLICY_COUNT]; // "keep", ...

// Allocates a table for `layers` layers. KEEP, AUTO: everything kept, which is the fastest where it fits. RECOMPUTE:
// everything but x recomputed (x kept: the classic per-layer checkpoint). OFFLOAD: x, qkv, attention, b1, shared_pre,
// expert_pre and b2 offloaded, the small tensors (norm_stats, router) kept, h1, qkv_rotated, x2 and h2 recomputed.
PolicyTable policy_table_new(int layers, MemoryPolicy policy);
PolicyTable policy_table_copy(const PolicyTable *t);
void policy_table_free(PolicyTable *t);
// Whether a saved tensor can have a policy: x is never recomputed; norm_stats and router are too small to be offloaded.
int policy_allowed(Saved saved, Policy policy);
// Sets one saved tensor in all layers: name as in saved_name, policy "keep" | "recompute" | "offload"; -1 with *err for
// an unknown name or a policy the tensor cannot have, listing what is allowed.
int policy_table_set(PolicyTable *t, const char *saved, const char *policy, Error *err);
#endif
