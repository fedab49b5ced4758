// Image decoding, fitting and patches.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/sample_patches.h"
#include "tests/unit/jpeg_bytes.h"
#include "tests/unit/png_bytes.h"
#include "tests/unit/slow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t rng_state = 12345;

static uint32_t rng(void) {
  rng_state = rng_state * 1664525u + 1013904223u;
  return rng_state >> 8;
}

static int rng_in(int low, int high) {
  return low + (int)(rng() % (uint32_t)(high - low + 1));
}

static Image image_random(int width, int height) {
  Image image = {width, height, xmalloc(3 * (size_t)width * (size_t)height)};
  for (int i = 0; i < 3 * width * height; i++) image.rgb[i] = (uint8_t)rng();
  return image;
}

// A PNG of any colour type from unfiltered rows, deflated as one stored block.
static Bytes png_make(uint32_t width, uint32_t height, int depth, int colour_type, const char *palette,
                      size_t palette_bytes, const char *transparency, size_t transparency_bytes, const uint8_t *rows,
                      size_t row_bytes, uint32_t rows_present) {
  Bytes png = {0}, header = {0}, raw = {0}, z = {0};
  bytes_append(&png, "\x89PNG\r\n\x1a\n", 8);
  bytes_append_u32(&header, width);
  bytes_append_u32(&header, height);
  uint8_t tail[5] = {(uint8_t)depth, (uint8_t)colour_type, 0, 0, 0};
  bytes_append(&header, tail, 5);
  png_chunk(&png, "IHDR", header.at, header.n);
  if (palette) png_chunk(&png, "PLTE", palette, palette_bytes);
  if (transparency) png_chunk(&png, "tRNS", transparency, transparency_bytes);
  for (uint32_t y = 0; y < rows_present; y++) {
    bytes_append(&raw, "\0", 1);
    bytes_append(&raw, rows + y * row_bytes, row_bytes);
  }
  uint8_t stored[7] = {0x78, 1, 1, (uint8_t)raw.n, (uint8_t)(raw.n >> 8), (uint8_t)~raw.n, (uint8_t)(~raw.n >> 8)};
  bytes_append(&z, stored, 7);
  uint32_t a = 1, b = 0;
  for (size_t i = 0; i < raw.n; i++) {
    a = (a + raw.at[i]) % 65521;
    b = (b + a) % 65521;
  }
  bytes_append(&z, raw.at, raw.n);
  bytes_append_u32(&z, b << 16 | a);
  png_chunk(&png, "IDAT", z.at, z.n);
  png_chunk(&png, "IEND", NULL, 0);
  free(header.at);
  free(raw.at);
  free(z.at);
  return png;
}

static void expect_pixels(const Bytes *png, int width, int height, const uint8_t *rgb) {
  Error err;
  Image image;
  int w, h;
  assert_int_equal(image_info(png->at, png->n, &w, &h, &err), 0);
  assert_int_equal(w, width);
  assert_int_equal(h, height);
  assert_int_equal(image_decode(png->at, png->n, IMAGE_MAX_PIXELS, &image, &err), 0);
  assert_int_equal(image.width, width);
  assert_int_equal(image.height, height);
  assert_memory_equal(image.rgb, rgb, 3 * (size_t)(width * height));
  image_free(&image);
  assert_null(image.rgb);
}

static void test_png_round_trip(void **state) {
  (void)state;
  for (int trial = 0; trial < 50; trial++) {
    Image image = image_random(rng_in(1, 40), rng_in(1, 40));
    Error err;
    Bytes png;
    png.at = image_encode_png(&image, &png.n, &err);
    assert_non_null(png.at);
    expect_pixels(&png, image.width, image.height, image.rgb);
    free(png.at);
    image_free(&image);
  }
}

static void test_write_file(void **state) {
  (void)state;
  char path[] = "/tmp/tessera-image-XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  Error err;
  Image image = image_random(9, 7);
  assert_int_equal(image_write_png(path, &image, &err), 0);
  Bytes png;
  png.at = (uint8_t *)file_read(path, 1 << 20, &png.n, &err);
  assert_non_null(png.at);
  expect_pixels(&png, 9, 7, image.rgb);
  assert_int_equal(image_write_png("/nonexistent/folder/x.png", &image, &err), -1);
  assert_non_null(strstr(err.text, "/nonexistent/folder/x.png"));
  free(png.at);
  image_free(&image);
  unlink(path);
}

