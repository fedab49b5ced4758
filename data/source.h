// Data sources: an index of samples whose texts and image sizes are in memory and whose images are read on demand.
//
// "folder": a folder with captions.tsv (FILE<TAB>CAPTION) or captions.jsonl ({"file": .., "caption": ..}), not both.
//   Captioned samples.
// "webdataset": a .tar, a folder of them, or a glob. KEY.jpg, .jpeg or .png with KEY.txt or KEY.json
//   ({"caption": ..}; the .txt wins); KEY is the member's path up to the first dot of its base name. Captioned samples.
// "text": a .txt (a document per paragraph, blank lines between), a .jsonl, a folder of these, or a glob. A line
//   {"text": ..} is a text sample, {"segments": [{"text": ..}, {"image": PATH}]} an interleaved one; PATH is relative
//   to the .jsonl's folder.
//
// Samples are in a fixed order: files by name, then by place in the file; in a shard by key.
#ifndef TESSERA_SOURCE_H
#define TESSERA_SOURCE_H

#include "base/base.h"

#include <stdbool.h>

typedef enum SampleKind {
  SAMPLE_CAPTIONED,   // two segments: the caption (text), then the image
  SAMPLE_TEXT,        // one text segment
  SAMPLE_INTERLEAVED, // any list of text and image segments
} SampleKind;

typedef enum SegmentKind { SEGMENT_TEXT, SEGMENT_IMAGE } SegmentKind;

typedef struct SampleSegment {
  SegmentKind kind;
  const char *text;  // SEGMENT_TEXT: bytes, NUL after them; never empty
  size_t text_bytes; // SEGMENT_TEXT
  int64_t image;     // SEGMENT_IMAGE: what source_read_image takes
  int width, height; // SEGMENT_IMAGE: pixels, from the header; at most IMAGE_MAX_PIXELS together
} SampleSegment;

typedef struct Sample {
  SampleKind kind;
  int segments;
  const SampleSegment *segment; // [segments]
  const char *key;              // folder: the file; webdataset: KEY; text: "key" of the line, else NAME:LINE
  const char *group;            // value of the field the split goes by: what sample_is_held_out takes
} Sample;

typedef struct Source Source;

// Opens a source and reads its index: all texts, and the header of every image. `held_out_by` is "key", "caption" (for
// text samples their first text) or the name of a JSON field; NULL = "key". A sample that cannot be used (no image,
// no caption, unreadable header, too many pixels, bad line) is left out and counted; the first is named in a warning.
// NULL with *err set when the type or path is wrong, a tar is damaged, no sample can be used, or one has no field
// `held_out_by`.
Source *source_open(const char *type, const char *path, const char *held_out_by, Error *err);
void source_close(Source *source);

int64_t source_count(const Source *source);   // samples
int64_t source_skipped(const Source *source); // samples left out at opening
// Sample i of [0, count); valid until the source is closed.
const Sample *source_sample(const Source *source, int64_t i);

// What is wrong with more than one image: the shard it is in is gone, or not the file that was indexed.
enum { SOURCE_CHANGED = -2 };

// Reads the encoded bytes of an image (SampleSegment.image). Thread-safe. *bytes is malloc'd, *n its size; 0, or -1 or
// SOURCE_CHANGED with *err set, *bytes NULL, when the file is not as it was or cannot be read.
int source_read_image(const Source *source, int64_t image, uint8_t **bytes, size_t *n, Error *err);
int64_t source_images(const Source *source); // they are numbered from 0
// Where an image lies, for messages ("path" or "shard.tar:member"); malloc'd.
char *source_image_name(const Source *source, int64_t image);

// Whether a sample belongs to the held-out part: a 64-bit hash of `value` (FNV-1a, then the splitmix64 finaliser) as
// a number in [0,1) is below `fraction`. Stable across machines and versions; growing the fraction only adds.
bool sample_is_held_out(const char *value, double fraction);
#endif
