// Matrix products: OpenBLAS, single-threaded, inside our own parallel loop over fixed blocks of C.
//
// Against OpenBLAS's own threads this is faster at the sizes of small models and gives the same bits for any number of
// threads, since an element's sum never depends on how its product was shared out.
#include "kernels/cpu/cpu.h"

#include <cblas.h>

#ifdef TESSERA_DOUBLE
#define CBLAS_GEMM cblas_dgemm
#else
#define CBLAS_GEMM cblas_sgemm
#endif

// Before main, so that no product ever meets OpenBLAS's own threads.
__attribute__((constructor)) static void blas_use_one_thread(void) {
  openblas_set_num_threads(1);
}

// How C is cut. Blocks near 128 x 256 reach the rate of large ones (measured on Zen 3 with M 240 .. 960, N and K
// 128 .. 512: 82 GFLOP/s for one block on one core, 120 to 170 for these on two). The number of row blocks is even, for
// the sake of two cores; a product of few rows is cut by columns alone; sizes are multiples of OpenBLAS's register
// tile.
enum { ROWS_MOST = 128, COLS_MOST = 256, ROWS_LEAST = 96, COLS_FLAT = 128, SERIAL_WORK = 16384 };

typedef struct Blocks {
  int64_t height, width, rows, cols; // of a block; number of blocks
} Blocks;

static int64_t pieces(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

static Blocks blocks_for(int64_t M, int64_t N, int64_t K) {
  Blocks b = {.height = M, .width = N};
  if (M * N * K > SERIAL_WORK) {
    int tall = M >= ROWS_LEAST;
    if (tall) b.height = pieces(pieces(M, 2 * pieces(M, 2 * ROWS_MOST)), 8) * 8;
    b.width = pieces(pieces(N, tall ? pieces(N, COLS_MOST) : 2 * pieces(N, 2 * COLS_FLAT)), 8) * 8;
  }
  b.rows = M ? pieces(M, b.height) : 0;
  b.cols = N ? pieces(N, b.width) : 0;
  return b;
}

static int64_t block_count(Blocks b) {
  return b.rows * b.cols;
}

void gemm_serial(int ta, int tb, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda, const real *B,
                 int64_t ldb, real beta, real *C, int64_t ldc) {
  if (M == 0 || N == 0) return;
  if (K == 0) {
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j++) C[i * ldc + j] = beta == 0 ? 0 : beta * C[i * ldc + j];
    return;
  }
  CBLAS_GEMM(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, (blasint)M, (blasint)N,
             (blasint)K, alpha, A, (blasint)lda, B, (blasint)ldb, beta, C, (blasint)ldc);
}

// Block i of a product cut as b says.
static void gemm_block(int ta, int tb, const GemmItem *g, real alpha, real beta, Blocks b, int64_t i) {
  int64_t m = i / b.cols * b.height, n = i % b.cols * b.width;
  int64_t height = g->M - m < b.height ? g->M - m : b.height, width = g->N - n < b.width ? g->N - n : b.width;
  gemm_serial(ta, tb, height, width, g->K, alpha, g->A + (ta ? m : m * g->lda), g->lda, g->B + (tb ? n * g->ldb : n),
              g->ldb, beta, g->C + m * g->ldc + n, g->ldc);
}

void gemm(int ta, int tb, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda, const real *B,
          int64_t ldb, real beta, real *C, int64_t ldc) {
  GemmItem g = {.M = M, .N = N, .K = K, .lda = lda, .ldb = ldb, .ldc = ldc, .A = A, .B = B, .C = C};
  Blocks b = blocks_for(M, N, K);
  int64_t n = block_count(b);
#pragma omp parallel for schedule(dynamic, 1) if (n > 1)
  for (int64_t i = 0; i < n; i++) gemm_block(ta, tb, &g, alpha, beta, b, i);
}

void gemm_batch(int ta, int tb, real beta, const GemmItem *items, int n) {
  int64_t total = 0;
  for (int k = 0; k < n; k++) total += block_count(blocks_for(items[k].M, items[k].N, items[k].K));
#pragma omp parallel for schedule(dynamic, 1) if (total > 1)
  for (int64_t i = 0; i < total; i++) {
    int64_t left = i;
    const GemmItem *g = items;
    Blocks b = blocks_for(g->M, g->N, g->K);
    while (left >= block_count(b)) {
      left -= block_count(b);
      g++;
      b = blocks_for(g->M, g->N, g->K);
    }
    gemm_block(ta, tb, g, 1, beta, b, left);
  }
}
