// A scratch folder for a test program, tar archives made by hand in it, and what a source left out of them. Included
// after cmocka.h.
#ifndef TESSERA_TEST_ARCHIVE_H
#define TESSERA_TEST_ARCHIVE_H

#include "data/source.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- a scratch folder

static char scratch[64];
static char scratch_paths[8][256];

static inline int scratch_begin(void **state) {
  (void)state;
  strcpy(scratch, "/tmp/tessera-test-XXXXXX");
  return mkdtemp(scratch) ? 0 : -1;
}

static inline int scratch_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
  (void)st, (void)type, (void)ftw;
  return remove(path);
}

static inline int scratch_end(void **state) {
  (void)state;
  return nftw(scratch, scratch_remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

// scratch/name, in one of eight buffers used in turn.
static inline const char *at(const char *name) {
  static int turn;
  char *path = scratch_paths[turn++ % 8];
  snprintf(path, 256, "%s/%s", scratch, name);
  return path;
}

static inline void write_bytes(const char *name, const void *bytes, size_t n) {
  FILE *f = fopen(at(name), "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  fclose(f);
}

static inline void write_text(const char *name, const char *text) {
  write_bytes(name, text, strlen(text));
}

// ---- archives made by hand

typedef struct Archive {
  uint8_t *bytes;
  size_t n;
} Archive;

static inline void archive_append(Archive *a, const void *data, size_t n) {
  size_t padded = (n + 511) / 512 * 512;
  a->bytes = xrealloc(a->bytes, a->n + padded + 1);
  memset(a->bytes + a->n, 0, padded);
  if (n) memcpy(a->bytes + a->n, data, n);
  a->n += padded;
}

static inline void header_sign(uint8_t *h) {
  memset(h + 148, ' ', 8);
  unsigned sum = 0;
  for (int i = 0; i < 512; i++) sum += h[i];
  snprintf((char *)h + 148, 8, "%06o", sum);
}

static inline void archive_header(Archive *a, const char *name, const char *prefix, char type, size_t size) {
  uint8_t h[512] = {0};
  memcpy(h, name, strlen(name)); // at most 100 bytes; no NUL after a name that fills its field
  memcpy(h + 100, "0000644", 7);
  char octal[32];
  snprintf(octal, sizeof(octal), "%011zo", size);
  memcpy(h + 124, octal, 11);
  h[156] = (uint8_t)type;
  memcpy(h + 257,
         "ustar\0"
         "00",
         8);
  memcpy(h + 345, prefix, strlen(prefix));
  header_sign(h);
  archive_append(a, h, 512);
}

static inline void archive_file(Archive *a, const char *name, const void *data, size_t n) {
  archive_header(a, name, "", '0', n);
  archive_append(a, data, n);
}

static inline void archive_text(Archive *a, const char *name, const char *text) {
  archive_file(a, name, text, strlen(text));
}

static inline void archive_end(Archive *a) {
  uint8_t zeros[1024] = {0};
  archive_append(a, zeros, sizeof(zeros));
}

static inline void archive_write(Archive *a, const char *name) {
  write_bytes(name, a->bytes, a->n);
  free(a->bytes);
  *a = (Archive){0};
}

// ---- sources

// Samples left out, whatever the reason.
static inline int64_t samples_left_out(const Source *s) {
  SourceStats stats = source_stats(s);
  return unused_total(&stats.unused);
}
#endif
