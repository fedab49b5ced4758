// Captions and texts in every form a source takes them: byte 0 says which, byte 1 what held-out samples go by, the
// others are the file.
#include "tests/fuzz/fuzz.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A member of a tar archive, padded; returns where it ends.
static uint8_t *tar_member(uint8_t *at, const char *name, const void *data, size_t n) {
  memset(at, 0, 512);
  strcpy((char *)at, name);
  snprintf((char *)at + 124, 12, "%011zo", n);
  at[156] = '0';
  memset(at + 148, ' ', 8);
  unsigned sum = 0;
  for (int i = 0; i < 512; i++) sum += at[i];
  snprintf((char *)at + 148, 8, "%06o", sum);
  size_t padded = (n + 511) / 512 * 512;
  memset(at + 512, 0, padded);
  if (n) memcpy(at + 512, data, n);
  return at + 512 + padded;
}

static void shard(const char *member, const uint8_t *data, size_t n, const char *held_out_by) {
  size_t png_bytes;
  uint8_t *png = fuzz_png(&png_bytes), *tar = xmalloc(n + png_bytes + 4096);
  uint8_t *end = tar_member(tar, "a.png", png, png_bytes);
  end = tar_member(end, member, data, n);
  fuzz_source("webdataset", fuzz_memory(tar, (size_t)(end - tar)), held_out_by);
  free(tar);
  free(png);
}

// A file of a folder that holds a.png, opened as the folder or by itself.
static void folder(const char *name, const uint8_t *data, size_t n, bool whole, const char *held_out_by) {
  size_t png_bytes;
  uint8_t *png = fuzz_png(&png_bytes);
  free(fuzz_file("a.png", png, png_bytes));
  free(png);
  char *path = fuzz_file(name, data, n), *folder = fuzz_path(".");
  fuzz_source(whole ? "folder" : "text", whole ? folder : path, held_out_by);
  unlink(path);
  free(folder);
  free(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const struct {
    const char *name;
    enum { LIST, TEXT, MEMBER } as;
  } forms[] = {{"captions.tsv", LIST}, {"captions.jsonl", LIST}, {"docs.jsonl", TEXT},   {"docs.txt", TEXT},
               {"a.json", MEMBER},     {"a.txt", MEMBER},        {"metadata.csv", LIST}, {"metadata.jsonl", LIST},
               {"a.txt", LIST},        {"a.json", LIST}};
  static const char *const by[] = {"key", "caption", "k"};
  if (size < 2) return 0;
  unsigned form = data[0] % (sizeof forms / sizeof forms[0]);
  const char *held_out_by = by[data[1] % 3];
  if (forms[form].as == MEMBER)
    shard(forms[form].name, data + 2, size - 2, held_out_by);
  else
    folder(forms[form].name, data + 2, size - 2, forms[form].as == LIST, held_out_by);
  return 0;
}
