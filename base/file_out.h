// A file of any size that is written once, front to back: hashed as it is written, so that nothing is read back, and on
// its way to the disk early, so that little is left for the flush at its end and few pages of memory wait for it.
#ifndef TESSERA_FILE_OUT_H
#define TESSERA_FILE_OUT_H

#include "base/hash.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct FileOut {
  int fd;
  bool regular;     // a device is not flushed, nor the caller's to remove
  uint64_t bytes;   // written so far
  uint64_t started; // of them on their way to the disk, a multiple of the window
  Hash64 hash;      // of what was written
} FileOut;

// Every function returns 0, or -1 with errno.
// Creates or empties a file.
int file_out_open(FileOut *f, const char *path);
int file_out_write(FileOut *f, const void *data, size_t bytes);
// `sync`: on the disk before it returns. The file is closed in any case.
int file_out_close(FileOut *f, bool sync);
#endif
