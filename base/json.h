// JSON: a strict parser over cJSON that knows lines and columns, and a writer of strings and numbers.
#ifndef TESSERA_JSON_H
#define TESSERA_JSON_H

#include "base/base.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdio.h>

enum { JSON_MAX_DEPTH = 64 };
// Whether // and /* */ comments are allowed.
typedef enum JsonComments { JSON_PLAIN, JSON_WITH_COMMENTS } JsonComments;

// Parses exactly one value (RFC 8259, UTF-8) and nothing after it; free with cJSON_Delete. NULL with *err naming
// "name:line:column" on: bad syntax, a key twice in one object, more than JSON_MAX_DEPTH levels, \u0000 in a string, a
// number that is not finite or longer than 60 characters, text that is not UTF-8 (UTF-16 and UTF-32 are named).
cJSON *json_parse(const char *text, size_t bytes, const char *name, JsonComments comments, Error *err);
// The same for a file of at most max_bytes.
cJSON *json_parse_file(const char *path, size_t max_bytes, JsonComments comments, Error *err);

// The line (from 1) a parsed value begins at.
int json_line(const cJSON *item);

// Whether a string is well-formed UTF-8.
bool json_is_utf8(const char *s);

// A string with its quotes, escaped; bytes that are not UTF-8 become U+FFFD, so the output is always valid.
void json_write_string(FILE *f, const char *s);
// The shortest text that reads back as the same double; null for infinities and NaN, which JSON does not have.
void json_write_number(FILE *f, double v);
#endif
