// The three standard streams as a process finds and leaves them.
#ifndef TESSERA_STANDARD_H
#define TESSERA_STANDARD_H

#include "base/base.h"

// Opens /dev/null in the place of a closed descriptor 0, 1 or 2: else the next file opened would take that number, and
// messages would be written into it. Called before anything is opened.
void standard_open(void);
// Writes out what standard output still holds. -1 with *err when any of what was printed is lost.
int standard_flush(Error *err);
#endif
