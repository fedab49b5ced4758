// Picture grids: sizes, pixels, captions.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "trainer/output/grid.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static Image image_random(int width, int height, uint64_t seed) {
  Image image = {.width = width, .height = height};
  int n = 3 * width * height;
  image.rgb = xmalloc((size_t)n);
  for (int i = 0; i < n; i++) image.rgb[i] = (uint8_t)philox4(seed, 0, 0, (uint32_t)i).v[0];
  return image;
}

static Image grid_read(const char *path) {
  Error err;
  size_t n;
  char *bytes = file_read(path, 1 << 26, &n, &err);
  assert_non_null(bytes);
  Image image;
  if (image_decode((uint8_t *)bytes, n, IMAGE_MAX_PIXELS, &image, &err) != 0) fail_msg("%s", err.text);
  free(bytes);
  unlink(path);
  return image;
}

static void test_grid(void **state) {
  (void)state;
  char path[] = "/tmp/tessera-grid-XXXXXX.png";
  int file = mkstemps(path, 4);
  assert_true(file >= 0);
  close(file);
  Error err;
  Image one = image_random(28, 32, 1), small = image_random(8, 8, 2), bar = {1, 300, xcalloc(3, 300)};
  GridCell bare[] = {{&one, NULL}};
  GridSection section = {.cells = bare, .n = 1};
  assert_int_equal(grid_write(path, &section, 1, 2, 3, &err), 0);
  Image sheet = grid_read(path);
  assert_int_equal(sheet.width, 8 + 2 * (28 * 3 + 8));
  assert_int_equal(sheet.height, 8 + 32 * 3 + 8);
  for (int y = 0; y < 96; y++)
    for (int x = 0; x < 84; x++)
      assert_memory_equal(sheet.rgb + 3 * ((8 + y) * sheet.width + 8 + x), one.rgb + 3 * (y / 3 * 28 + x / 3), 3);
  image_free(&sheet);

  // One line of caption, then as many as there are at most, however long it is.
  char endless[5000];
  memset(endless, 'w', sizeof endless - 1);
  endless[sizeof endless - 1] = 0;
  const char *const texts[] = {
      "red",   "caf\xc3\xa9 \xf0\x9f\x98\x80\n\t\x01\xff",
      endless, "many words that are wrapped at spaces and end in dots because they are so many",
      "  ",    "wwwwwww wwwwwww wwwwwww"};
  const int lines[] = {1, 1, 4, 4, 0, 3};
  for (int i = 0; i < 6; i++) {
    GridCell cells[] = {{&one, texts[i]}, {NULL, NULL}, {&small, NULL}};
    const char *const columns[] = {"drawn", "real", texts[i]};
    GridSection sections[] = {{.title = texts[i], .cells = cells, .n = 3},
                              {.title = "real", .column_title = columns, .cells = cells, .n = 1}};
    assert_int_equal(grid_write(path, sections, 2, 3, 3, &err), 0);
    sheet = grid_read(path);
    int row = 96 + (lines[i] ? 4 + 12 * lines[i] : 0) + 8;
    int wide = 3 * (84 + 8) - 8; // titles have the whole width
    int title = i == 2 ? 4 : i == 3 ? 2 : lines[i] > 0;
    assert_int_equal(sheet.width, 8 + wide + 8);
    assert_int_equal(sheet.height, 8 + 12 * title + 8 + row + 12 + 8 + 14 + row);
    int ink = 0; // the caption is there
    for (int y = 8 + 12 * title + 8 + 96 + 2; y < 8 + 12 * title + 8 + row; y++)
      for (int x = 8; x < 8 + 84; x++) ink += sheet.rgb[3 * (y * sheet.width + x)] < 100;
    assert_true((ink > 20) == (lines[i] > 0));
    image_free(&sheet);
  }

  GridCell odd[] = {{&bar, "thin"}, {&small, "under a small one"}};
  section = (GridSection){.cells = odd, .n = 2};
  assert_int_equal(grid_write(path, &section, 1, 1, 1, &err), 0);
  sheet = grid_read(path);
  assert_int_equal(sheet.width, 8 + 64 + 8);
  image_free(&sheet);
  assert_int_equal(grid_write(path, NULL, 0, 1, 1, &err), 0);
  sheet = grid_read(path);
  image_free(&sheet);
  assert_int_equal(grid_write(path, &section, 1, 1, 1 << 20, &err), -1);
  assert_int_equal(grid_write("/nowhere/at/all.png", &section, 1, 1, 1, &err), -1);
  image_free(&one), image_free(&small), image_free(&bar);
}

// Every image of a sheet of several rows lies in its own cell: centred, in rows as high as their tallest.
static void test_cells(void **state) {
  (void)state;
  enum { N = 7, COLUMNS = 3, SCALE = 3, CELL = 23 * SCALE, MARGIN = 8 };
  const int sizes[N][2] = {{4, 6}, {23, 5}, {7, 7}, {9, 30}, {2, 8}, {12, 12}, {5, 3}}; // width, height
  const int tallest[] = {7, 30, 3};
  char path[] = "/tmp/tessera-grid-XXXXXX.png";
  int file = mkstemps(path, 4);
  assert_true(file >= 0);
  close(file);
  Error err;
  Image image[N];
  GridCell cells[N];
  for (int i = 0; i < N; i++) {
    image[i] = image_random(sizes[i][0], sizes[i][1], 10 + (uint64_t)i);
    cells[i] = (GridCell){.image = &image[i]};
  }
  GridSection section = {.cells = cells, .n = N};
  if (grid_write(path, &section, 1, COLUMNS, SCALE, &err) != 0) fail_msg("%s", err.text);
  Image sheet = grid_read(path);
  assert_int_equal(sheet.width, MARGIN + COLUMNS * (CELL + MARGIN));
  int top = MARGIN;
  for (int i = 0; i < N; i++) {
    int row = i / COLUMNS, width = sizes[i][0] * SCALE, height = sizes[i][1] * SCALE;
    if (i && i % COLUMNS == 0) top += tallest[row - 1] * SCALE + MARGIN;
    int x0 = MARGIN + i % COLUMNS * (CELL + MARGIN) + (CELL - width) / 2,
        y0 = top + (tallest[row] * SCALE - height) / 2;
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++)
        assert_memory_equal(sheet.rgb + 3 * ((y0 + y) * sheet.width + x0 + x),
                            image[i].rgb + 3 * (y / SCALE * image[i].width + x / SCALE), 3);
    image_free(&image[i]);
  }
  assert_int_equal(sheet.height, top + tallest[2] * SCALE + MARGIN);
  image_free(&sheet);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_grid), cmocka_unit_test(test_cells)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
