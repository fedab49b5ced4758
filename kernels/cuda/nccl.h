// NCCL, loaded at run time: tensors of the process group's GPUs, one a process, on streams and in graphs.
#ifndef TESSERA_CUDA_NCCL_H
#define TESSERA_CUDA_NCCL_H

#include "kernels/cuda/cuda.h"

enum NcclType { NCCL_FLOAT = 7, NCCL_DOUBLE = 8, NCCL_BF16 = 9 }; // as NCCL numbers them

// Connects the present device to those of all ranks, which call it together. -1 with *err where the library is missing
// or too old. Takes device memory of its own. Once.
int nccl_open(Error *err);
void nccl_close(void);

// As the ops of these names, on `count` elements in place; nccl_open came before.
void nccl_all_reduce(void *values, int64_t count, NcclType type, cudaStream_t stream);
void nccl_reduce_scatter(void *values, int64_t count, NcclType type, cudaStream_t stream);
void nccl_all_gather(void *values, int64_t count, NcclType type, cudaStream_t stream);

// Ends the process, with the cause, where a collective that was begun cannot end.
void nccl_check(void);
#endif
