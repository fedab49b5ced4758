#include "kernels/cpu/cpu.h"

#include "base/base.h"

#include <omp.h>
#include <stdlib.h>

enum { ALIGN = 64 };

Scratch scratch_take(int64_t bytes) {
  static _Thread_local struct {
    char *at;
    size_t bytes;
  } own; // grows to what the largest op needs, so that a step allocates nothing once each op ran
  size_t each = ((size_t)bytes + ALIGN - 1) / ALIGN * ALIGN, all = each * (size_t)omp_get_max_threads() + ALIGN;
  if (own.bytes < all) {
    free(own.at);
    own.at = xmalloc(all);
    own.bytes = all;
  }
  return (Scratch){own.at + (ALIGN - (uintptr_t)own.at % ALIGN) % ALIGN, each};
}

void *scratch_own(const Scratch *s) {
  return s->at + (size_t)omp_get_thread_num() * s->bytes;
}
