#include "base/file_out.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

// Bytes that are sent to the disk together. Two windows may wait for it: one is written there while the next is filled.
static const uint64_t WINDOW = 64 << 20;
static const size_t WRITE_MAX = 1 << 30; // of one call

int file_out_open(FileOut *f, const char *path) {
  *f = (FileOut){.fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), .hash = hash64_begin(0)};
  struct stat st;
  f->regular = f->fd >= 0 && fstat(f->fd, &st) == 0 && S_ISREG(st.st_mode);
  return f->fd < 0 ? -1 : 0;
}

// A file system that knows no such request flushes all at the end.
static int range_failed(int rc) {
  return rc != 0 && (errno == EIO || errno == ENOSPC || errno == EDQUOT);
}

// Starts the transfer of whole windows and waits for that of the one before, whose pages are then free for others.
static int start_transfer(FileOut *f) {
  while (f->regular && f->bytes - f->started >= WINDOW) {
    off_t at = (off_t)f->started, length = (off_t)WINDOW;
    if (range_failed(sync_file_range(f->fd, at, length, SYNC_FILE_RANGE_WRITE))) return -1;
    if (at >= length) {
      unsigned done = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
      if (range_failed(sync_file_range(f->fd, at - length, length, done))) return -1;
      posix_fadvise(f->fd, at - length, length, POSIX_FADV_DONTNEED);
    }
    f->started += WINDOW;
  }
  return 0;
}

int file_out_write(FileOut *f, const void *data, size_t bytes) {
  const char *at = data, *end = at + bytes;
  while (at < end) {
    size_t left = (size_t)(end - at);
    ssize_t n = write(f->fd, at, left < WRITE_MAX ? left : WRITE_MAX);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    at += n;
  }
  hash64_add(&f->hash, data, bytes);
  f->bytes += bytes;
  return start_transfer(f);
}

int file_out_close(FileOut *f, bool sync) {
  int rc = sync && f->regular ? fsync(f->fd) : 0, code = errno;
  if (close(f->fd) != 0 && rc == 0) return -1;
  errno = code;
  return rc;
}
