// A set of files, by what the file system knows them by, whatever path leads to them.
#ifndef TESSERA_FILE_SET_H
#define TESSERA_FILE_SET_H

#include "base/base.h"

#include <stdbool.h>

typedef struct FileId {
  uint64_t device, inode;
} FileId;

// Zeroed, it is empty.
typedef struct FileSet {
  FileId *of; // [capacity], a power of two; all zeros: free
  int64_t n, capacity;
} FileSet;

bool file_set_add(FileSet *set, FileId id); // whether it was not in it yet
bool file_set_has(const FileSet *set, FileId id);
void file_set_free(FileSet *set);
#endif
