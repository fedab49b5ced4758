// The op table: names, marks and places of operands, and that the CPU backend has a kernel for every row.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "kernels/kernels.h"

// Names are an op's own, over inputs and outputs together: those of a pair end with "_0" and "_1".
static void check_names(const OpInfo *op) {
  const OperandInfo *all[OP_MAX_IN + OP_MAX_OUT];
  int n = 0;
  for (int i = 0; i < op->n_in; i++) all[n++] = &op->in[i];
  for (int i = 0; i < op->n_out; i++) all[n++] = &op->out[i];
  for (int i = 0; i < n; i++) {
    assert_non_null(all[i]->name);
    for (int k = 0; k < i; k++)
      if (strcmp(all[i]->name, all[k]->name) == 0) fail_msg("%s has two operands %s", op->name, all[i]->name);
  }
}

static void test_rows(void **state) {
  (void)state;
  for (int kind = 0; kind < OP_COUNT; kind++) {
    const OpInfo *op = &op_info[kind];
    if (op->n_out < 1 || op->n_out > OP_MAX_OUT || op->n_in > OP_MAX_IN) fail_msg("%s: operands", op->name);
    check_names(op);
    for (int i = 0; i < op->n_in; i++)
      if (op->in[i].marks & ~OPTIONAL) fail_msg("%s: input %s is added to", op->name, op->in[i].name);
    for (int i = 0; i < op->n_out; i++)
      if (op->out[i].marks & ADDS_ALWAYS && op->out[i].marks & ADDS_IF_ASKED)
        fail_msg("%s: output %s is added to in two ways", op->name, op->out[i].name);
    if (!backend_cpu.fn[kind]) fail_msg("the cpu backend has no %s", op->name);
  }
}

// The same operand by name and in the table's order.
static void test_places(void **state) {
  (void)state;
  assert_int_equal(IN_AT(ADALN_FWD, mod), 2);
  assert_int_equal(OUT_AT(HEAD_CE, work), 4);
  assert_int_equal(IN_AT(LINEAR_FWD, w), 1);
  assert_int_equal(IN_AT(LINEAR_FWD, bias), 3); // behind a pair
  assert_string_equal(op_info[OP_LINEAR_FWD].in[2].name, "w_1");
  assert_string_equal(op_info[OP_LINEAR_FWD].in[IN_AT(LINEAR_FWD, bias)].name, "bias");
  char weights[2];
  KernelCall call = {.in.EXPERT_UP_FWD.w1 = {&weights[TEXT], &weights[IMAGE]}};
  assert_ptr_equal(call.in.at[IN_AT(EXPERT_UP_FWD, w1) + IMAGE], &weights[IMAGE]);
  assert_int_equal(op_info[OP_ZERO].n_in, 0);
}

static void test_what_accumulates(void **state) {
  (void)state;
  const OpArgs asked = {.accumulate = 1}, other = {.accumulate = 0};
  const int dwout = OUT_AT(HEAD_CE, dwout), metrics = OUT_AT(HEAD_CE, metrics);
  assert_true(op_accumulates(OP_HEAD_CE, dwout, &asked));
  assert_false(op_accumulates(OP_HEAD_CE, dwout, &other));
  assert_true(op_accumulates(OP_HEAD_CE, metrics, &other));
  assert_false(op_accumulates(OP_HEAD_CE, OUT_AT(HEAD_CE, nll), &asked));
  assert_true(op_accumulates(OP_ADAMW, OUT_AT(ADAMW, weights), &other));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_rows),
      cmocka_unit_test(test_places),
      cmocka_unit_test(test_what_accumulates),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
