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

// A rectangle of an image, in place.
typedef struct View {
  const uint8_t *rgb; // its first pixel
  int width, height;
  size_t stride; // bytes from row to row
} View;

// The largest centred part of an image with the aspect of width x height.
static View image_crop(const Image *src, int width, int height) {
  int w = src->width, h = src->height;
  if ((int64_t)w * height > (int64_t)h * width)
    w = (int)max_i64(1, ((int64_t)h * width + height / 2) / height);
  else
    h = (int)max_i64(1, ((int64_t)w * height + width / 2) / width);
  int left = (src->width - w) / 2, top = (src->height - h) / 2;
  size_t stride = 3 * (size_t)src->width;
  return (View){src->rgb + (size_t)top * stride + 3 * (size_t)left, w, h, stride};
}

// `src` cropped and resized to the grid. What needs no resizing stays where it is: resampling at scale 1 would blur.
// Else the pixels are in *resized, zeroed otherwise. -1 with *err set.
static int view_fit(const Image *src, const ImageFit *fit, View *view, Image *resized, Error *err) {
  ImageGrid grid = image_fit_grid(fit, src->width, src->height);
  int width = grid.columns * fit->patch, height = grid.rows * fit->patch;
  // Cropping before resizing gives what resizing before cropping gives, to within a source pixel, for less work.
  View crop = *view = image_crop(src, width, height);
  *resized = (Image){0};
  if (crop.width == width && crop.height == height) return 0;
  size_t stride = 3 * (size_t)width;
  *resized = (Image){.width = width, .height = height, .rgb = xmalloc(stride * (size_t)height)};
#if RESIZE_2
  int done = stbir_resize_uint8_linear(crop.rgb, crop.width, crop.height, (int)crop.stride, resized->rgb, width, height,
                                       (int)stride, STBIR_RGB) != NULL;
#else
  int done = stbir_resize_uint8(crop.rgb, crop.width, crop.height, (int)crop.stride, resized->rgb, width, height,
                                (int)stride, 3);
#endif
  *view = (View){resized->rgb, width, height, stride};
  if (done) return 0;
  image_free(resized);
  return error_set(err, NULL, "cannot resize an image of %d x %d pixels to %d x %d", crop.width, crop.height, width,
                   height);
}

int image_fit(const Image *src, const ImageFit *fit, Image *out, Error *err) {
  View view;
  if (view_fit(src, fit, &view, out, err)) return -1;
  if (view.rgb == out->rgb) return 0; // it was resized
  size_t stride = 3 * (size_t)view.width;
  uint8_t *rgb = xmalloc(stride * (size_t)view.height);
  for (int y = 0; y < view.height; y++) memcpy(rgb + (size_t)y * stride, view.rgb + (size_t)y * view.stride, stride);
  *out = (Image){.width = view.width, .height = view.height, .rgb = rgb};
  return 0;
}

// Copies n pixels, the last one first if `mirror`.
static void pixels_copy(uint8_t *to, const uint8_t *from, int n, bool mirror) {
  if (!mirror)
    memcpy(to, from, 3 * (size_t)n);
  else
    for (int x = 0; x < n; x++) memcpy(to + 3 * x, from + 3 * (n - 1 - x), 3);
}

// Cuts an image, mirrored left to right if `mirror`, into patches [rows * columns, p, p, 3].
static void view_cut(const View *view, int p, bool mirror, uint8_t *patches) {
  size_t run = 3 * (size_t)p; // bytes of a row of a patch
  int columns = view->width / p;
  for (int row = 0; row + p <= view->height; row += p)
    for (int i = 0; i < columns; i++) {
      size_t left = run * (size_t)(mirror ? columns - 1 - i : i);
      const uint8_t *from = view->rgb + (size_t)row * view->stride + left;
      for (int y = 0; y < p; y++, from += view->stride, patches += run) pixels_copy(patches, from, p, mirror);
    }
}

int image_fit_patches(const Image *src, const ImageFit *fit, bool mirror, uint8_t *patches, Error *err) {
  View view;
  Image resized;
  if (view_fit(src, fit, &view, &resized, err)) return -1;
  view_cut(&view, fit->patch, mirror, patches);
  image_free(&resized);
  return 0;
}

void patches_mirror(const uint8_t *from, int rows, int columns, int p, uint8_t *to) {
  size_t run = 3 * (size_t)p, patch = run * (size_t)p;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) {
      const uint8_t *source = from + (size_t)(i * columns + columns - 1 - j) * patch;
      for (int y = 0; y < p; y++, source += run, to += run) pixels_copy(to, source, p, true);
    }
}

void image_to_patches(const Image *image, int patch, uint8_t *patches) {
  View whole = {image->rgb, image->width, image->height, 3 * (size_t)image->width};
  view_cut(&whole, patch, false, patches);
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
