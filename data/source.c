#include "data/image.h"
#include "data/paths.h"
#include "data/source_internal.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
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

void sample_skip(Source *s, const char *where, const Error *why) {
  if (!s->first_skip) {
    char *text = xasprintf("%s is left out: %s", where, why->text);
    s->first_skip = pool_string(s, text, strlen(text));
    free(text);
  }
  if (s->skipped++ == 0) log_warn("%s", s->first_skip);
}

static void draft_add(SampleDraft *d, SampleSegment segment) {
  if (d->segments == d->capacity) {
    d->capacity = d->capacity ? 2 * d->capacity : 8;
    d->segment = xrealloc(d->segment, (size_t)d->capacity * sizeof(SampleSegment));
  }
  d->segment[d->segments++] = segment;
}

void draft_add_text(Source *s, SampleDraft *d, const char *text, size_t n) {
  draft_add(d, (SampleSegment){.kind = SEGMENT_TEXT, .text = pool_string(s, text, n), .text_bytes = n});
}

int64_t data_file_read(int fd, int64_t at, void *to, int64_t n, Error *err) {
  int64_t got = 0;
  while (got < n) {
    ssize_t k = pread(fd, (char *)to + got, (size_t)(n - got), (off_t)(at + got));
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) return error_set(err, NULL, "cannot read: %s", strerror(errno));
    if (k == 0) break;
    got += k;
  }
  return got;
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
static int image_read_header(int fd, int64_t offset, int64_t size, int *width, int *height, Error *err) {
  if (size > MAX_IMAGE_BYTES) return error_set(err, NULL, "an image file of %lld bytes", (long long)size);
  int64_t n = min_i64(size, 4096);
  for (;; n = min_i64(size, n * 16)) { // a JPEG may carry previews and colour profiles before its header
    uint8_t *bytes = xmalloc((size_t)n + 1);
    int64_t got = data_file_read(fd, offset, bytes, n, err);
    int rc = got < 0 ? -1 : image_info(bytes, (size_t)got, width, height, err);
    free(bytes);
    if (rc == 0) return image_check_pixels(*width, *height, IMAGE_MAX_PIXELS, err);
    if (got < n || n == size) return -1;
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

int draft_add_image(Source *s, SampleDraft *d, int fd, ImageRef ref, Error *err) {
  int width, height;
  if (image_read_header(fd, ref.offset, ref.size, &width, &height, err) != 0) return -1;
  *source_image_slot(s) = ref;
  draft_add(d, (SampleSegment){.kind = SEGMENT_IMAGE, .image = s->images++, .width = width, .height = height});
  return 0;
}

// The same for a file of its own: folder/name, or name when it is absolute.
static int draft_add_image_file(Source *s, SampleDraft *d, const char *folder, const char *name, Error *err) {
  char *joined = name[0] == '/' ? xstrdup(name) : xasprintf("%s/%s", folder, name);
  DataFile *file = pool_take(s, sizeof *file);
  int fd = data_file_open(pool_string(s, joined, strlen(joined)), file, err);
  int rc = fd < 0 ? -1 : draft_add_image(s, d, fd, (ImageRef){.file = file, .size = file->bytes}, err);
  if (fd >= 0) close(fd);
  if (fd >= 0 && rc != 0) error_prefix(err, "%s", joined);
  free(joined);
  return rc;
}

// The value the held-out split goes by; NULL when the sample has none. `fields` (may be NULL) is its JSON object.
static const char *draft_group(Source *s, const SampleDraft *d, const cJSON *fields) {
  if (strcmp(s->held_out_by, "key") == 0) return d->key;
  if (strcmp(s->held_out_by, "caption") == 0) {
    for (int i = 0; i < d->segments; i++)
      if (d->segment[i].kind == SEGMENT_TEXT) return d->segment[i].text;
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
  SampleSegment *segment = pool_take(s, (size_t)d->segments * sizeof(SampleSegment));
  memcpy(segment, d->segment, (size_t)d->segments * sizeof(SampleSegment));
  *source_sample_slot(s) =
      (Sample){.kind = d->kind, .segments = d->segments, .segment = segment, .key = d->key, .group = group};
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

// The next line of *at, without its end, cut off in place by a NUL; NULL after the last.
static char *line_next(char **at, char *end, size_t *n) {
  if (*at >= end) return NULL;
  char *line = *at, *newline = memchr(line, '\n', (size_t)(end - line));
  char *stop = newline ? newline : end;
  *at = newline ? newline + 1 : end;
  if (stop > line && stop[-1] == '\r') stop--;
  *stop = 0;
  *n = (size_t)(stop - line);
  return line;
}

static char *list_read(const char *path, size_t *n, Error *err) {
  char *text = file_read(path, MAX_LIST_BYTES, n, err);
  if (text && *n >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) { // a byte order mark is no part of the first line
    *n -= 3;
    memmove(text, text + 3, *n + 1);
  }
  return text;
}

// ---- folder

// One image file with its caption. -1 only for errors that end the opening.
static int folder_add(Source *s, const char *where, const char *name, const char *caption, size_t caption_bytes,
                      const cJSON *fields, Error *err) {
  Error why = {0};
  SampleDraft d = {.kind = SAMPLE_CAPTIONED, .key = pool_string(s, name, strlen(name))};
  caption = text_trim(caption, &caption_bytes);
  if (caption_bytes > 0) draft_add_text(s, &d, caption, caption_bytes);
  int rc = 0;
  if (caption_bytes == 0) {
    error_set(&why, NULL, "its caption is empty");
    sample_skip(s, where, &why);
  } else if (draft_add_image_file(s, &d, s->path, name, &why) != 0) {
    sample_skip(s, where, &why);
  } else {
    rc = sample_add(s, &d, fields, err);
  }
  free(d.segment);
  return rc;
}

static int folder_add_line(Source *s, const char *where, bool json, char *line, size_t n, Error *err) {
  Error why = {0};
  if (!json) {
    char *tab = memchr(line, '\t', n);
    if (!tab || tab == line) {
      error_set(&why, NULL, "the line is not FILE<TAB>CAPTION");
      sample_skip(s, where, &why);
      return 0;
    }
    *tab = 0;
    return folder_add(s, where, line, tab + 1, (size_t)(line + n - tab - 1), NULL, err);
  }
  cJSON *object = json_parse(line, n, "JSON", JSON_PLAIN, &why);
  const char *file = json_string(object, "file"), *caption = json_string(object, "caption");
  int rc = 0;
  if (file && file[0] && caption) {
    rc = folder_add(s, where, file, caption, strlen(caption), object, err);
  } else {
    if (object) error_set(&why, NULL, "the line is not {\"file\": \"..\", \"caption\": \"..\"}");
    sample_skip(s, where, &why);
  }
  cJSON_Delete(object);
  return rc;
}

static int folder_index(Source *s, Error *err) {
  struct stat st;
  if (stat(s->path, &st) != 0)
    return error_set(err, "check data.sources[].path", "cannot open the folder %s: %s", s->path, strerror(errno));
  char *tsv = xasprintf("%s/captions.tsv", s->path), *jsonl = xasprintf("%s/captions.jsonl", s->path);
  bool has_tsv = access(tsv, F_OK) == 0, has_jsonl = access(jsonl, F_OK) == 0;
  const char *list = has_jsonl ? jsonl : tsv;
  size_t n = 0;
  char *text = NULL;
  if (has_tsv && has_jsonl)
    error_set(err, "keep one of them", "%s has both captions.tsv and captions.jsonl", s->path);
  else if (!has_tsv && !has_jsonl)
    error_set(err, "a folder source needs one: FILE<TAB>CAPTION, or {\"file\":..,\"caption\":..} per line",
              "%s has neither captions.tsv nor captions.jsonl", s->path);
  else
    text = list_read(list, &n, err);
  int rc = text ? 0 : -1;
  char *at = text, *line;
  size_t length;
  for (int64_t number = 1; rc == 0 && (line = line_next(&at, text + n, &length)); number++) {
    if (length == 0 || (number == 1 && has_tsv && strcmp(line, "file\tcaption") == 0)) continue; // a heading
    char *where = xasprintf("%s line %lld", list, (long long)number);
    rc = folder_add_line(s, where, has_jsonl, line, length, err);
    free(where);
  }
  free(text);
  free(tsv);
  free(jsonl);
  return rc;
}

// ---- text

// {"segments":[{"text":..},{"image":path}]}: 0, or -1 with *why set when it cannot be used.
static int draft_add_segments(Source *s, SampleDraft *d, const char *folder, const cJSON *list, Error *why) {
  const cJSON *item;
  cJSON_ArrayForEach(item, list) {
    const char *text = json_string(item, "text"), *image = json_string(item, "image");
    if (!text == !image) return error_set(why, NULL, "a segment is neither {\"text\": \"..\"} nor {\"image\": \"..\"}");
    if (image && draft_add_image_file(s, d, folder, image, why) != 0) return -1;
    if (text && text[0]) draft_add_text(s, d, text, strlen(text));
  }
  return d->segments > 0 ? 0 : error_set(why, NULL, "\"segments\" is empty");
}

static int text_add_json(Source *s, const char *folder, const char *where, const char *line, size_t n, Error *err) {
  Error why = {0};
  cJSON *object = json_parse(line, n, "JSON", JSON_PLAIN, &why);
  const cJSON *list = cJSON_GetObjectItemCaseSensitive(object, "segments");
  const char *text = json_string(object, "text"), *key = json_string(object, "key");
  if (!key) key = where;
  SampleDraft d = {.kind = list ? SAMPLE_INTERLEAVED : SAMPLE_TEXT, .key = pool_string(s, key, strlen(key))};
  bool usable = true;
  if (cJSON_IsArray(list))
    usable = draft_add_segments(s, &d, folder, list, &why) == 0;
  else if (!list && text && text[0])
    draft_add_text(s, &d, text, strlen(text));
  else if (!object)
    usable = false;
  else
    usable = error_set(&why, NULL, "the line is neither {\"text\": \"..\"} nor {\"segments\": [..]}") == 0;
  int rc = 0;
  if (usable)
    rc = sample_add(s, &d, object, err);
  else
    sample_skip(s, where, &why);
  cJSON_Delete(object);
  free(d.segment);
  return rc;
}

static int text_index_jsonl(Source *s, const char *folder, const char *name, char *text, size_t n, Error *err) {
  int rc = 0;
  char *at = text, *line;
  size_t length;
  for (int64_t number = 1; rc == 0 && (line = line_next(&at, text + n, &length)); number++) {
    if (length == 0) continue;
    char *where = xasprintf("%s:%lld", name, (long long)number);
    rc = text_add_json(s, folder, where, line, length, err);
    free(where);
  }
  return rc;
}

// A document per run of lines that are not blank.
static int text_index_paragraphs(Source *s, const char *name, char *text, size_t n, Error *err) {
  char *at = text, *end = text + n;
  int64_t number = 1;
  while (at < end) {
    char *start = at, *stop = at; // the paragraph is [start, stop)
    int64_t first = number;
    while (at < end) {
      char *newline = memchr(at, '\n', (size_t)(end - at)), *line_end = newline ? newline : end;
      size_t length = (size_t)(line_end - at);
      text_trim(at, &length);
      at = newline ? newline + 1 : end;
      number++;
      if (length == 0) break;
      stop = line_end > start && line_end[-1] == '\r' ? line_end - 1 : line_end;
    }
    if (stop == start) continue;
    char *key = xasprintf("%s:%lld", name, (long long)first);
    SampleDraft d = {.kind = SAMPLE_TEXT, .key = pool_string(s, key, strlen(key))};
    free(key);
    draft_add_text(s, &d, start, (size_t)(stop - start));
    int rc = sample_add(s, &d, NULL, err);
    free(d.segment);
    if (rc != 0) return rc;
  }
  return 0;
}

static int text_index(Source *s, const char *path, Error *err) {
  if (!path_ends(path, ".txt") && !path_ends(path, ".jsonl"))
    return error_set(err, "a text source is a .txt or a .jsonl", "%s is neither a .txt nor a .jsonl", path);
  size_t n;
  char *text = list_read(path, &n, err);
  if (!text) return -1;
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  char *folder = slash ? xasprintf("%.*s", (int)(slash - path + (slash == path)), path) : xstrdup(".");
  int rc = path_ends(path, ".jsonl") ? text_index_jsonl(s, folder, name, text, n, err)
                                     : text_index_paragraphs(s, name, text, n, err);
  free(folder);
  free(text);
  return rc;
}

// ---- public

static int source_index(Source *s, const char *type, Error *err) {
  if (strcmp(type, "folder") == 0) return folder_index(s, err);
  bool shards = strcmp(type, "webdataset") == 0;
  if (!shards && strcmp(type, "text") != 0)
    return error_set(err, "data.sources[].type is \"folder\", \"webdataset\" or \"text\"", "no source type \"%s\"",
                     type);
  PathList files;
  int rc = path_list_expand(s->path, shards ? ".tar" : ".txt", shards ? ".tar" : ".jsonl", &files, err);
  for (int i = 0; rc == 0 && i < files.count; i++)
    rc = shards ? shard_index(s, files.path[i], err) : text_index(s, files.path[i], err);
  path_list_free(&files);
  return rc;
}

Source *source_open(const char *type, const char *path, const char *held_out_by, Error *err) {
  Source *s = xcalloc(1, sizeof(Source));
  s->path = pool_string(s, path, strlen(path));
  if (!held_out_by) held_out_by = "key";
  s->held_out_by = pool_string(s, held_out_by, strlen(held_out_by));
  int rc = source_index(s, type, err);
  if (rc == 0 && s->count == 0)
    rc = error_set(err, "see the first warning above, if there is one, for why",
                   "%s has no usable sample (%lld were left out)", path, (long long)s->skipped);
  if (rc != 0) {
    source_close(s);
    return NULL;
  }
  if (s->skipped > 1)
    log_warn("%s: %lld of %lld samples are left out; the first is named above", path, (long long)s->skipped,
             (long long)(s->skipped + s->count));
  return s;
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

int64_t source_skipped(const Source *s) {
  return s->skipped;
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
  uint64_t h = 0xcbf29ce484222325u;
  for (const unsigned char *p = (const unsigned char *)value; *p; p++) h = (h ^ *p) * 0x100000001b3u;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 27) * 0x94d049bb133111ebu;
  h ^= h >> 31;
  return (double)(h >> 11) * 0x1p-53 < fraction;
}
