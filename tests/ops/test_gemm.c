// CPU products and the exponential against plain references in double. Built in float and in double.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/ops/op_case.h"

#define assert_close(got, want, n) assert_true(relative_error(got, want, n) < CASE_TOL)

static void naive_gemm(int ta, int tb, const GemmItem *g, double beta, double *C) {
  for (int64_t i = 0; i < g->M; i++) {
    for (int64_t j = 0; j < g->N; j++) {
      double sum = 0;
      for (int64_t k = 0; k < g->K; k++)
        sum += (double)g->A[ta ? k * g->lda + i : i * g->lda + k] * (double)g->B[tb ? j * g->ldb + k : k * g->ldb + j];
      double *to = &C[i * g->ldc + j];
      *to = beta == 0 ? sum : sum + beta * *to;
    }
  }
}

// Of the sizes given, with rows longer than they need be.
static GemmItem item_of(OpCase *c, int ta, int tb, int beta, int64_t M, int64_t N, int64_t K) {
  GemmItem g = {.M = M, .N = N, .K = K};
  g.lda = (ta ? g.M : g.K) + case_int(c, 0, 5) + 1;
  g.ldb = (tb ? g.K : g.N) + case_int(c, 0, 5) + 1;
  g.ldc = g.N + case_int(c, 0, 5) + 1;
  g.A = case_random(c, g.lda * (ta ? g.K : g.M), 1);
  g.B = case_random(c, g.ldb * (tb ? g.N : g.K), 1);
  g.C = case_random(c, g.ldc * g.M, 1);
  for (int64_t i = 0; i < g.ldc * g.M && !beta; i++)
    if (i % g.ldc < g.N) g.C[i] = (real)NAN;
  return g;
}

static GemmItem random_item(OpCase *c, int ta, int tb, int beta) {
  int most = case_int(c, 0, 3) ? 40 : 300;
  int64_t M = case_int(c, 0, most), N = case_int(c, 0, most), K = case_int(c, 0, most);
  return item_of(c, ta, tb, beta, M, N, K);
}

// Rows and columns around every number at which C is cut another way, and of several blocks.
static void test_gemm_blocks(void **state) {
  (void)state;
  const int64_t rows[] = {8, 95, 97, 129, 257, 601}, columns[] = {7, 127, 257, 513, 770};
  for (int i = 0; i < 6; i++)
    for (int j = 0; j < 5; j++)
      for (int t = 0; t < 4; t++) {
        OpCase c;
        op_case_init(&c, (uint64_t)(i * 5 + j) * 4 + (uint64_t)t);
        GemmItem g = item_of(&c, t & 1, t >> 1, 1, rows[i], columns[j], case_int(&c, 1, 9));
        double *want = case_double(&c, g.C, g.ldc * g.M);
        naive_gemm(t & 1, t >> 1, &g, 1, want);
        gemm_batch(t & 1, t >> 1, 1, &g, 1);
        assert_close(g.C, want, g.ldc * g.M);
        op_case_free(&c);
      }
}

static void test_gemm(void **state) {
  (void)state;
  for (int round = 0; round < 60; round++) {
    OpCase c;
    op_case_init(&c, (uint64_t)round);
    int ta = round & 1, tb = round >> 1 & 1, beta = round >> 2 & 1, n = case_int(&c, 0, 4);
    GemmItem items[4];
    double *want[4];
    for (int k = 0; k < n; k++) {
      items[k] = random_item(&c, ta, tb, beta);
      want[k] = case_double(&c, items[k].C, items[k].ldc * items[k].M);
      naive_gemm(ta, tb, &items[k], beta, want[k]);
    }
    if (n == 1) {
      GemmItem *g = items;
      gemm(ta, tb, g->M, g->N, g->K, 1, g->A, g->lda, g->B, g->ldb, (real)beta, g->C, g->ldc);
    } else {
      gemm_batch(ta, tb, (real)beta, items, n);
    }
    for (int k = 0; k < n; k++) assert_close(items[k].C, want[k], items[k].ldc * items[k].M);
    op_case_free(&c);
  }
}

static void test_exp(void **state) {
  (void)state;
  double worst = 0;
  for (double x = -86.9; x < 88; x += 0.00137) {
    double want = exp((double)(real)x);
    worst = fmax(worst, fabs((double)real_exp((real)x) - want) / want);
  }
  assert_true(worst < (CASE_DOUBLE ? 1e-15 : 2.5e-7));
  assert_true(isnan(real_exp((real)NAN)));
  assert_true(real_exp((real)INFINITY) == (real)INFINITY && real_exp((real)1e4) == (real)INFINITY);
  assert_true(real_exp((real)-INFINITY) == 0 && real_exp((real)-1e4) == 0);
  assert_true(real_exp(0) == 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_gemm_blocks), cmocka_unit_test(test_gemm),
                                     cmocka_unit_test(test_exp)};
  return cmocka_run_group_tests_name("gemm", tests, NULL, NULL);
}
