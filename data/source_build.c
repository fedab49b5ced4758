#include "data/image.h"
#include "data/file_chunks.h"
#include "data/source_internal.h"

#include "base/utf8.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const size_t MAX_LIST_BYTES = (size_t)1 << 36;    // a caption list or a text file
static const int64_t MAX_IMAGE_BYTES = (int64_t)1 << 29; // an encoded image
enum { POOL_BLOCK_BYTES = 1 << 20 };

void *pool_take(Source *s, size_t bytes) {
  bytes = (bytes + 15) & ~(size_t)15;
  if (!s->pool || s->pool->size - s->pool->used < bytes) {
    size_t size = bytes > POOL_BLOCK_BYTES ? bytes : POOL_BLOCK_BYTES;
    PoolBlock *block = xmalloc(sizeof(PoolBlock) + size);
    *block = (PoolBlock){.next = s->pool, .size = size};
    s->pool = block;
  }
  void *p = s->pool->data + s->pool->used;
  s->pool->used += bytes;
  return p;
}

char *pool_string(Source *s, const char *text, size_t n) {
  char *copy = pool_take(s, n + 1);
  memcpy(copy, text, n);
  copy[n] = 0;
  return copy;
}

void sample_skip(Source *s, const char *where, const Skip *skip) {
  UnusedReason reason = skip->reason;
  if (s->unused.count[reason]++ > 0) return;
  char *text = xasprintf("%s is left out: %s", where, skip->why.text);
  s->unused.first[reason] = pool_string(s, text, strlen(text));
  free(text);
}

void source_count_files(Source *s, int64_t n, const char *first) {
  s->unused.count[UNUSED_FILE] += n;
  if (n > 0 && !s->unused.first[UNUSED_FILE]) s->unused.first[UNUSED_FILE] = pool_string(s, first, strlen(first));
}

void source_add_unused(Source *s, const Unused *more) {
  for (int i = 0; i < UNUSED_REASONS; i++) {
    s->unused.count[i] += more->count[i];
    if (!s->unused.first[i]) s->unused.first[i] = more->first[i];
  }
}

static void draft_add(SampleDraft *d, SamplePart part) {
  if (d->parts == d->capacity) {
    d->capacity = d->capacity ? 2 * d->capacity : 8;
    d->part = xrealloc(d->part, (size_t)d->capacity * sizeof(SamplePart));
  }
  d->part[d->parts++] = part;
}

void draft_add_text(Source *s, SampleDraft *d, const char *text, size_t n) {
  draft_add(d, (SamplePart){.kind = PART_TEXT, .text = pool_string(s, text, n), .text_bytes = n});
}

int64_t data_file_read(int fd, int64_t at, void *to, int64_t n, Error *err) {
  int64_t got = file_read_at(fd, at, to, n);
  return got < 0 ? error_set(err, NULL, "cannot read: %s", strerror(errno)) : got;
}

int data_file_open(const char *path, DataFile *file, Error *err) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return error_set(err, "check the path", "cannot open %s: %s", path, strerror(errno));
  struct stat st;
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    close(fd);
    return error_set(err, "a regular file is expected", "%s is not a file", path);
  }
  *file = (DataFile){path, st.st_size, (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec};
  return fd;
}

// Width and height of the image in [offset, offset+size) of fd, reading as little of it as its header allows.
static int image_read_header(int fd, int64_t offset, int64_t size, int *width, int *height, Skip *skip) {
  if (size > MAX_IMAGE_BYTES) return skip_set(skip, UNUSED_TOO_LONG, "an image file of %lld bytes", (long long)size);
  int64_t n = min_i64(size, 4096);
  for (;; n = min_i64(size, n * 16)) { // a file may carry previews and colour profiles before its header
    uint8_t *bytes = xmalloc((size_t)n + 1);
    int64_t got = data_file_read(fd, offset, bytes, n, &skip->why);
    int rc = got < 0 ? -1 : image_info(bytes, (size_t)got, width, height, &skip->why);
    bool known = got >= 0 && (is_png(bytes, (size_t)got) || is_jpeg(bytes, (size_t)got));
    free(bytes);
    skip->reason = got < 0 ? UNUSED_NO_IMAGE : known || got == 0 ? UNUSED_DAMAGED : UNUSED_FORMAT;
    if (rc < 0 || (rc > 0 && (got < n || n == size))) return -1;
    if (rc > 0) continue;
    skip->reason = UNUSED_PIXELS;
    return image_check_pixels(*width, *height, IMAGE_MAX_PIXELS, &skip->why);
  }
}

ImageRef *source_image_slot(Source *s) {
  if (s->images == s->image_capacity) {
    s->image_capacity = max_i64(1024, 2 * s->image_capacity);
    s->image = xrealloc(s->image, (size_t)s->image_capacity * sizeof(ImageRef));
  }
  return &s->image[s->images];
}

