// What the kinds of sources share while an index is built. Not for use outside data/source.c, data/shard.c and
// data/index_cache.c.
#ifndef TESSERA_SOURCE_INTERNAL_H
#define TESSERA_SOURCE_INTERNAL_H

#include "base/json.h"
#include "data/source.h"

// A file as it was when it was indexed.
typedef struct DataFile {
  const char *path;
  int64_t bytes, modified; // modified: nanoseconds
} DataFile;

typedef struct ImageRef {
  const DataFile *file; // a plain image, or the shard it is in
  const char *member;   // its name in the shard; NULL for a plain image
  int64_t offset, size;
} ImageRef;

// Strings and segment lists live as long as the source, in blocks that are never moved.
typedef struct PoolBlock {
  struct PoolBlock *next;
  size_t used, size;
  _Alignas(16) char data[];
} PoolBlock;

struct Source {
  const char *path, *held_out_by;
  Sample *sample; // [count]
  int64_t count, sample_capacity;
  ImageRef *image; // [images]
  int64_t images, image_capacity;
  int64_t skipped;
  const char *first_skip; // "WHERE is left out: WHY" of the first since it was set to NULL
  PoolBlock *pool;
};

// A sample while it is put together.
typedef struct SampleDraft {
  SampleKind kind;
  const char *key;
  SampleSegment *segment; // [segments], malloc'd
  int segments, capacity;
} SampleDraft;

void *pool_take(Source *s, size_t bytes);
char *pool_string(Source *s, const char *text, size_t n);

// Opens a regular file for reading and notes its size and time in *file; its descriptor, or -1 with *err set. Never
// blocks, whatever lies there.
int data_file_open(const char *path, DataFile *file, Error *err);
// Reads up to n bytes at `at`; their number, or -1 with *err set.
int64_t data_file_read(int fd, int64_t at, void *to, int64_t n, Error *err);

// Counts a sample that cannot be used; the first of the source is named in a warning.
void sample_skip(Source *s, const char *where, const Error *why);
void draft_add_text(Source *s, SampleDraft *d, const char *text, size_t n);
// Adds the image at [ref.offset, ref.offset + ref.size) of `fd` to the index and to the draft.
int draft_add_image(Source *s, SampleDraft *d, int fd, ImageRef ref, Error *err);
// Appends the finished draft to the index; -1 with *err set when it lacks the field the split goes by. `fields` (may be
// NULL) is its JSON object.
int sample_add(Source *s, const SampleDraft *d, const cJSON *fields, Error *err);
// Room for one more image, or one more sample: the caller fills it and counts it.
ImageRef *source_image_slot(Source *s);
Sample *source_sample_slot(Source *s);

// Cuts white space off both ends.
const char *text_trim(const char *text, size_t *n);
// The string member `name` of a JSON object; NULL when there is none.
const char *json_string(const cJSON *object, const char *name);

// Indexes one .tar shard (data/shard.c).
int shard_index(Source *s, const char *path, Error *err);
#endif
