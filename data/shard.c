// WebDataset shards: the members of tar archives, grouped into samples.
#include "data/caption.h"
#include "data/index_cache.h"
#include "data/paths.h"
#include "data/tar.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// The archive being indexed.
typedef struct Shard {
  Source *source;
  const DataFile *file;
  int fd;
  TarIndex index;
} Shard;

static int member_read(const Shard *h, int64_t i, char **text, size_t *n, Skip *skip) {
  if (i < 0) return 0;
  const TarMember *m = &h->index.member[i];
  if (m->size > CAPTION_MAX_BYTES)
    return skip_set(skip, UNUSED_TOO_LONG, "%s has %lld bytes", m->name, (long long)m->size);
  char *read = xmalloc((size_t)m->size + 1);
  int64_t got = data_file_read(h->fd, m->offset, read, m->size, &skip->why);
  if (got != m->size) {
    free(read);
    skip->reason = UNUSED_NO_CAPTION;
    return got < 0 ? -1 : skip_set(skip, UNUSED_NO_CAPTION, "%s ends early", m->name);
  }
  read[got] = 0;
  *text = read;
  *n = (size_t)got;
  return 0;
}

// Puts the sample into *d; -1 with *skip set when it cannot be used.
static int shard_draft(const Shard *h, const SampleFiles *f, SampleDraft *d, cJSON **fields, Skip *skip) {
  if (f->picture < 0) return skip_set(skip, UNUSED_NO_IMAGE, "it has no picture (.jpg, .jpeg, .png)");
  CaptionTexts texts = {0};
  int rc = member_read(h, f->txt, &texts.txt, &texts.txt_bytes, skip);
  if (rc == 0) rc = member_read(h, f->json, &texts.json, &texts.json_bytes, skip);
  if (rc == 0) rc = draft_add_caption(h->source, d, &texts, fields, skip);
  caption_texts_free(&texts);
  if (rc != 0) return -1;
  const TarMember *image = &h->index.member[f->picture];
  ImageRef ref = {.file = h->file, .offset = image->offset, .size = image->size};
  ref.member = pool_string(h->source, image->name, strlen(image->name));
  if (draft_add_image(h->source, d, h->fd, ref, skip) == 0) return 0;
  return error_prefix(&skip->why, "%s", image->name);
}

// -1 only for errors that end the opening.
static int shard_add(const Shard *h, const SampleFiles *f, Error *err) {
  Source *s = h->source;
  Skip skip = {0};
  SampleDraft d = {.kind = SAMPLE_CAPTIONED, .key = pool_string(s, f->key, f->key_bytes)};
  cJSON *fields = NULL;
  int rc = 0;
  if (shard_draft(h, f, &d, &fields, &skip) == 0) {
    rc = sample_add(s, &d, fields, err);
  } else {
    char *where = xasprintf("sample %s of %s", d.key, h->file->path);
    sample_skip(s, where, &skip);
    free(where);
  }
  if (f->twices > 0) {
    char *where = xasprintf("%s of %s", h->index.member[f->twice].name, h->file->path);
    sample_skip_twice(s, f, where);
    free(where);
  }
  cJSON_Delete(fields);
  free(d.part);
  return rc;
}

// The samples of the archive open at h->fd.
static int shard_walk(Shard *h, Error *err) {
  if (tar_index(h->fd, h->file->path, &h->index, err) != 0) return -1;
  const char **name = xmalloc((size_t)h->index.count * sizeof *name + 1);
  for (int64_t i = 0; i < h->index.count; i++) name[i] = h->index.member[i].name;
  SampleFilesList list = sample_files_group(name, h->index.count);
  int rc = 0;
  for (int64_t i = 0; rc == 0 && i < list.n; i++) rc = shard_add(h, &list.of[i], err);
  source_count_files(h->source, list.others, list.others ? name[list.first_other] : NULL);
  sample_files_free(&list);
  free(name);
  return rc;
}

static int shard_index(Source *s, const char *path, Error *err) {
  DataFile *file = pool_take(s, sizeof *file);
  Shard h = {.source = s, .file = file};
  h.fd = data_file_open(pool_string(s, path, strlen(path)), file, err);
  if (h.fd < 0) return -1;
  Unused before = s->unused; // the cache holds what this shard leaves out
  s->unused = (Unused){0};
  int64_t samples = s->count;
  int rc = 0;
  if (!index_cache_read(s, file)) {
    rc = shard_walk(&h, err);
    DataFile after; // what was read while the shard was being written is not worth keeping
    int again = rc == 0 && h.index.count >= INDEX_CACHE_MEMBERS ? data_file_open(file->path, &after, err) : -1;
    if (again >= 0 && after.bytes == file->bytes && after.modified == file->modified)
      index_cache_write(s, file, samples);
    if (again >= 0) close(again);
    tar_index_free(&h.index);
  }
  Unused mine = s->unused;
  s->unused = before;
  source_add_unused(s, &mine);
  close(h.fd);
  return rc;
}

int shards_index(Source *s, Error *err) {
  PathList files;
  if (path_list_expand(s->path, ".tar", ".tar", &files, err) != 0) return -1;
  int rc = 0;
  for (int i = 0; rc == 0 && i < files.count; i++) rc = shard_index(s, files.path[i], err);
  path_list_free(&files);
  return rc;
}
