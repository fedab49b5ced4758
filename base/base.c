#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// Used under the lock of stderr, and as an atomic for ThreadSanitizer, which does not see that lock.
static void (*before_log_line)(void);

static int log_rank, log_shared;

void log_set_rank(int rank) {
  log_rank = log_shared = rank;
}

void log_begin_own(void) {
  log_shared = 0;
}

void log_begin_shared(void) {
  log_shared = log_rank;
}

// "rank 3: ", or nothing. Into `text`.
static const char *rank_prefix(char text[32]) {
  text[0] = 0;
  if (log_rank) snprintf(text, 32, "rank %d: ", log_rank);
  return text;
}

static void await_lower_ranks(void) {
  if (!log_rank) return;
  signal(SIGTERM, SIG_DFL);                       // by which the end of another ends this one
  double seconds = fmin(10, 3 + 0.25 * log_rank); // one in a dozen times Open MPI 4.1 takes a second to end all
  nanosleep(&(struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)(1e9 * (seconds - floor(seconds)))}, NULL);
}

static void run_hook(void) {
  void (*hook)(void) = __atomic_load_n(&before_log_line, __ATOMIC_RELAXED);
  if (hook) hook();
}

int error_set(Error *err, const char *hint, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(err->text, sizeof err->text, fmt, ap);
  va_end(ap);
  snprintf(err->hint, sizeof err->hint, "%s", hint ? hint : "");
  return -1;
}

int error_prefix(Error *err, const char *fmt, ...) {
  char prefix[256], text[sizeof err->text];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(prefix, sizeof prefix, fmt, ap);
  va_end(ap);
  snprintf(text, sizeof text, "%s", err->text);
  snprintf(err->text, sizeof err->text, "%s: %.500s", prefix, text);
  return -1;
}

void error_print(const Error *err) {
  char rank[32];
  await_lower_ranks();
  flockfile(stderr);
  run_hook();
  fprintf(stderr, "error: %s%s\n%s%s%s", rank_prefix(rank), err->text, err->hint[0] ? "  hint: " : "", err->hint,
          err->hint[0] ? "\n" : "");
  funlockfile(stderr);
}

void fatal_code(const Error *err, int code) {
  error_print(err);
  exit(code);
}

void fatal(const Error *err) {
  fatal_code(err, 2);
}

// Written at once: between parts of it mpirun puts what other processes say.
static void log_line(const char *prefix, const char *fmt, va_list ap) {
  char rank[32], *text = NULL;
  if (vasprintf(&text, fmt, ap) < 0) text = NULL;
  flockfile(stderr);
  run_hook();
  fprintf(stderr, "%s%s%s\n", prefix, rank_prefix(rank), text ? text : fmt);
  funlockfile(stderr);
  free(text);
}

void panic(const char *fmt, ...) {
  va_list ap;
  await_lower_ranks();
  va_start(ap, fmt);
  log_line("error: ", fmt, ap);
  va_end(ap);
  exit(1);
}

void log_info(const char *fmt, ...) {
  va_list ap;
  if (log_rank) return;
  va_start(ap, fmt);
  log_line("", fmt, ap);
  va_end(ap);
}

void log_warn(const char *fmt, ...) {
  va_list ap;
  if (log_shared) return;
  va_start(ap, fmt);
  log_line("warning: ", fmt, ap);
  va_end(ap);
}

void log_set_hook(void (*before_line)(void)) {
  flockfile(stderr);
  __atomic_store_n(&before_log_line, before_line, __ATOMIC_RELAXED);
  funlockfile(stderr);
}

