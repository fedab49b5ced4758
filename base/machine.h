// What this process may use of the machine it runs on: processors by affinity and control groups (of version 1, 2 or
// both), memory by control groups and resource limits.
//
// `root` is where proc/ and sys/ lie: "" for the machine itself, a folder of files made alike for a test.
#ifndef TESSERA_MACHINE_H
#define TESSERA_MACHINE_H

#include <stdint.h>

// Compute threads for this process, at least 1: no more than the processors it may run on, and than its share of what
// the processes that mpirun started here may use together, in processors and in the control group's quota.
int machine_threads(const char *root);
// Bytes of memory for this process: the machine's, or less by a control group's limit or by what is left of the address
// space (ulimit -v) and data (ulimit -d). *limit (may be NULL) says which, as in "four fifths of <limit>".
int64_t machine_memory(const char *root, const char **limit);

// Bytes that this process can still have beyond what it has: of what the machine can give, its control group, and its
// address space and data.
int64_t machine_memory_left(const char *root);

// The rule behind machine_threads. The process may run on `own` processors; `processes` of its kind share `together`
// processors and a quota of time, counted in processors.
int machine_share(int own, int together, double quota, int processes);

// What the control groups of this process leave it: a quota of time, counted in processors (HUGE_VAL: none), and bytes
// of memory (INT64_MAX: no limit).
double cgroup_processors(const char *root);
int64_t cgroup_memory(const char *root);
#endif