static void test_colour_types(void **state) {
  (void)state;
  // Grey, 8 bit and 1 bit.
  Bytes png = png_make(2, 1, 8, 0, NULL, 0, NULL, 0, (const uint8_t[]){10, 200}, 2, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){10, 10, 10, 200, 200, 200});
  free(png.at);
  png = png_make(3, 1, 1, 0, NULL, 0, NULL, 0, (const uint8_t[]){0xA0}, 1, 1);
  expect_pixels(&png, 3, 1, (const uint8_t[]){255, 255, 255, 0, 0, 0, 255, 255, 255});
  free(png.at);
  // Grey with alpha: over white.
  png = png_make(2, 1, 8, 4, NULL, 0, NULL, 0, (const uint8_t[]){100, 0, 100, 255}, 4, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){255, 255, 255, 100, 100, 100});
  free(png.at);
  // Palette, and palette with a transparent entry.
  png = png_make(2, 2, 8, 3, "\x01\x02\x03\x0a\x0b\x0c", 6, NULL, 0, (const uint8_t[]){0, 1, 1, 0}, 2, 2);
  expect_pixels(&png, 2, 2, (const uint8_t[]){1, 2, 3, 10, 11, 12, 10, 11, 12, 1, 2, 3});
  free(png.at);
  png = png_make(2, 1, 8, 3, "\x01\x02\x03\x0a\x0b\x0c", 6, "\x00\xff", 2, (const uint8_t[]){0, 1}, 2, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){255, 255, 255, 10, 11, 12});
  free(png.at);
  // 16 bit RGB: the high byte counts.
  png = png_make(1, 1, 16, 2, NULL, 0, NULL, 0, (const uint8_t[]){7, 1, 130, 2, 255, 3}, 6, 1);
  expect_pixels(&png, 1, 1, (const uint8_t[]){7, 130, 255});
  free(png.at);
  // Grey and RGB with one transparent colour, of every depth: that colour is white, its neighbours are what they are.
  png = png_make(3, 1, 8, 0, NULL, 0, "\x00\x0a", 2, (const uint8_t[]){9, 10, 200}, 3, 1);
  expect_pixels(&png, 3, 1, (const uint8_t[]){9, 9, 9, 255, 255, 255, 200, 200, 200});
  free(png.at);
  png = png_make(3, 1, 2, 0, NULL, 0, "\x00\x01", 2, (const uint8_t[]){0x18}, 1, 1); // 0, 1, 2
  expect_pixels(&png, 3, 1, (const uint8_t[]){0, 0, 0, 255, 255, 255, 170, 170, 170});
  free(png.at);
  png = png_make(2, 1, 16, 0, NULL, 0, "\x07\x01", 2, (const uint8_t[]){7, 1, 7, 2}, 4, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){255, 255, 255, 7, 7, 7});
  free(png.at);
  png = png_make(2, 1, 8, 2, NULL, 0, "\0\x01\0\x02\0\x03", 6, (const uint8_t[]){1, 2, 3, 1, 2, 4}, 6, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){255, 255, 255, 1, 2, 4});
  free(png.at);
  png = png_make(2, 1, 16, 2, NULL, 0, "\x01\x09\x02\x09\x03\x09", 6,
                 (const uint8_t[]){1, 9, 2, 9, 3, 9, 1, 9, 2, 9, 3, 8}, 12, 1);
  expect_pixels(&png, 2, 1, (const uint8_t[]){255, 255, 255, 1, 2, 3});
  free(png.at);
  // RGBA half transparent: 0 over white at alpha 128 is 127.
  png = png_make(1, 1, 8, 6, NULL, 0, NULL, 0, (const uint8_t[]){0, 255, 100, 128}, 4, 1);
  expect_pixels(&png, 1, 1, (const uint8_t[]){127, 255, (100 * 128 + 255 * 127 + 127) / 255});
  free(png.at);
}

