// The memory table of a plan: what the policies come to, and what is alive where the arena is fullest.
#ifndef TESSERA_PLANNER_H
#define TESSERA_PLANNER_H
#include "model/program/seconds.h"

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

// What the policies cost, appended to `out_file` (a FILE *): per saved kind how many layers keep, recompute and offload
// it, the seconds of ops that make it again, and of its copies each way; then all of them together, and what stays
// because it is too small for a copy.
void planner_print_costs(const Program *p, const Costs *costs, void *out_file);
#endif
