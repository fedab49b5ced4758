// What is read of an image before its pixels: its format, which way up it is, and where a file ends.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/image.h"
#include "tests/unit/jpeg_bytes.h"
#include "tests/unit/png_bytes.h"

#include <stdbool.h>
#include <stdlib.h>

enum { WIDTH = 19, HEIGHT = 13 }; // of JPEG_BASELINE, JPEG_PROGRESSIVE and png_plain

static uint32_t rng_state = 99;

static uint32_t rng(void) {
  rng_state = rng_state * 1664525u + 1013904223u;
  return rng_state >> 8;
}

static Bytes bytes_of(const void *from, size_t n) {
  Bytes b = {0};
  bytes_append(&b, from, n);
  return b;
}

static Bytes png_plain(void) {
  uint8_t pixels[3 * WIDTH * HEIGHT];
  for (int i = 0; i < 3 * WIDTH * HEIGHT; i++) pixels[i] = (uint8_t)(i * 31 + i / 7);
  Image image = {WIDTH, HEIGHT, pixels};
  Error err;
  Bytes png;
  png.at = image_encode_png(&image, &png.n, &err);
  assert_non_null(png.at);
  return png;
}

static Bytes base_file(int which) { // 0: PNG; 1, 2: JPEG
  if (which == 0) return png_plain();
  return which == 1 ? bytes_of(JPEG_BASELINE, sizeof JPEG_BASELINE)
                    : bytes_of(JPEG_PROGRESSIVE, sizeof JPEG_PROGRESSIVE);
}

static Image decode_good(const Bytes *file) {
  Error err = {0};
  Image image;
  int width, height;
  if (image_info(file->at, file->n, &width, &height, &err) != 0) fail_msg("%s", err.text);
  if (image_decode(file->at, file->n, 1 << 16, &image, &err) != 0) fail_msg("%s", err.text);
  assert_int_equal(image.width, width);
  assert_int_equal(image.height, height);
  return image;
}

// `file` with bytes put in at `at`.
static Bytes bytes_insert(const Bytes *file, size_t at, const void *more, size_t n) {
  Bytes b = bytes_of(file->at, at);
  bytes_append(&b, more, n);
  bytes_append(&b, file->at + at, file->n - at);
  return b;
}

// With an APP1 segment behind SOI, or a chunk behind IHDR.
static Bytes with_exif(const Bytes *file, bool png, const char *chunk_type, const void *exif, size_t n) {
  Bytes part = {0};
  if (png) {
    png_chunk(&part, chunk_type, exif, n);
  } else {
    uint8_t head[10] = {0xFF, 0xE1, (uint8_t)((n + 8) >> 8), (uint8_t)(n + 8), 'E', 'x', 'i', 'f', 0, 0};
    bytes_append(&part, head, 10);
    bytes_append(&part, exif, n);
  }
  Bytes out = bytes_insert(file, png ? 33 : 2, part.at, part.n);
  free(part.at);
  return out;
}

static void put(Bytes *b, bool little, uint32_t v, int bytes) {
  for (int i = 0; i < bytes; i++) {
    uint8_t byte = (uint8_t)(v >> 8 * (little ? i : bytes - 1 - i));
    bytes_append(b, &byte, 1);
  }
}

// A TIFF structure whose first directory has the maker's name, then the orientation.
static Bytes exif_make(bool little, uint32_t type, uint32_t count, uint32_t orientation) {
  Bytes b = {0};
  bytes_append(&b, little ? "II*\0" : "MM\0*", 4);
  put(&b, little, 8, 4);
  put(&b, little, 2, 2);
  put(&b, little, 0x010F, 2);
  put(&b, little, 2, 2);
  put(&b, little, 4, 4);
  bytes_append(&b, "abc", 4);
  put(&b, little, 0x0112, 2);
  put(&b, little, type, 2);
  put(&b, little, count, 4);
  put(&b, little, orientation, type == 3 ? 2 : 4);
  if (type == 3) put(&b, little, 0, 2);
  put(&b, little, 8, 4); // "the next directory" is this one again
  return b;
}

// EXIF 2.32, 4.6.4: where row 0 and column 0 of what is kept are seen. Orientation 6: row 0 is the right-hand side,
// column 0 the top.
static void expect_seen(const Image *kept, const Image *seen, int orientation) {
  static const char *const side[9] = {NULL, "tl", "tr", "br", "bl", "lt", "rt", "rb", "lb"}; // of row 0, of column 0
  const char *row0 = side[orientation];
  bool turns = row0[0] == 'l' || row0[0] == 'r';
  assert_int_equal(seen->width, turns ? kept->height : kept->width);
  assert_int_equal(seen->height, turns ? kept->width : kept->height);
  for (int row = 0; row < kept->height; row++)
    for (int column = 0; column < kept->width; column++) {
      int from_edge[2] = {row, column}, x = 0, y = 0;
      for (int i = 0; i < 2; i++) {
        if (row0[i] == 'l') x = from_edge[i];
        if (row0[i] == 'r') x = seen->width - 1 - from_edge[i];
        if (row0[i] == 't') y = from_edge[i];
        if (row0[i] == 'b') y = seen->height - 1 - from_edge[i];
      }
      assert_memory_equal(seen->rgb + 3 * (y * seen->width + x), kept->rgb + 3 * (row * kept->width + column), 3);
    }
}

