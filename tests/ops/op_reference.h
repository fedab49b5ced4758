// How most op tests check an op of the CPU backend: it runs on random packs with poisoned outputs, and with NaN in
// every input row that it must not read, and is compared with a plain reference in double; a backward op with central
// differences of that reference. The same sources are built for float and for double. All of it asserts: it is for
// cmocka tests.
#ifndef TESSERA_OP_REFERENCE_H
#define TESSERA_OP_REFERENCE_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/cpu/reference/reference.h"
#include "tests/ops/op_case.h"

enum { CASES = 20 };

// Case number `round` of a test, with its pack: `small` of small sizes, then the LARGE_CASES large ones.
void case_of_round(OpCase *c, int round, int small);
// Elements of a gradient that are compared one by one; every one counts along random directions.
int elements_checked(const OpCase *c);

#define assert_close(got, want, n) assert_true(relative_error(got, want, n) < CASE_TOL)

// Runs an op as its formula says (kernels/cpu/reference): as op_run, but on doubles.
void reference_run(const OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out);

// A reference: the op's formula, or fn where it has none, computes out[] from in[], both in double; loss = sum of
// <seed, out>.
typedef struct Ref {
  OpCase *c;
  OpKind kind;
  OpArgs args;
  void (*fn)(struct Ref *); // NULL: reference_run
  double *in[OP_MAX_IN], *out[OP_MAX_OUT];
  int64_t n_out[OP_MAX_OUT];
  const real *seed[OP_MAX_OUT];
} Ref;
// Adds output k of n elements; its gradient in the loss is `seed` [n], or nothing for NULL.
void ref_output(Ref *f, int k, int64_t n, const real *seed);
void ref_run(Ref *f);             // on outputs of zero
double ref_loss(void *reference); // a Ref's, for gradient_error
// Requires that grad [n] is the gradient of the reference's loss by in[k].
void assert_gradient(Ref *f, int k, const real *grad, int64_t n);
// Runs an op with `add`, onto random numbers in its outputs: the accumulating ones (bits of acc_mask) must then be
// those plus `first`, what the op without accumulation gave.
void assert_accumulates(OpCase *c, OpKind kind, OpArgs add, const void *const *in, void *const *first,
                        const int64_t n[OP_MAX_OUT], unsigned acc_mask);

// Random operands with NaN where an op must not look: [T, width] outside the rows [from, to), [SEG, width] outside the
// rows [from, n_segments).
real *rows_random(OpCase *c, int64_t from, int64_t to, int64_t width);
real *segments_random(OpCase *c, int from, int64_t width);

OpArgs span_args(int64_t count, int accumulate);
double sigmoid(double x);
#endif
