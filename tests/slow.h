// How much longer things may take in this build: tests multiply their bounds on time by it. ThreadSanitizer makes
// everything ten times as slow.
#ifndef TESTS_SLOW_H
#define TESTS_SLOW_H

#ifdef __SANITIZE_THREAD__
enum { TIMES_SLOWER = 10 };
#else
enum { TIMES_SLOWER = 1 };
#endif

#endif
