#include "trainer/output/grid.h"

#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_easy_font.h>
#pragma GCC diagnostic pop

enum {
  MARGIN = 8,        // pixels around the sheet and between cells
  LINE = 12,         // pixels of a line of text, as the font has it
  CAPTION_LINES = 4, // most
  LINE_CHARS = 96,   // most characters of a line
  MIN_CELL = 64,     // pixels, so that a caption under a tiny image can be read
  BACKGROUND = 250,  // grey levels
  INK = 40,
  FRAME = 205
};

// ---- text ----

// Printable ASCII of at most `room` bytes, its NUL included: one '?' for every other character.
static void text_to_ascii(const char *text, char *out, size_t room) {
  size_t n = 0;
  for (const unsigned char *at = (const unsigned char *)text; *at && n + 1 < room; at++) {
    if ((*at & 0xC0) == 0x80) continue; // inside a character
    out[n++] = (char)(*at >= 32 && *at < 127 ? *at : *at == '\n' || *at == '\t' ? ' ' : '?');
  }
  out[n] = 0;
}

static int text_width(const char *ascii) {
  char line[LINE_CHARS + 1];
  snprintf(line, sizeof line, "%s", ascii);
  return stb_easy_font_width(line);
}

static void text_draw(Image *sheet, int x, int y, const char *ascii) {
  alignas(16) char quads[LINE_CHARS * 512]; // about 270 bytes a character
  char line[LINE_CHARS + 1];
  snprintf(line, sizeof line, "%s", ascii);
  int n = stb_easy_font_print((float)x, (float)y, line, NULL, quads, sizeof quads);
  for (int i = 0; i < n; i++) { // a quad: four corners of (x, y, z, colour), the third opposite to the first
    float from[2], to[2];
    memcpy(from, quads + 64 * i, sizeof from);
    memcpy(to, quads + 64 * i + 32, sizeof to);
    for (int v = (int)from[1]; v < (int)to[1]; v++)
      for (int u = (int)from[0]; u < (int)to[0]; u++)
        if (u >= 0 && v >= 0 && u < sheet->width && v < sheet->height)
          memset(sheet->rgb + 3 * ((size_t)v * (size_t)sheet->width + (size_t)u), INK, 3);
  }
}

typedef struct Lines {
  char line[CAPTION_LINES][LINE_CHARS + 1];
  int n;
} Lines;

// Takes the longest beginning of `at` that is no wider than `width`, at a space where there is one; at least one
// character.
static int line_length(const char *at, int width) {
  int fits = 0, space = 0;
  char line[LINE_CHARS + 1];
  for (int n = 1; at[n - 1] && n <= LINE_CHARS; n++) {
    memcpy(line, at, (size_t)n);
    line[n] = 0;
    if (n > 1 && text_width(line) > width) break;
    fits = n;
    if (at[n] == ' ' || !at[n]) space = n;
  }
  return space ? space : fits;
}

static void line_ellipsize(char *line, int width) {
  size_t n = min_i64((int64_t)strlen(line), LINE_CHARS - 3);
  for (;; n--) {
    memcpy(line + n, "...", 4);
    if (n == 0 || text_width(line) <= width) return;
  }
}

static Lines lines_wrap(const char *text, int width) {
  Lines out = {.n = 0};
  char ascii[CAPTION_LINES * LINE_CHARS + 2];
  text_to_ascii(text, ascii, sizeof ascii);
  const char *at = ascii;
  for (;;) {
    at += strspn(at, " ");
    if (!*at) return out;
    int n = line_length(at, width);
    char *line = out.line[out.n++];
    memcpy(line, at, (size_t)n);
    line[n] = 0;
    at += n;
    if (out.n < CAPTION_LINES) continue;
    if (at[strspn(at, " ")]) line_ellipsize(line, width);
    return out;
  }
}

// ---- pixels ----

static void fill(Image *sheet, int x, int y, int width, int height, uint8_t level) {
  for (int v = y; v < y + height; v++)
    memset(sheet->rgb + 3 * ((size_t)v * (size_t)sheet->width + (size_t)x), level, 3 * (size_t)width);
}

