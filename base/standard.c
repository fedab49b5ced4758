#include "base/standard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

void standard_open(void) {
  // Standard output is opened for reading: what is printed fails there, and standard_flush says so. open takes the
  // lowest free number; those below are open by then.
  static const int mode[] = {[STDIN_FILENO] = O_RDONLY, [STDOUT_FILENO] = O_RDONLY, [STDERR_FILENO] = O_WRONLY};
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", mode[fd]) != fd) _exit(2); // without /dev/null: nobody to tell
}

int standard_flush(Error *err) {
  errno = 0;
  if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
  return error_set(err, "check what it is redirected to", "cannot write to standard output%s%s", errno ? ": " : "",
                   errno ? strerror(errno) : "");
}
