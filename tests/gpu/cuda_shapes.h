// Sizes and packs the CUDA ops are tested and timed at.
#ifndef TESSERA_CUDA_SHAPES_H
#define TESSERA_CUDA_SHAPES_H

#include "tests/gpu/cuda_case.h"

// Packs beyond those of op_case.h: LONG has documents of hundreds of tokens, one-token ones between them; TRAINING
// captions of 32-96 tokens, each with an image of 256, in either order.
enum { PACK_LONG = PACK_KINDS, PACK_TRAINING };

// How rows choose experts: any; all of a modality the same first one; only the even ones, so that half have no rows.
typedef enum Routing { ROUTE_ANY, ROUTE_ONE, ROUTE_EVEN } Routing;

typedef struct CudaShape {
  const char *name;
  int pack; // PackKind or one of the above
  Routing routing;
  Dims dims; // M follows from the others
} CudaShape;

extern const CudaShape cuda_shapes[];
extern const int n_cuda_shapes;
// A layer of the base config, one of small and one of fine, all at 16384 tokens.
enum { CUDA_BENCH_SHAPES = 3 };
extern const CudaShape cuda_bench_shapes[CUDA_BENCH_SHAPES];

// Sizes, pack and random stream of the case from a shape; the case's name too.
void cuda_shape_open(CudaCase *c, const CudaShape *shape, uint64_t seed);
// Router weights [E, C] of modality m for the shape's routing, where h [T, C] has 1 in its first column. Both consist
// of few-bit numbers, so that logits are exact in fp32 in any order of summation and the route has one right value.
Value cuda_shape_router(CudaCase *c, const CudaShape *shape, int m);
Value cuda_shape_router_input(CudaCase *c);
#endif