static void test_orientation(void **state) {
  (void)state;
  for (int which = 0; which < 3; which++) {
    Bytes file = base_file(which);
    Image kept = decode_good(&file);
    for (int form = 0; form < 4; form++)
      for (int orientation = 1; orientation <= 8; orientation++) {
        Bytes exif = exif_make(form & 1, form & 2 ? 4 : 3, 1, (uint32_t)orientation);
        Bytes marked = with_exif(&file, which == 0, "eXIf", exif.at, exif.n);
        Image seen = decode_good(&marked);
        expect_seen(&kept, &seen, orientation);
        image_free(&seen);
        free(exif.at);
        free(marked.at);
      }
    free(file.at);
    image_free(&kept);
  }
}

// Whatever stands in it, EXIF is no reason to refuse an image, and nonsense leaves it as it lies.
static void test_nonsense_exif(void **state) {
  (void)state;
  for (int which = 0; which < 2; which++) {
    Bytes file = base_file(which);
    Image kept = decode_good(&file);
    Bytes good = exif_make(true, 3, 1, 6);
    for (int trial = 0; trial < 400; trial++) {
      Bytes exif;
      bool nonsense = true;
      if (trial < 8) {
        static const uint32_t bad[8][3] = {{3, 1, 0}, {3, 1, 9}, {3, 1, 65535},      {3, 2, 6},
                                           {2, 1, 6}, {3, 0, 6}, {4, 1, 0x00060000}, {4, 1, 0xFFFFFFFF}};
        exif = exif_make(trial & 1, bad[trial][0], bad[trial][1], bad[trial][2]);
      } else if (trial < 8 + 34) {
        exif = bytes_of(good.at, (size_t)trial - 8); // cut before the orientation's entry ends
      } else if (trial < 60) { // a directory that begins anywhere, also in itself and beyond the end
        static const uint32_t places[] = {0, 4, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFF0};
        uint32_t place = places[trial % 5] == 0x7FFFFFFF ? (uint32_t)good.n - 1 : places[trial % 5];
        exif = bytes_of(good.at, good.n);
        for (int i = 0; i < 4; i++) exif.at[4 + i] = (uint8_t)(place >> 8 * i);
      } else {
        exif = bytes_of(good.at, good.n);
        for (int i = 0; i < 3; i++) exif.at[rng() % exif.n] = (uint8_t)rng();
        nonsense = false;
      }
      Bytes marked = with_exif(&file, which == 0, "eXIf", exif.at, exif.n);
      Image seen = decode_good(&marked);
      if (nonsense) expect_seen(&kept, &seen, 1);
      image_free(&seen);
      free(exif.at);
      free(marked.at);
    }
    free(good.at);
    free(file.at);
    image_free(&kept);
  }
}

// From any beginning of a file the size that the whole of it has, or none: EXIF that comes late must not be missed.
static void test_beginnings(void **state) {
  (void)state;
  for (int which = 0; which < 3; which++) {
    Bytes file = base_file(which), exif = exif_make(false, 3, 1, 8), marked, late;
    marked = with_exif(&file, which == 0, "eXIf", exif.at, exif.n);
    uint8_t profile[300] = {0};
    late = with_exif(&marked, which == 0, "iCCP", profile, sizeof profile); // for a JPEG, EXIF that says nothing
    Error err;
    int width, height, known = 0, expected[2] = {HEIGHT, WIDTH};
    if (which) { // the first EXIF segment counts
      expected[0] = WIDTH;
      expected[1] = HEIGHT;
    }
    for (size_t n = 1; n <= late.n; n++) {
      uint8_t *copy = xmalloc(n); // its exact size: sanitizers see every read past the end
      memcpy(copy, late.at, n);
      int rc = image_info(copy, n, &width, &height, &err);
      free(copy);
      if (rc != 0) continue;
      known++;
      assert_int_equal(width, expected[0]);
      assert_int_equal(height, expected[1]);
    }
    assert_true(known > 50);
    assert_int_equal(image_info(late.at, 200, &width, &height, &err), 1);
    free(file.at);
    free(exif.at);
    free(marked.at);
    free(late.at);
  }
  // Behind a PNG's pixels it is too late: size and pixels agree that it does not count.
  Bytes png = png_plain(), exif = exif_make(false, 3, 1, 8), chunk = {0};
  png_chunk(&chunk, "eXIf", exif.at, exif.n);
  Bytes behind = bytes_insert(&png, png.n - 12, chunk.at, chunk.n);
  Image seen = decode_good(&behind);
  assert_int_equal(seen.width, WIDTH);
  image_free(&seen);
  free(png.at);
  free(exif.at);
  free(chunk.at);
  free(behind.at);
}

