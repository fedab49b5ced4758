// The process group: what a process alone finds, and what launchers say. Started by mpirun it is its own test of a
// group instead (tests/scripts/ranks.sh).
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void forget_launchers(void) {
  const char *const all[] = {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE",    "PMI_RANK",
                             "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",         "SLURM_NTASKS"};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) unsetenv(all[i]);
}

static void test_launched(void **state) {
  (void)state;
  const struct {
    const char *size, *rank, *launcher;
  } all[] = {{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"},
             {"PMI_SIZE", "PMI_RANK", "mpiexec"},
             {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"}};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    forget_launchers();
    setenv(all[i].size, "4", 1);
    setenv(all[i].rank, "3", 1);
    Launch l = ranks_launched();
    assert_string_equal(l.launcher, all[i].launcher);
    assert_int_equal(l.rank, 3);
    assert_int_equal(l.size, 4);
    setenv(all[i].size, "1", 1); // mpirun -np 1
    assert_int_equal(ranks_launched().size, 1);
  }
  forget_launchers();
  setenv("SLURM_NTASKS", "8", 1); // a batch script, which is one process
  assert_int_equal(ranks_launched().size, 1);
  assert_null(ranks_launched().launcher);
  forget_launchers();
}

static void test_alone(void **state) {
  (void)state;
  Error err;
  int64_t n[2] = {3, -4}, all[2] = {0};
  double x[2] = {0.1, 0.2};
  assert_int_equal(ranks_open(&err), 0);
  assert_int_equal(ranks_rank(), 0);
  assert_int_equal(ranks_size(), 1);
  assert_int_equal(ranks_on_host(), 1);
  ranks_wait();
  ranks_broadcast(n, sizeof n);
  ranks_sum_i64(n, 2);
  ranks_sum_f64(x, 2);
  assert_true(n[0] == 3 && n[1] == -4 && x[0] == 0.1 && x[1] == 0.2);
  ranks_gather(n, sizeof n, all);
  assert_memory_equal(n, all, sizeof n);
  memset(all, 0, sizeof all);
  ranks_exchange(n, all, sizeof n);
  ranks_share(all, sizeof all);
  assert_memory_equal(n, all, sizeof n);
  char *text = ranks_broadcast_text("a text");
  assert_string_equal(text, "a text");
  free(text);
  assert_null(ranks_broadcast_text(NULL));
  assert_int_equal(ranks_agree(7, "other settings", NULL, &err), 0);
  ranks_close();
}

// ---- of a group ----

static void need(int holds, const char *what) {
  if (!holds) panic("rank %d: %s", ranks_rank(), what);
}

// Element i of what rank `from` has for rank `to`.
static uint8_t expected(int from, int to, size_t i) {
  return (uint8_t)(from * 31 + to * 7 + (int)(i % 251));
}

static void check_tensors(size_t bytes) {
  int rank = ranks_rank(), size = ranks_size();
  uint8_t *out = xmalloc((size_t)size * bytes), *in = xcalloc((size_t)size, bytes);
  int same = 1;
  for (int r = 0; r < size; r++)
    for (size_t i = 0; i < bytes; i++) out[(size_t)r * bytes + i] = expected(rank, r, i);
  ranks_exchange(out, in, bytes);
  for (int r = 0; r < size; r++)
    for (size_t i = 0; i < bytes; i++) same &= in[(size_t)r * bytes + i] == expected(r, rank, i);
  need(same, "an exchange brings other bytes");
  memset(out, 0, (size_t)size * bytes);
  for (size_t i = 0; i < bytes; i++) out[(size_t)rank * bytes + i] = expected(rank, 0, i);
  ranks_share(out, bytes);
  for (int r = 0; r < size; r++)
    for (size_t i = 0; i < bytes; i++) same &= out[(size_t)r * bytes + i] == expected(r, 0, i);
  need(same, "what is shared has other bytes");
  free(out);
  free(in);
}

static void check_group(void) {
  int rank = ranks_rank(), size = ranks_size();
  Error err;
  int64_t n[2] = {1, rank};
  ranks_sum_i64(n, 2);
  need(n[0] == size && n[1] == size * (size - 1) / 2, "a sum of integers");
  // In the order of ranks: (1e16 + 1) - 1e16 is 0, any other order of a group of three gives 1.
  double x = rank == 0 ? 1e16 : rank == 1 ? 1 : rank == 2 ? -1e16 : 0;
  ranks_sum_f64(&x, 1);
  need(size < 3 || x == 0, "a sum of doubles in another order");
  char *text = ranks_broadcast_text(rank ? NULL : "of rank 0");
  need(text && strcmp(text, "of rank 0") == 0, "a text");
  free(text);
  need(!ranks_broadcast_text(NULL), "no text");
  const size_t sizes[] = {0, 1, 7, 4096, 100003, 3 << 20};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) check_tensors(sizes[i]);
  need(ranks_agree(5, "other settings", NULL, &err) == 0, "equal values");
  need(ranks_agree(rank == 1, "other settings", NULL, &err) != 0, "different values");
  char *want = xasprintf("1 of %d processes, of rank 1, has other settings than rank 0", size);
  need(strcmp(err.text, want) == 0, err.text);
  free(want);
  ranks_wait();
  if (rank == 0) printf("a group of %d\n", size);
}

int main(void) {
  Error err;
  if (ranks_launched().size > 1) {
    if (ranks_open(&err) != 0) fatal(&err);
    check_group();
    ranks_close();
    return 0;
  }
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_launched), cmocka_unit_test(test_alone)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
