#include "data/index_cache.h"

#include "base/hash.h"
#include "base/text_out.h"
#include "data/image.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// Change it whenever indexing a shard gives other samples than before. Little-endian, like the hosts this runs on.
static const char MAGIC[8] = "TESIDX3\n";
static const size_t MAX_CACHE_BYTES = (size_t)1 << 34;
// A file system's clock may tick this slowly: a younger shard could change again without another time.
static const int64_t SETTLED_NS = 2000000000;

// The file: this, held_out_by, the first of each reason, then the records. Strings have a NUL after them that is not
// counted.
typedef struct CacheHeader {
  char magic[8];
  uint64_t checksum; // hash64 of all that follows it
  int64_t shard_bytes, shard_modified;
  int64_t samples, unused[UNUSED_REASONS];
  int64_t first[UNUSED_REASONS], held_out_by; // bytes
} CacheHeader;

// A sample: this, key, group, caption, member.
typedef struct CacheRecord {
  int64_t offset, size; // of the image in the shard
  int32_t width, height;
  uint32_t key, group, caption, member; // bytes
} CacheRecord;

enum { CHECKED_FROM = sizeof(((CacheHeader *)0)->magic) + sizeof(((CacheHeader *)0)->checksum) };

static char *cache_path(const char *shard) {
  const char *slash = strrchr(shard, '/'), *name = slash ? slash + 1 : shard;
  return xasprintf("%.*s.%s.index", (int)(name - shard), shard, name);
}

// ---- reading

typedef struct Cursor {
  const char *at, *end;
} Cursor;

static bool cursor_copy(Cursor *c, void *to, size_t n) {
  if ((size_t)(c->end - c->at) < n) return false;
  memcpy(to, c->at, n);
  c->at += n;
  return true;
}

// A string of n bytes, where it lies; NULL when it is not there. Only captions may hold NULs.
static const char *cursor_string(Cursor *c, size_t n, bool any_bytes) {
  if ((size_t)(c->end - c->at) <= n || c->at[n] != 0) return NULL;
  const char *text = c->at;
  c->at += n + 1;
  return any_bytes || strlen(text) == n ? text : NULL;
}

static bool cache_read_sample(Source *s, Cursor *c, const DataFile *shard) {
  CacheRecord r;
  if (!cursor_copy(c, &r, sizeof r)) return false;
  if (r.offset < 0 || r.size < 0 || r.offset > shard->bytes || r.size > shard->bytes - r.offset) return false;
  if (r.width < 1 || r.height < 1 || (int64_t)r.width * r.height > IMAGE_MAX_PIXELS || r.caption == 0) return false;
  const char *key = cursor_string(c, r.key, false), *group = key ? cursor_string(c, r.group, false) : NULL;
  const char *caption = group ? cursor_string(c, r.caption, true) : NULL;
  const char *member = caption ? cursor_string(c, r.member, false) : NULL;
  if (!member) return false;
  SamplePart *part = pool_take(s, 2 * sizeof *part);
  part[0] = (SamplePart){.kind = PART_TEXT, .text = caption, .text_bytes = r.caption};
  part[1] = (SamplePart){.kind = PART_IMAGE, .image = s->images, .width = r.width, .height = r.height};
  *source_image_slot(s) = (ImageRef){.file = shard, .member = member, .offset = r.offset, .size = r.size};
  s->images++;
  *source_sample_slot(s) = (Sample){.kind = SAMPLE_CAPTIONED, .parts = 2, .part = part, .key = key, .group = group};
  s->count++;
  return true;
}

static bool cache_read_all(Source *s, const DataFile *shard, const char *bytes, size_t n) {
  Cursor c = {bytes, bytes + n};
  CacheHeader h;
  if (!cursor_copy(&c, &h, sizeof h) || memcmp(h.magic, MAGIC, sizeof MAGIC) != 0) return false;
  if (h.shard_bytes != shard->bytes || h.shard_modified != shard->modified || h.samples < 0) return false;
  if (h.checksum != hash64(bytes + CHECKED_FROM, n - CHECKED_FROM, 0)) return false;
  const char *held_out_by = cursor_string(&c, (size_t)h.held_out_by, false);
  if (!held_out_by || strcmp(held_out_by, s->held_out_by) != 0) return false;
  Unused unused;
  for (int i = 0; i < UNUSED_REASONS; i++) {
    const char *first = cursor_string(&c, (size_t)h.first[i], false);
    if (!first || h.unused[i] < 0 || !h.unused[i] != !h.first[i]) return false;
    unused.count[i] = h.unused[i];
    unused.first[i] = first[0] ? first : NULL;
  }
  for (int64_t i = 0; i < h.samples; i++)
    if (!cache_read_sample(s, &c, shard)) return false;
  if (c.at != c.end) return false;
  s->unused = unused;
  return true;
}

