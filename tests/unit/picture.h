// Pictures that tests make.
#ifndef TESSERA_TESTS_PICTURE_H
#define TESSERA_TESTS_PICTURE_H

#include "data/image.h"

// A smooth picture without a dark pixel.
static inline Image picture_make(int width, int height, int salt) {
  Image image = {width, height, xmalloc(3 * (size_t)width * (size_t)height)};
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++) {
      uint8_t *p = image.rgb + 3 * (y * width + x);
      p[0] = (uint8_t)(90 + 150 * x / width);
      p[1] = (uint8_t)(90 + 150 * y / height);
      p[2] = (uint8_t)(120 + (x * y + 17 * salt) % 100);
    }
  return image;
}

// The same as a PNG of n bytes; malloc'd.
static inline uint8_t *png_make(int width, int height, int salt, size_t *n) {
  Image image = picture_make(width, height, salt);
  Error err;
  uint8_t *png = image_encode_png(&image, n, &err);
  assert_non_null(png);
  image_free(&image);
  return png;
}
#endif
