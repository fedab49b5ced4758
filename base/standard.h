// The three standard streams as a process finds and leaves them.
#ifndef TESSERA_STANDARD_H
#define TESSERA_STANDARD_H

#include "base/base.h"

// Puts /dev/null where descriptor 0, 1 or 2 is closed: the next file that is opened would take its place, and what is
// said would go into it. Before anything is opened.
void standard_open(void);
// Writes out what standard output still holds. -1 with *err when any of what was printed is lost.
int standard_flush(Error *err);
#endif
