// A folder of captioned pictures, however people keep them: a list of captions in it (data/caption_list.h), or a
// caption beside each picture under the same name (data/caption.h), in folders nested as they like. What a folder is
// shows itself: one that has a list goes by it, with all that is below.
#include "data/caption.h"
#include "data/caption_list.h"
#include "data/file_set.h"
#include "data/paths.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

enum { KINDS = 64 };

// How many files there are of one extension, for the message that says what a folder holds.
typedef struct ExtensionCount {
  char extension[16];
  int64_t count;
} ExtensionCount;

typedef struct Folder {
  Source *source;
  FileSet met;                // folders walked: links may lead in circles
  FileSet named;              // pictures that a list names
  int64_t lists, pairs;       // found
  ExtensionCount kind[KINDS]; // of all files
  int kinds;
} Folder;

static FileId file_id(const struct stat *st) {
  return (FileId){(uint64_t)st->st_dev, (uint64_t)st->st_ino};
}

static void folder_count_kind(Folder *f, const char *name) {
  const char *dot = strrchr(name, '.');
  if (!dot) dot = "no extension";
  for (int i = 0; i < f->kinds; i++)
    if (strncasecmp(f->kind[i].extension, dot, sizeof f->kind[i].extension - 1) == 0) {
      f->kind[i].count++;
      return;
    }
  if (f->kinds == KINDS) return; // more than a message could list
  char *extension = f->kind[f->kinds].extension;
  snprintf(extension, sizeof f->kind[0].extension, "%s", dot);
  for (char *p = extension; *p; p++) *p = (char)tolower((unsigned char)*p);
  f->kind[f->kinds++].count = 1;
}

// ---- pictures with a caption beside them

// The text of one file of a sample; 0 when there is no such file, -1 with *skip set when it cannot be read.
static int text_read(const char *path, char **text, size_t *n, Skip *skip) {
  if (!path) return 0;
  *text = file_read(path, CAPTION_MAX_BYTES, n, &skip->why);
  skip->reason = UNUSED_NO_CAPTION;
  return *text ? 0 : -1;
}

// Puts the sample into *d; -1 with *skip set when it cannot be used.
static int pair_draft(Source *s, const PathList *files, const SampleFiles *f, SampleDraft *d, cJSON **fields,
                      Skip *skip) {
  if (f->picture < 0) return skip_set(skip, UNUSED_NO_IMAGE, "it has no picture (.jpg, .jpeg, .png) of its name");
  CaptionTexts texts = {0};
  int rc = text_read(f->txt < 0 ? NULL : files->path[f->txt], &texts.txt, &texts.txt_bytes, skip);
  if (rc == 0) rc = text_read(f->json < 0 ? NULL : files->path[f->json], &texts.json, &texts.json_bytes, skip);
  if (rc == 0) rc = draft_add_caption(s, d, &texts, fields, skip);
  caption_texts_free(&texts);
  return rc == 0 ? draft_add_image_file(s, d, files->path[f->picture], skip) : -1;
}

static int pair_add(Folder *folder, const PathList *files, const SampleFiles *f, Error *err) {
  Source *s = folder->source;
  Skip skip = {0};
  int64_t first = f->picture >= 0 ? f->picture : f->txt >= 0 ? f->txt : f->json;
  const char *path = files->path[first], *key = path_below(path, s->path);
  SampleDraft d = {.kind = SAMPLE_CAPTIONED, .key = pool_string(s, key, strlen(key))};
  cJSON *fields = NULL;
  int rc = 0;
  folder->pairs += f->picture >= 0 && (f->txt >= 0 || f->json >= 0);
  if (pair_draft(s, files, f, &d, &fields, &skip) == 0)
    rc = sample_add(s, &d, fields, err);
  else
    sample_skip(s, path, &skip);
  if (f->twices > 0) sample_skip_twice(s, f, files->path[f->twice]);
  cJSON_Delete(fields);
  free(d.part);
  return rc;
}

static int pairs_index(Folder *folder, const PathList *files, Error *err) {
  SampleFilesList list = sample_files_group((const char *const *)files->path, files->count);
  int rc = 0;
  for (int64_t i = 0; rc == 0 && i < list.n; i++) rc = pair_add(folder, files, &list.of[i], err);
  if (list.others) source_count_files(folder->source, list.others, files->path[list.first_other]);
  sample_files_free(&list);
  return rc;
}

// ---- lists

static void folder_name_picture(void *context, const char *path) {
  struct stat st;
  if (stat(path, &st) == 0) file_set_add(&((Folder *)context)->named, file_id(&st));
}

// The list among the files of one folder: its name, NULL when there is none; -1 when there are two.
static int list_find(const char *path, const PathList *files, const char **list, Error *err) {
  *list = NULL;
  for (int i = 0; i < files->count; i++) {
    const char *name = strrchr(files->path[i], '/') + 1;
    for (const char *const *known = caption_list_names; *known; known++) {
      if (strcmp(name, *known) != 0) continue;
      if (*list) return error_set(err, "keep one of them", "%s has both %s and %s", path, *list, name);
      *list = name;
    }
  }
  return 0;
}

