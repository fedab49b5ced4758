// Data sources: an index of samples whose texts and image sizes are in memory and whose images are read on demand.
//
// "folder": a folder of pictures with a list of captions in it (captions or metadata .jsonl, .csv, .tsv:
//   data/caption_list.h), or with KEY.txt or KEY.json beside each KEY.jpg or .png (data/sample_files.h), folders in it
//   likewise. Captioned samples.
// "webdataset": a .tar, a folder of them, a glob or braces: KEY.jpg, .jpeg or .png with KEY.txt or KEY.json
//   (data/sample_files.h). Captioned samples.
// "text": a .txt (a document per paragraph, blank lines between), a .jsonl, a folder of these, a glob or braces. A line
//   {"text": ..} is a text sample, {"segments": [{"text": ..}, {"image": PATH}]} an interleaved one; PATH is relative
//   to the .jsonl's folder.
//
// Files and folders whose names begin with a dot, and __MACOSX, are passed over in all of them; "~/" is the home
// folder.
//
// Samples are in a fixed order: files by name, then by place in the file; in a shard by key.
#ifndef TESSERA_SOURCE_H
#define TESSERA_SOURCE_H

#include "data/part.h"
#include "data/unused.h"

#include <stdbool.h>

typedef enum SampleKind {
  SAMPLE_CAPTIONED,   // two parts: the caption (text), then the image
  SAMPLE_TEXT,        // one text part
  SAMPLE_INTERLEAVED, // any list of texts and images
} SampleKind;

typedef struct SamplePart {
  PartKind kind;
  const char *text;  // PART_TEXT: bytes, NUL after them; never empty
  size_t text_bytes; // PART_TEXT
  int64_t image;     // PART_IMAGE: what source_read_image takes
  int width, height; // PART_IMAGE: pixels, from the header; at most IMAGE_MAX_PIXELS together
} SamplePart;

typedef struct Sample {
  SampleKind kind;
  int parts;
  const SamplePart *part; // [parts]
  const char *key;        // folder: the picture's file; webdataset: KEY; text: "key" of the line, else NAME:LINE
  const char *group;      // value of the field the split goes by: what sample_is_held_out takes
} Sample;

typedef struct Source Source;

typedef struct SourceStats {
  int64_t samples, images; // used; images: of these samples
  Unused unused;
} SourceStats;

// Opens a source and reads its index: all texts, and the header of every image. `held_out_by` is "key", "caption" (for
// text samples their first text) or the name of a JSON field or column; NULL = "key". A sample that cannot be used is
// left out and counted by reason (data/unused.h). Nothing is logged.
// NULL with *err set when the type or path is wrong, a tar is damaged, no sample can be used, or one has no field
// `held_out_by`.
Source *source_open(const char *type, const char *path, const char *held_out_by, Error *err);
void source_close(Source *source);

// Leaves out the samples that have an image of more pixels, too, and counts them; images keep their numbers. -1 with
// *err set when none is left.
int source_limit_pixels(Source *source, int64_t max_pixels, Error *err);

int64_t source_count(const Source *source); // samples
SourceStats source_stats(const Source *source);
// Logs what the source is in a line, after a warning for the first sample of each reason why some are left out.
void source_log(const Source *source);
// Sample i of [0, count); valid until the source is closed.
const Sample *source_sample(const Source *source, int64_t i);

// What is wrong with more than one image: the shard it is in is gone, or not the file that was indexed.
enum { SOURCE_CHANGED = -2 };

// Reads the encoded bytes of an image (SamplePart.image). Thread-safe. *bytes is malloc'd, *n its size; 0, or -1 or
// SOURCE_CHANGED with *err set, *bytes NULL, when the file is not as it was or cannot be read.
int source_read_image(const Source *source, int64_t image, uint8_t **bytes, size_t *n, Error *err);
int64_t source_images(const Source *source); // they are numbered from 0
// Where an image lies, for messages ("path" or "shard.tar:member"); malloc'd.
char *source_image_name(const Source *source, int64_t image);

// Whether a sample belongs to the held-out part: a 64-bit hash of `value` (FNV-1a, then the splitmix64 finaliser) as
// a number in [0,1) is below `fraction`. Stable across machines and versions; growing the fraction only adds.
bool sample_is_held_out(const char *value, double fraction);
#endif