// Palettes of every depth, with and without transparency; a pixel beyond the palette is an error, not a colour.
static void test_palettes(void **state) {
  (void)state;
  for (int trial = 0; trial < 300; trial++) {
    int depth = 1 << trial % 4, width = rng_in(1, 20), height = rng_in(1, 9), entries = rng_in(1, 1 << depth);
    int alphas = rng_in(0, entries), beyond = trial % 5 == 0 && entries < 1 << depth;
    char colours[256 * 3], alpha[256];
    for (int i = 0; i < 3 * entries; i++) colours[i] = (char)rng();
    for (int i = 0; i < alphas; i++) alpha[i] = (char)rng();
    size_t row_bytes = ((size_t)(width * depth) + 7) / 8;
    uint8_t *rows = xcalloc((size_t)height, row_bytes), *rgb = xmalloc(3 * (size_t)(width * height));
    for (int i = 0; i < width * height; i++) {
      int entry = beyond && i == width * height / 2 ? entries : rng_in(0, entries - 1), x = i % width * depth;
      rows[(size_t)(i / width) * row_bytes + (size_t)x / 8] |= (uint8_t)(entry << (8 - depth - x % 8));
      int a = entry < alphas ? (uint8_t)alpha[entry] : 255;
      for (int c = 0; c < 3 && entry < entries; c++)
        rgb[3 * i + c] = (uint8_t)(((uint8_t)colours[3 * entry + c] * a + 255 * (255 - a) + 127) / 255);
    }
    Bytes png = png_make((uint32_t)width, (uint32_t)height, depth, 3, colours, 3 * (size_t)entries,
                         alphas ? alpha : NULL, (size_t)alphas, rows, row_bytes, (uint32_t)height);
    Error err;
    Image image;
    if (beyond) {
      assert_int_equal(image_decode(png.at, png.n, IMAGE_MAX_PIXELS, &image, &err), -1);
      assert_non_null(strstr(err.text, "palette"));
      assert_null(image.rgb);
    } else {
      expect_pixels(&png, width, height, rgb);
    }
    free(png.at);
    free(rows);
    free(rgb);
  }
  // No palette, too many transparencies, a depth that palettes do not have.
  const struct {
    int depth;
    size_t colours, alphas;
  } bad[] = {{8, 0, 0}, {8, 2, 3}, {16, 2, 0}, {8, 257, 0}};
  char many[257 * 3] = {0};
  for (int i = 0; i < 4; i++) {
    Error err;
    Image image;
    Bytes png = png_make(1, 1, bad[i].depth, 3, bad[i].colours ? many : NULL, 3 * bad[i].colours,
                         bad[i].alphas ? many : NULL, bad[i].alphas, (const uint8_t[]){0, 0}, 2, 1);
    assert_int_equal(image_decode(png.at, png.n, IMAGE_MAX_PIXELS, &image, &err), -1);
    assert_null(image.rgb);
    free(png.at);
  }
}

static void test_jpeg(void **state) {
  (void)state;
  const Bytes files[2] = {{(uint8_t *)(uintptr_t)JPEG_BASELINE, sizeof(JPEG_BASELINE)},
                          {(uint8_t *)(uintptr_t)JPEG_PROGRESSIVE, sizeof(JPEG_PROGRESSIVE)}};
  for (int f = 0; f < 2; f++) {
    Error err;
    Image image;
    assert_int_equal(image_decode(files[f].at, files[f].n, IMAGE_MAX_PIXELS, &image, &err), 0);
    assert_int_equal(image.width, 19);
    assert_int_equal(image.height, 13);
    double off = 0;
    for (int i = 0; i < 19 * 13; i++) {
      int want[3] = {i % 19 * 13, i / 19 * 19, 40};
      for (int c = 0; c < 3; c++) off += abs(image.rgb[3 * i + c] - want[c]);
    }
    assert_true(off / (3 * 19 * 13) < 8); // half-size chroma blurs the slopes
    image_free(&image);
  }
}

