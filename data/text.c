// Sources of text: .txt files of paragraphs, .jsonl files of texts or of texts and images in turn.
#include "data/paths.h"
#include "data/source_internal.h"

#include <stdlib.h>
#include <string.h>

// {"segments":[{"text":..},{"image":path}]}: 0, or -1 with *skip set when it cannot be used.
static int draft_add_parts(Source *s, SampleDraft *d, const char *folder, const cJSON *list, Skip *skip) {
  const cJSON *item;
  cJSON_ArrayForEach(item, list) {
    const char *text = json_string(item, "text"), *image = json_string(item, "image");
    if (!text == !image)
      return skip_set(skip, UNUSED_LINE, "a segment is neither {\"text\": \"..\"} nor {\"image\": \"..\"}");
    if (image && draft_add_listed_image(s, d, folder, image, skip) != 0) return -1;
    if (text && text[0]) draft_add_text(s, d, text, strlen(text));
  }
  return d->parts > 0 ? 0 : skip_set(skip, UNUSED_EMPTY, "\"segments\" is empty");
}

// What one parsed line holds; -1 with *skip set when it cannot be used.
static int draft_add_line(Source *s, SampleDraft *d, const char *folder, const cJSON *object, Skip *skip) {
  const cJSON *list = cJSON_GetObjectItemCaseSensitive(object, "segments");
  const char *text = json_string(object, "text");
  if (cJSON_IsArray(list)) return draft_add_parts(s, d, folder, list, skip);
  if (list || !text)
    return skip_set(skip, UNUSED_LINE, "the line is neither {\"text\": \"..\"} nor {\"segments\": [..]}");
  if (!text[0]) return skip_set(skip, UNUSED_EMPTY, "its text is empty");
  draft_add_text(s, d, text, strlen(text));
  return 0;
}

static int text_add_json(Source *s, const char *folder, const char *where, const char *line, size_t n, Error *err) {
  Skip skip = {.reason = UNUSED_JSON};
  cJSON *object = json_parse(line, n, "JSON", JSON_PLAIN, &skip.why);
  const char *key = json_string(object, "key");
  bool interleaved = cJSON_GetObjectItemCaseSensitive(object, "segments") != NULL;
  if (!key) key = where;
  SampleDraft d = {.kind = interleaved ? SAMPLE_INTERLEAVED : SAMPLE_TEXT, .key = pool_string(s, key, strlen(key))};
  int rc = 0;
  if (object && draft_add_line(s, &d, folder, object, &skip) == 0)
    rc = sample_add(s, &d, object, err);
  else
    sample_skip(s, where, &skip);
  cJSON_Delete(object);
  free(d.part);
  return rc;
}

static int text_index_jsonl(Source *s, const char *folder, const char *name, char *text, size_t n, Error *err) {
  int rc = 0;
  char *at = text, *line;
  size_t length;
  for (int64_t number = 1; rc == 0 && (line = line_next(&at, text + n, &length)); number++) {
    if (length == 0) continue;
    char *where = xasprintf("%s:%lld", name, (long long)number);
    rc = text_add_json(s, folder, where, line, length, err);
    free(where);
  }
  return rc;
}

// A document per run of lines that are not blank.
static int text_index_paragraphs(Source *s, const char *name, char *text, size_t n, Error *err) {
  char *at = text, *end = text + n;
  int64_t number = 1;
  while (at < end) {
    char *start = at, *stop = at; // the paragraph is [start, stop)
    int64_t first = number;
    while (at < end) {
      char *newline = memchr(at, '\n', (size_t)(end - at)), *line_end = newline ? newline : end;
      size_t length = (size_t)(line_end - at);
      text_trim(at, &length);
      at = newline ? newline + 1 : end;
      number++;
      if (length == 0) break;
      stop = line_end > start && line_end[-1] == '\r' ? line_end - 1 : line_end;
    }
    if (stop == start) continue;
    char *key = xasprintf("%s:%lld", name, (long long)first);
    SampleDraft d = {.kind = SAMPLE_TEXT, .key = pool_string(s, key, strlen(key))};
    free(key);
    draft_add_text(s, &d, start, (size_t)(stop - start));
    int rc = sample_add(s, &d, NULL, err);
    free(d.part);
    if (rc != 0) return rc;
  }
  return 0;
}

static int text_index_file(Source *s, const char *path, Error *err) {
  if (!path_ends(path, ".txt") && !path_ends(path, ".jsonl"))
    return error_set(err, "a text source is a .txt or a .jsonl", "%s is neither a .txt nor a .jsonl", path);
  size_t n;
  char *text = list_read(path, &n, err);
  if (!text) return -1;
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  char *folder = slash ? xasprintf("%.*s", (int)(slash - path + (slash == path)), path) : xstrdup(".");
  int rc = path_ends(path, ".jsonl") ? text_index_jsonl(s, folder, name, text, n, err)
                                     : text_index_paragraphs(s, name, text, n, err);
  free(folder);
  free(text);
  return rc;
}

int text_index(Source *s, Error *err) {
  PathList files;
  if (path_list_expand(s->path, ".txt", ".jsonl", &files, err) != 0) return -1;
  int rc = 0;
  for (int i = 0; rc == 0 && i < files.count; i++) rc = text_index_file(s, files.path[i], err);
  path_list_free(&files);
  return rc;
}
