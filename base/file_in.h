// A file of any size that is read once, front to back, at the disk's rate: threads read ahead of what is taken.
#ifndef TESSERA_FILE_IN_H
#define TESSERA_FILE_IN_H

#include "base/base.h"

enum { FILE_IN_CHUNK = 16 << 20, FILE_IN_SLOTS = 16 };

typedef struct FileIn FileIn;

// Bytes of memory that a reader of a file of this size fills: whole chunks, FILE_IN_SLOTS at most.
size_t file_in_memory(uint64_t file_bytes);
// Begins to read. `memory` [file_in_memory of the file's size] is borrowed; copies to a device are fastest from memory
// that its backend gave. NULL with *err set.
FileIn *file_in_open(const char *path, void *memory, Error *err);
// The next bytes, FILE_IN_CHUNK of them except at the file's end; 0: that was all. They stay as they are until the next
// call. -1 with *err set when they cannot be read.
int64_t file_in_next(FileIn *f, const void **data, Error *err);
void file_in_close(FileIn *f); // NULL is allowed
#endif
