// What messages have to say.
#ifndef TESSERA_TESTS_ASSERT_TEXT_H
#define TESSERA_TESTS_ASSERT_TEXT_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

static inline void assert_contains(const char *text, const char *part) {
  if (!strstr(text, part)) fail_msg("\"%s\" does not contain \"%s\"", text, part);
}
#endif
