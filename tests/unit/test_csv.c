// Tables of captions: what people's programs write, and what they should not have written.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/csv.h"
#include "tests/unit/slow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The records of `text` as one string: cells between brackets, each record with its line; "!" a bad record, "!!" a bad
// file.
static char *read_all(const char *text, size_t n, char delimiter, int64_t most_cells) {
  char *copy = xmalloc(n + 1), *out = NULL; // its exact size: sanitizers see every read past the end
  memcpy(copy, text, n);
  size_t bytes;
  FILE *f = open_memstream(&out, &bytes);
  CsvReader r = csv_open(copy, n, delimiter);
  r.most_cells = most_cells;
  Error err;
  for (CsvState state; (state = csv_next(&r, &err)) != CSV_END;) {
    fprintf(f, "%lld", (long long)r.line);
    for (int64_t i = 0; state == CSV_RECORD && i < r.cells; i++) {
      assert_int_equal(r.cell[i].text[r.cell[i].bytes], 0);
      fprintf(f, "[%.*s]", (int)r.cell[i].bytes, r.cell[i].text);
    }
    if (state != CSV_RECORD) {
      fputs(state == CSV_BAD_FILE ? "!!" : "!", f);
      assert_true(err.text[0]);
    }
    if (state == CSV_BAD_FILE) break;
  }
  csv_close(&r);
  fclose(f);
  free(copy);
  return out;
}

static void expect(const char *text, char delimiter, int64_t most_cells, const char *want) {
  char *got = read_all(text, strlen(text), delimiter, most_cells);
  if (strcmp(got, want) != 0) fail_msg("%s\nis read as %s\nnot as    %s", text, got, want);
  free(got);
}

static void test_csv(void **state) {
  (void)state;
  expect("", ',', 0, "");
  expect("\n\r\n\n", ',', 0, "");
  expect("a,b\nc,d", ',', 0, "1[a][b]2[c][d]");
  expect("a,b\r\n\r\nc,d\r\n", ',', 0, "1[a][b]3[c][d]");
  expect(",\n,,", ',', 0, "1[][]2[][][]");
  expect("a;b,c", ';', 0, "1[a][b,c]");
  expect("\"a\",\"b, \"\"c\"\"\"\n\"\",x", ',', 0, "1[a][b, \"c\"]2[][x]");
  // A cell of several lines; lines are counted through it.
  expect("a,\"one\ntwo\r\n\nthree\"\nb,c\n", ',', 0, "1[a][one\ntwo\r\n\nthree]5[b][c]");
  expect("a, \"b\"", ',', 0, "1[a][ \"b\"]"); // a quote behind a blank is a character
  // Text behind a closing quote spoils its line only; a quote that is never closed would swallow the rest.
  expect("\"a\"b,c\nd,e", ',', 0, "1!2[d][e]");
  expect("\"a\nb\"c,d\ne,f", ',', 0, "1!3[e][f]");
  expect("a,b\nc,\"d\ne,f\n", ',', 0, "1[a][b]2!!");
  expect("\"", ',', 0, "1!!");
}

static void test_tsv(void **state) {
  (void)state;
  expect("a.png\ta cat\nb.png\ta\tb\n", '\t', 2, "1[a.png][a cat]2[b.png][a\tb]");
  // As pandas writes it.
  expect("a.png\t\"a \"\"quoted\"\" caption\"\n", '\t', 2, "1[a.png][a \"quoted\" caption]");
  expect("a.png\t\"two\nlines\"\nb.png\tx", '\t', 2, "1[a.png][two\nlines]3[b.png][x]");
  expect("\"a\tb.png\"\tx", '\t', 2, "1[\"a][b.png\"\tx]"); // a tab within quotes is not looked for
  // As people write it: quotes that do not enclose the cell are characters, and swallow nothing.
  expect("a.png\t\"tis a cat\nb.png\tsaid \"hello\"\nc.png\tx", '\t', 2,
         "1[a.png][\"tis a cat]2[b.png][said \"hello\"]3[c.png][x]");
  expect("a.png\t\"a\" and \"b\"\n", '\t', 2, "1[a.png][\"a\" and \"b\"]");
  expect("a.png\t\"a\"\tb\n", '\t', 2, "1[a.png][\"a\"\tb]");
  expect("a.png\t\"", '\t', 2, "1[a.png][\"]");
  expect("\"\"\t\"\"\"\"", '\t', 2, "1[][\"]");
  expect("no tab\n\t\n", '\t', 2, "1[no tab]2[][]");
}