Sample *source_sample_slot(Source *s) {
  if (s->count == s->sample_capacity) {
    s->sample_capacity = max_i64(1024, 2 * s->sample_capacity);
    s->sample = xrealloc(s->sample, (size_t)s->sample_capacity * sizeof(Sample));
  }
  return &s->sample[s->count];
}

int draft_add_image(Source *s, SampleDraft *d, int fd, ImageRef ref, Skip *skip) {
  int width, height;
  if (image_read_header(fd, ref.offset, ref.size, &width, &height, skip) != 0) return -1;
  *source_image_slot(s) = ref;
  draft_add(d, (SamplePart){.kind = PART_IMAGE, .image = s->images++, .width = width, .height = height});
  return 0;
}

int draft_add_image_file(Source *s, SampleDraft *d, const char *path, Skip *skip) {
  DataFile *file = pool_take(s, sizeof *file);
  skip->reason = UNUSED_NO_IMAGE;
  int fd = data_file_open(pool_string(s, path, strlen(path)), file, &skip->why);
  if (fd < 0) return -1;
  int rc = draft_add_image(s, d, fd, (ImageRef){.file = file, .size = file->bytes}, skip);
  close(fd);
  return rc;
}

int draft_add_listed_image(Source *s, SampleDraft *d, const char *folder, const char *name, Skip *skip) {
  char *path = name[0] == '/' ? xstrdup(name) : xasprintf("%s/%s", folder, name);
  int rc = draft_add_image_file(s, d, path, skip);
  if (rc != 0 && skip->reason != UNUSED_NO_IMAGE) error_prefix(&skip->why, "%s", path);
  free(path);
  return rc;
}

bool source_needs_fields(const Source *s) {
  return strcmp(s->held_out_by, "key") != 0 && strcmp(s->held_out_by, "caption") != 0;
}

// The value the held-out split goes by; NULL when the sample has none. `fields` (may be NULL) is its JSON object.
static const char *draft_group(Source *s, const SampleDraft *d, const cJSON *fields) {
  if (strcmp(s->held_out_by, "key") == 0) return d->key;
  if (strcmp(s->held_out_by, "caption") == 0) {
    for (int i = 0; i < d->parts; i++)
      if (d->part[i].kind == PART_TEXT) return d->part[i].text;
    return NULL;
  }
  const cJSON *value = cJSON_GetObjectItemCaseSensitive(fields, s->held_out_by);
  if (!value || cJSON_IsNull(value)) return NULL;
  if (cJSON_IsString(value)) return pool_string(s, value->valuestring, strlen(value->valuestring));
  char *printed = cJSON_PrintUnformatted(value);
  if (!printed) return NULL;
  const char *group = pool_string(s, printed, strlen(printed));
  cJSON_free(printed);
  return group;
}

int sample_add(Source *s, const SampleDraft *d, const cJSON *fields, Error *err) {
  const char *group = draft_group(s, d, fields);
  if (!group)
    return error_set(err, "data.held_out_by is \"key\", \"caption\" or a JSON field that every sample has",
                     "sample %s of %s has no \"%s\" to hold samples out by", d->key, s->path, s->held_out_by);
  SamplePart *part = pool_take(s, (size_t)d->parts * sizeof(SamplePart));
  memcpy(part, d->part, (size_t)d->parts * sizeof(SamplePart));
  *source_sample_slot(s) = (Sample){.kind = d->kind, .parts = d->parts, .part = part, .key = d->key, .group = group};
  s->count++;
  return 0;
}

const char *text_trim(const char *text, size_t *n) {
  while (*n > 0 && isspace((unsigned char)text[*n - 1])) --*n;
  while (*n > 0 && isspace((unsigned char)text[0])) text++, --*n;
  return text;
}

const char *json_string(const cJSON *object, const char *name) {
  return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
}

char *line_next(char **at, char *end, size_t *n) {
  if (*at >= end) return NULL;
  char *line = *at, *newline = memchr(line, '\n', (size_t)(end - line));
  char *stop = newline ? newline : end;
  *at = newline ? newline + 1 : end;
  if (stop > line && stop[-1] == '\r') stop--;
  *stop = 0;
  *n = (size_t)(stop - line);
  return line;
}

char *list_read(const char *path, size_t *n, Error *err) {
  char *text = file_read(path, MAX_LIST_BYTES, n, err);
  const char *encoding = text ? text_encoding(text, *n) : NULL;
  if (encoding) {
    free(text);
    error_set(err, "save it as UTF-8", "%s is in %s", path, encoding);
    return NULL;
  }
  size_t mark = text ? utf8_mark(text, *n) : 0;
  if (mark) {
    *n -= mark;
    memmove(text, text + mark, *n + 1);
  }
  return text;
}
