// Measuring what a device can do (Backend.rates, Backend.link).
#ifndef TESSERA_CUDA_RATES_H
#define TESSERA_CUDA_RATES_H

#include "kernels/cuda/cuda.h"

// The share of its data sheet's FLOPs that a Hopper GPU keeps up in large products: under that load power lowers the
// clock (790 of 989 TFLOP/s measured on an H200). Where cuBLASLt is there, its product is measured instead.
#define SUSTAINED 0.8

// Takes about 200 ms and half a gigabyte of device memory while it does.
DeviceRates rates_measure(double sheet_flops, cudaStream_t stream);

// Takes about 200 ms, and 128 MB of the device and 1 GB of pinned host memory while it does; zeros where they are not
// there.
LinkRates link_measure(cudaStream_t d2h, cudaStream_t h2d);

// Whether cuBLASLt can be loaded (cublas_lt.cu).
bool cublas_lt_found(void);
// What a way that needs it lacks, or NULL (KernelWay.missing).
const char *cublas_lt_missing(void);
#endif