static uint32_t rng_state = 5;

static uint32_t rng(void) {
  rng_state = rng_state * 1664525u + 1013904223u;
  return rng_state >> 8;
}

// Any cells, written by the rules, come back.
static void test_round_trip(void **state) {
  (void)state;
  for (int trial = 0; trial < 3000; trial++) {
    char delimiter = ",;\t"[trial % 3], *text = NULL, *want = NULL;
    size_t n, m;
    FILE *f = open_memstream(&text, &n), *w = open_memstream(&want, &m);
    int line = 1, columns = 2 + (int)(rng() % 3);
    for (int record = 0; record < 4; record++) {
      fprintf(w, "%d", line);
      for (int i = 0; i < columns; i++) {
        char cell[9];
        size_t bytes = 1 + rng() % 8;
        // Tabs in a TSV's cells are not kept by anyone.
        for (size_t k = 0; k < bytes; k++) cell[k] = "ab\" \n,;\t"[rng() % (delimiter == '\t' ? 7 : 8)];
        fprintf(w, "[%.*s]", (int)bytes, cell);
        if (i) fputc(delimiter, f);
        fputc('"', f);
        for (size_t k = 0; k < bytes; k++) {
          if (cell[k] == '"') fputc('"', f);
          line += cell[k] == '\n';
          fputc(cell[k], f);
        }
        fputc('"', f);
      }
      fputs(trial & 1 ? "\r\n" : "\n", f);
      line++;
    }
    fclose(f);
    fclose(w);
    char *got = read_all(text, n, delimiter, delimiter == '\t' ? columns : 0);
    if (strcmp(got, want) != 0) fail_msg("%s\nis read as %s\nnot as    %s", text, got, want);
    free(got);
    free(text);
    free(want);
  }
}

// Any bytes end, and within time in proportion to their number.
static void test_hostile(void **state) {
  (void)state;
  for (int trial = 0; trial < 5000; trial++) {
    char text[64];
    size_t n = rng() % sizeof text;
    for (size_t i = 0; i < n; i++) text[i] = "a\"\"\n\r,\t\0"[rng() % 8];
    free(read_all(text, n, ",\t"[trial & 1], trial & 2 ? 2 : 0));
  }
  enum { LARGE = 1 << 22 };
  const char *const patterns[] = {",",     "\"",       "\"\"",     "\"\n",         "\"\"\n",
                                  "\"a\n", "\"a\"b\n", "a\t\"b\n", "a\t\"\"\"b\n", "\t"};
  char *text = xmalloc(LARGE);
  for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
    for (int tabs = 0; tabs < 2; tabs++) {
      size_t length = strlen(patterns[i]);
      for (size_t k = 0; k < LARGE; k++) text[k] = patterns[i][k % length];
      double start = cpu_seconds();
      CsvReader r = csv_open(text, LARGE - 1, tabs ? '\t' : ',');
      r.most_cells = tabs ? 2 : 0;
      Error err;
      CsvState state_of;
      while ((state_of = csv_next(&r, &err)) != CSV_END && state_of != CSV_BAD_FILE) continue;
      csv_close(&r);
      double took = cpu_seconds() - start;
      if (took > 1 * TIMES_SLOWER) fail_msg("4 MB of %s take %.1f s", patterns[i], took);
    }
  free(text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_csv),
      cmocka_unit_test(test_tsv),
      cmocka_unit_test(test_round_trip),
      cmocka_unit_test(test_hostile),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
