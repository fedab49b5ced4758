// cuBLASLt, loaded when it is first used. Only the experts' baseline (experts_loop.cu) needs it, and rates.cu takes it
// where it is: without this every start of ./train would map half a gigabyte, and a machine without the toolkit could
// not start it at all.
#include "kernels/cuda/rates.h"

extern "C" {
#include "base/base.h"
}

#include <cublasLt.h>
#include <dlfcn.h>

#define TEXT_OF(x) #x
#define LIBRARY_NAME(major) "libcublasLt.so." TEXT_OF(major) // its argument is expanded first

static void *library_open(void) {
  static void *library;
  const char *const paths[] = {LIBRARY_NAME(CUBLAS_VER_MAJOR), "/usr/local/cuda/lib64/" LIBRARY_NAME(CUBLAS_VER_MAJOR)};
  for (size_t i = 0; !library && i < sizeof paths / sizeof *paths; i++) library = dlopen(paths[i], RTLD_NOW);
  return library;
}

bool cublas_lt_found(void) {
  return library_open() != NULL;
}

const char *cublas_lt_missing(void) {
  return library_open()
             ? NULL
             : "cuBLASLt of the CUDA toolkit: there is no " LIBRARY_NAME(CUBLAS_VER_MAJOR) " in the library path";
}

static void *library_symbol(const char *name) {
  void *library = library_open();
  if (!library)
    panic("--moe-gemm loop needs cuBLASLt of the CUDA toolkit: %s is not in the library path",
          LIBRARY_NAME(CUBLAS_VER_MAJOR));
  void *symbol = dlsym(library, name);
  if (!symbol) panic("--moe-gemm loop: this cuBLASLt has no %s", name);
  return symbol;
}

// The body of a function that passes its arguments on to the one of the same name in the library.
#define PASS_ON(name, ...)                                                                                             \
  static const auto function = (decltype(&name))library_symbol(#name);                                                 \
  return function(__VA_ARGS__)

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  PASS_ON(cublasLtCreate, handle);
}

const char *cublasLtGetStatusString(cublasStatus_t status) {
  PASS_ON(cublasLtGetStatusString, status);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                              size_t bytes, cudaStream_t stream) {
  PASS_ON(cublasLtMatmul, handle, product, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algorithm,
          workspace, bytes, stream);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t wish, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
  PASS_ON(cublasLtMatmulAlgoGetHeuristic, handle, product, a, b, c, d, wish, wanted, results, found);
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, size_t size, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
  PASS_ON(cublasLtMatmulDescInit_internal, product, size, compute, scale);
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes) {
  PASS_ON(cublasLtMatmulDescSetAttribute, product, attribute, value, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t wish, size_t size) {
  PASS_ON(cublasLtMatmulPreferenceInit_internal, wish, size);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t wish,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes) {
  PASS_ON(cublasLtMatmulPreferenceSetAttribute, wish, attribute, value, bytes);
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t stride) {
  PASS_ON(cublasLtMatrixLayoutInit_internal, layout, size, type, rows, columns, stride);
}
}
