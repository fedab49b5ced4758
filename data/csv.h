// Records of comma- and tab-separated text, unquoted in place.
#ifndef TESSERA_CSV_H
#define TESSERA_CSV_H

#include "base/base.h"

#include <stdbool.h>

typedef struct CsvCell {
  char *text; // [bytes], a NUL after them
  size_t bytes;
} CsvCell;

// CSV (delimiter ',' or ';') is RFC 4180: a cell in quotes may hold anything, "" for a quote; what is wrong with the
// quotes is an error. TSV (delimiter '\t') is plain text, but a cell that begins and ends with a quote is read as
// pandas and spreadsheets write it; a lone quote is a character like any other.
typedef struct CsvReader {
  char *at, *end; // what is still to be read; *end must be writable
  char delimiter;
  int64_t most_cells; // the last one takes all that is left of the line, delimiters included; 0: any number
  int64_t line;       // of the record read last, from 1
  int64_t next_line;
  CsvCell *cell; // [cells]
  int64_t cells, capacity;
} CsvReader;

typedef enum CsvState {
  CSV_RECORD,
  CSV_END,
  CSV_BAD_RECORD, // it is passed over: *err says why
  CSV_BAD_FILE,   // a quote is never closed, so that all behind it would be one cell
} CsvState;

CsvReader csv_open(char *text, size_t n, char delimiter);
// The next line that is not empty, as r->cell.
CsvState csv_next(CsvReader *r, Error *err);
void csv_close(CsvReader *r);
#endif
