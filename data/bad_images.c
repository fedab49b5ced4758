#include "data/bad_images.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Images that the error which ends a run names.
enum { LISTED = 5 };
// Images in a row that cannot be decoded after which a source is not what it should be: the first ones, and later ones.
enum { FIRST_IMAGES = 16, MOST_IN_A_ROW = 10000 };

// Index of an image among the first n, -1 when it is none of them.
static int64_t find(const BadImages *list, ImageId id, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (list->of[i].source == id.source && list->of[i].image == id.image) return i;
  return -1;
}

static void add(BadImages *list, ImageId id) {
  if (list->n == list->capacity) {
    list->capacity = list->capacity ? 2 * list->capacity : 16;
    list->of = xrealloc(list->of, (size_t)list->capacity * sizeof *list->of);
  }
  list->of[list->n++] = id;
}

// True when the image is bad and new to the list.
static bool note(BadImages *list, ImageId id, bool bad) {
  int64_t at = find(list, id, bad ? list->n : list->restored);
  bool is_new = bad && at < 0, is_mended = !bad && at >= 0;
  if (is_new) add(list, id);
  if (!is_mended) return is_new;
  list->n--;
  list->restored--;
  memmove(list->of + at, list->of + at + 1, (size_t)(list->n - at) * sizeof *list->of);
  return false;
}

// -1 with *err that names the first of the images.
static int too_many(const BadImages *list, Source *const *source, int most, Error *err) {
  char names[600] = "";
  for (int64_t i = 0, at = 0; i < min_i64(list->n, LISTED); i++) {
    ImageId id = list->of[i];
    char *name = source_image_name(source[id.source], id.image);
    size_t n = strlen(name), most_shown = 100; // of a long path the end says more
    at += snprintf(names + at, sizeof names - (size_t)at, "%s%s", i ? ", " : "", n > most_shown ? ".." : "");
    at += snprintf(names + at, sizeof names - (size_t)at, "%s", n > most_shown ? name + n - most_shown : name);
    free(name);
  }
  // That a file has changed says more than what it holds now.
  ImageId last = list->of[list->n - 1];
  uint8_t *bytes;
  size_t n;
  Error why;
  bool changed = source_read_image(source[last.source], last.image, &bytes, &n, &why) != 0;
  free(bytes);
  char *hint = xasprintf("mend them or take them out of the data, or raise data.max_bad (0: no limit)%s%s",
                         changed ? "; " : "", changed ? why.text : "");
  error_set(err, hint, "%lld images cannot be decoded, more than data.max_bad = %d: %s%s", (long long)list->n, most,
            names, list->n > LISTED ? ", .." : "");
  free(hint);
  return -1;
}

// Counts the images of a source in a row that cannot be decoded. -1 with *err set when the row is so long that the
// source must be to blame: at the source's beginning, or, once one could be decoded, over two epochs.
static int source_try(BadImages *list, const Source *source, ImageId id, bool bad, Error *err) {
  SourceTrial *trial = &list->trial[id.source];
  if (!bad) {
    *trial = (SourceTrial){.decoded = true};
    return 0;
  }
  int64_t images = source_images(source), enough = min_i64(FIRST_IMAGES, images);
  if (trial->decoded) enough = min_i64(max_i64(2 * images, FIRST_IMAGES), MOST_IN_A_ROW);
  if (++trial->bad < enough) return 0;
  char *name = source_image_name(source, id.image);
  error_set(err, "the warnings before this say why; mend the images, or take the source out of data.sources",
            "data.sources[%d]: none of its images can be decoded%s: tried %lld in a row, the last was %s", id.source,
            trial->decoded ? " any more" : "", (long long)trial->bad, name);
  free(name);
  return -1;
}

int bad_images_meet(BadImages *list, Source *const *source, ImageId id, bool bad, int most, Error *err) {
  if (source_try(list, source[id.source], id, bad, err)) return -1;
  return most > 0 && note(list, id, bad) && list->n > most ? too_many(list, source, most, err) : 0;
}

void bad_images_decoded(BadImages *list, int source) {
  list->trial[source].decoded = true;
}

bool bad_images_calm(const BadImages *list) {
  bool calm = list->restored == 0;
  for (int i = 0; i < STREAM_SOURCES; i++) calm &= list->trial[i].bad == 0;
  return calm;
}

void bad_images_restore(BadImages *list, ImageId id) {
  add(list, id);
  list->restored = list->n;
}

void bad_images_free(BadImages *list) {
  free(list->of);
  *list = (BadImages){0};
}
