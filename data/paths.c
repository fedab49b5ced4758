#include "data/paths.h"

#include <dirent.h>
#include <errno.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

enum { MOST_PATHS = 1000000 }; // that braces may stand for

const char *path_base(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool path_is_hidden(const char *path) {
  static const char folder[] = "__MACOSX";
  if (path_base(path)[0] == '.') return true;
  for (const char *p = path, *end; (p = strstr(p, folder)); p++) {
    end = p + sizeof folder - 1;
    if ((p == path || p[-1] == '/') && (!*end || *end == '/')) return true;
  }
  return false;
}

bool path_ends(const char *path, const char *suffix) {
  size_t n = strlen(path), k = strlen(suffix);
  return n > k && strcasecmp(path + n - k, suffix) == 0;
}

char *path_home(const char *path) {
  const char *home = getenv("HOME");
  if (path[0] != '~' || (path[1] != '/' && path[1]) || !home) return xstrdup(path);
  return xasprintf("%s%s", home, path + 1);
}

const char *path_below(const char *path, const char *folder) {
  path += strlen(folder);
  while (*path == '/') path++;
  return path;
}

// ---- lists

static int path_compare(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

void path_list_add(PathList *list, char *path) {
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? 2 * list->capacity : 16;
    list->path = xrealloc(list->path, (size_t)list->capacity * sizeof(char *));
  }
  list->path[list->count++] = path;
}

void path_list_sort(PathList *list) {
  if (list->count > 1) qsort(list->path, (size_t)list->count, sizeof(char *), path_compare);
}

void path_list_free(PathList *list) {
  for (int i = 0; i < list->count; i++) free(list->path[i]);
  free(list->path);
  *list = (PathList){0};
}

static void path_list_unique(PathList *list) {
  int n = 0;
  for (int i = 0; i < list->count; i++) {
    if (n > 0 && strcmp(list->path[n - 1], list->path[i]) == 0)
      free(list->path[i]);
    else
      list->path[n++] = list->path[i];
  }
  list->count = n;
}

// ---- braces

// The closing brace of the opening one at `open`, inner pairs passed over; NULL when there is none.
static const char *brace_close(const char *open) {
  int depth = 0;
  for (const char *p = open; *p; p++) {
    depth += (*p == '{') - (*p == '}');
    if (depth == 0) return p;
  }
  return NULL;
}

// The two ends of a range "007..120"; false when it is none.
static bool brace_range(const char *text, size_t n, long long end[2], int *digits) {
  char copy[48];
  if (n >= sizeof copy) return false;
  memcpy(copy, text, n);
  copy[n] = 0;
  char *dots = strstr(copy, "..");
  if (!dots || strspn(copy, "0123456789") != (size_t)(dots - copy) || dots == copy) return false;
  if (!dots[2] || strspn(dots + 2, "0123456789") != strlen(dots + 2) || dots - copy > 18 || strlen(dots + 2) > 18)
    return false;
  end[0] = strtoll(copy, NULL, 10);
  end[1] = strtoll(dots + 2, NULL, 10);
  // As in a shell: numbers are as wide as the wider end when one of the two begins with a zero.
  bool padded = (copy[0] == '0' && dots - copy > 1) || (dots[2] == '0' && dots[3]);
  size_t width = (size_t)(dots - copy) > strlen(dots + 2) ? (size_t)(dots - copy) : strlen(dots + 2);
  *digits = padded ? (int)width : 1;
  return true;
}

static int braces_expand(const char *path, PathList *out, Error *err);

// Writes out the braces of before + text + after.
static int brace_put(const char *before, size_t before_bytes, const char *text, size_t n, const char *after,
                     PathList *out, Error *err) {
  char *whole = xasprintf("%.*s%.*s%s", (int)before_bytes, before, (int)n, text, after);
  int rc = braces_expand(whole, out, err);
  free(whole);
  return rc;
}

// Appends what {a,b} and {0..9} in the path stand for; a brace that holds neither is a character.
static int braces_expand(const char *path, PathList *out, Error *err) {
  for (const char *open = strchr(path, '{'); open; open = strchr(open + 1, '{')) {
    const char *close = brace_close(open);
    if (!close) break;
    long long end[2];
    int digits, rc = 0;
    size_t before = (size_t)(open - path);
    if (brace_range(open + 1, (size_t)(close - open - 1), end, &digits)) {
      for (long long i = end[0], step = end[0] <= end[1] ? 1 : -1; rc == 0; i += step) {
        char number[24];
        int n = snprintf(number, sizeof number, "%0*lld", digits, i);
        rc = brace_put(path, before, number, (size_t)n, close + 1, out, err);
        if (i == end[1]) break;
      }
      return rc;
    }
    int depth = 0, commas = 0; // of this brace's own level
    for (const char *p = open; p < close; p++) {
      depth += (*p == '{') - (*p == '}');
      commas += depth == 1 && *p == ',';
    }
    if (commas == 0) continue;
    const char *item = open + 1;
    for (const char *p = item; rc == 0 && p <= close; p++) {
      if (p == close || (*p == ',' && depth == 1)) {
        rc = brace_put(path, before, item, (size_t)(p - item), close + 1, out, err);
        item = p + 1;
      } else {
        depth += (*p == '{') - (*p == '}');
      }
    }
    return rc;
  }
  if (out->count == MOST_PATHS)
    return error_set(err, "name fewer files, or their folder", "the braces stand for more than %d paths", MOST_PATHS);
  path_list_add(out, xstrdup(path));
  return 0;
}

// ---- what a path means

static int folder_add_files(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err) {
  DIR *folder = opendir(path);
  if (!folder) return error_set(err, "check its permissions", "cannot list %s: %s", path, strerror(errno));
  int before = out->count;
  for (struct dirent *e; (e = readdir(folder));)
    if (!path_is_hidden(e->d_name) && (path_ends(e->d_name, suffix) || path_ends(e->d_name, suffix2)))
      path_list_add(out, xasprintf("%s/%s", path, e->d_name));
  closedir(folder);
  if (out->count > before) return 0;
  return error_set(err,
                   strcmp(suffix, ".tar") == 0 ? "a folder of pictures with their captions is of type folder"
                                               : "check data.sources[].path",
                   "no file in %s ends in %s%s%s", path, suffix, strcmp(suffix, suffix2) ? " or " : "",
                   strcmp(suffix, suffix2) ? suffix2 : "");
}

static int path_add_files(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err) {
  struct stat st;
  if (stat(path, &st) == 0) {
    if (S_ISDIR(st.st_mode)) return folder_add_files(path, suffix, suffix2, out, err);
    path_list_add(out, xstrdup(path));
    return 0;
  }
  int missing = errno;
  if (!strpbrk(path, "*?["))
    return error_set(err,
                     strstr(path, "://") ? "sources are files of this machine; download them first"
                                         : "check data.sources[].path",
                     "cannot open %s: %s", path, strerror(missing));
  glob_t matches;
  int found = glob(path, 0, NULL, &matches);
  for (size_t i = 0; found == 0 && i < matches.gl_pathc; i++) path_list_add(out, xstrdup(matches.gl_pathv[i]));
  if (found == 0) globfree(&matches);
  return found == 0 ? 0 : error_set(err, "check data.sources[].path", "no file matches %s", path);
}

int path_list_expand(const char *path, const char *suffix, const char *suffix2, PathList *out, Error *err) {
  *out = (PathList){0};
  PathList written = {0};
  char *home = path_home(path);
  struct stat st;
  int rc = 0;
  if (stat(home, &st) == 0)
    path_list_add(&written, xstrdup(home)); // a file may have braces in its name
  else
    rc = braces_expand(home, &written, err);
  for (int i = 0; rc == 0 && i < written.count; i++) rc = path_add_files(written.path[i], suffix, suffix2, out, err);
  free(home);
  path_list_free(&written);
  if (rc != 0) path_list_free(out);
  path_list_sort(out); // folder order differs between machines
  path_list_unique(out);
  return rc;
}
