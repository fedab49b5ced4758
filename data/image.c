#include "data/image.h"

#include "base/text_out.h"
#include "data/image_header.h"
#include "data/intact.h"
#include "data/orientation.h"
#include "data/palette.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STBI_NO_STDIO
#include <stb/stb_image.h>
#if __has_include(<stb/stb_image_resize2.h>)
#include <stb/stb_image_resize2.h>
#define RESIZE_2 1
#else
#include <stb/stb_image_resize.h>
#define RESIZE_2 0
#endif
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>

int image_info(const uint8_t *bytes, size_t n, int *width, int *height, Error *err) {
  ImageHeader header;
  int rc = image_header(bytes, n, &header, err);
  bool turns = orientation_turns(header.orientation);
  *width = rc ? 0 : turns ? header.height : header.width;
  *height = rc ? 0 : turns ? header.width : header.height;
  return rc;
}

int image_check_pixels(int width, int height, int64_t max_pixels, Error *err) {
  if ((int64_t)width * height <= max_pixels) return 0;
  return error_set(err, "make it smaller first", "the image has %d x %d pixels, more than the %lld allowed", width,
                   height, (long long)max_pixels);
}

// One channel over white.
static uint8_t over_white(unsigned value, unsigned alpha) {
  return (uint8_t)((value * alpha + 255 * (255 - alpha) + 127) / 255);
}

// The pixels [height, width, 3] of a PNG with a palette; NULL with *err set. Frees `grey`.
static uint8_t *decode_palette(uint8_t *grey, size_t n, const Palette *palette, Error *err) {
  int width, height, channels;
  uint8_t *index = stbi_load_from_memory(grey, (int)n, &width, &height, &channels, 1); // [height, width]
  free(grey);
  if (!index) {
    error_set(err, IMAGE_FORMAT_HINT, "the image cannot be decoded: %s", stbi_failure_reason());
    return NULL;
  }
  size_t pixels = (size_t)width * (size_t)height;
  uint8_t *rgb = xmalloc(3 * pixels);
  for (size_t i = 0; i < pixels; i++) {
    int entry = index[i] / palette->scale;
    if (entry >= palette->entries) {
      error_set(err, IMAGE_FORMAT_HINT, "a pixel has colour %d of a palette of %d", entry, palette->entries);
      free(index);
      free(rgb);
      return NULL;
    }
    const uint8_t *rgba = palette->rgba[entry];
    for (size_t c = 0; c < 3; c++) rgb[3 * i + c] = over_white(rgba[c], rgba[3]);
  }
  free(index);
  return rgb;
}

static uint8_t *decode_plain(const uint8_t *bytes, size_t n, Error *err) {
  int width, height, channels;
  // Four channels always: a colour key can carry transparency that the header does not tell.
  uint8_t *rgba = stbi_load_from_memory(bytes, (int)n, &width, &height, &channels, 4);
  if (!rgba) {
    error_set(err, IMAGE_FORMAT_HINT, "the image cannot be decoded: %s", stbi_failure_reason());
    return NULL;
  }
  size_t pixels = (size_t)width * (size_t)height;
  for (size_t i = 0; i < pixels; i++) { // in place, [pixels, 4] -> [pixels, 3]: writes never pass reads
    unsigned alpha = rgba[4 * i + 3];
    for (size_t c = 0; c < 3; c++) rgba[3 * i + c] = over_white(rgba[4 * i + c], alpha);
  }
  return xrealloc(rgba, 3 * pixels);
}

int image_decode(const uint8_t *bytes, size_t n, int64_t max_pixels, Image *out, Error *err) {
  *out = (Image){0};
  ImageHeader header;
  if (n > INT_MAX) return error_set(err, IMAGE_FORMAT_HINT, "the image file has %zu bytes, more than 2 GiB", n);
  if (image_header(bytes, n, &header, err) != 0) return -1;
  if (image_check_pixels(header.width, header.height, max_pixels, err) != 0) return -1;
  if (image_check_intact(bytes, n, err) != 0) return -1;
  Palette palette;
  uint8_t *grey;
  int has_palette = png_palette(bytes, n, &palette, &grey, err);
  if (has_palette < 0) return -1;
  uint8_t *rgb = has_palette ? decode_palette(grey, n, &palette, err) : decode_plain(bytes, n, err);
  if (!rgb) return -1;
  bool turns = orientation_turns(header.orientation);
  *out = (Image){.width = turns ? header.height : header.width, .height = turns ? header.width : header.height};
  out->rgb = pixels_orient(rgb, header.width, header.height, header.orientation);
  return 0;
}

void image_free(Image *image) {
  free(image->rgb);
  *image = (Image){0};
}

ImageFit image_fit_of(const Config *c) {
  return (ImageFit){c->data.image_mode, c->data.image_size, c->model.patch, c->data.max_image_tokens};
}

