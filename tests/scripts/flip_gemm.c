// A matrix product that is wrong once, for LD_PRELOAD: call number FLIP_GEMM_AT of cblas_sgemm, counted from 1, has one
// bit of its first element flipped. FLIP_GEMM_COUNT names a file that gets the number of calls when the process ends.
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void Sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

static atomic_long calls;

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  Sgemm *gemm = (Sgemm *)dlsym(RTLD_NEXT, "cblas_sgemm");
  const char *at = getenv("FLIP_GEMM_AT");
  gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  long call = atomic_fetch_add(&calls, 1) + 1;
  if (at && atol(at) == call && m > 0 && n > 0) *(uint32_t *)(void *)c ^= 1u << 22;
}

__attribute__((destructor)) static void say_calls(void) {
  const char *path = getenv("FLIP_GEMM_COUNT");
  FILE *f = path ? fopen(path, "w") : NULL;
  if (!f) return;
  fprintf(f, "%ld\n", (long)calls);
  fclose(f);
}
