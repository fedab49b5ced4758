// Index of a tar archive: ustar, GNU long names and sizes, pax path and size. Data is read later, with pread.
#ifndef TESSERA_TAR_H
#define TESSERA_TAR_H

#include "base/base.h"

// A regular file inside the archive.
typedef struct TarMember {
  char *name;     // whole path, NUL-terminated
  int64_t offset; // of its first data byte in the archive
  int64_t size;   // bytes
} TarMember;

typedef struct TarIndex {
  TarMember *member; // [count], in archive order
  int64_t count;
} TarIndex;

// Lists the regular files of the archive open at `fd` (folders, links and devices are passed over). `name` names the
// archive in errors. -1 with *err set (and *out empty) on a bad checksum, a size beyond the end of the file, a
// truncated header, or extended headers that make no sense.
int tar_index(int fd, const char *name, TarIndex *out, Error *err);
void tar_index_free(TarIndex *index);
#endif
