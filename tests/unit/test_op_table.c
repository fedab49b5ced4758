// The op table: names, marks and places of operands, and that the CPU backend has a kernel for every row.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "kernels/kernels.h"
#include "model/config/keys.h"

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

// ---- ways of computing an op ----

static void own_silu(const KernelCall *c) {
  (void)c;
}
static void other_silu(const KernelCall *c) {
  (void)c;
}
static size_t other_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  return (size_t)kind + (size_t)dims->T + (size_t)args->accumulate;
}

static void test_a_word_chooses_its_rows(void **state) {
  (void)state;
  const KernelWay ways[] = {{OP_SILU_FWD, "slow", other_silu, other_scratch, 1, NULL},
                            {OP_SILU_BWD, "slow", NULL, NULL, 0, NULL},
                            {OP_SILU_FWD, "slower", NULL, NULL, 0, NULL}};
  const Backend own = {.fn = {[OP_SILU_FWD] = own_silu, [OP_SILU_BWD] = own_silu}, .ways = ways, .n_ways = 3};
  const Dims dims = {.T = 7};
  const OpArgs args = {.accumulate = 1};
  Backend b = own;
  assert_int_equal(kernels_choose(&b, "unheard of"), 0);
  assert_int_equal(kernel_scratch(&b, OP_SILU_FWD, &dims, &args), 0);
  assert_int_equal(kernels_choose(&b, "slow"), 2);
  assert_ptr_equal(b.fn[OP_SILU_FWD], other_silu);
  assert_int_equal(kernel_scratch(&b, OP_SILU_FWD, &dims, &args), OP_SILU_FWD + 7 + 1);
  assert_null(b.fn[OP_SILU_BWD]);
  assert_true(b.host_waits[OP_SILU_FWD]);
  assert_false(b.host_waits[OP_SILU_BWD]);
  b = own;
  assert_int_equal(kernels_choose(&b, "slower"), 1);
  assert_false(b.host_waits[OP_SILU_FWD]);
}

// Every word of a key that chooses among ways, but the first, has rows in some backend; and every row has such a word.
static void test_words_are_the_config_s(void **state) {
  (void)state;
  const Backend *const backends[] = {&backend_cpu,
#ifdef TESSERA_CUDA
                                     &backend_cuda
#endif
  };
  char words[256] = "|", has_rows[256] = "|";
  for (int i = 0; i < config_key_count; i++) {
    const char *others = config_keys[i].type == KEY_WAY ? strchr(config_keys[i].words, '|') : NULL;
    if (others) snprintf(words + strlen(words), sizeof words - strlen(words), "%s|", others + 1);
  }
  for (size_t b = 0; b < sizeof backends / sizeof *backends; b++)
    for (int i = 0; i < backends[b]->n_ways; i++) {
      char word[32];
      snprintf(word, sizeof word, "|%.28s|", backends[b]->ways[i].word);
      if (!strstr(words, word)) fail_msg("%s: no key has the word %s", backends[b]->name, word);
      if (!strstr(has_rows, word))
        snprintf(has_rows + strlen(has_rows), sizeof has_rows - strlen(has_rows), "%.*s|", (int)strlen(word + 1) - 1,
                 word + 1);
    }
#ifdef TESSERA_CUDA
  for (char *at = strtok(words, "|"); at; at = strtok(NULL, "|")) {
    char word[32];
    snprintf(word, sizeof word, "|%.28s|", at);
    if (!strstr(has_rows, word)) fail_msg("no backend has a way \"%s\"", at);
  }
#endif
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_rows),
      cmocka_unit_test(test_places),
      cmocka_unit_test(test_what_accumulates),
      cmocka_unit_test(test_a_word_chooses_its_rows),
      cmocka_unit_test(test_words_are_the_config_s),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
