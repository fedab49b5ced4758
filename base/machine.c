#include "base/machine.h"

#include "base/base.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

// ---- control groups ----

// One of a group's limits, by its files: the number, or HUGE_VAL without one.
typedef double (*LimitFn)(const char *group, const char *file);

// The first line of a file; NULL where there is none. free() it.
static char *read_line(const char *folder, const char *file) {
  char *path = xasprintf("%s/%s", folder, file), *line = NULL;
  FILE *f = fopen(path, "r");
  size_t room = 0;
  free(path);
  if (!f) return NULL;
  if (getline(&line, &room, f) < 0) {
    free(line);
    line = NULL;
  }
  fclose(f);
  return line;
}

// "max" and negative numbers are no limit, nor is what cannot be read.
static double read_limit(const char *group, const char *file) {
  char *line = read_line(group, file), *end = NULL;
  double value = line ? strtod(line, &end) : -1;
  int found = line && end != line;
  free(line);
  return found && value >= 0 ? value : HUGE_VAL;
}

// Version 2: "150000 100000": microseconds of processor time, and the period in microseconds that they are for.
static double read_quota2(const char *group, const char *file) {
  char *line = read_line(group, file);
  double quota, period;
  int found = line && sscanf(line, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0;
  free(line);
  return found ? quota / period : HUGE_VAL;
}

static double read_quota1(const char *group, const char *file) {
  double quota = read_limit(group, file), period = read_limit(group, "cpu.cfs_period_us");
  return quota > 0 && period > 0 && period < HUGE_VAL ? quota / period : HUGE_VAL;
}

// Whether `word` is one of a comma-separated list.
static int lists(const char *list, const char *word) {
  size_t n = strlen(word);
  for (const char *at = list; (at = strstr(at, word)); at += n)
    if ((at == list || at[-1] == ',') && (at[n] == 0 || at[n] == ',')) return 1;
  return 0;
}

// The group of this process in the hierarchy of a controller, "" for version 2's; NULL: there is none. free() it.
static char *own_group(const char *root, const char *controller) {
  char *path = xasprintf("%s/proc/self/cgroup", root), *line = NULL, *found = NULL;
  FILE *f = fopen(path, "r");
  size_t room = 0;
  free(path);
  while (f && !found && getline(&line, &room, f) > 0) { // "4:cpu,cpuacct:/a/b"
    line[strcspn(line, "\n")] = 0;
    char *list = strchr(line, ':'), *group = list ? strchr(list + 1, ':') : NULL;
    if (!group) continue;
    *group = 0;
    if (controller[0] ? lists(list + 1, controller) : !list[1]) found = xstrdup(group + 1);
  }
  free(line);
  if (f) fclose(f);
  return found;
}

// The least limit of a group and of those that it lies in, up to where the hierarchy is mounted.
static double least_of(const char *mount, const char *group, const char *file, LimitFn read) {
  char *path = xasprintf("%s%s", mount, group);
  double least = HUGE_VAL;
  for (size_t n = strlen(path);; path[n] = 0) {
    least = fmin(least, read(path, file));
    while (n > strlen(mount) && path[n - 1] != '/') n--;
    if (n <= strlen(mount)) break;
    n--;
  }
  free(path);
  return least;
}

// `group` as a path below a mount that shows the hierarchy from `top` on. "", the mount itself, where it lies
// elsewhere: a container may see its own group as the root of all, under its name outside.
static const char *below(const char *group, const char *top) {
  size_t n = strcmp(top, "/") == 0 ? 0 : strlen(top);
  if (strncmp(group, top, n) != 0 || (group[n] && group[n] != '/') || strstr(group, "/..")) return "";
  return group[n + (group[n] == '/')] ? group + n : "";
}

// The least limit over all mounts of a controller's hierarchy ("": version 2's).
static double cgroup_limit(const char *root, const char *controller, const char *file, LimitFn read) {
  char *group = own_group(root, controller), *path = xasprintf("%s/proc/self/mountinfo", root), *line = NULL;
  FILE *f = group ? fopen(path, "r") : NULL;
  size_t room = 0;
  double least = HUGE_VAL;
  free(path);
  while (f && getline(&line, &room, f) > 0) {
    // "31 23 0:28 TOP MOUNT rw,nosuid shared:9 - TYPE SOURCE OPTIONS"
    char top[4096], mount[4096], type[32], options[1024];
    const char *dash = strstr(line, " - ");
    if (!dash || sscanf(line, "%*s %*s %*s %4095s %4095s", top, mount) != 2) continue;
    if (sscanf(dash, " - %31s %*s %1023s", type, options) != 2) continue;
    if (controller[0] ? strcmp(type, "cgroup") != 0 || !lists(options, controller) : strcmp(type, "cgroup2") != 0)
      continue;
    char *at = xasprintf("%s%s", root, mount);
    least = fmin(least, least_of(at, below(group, top), file, read));
    free(at);
  }
  free(line);
  if (f) fclose(f);
  free(group);
  return least;
}

double cgroup_processors(const char *root) {
  return fmin(cgroup_limit(root, "", "cpu.max", read_quota2),
              cgroup_limit(root, "cpu", "cpu.cfs_quota_us", read_quota1));
}

int64_t cgroup_memory(const char *root) {
  // Beyond memory.high a group is slowed down until it is of no use.
  double least =
      fmin(cgroup_limit(root, "", "memory.max", read_limit), cgroup_limit(root, "", "memory.high", read_limit));
  least = fmin(least, cgroup_limit(root, "memory", "memory.limit_in_bytes", read_limit));
  return least < 0x1p62 ? (int64_t)least : INT64_MAX;
}

// ---- processors ----

static int processors_online(void) {
  return (int)max_i64(1, sysconf(_SC_NPROCESSORS_ONLN));
}

// Processors that a process may run on; 0 for this one.
static int processors_of(pid_t process) {
  for (int most = 1024; most <= 1 << 20; most *= 4) {
    cpu_set_t *set = CPU_ALLOC(most);
    size_t bytes = CPU_ALLOC_SIZE(most);
    int rc = set ? sched_getaffinity(process, bytes, set) : -1, small = rc != 0 && errno == EINVAL;
    int count = rc == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
    if (!small) break; // the kernel's own set is not larger than ours
  }
  return processors_online();
}

static pid_t parent_of(pid_t process) {
  char *folder = xasprintf("/proc/%d", (int)process), *line = read_line(folder, "stat");
  const char *name_end = line ? strrchr(line, ')') : NULL;
  int parent = 0;
  if (!name_end || sscanf(name_end, ") %*c %d", &parent) != 1) parent = 0;
  free(line);
  free(folder);
  return parent;
}

static int began_with(pid_t process, const char *variable) {
  char *path = xasprintf("/proc/%d/environ", (int)process), *entry = NULL;
  FILE *f = fopen(path, "r");
  size_t room = 0, n = strlen(variable);
  int found = 0;
  free(path);
  while (f && !found && getdelim(&entry, &room, 0, f) > 0) found = strncmp(entry, variable, n) == 0 && entry[n] == '=';
  free(entry);
  if (f) fclose(f);
  return found;
}

int machine_share(int own, int together, double quota, int processes) {
  double share = floor(fmin(together, ceil(quota)) / processes); // part of a processor is of use to one more thread
  return (int)fmax(1, fmin(own, share));
}

int machine_threads(const char *root) {
  static const char local_size[] = "OMPI_COMM_WORLD_LOCAL_SIZE";
  const char *local = getenv(local_size);
  int processes = local ? (int)max_i64(1, atoi(local)) : 1, own = processors_of(0), together = own;
  if (processes > 1) {
    // mpirun may have bound each process to its part, and then they are not to be divided again: the nearest ancestor
    // that mpirun did not start has the processors of all.
    pid_t mpirun = getppid();
    while (mpirun > 1 && began_with(mpirun, local_size)) mpirun = parent_of(mpirun);
    together = mpirun > 0 ? processors_of(mpirun) : processors_online();
  }
  return machine_share(own, together, cgroup_processors(root), processes);
}

// ---- memory ----

// What the process has, in bytes.
typedef struct Used {
  int64_t mapped, resident, data;
} Used;

static Used used_memory(void) {
  char *line = read_line("/proc/self", "statm"); // pages: size resident shared text lib data dt
  long long mapped = 0, resident = 0, data = 0;
  if (line) sscanf(line, "%lld %lld %*d %*d %*d %lld", &mapped, &resident, &data);
  free(line);
  int64_t page = sysconf(_SC_PAGESIZE);
  return (Used){mapped * page, resident * page, data * page};
}

// What a resource limit leaves beyond what is used; INT64_MAX without one.
static int64_t left_of(int resource, int64_t used) {
  struct rlimit limit;
  if (getrlimit(resource, &limit) != 0 || limit.rlim_cur >= (rlim_t)INT64_MAX) return INT64_MAX;
  return max_i64(0, (int64_t)limit.rlim_cur - used);
}

int64_t machine_memory(const char *root, const char **limit) {
  Used used = used_memory();
  const struct {
    const char *name;
    int64_t bytes;
  } limits[] = {{"the machine's memory", (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE)},
                {"the memory limit of its control group", cgroup_memory(root)},
                {"what is left of the address space (ulimit -v)", left_of(RLIMIT_AS, used.mapped)},
                {"what is left of the limit of data (ulimit -d)", left_of(RLIMIT_DATA, used.data)}};
  int least = 0;
  for (int i = 1; i < (int)(sizeof limits / sizeof *limits); i++)
    if (limits[i].bytes < limits[least].bytes) least = i;
  if (limit) *limit = limits[least].name;
  return limits[least].bytes;
}

int64_t machine_memory_left(const char *root) {
  Used used = used_memory();
  char *path = xasprintf("%s/proc/meminfo", root), line[128];
  FILE *f = fopen(path, "r");
  long long kb = 0;
  while (f && fgets(line, sizeof line, f))
    if (sscanf(line, "MemAvailable: %lld kB", &kb) == 1) break;
  if (f) fclose(f);
  free(path);
  int64_t group = cgroup_memory(root), left = kb * 1024;
  if (group < INT64_MAX) left = min_i64(left, max_i64(0, group - used.resident));
  return min_i64(left, min_i64(left_of(RLIMIT_AS, used.mapped), left_of(RLIMIT_DATA, used.data)));
}