// A Huffman table of more than 256 symbols, wherever it stands, is refused before stb sees it.
static void test_long_huffman_table(void **state) {
  (void)state;
  uint8_t bytes[sizeof(JPEG_PROGRESSIVE)];
  int tables = 0;
  for (size_t i = 0; i + 21 < sizeof(bytes); i++) {
    if (JPEG_PROGRESSIVE[i] != 0xFF || JPEG_PROGRESSIVE[i + 1] != 0xC4) continue;
    tables++;
    memcpy(bytes, JPEG_PROGRESSIVE, sizeof(bytes));
    bytes[i + 19] = bytes[i + 20] = 200;
    Error err;
    Image image;
    int w, h;
    assert_int_equal(image_decode(bytes, sizeof(bytes), IMAGE_MAX_PIXELS, &image, &err), -1);
    assert_non_null(strstr(err.text, "Huffman"));
    assert_int_equal(image_info(bytes, sizeof(bytes), &w, &h, &err), -1);
  }
  assert_true(tables > 2);
}

static void test_pixel_cap(void **state) {
  (void)state;
  uint8_t row[3] = {1, 2, 3};
  Bytes png = png_make(30000, 20000, 8, 2, NULL, 0, NULL, 0, row, 3, 1);
  Error err;
  int w, h;
  assert_int_equal(image_info(png.at, png.n, &w, &h, &err), 0);
  assert_int_equal(w, 30000);
  assert_int_equal(h, 20000);
  Image image;
  double start = cpu_seconds();
  assert_int_equal(image_decode(png.at, png.n, IMAGE_MAX_PIXELS, &image, &err), -1);
  assert_true(cpu_seconds() - start < 1);
  assert_null(image.rgb);
  assert_non_null(strstr(err.text, "30000 x 20000"));
  free(png.at);
  // The bound itself passes, one less does not.
  Image small = image_random(5, 7);
  png.at = image_encode_png(&small, &png.n, &err);
  assert_int_equal(image_decode(png.at, png.n, 35, &image, &err), 0);
  image_free(&image);
  assert_int_equal(image_decode(png.at, png.n, 34, &image, &err), -1);
  free(png.at);
  image_free(&small);
}

// Damaged files give an error or an image, never a crash; undecodable ones leave a message.
static void test_damage(void **state) {
  (void)state;
  Image image = image_random(19, 13), out;
  Error err;
  Bytes file[3] = {{0},
                   {(uint8_t *)(uintptr_t)JPEG_BASELINE, sizeof(JPEG_BASELINE)},
                   {(uint8_t *)(uintptr_t)JPEG_PROGRESSIVE, sizeof(JPEG_PROGRESSIVE)}};
  file[0].at = image_encode_png(&image, &file[0].n, &err);
  int refused = 0;
  for (int trial = 0; trial < 3000; trial++) {
    const Bytes *f = &file[trial % 3];
    size_t n = rng() % 3 ? f->n : rng() % f->n;
    uint8_t *bytes = xmalloc(n + 1); // heap, exact size: sanitizers see every read past the end
    memcpy(bytes, f->at, n);
    for (int i = rng_in(0, 6); i > 0 && n > 0; i--) bytes[rng() % n] = (uint8_t)rng();
    memset(&err, 0, sizeof(err));
    if (image_decode(bytes, n, 1 << 16, &out, &err) == 0) {
      assert_true(out.width > 0 && out.height > 0 && out.rgb);
      image_free(&out);
    } else {
      assert_null(out.rgb);
      assert_true(err.text[0]);
      refused++;
    }
    free(bytes);
  }
  assert_true(refused > 200);
  uint8_t noise[300];
  for (int i = 0; i < 300; i++) noise[i] = (uint8_t)rng();
  assert_int_equal(image_decode(noise, 300, 1 << 16, &out, &err), -1);
  assert_int_equal(image_decode(noise, 0, 1 << 16, &out, &err), -1);
  assert_int_equal(image_decode((const uint8_t *)"GIF89a\1\0\1\0\0\0\0", 13, 1 << 16, &out, &err), -1);
  free(file[0].at);
  image_free(&image);
}

