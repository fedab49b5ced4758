// A small random model on a random pack, for tests of whole programs.
#ifndef TESSERA_MODEL_CASE_H
#define TESSERA_MODEL_CASE_H

#include "model/program/replay.h"
#include "model/transformer.h"
#include "tests/ops/op_case.h"

typedef struct ModelCase {
  Config config;
  Model model;
  OpCase ops; // sizes and the pack
  Bases bases;
  size_t bytes[SPACE_COUNT];
} ModelCase;

// Sizes from `variant` (0: tied, no shared expert, projections shared; 1: everything per modality, shared experts,
// bottleneck, GQA; 2-3: mixes; 4: every expert chosen by every row). All parameters random. A pack of every document
// kind.
void model_case_init(ModelCase *c, uint64_t seed, int variant);
void model_case_free(ModelCase *c);

// Records a program under a policy (NULL: keep), allocates what it needs and binds it. `separate`: memory.arena false.
ModelProgram model_case_record(ModelCase *c, Mode mode, const PolicyTable *policy, int separate);
// Puts the pack into the staging space, fills arena, host slab and gradients with NaN bytes.
void model_case_reset(ModelCase *c);
// Makes room for the pack of c->ops.dims after its sizes were changed.
void model_case_fit_pack(ModelCase *c);
// The scalar the gradients belong to, from the metrics.
double model_case_loss(const ModelCase *c);
real *model_case_slab(const ModelCase *c, Space space);
#endif
