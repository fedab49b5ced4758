#include "data/sample_files.h"

#include "data/paths.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

typedef struct NamedFile {
  const char *name;
  size_t key_bytes;
  int64_t index;
  FileKind kind;
} NamedFile;

static FileKind extension_kind(const char *extension, size_t n) {
  static const struct {
    const char *extension;
    FileKind kind;
  } known[] = {
      {"jpg", FILE_PICTURE},        {"jpeg", FILE_PICTURE},       {"jpe", FILE_PICTURE},
      {"jfif", FILE_PICTURE},       {"png", FILE_PICTURE},        {"webp", FILE_PICTURE_OTHER},
      {"gif", FILE_PICTURE_OTHER},  {"avif", FILE_PICTURE_OTHER}, {"heic", FILE_PICTURE_OTHER},
      {"heif", FILE_PICTURE_OTHER}, {"tif", FILE_PICTURE_OTHER},  {"tiff", FILE_PICTURE_OTHER},
      {"bmp", FILE_PICTURE_OTHER},  {"jxl", FILE_PICTURE_OTHER},  {"txt", FILE_TXT},
      {"json", FILE_JSON},
  };
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (strlen(known[i].extension) == n && strncasecmp(known[i].extension, extension, n) == 0) return known[i].kind;
  return FILE_OTHER;
}

FileKind file_kind(const char *name) {
  const char *dot = strrchr(path_base(name), '.');
  return dot ? extension_kind(dot + 1, strlen(dot + 1)) : FILE_OTHER;
}

// Bytes of the path before the last dot of its base name that is before `end`; 0 when there is none.
static size_t dot_before(const char *name, size_t end) {
  size_t base = (size_t)(path_base(name) - name);
  while (end > base + 1 && name[end - 1] != '.') end--;
  return end > base + 1 ? end - 1 : 0;
}

static size_t key_length(const char *name) {
  size_t n = dot_before(name, strlen(name));
  size_t inner = dot_before(name, n);
  return inner && extension_kind(name + inner + 1, n - inner - 1) <= FILE_PICTURE_OTHER ? inner : n;
}

static int key_compare(const char *a, size_t a_bytes, const char *b, size_t b_bytes) {
  int order = memcmp(a, b, a_bytes < b_bytes ? a_bytes : b_bytes);
  return order ? order : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

static int file_compare(const void *a, const void *b) {
  const NamedFile *x = a, *y = b;
  int order = key_compare(x->name, x->key_bytes, y->name, y->key_bytes);
  return order ? order : (x->index > y->index) - (x->index < y->index);
}

// Whether any of the sorted files has this key.
static bool key_is_there(const NamedFile *file, int64_t n, const char *key, size_t key_bytes) {
  int64_t low = 0, high = n;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    int order = key_compare(file[middle].name, file[middle].key_bytes, key, key_bytes);
    if (order == 0) return true;
    if (order < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return false;
}

static bool is_further_part(const NamedFile *file, int64_t n, const SampleFiles *sample) {
  // At most as many dots as a WebDataset name has; a base name of nothing but dots must not take long.
  enum { MOST_DOTS = 16 };
  const char *name = sample->key;
  size_t end = sample->key_bytes;
  for (int i = 0; i < MOST_DOTS && (end = dot_before(name, end)); i++)
    if (key_is_there(file, n, name, end)) return true;
  return false;
}

static void sample_files_add(SampleFiles *s, const NamedFile *file, const NamedFile *picture) {
  int64_t *place = file->kind == FILE_TXT ? &s->txt : file->kind == FILE_JSON ? &s->json : &s->picture;
  if (file == picture || (*place < 0 && place != &s->picture)) {
    *place = file->index;
  } else {
    if (s->twices++ == 0) s->twice = file->index;
  }
}

// The files of one key.
static SampleFiles sample_files_of(const NamedFile *file, int64_t n) {
  SampleFiles s = {.key = file->name, .key_bytes = file->key_bytes, .picture = -1, .txt = -1, .json = -1, .twice = -1};
  const NamedFile *picture = NULL; // the first that can be decoded, else the first
  for (int64_t i = 0; i < n; i++)
    if (file[i].kind <= FILE_PICTURE_OTHER && (!picture || file[i].kind < picture->kind)) picture = &file[i];
  for (int64_t i = 0; i < n; i++) sample_files_add(&s, &file[i], picture);
  return s;
}

SampleFilesList sample_files_group(const char *const *name, int64_t n) {
  SampleFilesList list = {.first_other = -1};
  NamedFile *file = xmalloc((size_t)n * sizeof *file + 1);
  int64_t files = 0;
  for (int64_t i = 0; i < n; i++) {
    if (path_is_hidden(name[i])) continue;
    FileKind kind = file_kind(name[i]);
    size_t key_bytes = kind == FILE_OTHER ? 0 : key_length(name[i]);
    if (key_bytes > 0)
      file[files++] = (NamedFile){name[i], key_bytes, i, kind};
    else if (list.others++ == 0)
      list.first_other = i;
  }
  if (files > 0) qsort(file, (size_t)files, sizeof *file, file_compare);
  list.of = xmalloc((size_t)files * sizeof *list.of + 1);
  for (int64_t i = 0, end; i < files; i = end) {
    for (end = i + 1;
         end < files && key_compare(file[end].name, file[end].key_bytes, file[i].name, file[i].key_bytes) == 0;)
      end++;
    SampleFiles sample = sample_files_of(file + i, end - i);
    bool whole = sample.picture >= 0 && (sample.txt >= 0 || sample.json >= 0);
    if (whole || !is_further_part(file, files, &sample)) {
      list.of[list.n++] = sample;
      continue;
    }
    if (list.others == 0) list.first_other = file[i].index;
    list.others += end - i;
  }
  free(file);
  return list;
}

void sample_files_free(SampleFilesList *list) {
  free(list->of);
  *list = (SampleFilesList){0};
}
