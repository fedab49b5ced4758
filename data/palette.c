#include "data/palette.h"

#include <string.h>

// Offsets in a chunk: its data's length, its type, its data. Offsets in the data of IHDR.
enum { CHUNK_TYPE = 4, CHUNK_DATA = 8, CHUNK_FRAME = 12, HEADER_DEPTH = 8, HEADER_COLOUR = 9, HEADER_BYTES = 13 };
enum { COLOUR_GREY = 0, COLOUR_PALETTE = 3 };

static size_t chunk_length(const uint8_t *chunk) {
  return (size_t)chunk[0] << 24 | (size_t)chunk[1] << 16 | (size_t)chunk[2] << 8 | chunk[3];
}

// The first chunk of a type before the pixels; NULL when there is none.
static const uint8_t *chunk_find(const uint8_t *bytes, size_t n, const char *type) {
  for (size_t at = 8; n - at >= CHUNK_FRAME;) {
    const uint8_t *chunk = bytes + at;
    size_t length = chunk_length(chunk);
    if (length > n - at - CHUNK_FRAME || memcmp(chunk + CHUNK_TYPE, "IDAT", 4) == 0) return NULL;
    if (memcmp(chunk + CHUNK_TYPE, type, 4) == 0) return chunk;
    at += CHUNK_FRAME + length;
  }
  return NULL;
}

int png_palette(const uint8_t *bytes, size_t n, Palette *palette, uint8_t **grey, Error *err) {
  const char *hint = "the PNG is damaged; get it again";
  if (n < 8 || memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) != 0) return 0;
  const uint8_t *header = chunk_find(bytes, n, "IHDR");
  if (!header || chunk_length(header) != HEADER_BYTES) return 0;
  int depth = header[CHUNK_DATA + HEADER_DEPTH];
  if (header[CHUNK_DATA + HEADER_COLOUR] != COLOUR_PALETTE || depth > 8) return 0;
  const uint8_t *colours = chunk_find(bytes, n, "PLTE"), *alphas = chunk_find(bytes, n, "tRNS");
  size_t colour_bytes = colours ? chunk_length(colours) : 0, alpha_bytes = alphas ? chunk_length(alphas) : 0;
  if (colour_bytes == 0 || colour_bytes > sizeof palette->rgba / 4 * 3 || colour_bytes % 3)
    return error_set(err, hint, "the PNG has no palette, or one of %zu bytes", colour_bytes);
  if (alpha_bytes > colour_bytes / 3)
    return error_set(err, hint, "the PNG has %zu transparencies for %zu colours", alpha_bytes, colour_bytes / 3);

  *palette = (Palette){.entries = (int)(colour_bytes / 3), .scale = 255 / ((1 << depth) - 1)};
  for (size_t i = 0; i < colour_bytes / 3; i++) {
    memcpy(palette->rgba[i], colours + CHUNK_DATA + 3 * i, 3);
    palette->rgba[i][3] = i < alpha_bytes ? alphas[CHUNK_DATA + i] : 255;
  }
  *grey = xmalloc(n);
  memcpy(*grey, bytes, n);
  (*grey)[header - bytes + CHUNK_DATA + HEADER_COLOUR] = COLOUR_GREY;
  // For grey values tRNS means something else; a chunk of an unknown, optional type is passed over.
  if (alphas) memcpy(*grey + (alphas - bytes) + CHUNK_TYPE, "teSs", 4);
  return 1;
}
