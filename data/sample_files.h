// Which files make a sample: the picture and the caption of one name, in an archive or in a folder.
#ifndef TESSERA_SAMPLE_FILES_H
#define TESSERA_SAMPLE_FILES_H

#include "base/base.h"

#include <stdbool.h>

// By the last extension, upper or lower case.
typedef enum FileKind {
  FILE_PICTURE,       // .jpg .jpeg .jpe .jfif .png
  FILE_PICTURE_OTHER, // what pictures are called that are not decoded; what it is says its content
  FILE_TXT,           // .txt
  FILE_JSON,          // .json
  FILE_OTHER
} FileKind;
FileKind file_kind(const char *name);

// A sample, or what is there of one: indexes into the names, -1 for what is not there.
typedef struct SampleFiles {
  const char *key; // [key_bytes] of the first name, not terminated
  size_t key_bytes;
  int64_t picture, txt, json;
  int64_t twice; // a file of a kind that the sample has already; the number of these is counted beside it
  int64_t twices;
} SampleFiles;

typedef struct SampleFilesList {
  SampleFiles *of; // [n], by key
  int64_t n;
  int64_t others;      // files that belong to no sample, or to one as a further part; hidden ones are not counted
  int64_t first_other; // -1: none
} SampleFilesList;

// Groups n names. The key is the path up to the last dot of its base name (v1.0_3.png, v1.0_3.txt), or up to the dot
// before a picture's extension there (a.png.txt is a.png's caption). A file that has no other half under its own key is
// a further part of the sample, if there is one, whose key is the path up to an earlier dot of the base name: that is
// WebDataset's rule (000.seg.png is a part of 000).
SampleFilesList sample_files_group(const char *const *name, int64_t n);
void sample_files_free(SampleFilesList *list);
#endif
