// The files that one path in the configuration stands for.
#ifndef TESSERA_PATHS_H
#define TESSERA_PATHS_H

#include "base/base.h"

#include <stdbool.h>

typedef struct PathList {
  char **path; // [count], sorted by bytes
  int count;
} PathList;

// The files `path` means: itself when it is a file; those of a folder that end in `suffix` or `suffix2`; or the
// matches of a glob. -1 with *err set, *out empty, when there is none.
int path_list_expand(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err);
void path_list_free(PathList *list);

// Whether `path` ends in `suffix` (".txt"), upper or lower case.
bool path_ends(const char *path, const char *suffix);
#endif
