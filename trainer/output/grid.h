// Sheets of pictures with captions, as PNG files.
#ifndef TESSERA_GRID_H
#define TESSERA_GRID_H

#include "data/image.h"

// image NULL: an empty place; caption NULL: none.
typedef struct GridCell {
  const Image *image;
  const char *caption; // UTF-8; a character outside ASCII is shown as '?'
} GridCell;

// Rows of cells under a title. Images of different sizes stand in the middle of their cell.
typedef struct GridSection {
  const char *title;               // NULL: none
  const char *const *column_title; // [columns] over the columns ("drawn", "real"), NULL: none
  const GridCell *cells;           // [n], row by row
  int n;
} GridSection;

// Writes the sections one below the other, `columns` >= 1 cells a row, pixels repeated `scale` >= 1 times, each caption
// below its image in up to four lines, then cut with "...". -1 with *err set when the sheet would have more than
// IMAGE_MAX_PIXELS or the file cannot be written.
int grid_write(const char *path, const GridSection *sections, int n_sections, int columns, int scale, Error *err);
#endif
