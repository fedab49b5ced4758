// Bounds on time that hold on a busy machine too: of the processor's time, of all threads of this process.
#ifndef TESTS_SLOW_H
#define TESTS_SLOW_H

#include <time.h>

// How much longer things may take in this build: ThreadSanitizer makes everything ten times as slow.
#ifdef __SANITIZE_THREAD__
enum { TIMES_SLOWER = 10 };
#else
enum { TIMES_SLOWER = 1 };
#endif

// Seconds of the processor that this process has used.
static inline double cpu_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#endif
