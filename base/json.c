#include "base/json.h"

#include "base/utf8.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBER_MAX = 60 }; // cJSON copies numbers into a buffer of 64

// The scan checks the grammar, blanks the comments in place and notes the line of every value in document order, which
// is also the order in which a walk over cJSON's tree meets them.
typedef struct Scan {
  char *text; // [bytes]
  size_t bytes, at;
  const char *name;
  bool comments;
  int line;
  int *value_line; // [values]
  size_t values, capacity;
  Error *err;
} Scan;

bool json_is_utf8(const char *s) {
  size_t n = strlen(s), at = 0, len;
  while (at < n && (len = utf8_length((const unsigned char *)s + at, n - at))) at += len;
  return at == n;
}

static int scan_error(Scan *s, size_t at, const char *hint, const char *what) {
  int line = 1, column = 1;
  for (size_t i = 0; i < at; i++) {
    unsigned char c = (unsigned char)s->text[i];
    if (c == '\n') {
      line++;
      column = 1;
    } else if ((c & 0xC0) != 0x80) {
      column++;
    }
  }
  return error_set(s->err, hint, "%.300s:%d:%d: %s", s->name, line, column, what);
}

// "..., found 'x'" with whatever stands there.
static int scan_unexpected(Scan *s, const char *hint, const char *expected) {
  char what[160];
  if (s->at >= s->bytes) {
    snprintf(what, sizeof what, "%s, found the end of the text", expected);
  } else {
    unsigned char c = (unsigned char)s->text[s->at];
    if (c > 0x20 && c < 0x7F)
      snprintf(what, sizeof what, "%s, found '%c'", expected, c);
    else
      snprintf(what, sizeof what, "%s, found byte 0x%02X", expected, c);
  }
  return scan_error(s, s->at, hint, what);
}

static int scan_comment(Scan *s) {
  size_t start = s->at, end = start + 2;
  if (!s->comments) return scan_error(s, start, NULL, "comments are not allowed here");
  if (s->text[start + 1] == '/') {
    while (end < s->bytes && s->text[end] != '\n') end++;
  } else {
    while (end + 1 < s->bytes && !(s->text[end] == '*' && s->text[end + 1] == '/')) end++;
    if (end + 1 >= s->bytes) return scan_error(s, start, "close it with */", "this comment never ends");
    end += 2;
  }
  for (; s->at < end; s->at++) {
    if (s->text[s->at] == '\n')
      s->line++;
    else
      s->text[s->at] = ' ';
  }
  return 0;
}

// Moves to the next character that is neither space nor comment.
static int scan_space(Scan *s) {
  for (; s->at < s->bytes; s->at++) {
    char c = s->text[s->at];
    if (c == '\n') {
      s->line++;
    } else if (c == '/' && s->at + 1 < s->bytes && (s->text[s->at + 1] == '/' || s->text[s->at + 1] == '*')) {
      if (scan_comment(s)) return -1;
      s->at--;
    } else if (c != ' ' && c != '\t' && c != '\r') {
      return 0;
    }
  }
  return 0;
}

static char scan_peek(const Scan *s) {
  return s->at < s->bytes ? s->text[s->at] : 0;
}

static int scan_escape(Scan *s) {
  size_t start = s->at++; // at the backslash
  char c = scan_peek(s);
  if (c == 0 || !strchr("\"\\/bfnrtu", c)) return scan_error(s, start, "write \\\\ for a backslash", "unknown escape");
  s->at++;
  if (c != 'u') return 0;
  for (int i = 0; i < 4; i++, s->at++)
    if (s->at >= s->bytes || !strchr("0123456789abcdefABCDEF", s->text[s->at]) || s->text[s->at] == 0)
      return scan_error(s, start, NULL, "\\u needs four hexadecimal digits");
  if (memcmp(s->text + s->at - 4, "0000", 4) == 0) return scan_error(s, start, NULL, "\\u0000 is not allowed");
  return 0;
}

static int scan_string(Scan *s) {
  size_t start = s->at++;
  while (scan_peek(s) != '"') {
    unsigned char c = (unsigned char)scan_peek(s);
    if (s->at >= s->bytes || c == '\n') return scan_error(s, start, "close it with \"", "this string never ends");
    if (c < 0x20) return scan_error(s, s->at, "write \\t, \\r or \\uXXXX", "control character in a string");
    if (c == '\\') {
      if (scan_escape(s)) return -1;
      continue;
    }
    size_t len = utf8_length((const unsigned char *)s->text + s->at, s->bytes - s->at);
    if (len == 0) return scan_error(s, s->at, "save the file as UTF-8", "this is not UTF-8");
    s->at += len;
  }
  s->at++;
  return 0;
}

