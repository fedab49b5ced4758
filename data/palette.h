// PNG files with a palette. stb_image 2.27 looks pixels up in a table of which only the file's own entries are set, so
// that a pixel beyond them shows whatever the stack held. Here they are looked up by hand, and such a pixel is an
// error.
#ifndef TESSERA_PALETTE_H
#define TESSERA_PALETTE_H

#include "base/base.h"

typedef struct Palette {
  int entries;
  int scale;            // between one index and the next in the grey picture
  uint8_t rgba[256][4]; // [entries]
} Palette;

// Whether `bytes`, a PNG that image_check_intact has passed, has a palette: 0, or 1 with *palette set and *grey a
// malloc'd copy of the file which says that the indices are grey values, scaled to 0..255. -1 with *err set when the
// palette makes no sense.
int png_palette(const uint8_t *bytes, size_t n, Palette *palette, uint8_t **grey, Error *err);
#endif
