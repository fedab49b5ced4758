#include "trainer/output/tail.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 1 << 16 };

int tail_open(Tail *t, const char *path, Error *err) {
  *t = (Tail){.fd = open(path, O_RDONLY | O_CLOEXEC), .path = path};
  t->begin = t->end = t->fd < 0 ? -1 : (int64_t)lseek(t->fd, 0, SEEK_END);
  if (t->end >= 0) return 0;
  error_set(err, "check the path and its permissions", "cannot read %s: %s", path, strerror(errno));
  if (t->fd >= 0) close(t->fd);
  return -1;
}

// Puts the bytes before in front of what is held: as many again, so that a line of any length is moved in linear time.
static int read_block(Tail *t, Error *err) {
  size_t held = (size_t)(t->end - t->begin);
  size_t block = (size_t)min_i64(t->begin, max_i64(BLOCK, (int64_t)held));
  if (t->room < block + held) {
    t->room = 2 * (block + held);
    t->text = xrealloc(t->text, t->room);
  }
  memmove(t->text + block, t->text, held);
  t->begin -= (int64_t)block;
  int64_t got = file_read_at(t->fd, t->begin, t->text, (int64_t)block);
  if (got == (int64_t)block) return 0;
  return error_set(err, "nothing else may write into a run's folder", "cannot read %s: %s", t->path,
                   got < 0 ? strerror(errno) : "it became shorter");
}

// Where the last newline of the first n bytes held is, reading on to find it; -1: there is none.
static int last_newline(Tail *t, size_t n, int64_t *at, Error *err) {
  for (;;) {
    const char *found = n ? memrchr(t->text, '\n', n) : NULL;
    *at = found ? t->begin + (found - t->text) : -1;
    if (found || t->begin == 0) return 0;
    n = (size_t)t->begin; // to be what was added
    if (read_block(t, err) != 0) return -1;
    n -= (size_t)t->begin;
  }
}

int tail_line(Tail *t, TailLine *line, Error *err) {
  int64_t newline, before;
  if (last_newline(t, (size_t)(t->end - t->begin), &newline, err) != 0) return -1;
  if (newline < 0) return 0;
  if (last_newline(t, (size_t)(newline - t->begin), &before, err) != 0) return -1;
  *line = (TailLine){t->text + (before + 1 - t->begin), (size_t)(newline - before - 1), newline + 1};
  t->end = before + 1; // the newline of the line before stays
  return 1;
}

void tail_close(Tail *t) {
  close(t->fd);
  free(t->text);
  *t = (Tail){.fd = -1};
}
