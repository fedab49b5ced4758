#include "base/hash.h"
#include "data/image.h"
#include "data/paths.h"
#include "data/source_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const SourceType types[] = {{"folder", folder_index}, {"webdataset", shards_index}, {"text", text_index}};

static int source_index(Source *s, const char *type, Error *err) {
  for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
    if (strcmp(type, types[i].name) == 0) return types[i].index(s, err);
  char hint[sizeof err->hint] = "data.sources[].type is one of";
  for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
    size_t n = strlen(hint);
    snprintf(hint + n, sizeof hint - n, "%s \"%s\"", i ? "," : "", types[i].name);
  }
  return error_set(err, hint, "no source type \"%s\"", type);
}

// 0 when there are samples; else -1 and *err names why there are none.
static int source_check_any(const Source *s, Error *err) {
  if (s->count > 0) return 0;
  char *unused = unused_print(&s->unused);
  const char *first = "";
  for (int i = UNUSED_FILE - 1; i >= 0; i--)
    if (s->unused.first[i]) first = s->unused.first[i];
  error_set(err, first[0] ? "mend the first, then the others" : NULL, "%s has no usable sample%s%s%s%.400s", s->path,
            unused[0] ? " (" : "", unused, unused[0] ? "): " : "", first);
  free(unused);
  return -1;
}

Source *source_open(const char *type, const char *path, const char *held_out_by, Error *err) {
  Source *s = xcalloc(1, sizeof(Source));
  char *home = path_home(path);
  s->path = pool_string(s, home, strlen(home));
  free(home);
  if (!held_out_by) held_out_by = "key";
  s->held_out_by = pool_string(s, held_out_by, strlen(held_out_by));
  if (source_index(s, type, err) == 0 && source_check_any(s, err) == 0) return s;
  source_close(s);
  return NULL;
}

void source_close(Source *s) {
  if (!s) return;
  for (PoolBlock *next; s->pool; s->pool = next) {
    next = s->pool->next;
    free(s->pool);
  }
  free(s->sample);
  free(s->image);
  free(s);
}

int64_t source_count(const Source *s) {
  return s->count;
}

int source_limit_pixels(Source *s, int64_t max_pixels, Error *err) {
  int64_t kept = 0;
  for (int64_t i = 0; i < s->count; i++) {
    const Sample *sample = &s->sample[i];
    Skip skip = {.reason = UNUSED_PIXELS};
    int rc = 0;
    for (int k = 0; rc == 0 && k < sample->parts; k++)
      rc = image_check_pixels(sample->part[k].width, sample->part[k].height, max_pixels, &skip.why);
    if (rc == 0) {
      s->sample[kept++] = *sample;
      continue;
    }
    char *where = xasprintf("sample %s of %s", sample->key, s->path);
    sample_skip(s, where, &skip);
    free(where);
  }
  s->count = kept;
  if (source_check_any(s, err) == 0) return 0;
  snprintf(err->hint, sizeof err->hint, "raise data.max_pixels, or make the pictures smaller");
  return -1;
}

SourceStats source_stats(const Source *s) {
  SourceStats stats = {.samples = s->count, .unused = s->unused};
  for (int64_t i = 0; i < s->count; i++)
    for (int k = 0; k < s->sample[i].parts; k++) stats.images += s->sample[i].part[k].kind == PART_IMAGE;
  return stats;
}

void source_log(const Source *s) {
  SourceStats stats = source_stats(s);
  int64_t skipped = unused_total(&stats.unused), files = stats.unused.count[UNUSED_FILE];
  for (int i = 0; i < UNUSED_FILE; i++)
    if (stats.unused.first[i]) log_warn("%s", stats.unused.first[i]);
  char *unused = unused_print(&stats.unused);
  char *left_out = skipped > 0 ? xasprintf("; %lld left out: %s", (long long)skipped, unused) : xstrdup("");
  char *others = files > 0 ? xasprintf("; %lld other file%s (%s%s)", (long long)files, files > 1 ? "s" : "",
                                       stats.unused.first[UNUSED_FILE], files > 1 ? " .." : "")
                           : xstrdup("");
  log_info("%s: %lld sample%s, %lld image%s%s%s", s->path, (long long)stats.samples, stats.samples == 1 ? "" : "s",
           (long long)stats.images, stats.images == 1 ? "" : "s", left_out, others);
  free(unused);
  free(left_out);
  free(others);
}

const Sample *source_sample(const Source *s, int64_t i) {
  return &s->sample[i];
}

// Local time with milliseconds.
static void time_print(int64_t nanoseconds, char text[40]) {
  time_t seconds = (time_t)(nanoseconds / 1000000000);
  struct tm local = {0};
  localtime_r(&seconds, &local);
  size_t n = strftime(text, 32, "%F %T", &local);
  snprintf(text + n, 40 - n, ".%03d", (int)(nanoseconds % 1000000000 / 1000000));
}

// Says in *err how a file has changed.
static void data_file_compare(const DataFile *then, const DataFile *now, Error *err) {
  char before[40], after[40];
  time_print(then->modified, before);
  time_print(now->modified, after);
  error_set(err, "data must not change during a run",
            "%s has changed since it was indexed: it had %lld bytes, written %s, and has %lld bytes, written %s",
            now->path, (long long)then->bytes, before, (long long)now->bytes, after);
}

int source_read_image(const Source *source, int64_t image, uint8_t **bytes, size_t *n, Error *err) {
  const ImageRef *ref = &source->image[image];
  *bytes = NULL;
  DataFile now = {0};
  int fd = data_file_open(ref->file->path, &now, err), changed = ref->member ? SOURCE_CHANGED : -1;
  if (fd < 0) return changed;
  // Elsewhere in a shard lies another image, perhaps one that decodes just as well.
  if (now.bytes != ref->file->bytes || now.modified != ref->file->modified) {
    close(fd);
    data_file_compare(ref->file, &now, err);
    return changed;
  }
  uint8_t *data = xmalloc((size_t)ref->size + 1);
  int64_t got = data_file_read(fd, ref->offset, data, ref->size, err);
  close(fd);
  if (got != ref->size) {
    free(data);
    if (got < 0) return error_prefix(err, "%s", now.path);
    return error_set(err, "data must not change during a run", "%s became shorter: %lld of %lld bytes are left",
                     now.path, (long long)got, (long long)ref->size);
  }
  *bytes = data;
  *n = (size_t)got;
  return 0;
}

int64_t source_images(const Source *s) {
  return s->images;
}

char *source_image_name(const Source *s, int64_t image) {
  const ImageRef *ref = &s->image[image];
  return ref->member ? xasprintf("%s:%s", ref->file->path, ref->member) : xstrdup(ref->file->path);
}

bool sample_is_held_out(const char *value, double fraction) {
  return (double)(hash_bytes(value, strlen(value)) >> 11) * 0x1p-53 < fraction;
}
