// What a process may use, read from made-up files of control groups, and from its own affinity and limits.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/base.h"
#include "base/machine.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static char root[] = "/tmp/tessera-machine-XXXXXX";

// Removes all files of the case before.
static int begin_case(void **state) {
  (void)state;
  char *command = xasprintf("rm -rf '%s' && mkdir -p '%s/proc/self'", root, root);
  int rc = system(command);
  free(command);
  return rc;
}

static void put(const char *path, const char *text) {
  Error err;
  char *full = xasprintf("%s/%s", root, path);
  *strrchr(full, '/') = 0;
  assert_int_equal(folder_make(full, &err), 0);
  full[strlen(full)] = '/';
  FILE *f = fopen(full, "w");
  assert_non_null(f);
  fputs(text, f);
  fclose(f);
  free(full);
}

static void assert_cgroup(double processors, double memory) {
  double got = cgroup_processors(root);
  if (!(got == processors || fabs(got - processors) < 1e-9)) fail_msg("%g processors, expected %g", got, processors);
  assert_true(cgroup_memory(root) == (memory == HUGE_VAL ? INT64_MAX : (int64_t)memory));
}

static const char version2[] = "24 1 0:22 / /proc rw - proc proc rw\n"
                               "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

static void test_without_files(void **state) {
  (void)state;
  assert_cgroup(HUGE_VAL, HUGE_VAL);
  put("proc/self/cgroup", "0::/a\n"); // but no mounts
  assert_cgroup(HUGE_VAL, HUGE_VAL);
  put("proc/self/mountinfo", version2); // but no limits
  assert_cgroup(HUGE_VAL, HUGE_VAL);
  put("sys/fs/cgroup/a/cpu.max", "");
  put("sys/fs/cgroup/a/memory.max", "\n");
  assert_cgroup(HUGE_VAL, HUGE_VAL);
}

static void test_version2(void **state) {
  (void)state;
  put("proc/self/cgroup", "0::/user.slice/job-7.scope\n");
  put("proc/self/mountinfo", version2);
  put("sys/fs/cgroup/user.slice/job-7.scope/cpu.max", "max 100000\n");
  put("sys/fs/cgroup/user.slice/job-7.scope/memory.max", "max\n");
  assert_cgroup(HUGE_VAL, HUGE_VAL);
  put("sys/fs/cgroup/user.slice/job-7.scope/cpu.max", "150000 100000\n");
  put("sys/fs/cgroup/user.slice/job-7.scope/memory.max", "3000000000\n");
  assert_cgroup(1.5, 3e9);
  put("sys/fs/cgroup/user.slice/job-7.scope/memory.high", "2000000000\n");
  assert_cgroup(1.5, 2e9);
  // A group has no more than those around it.
  put("sys/fs/cgroup/user.slice/cpu.max", "5000 10000\n");
  put("sys/fs/cgroup/user.slice/memory.max", "1000000000\n");
  assert_cgroup(.5, 1e9);
  put("sys/fs/cgroup/cpu.max", "20000 100000\n");
  put("sys/fs/cgroup/memory.max", "500000000\n");
  assert_cgroup(.2, 5e8);
  // What lies beside it is another's.
  put("sys/fs/cgroup/user.slice/job-8.scope/cpu.max", "1000 100000\n");
  assert_cgroup(.2, 5e8);
}

