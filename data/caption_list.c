#include "data/caption_list.h"

#include "data/caption.h"
#include "data/csv.h"
#include "data/paths.h"
#include "data/sample_files.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

const char *const caption_list_names[] = {
    "captions.jsonl", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv", "metadata.tsv", NULL};

typedef struct List {
  Source *source;
  const char *folder, *path; // of the pictures; of the list itself
  void (*named)(void *context, const char *path);
  void *context;
} List;

// Takes note of a picture that the list names.
static void list_name(const List *l, const char *file) {
  char *path = file[0] == '/' ? xstrdup(file) : xasprintf("%s/%s", l->folder, file);
  l->named(l->context, path);
  free(path);
}

// One picture with its caption. -1 only for errors that end the opening.
static int list_add(const List *l, const char *where, const char *file, const char *caption, size_t caption_bytes,
                    const cJSON *fields, Error *err) {
  Source *s = l->source;
  Skip skip = {0};
  // The folder of a nested list is a part of its samples' keys.
  const char *below = path_below(l->folder, s->path);
  char *key = file[0] == '/' || !*below ? xstrdup(file) : xasprintf("%s/%s", below, file);
  SampleDraft d = {.kind = SAMPLE_CAPTIONED, .key = pool_string(s, key, strlen(key))};
  free(key);
  caption = text_trim(caption, &caption_bytes);
  int rc = 0;
  if (caption_bytes > 0) draft_add_text(s, &d, caption, caption_bytes);
  if (caption_bytes == 0) skip_set(&skip, UNUSED_NO_CAPTION, "its caption is empty");
  if (caption_bytes > 0 && draft_add_listed_image(s, &d, l->folder, file, &skip) == 0)
    rc = sample_add(s, &d, fields, err);
  else
    sample_skip(s, where, &skip);
  free(d.part);
  return rc;
}

// ---- .jsonl

static int list_add_object(const List *l, const char *where, const char *line, size_t n, Error *err) {
  Skip skip = {.reason = UNUSED_JSON};
  cJSON *object = json_parse(line, n, "JSON", JSON_PLAIN, &skip.why);
  const char *file = object_string(object, file_names), *caption = object_string(object, caption_names);
  int rc = 0;
  if (file && file[0]) list_name(l, file);
  if (file && file[0] && caption) {
    rc = list_add(l, where, file, caption, strlen(caption), object, err);
  } else {
    if (object && (!file || !file[0]))
      skip_set(&skip, UNUSED_LINE, "no string names the picture's file (looked for " FILE_NAMES ")");
    else if (object)
      skip_set(&skip, UNUSED_NO_CAPTION, "no string is a caption (looked for " CAPTION_NAMES ")");
    sample_skip(l->source, where, &skip);
  }
  cJSON_Delete(object);
  return rc;
}

static int list_index_jsonl(const List *l, char *text, size_t n, Error *err) {
  int rc = 0;
  char *at = text, *line;
  size_t length;
  for (int64_t number = 1; rc == 0 && (line = line_next(&at, text + n, &length)); number++) {
    if (length == 0) continue;
    char *where = xasprintf("%s line %lld", l->path, (long long)number);
    rc = list_add_object(l, where, line, length, err);
    free(where);
  }
  return rc;
}

// ---- .csv, .tsv

// Which columns a table has. Names are those of the heading, malloc'd; none without one.
typedef struct Columns {
  char **name; // [count]
  int64_t count, file, caption;
} Columns;

static int64_t column_find(const CsvReader *r, const char *const *names) {
  for (; *names; names++)
    for (int64_t i = 0; i < r->cells; i++)
      if (strcasecmp(r->cell[i].text, *names) == 0) return i;
  return -1;
}

// Headings are written by hand: "file_name, text".
static void cells_trim(CsvReader *r) {
  for (int64_t i = 0; i < r->cells; i++) {
    CsvCell *cell = &r->cell[i];
    cell->text += text_trim(cell->text, &cell->bytes) - cell->text;
    cell->text[cell->bytes] = 0;
  }
}

// Whether the record just read is a heading: then *c holds it.
static bool columns_read(CsvReader *r, Columns *c) {
  cells_trim(r);
  int64_t file = column_find(r, file_names), caption = column_find(r, caption_names);
  if (file < 0 || caption < 0) return false;
  *c = (Columns){
      .name = xmalloc((size_t)r->cells * sizeof(char *)), .count = r->cells, .file = file, .caption = caption};
  for (int64_t i = 0; i < r->cells; i++) c->name[i] = xstrdup(r->cell[i].text);
  return true;
}

static void columns_free(Columns *c) {
  for (int64_t i = 0; c->name && i < c->count; i++) free(c->name[i]);
  free(c->name);
}

// The other columns as a JSON object, for a split by one of them; NULL when it is not needed.
static cJSON *columns_fields(const Source *s, const Columns *c, const CsvReader *r) {
  if (!source_needs_fields(s)) return NULL;
  cJSON *fields = cJSON_CreateObject();
  for (int64_t i = 0; c->name && i < c->count && i < r->cells; i++)
    if (strcmp(c->name[i], s->held_out_by) == 0) cJSON_AddStringToObject(fields, c->name[i], r->cell[i].text);
  return fields;
}

static int list_add_record(const List *l, const Columns *c, const CsvReader *r, const char *where, Error *err) {
  Skip skip = {0};
  const CsvCell *file = c->file < r->cells ? &r->cell[c->file] : NULL;
  const CsvCell *caption = c->caption < r->cells ? &r->cell[c->caption] : NULL;
  if (file && file->bytes) list_name(l, file->text);
  if (file && file->bytes && caption && r->cells <= c->count) {
    cJSON *fields = columns_fields(l->source, c, r);
    int rc = list_add(l, where, file->text, caption->text, caption->bytes, fields, err);
    cJSON_Delete(fields);
    return rc;
  }
  if (r->cells > c->count)
    skip_set(&skip, UNUSED_LINE, "it has %lld cells, the table %lld columns (quote what holds a '%c')",
             (long long)r->cells, (long long)c->count, r->delimiter);
  else if (r->delimiter == '\t' && !c->name)
    skip_set(&skip, UNUSED_LINE, "the line is not FILE<TAB>CAPTION");
  else
    skip_set(&skip, UNUSED_LINE, "the line names no %s", file && file->bytes ? "caption" : "file");
  sample_skip(l->source, where, &skip);
  return 0;
}

// Reads the first record with r's delimiter, as r->cell: whether it is a heading; *plain when it is a picture's file
// and a caption.
static bool heading_read(CsvReader *r, Columns *c, bool *plain) {
  Error ignored;
  bool record = csv_next(r, &ignored) == CSV_RECORD;
  *plain = record && r->cells == 2 && file_kind(r->cell[0].text) <= FILE_PICTURE_OTHER;
  return record && columns_read(r, c);
}

// A reader of the lines behind the heading, where there is one, with the delimiter that the first line has.
static int table_open(const List *l, bool tabs, char *text, size_t n, CsvReader *r, Columns *c, Error *err) {
  enum { HEADING_BYTES = 1 << 16 };
  const char *delimiters = tabs ? "\t" : ",;\t";
  char delimiter = delimiters[0], *copy = xmalloc(HEADING_BYTES + 1);
  size_t beginning = n < HEADING_BYTES ? n : HEADING_BYTES;
  bool heading = false, any_plain = false;
  size_t skipped = 0;
  int64_t line = 1;
  for (const char *d = delimiters; *d && !heading; d++) {
    bool plain;
    memcpy(copy, text, beginning);
    CsvReader first = csv_open(copy, beginning, *d);
    heading = heading_read(&first, c, &plain);
    if (heading || (plain && !any_plain)) delimiter = *d;
    if (heading) skipped = (size_t)(first.at - copy), line = first.next_line;
    any_plain |= plain;
    csv_close(&first);
  }
  free(copy);
  if (!heading && !any_plain && !tabs && n > 0)
    return error_set(err, "name them in the first line, as in: file_name,text",
                     "%s: its first line, \"%.*s\", names no columns for the picture's file (" FILE_NAMES
                     ") and its caption (" CAPTION_NAMES ")",
                     l->path, (int)min_i64(80, (int64_t)strcspn(text, "\r\n")), text);
  *r = csv_open(text + skipped, n - skipped, delimiter);
  r->next_line = line;
  if (tabs) r->most_cells = c->count;
  return 0;
}

static int list_index_table(const List *l, bool tabs, char *text, size_t n, Error *err) {
  CsvReader r;
  Columns columns = {.count = 2, .caption = 1}; // without a heading
  if (table_open(l, tabs, text, n, &r, &columns, err) != 0) return -1;
  int rc = 0;
  Skip skip = {.reason = UNUSED_LINE};
  for (CsvState state; rc == 0 && (state = csv_next(&r, &skip.why)) != CSV_END;) {
    char *where = xasprintf("%s line %lld", l->path, (long long)r.line);
    if (state == CSV_RECORD) rc = list_add_record(l, &columns, &r, where, err);
    if (state == CSV_BAD_RECORD) sample_skip(l->source, where, &skip);
    if (state == CSV_BAD_FILE) rc = error_set(err, skip.why.hint, "%s: %s", l->path, skip.why.text);
    free(where);
  }
  csv_close(&r);
  columns_free(&columns);
  return rc;
}

int caption_list_index(Source *s, const char *folder, const char *name, void (*named)(void *context, const char *path),
                       void *context, Error *err) {
  char *path = xasprintf("%s/%s", folder, name);
  List l = {.source = s, .folder = folder, .path = path, .named = named, .context = context};
  size_t n;
  char *text = list_read(path, &n, err);
  int rc = !text                       ? -1
           : path_ends(name, ".jsonl") ? list_index_jsonl(&l, text, n, err)
                                       : list_index_table(&l, path_ends(name, ".tsv"), text, n, err);
  free(text);
  free(path);
  return rc;
}
