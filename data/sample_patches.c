#include "data/sample_patches.h"

#include <stdlib.h>

int sample_patches(const Source *source, const SamplePart *part, const ImageFit *fit, int64_t max_pixels, bool mirror,
                   uint8_t *patches, Error *err) {
  uint8_t *bytes;
  size_t n;
  int rc = source_read_image(source, part->image, &bytes, &n, err);
  if (rc) return rc;
  Image image;
  rc = image_decode(bytes, n, max_pixels, &image, err);
  free(bytes);
  if (rc) return -1;
  if (image.width != part->width || image.height != part->height)
    rc = error_set(err, NULL, "the image has %d x %d pixels, its header said %d x %d", image.width, image.height,
                   part->width, part->height);
  if (!rc) rc = image_fit_patches(&image, fit, mirror, patches, err);
  image_free(&image);
  return rc;
}
