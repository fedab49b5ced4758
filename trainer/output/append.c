#include "trainer/output/append.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int append_open(AppendFile *f, const char *path, int must_create, Error *err) {
  *f = (AppendFile){.fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | (must_create ? O_EXCL : 0), 0666)};
  f->size = f->fd < 0 ? -1 : (int64_t)lseek(f->fd, 0, SEEK_END);
  if (f->size < 0) {
    error_set(err, "check the folder's permissions", "cannot write %s: %s", path, strerror(errno));
    if (f->fd >= 0) close(f->fd);
    f->fd = -1;
    return -1;
  }
  f->path = xstrdup(path);
  return 0;
}

int append_record(AppendFile *f, const void *bytes, size_t n) {
  size_t done = 0;
  int code = 0;
  while (done < n && !code) {
    ssize_t wrote = pwrite(f->fd, (const char *)bytes + done, n - done, (off_t)(f->size + (int64_t)done));
    if (wrote > 0)
      done += (size_t)wrote;
    else if (wrote == 0 || errno != EINTR)
      code = wrote == 0 ? ENOSPC : errno;
  }
  if (!code) {
    if (f->missing) log_warn("%s: writing works again; %lld records are missing", f->path, (long long)f->missing);
    f->missing = 0;
    f->size += (int64_t)n;
    return 0;
  }
  // The piece that was written is taken back. Where even that fails, the next record overwrites it.
  if (done && ftruncate(f->fd, (off_t)f->size) != 0) code = errno;
  if (!f->missing++) log_warn("cannot write %s: %s; training goes on without it", f->path, strerror(code));
  return -1;
}

void append_close(AppendFile *f) {
  if (f->fd >= 0 && close(f->fd) != 0) log_warn("closing %s: %s", f->path, strerror(errno));
  free(f->path);
  *f = (AppendFile){.fd = -1};
}
