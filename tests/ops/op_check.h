// What the tests of attention and of the experts share beyond op_case.h: their cases, and runs that must give the same
// bits whatever the number of threads. All of it asserts: it is for cmocka tests.
#ifndef TESSERA_OP_CHECK_H
#define TESSERA_OP_CHECK_H

#include "tests/ops/op_case.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

enum { SEEDS = 30 };

#define assert_small(error, tolerance)                                                                                 \
  do {                                                                                                                 \
    double error_ = (error);                                                                                           \
    if (!(error_ < (tolerance)))                                                                                       \
      fail_msg("%s = %g, more than %g (seed %d)", #error, error_, (double)(tolerance), current_seed(c));               \
  } while (0)

// Sizes that matter here, and every kind of pack in turn.
void make_case(OpCase *c, int seed);
// The seed of a case is kept in the pack's own, where no op under test looks.
int current_seed(const OpCase *c);
int used_rows(const OpCase *c);
int modality_of(const OpCase *c, int64_t row);

// Runs an op with 3 threads, then with 1 and 2 from the same state of its outputs, and requires the same bits.
void run_same(OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out,
              const size_t bytes[OP_MAX_OUT]);
#define REALS(n) ((size_t)(n) * sizeof(real))
#define SIZES(...) ((const size_t[OP_MAX_OUT]){__VA_ARGS__})

// Requires that an accumulating op adds: got = prior + plain, elementwise within rounding; the relative error.
double accumulate_error(OpCase *c, const real *got, const real *prior, const real *plain, int64_t n);
double dot(const real *seed, const double *x, int64_t n);
#endif
