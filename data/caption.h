// Where the caption of a picture is found, whatever people call it.
#ifndef TESSERA_CAPTION_H
#define TESSERA_CAPTION_H

#include "data/sample_files.h"
#include "data/source_internal.h"

// What people call the picture's file and its caption, in JSON and in the heading of a table; the first that is there
// counts. NULL after the last.
extern const char *const file_names[], *const caption_names[];
#define FILE_NAMES "file, file_name, filename, path, image .."
#define CAPTION_NAMES "caption, text, prompt, description .."

// The string under the first of `names` that the object has; NULL when it has none, or another kind of value there.
const char *object_string(const cJSON *object, const char *const *names);

enum { CAPTION_MAX_BYTES = 1 << 24 }; // of a .txt or .json that belongs to one picture

// The texts beside one picture, each NULL where it is not there: malloc'd, NUL-terminated.
typedef struct CaptionTexts {
  char *txt, *json;
  size_t txt_bytes, json_bytes;
} CaptionTexts;

// Adds the caption to the draft: the .txt, or the .json's string under one of caption_names. *fields is the JSON object
// (free it with cJSON_Delete), NULL when it is not there or not needed. -1 with *skip set when there is no caption, or
// the JSON that holds it, or holds what the split goes by, cannot be parsed.
int draft_add_caption(Source *s, SampleDraft *d, const CaptionTexts *texts, cJSON **fields, Skip *skip);
void caption_texts_free(CaptionTexts *texts);

// Counts what a sample has twice; `where` says what lies where. Nothing when it has nothing twice.
void sample_skip_twice(Source *s, const SampleFiles *files, const char *where);
#endif
