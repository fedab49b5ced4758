// The families of ops, and the calls that test, or time, each at a shape. The case is open at the shape; its calls are
// compared or timed as they are made.
#ifndef TESSERA_CUDA_FAMILIES_H
#define TESSERA_CUDA_FAMILIES_H

#include "tests/gpu/cuda_shapes.h"

typedef struct Family {
  const char *name;
  void (*run)(CudaCase *c, const CudaShape *shape);
  OpKind ops[8];
  int n;
  const char *way;      // KernelWay.word; NULL: as the backend computes them of itself
  double act_tolerance; // 0: ACT_TOLERANCE
  const char *mark;     // of its ops, where another family has them too
  bool apart;           // not for the ops' own sake: runs only where it is named, and is not timed
  bool both_timed;      // at all of cuda_bench_shapes: products, whose inner dimension decides what bounds them
} Family;

enum { FAMILIES = 18 };
extern const Family families[FAMILIES];

// Rows that are hard on a LayerNorm, fused and unfused against float64: prints both errors, and fails where the fused
// kernels' is more than 1.05 times the unfused ones'. At a size of its own (tests/gpu/cuda_stability.c).
void run_adaln_stability(CudaCase *c, const CudaShape *shape);
void run_update(CudaCase *c, const CudaShape *shape);    // tests/gpu/cuda_update.c
void run_attention(CudaCase *c, const CudaShape *shape); // tests/gpu/cuda_attention.c

// An op's outputs on the device must have the bits of others from there: of its parts, or of itself in another way.
// What `want` lacks is not compared.
void compare_bits(CudaCase *c, OpKind kind, const Value *got, const Value *want);
#endif
