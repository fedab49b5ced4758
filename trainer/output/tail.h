// The lines of a file from its last to its first, read in blocks from the end: what a start needs of metrics.jsonl is
// there, however long the run was.
#ifndef TESSERA_TAIL_H
#define TESSERA_TAIL_H

#include "base/base.h"

typedef struct Tail {
  int fd;
  const char *path; // borrowed
  char *text;       // bytes [begin, end) of the file
  size_t room;
  int64_t begin, end;
} Tail;

// A line without its newline; text is not terminated, and valid until the next call.
typedef struct TailLine {
  const char *text;
  size_t bytes;
  int64_t end; // of the file up to here, the newline included
} TailLine;

// -1 with *err where the file cannot be read; nothing is to be closed then.
int tail_open(Tail *t, const char *path, Error *err);
// The line before; what follows the last newline is none. 1, or 0 when there is no more, or -1 with *err.
int tail_line(Tail *t, TailLine *line, Error *err);
void tail_close(Tail *t);
#endif