// Ends the process for memory that is not there: where a limit is set, it is what to raise.
static void refuse_alloc(size_t bytes) {
  const struct {
    int resource;
    const char *name;
  } limits[] = {{RLIMIT_AS, "ulimit -v"}, {RLIMIT_DATA, "ulimit -d"}};
  for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
    struct rlimit limit;
    if (getrlimit(limits[i].resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
      panic("out of memory: %zu bytes of host memory; raise the limit of address space (%s), which is %.0f MB", bytes,
            limits[i].name, (double)limit.rlim_cur / 1e6);
  }
  panic("out of memory: %zu bytes of host memory", bytes);
}

static void *check_alloc(void *p, size_t bytes) {
  if (!p && bytes) refuse_alloc(bytes);
  return p;
}

void *xmalloc(size_t bytes) {
  return check_alloc(malloc(bytes ? bytes : 1), bytes);
}

void *xcalloc(size_t count, size_t bytes) {
  return check_alloc(calloc(count ? count : 1, bytes ? bytes : 1), count * bytes);
}

void *xrealloc(void *p, size_t bytes) {
  return check_alloc(realloc(p, bytes ? bytes : 1), bytes);
}

char *xstrdup(const char *s) {
  size_t n = strlen(s) + 1;
  return memcpy(xmalloc(n), s, n);
}

char *xasprintf(const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  char *s = NULL;
  if (vasprintf(&s, fmt, ap) < 0) panic("out of memory formatting a string");
  va_end(ap);
  return s;
}

double time_now(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

char *file_read(const char *path, size_t max_bytes, size_t *bytes, Error *err) {
  struct stat st;
  if (stat(path, &st) != 0) {
    error_set(err, "check the path", "cannot open %s: %s", path, strerror(errno));
    return NULL;
  }
  if (!S_ISREG(st.st_mode)) {
    error_set(err, "a regular file is expected", "%s is not a file", path);
    return NULL;
  }
  if ((uint64_t)st.st_size > max_bytes) {
    error_set(err, NULL, "%s is %lld bytes, more than the %zu allowed here", path, (long long)st.st_size, max_bytes);
    return NULL;
  }
  FILE *f = fopen(path, "rb");
  if (!f) {
    error_set(err, "check its permissions", "cannot open %s: %s", path, strerror(errno));
    return NULL;
  }
  char *text = xmalloc((size_t)st.st_size + 1);
  size_t n = fread(text, 1, (size_t)st.st_size, f);
  int bad = ferror(f);
  fclose(f);
  if (bad || n != (size_t)st.st_size) {
    free(text);
    error_set(err, NULL, "cannot read %s: it ended after %zu of %lld bytes", path, n, (long long)st.st_size);
    return NULL;
  }
  text[n] = 0;
  if (bytes) *bytes = n;
  return text;
}

int64_t file_read_at(int fd, int64_t at, void *to, int64_t n) {
  int64_t got = 0;
  while (got < n) {
    ssize_t k = pread(fd, (char *)to + got, (size_t)(n - got), (off_t)(at + got));
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) return -1;
    if (k == 0) break;
    got += k;
  }
  return got;
}

int file_write(const char *path, const void *data, size_t bytes, Error *err) {
  FILE *f = fopen(path, "wb");
  int bad = !f || fwrite(data, 1, bytes, f) != bytes, code = errno;
  if (f && fclose(f) != 0 && !bad) {
    bad = 1;
    code = errno;
  }
  return bad ? error_set(err, "check space and permissions", "cannot write %s: %s", path, strerror(code)) : 0;
}

int file_put(const char *next, const char *path, Error *err) {
  int fd = open(next, O_RDONLY | O_CLOEXEC), bad = fd < 0 || fsync(fd) != 0 || rename(next, path) != 0, code = errno;
  if (fd >= 0) close(fd);
  if (bad) unlink(next);
  return bad ? error_set(err, "check space and permissions", "cannot write %s: %s", path, strerror(code)) : 0;
}

int file_replace(const char *path, const void *data, size_t bytes, Error *err) {
  char *next = xasprintf("%s.new", path);
  int bad = file_write(next, data, bytes, err);
  if (bad)
    unlink(next);
  else
    bad = file_put(next, path, err);
  free(next);
  return bad;
}

int folder_make(const char *path, Error *err) {
  char part[4096];
  if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part)
    return error_set(err, NULL, "path too long: %.100s...", path);
  for (char *p = part + 1;; p++) {
    if (*p != '/' && *p != 0) continue;
    char end = *p;
    *p = 0;
    if (mkdir(part, 0777) != 0 && errno != EEXIST)
      return error_set(err, "choose a folder that can be written with --run-dir", "cannot create folder %s: %s", part,
                       strerror(errno));
    if (!end) return 0;
    *p = end;
  }
}

static int compare_rising(const void *pa, const void *pb) {
  double a = *(const double *)pa, b = *(const double *)pb;
  return (a > b) - (a < b);
}

double median_f64(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, compare_rising);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}
