#include "data/bad_images.h"

#include <stdlib.h>
#include <string.h>

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

bool bad_images_note(BadImages *list, ImageId id, bool bad) {
  int64_t at = find(list, id, bad ? list->n : list->restored);
  bool is_new = bad && at < 0, is_mended = !bad && at >= 0;
  if (is_new) add(list, id);
  if (!is_mended) return is_new;
  list->n--;
  list->restored--;
  memmove(list->of + at, list->of + at + 1, (size_t)(list->n - at) * sizeof *list->of);
  return false;
}

void bad_images_restore(BadImages *list, ImageId id) {
  add(list, id);
  list->restored = list->n;
}

void bad_images_free(BadImages *list) {
  free(list->of);
  *list = (BadImages){0};
}