static void test_grid(void **state) {
  (void)state;
  for (int trial = 0; trial < 30000; trial++) {
    int patch = rng_in(1, 16), side = rng_in(1, 16);
    int width = trial % 7 ? rng_in(1, 3000) : rng_in(1, 9), height = trial % 11 ? rng_in(1, 3000) : rng_in(1, 9);
    ImageFit fit = {IMAGE_SQUARE, side * patch, patch, 0};
    ImageGrid grid = image_fit_grid(&fit, width, height);
    assert_int_equal(grid.rows, side);
    assert_int_equal(grid.columns, side);
    fit.mode = IMAGE_ASPECT;
    fit.max_tokens = trial % 5 ? rng_in(1, 600) : 0;
    int most = fit.max_tokens ? fit.max_tokens : side * side;
    grid = image_fit_grid(&fit, width, height);
    assert_true(grid.rows >= 1 && grid.columns >= 1 && grid.rows * grid.columns <= most);
    ImageGrid turned = image_fit_grid(&fit, height, width);
    if (width != height) {
      assert_int_equal(turned.rows, grid.columns);
      assert_int_equal(turned.columns, grid.rows);
    }
    // Where the cap is far, the shorter side is exact and the longer one rounded.
    int shorter = width < height ? width : height, longer = width < height ? height : width;
    double want = (double)side * longer / shorter;
    if (side * (want + 1) > most) continue;
    int got_short = width < height ? grid.columns : grid.rows, got_long = width < height ? grid.rows : grid.columns;
    assert_int_equal(got_short, side);
    assert_true(got_long >= want - 0.51 && got_long <= want + 0.51);
  }
  ImageFit fit = {IMAGE_ASPECT, 64, 8, 96};
  ImageGrid wide = image_fit_grid(&fit, 65000, 1);
  assert_int_equal(wide.rows, 1);
  assert_int_equal(wide.columns, 96);
}

static void test_fit(void **state) {
  (void)state;
  Error err;
  for (int trial = 0; trial < 100; trial++) {
    int patch = rng_in(1, 8);
    ImageFit fit = {trial % 2 ? IMAGE_ASPECT : IMAGE_SQUARE, patch * rng_in(1, 6), patch, rng_in(1, 60)};
    Image flat = image_random(rng_in(1, 90), rng_in(1, 90)), out;
    for (int i = 3; i < 3 * flat.width * flat.height; i++) flat.rgb[i] = flat.rgb[i % 3];
    ImageGrid grid = image_fit_grid(&fit, flat.width, flat.height);
    assert_int_equal(image_fit(&flat, &fit, &out, &err), 0);
    assert_int_equal(out.width, grid.columns * patch);
    assert_int_equal(out.height, grid.rows * patch);
    for (int i = 0; i < 3 * out.width * out.height; i++) assert_in_range(abs(out.rgb[i] - flat.rgb[i % 3]), 0, 1);
    image_free(&flat);
    image_free(&out);
  }
  // The right size already: not a bit changes.
  ImageFit fit = {IMAGE_SQUARE, 12, 4, 0};
  Image image = image_random(12, 12), same;
  assert_int_equal(image_fit(&image, &fit, &same, &err), 0);
  assert_memory_equal(same.rgb, image.rgb, 3 * 12 * 12);
  image_free(&same);
  image_free(&image);
  // The centre is kept: an image three times as wide as high, black but for its white middle third, comes out white.
  Image wide = {90, 30, xcalloc(90 * 30, 3)};
  for (int y = 0; y < 30; y++) memset(wide.rgb + 3 * (y * 90 + 30), 255, 3 * 30);
  assert_int_equal(image_fit(&wide, &fit, &same, &err), 0);
  for (int i = 0; i < 3 * 12 * 12; i++) assert_int_equal(same.rgb[i], 255);
  image_free(&same);
  image_free(&wide);
  // The same for one three times as high as wide, and for its halves: what is above the middle stays above.
  Image tall = {30, 90, xcalloc(30 * 90, 3)};
  memset(tall.rgb + 3 * 30 * 30, 255, 3 * 30 * 30);
  assert_int_equal(image_fit(&tall, &fit, &same, &err), 0);
  for (int i = 0; i < 3 * 12 * 12; i++) assert_int_equal(same.rgb[i], 255);
  image_free(&same);
  memset(tall.rgb + 3 * 30 * 45, 0, 3 * 30 * 15); // white are rows 30 to 44
  assert_int_equal(image_fit(&tall, &fit, &same, &err), 0);
  for (int i = 0; i < 3 * 12 * 5; i++) assert_int_equal(same.rgb[i], 255);
  for (int i = 3 * 12 * 7; i < 3 * 12 * 12; i++) assert_int_equal(same.rgb[i], 0);
  image_free(&same);
  image_free(&tall);
  // A ramp stays a ramp.
  Image ramp = {64, 64, xmalloc(3 * 64 * 64)};
  for (int i = 0; i < 3 * 64 * 64; i++) ramp.rgb[i] = (uint8_t)(i / 3 % 64 * 4);
  assert_int_equal(image_fit(&ramp, &fit, &same, &err), 0);
  for (int x = 0; x < 12; x++) assert_in_range(abs(same.rgb[3 * (12 * 6 + x)] - (int)((x + 0.5) * 64 / 12 * 4)), 0, 8);
  image_free(&same);
  image_free(&ramp);
}

