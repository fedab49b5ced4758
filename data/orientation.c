#include "data/orientation.h"

#include <stdlib.h>
#include <string.h>

enum { TAG_ORIENTATION = 0x0112, TYPE_SHORT = 3, TYPE_LONG = 4, ENTRY_BYTES = 12 };

static uint32_t tiff_u16(const uint8_t *p, bool little) {
  return little ? (uint32_t)p[1] << 8 | p[0] : (uint32_t)p[0] << 8 | p[1];
}

static uint32_t tiff_u32(const uint8_t *p, bool little) {
  return little ? tiff_u16(p + 2, true) << 16 | tiff_u16(p, true) : tiff_u16(p, false) << 16 | tiff_u16(p + 2, false);
}

int exif_orientation(const uint8_t *tiff, size_t n) {
  if (n >= 6 && memcmp(tiff, "Exif\0\0", 6) == 0) tiff += 6, n -= 6;
  if (n < 8) return 1;
  bool little = memcmp(tiff, "II*\0", 4) == 0;
  if (!little && memcmp(tiff, "MM\0*", 4) != 0) return 1;
  // The first directory describes the image itself. Others are not followed, so that none can lead in a circle.
  size_t at = tiff_u32(tiff + 4, little);
  if (at > n - 2) return 1;
  size_t entries = tiff_u16(tiff + at, little);
  for (at += 2; entries > 0 && n - at >= ENTRY_BYTES; entries--, at += ENTRY_BYTES) {
    const uint8_t *entry = tiff + at; // tag, type, count, value
    if (tiff_u16(entry, little) != TAG_ORIENTATION) continue;
    uint32_t type = tiff_u16(entry + 2, little), count = tiff_u32(entry + 4, little);
    if (count != 1 || (type != TYPE_SHORT && type != TYPE_LONG)) return 1;
    uint32_t value = type == TYPE_SHORT ? tiff_u16(entry + 8, little) : tiff_u32(entry + 8, little);
    return value >= 1 && value <= 8 ? (int)value : 1;
  }
  return 1;
}

uint8_t *pixels_orient(uint8_t *rgb, int width, int height, int orientation) {
  if (orientation <= 1) return rgb;
  // Pixel (x, y) goes to start + x * right + y * down, in pixels of the image as it is seen.
  int64_t w = width, h = height, start = 0, right = 0, down = 0;
  switch (orientation) {
  case 2:
    start = w - 1, right = -1, down = w;
    break; // mirrored left to right
  case 3:
    start = w * h - 1, right = -1, down = -w;
    break; // upside down
  case 4:
    start = (h - 1) * w, right = 1, down = -w;
    break; // mirrored top to bottom
  case 5:
    start = 0, right = h, down = 1;
    break; // rows are columns
  case 6:
    start = h - 1, right = h, down = -1;
    break; // turned clockwise
  case 7:
    start = w * h - 1, right = -h, down = -1;
    break; // rows are columns, from the far corner
  default:
    start = (w - 1) * h, right = -h, down = 1;
    break; // turned counter-clockwise
  }
  uint8_t *seen = xmalloc(3 * (size_t)width * (size_t)height);
  const uint8_t *from = rgb;
  for (int64_t y = 0; y < h; y++)
    for (int64_t x = 0; x < w; x++, from += 3) memcpy(seen + 3 * (start + x * right + y * down), from, 3);
  free(rgb);
  return seen;
}
