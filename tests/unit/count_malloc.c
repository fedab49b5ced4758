// Counts calls of the allocator by interposing it, for the test that a step makes none. Under a sanitizer nothing is
// interposed.
#include "tests/unit/count_malloc.h"

#include <link.h>
#include <stddef.h>
#include <string.h>

static int64_t ours, of_blas;

int64_t allocations_counted(void) {
  return __atomic_load_n(&ours, __ATOMIC_RELAXED);
}

int64_t allocations_of_blas(void) {
  return __atomic_load_n(&of_blas, __ATOMIC_RELAXED);
}

#ifndef __SANITIZE_ADDRESS__
static uintptr_t blas_begin, blas_end; // where the library's code lies

extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t n, size_t bytes);
extern void *__libc_realloc(void *p, size_t bytes);

static int note_blas(struct dl_phdr_info *library, size_t size, void *unused) {
  (void)size;
  (void)unused;
  if (!strstr(library->dlpi_name, "openblas")) return 0;
  for (int i = 0; i < library->dlpi_phnum; i++) {
    if (library->dlpi_phdr[i].p_type != PT_LOAD || !(library->dlpi_phdr[i].p_flags & PF_X)) continue;
    blas_begin = library->dlpi_addr + library->dlpi_phdr[i].p_vaddr;
    blas_end = blas_begin + library->dlpi_phdr[i].p_memsz;
  }
  return 1;
}

__attribute__((constructor)) static void find_blas(void) {
  dl_iterate_phdr(note_blas, NULL);
}

static void count(const void *caller) {
  uintptr_t at = (uintptr_t)caller;
  __atomic_fetch_add(at >= blas_begin && at < blas_end ? &of_blas : &ours, 1, __ATOMIC_RELAXED);
}

void *malloc(size_t bytes) {
  count(__builtin_return_address(0));
  return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes) {
  count(__builtin_return_address(0));
  return __libc_calloc(n, bytes);
}

void *realloc(void *p, size_t bytes) {
  count(__builtin_return_address(0));
  return __libc_realloc(p, bytes);
}
#endif
