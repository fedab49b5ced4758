// Counts calls of the allocator by interposing it, for the test that a step makes none. Under a sanitizer, which owns
// the allocator, nothing is interposed and the count stays 0.
#include <stddef.h>
#include <stdint.h>

static int64_t allocations;

int64_t allocations_counted(void);
int64_t allocations_counted(void) {
  return __atomic_load_n(&allocations, __ATOMIC_RELAXED);
}

#ifndef __SANITIZE_ADDRESS__
extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t n, size_t bytes);
extern void *__libc_realloc(void *p, size_t bytes);

void *malloc(size_t bytes) {
  __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
  return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes) {
  __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
  return __libc_calloc(n, bytes);
}

void *realloc(void *p, size_t bytes) {
  __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
  return __libc_realloc(p, bytes);
}
#endif
