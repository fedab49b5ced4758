// Calls of the allocator in this process, counted by whose code makes them.
#ifndef TESSERA_COUNT_MALLOC_H
#define TESSERA_COUNT_MALLOC_H

#include <stdint.h>

// By the engine and everything else but OpenBLAS; by OpenBLAS, whose AVX-512 kernels take memory for small products and
// give it back. Both stay 0 under a sanitizer, which owns the allocator.
int64_t allocations_counted(void);
int64_t allocations_of_blas(void);
#endif
