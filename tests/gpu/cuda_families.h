// The calls that test, or time, each family of ops at a shape (tests/gpu/cuda_ops.c has the table). The case is open at
// the shape; its calls are compared or timed as they are made.
#ifndef TESSERA_CUDA_FAMILIES_H
#define TESSERA_CUDA_FAMILIES_H

#include "tests/gpu/cuda_shapes.h"

void run_copies(CudaCase *c, const CudaShape *shape);
void run_linears(CudaCase *c, const CudaShape *shape);
void run_embedding(CudaCase *c, const CudaShape *shape);
void run_conditions(CudaCase *c, const CudaShape *shape);
void run_adaln(CudaCase *c, const CudaShape *shape);
// Rows that are hard on a LayerNorm, fused and unfused against float64: prints both errors, and fails where the fused
// kernels' is more than 1.05 times the unfused ones'. At a size of its own (tests/gpu/cuda_stability.c).
void run_adaln_stability(CudaCase *c, const CudaShape *shape);
void run_rope(CudaCase *c, const CudaShape *shape);
void run_attention(CudaCase *c, const CudaShape *shape);
void run_routers(CudaCase *c, const CudaShape *shape);
void run_experts(CudaCase *c, const CudaShape *shape);
void run_combine_adaln(CudaCase *c, const CudaShape *shape);
void run_swiglu(CudaCase *c, const CudaShape *shape);
void run_heads(CudaCase *c, const CudaShape *shape);
void run_flow(CudaCase *c, const CudaShape *shape);
void run_update(CudaCase *c, const CudaShape *shape);
#endif
