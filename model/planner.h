// keep / recompute / offload: which policy every saved tensor of every layer has.
#ifndef TESSERA_PLANNER_H
#define TESSERA_PLANNER_H
#include "model/program.h"

typedef enum MemoryPolicy { MEMORY_AUTO, MEMORY_KEEP, MEMORY_RECOMPUTE, MEMORY_OFFLOAD } MemoryPolicy;

// Allocates a table for `layers` layers. KEEP, AUTO: everything kept, which is the fastest where it fits. RECOMPUTE:
// everything but x recomputed (x kept: the classic per-layer checkpoint). OFFLOAD: x, qkv, attention, b1, shared_pre,
// expert_pre and b2 offloaded, the small tensors (norm_stats, router) kept, h1, qkv_rotated, x2 and h2 recomputed.
PolicyTable policy_table_new(int layers, MemoryPolicy policy);
void policy_table_free(PolicyTable *t);
// Whether a saved tensor can have a policy: x is never recomputed; norm_stats and router are too small to be offloaded.
int policy_allowed(Saved saved, Policy policy);
// Sets one saved tensor in all layers: name as in saved_name, policy "keep" | "recompute" | "offload"; -1 with *err for
// an unknown name or a policy the tensor cannot have, listing what is allowed.
int policy_table_set(PolicyTable *t, const char *saved, const char *policy, Error *err);

// What is alive where a finished program's arena is fullest: the tensors by name, the largest sums first.
enum { PEAK_SHARES = 6 };
typedef struct PeakShare {
  const char *name; // of the program's tensors
  int count;
  int64_t bytes; // of `count` tensors together, as they occupy the arena
} PeakShare;
typedef struct Peak {
  int n_shares;
  PeakShare share[PEAK_SHARES];
} Peak;
Peak planner_peak(const Program *p);

// The memory table of --plan for a finished program, appended to `out_file` (a FILE *): per saved kind the bytes kept,
// recomputed and offloaded over all layers (of tensors the backward pass asks for, and all that are offloaded), then
// everything else in the arena, then the arena's peak against the largest sum of tensors alive at once, the host slab,
// and what is alive at the peak.
void planner_print(const Program *p, void *out_file);
#endif
