// OpenBLAS as it is found on this machine: room for what it maps, and whether it computes right.
#include "kernels/cpu/cpu.h"

#include <cblas.h>
#include <float.h>
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

// ---- room ----

// What it maps for each thread that is in a product; some builds take less.
static const size_t BUFFER_BYTES = (size_t)128 << 20;

// Its pool of these buffers: exported, if not declared in its header.
extern void *blas_memory_alloc(int unused) __attribute__((weak));
extern void blas_memory_free(void *buffer) __attribute__((weak));

// Threads that have room already. A process has one OpenBLAS.
static int served;

static size_t stack_bytes(void) {
  pthread_attr_t attributes;
  size_t bytes = 0;
  pthread_getattr_default_np(&attributes);
  pthread_attr_getstacksize(&attributes, &bytes);
  pthread_attr_destroy(&attributes);
  return bytes;
}

// OpenBLAS tries for ever to map a buffer that there is no room for (ulimit -v, ulimit -d), so the room is tried first;
// and it takes its buffers now, before others use the room up.
static int take_room(int threads, Error *err) {
  int more = threads - served;
  if (more <= 0) return 0;
  size_t need = (size_t)more * (BUFFER_BYTES + stack_bytes());
  void *room = mmap(NULL, need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED)
    return error_set(err, "raise the limit of address space (ulimit -v, ulimit -d), or lower run.threads",
                     "OpenBLAS and %d compute threads need %.2f GB of address space, which this process does not get",
                     threads, (double)need / 1e9);
  munmap(room, need);
#pragma omp parallel num_threads(threads)
  (void)omp_get_thread_num(); // starts the threads: their stacks come first
  if (!blas_memory_alloc || !blas_memory_free) return 0;
  void **buffer = xcalloc((size_t)threads, sizeof *buffer);
  for (int i = 0; i < threads; i++) buffer[i] = blas_memory_alloc(0);
  for (int i = 0; i < threads; i++)
    if (buffer[i]) blas_memory_free(buffer[i]);
  free(buffer);
  served = threads;
  return 0;
}

// ---- products ----

typedef struct Product {
  int ta, tb;
  int64_t M, N, K;
  real beta;
} Product;

// Elements of an operand, alike in every run: about uniform in [-1, 1).
static real element(uint32_t i) {
  return (real)((int)(i * 2654435761u >> 16) - 32768) / 32768;
}

static real *matrix(uint32_t salt, int64_t rows, int64_t ld) {
  real *x = xmalloc((size_t)(rows * ld) * sizeof *x);
  for (int64_t i = 0; i < rows * ld; i++) x[i] = element((uint32_t)i * 3 + salt);
  return x;
}

// The largest error of C, above 1 where it is wrong: sums of K terms round by about sqrt(K) units, and OpenBLAS's x86
// kernels reach .15 here. Rows are longer than they need be, and what lies between them must stay as it was; with beta
// 0 C begins as NaN.
static double product_error(const Product *p) {
  int64_t lda = (p->ta ? p->M : p->K) + 3, ldb = (p->tb ? p->K : p->N) + 1, ldc = p->N + 5;
  real *A = matrix(1, p->ta ? p->K : p->M, lda), *B = matrix(7, p->tb ? p->N : p->K, ldb);
  real *C = matrix(9, p->M, ldc), *before = matrix(9, p->M, ldc);
  const double eps = sizeof(real) == sizeof(double) ? DBL_EPSILON : FLT_EPSILON;
  double worst = 0;
  for (int64_t i = 0; i < p->M * ldc && p->beta == 0; i++)
    if (i % ldc < p->N) C[i] = (real)NAN;
  gemm_serial(p->ta, p->tb, p->M, p->N, p->K, 1, A, lda, B, ldb, p->beta, C, ldc);
  for (int64_t i = 0; i < p->M * ldc; i++) {
    int64_t m = i / ldc, n = i % ldc, inside = n < p->N;
    double sum = inside ? (double)p->beta * (double)before[i] : (double)before[i], size = fabs(sum);
    for (int64_t k = 0; k < p->K && inside; k++) {
      double term = (double)A[p->ta ? k * lda + m : m * lda + k] * (double)B[p->tb ? n * ldb + k : k * ldb + n];
      sum += term;
      size += fabs(term);
    }
    double error = fabs((double)C[i] - sum) / (inside ? (8 + 2 * sqrt((double)p->K)) * eps * size : DBL_MIN);
    if (!(error <= worst)) worst = error == error ? error : INFINITY;
  }
  free(A);
  free(B);
  free(C);
  free(before);
  return worst;
}

// Sizes around every register tile's edges, single rows and columns, depths and heights beyond a cache block.
static const int64_t odd_sizes[][3] = {{1, 37, 19},  {23, 1, 29},  {5, 3, 2},    {17, 31, 9},  {47, 33, 18},
                                       {13, 50, 65}, {96, 8, 16},  {25, 16, 64}, {7, 9, 1031}, {3, 5, 401},
                                       {390, 6, 7},  {4, 301, 11}, {33, 65, 43}};

static int check_products(Error *err) {
  enum { SIZES = sizeof odd_sizes / sizeof *odd_sizes, WAYS = 6 };
  Product wrong = {0};
  double error = 0;
// In all threads at once, as a step multiplies.
#pragma omp parallel for schedule(dynamic, 1)
  for (int i = 0; i < SIZES * WAYS; i++) {
    const int64_t *size = odd_sizes[i / WAYS];
    int way = i % 3; // x W^T, dy W, dy^T x
    Product p = {
        .ta = way == 2, .tb = way == 0, .M = size[0], .N = size[1], .K = size[2], .beta = (real)(i % WAYS / 3)};
    double own = product_error(&p);
#pragma omp critical
    if (own > 1 && own > error) {
      error = own;
      wrong = p;
    }
  }
  if (error == 0) return 0;
  return error_set(err,
                   "choose other kernels with the environment variable OPENBLAS_CORETYPE (Haswell, or Nehalem; on ARM: "
                   "ARMV8), or install another version of OpenBLAS",
                   "OpenBLAS computes wrong on this processor with its %s kernels: a product of %lld x %lld x %lld%s%s "
                   "is off by %.3g times what rounding may do",
                   blas_kernels(), (long long)wrong.M, (long long)wrong.N, (long long)wrong.K,
                   wrong.ta || wrong.tb ? wrong.ta ? ", the first transposed," : ", the second transposed," : "",
                   wrong.beta != 0 ? " (added to what was there)" : "", error);
}

const char *blas_kernels(void) {
  return openblas_get_corename();
}

int blas_open(Error *err) {
  return take_room(omp_get_max_threads(), err) != 0 ? -1 : check_products(err);
}
