// PNG files made by hand.
#ifndef TESSERA_TESTS_PNG_BYTES_H
#define TESSERA_TESTS_PNG_BYTES_H

#include "tests/unit/bytes.h"

static inline void bytes_append_u32(Bytes *b, uint32_t v) {
  uint8_t bytes[4] = {(uint8_t)(v >> 24), (uint8_t)(v >> 16), (uint8_t)(v >> 8), (uint8_t)v};
  bytes_append(b, bytes, 4);
}

static inline void png_chunk(Bytes *png, const char *type, const void *data, size_t n) {
  bytes_append_u32(png, (uint32_t)n);
  size_t start = png->n;
  bytes_append(png, type, 4);
  bytes_append(png, data, n);
  uint32_t crc = ~0u;
  for (size_t i = start; i < png->n; i++) {
    crc ^= png->at[i];
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  bytes_append_u32(png, ~crc);
}
#endif
