// What the types of sources share while an index is built (data/source_build.c), and what each type gives. Not for use
// outside the files of data/ that index sources.
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

// Strings and lists of parts live as long as the source, in blocks that are never moved.
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
  Unused unused; // its strings are in the pool
  PoolBlock *pool;
};

// What one type of source is. Every type leaves samples and references to images behind, so that reading an image and
// naming it are the same for all of them (data/source.c).
typedef struct SourceType {
  const char *name; // data.sources[].type
  int (*index)(Source *s, Error *err);
} SourceType;
int folder_index(Source *s, Error *err); // data/folder.c
int text_index(Source *s, Error *err);   // data/text.c
int shards_index(Source *s, Error *err); // data/shard.c

// A sample while it is put together.
typedef struct SampleDraft {
  SampleKind kind;
  const char *key;
  SamplePart *part; // [parts], malloc'd
  int parts, capacity;
} SampleDraft;

void *pool_take(Source *s, size_t bytes);
char *pool_string(Source *s, const char *text, size_t n);

// Opens a regular file for reading and notes its size and time in *file; its descriptor, or -1 with *err set. Never
// blocks, whatever lies there.
int data_file_open(const char *path, DataFile *file, Error *err);
// Reads up to n bytes at `at`; their number, or -1 with *err set.
int64_t data_file_read(int fd, int64_t at, void *to, int64_t n, Error *err);

// Counts a sample that cannot be used.
void sample_skip(Source *s, const char *where, const Skip *skip);
// Counts n files that are no samples, or no half of one; `first` of them is named.
void source_count_files(Source *s, int64_t n, const char *first);
// Adds what was left out to the source's own.
void source_add_unused(Source *s, const Unused *more);
void draft_add_text(Source *s, SampleDraft *d, const char *text, size_t n);
// Adds the image at [ref.offset, ref.offset + ref.size) of `fd` to the index and to the draft; -1 with *skip set.
int draft_add_image(Source *s, SampleDraft *d, int fd, ImageRef ref, Skip *skip);
// The same for a file of its own.
int draft_add_image_file(Source *s, SampleDraft *d, const char *path, Skip *skip);
// The same for folder/name, or name when it is absolute; *skip names it.
int draft_add_listed_image(Source *s, SampleDraft *d, const char *folder, const char *name, Skip *skip);
// Appends the finished draft to the index; -1 with *err set when it lacks the field the split goes by. `fields` (may be
// NULL) is its JSON object.
int sample_add(Source *s, const SampleDraft *d, const cJSON *fields, Error *err);
// Whether the split goes by a field of each sample, not by its key or caption.
bool source_needs_fields(const Source *s);
// Room for one more image, or one more sample: the caller fills it and counts it.
ImageRef *source_image_slot(Source *s);
Sample *source_sample_slot(Source *s);

// Cuts white space off both ends.
const char *text_trim(const char *text, size_t *n);
// The string member `name` of a JSON object; NULL when there is none.
const char *json_string(const cJSON *object, const char *name);

// A whole list or text, without its byte order mark; NULL with *err set when it cannot be read or is not UTF-8 but
// UTF-16 or UTF-32.
char *list_read(const char *path, size_t *n, Error *err);
// The next line of *at, without its end, cut off in place by a NUL; NULL after the last.
char *line_next(char **at, char *end, size_t *n);
#endif
