// The files that one path in the configuration stands for.
#ifndef TESSERA_PATHS_H
#define TESSERA_PATHS_H

#include "base/base.h"

#include <stdbool.h>

typedef struct PathList {
  char **path; // [count], malloc'd
  int count, capacity;
} PathList;

// The files `path` means, sorted by bytes, none twice: itself when it is there; of a folder those that end in `suffix`
// or `suffix2`, hidden ones left out; else what is left of it when {a,b} and {000..012} are written out, each a
// file, a folder or a glob (* ? []). "~/" is the home folder. -1 with *err set, *out empty, when there is none, or one
// that is written out is not there.
int path_list_expand(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err);
void path_list_add(PathList *list, char *path); // takes `path`
void path_list_sort(PathList *list);
void path_list_free(PathList *list);

// What comes in `path` after its last slash.
const char *path_base(const char *path);
// Whether a file or folder is a system's own: its base name begins with a dot (AppleDouble's ._x.png, .DS_Store), or it
// is a folder __MACOSX or lies in one.
bool path_is_hidden(const char *path);
// Whether `path` ends in `suffix` (".txt"), upper or lower case.
bool path_ends(const char *path, const char *suffix);
// `path` with a leading "~/" replaced by $HOME; malloc'd.
char *path_home(const char *path);
// What comes in `path` after its beginning `folder` and the slashes behind that.
const char *path_below(const char *path, const char *folder);
#endif
