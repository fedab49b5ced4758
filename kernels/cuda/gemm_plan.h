// The plan of a grouped product (gemm_plan.cu).
#ifndef TESSERA_GEMM_PLAN_H
#define TESSERA_GEMM_PLAN_H

#include "kernels/cuda/gemm_tiles.h"

typedef struct GemmPlan {
  int bn[MODALITIES];    // columns of a tile
  int parts[MODALITIES]; // of an inner dimension; 0: as the counts want it
  size_t scratch;        // bytes of the parts' sums
} GemmPlan;

// Depends on the shapes alone.
GemmPlan gemm_plan(const Gemm *g, int kind);

// The side has nothing to multiply.
bool gemm_side_empty(const GemmSide *s, int kind);
#endif
