#include "data/unused.h"

#include "base/text_out.h"

#include <stdio.h>

static const char *const words[UNUSED_FILE] = {
    [UNUSED_NO_CAPTION] = "without a caption",
    [UNUSED_NO_IMAGE] = "without a picture",
    [UNUSED_FORMAT] = "neither JPEG nor PNG",
    [UNUSED_DAMAGED] = "damaged",
    [UNUSED_PIXELS] = "with too many pixels",
    [UNUSED_JSON] = "with JSON that cannot be parsed",
    [UNUSED_LINE] = "not in the format of their list",
    [UNUSED_EMPTY] = "empty",
    [UNUSED_ENCODING] = "not in UTF-8",
    [UNUSED_TOO_LONG] = "too long",
    [UNUSED_UNLISTED] = "not named by their list",
    [UNUSED_TWICE] = "twice in one sample",
};

int skip_set(Skip *skip, UnusedReason reason, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  skip->reason = reason;
  skip->why.hint[0] = 0;
  vsnprintf(skip->why.text, sizeof skip->why.text, fmt, ap);
  va_end(ap);
  return -1;
}

int64_t unused_total(const Unused *unused) {
  int64_t n = 0;
  for (int i = 0; i < UNUSED_FILE; i++) n += unused->count[i];
  return n;
}

char *unused_print(const Unused *unused) {
  TextOut out;
  FILE *f = text_begin(&out);
  const char *separator = "";
  for (int i = 0; i < UNUSED_FILE; i++) {
    if (unused->count[i] == 0) continue;
    fprintf(f, "%s%lld %s", separator, (long long)unused->count[i], words[i]);
    separator = ", ";
  }
  return text_end(&out);
}
