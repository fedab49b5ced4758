#include "tests/ops/op_reference.h"

void case_of_round(OpCase *c, int round, int small) {
  static const PackKind large[LARGE_CASES] = {PACK_MIXED, PACK_TEXT, PACK_FULL};
  if (round < small)
    op_case_init(c, (uint64_t)round);
  else
    op_case_init_large(c, round - small);
  op_case_pack(c, round < small ? (PackKind)(round % PACK_KINDS) : large[round - small]);
}

int elements_checked(const OpCase *c) {
  return op_case_is_large(c) ? 6 : 60;
}

void reference_run(const OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out) {
  KernelCall call = {.batch = &c->batch, .dims = &c->dims, .args = &args};
  memcpy(call.in.at, in, sizeof call.in.at);
  memcpy(call.out.at, out, sizeof call.out.at);
  reference[kind](&call);
}

void ref_run(Ref *f) {
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (f->out[k]) memset(f->out[k], 0, (size_t)f->n_out[k] * sizeof(double));
  if (f->fn)
    f->fn(f);
  else
    reference_run(f->c, f->kind, f->args, (const void *const *)f->in, (void *const *)f->out);
}

double ref_loss(void *context) {
  Ref *f = context;
  ref_run(f);
  double sum = 0;
  for (int k = 0; k < OP_MAX_OUT; k++)
    for (int64_t i = 0; f->seed[k] && i < f->n_out[k]; i++)
      if (f->out[k][i] != 0) sum += (double)f->seed[k][i] * f->out[k][i];
  return sum;
}

void ref_output(Ref *f, int k, int64_t n, const real *seed) {
  f->out[k] = case_zeros(f->c, n);
  f->n_out[k] = n;
  f->seed[k] = seed;
}

void assert_gradient(Ref *f, int k, const real *grad, int64_t n) {
  assert_true(gradient_error(f->c, ref_loss, f, f->in[k], grad, n, elements_checked(f->c)) < CASE_GRAD_TOL);
}

// NaN in rows [from, to) of a [., width] tensor.
static void poison_rows(real *x, int64_t from, int64_t to, int64_t width) {
  for (int64_t i = from * width; i < to * width; i++) x[i] = (real)NAN;
}

real *rows_random(OpCase *c, int64_t from, int64_t to, int64_t width) {
  real *x = case_random(c, c->dims.T * width, 1);
  poison_rows(x, 0, from, width);
  poison_rows(x, to, c->dims.T, width);
  return x;
}

real *segments_random(OpCase *c, int from, int64_t width) {
  real *x = case_random(c, c->dims.segments * width, 1);
  poison_rows(x, 0, from, width);
  poison_rows(x, c->batch.dims->n_segments, c->dims.segments, width);
  return x;
}

OpArgs span_args(int64_t count, int accumulate) {
  return (OpArgs){.accumulate = accumulate, .span = {.count = count}};
}

void assert_accumulates(OpCase *c, OpKind kind, OpArgs add, const void *const *in, void *const *first,
                        const int64_t n[OP_MAX_OUT], unsigned acc_mask) {
  void *out[OP_MAX_OUT] = {0};
  double *want[OP_MAX_OUT] = {0};
  for (int k = 0; k < OP_MAX_OUT; k++) {
    if (!first[k]) continue;
    real *base = out[k] = case_random(c, n[k], 1);
    want[k] = case_double(c, first[k], n[k]);
    for (int64_t i = 0; acc_mask >> k & 1 && i < n[k]; i++) want[k][i] += (double)base[i];
  }
  op_run(c, kind, add, in, out);
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (first[k]) assert_close(out[k], want[k], n[k]);
}

double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}
