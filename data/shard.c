// WebDataset shards: the members of a tar archive, grouped into samples.
#include "data/index_cache.h"
#include "data/source_internal.h"
#include "data/tar.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

static const int64_t MAX_CAPTION_BYTES = 1 << 24; // a .txt or .json member

typedef struct ShardMember {
  const char *key; // not terminated
  size_t key_bytes;
  const char *extension; // everything after the first dot of the base name
  const TarMember *member;
} ShardMember;

static int shard_member_compare(const void *a, const void *b) {
  const ShardMember *x = a, *y = b;
  size_t n = x->key_bytes < y->key_bytes ? x->key_bytes : y->key_bytes;
  int order = memcmp(x->key, y->key, n);
  if (order) return order;
  if (x->key_bytes != y->key_bytes) return x->key_bytes < y->key_bytes ? -1 : 1;
  return x->member->offset < y->member->offset ? -1 : 1;
}

static char *member_read(int fd, const TarMember *m, size_t *n, Error *err) {
  if (m->size > MAX_CAPTION_BYTES) {
    error_set(err, NULL, "%s has %lld bytes", m->name, (long long)m->size);
    return NULL;
  }
  char *text = xmalloc((size_t)m->size + 1);
  int64_t got = data_file_read(fd, m->offset, text, m->size, err);
  if (got != m->size) {
    if (got >= 0) error_set(err, NULL, "%s ends early", m->name);
    free(text);
    return NULL;
  }
  text[got] = 0;
  *n = (size_t)got;
  return text;
}

// Adds the sample made of `n` members with one key; -1 only for errors that end the opening.
static int shard_add(Source *s, int fd, const DataFile *shard, const ShardMember *group, int64_t n, Error *err) {
  const TarMember *image = NULL, *txt = NULL, *json = NULL;
  for (int64_t i = 0; i < n; i++) {
    const char *e = group[i].extension;
    bool is_image = !strcasecmp(e, "jpg") || !strcasecmp(e, "jpeg") || !strcasecmp(e, "png");
    if (is_image && !image) image = group[i].member;
    if (!strcasecmp(e, "txt") && !txt) txt = group[i].member;
    if (!strcasecmp(e, "json") && !json) json = group[i].member;
  }
  if (!image && !txt && !json) return 0; // other files may share the archive
  Error why = {0};
  SampleDraft d = {.kind = SAMPLE_CAPTIONED, .key = pool_string(s, group->key, group->key_bytes)};
  size_t json_bytes = 0, caption_bytes = 0;
  char *json_text = json ? member_read(fd, json, &json_bytes, &why) : NULL;
  cJSON *fields = json_text ? json_parse(json_text, json_bytes, json->name, JSON_PLAIN, &why) : NULL;
  char *txt_text = txt ? member_read(fd, txt, &caption_bytes, &why) : NULL;
  const char *caption = txt_text ? txt_text : json_string(fields, "caption");
  if (caption && !txt_text) caption_bytes = strlen(caption);
  if (caption) caption = text_trim(caption, &caption_bytes);

  bool usable = false;
  if (!image) {
    error_set(&why, NULL, "it has no .jpg, .jpeg or .png");
  } else if (!caption || caption_bytes == 0) {
    if (!why.text[0]) error_set(&why, NULL, "it has no caption, neither in a .txt nor as \"caption\" in a .json");
  } else {
    draft_add_text(s, &d, caption, caption_bytes);
    ImageRef ref = {.file = shard, .offset = image->offset, .size = image->size};
    ref.member = pool_string(s, image->name, strlen(image->name));
    usable = draft_add_image(s, &d, fd, ref, &why) == 0;
  }
  int rc = 0;
  if (usable) {
    rc = sample_add(s, &d, fields, err);
  } else {
    char *where = xasprintf("sample %s of %s", d.key, shard->path);
    sample_skip(s, where, &why);
    free(where);
  }
  cJSON_Delete(fields);
  free(json_text);
  free(txt_text);
  free(d.segment);
  return rc;
}

// The samples of the archive open at `fd`; the number of its members goes into *members.
static int shard_walk(Source *s, int fd, const DataFile *shard, int64_t *members, Error *err) {
  TarIndex index;
  if (tar_index(fd, shard->path, &index, err) != 0) return -1;
  ShardMember *member = xmalloc((size_t)index.count * sizeof(ShardMember) + 1);
  int64_t n = 0;
  for (int64_t i = 0; i < index.count; i++) {
    const char *name = index.member[i].name, *slash = strrchr(name, '/');
    const char *base = slash ? slash + 1 : name, *dot = strchr(base, '.');
    if (!dot || dot == base) continue; // no extension, or a hidden file
    member[n++] =
        (ShardMember){.key = name, .key_bytes = (size_t)(dot - name), .extension = dot + 1, .member = &index.member[i]};
  }
  // The parts of a sample usually follow each other, but nothing forces a writer to keep them together.
  if (n > 0) qsort(member, (size_t)n, sizeof(ShardMember), shard_member_compare);
  int rc = 0;
  for (int64_t i = 0, end; rc == 0 && i < n; i = end) {
    for (end = i + 1; end < n && member[end].key_bytes == member[i].key_bytes &&
                      memcmp(member[end].key, member[i].key, member[i].key_bytes) == 0;)
      end++;
    rc = shard_add(s, fd, shard, member + i, end - i, err);
  }
  *members = index.count;
  free(member);
  tar_index_free(&index);
  return rc;
}

int shard_index(Source *s, const char *path, Error *err) {
  DataFile *shard = pool_take(s, sizeof *shard);
  int fd = data_file_open(pool_string(s, path, strlen(path)), shard, err);
  if (fd < 0) return -1;
  int64_t samples = s->count, skipped = s->skipped, members = 0;
  int rc = 0;
  if (!index_cache_read(s, shard)) {
    s->first_skip = NULL;
    rc = shard_walk(s, fd, shard, &members, err);
  }
  DataFile after; // what was read while the shard was being written is not worth keeping
  int again = rc == 0 && members >= INDEX_CACHE_MEMBERS ? data_file_open(shard->path, &after, err) : -1;
  if (again >= 0 && after.bytes == shard->bytes && after.modified == shard->modified)
    index_cache_write(s, shard, samples, skipped);
  if (again >= 0) close(again);
  close(fd);
  return rc;
}
