// Thousands of damaged images: each is refused, or decodes to something sane.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "tests/unit/bytes.h"
#include "tests/unit/jpeg_bytes.h"
#include "tests/unit/picture.h"

#include <stdlib.h>
#include <string.h>

enum { MUTATIONS = 2000 };

static uint32_t rng_count;

static uint32_t rng(void) {
  return philox4(21, rng_count++, 99, 0).v[0];
}

static Bytes bytes_copy(const uint8_t *from, size_t n) {
  Bytes b = {0};
  bytes_append(&b, from, n);
  return b;
}

static bool image_is_black(const Image *image) {
  for (int i = 0; i < 3 * image->width * image->height; i++)
    if (image->rgb[i] > 8) return false;
  return true;
}

// Decodes a copy of exact size; the image may be NULL where it must fail.
static bool decode(const uint8_t *bytes, size_t n, Image *image) {
  Error err = {0};
  Bytes copy = bytes_copy(bytes, n);
  bool done = image_decode(copy.at, n, 1 << 16, image, &err) == 0;
  free(copy.at);
  if (!done) assert_true(err.text[0] && !image->rgb);
  return done;
}

// Changes 1 to 6 bytes, and in a third of the cases cuts off or doubles a part.
static Bytes mutate(const Bytes *file) {
  Bytes b = bytes_copy(file->at, file->n);
  for (uint32_t k = rng() % 6 + 1; k > 0; k--) b.at[rng() % b.n] = (uint8_t)rng();
  if (rng() % 6 == 0) b.n = rng() % b.n;
  if (rng() % 6 == 0 && b.n > 2) {
    size_t from = rng() % b.n, length = rng() % (b.n - from);
    b.at = xrealloc(b.at, b.n + length + 1);
    memmove(b.at + from + length, b.at + from, b.n - from);
    b.n += length;
  }
  return b;
}

static void test_png_mutations(void **state) {
  const int trials = *(const int *)*state;
  Image image, original;
  Bytes file = {0};
  file.at = png_make(48, 40, 3, &file.n);
  assert_true(decode(file.at, file.n, &original));
  int same = 0;
  for (int trial = 0; trial < trials; trial++) {
    Bytes b = mutate(&file);
    if (decode(b.at, b.n, &image)) { // the change hit nothing that matters, or it would have been found
      assert_int_equal(image.width, original.width);
      assert_int_equal(image.height, original.height);
      assert_memory_equal(image.rgb, original.rgb, 3 * 48 * 40);
      same++;
      image_free(&image);
    }
    free(b.at);
  }
  print_message("%d mutations of a PNG: %d refused, %d the same picture\n", trials, trials - same, same);
  assert_true(same < trials / 20);
  for (size_t n = 0; n < file.n; n++) assert_false(decode(file.at, n, &image)); // cut anywhere
  free(file.at);
  image_free(&original);
}

static void test_jpeg_mutations(void **state) {
  const int trials = *(const int *)*state;
  Bytes files[2] = {bytes_copy(JPEG_BASELINE, sizeof JPEG_BASELINE),
                    bytes_copy(JPEG_PROGRESSIVE, sizeof JPEG_PROGRESSIVE)};
  for (int f = 0; f < 2; f++) {
    int decoded = 0;
    Image image, again;
    for (int trial = 0; trial < trials; trial++) {
      Bytes b = mutate(&files[f]);
      if (decode(b.at, b.n, &image)) {
        decoded++;
        assert_false(image_is_black(&image));
        assert_true(decode(b.at, b.n, &again)); // and always the same pixels
        assert_int_equal(image.width * image.height, again.width * again.height);
        assert_memory_equal(image.rgb, again.rgb, 3 * (size_t)image.width * (size_t)image.height);
        image_free(&image);
        image_free(&again);
      }
      free(b.at);
    }
    print_message("%d mutations of a %s JPEG: %d refused, %d decoded, none black\n", trials,
                  f ? "progressive" : "baseline", trials - decoded, decoded);
    assert_true(decoded > trials / 40 && decoded < trials - trials / 40);
    for (size_t n = 0; n < files[f].n; n++) assert_false(decode(files[f].at, n, &image)); // cut anywhere
    free(files[f].at);
  }
}

// The file without its segments of one kind (a scan's coded bytes included), or with them `times` times.
static Bytes jpeg_repeat(const uint8_t *from, size_t n, int marker, int times) {
  Bytes out = {0};
  bytes_append(&out, from, 2);
  for (size_t p = 2; p + 2 <= n;) {
    size_t end = from[p + 1] == 0xD9 ? p + 2 : p + 2 + (size_t)(from[p + 2] << 8 | from[p + 3]);
    if (from[p + 1] == 0xDA)
      while (from[end] != 0xFF || from[end + 1] == 0) end++;
    for (int k = from[p + 1] == marker ? times : 1; k > 0; k--) bytes_append(&out, from + p, end - p);
    p = end;
  }
  return out;
}

// stb_image takes all of these for pictures, or would be busy with them for a very long time.
static void test_jpeg_structure(void **state) {
  (void)state;
  static const struct {
    int marker, times;
    bool baseline, progressive; // whether it decodes
  } cases[] = {
      {0xE0, 1, true, true},    {0xE0, 0, true, true},   {0xDA, 0, false, false}, {0xDB, 0, false, false},
      {0xC4, 0, false, false},  {0xC0, 0, false, true},  {0xC2, 0, true, false},  {0xC0, 2, false, true},
      {0xDA, 30, false, false}, {0xD9, 0, false, false},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    for (int progressive = 0; progressive < 2; progressive++) {
      const uint8_t *file = progressive ? JPEG_PROGRESSIVE : JPEG_BASELINE;
      size_t n = progressive ? sizeof JPEG_PROGRESSIVE : sizeof JPEG_BASELINE;
      int times = cases[i].marker == 0xDA && cases[i].times && !progressive ? 200 : cases[i].times;
      Bytes b = jpeg_repeat(file, n, cases[i].marker, times);
      Image image;
      bool decoded = decode(b.at, b.n, &image);
      if (decoded != (progressive ? cases[i].progressive : cases[i].baseline))
        fail_msg("marker %02x %d times, progressive %d: decoded %d", cases[i].marker, times, progressive, decoded);
      image_free(&image);
      free(b.at);
    }
}

// test_damaged_images [MUTATIONS]: that many of each image.
int main(int argc, char **argv) {
  int mutations = argc > 1 ? atoi(argv[1]) : MUTATIONS;
  if (mutations < MUTATIONS) panic("at least %d mutations, not %s", MUTATIONS, argv[1]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(test_png_mutations, &mutations),
      cmocka_unit_test_prestate(test_jpeg_mutations, &mutations),
      cmocka_unit_test(test_jpeg_structure),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
