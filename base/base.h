// Errors, log, memory, time: what every part of the engine leans on.
#ifndef TESSERA_BASE_H
#define TESSERA_BASE_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

// An error on its way to the user: what happened and where, and what to do about it.
typedef struct Error {
  char text[768];
  char hint[384];
} Error;

// Fills *err (hint may be NULL) and returns -1, so that callers can write `return error_set(...)`.
int error_set(Error *err, const char *hint, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
// Puts "prefix: " before the text of an error on its way up; returns -1.
int error_prefix(Error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// Prints an error with its hint.
void error_print(const Error *err);
// Prints the error with its hint and leaves with exit code 2: the way every start-up error ends.
__attribute__((noreturn)) void fatal(const Error *err);
// The same with another exit code: 1 for an error inside a step.
__attribute__((noreturn)) void fatal_code(const Error *err, int code);
// An inconsistency of the program itself, or no memory left; exit code 1.
__attribute__((noreturn)) void panic(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

// One line to standard error, above the progress bar when one is drawn.
void log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
// Sets a hook that is called before a log line is printed (the progress bar erases itself); NULL: none. No other line
// comes between the hook and its line, and the former hook does not run once this has returned.
void log_set_hook(void (*before_line)(void));
// This process is one of several, of this rank (0: as if alone). Of others, log_info says nothing, warnings and errors
// carry the rank, and an error that ends the process waits a moment for the lower ranks: what is wrong in all of them
// is said by one, whose end ends the others.
void log_set_rank(int rank);
// Warnings of ranks above 0 are left out until this is called: what they find while they open the same run is what rank
// 0 finds. log_begin_shared: again so, where all do the same.
void log_begin_own(void);
void log_begin_shared(void);

// Allocation that cannot fail: out of memory ends the process with a message naming the size. Free with free().
void *xmalloc(size_t bytes);
void *xcalloc(size_t count, size_t bytes);
void *xrealloc(void *p, size_t bytes);
char *xstrdup(const char *s);
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

// Monotonic seconds.
double time_now(void);

// Whole file into memory, a NUL appended (not counted in *bytes). NULL with *err set on failure, or when the file
// is larger than max_bytes.
char *file_read(const char *path, size_t max_bytes, size_t *bytes, Error *err);
// Reads n bytes at `at` of an open file: their number, less than n only where the file ends; -1 with errno set.
int64_t file_read_at(int fd, int64_t at, void *to, int64_t n);
// Writes a whole file, replacing one that is there; 0, or -1 with *err set.
int file_write(const char *path, const void *data, size_t bytes, Error *err);
// Flushes a file that was written whole as `next` to the disk, then renames it to `path`: a process killed meanwhile
// leaves the old file. `next` is gone in any case; 0, or -1 with *err set.
int file_put(const char *next, const char *path, Error *err);
// file_write to PATH.new, then file_put.
int file_replace(const char *path, const void *data, size_t bytes, Error *err);
// Creates a folder and its parents; 0, or -1 with *err set.
int folder_make(const char *path, Error *err);

// The median of x [n], n > 0, which is sorted rising; of an even number the mean of the two in the middle.
double median_f64(double *x, int n);

static inline int64_t min_i64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t max_i64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
#endif
