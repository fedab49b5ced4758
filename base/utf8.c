#include "base/utf8.h"

#include "base/base.h"

#include <string.h>

size_t utf8_length(const unsigned char *s, size_t n) {
  if (n == 0) return 0;
  if (s[0] < 0x80) return 1;
  size_t len = s[0] >= 0xC2 && s[0] < 0xE0 ? 2 : s[0] >= 0xE0 && s[0] < 0xF0 ? 3 : s[0] >= 0xF0 && s[0] < 0xF5 ? 4 : 0;
  if (len == 0 || len > n) return 0;
  for (size_t i = 1; i < len; i++)
    if ((s[i] & 0xC0) != 0x80) return 0;
  if (s[0] == 0xE0 && s[1] < 0xA0) return 0;
  if (s[0] == 0xED && s[1] > 0x9F) return 0;
  if (s[0] == 0xF0 && s[1] < 0x90) return 0;
  if (s[0] == 0xF4 && s[1] > 0x8F) return 0;
  return len;
}

static int is_control(const unsigned char *s, size_t len) {
  return len == 1 ? s[0] < 0x20 || s[0] == 0x7F : len == 2 && s[0] == 0xC2 && s[1] < 0xA0;
}

char *utf8_printable(const char *text) {
  const unsigned char *s = (const unsigned char *)text;
  size_t n = strlen(text), at = 0, len;
  char *out = xmalloc(3 * n + 1);
  for (size_t i = 0; i < n; i += len ? len : 1) {
    len = utf8_length(s + i, n - i);
    const char *from = !len ? "\xEF\xBF\xBD" : is_control(s + i, len) ? " " : text + i;
    size_t bytes = !len ? 3 : is_control(s + i, len) ? 1 : len;
    memcpy(out + at, from, bytes);
    at += bytes;
  }
  out[at] = 0;
  return out;
}

size_t utf8_mark(const char *text, size_t n) {
  return n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

const char *text_encoding(const char *text, size_t n) {
  // The longer marks first: UTF-32's begins with UTF-16's.
  if (n >= 4 && memcmp(text, "\xFF\xFE\0\0", 4) == 0) return "UTF-32 (little-endian)";
  if (n >= 4 && memcmp(text, "\0\0\xFE\xFF", 4) == 0) return "UTF-32 (big-endian)";
  if (n >= 2 && memcmp(text, "\xFF\xFE", 2) == 0) return "UTF-16 (little-endian)";
  if (n >= 2 && memcmp(text, "\xFE\xFF", 2) == 0) return "UTF-16 (big-endian)";
  if (n >= 4 && text[0] && !text[1] && text[2] && !text[3]) return "UTF-16 (little-endian, without a mark)";
  if (n >= 4 && !text[0] && text[1] && !text[2] && text[3]) return "UTF-16 (big-endian, without a mark)";
  return NULL;
}
