#include "data/sample_patches.h"

#include <stdlib.h>
#include <string.h>

int sample_patches(const Source *source, const SampleSegment *segment, const ImageFit *fit, int64_t max_pixels,
                   uint8_t *patches, Error *err) {
  uint8_t *bytes;
  size_t n;
  int rc = source_read_image(source, segment->image, &bytes, &n, err);
  if (rc) return rc;
  Image image = {0}, fitted = {0};
  rc = image_decode(bytes, n, max_pixels, &image, err);
  free(bytes);
  if (rc) return -1;
  if (image.width != segment->width || image.height != segment->height)
    rc = error_set(err, NULL, "the image has %d x %d pixels, its header said %d x %d", image.width, image.height,
                   segment->width, segment->height);
  if (!rc) rc = image_fit(&image, fit, &fitted, err);
  if (!rc) image_to_patches(&fitted, fit->patch, patches);
  image_free(&image);
  image_free(&fitted);
  return rc;
}

void patches_mirror(const uint8_t *from, int rows, int columns, int p, uint8_t *to) {
  size_t line = (size_t)p * 3, patch = line * (size_t)p;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) {
      const uint8_t *source = from + (size_t)(r * columns + columns - 1 - c) * patch;
      uint8_t *target = to + (size_t)(r * columns + c) * patch;
      for (int y = 0; y < p; y++)
        for (int x = 0; x < p; x++) memcpy(target + y * line + x * 3, source + y * line + (size_t)(p - 1 - x) * 3, 3);
    }
}
