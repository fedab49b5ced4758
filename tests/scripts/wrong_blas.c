// An OpenBLAS that computes wrong, to be loaded before the real one (LD_PRELOAD): what WRONG_BLAS names is done to its
// single-precision products. Faults that builds of it have had on some processors, or could have.
#include <cblas.h>
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*SgemmFn)(CBLAS_LAYOUT, CBLAS_TRANSPOSE, CBLAS_TRANSPOSE, blasint, blasint, blasint, float, const float *,
                        blasint, const float *, blasint, float, float *, blasint);

// Mantissas of 8 bits, as bf16 has them.
static float *rounded(const float *x, size_t n) {
  float *y = malloc(n * sizeof *y);
  for (size_t i = 0; y && i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &x[i], sizeof bits);
    bits = (bits + 0x8000) & 0xffff0000;
    memcpy(&y[i], &bits, sizeof bits);
  }
  return y;
}

void cblas_sgemm(CBLAS_LAYOUT layout, CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, blasint M, blasint N, blasint K,
                 float alpha, const float *A, blasint lda, const float *B, blasint ldb, float beta, float *C,
                 blasint ldc) {
  const char *fault = getenv("WRONG_BLAS") ? getenv("WRONG_BLAS") : "";
  SgemmFn real = (SgemmFn)dlsym(RTLD_NEXT, "cblas_sgemm");
  float *coarse = NULL;
  if (strcmp(fault, "bf16") == 0) A = coarse = rounded(A, (size_t)(ta == CblasTrans ? K : M) * (size_t)lda);
  if (strcmp(fault, "beta") == 0 && beta == 0)
    for (blasint i = 0; i < M; i++)
      for (blasint j = 0; j < N; j++) C[i * ldc + j] = 0 * C[i * ldc + j];
  real(layout, ta, tb, M, N, K, alpha, A, lda, B, ldb, strcmp(fault, "beta") == 0 ? 1 : beta, C, ldc);
  free(coarse);
  float *last = C + (M - 1) * ldc + N - 1;
  if (strcmp(fault, "tail") == 0 && M % 8 == 5) *last *= 1.001f; // the last row of an unusual height
  if (strcmp(fault, "width") == 0 && N % 16 == 1 && N > 32) *last = 0;
  if (strcmp(fault, "depth") == 0 && K > 1000) *last += .01f; // beyond a cache block
  if (strcmp(fault, "transposed") == 0 && ta == CblasTrans && K % 2) *last += A[0] * B[0];
  if (strcmp(fault, "gap") == 0 && N % 4 == 3 && ldc > N) last[1] = 0; // more than was asked for
  if (strcmp(fault, "nan") == 0 && M == 1) *last = NAN;
}