// Counts the pictures that the list above them does not name.
static void pictures_skip(Folder *folder, const PathList *files) {
  Skip skip = {0};
  skip_set(&skip, UNUSED_UNLISTED, "the list of captions does not name it");
  for (int i = 0; i < files->count; i++) {
    struct stat st;
    if (file_kind(files->path[i]) > FILE_PICTURE_OTHER) continue;
    bool named = stat(files->path[i], &st) == 0 && file_set_has(&folder->named, file_id(&st));
    if (!named) sample_skip(folder->source, files->path[i], &skip);
  }
}

// ---- the walk

// The files and folders in `path`, sorted; hidden ones are left out.
static int folder_list(Folder *folder, const char *path, PathList *files, PathList *folders, Error *err) {
  *files = *folders = (PathList){0};
  DIR *open = opendir(path);
  if (!open)
    return error_set(err,
                     errno == ENOTDIR ? "name the folder that the pictures and their list are in; a .tar is of type "
                                        "webdataset, a .txt or .jsonl of texts of type text"
                                      : "check data.sources[].path",
                     "cannot open the folder %s: %s", path, strerror(errno));
  for (struct dirent *e; (e = readdir(open));) {
    if (path_is_hidden(e->d_name)) continue;
    char *full = xasprintf("%s/%s", path, e->d_name);
    struct stat st;
    bool is_file = e->d_type == DT_REG, is_folder = e->d_type == DT_DIR;
    if (!is_file && !is_folder && stat(full, &st) == 0) { // a link, or a file system that does not say
      is_file = S_ISREG(st.st_mode);
      is_folder = S_ISDIR(st.st_mode);
    }
    if (is_file) folder_count_kind(folder, e->d_name);
    if (is_file || !is_folder)
      path_list_add(files, full);
    else
      path_list_add(folders, full);
  }
  closedir(open);
  path_list_sort(files);
  path_list_sort(folders);
  return 0;
}

// `listed`: a list above speaks for the pictures here.
static int folder_walk(Folder *folder, const char *path, bool listed, Error *err) {
  struct stat st;
  if (stat(path, &st) != 0)
    return error_set(err, "check data.sources[].path", "cannot open the folder %s: %s", path, strerror(errno));
  if (!file_set_add(&folder->met, file_id(&st))) return 0;
  PathList files, folders;
  if (folder_list(folder, path, &files, &folders, err) != 0) return -1;
  const char *list = NULL;
  int rc = listed ? 0 : list_find(path, &files, &list, err);
  if (rc == 0 && list) {
    folder->lists++;
    listed = true;
    rc = caption_list_index(folder->source, path, list, folder_name_picture, folder, err);
  }
  if (rc == 0 && listed)
    pictures_skip(folder, &files);
  else if (rc == 0)
    rc = pairs_index(folder, &files, err);
  path_list_free(&files);
  for (int i = 0; rc == 0 && i < folders.count; i++) rc = folder_walk(folder, folders.path[i], listed, err);
  path_list_free(&folders);
  return rc;
}

static int kind_compare(const void *a, const void *b) {
  const ExtensionCount *x = a, *y = b;
  if (x->count != y->count) return x->count < y->count ? 1 : -1;
  return strcmp(x->extension, y->extension);
}

// What is not a folder of captioned pictures: what was looked for, and what is there.
static int folder_unknown(Folder *f, Error *err) {
  char holds[400] = "";
  qsort(f->kind, (size_t)f->kinds, sizeof f->kind[0], kind_compare);
  const char *type = NULL;
  for (int i = 0; i < f->kinds; i++) {
    int used = (int)strlen(holds);
    if (i < 6)
      snprintf(holds + used, sizeof holds - (size_t)used, "%s%lld %s", i ? ", " : "", (long long)f->kind[i].count,
               f->kind[i].extension);
    if (!type && strcasecmp(f->kind[i].extension, ".tar") == 0) type = "webdataset";
    if (!type && strcasecmp(f->kind[i].extension, ".jsonl") == 0) type = "text";
  }
  char *hint = type ? xasprintf("these files are read with \"type\": \"%s\"", type)
                    : xasprintf("README.md shows the formats: a list with a picture's file and its caption a line, or "
                                "a.txt beside each a.png");
  error_set(err, hint,
            "%s has neither captions.tsv, captions.csv, captions.jsonl, metadata.csv or metadata.jsonl nor pictures "
            "(.jpg, .png) with a .txt or .json of the same name; it holds %s%s",
            f->source->path, f->kinds ? holds : "no files", f->kinds > 6 ? " and others" : "");
  free(hint);
  return -1;
}

int folder_index(Source *s, Error *err) {
  Folder folder = {.source = s};
  int rc = folder_walk(&folder, s->path, false, err);
  if (rc == 0 && folder.lists == 0 && folder.pairs == 0) rc = folder_unknown(&folder, err);
  file_set_free(&folder.met);
  file_set_free(&folder.named);
  return rc;
}
