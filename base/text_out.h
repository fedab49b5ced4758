// A text that grows as it is printed.
#ifndef TESSERA_TEXT_OUT_H
#define TESSERA_TEXT_OUT_H

#include <stddef.h>
#include <stdio.h>

typedef struct TextOut {
  FILE *f;
  char *text;
  size_t bytes;
} TextOut;

// Begins an empty text; what is printed to the file that is returned is added to it. Out of memory ends the process.
FILE *text_begin(TextOut *t);
// Closes that file. The text, malloc'd: t->bytes, and a NUL after them.
char *text_end(TextOut *t);
#endif