ImageGrid image_fit_grid(const ImageFit *fit, int width, int height) {
  int side = fit->size / fit->patch;
  if (fit->mode == IMAGE_SQUARE) return (ImageGrid){side, side};
  int max_tokens = fit->max_tokens > 0 ? fit->max_tokens : side * side;
  double scale = (double)side / (width < height ? width : height); // pixels to patches
  double fitting = sqrt((double)max_tokens / ((double)width * height));
  if (scale > fitting) scale = fitting;
  ImageGrid grid = {
      .rows = (int)fmin(fmax(floor(height * scale + 0.5), 1), max_tokens),
      .columns = (int)fmin(fmax(floor(width * scale + 0.5), 1), max_tokens),
  };
  while ((int64_t)grid.rows * grid.columns > max_tokens) { // rounding went up: shorten the longer side
    bool rows = grid.rows != grid.columns ? grid.rows > grid.columns : height < width;
    if (rows)
      grid.rows--;
    else
      grid.columns--;
  }
  return grid;
}

int image_fit(const Image *src, const ImageFit *fit, Image *out, Error *err) {
  ImageGrid grid = image_fit_grid(fit, src->width, src->height);
  int width = grid.columns * fit->patch, height = grid.rows * fit->patch;
  // Cropping before resizing gives what resizing before cropping gives, to within a source pixel, for less work.
  int crop_width = src->width, crop_height = src->height;
  if ((int64_t)src->width * height > (int64_t)src->height * width)
    crop_width = (int)max_i64(1, ((int64_t)src->height * width + height / 2) / height);
  else
    crop_height = (int)max_i64(1, ((int64_t)src->width * height + width / 2) / width);
  int left = (src->width - crop_width) / 2, top = (src->height - crop_height) / 2;
  int stride = 3 * src->width;
  const uint8_t *crop = src->rgb + (size_t)top * (size_t)stride + 3 * (size_t)left; // [crop_height, crop_width, 3]

  *out = (Image){.width = width, .height = height, .rgb = xmalloc(3 * (size_t)width * (size_t)height)};
  if (crop_width == width && crop_height == height) { // resampling at scale 1 would blur
    for (int y = 0; y < height; y++)
      memcpy(out->rgb + (size_t)y * 3 * (size_t)width, crop + (size_t)y * (size_t)stride, 3 * (size_t)width);
  } else {
#if RESIZE_2
    int done = stbir_resize_uint8_linear(crop, crop_width, crop_height, stride, out->rgb, width, height, 3 * width,
                                         STBIR_RGB) != NULL;
#else
    int done = stbir_resize_uint8(crop, crop_width, crop_height, stride, out->rgb, width, height, 3 * width, 3);
#endif
    if (!done) {
      image_free(out);
      return error_set(err, NULL, "cannot resize an image of %d x %d pixels to %d x %d", crop_width, crop_height, width,
                       height);
    }
  }
  return 0;
}

void image_to_patches(const Image *image, int patch, uint8_t *patches) {
  size_t run = 3 * (size_t)patch, stride = 3 * (size_t)image->width; // one row of one patch; one row of the image
  for (int top = 0; top < image->height; top += patch)
    for (int left = 0; left < image->width; left += patch)
      for (int y = 0; y < patch; y++, patches += run)
        memcpy(patches, image->rgb + (size_t)(top + y) * stride + 3 * (size_t)left, run);
}

void image_from_patches(const uint8_t *patches, int patch, Image *image) {
  size_t run = 3 * (size_t)patch, stride = 3 * (size_t)image->width;
  for (int top = 0; top < image->height; top += patch)
    for (int left = 0; left < image->width; left += patch)
      for (int y = 0; y < patch; y++, patches += run)
        memcpy(image->rgb + (size_t)(top + y) * stride + 3 * (size_t)left, patches, run);
}

static void stream_write(void *stream, void *data, int n) {
  fwrite(data, 1, (size_t)n, stream);
}

uint8_t *image_encode_png(const Image *image, size_t *bytes, Error *err) {
  TextOut out;
  FILE *f = text_begin(&out);
  int made = image->width > 0 && image->height > 0 &&
             stbi_write_png_to_func(stream_write, f, image->width, image->height, 3, image->rgb, 3 * image->width);
  char *png = text_end(&out);
  *bytes = out.bytes;
  if (made) return (uint8_t *)png;
  free(png);
  error_set(err, NULL, "cannot encode an image of %d x %d pixels as PNG", image->width, image->height);
  return NULL;
}

int image_write_png(const char *path, const Image *image, Error *err) {
  size_t n;
  uint8_t *png = image_encode_png(image, &n, err);
  if (!png) return error_prefix(err, "%s", path);
  int bad = file_write(path, png, n, err);
  free(png);
  return bad;
}
