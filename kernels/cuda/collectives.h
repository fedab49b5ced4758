// Collectives through the memory of the host, beside those of NCCL (cuda.h).
#ifndef TESSERA_CUDA_COLLECTIVES_H
#define TESSERA_CUDA_COLLECTIVES_H

#include "kernels/cuda/cuda.h"

extern "C" void cuda_ALL_REDUCE_host(const KernelCall *c);
extern "C" void cuda_REDUCE_SCATTER_host(const KernelCall *c);
extern "C" void cuda_ALL_GATHER_host(const KernelCall *c);
#endif
