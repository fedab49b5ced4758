// The way of an image: header, decoding, fitting, patches. Four bytes say how it is fitted, the others are the file; a
// PNG is tried again with its checksums made right, since no fuzzer guesses them.
#include "data/sample_patches.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_PIXELS = 1 << 16 };

static void put_u32(uint8_t *p, uint32_t v) {
  for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (24 - 8 * i));
}

// Makes every chunk's CRC right; false when there is none that was wrong.
static bool png_sign(uint8_t *bytes, size_t n) {
  bool changed = false;
  if (n < 8 || memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) != 0) return false;
  for (size_t at = 8; n - at >= 12;) {
    uint8_t *chunk = bytes + at, crc_bytes[4];
    size_t length = (size_t)chunk[0] << 24 | (size_t)chunk[1] << 16 | (size_t)chunk[2] << 8 | chunk[3];
    if (length > n - at - 12) break;
    uint32_t crc = ~0u;
    for (size_t i = 4; i < 8 + length; i++) {
      crc ^= chunk[i];
      for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    put_u32(crc_bytes, ~crc);
    changed |= memcmp(chunk + 8 + length, crc_bytes, 4) != 0;
    memcpy(chunk + 8 + length, crc_bytes, 4);
    at += 12 + length;
  }
  return changed;
}

static void check_fit(const Image *image, const ImageFit *fit, bool mirror) {
  Error err = {0};
  Image fitted, back;
  ImageGrid grid = image_fit_grid(fit, image->width, image->height);
  if (image_fit(image, fit, &fitted, &err) != 0) fuzz_fail(err.text, __FILE__, __LINE__);
  FUZZ_CHECK(fitted.width == grid.columns * fit->patch && fitted.height == grid.rows * fit->patch);
  size_t n = 3 * (size_t)fitted.width * (size_t)fitted.height;
  uint8_t *patches = xmalloc(n);
  image_to_patches(&fitted, fit->patch, patches);
  back = (Image){fitted.width, fitted.height, xmalloc(n)};
  image_from_patches(patches, fit->patch, &back);
  FUZZ_CHECK(memcmp(back.rgb, fitted.rgb, n) == 0);
  if (mirror) { // twice is the same again
    patches_mirror(patches, grid.rows, grid.columns, fit->patch, back.rgb);
    uint8_t *twice = xmalloc(n);
    patches_mirror(back.rgb, grid.rows, grid.columns, fit->patch, twice);
    FUZZ_CHECK(memcmp(twice, patches, n) == 0);
    free(twice);
  }
  image_free(&back);
  image_free(&fitted);
  free(patches);
}

static void check_image(const uint8_t *bytes, size_t n, const ImageFit *fit, bool mirror) {
  Error err = {0};
  int width = 0, height = 0;
  bool known = image_info(bytes, n, &width, &height, &err) == 0;
  FUZZ_CHECK(known ? width >= 1 && height >= 1 : err.text[0] != 0);
  Image image, second;
  if (image_decode(bytes, n, MAX_PIXELS, &image, &err) != 0) {
    FUZZ_CHECK(!image.rgb && err.text[0]);
    return;
  }
  FUZZ_CHECK(known && image.width == width && image.height == height && (int64_t)width * height <= MAX_PIXELS);
  // The pixels follow from the bytes alone, not from what the heap held before.
  FUZZ_CHECK(image_decode(bytes, n, MAX_PIXELS, &second, &err) == 0);
  FUZZ_CHECK(memcmp(image.rgb, second.rgb, 3 * (size_t)width * (size_t)height) == 0);
  image_free(&second);
  check_fit(&image, fit, mirror);
  image_free(&image);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 4) return 0;
  int patch = 1 + data[0] % 16;
  ImageFit fit = {data[1] & 1 ? IMAGE_ASPECT : IMAGE_SQUARE, patch * (1 + data[2] % 16), patch, data[3]};
  bool mirror = data[1] & 2;
  data += 4;
  size -= 4;
  check_image(data, size, &fit, mirror);
  uint8_t *copy = xmalloc(size ? size : 1); // its exact size: sanitizers see every read past the end
  if (size) memcpy(copy, data, size);
  if (png_sign(copy, size)) check_image(copy, size, &fit, mirror);
  free(copy);
  return 0;
}
