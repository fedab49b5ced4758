// What a source leaves out, counted by reason; the first of each reason is kept to be named.
#ifndef TESSERA_UNUSED_H
#define TESSERA_UNUSED_H

#include "base/base.h"

// Each has its words in data/unused.c. Indexes on disk hold them by number: add at the end, and change MAGIC in
// data/index_cache.c.
typedef enum UnusedReason {
  UNUSED_NO_CAPTION, // a picture without a caption, or with one that is empty
  UNUSED_NO_IMAGE,   // a caption without a picture, or whose picture cannot be opened
  UNUSED_FORMAT,     // neither JPEG nor PNG
  UNUSED_DAMAGED,    // a picture whose header cannot be read
  UNUSED_PIXELS,     // a picture of too many pixels
  UNUSED_JSON,       // JSON that cannot be parsed
  UNUSED_LINE,       // a line or object that is not of its file's format
  UNUSED_EMPTY,      // a text without a character
  UNUSED_ENCODING,   // a text that is not UTF-8 but UTF-16 or UTF-32
  UNUSED_TOO_LONG,   // a file beyond what its kind may have
  UNUSED_TWICE,      // a second picture or caption of one sample
  UNUSED_UNLISTED,   // a picture that the list above it does not name: behind the others, which may be why
  UNUSED_FILE,       // no sample, but a file beside them that is part of none, or a further part of one
  UNUSED_REASONS
} UnusedReason;

typedef struct Unused {
  int64_t count[UNUSED_REASONS];
  const char *first[UNUSED_REASONS]; // "WHERE is left out: WHY"; a name for UNUSED_FILE; NULL where there is none
} Unused;

// Why one sample is not used: where something fails, it says so here.
typedef struct Skip {
  UnusedReason reason;
  Error why;
} Skip;

// Fills *skip and returns -1.
int skip_set(Skip *skip, UnusedReason reason, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

int64_t unused_total(const Unused *unused); // samples: without UNUSED_FILE
// The samples: "3 without a caption, 1 neither JPEG nor PNG"; malloc'd, empty when there is none.
char *unused_print(const Unused *unused);
#endif
