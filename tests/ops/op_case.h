// What the op tests share: random packs with documents of every kind, poisoned operands, and gradient checks.
//
// An OpCase owns the sizes, a pack and every operand made from it; op_case_free() releases them all. Each operand is an
// allocation of its own, so that a sanitizer sees every bound.
#ifndef TESSERA_OP_CASE_H
#define TESSERA_OP_CASE_H

#include "kernels/cpu/cpu.h"

#include <stdbool.h>

// What a pack consists of.
typedef enum PackKind {
  PACK_MIXED, // documents of every kind, then filler
  PACK_FULL,  // the same, then one-token text documents in all slots left: no filler
  PACK_TEXT,  // text documents only
  PACK_IMAGE, // documents that are one image without any text
  PACK_EMPTY, // filler only
  PACK_KINDS
} PackKind;

typedef struct OpCase {
  Dims dims;
  Batch batch;
  int image_side; // patches of an image's side, at most; 0: 4
  uint64_t rng;
  void **owned;
  int n_owned;
} OpCase;

// Random numbers, from the case's own stream.
uint64_t case_bits(OpCase *c);
int case_int(OpCase *c, int lo, int hi); // lo .. hi, both included
double case_uniform(OpCase *c);          // (0, 1)
double case_normal(OpCase *c);

// Small random sizes, odd ones included. All of T, C, V, Z, .. may be overwritten before op_case_pack; keep H a
// multiple of G, D even, K[m] <= E[m], M = 6CL + 2C.
void op_case_init(OpCase *c, uint64_t seed);
// Sizes beyond every block that a kernel cuts its work into, the last block of each shorter and odd: 2 blocks of rows
// and columns at least, images larger than a block of rows too. The router's blocks of 512 columns are for its own
// test.
enum { LARGE_CASES = 3 };
void op_case_init_large(OpCase *c, int number); // 0 .. LARGE_CASES - 1
bool op_case_is_large(const OpCase *c);
// Builds the pack for c->dims. May be called again, after changing the sizes too.
void op_case_pack(OpCase *c, PackKind kind);
void op_case_free(OpCase *c);

// Operands, aligned to 64 bytes, owned by the case.
real *case_random(OpCase *c, int64_t n, double std); // normal numbers
real *case_poison(OpCase *c, int64_t n);             // NaN: what an output holds before it is written
real *case_copy(OpCase *c, const real *x, int64_t n);
void *case_bytes(OpCase *c, size_t bytes, int fill); // every byte set to `fill`
// A double copy of a real operand, for a reference.
double *case_double(OpCase *c, const real *x, int64_t n);
double *case_zeros(OpCase *c, int64_t n);

// Runs an op of the CPU backend. op_run(&c, OP_COPY, args, OP_IN(src), OP_OUT(dst)); absent operands are NULL.
#define OP_IN(...) ((const void *[OP_MAX_IN]){__VA_ARGS__})
#define OP_OUT(...) ((void *[OP_MAX_OUT]){__VA_ARGS__})
void op_run(const OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out);

// Norm of got - want over the larger of their norms (0 when both are zero; infinite when something is not finite).
double relative_error(const real *got, const double *want, int64_t n);
double norm_of(const real *x, int64_t n);
// True when every element is zero (of either sign) / the bytes are the same.
bool all_zero(const real *x, int64_t n);
bool same_bits(const void *a, const void *b, size_t bytes);

// Tolerances of this build for sums of a few hundred terms.
#define CASE_DOUBLE (sizeof(real) == sizeof(double))
#define CASE_TOL (CASE_DOUBLE ? 1e-11 : 1e-5)     // an op against a reference in double
#define CASE_GRAD_TOL (CASE_DOUBLE ? 1e-6 : 5e-5) // an op's gradient against central differences in double

// Relative error of `grad` = d loss / d x against central differences with step 1e-5 of a scalar function that reads x,
// which is perturbed and restored. `loss` computes in double: a reference, or in the double build the op itself. When
// n exceeds max_checked, that many random elements are compared, and all of them along random directions.
double gradient_error(OpCase *c, double (*loss)(void *), void *context, double *x, const real *grad, int64_t n,
                      int max_checked);

// The scalar sum over the outputs k with n[k] > 0 of <seed[k], out[k]>, after running the op: a `loss` for
// gradient_error. Its gradient is what the backward op gives for the output gradients seed[k].
typedef struct Probe {
  const OpCase *c;
  OpKind kind;
  OpArgs args;
  const void *in[OP_MAX_IN];
  void *out[OP_MAX_OUT];
  const real *seed[OP_MAX_OUT];
  int64_t n[OP_MAX_OUT];
} Probe;
double probe_loss(void *probe);
#endif