static size_t scan_digits(Scan *s) {
  size_t start = s->at;
  while (scan_peek(s) >= '0' && scan_peek(s) <= '9') s->at++;
  return s->at - start;
}

static int scan_number(Scan *s) {
  size_t start = s->at;
  if (scan_peek(s) == '-') s->at++;
  size_t first = s->at, digits = scan_digits(s);
  bool bad = digits == 0 || (digits > 1 && s->text[first] == '0');
  if (scan_peek(s) == '.') {
    s->at++;
    bad |= scan_digits(s) == 0;
  }
  if (scan_peek(s) == 'e' || scan_peek(s) == 'E') {
    s->at++;
    if (scan_peek(s) == '+' || scan_peek(s) == '-') s->at++;
    bad |= scan_digits(s) == 0;
  }
  if (bad) return scan_error(s, start, "write it like 12, -0.5 or 3e-4", "this is not a number");
  if (s->at - start > NUMBER_MAX) return scan_error(s, start, NULL, "this number is longer than 60 characters");
  return 0;
}

static int scan_word(Scan *s) {
  static const char *const words[] = {"true", "false", "null"};
  for (int i = 0; i < 3; i++) {
    size_t n = strlen(words[i]);
    if (s->bytes - s->at < n || memcmp(s->text + s->at, words[i], n) != 0) continue;
    s->at += n;
    return 0;
  }
  // What Python's json.dump writes.
  static const char *const not_json[] = {"NaN", "Infinity", "-Infinity"};
  for (int i = 0; i < 3; i++) {
    size_t n = strlen(not_json[i]);
    if (s->bytes - s->at < n || memcmp(s->text + s->at, not_json[i], n) != 0) continue;
    char what[80];
    snprintf(what, sizeof what, "a value is expected, found '%c' of %s, which is no JSON", *not_json[i], not_json[i]);
    return scan_error(s, s->at, "write null, or leave the key out", what);
  }
  return scan_unexpected(s, "strings need double quotes", "a value is expected");
}

static int scan_value(Scan *s, int depth);

// An object or array: `close` is its closing bracket.
static int scan_items(Scan *s, char close, int depth) {
  if (depth >= JSON_MAX_DEPTH) return scan_error(s, s->at, NULL, "more than 64 levels of brackets");
  s->at++;
  if (scan_space(s)) return -1;
  if (scan_peek(s) == close) {
    s->at++;
    return 0;
  }
  for (;;) {
    if (close == '}') {
      if (scan_peek(s) != '"')
        return scan_unexpected(s, "no comma after the last one", "a key in double quotes is expected");
      if (scan_string(s) || scan_space(s)) return -1;
      if (scan_peek(s) != ':') return scan_unexpected(s, NULL, "':' is expected after a key");
      s->at++;
      if (scan_space(s)) return -1;
    }
    if (scan_value(s, depth + 1) || scan_space(s)) return -1;
    if (scan_peek(s) == close) break;
    if (scan_peek(s) != ',')
      return scan_unexpected(s, NULL, close == '}' ? "',' or '}' is expected" : "',' or ']' is expected");
    s->at++;
    if (scan_space(s)) return -1;
  }
  s->at++;
  return 0;
}

static int scan_value(Scan *s, int depth) {
  if (s->values == s->capacity) {
    s->capacity = s->capacity ? 2 * s->capacity : 64;
    s->value_line = xrealloc(s->value_line, s->capacity * sizeof *s->value_line);
  }
  s->value_line[s->values++] = s->line;
  char c = scan_peek(s);
  if (c == '{') return scan_items(s, '}', depth);
  if (c == '[') return scan_items(s, ']', depth);
  if (c == '"') return scan_string(s);
  if (c == '-' && s->at + 1 < s->bytes && s->text[s->at + 1] == 'I') return scan_word(s);
  if (c == '-' || (c >= '0' && c <= '9')) return scan_number(s);
  return scan_word(s);
}