// Mirrored: each row the other way round, and twice is the same again.
static void test_mirror(void **state) {
  (void)state;
  for (int trial = 0; trial < 20; trial++) {
    int patch = rng_in(1, 5), rows = rng_in(1, 4), columns = rng_in(1, 4), W = columns * patch, H = rows * patch;
    size_t n = 3 * (size_t)W * (size_t)H;
    Image image = image_random(W, H), mirrored = image_random(W, H);
    uint8_t *patches = xmalloc(n), *there = xmalloc(n), *back = xmalloc(n);
    image_to_patches(&image, patch, patches);
    patches_mirror(patches, rows, columns, patch, there);
    image_from_patches(there, patch, &mirrored);
    for (int y = 0; y < H; y++)
      for (int x = 0; x < W; x++)
        assert_memory_equal(mirrored.rgb + 3 * (y * W + x), image.rgb + 3 * (y * W + W - 1 - x), 3);
    patches_mirror(there, rows, columns, patch, back);
    assert_memory_equal(back, patches, n);
    image_free(&image);
    image_free(&mirrored);
    free(patches);
    free(there);
    free(back);
  }
}

static void test_patches(void **state) {
  (void)state;
  for (int trial = 0; trial < 50; trial++) {
    int p = rng_in(1, 9), rows = rng_in(1, 5), columns = rng_in(1, 5);
    Image image = image_random(columns * p, rows * p);
    size_t n = 3 * (size_t)(rows * columns * p * p);
    uint8_t *patches = xmalloc(n);
    image_to_patches(&image, p, patches);
    for (int i = 0; i < 100; i++) {
      int x = rng_in(0, image.width - 1), y = rng_in(0, image.height - 1), c = rng_in(0, 2);
      int patch = y / p * columns + x / p, element = (y % p * p + x % p) * 3 + c;
      assert_int_equal(patches[patch * 3 * p * p + element], image.rgb[(y * image.width + x) * 3 + c]);
    }
    Image back = {image.width, image.height, xcalloc(n, 1)};
    image_from_patches(patches, p, &back);
    assert_memory_equal(back.rgb, image.rgb, n);
    free(patches);
    image_free(&image);
    image_free(&back);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_png_round_trip), cmocka_unit_test(test_write_file),
      cmocka_unit_test(test_colour_types),   cmocka_unit_test(test_palettes),
      cmocka_unit_test(test_jpeg),           cmocka_unit_test(test_long_huffman_table),
      cmocka_unit_test(test_pixel_cap),      cmocka_unit_test(test_damage),
      cmocka_unit_test(test_grid),           cmocka_unit_test(test_fit),
      cmocka_unit_test(test_mirror),         cmocka_unit_test(test_patches),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