static void image_draw(Image *sheet, int x, int y, const Image *image, int scale) {
  int width = image->width * scale, height = image->height * scale;
  fill(sheet, x - 1, y - 1, width + 2, height + 2, FRAME);
  for (int v = 0; v < height; v++) {
    const uint8_t *from = image->rgb + 3 * (size_t)(v / scale) * (size_t)image->width;
    uint8_t *to = sheet->rgb + 3 * ((size_t)(y + v) * (size_t)sheet->width + (size_t)x);
    for (int u = 0; u < width; u++) memcpy(to + 3 * u, from + 3 * (u / scale), 3);
  }
}

// ---- layout ----

typedef struct Layout {
  int columns, scale;
  int cell; // width
} Layout;

// Draws cells [n] of one row at y, or with `sheet` NULL only measures; returns the row's height.
static int row_place(const Layout *l, const GridCell *cells, int n, Image *sheet, int y) {
  int tallest = 0, lines = 0;
  for (int i = 0; i < n; i++)
    if (cells[i].image) tallest = (int)max_i64(tallest, (int64_t)cells[i].image->height * l->scale);
  for (int i = 0; i < n; i++) {
    int left = MARGIN + i * (l->cell + MARGIN);
    const Image *image = cells[i].image;
    if (sheet && image)
      image_draw(sheet, left + (l->cell - image->width * l->scale) / 2, y + (tallest - image->height * l->scale) / 2,
                 image, l->scale);
    if (!cells[i].caption) continue;
    Lines caption = lines_wrap(cells[i].caption, l->cell);
    lines = (int)max_i64(lines, caption.n);
    for (int k = 0; sheet && k < caption.n; k++) text_draw(sheet, left, y + tallest + 4 + k * LINE, caption.line[k]);
  }
  return tallest + (lines ? 4 + lines * LINE : 0) + MARGIN;
}

// The same for a whole section.
static int64_t section_place(const Layout *l, const GridSection *s, Image *sheet, int64_t y) {
  int64_t start = y;
  int width = l->columns * (l->cell + MARGIN) - MARGIN;
  if (s->title) {
    Lines title = lines_wrap(s->title, width);
    for (int k = 0; sheet && k < title.n; k++) text_draw(sheet, MARGIN, (int)y + k * LINE, title.line[k]);
    y += title.n * LINE;
    if (sheet) fill(sheet, MARGIN, (int)y, width, 1, INK);
    y += MARGIN;
  }
  if (s->column_title) {
    for (int i = 0; sheet && i < l->columns; i++) {
      Lines title = lines_wrap(s->column_title[i], l->cell);
      if (title.n) text_draw(sheet, MARGIN + i * (l->cell + MARGIN), (int)y, title.line[0]);
    }
    y += LINE + 2;
  }
  for (int at = 0; at < s->n; at += l->columns)
    y += row_place(l, s->cells + at, (int)min_i64(l->columns, s->n - at), sheet, (int)y);
  return y - start;
}

int grid_write(const char *path, const GridSection *sections, int n_sections, int columns, int scale, Error *err) {
  int64_t cell = MIN_CELL, height = MARGIN;
  for (int i = 0; i < n_sections; i++)
    for (int k = 0; k < sections[i].n; k++) {
      const Image *image = sections[i].cells[k].image;
      if (!image) continue;
      cell = max_i64(cell, (int64_t)image->width * scale);
      // Bounds what section_place adds up in int.
      height = max_i64(height, (int64_t)image->height * scale);
    }
  int64_t width = MARGIN + columns * (cell + MARGIN);
  Layout l = {.columns = columns, .scale = scale, .cell = (int)cell};
  if (width <= IMAGE_MAX_PIXELS && height <= IMAGE_MAX_PIXELS) {
    height = MARGIN;
    for (int i = 0; i < n_sections; i++) height += section_place(&l, &sections[i], NULL, height);
  }
  if (width > IMAGE_MAX_PIXELS || height > IMAGE_MAX_PIXELS / width)
    return error_set(err, "write fewer or smaller images", "%s: a sheet of %lld x %lld pixels is too large", path,
                     (long long)width, (long long)height);
  Image sheet = {.width = (int)width, .height = (int)height, .rgb = xmalloc(3 * (size_t)width * (size_t)height)};
  fill(&sheet, 0, 0, sheet.width, sheet.height, BACKGROUND);
  int64_t y = MARGIN;
  for (int i = 0; i < n_sections; i++) y += section_place(&l, &sections[i], &sheet, y);
  int failed = image_write_png(path, &sheet, err);
  image_free(&sheet);
  return failed ? -1 : 0;
}
