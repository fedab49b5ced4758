// Bytes that grow.
#ifndef TESSERA_TESTS_BYTES_H
#define TESSERA_TESTS_BYTES_H

#include "base/base.h"

#include <string.h>

typedef struct Bytes {
  uint8_t *at; // malloc'd
  size_t n;
} Bytes;

static inline void bytes_append(Bytes *b, const void *more, size_t n) {
  b->at = xrealloc(b->at, b->n + n);
  if (n) memcpy(b->at + b->n, more, n);
  b->n += n;
}
#endif
