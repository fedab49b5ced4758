// What the open device can do a second, measured: the floors that a profile and the benchmark hold ops against.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/rates.h"

extern "C" {
#include "base/base.h"
}

#include <algorithm>
#include <cublasLt.h>

enum { SAMPLES = 9, COPIES = 4, PRODUCTS = 4, WARM_UP = 40, THREADS = 256 };
// Square products: the largest take so much power that the clock falls, so the best of several is the ceiling.
static const int edges[] = {8192, 4096, 2048};
enum { EDGE = 8192 };                        // the largest
static const size_t copy_bytes = 256u << 20; // of each of two buffers: beyond the L2 cache of any card
static const size_t matrix_bytes = 2 * (size_t)EDGE * EDGE, workspace_bytes = 32u << 20;

// Seconds that the median of some samples took; `work` gives the stream what one sample is.
template <class Work> static double median_seconds(cudaStream_t s, Work work) {
  cudaEvent_t begin, end;
  float ms[SAMPLES];
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  for (float &sample : ms) {
    CUDA_CHECK(cudaEventRecord(begin, s));
    work();
    CUDA_CHECK(cudaEventRecord(end, s));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&sample, begin, end));
  }
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  std::nth_element(ms, ms + SAMPLES / 2, ms + SAMPLES);
  return ms[SAMPLES / 2] * 1e-3;
}

static double copy_rate(char *memory, cudaStream_t s) {
  const auto copies = [&] {
    for (int i = 0; i < COPIES; i++)
      CUDA_CHECK(cudaMemcpyAsync(memory + (i % 2 ? 0 : copy_bytes), memory + (i % 2 ? copy_bytes : 0), copy_bytes,
                                 cudaMemcpyDeviceToDevice, s));
  };
  copies();
  return COPIES * 2.0 * copy_bytes / median_seconds(s, copies);
}

// Values in (-1, 1): a product of zeros takes less power, and its clock is not that of a training run.
__global__ void matrices_fill(bf16 *x, size_t n) {
  await_previous();
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t h = (uint32_t)i * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    x[i] = __float2bfloat16_rn((float)(int32_t)(h ^ h >> 13) * (1.0f / 2147483648.0f));
  }
}

// FLOP/s of cuBLASLt's own choice for D = A^T B [edge, edge], fp32 sums, bf16 out; 0 where it has none.
static double product_rate(char *memory, int edge, cudaStream_t s) {
  const cublasOperation_t transpose = CUBLAS_OP_T;
  const float alpha = 1, beta = 0;
  char *a = memory, *b = a + matrix_bytes, *d = b + matrix_bytes, *workspace = d + matrix_bytes;
  static cublasLtHandle_t handle; // of the process: a profile and a benchmark ask once or twice
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t layout;
  cublasLtMatmulPreferenceOpaque_t wish;
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  bool ok =
      (handle || cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS) &&
      cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
      cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose) ==
          CUBLAS_STATUS_SUCCESS &&
      cublasLtMatrixLayoutInit(&layout, CUDA_R_16BF, (uint64_t)edge, (uint64_t)edge, edge) == CUBLAS_STATUS_SUCCESS &&
      cublasLtMatmulPreferenceInit(&wish) == CUBLAS_STATUS_SUCCESS &&
      cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                           sizeof workspace_bytes) == CUBLAS_STATUS_SUCCESS &&
      cublasLtMatmulAlgoGetHeuristic(handle, &product, &layout, &layout, &layout, &layout, &wish, 1, &best, &found) ==
          CUBLAS_STATUS_SUCCESS &&
      found;
  if (!ok) return 0;
  const int products_a_sample = PRODUCTS * (EDGE / edge);
  const auto products = [&] {
    for (int i = 0; i < products_a_sample; i++)
      ok = ok && cublasLtMatmul(handle, &product, &alpha, a, &layout, b, &layout, &beta, d, &layout, d, &layout,
                                &best.algo, workspace, workspace_bytes, s) == CUBLAS_STATUS_SUCCESS;
  };
  for (int i = 0; i < WARM_UP / PRODUCTS; i++) products(); // until the clock is the one of a long load
  double seconds = median_seconds(s, products);
  return ok ? products_a_sample * 2.0 * edge * edge * edge / seconds : 0;
}

DeviceRates rates_measure(double sheet_flops, cudaStream_t stream) {
  const size_t copied = 2 * copy_bytes, multiplied = 3 * matrix_bytes + workspace_bytes;
  DeviceRates r = {};
  void *memory = NULL;
  r.flops = SUSTAINED * sheet_flops;
  if (cudaMalloc(&memory, std::max(copied, multiplied)) != cudaSuccess) {
    cudaGetLastError(); // a model fills the device: no floor for bytes
    return r;
  }
  r.bytes = copy_rate((char *)memory, stream);
  double flops = 0;
  CUDA_LAUNCH(matrices_fill, 8 * cuda_sm_count(), THREADS, 0, stream, (bf16 *)memory,
              2 * (size_t)EDGE * EDGE); // A and B
  for (int edge : edges)
    if (cublas_lt_found()) flops = std::max(flops, product_rate((char *)memory, edge, stream));
  if (flops > 0) r.flops = flops;
  r.flops_measured = flops > 0;
  CUDA_CHECK(cudaFree(memory));
  return r;
}