// What looks like a Huffman table of 4,080 symbols.
static const uint8_t TABLE[21] = {0xFF, 0xC4, 1,    0,    0,    0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF,
                                  0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};

// Phones put a video behind the picture, cameras a second picture; and a segment of an application holds any bytes.
static void test_foreign_bytes(void **state) {
  (void)state;
  for (int which = 1; which < 3; which++) {
    Bytes file = base_file(which), behind = bytes_of(file.at, file.n), inside;
    Image plain = decode_good(&file);
    bytes_append(&behind, TABLE, sizeof TABLE);
    bytes_append(&behind, JPEG_BASELINE, sizeof JPEG_BASELINE);
    Image seen = decode_good(&behind);
    assert_memory_equal(seen.rgb, plain.rgb, 3 * WIDTH * HEIGHT);
    image_free(&seen);
    const uint8_t markers[] = {0xE1, 0xE2, 0xEF, 0xFE};
    for (int i = 0; i < 4; i++) {
      uint8_t segment[4 + sizeof TABLE] = {0xFF, markers[i], 0, 2 + sizeof TABLE};
      memcpy(segment + 4, TABLE, sizeof TABLE);
      inside = bytes_insert(&file, 2, segment, sizeof segment);
      seen = decode_good(&inside);
      assert_memory_equal(seen.rgb, plain.rgb, 3 * WIDTH * HEIGHT);
      image_free(&seen);
      free(inside.at);
    }
    // A table itself is looked at wherever the decoder would meet it, and must lie within its segment.
    for (int shorter = 0; shorter < 2; shorter++) {
      uint8_t table[2 + 19];
      memcpy(table, TABLE, sizeof table);
      table[2] = 0;
      table[3] = shorter ? 10 : 19;
      if (shorter) memset(table + 5, 0, 16);
      inside = bytes_insert(&file, 2, table, sizeof table);
      Error err;
      Image none;
      assert_int_equal(image_decode(inside.at, inside.n, 1 << 16, &none, &err), -1);
      assert_non_null(strstr(err.text, "Huffman"));
      free(inside.at);
    }
    free(file.at);
    free(behind.at);
    image_free(&plain);
  }
}

// Files that are not decoded are called by their names.
static void test_formats(void **state) {
  (void)state;
  static const struct {
    const char *bytes, *name;
    size_t n;
  } files[] = {
      {"GIF89a\1\0\1\0\0\0\0", "GIF", 13},
      {"RIFF\x24\0\0\0WEBPVP8 ", "WebP", 16},
      {"\0\0\0\x20"
       "ftypavif\0\0\0\0",
       "AVIF", 16},
      {"\0\0\0\x18"
       "ftypheic\0\0\0\0",
       "HEIC", 16},
      {"\0\0\0\x18"
       "ftypmp42\0\0\0\0",
       "video", 16},
      {"II*\0\x08\0\0\0", "TIFF", 8},
      {"MM\0*\0\0\0\x08", "TIFF", 8},
      {"BM\x36\0\0\0", "BMP", 6},
      {"\xFF\x0A\xFA\x1F", "JPEG XL", 4},
      {"<!DOCTYPE html><p>404", "HTML", 21},
      {"\xEF\xBB\xBF  <svg xmlns", "SVG", 14},
      {"version https://git-lfs.github.com/spec/v1\n", "Git LFS", 43},
      {"plain words", "neither a JPEG nor a PNG", 11},
      {"\xFF\xFF\xD8\xFF", "neither a JPEG nor a PNG", 4},
      {"G", "neither a JPEG nor a PNG", 1},
  };
  for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
    Error err = {0};
    Image image;
    int width, height;
    const uint8_t *bytes = (const uint8_t *)files[i].bytes;
    assert_int_equal(image_info(bytes, files[i].n, &width, &height, &err), -1);
    if (!strstr(err.text, files[i].name)) fail_msg("%s: %s", files[i].name, err.text);
    assert_int_equal(image_decode(bytes, files[i].n, 1 << 16, &image, &err), -1);
    if (!strstr(err.text, files[i].name)) fail_msg("%s: %s", files[i].name, err.text);
    assert_non_null(strstr(err.hint, "JPEG or PNG"));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_orientation),   cmocka_unit_test(test_nonsense_exif), cmocka_unit_test(test_beginnings),
      cmocka_unit_test(test_foreign_bytes), cmocka_unit_test(test_formats),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
