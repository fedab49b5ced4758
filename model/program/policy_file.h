// A memory plan in a file of the run folder, so that a run that goes on goes by it: which policy every saved tensor of
// every layer has. Any plan gives the same bits.
//
//   {"tensors": ["x", "norm_stats", ..], "layers": ["OKRR..", ..], "slack": 0.1}
//
// A layer's text has a letter a tensor: K kept, R recomputed, O offloaded.
#ifndef TESSERA_POLICY_FILE_H
#define TESSERA_POLICY_FILE_H

#include "model/program/program.h"

#define PLAN_FILE "memory_plan.json"

// Writes PATH.new and puts it in the place of PATH. -1 with *err where it cannot.
int policy_file_save(const PolicyTable *t, const char *path, Error *err);
// 1 with *t, free with policy_table_free. 0 where there is no file, and with a message where it is damaged or of
// another number of layers.
int policy_file_load(PolicyTable *t, int layers, const char *path);
#endif