bool index_cache_read(Source *s, const DataFile *shard) {
  char *path = cache_path(shard->path);
  size_t n;
  Error ignored; // without a cache the shard is indexed
  char *text = file_read(path, MAX_CACHE_BYTES, &n, &ignored);
  free(path);
  if (!text) return false;
  char *bytes = pool_take(s, n); // the samples' strings stay in it
  memcpy(bytes, text, n);
  free(text);
  int64_t samples = s->count, images = s->images;
  if (cache_read_all(s, shard, bytes, n)) return true;
  s->count = samples;
  s->images = images;
  return false;
}

// ---- writing

static void cache_print_sample(const Source *s, const Sample *sample, FILE *f) {
  const SamplePart *text = &sample->part[0], *image = &sample->part[1];
  const ImageRef *ref = &s->image[image->image];
  CacheRecord r = {.offset = ref->offset,
                   .size = ref->size,
                   .width = image->width,
                   .height = image->height,
                   .key = (uint32_t)strlen(sample->key),
                   .group = (uint32_t)strlen(sample->group),
                   .caption = (uint32_t)text->text_bytes,
                   .member = (uint32_t)strlen(ref->member)};
  fwrite(&r, sizeof r, 1, f);
  fwrite(sample->key, 1, r.key + 1, f);
  fwrite(sample->group, 1, r.group + 1, f);
  fwrite(text->text, 1, (size_t)r.caption + 1, f);
  fwrite(ref->member, 1, r.member + 1, f);
}

// The whole file in memory, malloc'd.
static char *cache_print(const Source *s, const DataFile *shard, int64_t samples, size_t *n) {
  CacheHeader h = {.shard_bytes = shard->bytes,
                   .shard_modified = shard->modified,
                   .samples = s->count - samples,
                   .held_out_by = (int64_t)strlen(s->held_out_by)};
  for (int i = 0; i < UNUSED_REASONS; i++) {
    h.unused[i] = s->unused.count[i];
    h.first[i] = s->unused.first[i] ? (int64_t)strlen(s->unused.first[i]) : 0;
  }
  memcpy(h.magic, MAGIC, sizeof MAGIC);
  TextOut out;
  FILE *f = text_begin(&out);
  fwrite(&h, sizeof h, 1, f);
  fwrite(s->held_out_by, 1, (size_t)h.held_out_by + 1, f);
  for (int i = 0; i < UNUSED_REASONS; i++)
    fwrite(s->unused.first[i] ? s->unused.first[i] : "", 1, (size_t)h.first[i] + 1, f);
  for (int64_t i = samples; i < s->count; i++) cache_print_sample(s, &s->sample[i], f);
  char *bytes = text_end(&out);
  *n = out.bytes;
  uint64_t checksum = hash64(bytes + CHECKED_FROM, *n - CHECKED_FROM, 0);
  memcpy(bytes + offsetof(CacheHeader, checksum), &checksum, sizeof checksum);
  return bytes;
}

void index_cache_write(const Source *s, const DataFile *shard, int64_t samples) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if ((int64_t)now.tv_sec * 1000000000 + now.tv_nsec - shard->modified < SETTLED_NS) return;
  char *path = cache_path(shard->path), *part = xasprintf("%s.%ld", path, (long)getpid());
  int fd = open(part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  FILE *f = fd >= 0 ? fdopen(fd, "wb") : NULL;
  if (f) {
    size_t n;
    char *bytes = cache_print(s, shard, samples, &n);
    bool written = fwrite(bytes, 1, n, f) == n;
    written = fclose(f) == 0 && written;
    free(bytes);
    if (!written || rename(part, path) != 0) unlink(part);
  }
  free(part);
  free(path);
}
