// A file that only grows, by whole records: each one is written in a single piece or not at all, so that neither a kill
// nor a full disk leaves half a record in front of the next.
#ifndef TESSERA_APPEND_H
#define TESSERA_APPEND_H

#include "base/base.h"

typedef struct AppendFile {
  int fd; // -1: closed
  char *path;
  int64_t size;    // bytes of whole records
  int64_t missing; // records lost since the last one that was written
} AppendFile;

// Opens `path` at its end, created where it is missing; with `must_create` an existing one is an error. 0, or -1 with
// *err set.
int append_open(AppendFile *f, const char *path, int must_create, Error *err);
// Writes one record. When that fails the file keeps its last whole record and -1 is returned; the first record lost is
// a warning in the log, and so is the number of records lost once writing works again. A run goes on without its
// figures rather than end for them.
int append_record(AppendFile *f, const void *bytes, size_t n);
void append_close(AppendFile *f);
#endif
