// What the CPU kernels share: the type `real`, matrix products, and vectorisable elementary functions.
//
// Loops are parallel over rows or fixed blocks whose split does not depend on the number of threads, so that results
// have the same bits for any number of threads. BLAS runs single-threaded inside them.
#ifndef TESSERA_CPU_H
#define TESSERA_CPU_H

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

#ifndef TESSERA_REAL
#define TESSERA_REAL float
#endif
typedef TESSERA_REAL real;

// C [M,N] = alpha op(A) op(B) + beta C, row-major with leading dimensions; ta: A is stored [K,M], tb: B is stored
// [N,K]. M, N or K may be 0 (K 0: C = beta C). gemm() splits C into blocks over OpenMP threads; gemm_serial() is one
// single-threaded product, for use inside a parallel loop. beta 0 never reads C.
void gemm(int ta, int tb, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda, const real *B,
          int64_t ldb, real beta, real *C, int64_t ldc);
void gemm_serial(int ta, int tb, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda, const real *B,
                 int64_t ldb, real beta, real *C, int64_t ldc);

// One product of a batch run by gemm_batch: all of them share transposes, alpha 1, and the threads. For experts and
// modalities: the blocks of all products go into one parallel loop.
typedef struct GemmItem {
  int64_t M, N, K, lda, ldb, ldc;
  const real *A, *B;
  real *C;
} GemmItem;
void gemm_batch(int ta, int tb, real beta, const GemmItem *items, int n);

// Takes the address space that OpenBLAS needs for every compute thread, and compares products of odd shapes with plain
// loops: about a millisecond. 0, or -1 with *err: there is no room, or this OpenBLAS computes wrong on this processor.
int blas_open(Error *err);
// OpenBLAS's name of the kernels it chose for this processor ("Haswell"): products have the same bits only with the
// same.
const char *blas_kernels(void);

// Memory for arrays whose size the model decides, which may be more than a stack holds: `bytes` for each thread of the
// next parallel region, of any content, until the calling thread's next scratch_take. An op takes what it needs before
// its loop, so that no thread allocates.
typedef struct Scratch {
  char *at;
  size_t bytes; // of a thread
} Scratch;
Scratch scratch_take(int64_t bytes);
// The calling thread's part, inside the region or, outside of any, the first one.
void *scratch_own(const Scratch *s);

// exp to about 2 ulp in float (a polynomial the compiler vectorises), libm's in double. Saturates; NaN stays NaN.
static inline real real_exp(real x) {
  if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
  // x = n ln2 + r, |r| <= ln2/2; the polynomial is Cephes' expf.
  float v = (float)x;
  float c = v > -87.0f ? v : -87.0f; // NaN too
  c = c < 88.0f ? c : 88.0f;
  float n = floorf(c * 1.44269504088896341f + 0.5f);
  float r = c - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  union {
    int32_t i;
    float f;
  } scale = {.i = ((int32_t)n + 127) << 23};
  float y = p * scale.f;
  return (real)(v != v ? v : v < -87.0f ? 0.0f : v > 88.0f ? INFINITY : y);
}

static inline real real_sqrt(real x) {
  return sizeof(real) == sizeof(double) ? (real)sqrt((double)x) : (real)sqrtf((float)x);
}

static inline real real_sigmoid(real x) {
  return 1 / (1 + real_exp(-x));
}

// The kernels; operands and formulas: kernels.h.
#define OP_DECLARE(name, ...) void cpu_##name(const KernelCall *call);
OP_LIST(OP_DECLARE)
#undef OP_DECLARE
#endif
