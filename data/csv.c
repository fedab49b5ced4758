#include "data/csv.h"

#include <stdlib.h>
#include <string.h>

CsvReader csv_open(char *text, size_t n, char delimiter) {
  return (CsvReader){.at = text, .end = text + n, .delimiter = delimiter, .next_line = 1};
}

void csv_close(CsvReader *r) {
  free(r->cell);
  *r = (CsvReader){0};
}

// Where the line at p ends: at its newline, or the carriage return before that.
static char *line_stop(const CsvReader *r, char *p) {
  char *newline = memchr(p, '\n', (size_t)(r->end - p));
  char *stop = newline ? newline : r->end;
  return newline && stop > p && stop[-1] == '\r' ? stop - 1 : stop;
}

// Whether a cell may end at p.
static bool cell_ends(const CsvReader *r, const char *p) {
  if (p == r->end || *p == r->delimiter || *p == '\n') return true;
  return *p == '\r' && (p + 1 == r->end || p[1] == '\n');
}

// The closing quote of the cell whose opening quote is at p; NULL when there is none. In a TSV it must come before the
// next tab, so that a lone quote does not swallow the lines after it.
static char *quote_close(const CsvReader *r, char *p) {
  for (p++; p < r->end; p++) {
    if (*p == '\t' && r->delimiter == '\t') return NULL;
    if (*p != '"') continue;
    if (p + 1 == r->end || p[1] != '"') return p;
    p++;
  }
  return NULL;
}

static void cell_add(CsvReader *r, char *text, size_t bytes) {
  if (r->cells == r->capacity) {
    r->capacity = r->capacity ? 2 * r->capacity : 16;
    r->cell = xrealloc(r->cell, (size_t)r->capacity * sizeof *r->cell);
  }
  r->cell[r->cells++] = (CsvCell){text, bytes};
}

// Adds the cell between the quotes at `open` and `close`, "" made ", its newlines counted.
static void cell_add_quoted(CsvReader *r, char *open, const char *close) {
  char *to = open + 1;
  for (const char *from = open + 1; from < close; from++) {
    if (*from == '"') from++;
    r->next_line += *from == '\n';
    *to++ = *from;
  }
  cell_add(r, open + 1, (size_t)(to - open - 1));
}

// Moves behind the end of the line at p.
static void line_end(CsvReader *r, char *p) {
  char *newline = memchr(p, '\n', (size_t)(r->end - p));
  r->at = newline ? newline + 1 : r->end;
  r->next_line++;
}

// The cells of the line at r->at. Their ends are marked by NULs when the whole record is read, since a mark overwrites
// what is still to be looked at.
static CsvState record_read(CsvReader *r, Error *err) {
  char *line = NULL; // where the line that p is on ends
  for (char *p = r->at;;) {
    if (!line || p > line) line = line_stop(r, p);
    bool last = r->most_cells > 0 && r->cells == r->most_cells - 1;
    char *stop, *close = p < r->end && *p == '"' ? quote_close(r, p) : NULL;
    bool quoted = close && cell_ends(r, close + 1);
    if (p < r->end && *p == '"' && !quoted && r->delimiter != '\t') {
      if (!close) {
        error_set(err, "write \"\" for a quote inside of quotes", "a quote is opened in line %lld and never closed",
                  (long long)r->line);
        return CSV_BAD_FILE;
      }
      error_set(err, NULL, "text follows a closing quote; \"\" stands for a quote inside of quotes");
      for (const char *c = p; c < close; c++) r->next_line += *c == '\n';
      line_end(r, close);
      return CSV_BAD_RECORD;
    }
    if (quoted && !(last && close + 1 < r->end && close[1] == r->delimiter)) {
      cell_add_quoted(r, p, close);
      stop = close + 1;
    } else {
      char *delimiter = last ? NULL : memchr(p, r->delimiter, (size_t)(line - p));
      stop = delimiter ? delimiter : line;
      cell_add(r, p, (size_t)(stop - p));
    }
    if (stop < r->end && *stop == r->delimiter) {
      p = stop + 1;
      continue;
    }
    line_end(r, stop);
    return CSV_RECORD;
  }
}

CsvState csv_next(CsvReader *r, Error *err) {
  for (;;) {
    if (r->at >= r->end) return CSV_END;
    r->cells = 0;
    r->line = r->next_line;
    CsvState state = record_read(r, err);
    if (state != CSV_RECORD) return state;
    if (r->cells == 1 && r->cell[0].bytes == 0) continue; // an empty line
    for (int64_t i = 0; i < r->cells; i++) r->cell[i].text[r->cell[i].bytes] = 0;
    return CSV_RECORD;
  }
}
