// Images: decode (JPEG, PNG) to 8-bit RGB, fit to the patch grid, cut into patches. All functions are thread-safe.
#ifndef TESSERA_IMAGE_H
#define TESSERA_IMAGE_H

#include "data/image_header.h"
#include "model/config/config.h"

#include <stdbool.h>

typedef struct Image {
  int width, height;
  uint8_t *rgb; // [height, width, 3], malloc'd
} Image;

// How images become patch grids; one per run.
typedef struct ImageFit {
  ImageMode mode;
  int size;       // pixels of the shorter side; a multiple of `patch`
  int patch;      // pixels of a patch's side
  int max_tokens; // IMAGE_ASPECT only: most patches of an image; 0 = (size/patch)^2
} ImageFit;

// As the config says.
ImageFit image_fit_of(const Config *c);

typedef struct ImageGrid {
  int rows, columns; // in patches; tokens = rows * columns
} ImageGrid;

// Width and height, as the image is to be seen (EXIF's orientation applied), from the beginning of a JPEG or PNG file.
// 0; -1 with *err set when it is another file or a damaged one, naming what it is where that is known; 1, *err set too,
// when the bytes end before the header does.
int image_info(const uint8_t *bytes, size_t n, int *width, int *height, Error *err);

// Checks width x height against max_pixels; -1 with *err set when there are more.
int image_check_pixels(int width, int height, int64_t max_pixels, Error *err);

// Decodes a JPEG or PNG of any depth (grey, palette, 16 bit, alpha laid over white) into *out. The header is checked
// against max_pixels before anything is decoded or allocated, and the file must be whole (data/intact.h). The pixels
// are turned as EXIF's orientation says. -1 with *err set, *out zeroed, on anything else.
int image_decode(const uint8_t *bytes, size_t n, int64_t max_pixels, Image *out, Error *err);

// Frees the pixels and zeroes *image.
void image_free(Image *image);

// The patch grid an image of width x height pixels (both >= 1) gets: pure, so packs can be formed from headers alone.
// IMAGE_SQUARE: (size/patch, size/patch). IMAGE_ASPECT: the shorter side scaled to `size`, shrunk until it fits
// max_tokens, each side rounded to the nearest number of patches, at least 1.
ImageGrid image_fit_grid(const ImageFit *fit, int width, int height);

// The largest centred part of `src` with the grid's aspect, resized to [rows*patch, columns*patch]. *out is
// allocated here; 0, or -1 with *err set.
int image_fit(const Image *src, const ImageFit *fit, Image *out, Error *err);
// The same as patches [rows*columns, 3*patch*patch], mirrored left to right if `mirror`.
int image_fit_patches(const Image *src, const ImageFit *fit, bool mirror, uint8_t *patches, Error *err);

// Pixels to patches, row-major over the grid, each patch in (row, column, channel) order. Both sides of `image` are
// multiples of `patch`. patches: [rows*columns, 3*patch*patch].
void image_to_patches(const Image *image, int patch, uint8_t *patches);
// The inverse: fills image->rgb, whose width and height say how many patches there are.
void image_from_patches(const uint8_t *patches, int patch, Image *image);
// Mirrors an image left to right: from and to [rows * columns, p, p, 3], not overlapping.
void patches_mirror(const uint8_t *from, int rows, int columns, int p, uint8_t *to);

// Writes a PNG file; 0, or -1 with *err set.
int image_write_png(const char *path, const Image *image, Error *err);
// Encodes a PNG into memory (free with free()); NULL with *err set on failure.
uint8_t *image_encode_png(const Image *image, size_t *bytes, Error *err);
#endif
