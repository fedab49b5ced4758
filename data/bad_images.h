// The images of a run that could not be decoded, each counted once however often it is met, and over resumes too: the
// list is part of the loader's state. Says when there are too many. Not thread-safe.
#ifndef TESSERA_BAD_IMAGES_H
#define TESSERA_BAD_IMAGES_H

#include "data/stream.h"

typedef struct ImageId {
  int source;
  int64_t image; // as source_read_image takes it
} ImageId;

typedef struct SourceTrial {
  bool decoded; // an image of the source could be decoded
  int64_t bad;  // images met since then that could not be
} SourceTrial;

// In the order they were met; a zeroed list is empty.
typedef struct BadImages {
  ImageId *of; // [n]
  int64_t n, capacity;
  int64_t restored;                  // of[0 .. restored) are from a state: one of them may have been mended since
  SourceTrial trial[STREAM_SOURCES]; // not part of a state
} BadImages;

// Takes note of an image that was met. A restored one leaves the list when it can be decoded again. -1 with *err set
// when this makes more than `most` bad images (0: no limit, and no list), or a row of its source's that is so long that
// the source must be to blame.
int bad_images_meet(BadImages *list, Source *const *source, ImageId id, bool bad, int most, Error *err);
// Takes note of images of a source that could be decoded, where none could not be and bad_images_calm says that it
// makes no difference which.
void bad_images_decoded(BadImages *list, int source);
// Whether images that can be decoded change nothing: none is restored, and no row of bad ones is to be broken.
bool bad_images_calm(const BadImages *list);
// Adds one from a state, before anything is noted.
void bad_images_restore(BadImages *list, ImageId id);
void bad_images_free(BadImages *list);
#endif
