// The process group: what a process alone finds, and what launchers say. Started by mpirun it is its own test of a
// group instead (tests/scripts/ranks.sh).
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/ranks.h"
#include "kernels/group.h"
#include "trainer/group_rates.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

// ---- collectives that pass through host memory ----

static void copy(void *to, const void *from, size_t bytes, void *stream) {
  (void)stream;
  memcpy(to, from, bytes);
}

// Rank r's element i: sums of these are exact.
static double summand(int r, int64_t i) {
  return (r + 1) * 1000.0 + (double)(i % 97);
}

static double value_at(const void *values, size_t element, int64_t i) {
  return element == sizeof(double) ? ((const double *)values)[i] : (double)((const float *)values)[i];
}

// Of `each` elements a rank and `rest` more, in pieces of `share`; what lies behind them stays as it is.
static void check_sums(size_t element, int64_t each, int64_t rest, int64_t share, int scatter) {
  int rank = ranks_rank(), size = ranks_size(), right = 1;
  int64_t count = each * size + rest, first = scatter ? rank * each : 0, n = scatter ? each : count;
  void *values = xcalloc((size_t)count + 1, element);
  for (int64_t i = 0; i <= count; i++) {
    if (element == sizeof(double))
      ((double *)values)[i] = summand(rank, i);
    else
      ((float *)values)[i] = (float)summand(rank, i);
  }
  GroupTensor t = {.values = values, .count = count, .element = element, .share = share, .copy = copy};
  t.room = xmalloc(group_room(element, share));
  (scatter ? group_reduce_scatter : group_all_reduce)(&t);
  for (int64_t i = first; i < first + n; i++) {
    double want = 0;
    for (int r = 0; r < size; r++) want += summand(r, i);
    right &= value_at(values, element, i) == want;
  }
  need(right && value_at(values, element, count) == summand(rank, count), scatter ? "shares of a sum" : "a sum");
  free(t.room);
  free(values);
}

static void check_gather(int64_t each, int64_t share) {
  int rank = ranks_rank(), size = ranks_size(), right = 1;
  uint16_t *values = xcalloc((size_t)(each * size) + 1, sizeof *values);
  for (int64_t i = 0; i < each; i++) values[rank * each + i] = (uint16_t)summand(rank, i);
  GroupTensor t = {.values = values, .count = each * size, .element = sizeof *values, .share = share, .copy = copy};
  t.room = xmalloc(group_room(t.element, share));
  group_all_gather(&t);
  for (int r = 0; r < size; r++)
    for (int64_t i = 0; i < each; i++) right &= values[r * each + i] == (uint16_t)summand(r, i);
  need(right && !values[each * size], "shares put together");
  free(t.room);
  free(values);
}

static void check_collectives(void) {
  const int64_t each[] = {1, 64}, shares[] = {20, 512};
  for (size_t e = 0; e < sizeof each / sizeof *each; e++)
    for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
      for (size_t element = sizeof(float); element <= sizeof(double); element *= 2) {
        check_sums(element, each[e], 0, shares[s], 1);
        check_sums(element, each[e], 1, shares[s], 0);
      }
      check_gather(each[e], shares[s]);
    }
}

// ---- what they carry ----

static const GroupRates told = {.reduce = 4e7, .gather = 2e7, .latency = 1e-2, .drag = .125};

// Takes as long as a collective of that rate, whose elements have so many bytes.
static void wait_for(const KernelCall *call, double rate, double element) {
  double sent = (double)call->args->group.count * element * (ranks_size() - 1) / ranks_size();
  usleep((useconds_t)(1e6 * (told.latency + sent / rate)));
}
static void slow_reduce(const KernelCall *call) {
  wait_for(call, told.reduce, 8);
}
static void slow_gather(const KernelCall *call) {
  wait_for(call, told.gather, 2);
}
static void clear(void *at, size_t bytes) {
  memset(at, 0, bytes);
}
static void *alloc_but_rank_1(size_t bytes) {
  return ranks_rank() == 1 ? NULL : malloc(bytes);
}

static int near(double got, double want) { // what sleeps comes late
  return got > .7 * want && got < 1.3 * want;
}

static void check_rates(void) {
  Backend b = {.dtype_bytes = {[DT_ACT] = 2, [DT_REAL] = 8},
               .fn = {[OP_REDUCE_SCATTER] = slow_reduce, [OP_ALL_GATHER] = slow_gather},
               .alloc = malloc,
               .release = free,
               .clear = clear,
               .assumed_group = {.drag = told.drag}};
  GroupRates r = group_rates_measure(&b);
  double own[] = {r.reduce, r.gather, r.latency}, sums[] = {r.reduce, r.gather, r.latency};
  ranks_sum_f64(sums, 3);
  for (int i = 0; i < 3; i++) need(sums[i] == own[i] * ranks_size(), "rates of its own");
  need(r.measured && r.drag == told.drag, "rates of collectives");
  need(near(r.latency, told.latency), "the latency of collectives");
  need(near(r.reduce, told.reduce), "the rate of reduce-scatters");
  need(near(r.gather, told.gather), "the rate of all-gathers");
  b.alloc = alloc_but_rank_1;
  need(!group_rates_measure(&b).measured, "rates, though a process has no memory");
}

// ---- all of it ----

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
  check_collectives();
  check_rates();
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
