// A folder of temporary files that every test of a group finds empty: a group's set-up and tear-down, a test's set-up.
// In memory where there is such a place, since some tests flush hundreds of files.
#ifndef TESSERA_TESTS_TEMP_FOLDER_H
#define TESSERA_TESTS_TEMP_FOLDER_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char folder[64];

static inline int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at) {
  (void)st;
  (void)kind;
  return at->level ? remove(path) : 0;
}

static inline int empty_folder(void **state) {
  (void)state;
  return nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static inline int make_folder(void **state) {
  (void)state;
  snprintf(folder, sizeof folder, "%s/tessera-test.XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  return mkdtemp(folder) ? 0 : -1;
}

static inline int remove_folder(void **state) {
  return empty_folder(state) || rmdir(folder);
}
#endif
