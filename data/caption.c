#include "data/caption.h"

#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

const char *const file_names[] = {"file",  "file_name",  "filename",   "file_path", "filepath", "path",
                                  "image", "image_path", "image_file", "img",       NULL};
const char *const caption_names[] = {"caption", "text", "prompt", "description", "sentence", "title", "alt_text", NULL};

const char *object_string(const cJSON *object, const char *const *names) {
  for (; *names; names++)
    if (cJSON_GetObjectItemCaseSensitive(object, *names)) return json_string(object, *names);
  return NULL;
}

// A .txt without its byte order mark and the white space around it; -1 with *skip set when it is not UTF-8.
static int txt_caption(const CaptionTexts *texts, const char **caption, size_t *n, Skip *skip) {
  const char *encoding = text_encoding(texts->txt, texts->txt_bytes);
  if (encoding) return skip_set(skip, UNUSED_ENCODING, "its .txt is in %s; save it as UTF-8", encoding);
  size_t mark = utf8_mark(texts->txt, texts->txt_bytes);
  *n = texts->txt_bytes - mark;
  *caption = text_trim(texts->txt + mark, n);
  return 0;
}

int draft_add_caption(Source *s, SampleDraft *d, const CaptionTexts *texts, cJSON **fields, Skip *skip) {
  *fields = NULL;
  skip->reason = UNUSED_JSON;
  bool needs_json = texts->json && (!texts->txt || source_needs_fields(s));
  if (needs_json) *fields = json_parse(texts->json, texts->json_bytes, "its .json", JSON_PLAIN, &skip->why);
  if (needs_json && !*fields) return -1;
  const char *caption = object_string(*fields, caption_names);
  size_t n = caption ? strlen(caption) : 0;
  if (caption) caption = text_trim(caption, &n);
  if (texts->txt && txt_caption(texts, &caption, &n, skip) != 0) return -1;
  if (!texts->txt && !caption)
    return skip_set(skip, UNUSED_NO_CAPTION, "it has no caption: no .txt%s",
                    texts->json ? ", and its .json no string under " CAPTION_NAMES : " or .json of its name");
  if (n == 0) return skip_set(skip, UNUSED_NO_CAPTION, "its caption is empty");
  draft_add_text(s, d, caption, n);
  return 0;
}

void caption_texts_free(CaptionTexts *texts) {
  free(texts->txt);
  free(texts->json);
  *texts = (CaptionTexts){0};
}

void sample_skip_twice(Source *s, const SampleFiles *files, const char *where) {
  Skip skip = {0};
  if (files->twices == 0) return;
  skip_set(&skip, UNUSED_TWICE, "another file of its sample is used");
  sample_skip(s, where, &skip);
  s->unused.count[UNUSED_TWICE] += files->twices - 1;
}
