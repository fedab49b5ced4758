// The images of a run that could not be decoded, each counted once however often it is met, and over resumes too: the
// list is part of the loader's state. Not thread-safe.
#ifndef TESSERA_BAD_IMAGES_H
#define TESSERA_BAD_IMAGES_H

#include "base/base.h"

#include <stdbool.h>

typedef struct ImageId {
  int source;
  int64_t image; // as source_read_image takes it
} ImageId;

// In the order they were met; a zeroed list is empty.
typedef struct BadImages {
  ImageId *of; // [n]
  int64_t n, capacity;
  int64_t restored; // of[0 .. restored) are from a state: one of them may have been mended since
} BadImages;

// Takes note of an image that was met; true when it is bad and new to the list. One that was restored leaves the list
// when it can be decoded again.
bool bad_images_note(BadImages *list, ImageId id, bool bad);
// Adds one from a state, before anything is noted.
void bad_images_restore(BadImages *list, ImageId id);
void bad_images_free(BadImages *list);
#endif
