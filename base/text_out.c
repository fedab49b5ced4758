#include "base/text_out.h"

#include "base/base.h"

FILE *text_begin(TextOut *t) {
  *t = (TextOut){0};
  t->f = open_memstream(&t->text, &t->bytes);
  if (!t->f) panic("out of memory for a text");
  return t->f;
}

char *text_end(TextOut *t) {
  if (fclose(t->f) != 0) panic("out of memory for a text");
  t->f = NULL;
  return t->text;
}
