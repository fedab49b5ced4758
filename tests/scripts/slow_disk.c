// LD_PRELOAD: a disk that is slow or full, for the tensors of checkpoints alone. SLOW_DISK_MB_S: its rate for each
// file, a piece of 64 kB at a time; SLOW_DISK_ROOM: bytes that a process may write before there is no space left.
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long written;

static int is_checkpoint(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, "/.tmp-ckpt-") != NULL;
}

ssize_t write(int fd, const void *data, size_t n) {
  const char *rate = getenv("SLOW_DISK_MB_S"), *room = getenv("SLOW_DISK_ROOM");
  if (!is_checkpoint(fd)) return syscall(SYS_write, fd, data, n);
  if (n > 65536) n = 65536;
  if (room && atomic_fetch_add(&written, (long)n) + (long)n > atol(room)) {
    errno = ENOSPC;
    return -1;
  }
  if (rate) usleep((useconds_t)((double)n / atof(rate)));
  return syscall(SYS_write, fd, data, n);
}
