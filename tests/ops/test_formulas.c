// The kernels that train give what the formulas give: every op of kernels/cpu/reference, plain loops in double, against
// the tuned one, on packs of every kind (groups without rows, documents of one token, no filler and nothing but filler)
// and sizes that leave odd remainders. Built in float and in double.
#include "kernels/cpu/reference/reference.h"
#include "tests/ops/op_calls.h"
#include "tests/ops/op_reference.h"

#include <omp.h>
#include <stdlib.h>

enum { RUN = 16 }; // consecutive elements that are also judged on their own: part of a row

static double run_norm(const double *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  return sqrt(sum);
}

// Where the formula leaves an element alone or gives infinity, so does the kernel; integers are equal. Other elements
// differ by at most `tolerance` of an output's norm, and RUN of them by 20 times that of their own norm, or of a tenth
// of the usual one where theirs is less.
static void compare(OpKind kind, const char *operand, const Value *got, const Value *want) {
  double tolerance = CASE_DOUBLE ? 1e-13 : 2e-6;
  if (kind == OP_ROUTER_BWD) tolerance *= 20; // sums of terms that nearly cancel
  if (strcmp(got->type, real_type) != 0 && strcmp(got->type, "F64") != 0) {
    if (memcmp(got->data, want->data, value_bytes(got)) != 0)
      fail_msg("%s: other integers in %s", op_info[kind].name, operand);
    return;
  }
  int64_t n = got->count;
  double *x = xmalloc((size_t)(n + 1) * sizeof *x), *error = xmalloc((size_t)(n + 1) * sizeof *error);
  for (int64_t i = 0; i < n; i++) {
    double w = ((const double *)want->data)[i];
    double g = !strcmp(got->type, "F32") ? (double)((const float *)got->data)[i] : ((const double *)got->data)[i];
    if (isfinite(w) ? !isfinite(g) : isnan(w) ? !isnan(g) : g != w)
      fail_msg("%s: %s[%lld] is %g instead of %g", op_info[kind].name, operand, (long long)i, g, w);
    x[i] = isfinite(w) ? w : 0;
    error[i] = isfinite(w) ? g - w : 0;
  }
  double norm = run_norm(x, n), usual = norm * sqrt((double)RUN / (double)(n + 1));
  if (run_norm(error, n) > tolerance * norm)
    fail_msg("%s: %s differs by %g of its norm", op_info[kind].name, operand, run_norm(error, n) / norm);
  for (int64_t at = 0; at < n; at += RUN) {
    int64_t length = min_i64(n - at, RUN);
    double own = fmax(run_norm(x + at, length), 0.1 * usual);
    if (run_norm(error + at, length) > 20 * tolerance * own)
      fail_msg("%s: %s[%lld..] differs by %g of what is there", op_info[kind].name, operand, (long long)at,
               run_norm(error + at, length) / own);
  }
  free(x);
  free(error);
}

static Value copy_in_double(OpCase *c, const Value *v) {
  if (!v->data) return *v;
  if (!strcmp(v->type, real_type)) return (Value){case_double(c, v->data, v->count), v->count, "F64"};
  return (Value){memcpy(case_bytes(c, value_bytes(v), 0), v->data, value_bytes(v)), v->count, v->type};
}

static void call_both(OpCalls *w, OpKind kind, OpArgs args, const Value *in, Value *out) {
  KernelCall tuned = {.batch = &w->c.batch, .dims = &w->c.dims, .args = &args}, plain = tuned;
  Value want[OP_MAX_OUT];
  for (int i = 0; i < OP_MAX_IN; i++) {
    tuned.in.at[i] = in[i].data;
    plain.in.at[i] = copy_in_double(&w->c, &in[i]).data;
  }
  for (int i = 0; i < OP_MAX_OUT; i++) {
    want[i] = copy_in_double(&w->c, &out[i]);
    tuned.out.at[i] = out[i].data;
    plain.out.at[i] = want[i].data;
  }
  backend_cpu.fn[kind](&tuned);
  if (!reference[kind]) return;
  reference[kind](&plain);
  for (int i = 0; i < op_info[kind].n_out; i++) {
    int is_scratch = kind == OP_HEAD_CE && i == (int)OUT_AT(HEAD_CE, work);
    if (out[i].data && !is_scratch) compare(kind, op_info[kind].out[i].name, &out[i], &want[i]);
  }
}

static void test_formulas(void **state) {
  (void)state;
  omp_set_num_threads(1); // bits do not depend on it (test_threads)
  for (int round = 0; round < 2 * CASES + LARGE_CASES; round++) {
    OpCalls w = {.call = call_both};
    case_of_round(&w.c, round, 2 * CASES);
    op_calls_run(&w);
    op_case_free(&w.c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_formulas)};
  return cmocka_run_group_tests_name("formulas", tests, NULL, NULL);
}
