// Host memory that copies reach at full speed (Backend.host_alloc).
#ifndef TESSERA_CUDA_PINNED_H
#define TESSERA_CUDA_PINNED_H

#include <stddef.h>

// NULL when there is not enough. May be called by several threads. What takes more than a second says where it went.
void *pinned_alloc(size_t bytes);
void pinned_release(void *p);
#endif
