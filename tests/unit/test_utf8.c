// UTF-8: utf8_printable on every code point, and on any bytes.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"
#include "base/json.h"
#include "base/philox.h"
#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

static void assert_printable(const char *in, const char *want) {
  char *out = utf8_printable(in);
  assert_string_equal(out, want);
  free(out);
}

static size_t encode(uint32_t c, char *out) {
  if (c < 0x80) return (size_t)sprintf(out, "%c", (int)c);
  if (c < 0x800) return (size_t)sprintf(out, "%c%c", 0xC0 | c >> 6, 0x80 | (c & 63));
  if (c < 0x10000) return (size_t)sprintf(out, "%c%c%c", 0xE0 | c >> 12, 0x80 | (c >> 6 & 63), 0x80 | (c & 63));
  return (size_t)sprintf(out, "%c%c%c%c", 0xF0 | c >> 18, 0x80 | (c >> 12 & 63), 0x80 | (c >> 6 & 63), 0x80 | (c & 63));
}

static void test_code_points(void **state) {
  (void)state;
  char text[8];
  for (uint32_t c = 1; c < 0x110000; c++) {
    size_t n = encode(c, text);
    int surrogate = c >= 0xD800 && c < 0xE000, control = c < 0x20 || (c >= 0x7F && c < 0xA0);
    assert_int_equal(utf8_length((const unsigned char *)text, n), surrogate ? 0 : n);
    assert_int_equal(utf8_length((const unsigned char *)text, n - 1), 0);
    assert_printable(text, surrogate ? "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD" : control ? " " : text);
  }
}

static void test_examples(void **state) {
  (void)state;
  assert_printable("", "");
  assert_printable("a\tb\r\nc", "a b  c");
  assert_printable("\x1b[31mred\x7f", " [31mred ");
  assert_printable("\xc2\x9b"
                   "2J",
                   " 2J");                                                          // the one-character CSI
  assert_printable("caf\xc3\xa9 \xe6\x97", "caf\xc3\xa9 \xEF\xBF\xBD\xEF\xBF\xBD"); // cut in the middle
  assert_printable("\xc0\xaf\xf5", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");
}

static void test_any_bytes(void **state) {
  (void)state;
  for (uint32_t k = 0; k < 20000; k++) {
    Philox4 r[3] = {philox4(5, k, 0, 0), philox4(5, k, 0, 1), philox4(5, k, 0, 2)};
    char text[49] = {0};
    memcpy(text, r, sizeof r < 48 ? sizeof r : 48);
    text[k % 49] = 0;
    char *out = utf8_printable(text), *again = utf8_printable(out);
    assert_true(json_is_utf8(out));
    assert_string_equal(out, again);
    for (const char *s = out; *s; s++) assert_true((unsigned char)*s >= 0x20 && *s != 0x7F);
    free(out);
    free(again);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_code_points),
      cmocka_unit_test(test_examples),
      cmocka_unit_test(test_any_bytes),
  };
  return cmocka_run_group_tests_name("utf8", tests, NULL, NULL);
}