static int compare_keys(const void *a, const void *b) {
  const cJSON *x = *(const cJSON *const *)a, *y = *(const cJSON *const *)b;
  int order = strcmp(x->string, y->string);
  return order ? order : (x->valueint > y->valueint) - (x->valueint < y->valueint);
}

static int check_keys(const cJSON *object, const char *name, Error *err) {
  size_t n = (size_t)cJSON_GetArraySize(object), i = 0;
  const cJSON **items = xmalloc(n * sizeof *items), *item;
  cJSON_ArrayForEach(item, object) items[i++] = item;
  if (n > 1) qsort(items, n, sizeof *items, compare_keys);
  int rc = 0;
  for (i = 1; i < n && rc == 0; i++) {
    if (strcmp(items[i - 1]->string, items[i]->string) != 0) continue;
    rc = error_set(err, "leave one of them", "%.300s:%d: key \"%.100s\" again, first in line %d", name,
                   items[i]->valueint, items[i]->string, items[i - 1]->valueint);
  }
  free(items);
  return rc;
}

// Gives every item its line, in valueint, which cJSON only fills for its own deprecated readers; then what the scan
// could not see.
static int annotate(cJSON *item, const int **line, const char *name, Error *err) {
  item->valueint = *(*line)++;
  if (cJSON_IsNumber(item) && !isfinite(item->valuedouble))
    return error_set(err, NULL, "%.300s:%d: this number is too large", name, item->valueint);
  cJSON *child;
  cJSON_ArrayForEach(child, item) if (annotate(child, line, name, err)) return -1;
  return cJSON_IsObject(item) ? check_keys(item, name, err) : 0;
}

cJSON *json_parse(const char *text, size_t bytes, const char *name, JsonComments comments, Error *err) {
  const char *encoding = text_encoding(text, bytes);
  if (encoding) {
    error_set(err, "save it as UTF-8", "%.300s is in %s", name, encoding);
    return NULL;
  }
  Scan s = {.bytes = bytes, .name = name, .comments = comments == JSON_WITH_COMMENTS, .line = 1, .err = err};
  s.text = xmalloc(bytes + 1);
  memcpy(s.text, text, bytes);
  s.text[bytes] = 0;
  s.at = utf8_mark(text, bytes); // cJSON skips it too
  cJSON *root = NULL;
  if (scan_space(&s) || scan_value(&s, 0) || scan_space(&s)) goto done;
  if (s.at != s.bytes) {
    scan_unexpected(&s, "a file holds one value", "the end of the text is expected");
    goto done;
  }
  const char *end = s.text;
  root = cJSON_ParseWithLengthOpts(s.text, bytes + 1, &end, 1);
  if (!root) {
    scan_error(&s, (size_t)(end - s.text), "a \\uD8xx escape needs its second half", "this is not valid JSON");
    goto done;
  }
  const int *line = s.value_line;
  if (annotate(root, &line, name, err)) {
    cJSON_Delete(root);
    root = NULL;
  }
done:
  free(s.value_line);
  free(s.text);
  return root;
}

cJSON *json_parse_file(const char *path, size_t max_bytes, JsonComments comments, Error *err) {
  size_t bytes;
  char *text = file_read(path, max_bytes, &bytes, err);
  if (!text) return NULL;
  cJSON *root = json_parse(text, bytes, path, comments, err);
  free(text);
  return root;
}

int json_line(const cJSON *item) {
  return item->valueint;
}

void json_write_string(FILE *f, const char *s) {
  size_t n = strlen(s);
  fputc('"', f);
  for (size_t i = 0; i < n;) {
    unsigned char c = (unsigned char)s[i];
    size_t len = utf8_length((const unsigned char *)s + i, n - i);
    if (len == 0)
      fputs("\\ufffd", f);
    else if (c == '"' || c == '\\')
      fprintf(f, "\\%c", c);
    else if (c == '\n')
      fputs("\\n", f);
    else if (c == '\t')
      fputs("\\t", f);
    else if (c < 0x20)
      fprintf(f, "\\u%04x", c);
    else
      fwrite(s + i, 1, len, f);
    i += len ? len : 1;
  }
  fputc('"', f);
}

void json_write_number(FILE *f, double v) {
  char text[40] = "null";
  for (int digits = 6; isfinite(v) && digits <= 17; digits++) {
    snprintf(text, sizeof text, "%.*g", digits, v);
    if (strtod(text, NULL) == v) break;
  }
  fputs(text, f);
}