// A container sees its own group as the root, or by a name that leads out of what is mounted.
static void test_containers(void **state) {
  (void)state;
  static const char *const groups[] = {"0::/\n", "0::/../../job\n", "0::/docker/12ab\n"};
  put("proc/self/mountinfo", version2);
  put("sys/fs/cgroup/cpu.max", "300000 100000\n");
  put("sys/fs/cgroup/memory.max", "4000000000\n");
  for (int i = 0; i < 3; i++) {
    put("proc/self/cgroup", groups[i]);
    assert_cgroup(3, 4e9);
  }
  // Version 1 without a namespace: the group's name outside, mounted from there on.
  put("proc/self/cgroup", "5:memory:/docker/12ab\n3:cpu,cpuacct:/docker/12ab\n");
  put("proc/self/mountinfo",
      "36 31 0:33 /docker/12ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
      "37 31 0:34 /docker/12ab /sys/fs/cgroup/cpu,cpuacct ro master:3 - cgroup cgroup rw,cpu,cpuacct\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "700000000\n");
  put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n");
  put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  assert_cgroup(2.5, 7e8);
  // "/docker/12" is another container, whose name begins alike.
  put("proc/self/cgroup", "5:memory:/docker/12ab/inner\n3:cpu,cpuacct:/docker/12ab/inner\n");
  put("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "600000000\n");
  assert_cgroup(2.5, 6e8);
  put("proc/self/mountinfo", "36 31 0:33 /docker/12 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
  assert_cgroup(HUGE_VAL, 7e8);
}

static void test_version1(void **state) {
  (void)state;
  put("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/jobs/one\n3:cpuset:/\n1:cpu:/jobs/one\n0::/\n");
  put("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
                             "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
                             "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
                             "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                             "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  put("sys/fs/cgroup/cpu/jobs/one/cpu.cfs_quota_us", "-1\n");
  put("sys/fs/cgroup/cpu/jobs/one/cpu.cfs_period_us", "100000\n");
  put("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "9223372036854771712\n");
  assert_cgroup(HUGE_VAL, HUGE_VAL);
  put("sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us", "400000\n");
  put("sys/fs/cgroup/cpu/jobs/cpu.cfs_period_us", "50000\n");
  put("sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "8000000000\n");
  assert_cgroup(8, 8e9);
  put("sys/fs/cgroup/cpu/jobs/one/cpu.cfs_quota_us", "75000\n");
  put("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "2000000000\n");
  assert_cgroup(.75, 2e9);
  // Both versions at once: each may limit.
  put("sys/fs/cgroup/unified/memory.max", "1000000000\n");
  assert_cgroup(.75, 1e9);
}

static void put_quota(const char *quota) {
  put("proc/self/cgroup", "0::/a\n");
  put("proc/self/mountinfo", version2);
  put("sys/fs/cgroup/a/cpu.max", quota);
}

static void test_share(void **state) {
  (void)state;
  static const struct {
    int own, together;
    double quota;
    int processes, threads;
  } cases[] = {
      {8, 8, HUGE_VAL, 1, 8},    {8, 8, 3, 1, 3},          {8, 8, 2.2, 1, 3}, {8, 8, .2, 1, 1}, // one process
      {64, 64, HUGE_VAL, 4, 16}, {8, 8, HUGE_VAL, 4, 2},   {8, 8, 6, 4, 1},                     // unbound ones
      {16, 64, HUGE_VAL, 4, 16}, {1, 64, HUGE_VAL, 64, 1}, // bound ones are not divided again
      {32, 64, HUGE_VAL, 4, 16},                           // bound two by two
      {2, 2, HUGE_VAL, 5, 1},    {1, 1, 0, 1, 1},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    assert_int_equal(machine_share(cases[i].own, cases[i].together, cases[i].quota, cases[i].processes),
                     cases[i].threads);
}

static int processors_here(void) {
  cpu_set_t set;
  assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
  return CPU_COUNT(&set);
}

static void test_threads(void **state) {
  (void)state;
  int here = processors_here();
  assert_int_equal(machine_threads(root), here);
  put_quota("20000 100000\n");
  assert_int_equal(machine_threads(root), 1);
  put_quota("110000 100000\n");
  assert_int_equal(machine_threads(root), here < 2 ? 1 : 2); // the second is of use part of the time
  put_quota("99900000 100000\n");
  assert_int_equal(machine_threads(root), here);
  // Bound to one processor.
  cpu_set_t all, one;
  assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
  CPU_ZERO(&one);
  for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&one); i++)
    if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
  assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
  assert_int_equal(machine_threads(root), 1);
  assert_int_equal(sched_setaffinity(0, sizeof all, &all), 0);
}

// Four processes that mpirun started here, bound to parts or not; this program is mpirun.
static void test_local_processes(void **state) {
  (void)state;
  int here = processors_here();
  setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 1);
  assert_int_equal(machine_threads(root), max_i64(1, here / 4));
  setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2", 1);
  assert_int_equal(machine_threads(root), max_i64(1, here / 2));
  put_quota("100000 100000\n"); // one processor for both
  assert_int_equal(machine_threads(root), 1);
  setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "many", 1);
  put_quota("max\n");
  assert_int_equal(machine_threads(root), here);
  unsetenv("OMPI_COMM_WORLD_LOCAL_SIZE");
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) // whose shadow takes all of the address space
// In a process of its own, since a limit cannot be raised again: 0 when machine_memory is a little below it for
// `reason`.
static int under_limit(int resource, rlim_t bytes, const char *reason) {
  pid_t child = fork();
  if (child == 0) {
    struct rlimit limit = {bytes, bytes};
    const char *why;
    int64_t got = setrlimit(resource, &limit) == 0 ? machine_memory(root, &why) : -1;
    _exit(!(got > 0 && got < (int64_t)bytes && got > (int64_t)bytes - ((int64_t)4 << 30) && strstr(why, reason)));
  }
  int status = -1;
  assert_int_equal(waitpid(child, &status, 0), child);
  return status;
}
#endif

static void test_memory(void **state) {
  (void)state;
  const char *why;
  int64_t all = machine_memory(root, &why);
  assert_true(all > 0 && all <= (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE));
  put_quota("max\n");
  put("sys/fs/cgroup/a/memory.max", "50000000\n");
  assert_int_equal(machine_memory(root, &why), 50000000);
  assert_non_null(strstr(why, "control group"));
  put("sys/fs/cgroup/a/memory.max", "99999999999999\n");
  assert_int_equal(machine_memory(root, NULL), all);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  assert_int_equal(under_limit(RLIMIT_AS, (rlim_t)1 << 30, "ulimit -v"), 0);
  assert_int_equal(under_limit(RLIMIT_DATA, (rlim_t)1 << 30, "ulimit -d"), 0);
#endif
}

static void test_memory_left(void **state) {
  (void)state;
  put("proc/meminfo", "MemTotal:       24684476 kB\nMemFree:        100 kB\nMemAvailable:   2000000 kB\n");
  assert_int_equal(machine_memory_left(root), 2000000 * (int64_t)1024);
  put_quota("max\n");
  put("sys/fs/cgroup/a/memory.max", "1000000000\n");
  int64_t left = machine_memory_left(root); // less what this test has
  assert_true(left > 1000000000 - ((int64_t)900 << 20) && left < 1000000000);
  put("sys/fs/cgroup/a/memory.max", "4096\n");
  assert_int_equal(machine_memory_left(root), 0);
}

static int remove_root(void **state) {
  (void)state;
  char *command = xasprintf("rm -rf '%s'", root);
  int rc = system(command);
  free(command);
  return rc;
}

int main(void) {
  if (!mkdtemp(root)) return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(test_without_files, begin_case),
      cmocka_unit_test_setup(test_version2, begin_case),
      cmocka_unit_test_setup(test_containers, begin_case),
      cmocka_unit_test_setup(test_version1, begin_case),
      cmocka_unit_test(test_share),
      cmocka_unit_test_setup(test_threads, begin_case),
      cmocka_unit_test_setup(test_local_processes, begin_case),
      cmocka_unit_test_setup(test_memory, begin_case),
      cmocka_unit_test_setup(test_memory_left, begin_case),
  };
  return cmocka_run_group_tests(tests, NULL, remove_root);
}
