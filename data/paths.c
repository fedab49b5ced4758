#include "data/paths.h"

#include <dirent.h>
#include <errno.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

bool path_ends(const char *path, const char *suffix) {
  size_t n = strlen(path), k = strlen(suffix);
  return n > k && strcasecmp(path + n - k, suffix) == 0;
}

static int path_compare(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

static void path_list_add(PathList *list, char *path) {
  list->path = xrealloc(list->path, (size_t)(list->count + 1) * sizeof(char *));
  list->path[list->count++] = path;
}

void path_list_free(PathList *list) {
  for (int i = 0; i < list->count; i++) free(list->path[i]);
  free(list->path);
}

int path_list_expand(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err) {
  *out = (PathList){0};
  struct stat st;
  bool found = stat(path, &st) == 0;
  if (found && S_ISDIR(st.st_mode)) {
    DIR *folder = opendir(path);
    if (!folder) return error_set(err, "check its permissions", "cannot list %s: %s", path, strerror(errno));
    for (struct dirent *e; (e = readdir(folder));)
      if (path_ends(e->d_name, suffix) || path_ends(e->d_name, suffix2))
        path_list_add(out, xasprintf("%s/%s", path, e->d_name));
    closedir(folder);
  } else if (found) {
    path_list_add(out, xstrdup(path));
  } else if (strpbrk(path, "*?[")) {
    glob_t matches;
    if (glob(path, 0, NULL, &matches) == 0) {
      for (size_t i = 0; i < matches.gl_pathc; i++) path_list_add(out, xstrdup(matches.gl_pathv[i]));
      globfree(&matches);
    }
  } else {
    return error_set(err, "check data.sources[].path", "cannot open %s: %s", path, strerror(errno));
  }
  if (out->count == 0 && !found) return error_set(err, "check data.sources[].path", "no file matches %s", path);
  if (out->count == 0)
    return error_set(err, "check data.sources[].path", "no file in %s ends in %s%s%s", path, suffix,
                     strcmp(suffix, suffix2) ? " or " : "", strcmp(suffix, suffix2) ? suffix2 : "");
  qsort(out->path, (size_t)out->count, sizeof(char *), path_compare); // folder order differs between machines
  return 0;
}
