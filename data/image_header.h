// What the beginning of an image file says: its format, its size, which way up it is.
#ifndef TESSERA_IMAGE_HEADER_H
#define TESSERA_IMAGE_HEADER_H

#include "model/config/config.h"

// The largest image the engine decodes: 67 megapixels.
enum { IMAGE_MAX_PIXELS = CONFIG_MAX_PIXELS };

// For every file that is not decoded.
#define IMAGE_FORMAT_HINT "images are JPEG or PNG files; convert others first"

typedef struct ImageHeader {
  int width, height; // of the pixels as they are kept
  int orientation;   // 1..8, see data/orientation.h
} ImageHeader;

// Reads the header of a JPEG (all before its frame) or PNG (all before its pixels). 0; 1 when the bytes end too early,
// so that more of them may help, or -1 when they cannot: then *err says what they are. Huffman tables are checked in
// all of the bytes, since stb_image before 2.28 writes past its own where one has more than 256 symbols.
int image_header(const uint8_t *bytes, size_t n, ImageHeader *out, Error *err);
#endif
