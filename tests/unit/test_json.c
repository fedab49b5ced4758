// The JSON layer below the config and the checkpoints: errors with their place, comments, hostile texts, writing.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/json.h"
#include "base/philox.h"
#include "tests/unit/assert_text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void json_errors(void **state) {
  (void)state;
  static const struct {
    const char *text, *expected;
  } cases[] = {
      {"", "t:1:1: a value is expected, found the end of the text"},
      {"{\n  \"a\": 1,\n}", "t:3:1: a key in double quotes is expected, found '}'"},
      {"{\"a\" 1}", "t:1:6: ':' is expected after a key, found '1'"},
      {"[1 2]", "t:1:4: ',' or ']' is expected, found '2'"},
      {"{\"a\": 1", "t:1:8: ',' or '}' is expected, found the end of the text"},
      {"{} x", "t:1:4: the end of the text is expected, found 'x'"},
      {"{}{}", "t:1:3: the end of the text is expected"},
      {"{\"a\": 1, \"b\": 2,\n \"a\": 3}", "t:2: key \"a\" again, first in line 1"},
      {"[{\"x\": [{\"k\": 1, \"k\": 1}]}]", "key \"k\" again"},
      {"\"abc", "t:1:1: this string never ends"},
      {"\"a\nb\"", "this string never ends"},
      {"\"a\tb\"", "t:1:3: control character"},
      {"\"\\x\"", "t:1:2: unknown escape"},
      {"\"\\u12g4\"", "four hexadecimal digits"},
      {"\"\\u0000\"", "\\u0000 is not allowed"},
      {"\"\\ud800\"", "not valid JSON"},
      {"\"\xff\"", "t:1:2: this is not UTF-8"},
      {"\"\xed\xa0\x80\"", "not UTF-8"},
      {"\"\xc0\xaf\"", "not UTF-8"},
      {"\xc3\xa9", "a value is expected, found byte 0xC3"},
      {"\"\xc3\xa9\" 1", "t:1:5: the end of the text"}, // a column is a character
      {"01", "t:1:1: this is not a number"},
      {"1.", "not a number"},
      {"-", "not a number"},
      {"1e", "not a number"},
      {"[1e999]", "too large"},
      {"NaN", "a value is expected, found 'N'"},
      {"{\"loss\": NaN}", "t:1:10: a value is expected, found 'N' of NaN, which is no JSON"},
      {"[1, -Infinity]", "t:1:5: a value is expected, found '-' of -Infinity"},
      {"truth", "a value is expected"},
      {"/* open", "t:1:1: this comment never ends"},
      {"/", "a value is expected, found '/'"},
      {"1111111111111111111111111111111111111111111111111111111111111", "longer than 60"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Error err = {0};
    cJSON *root = json_parse(cases[i].text, strlen(cases[i].text), "t", JSON_WITH_COMMENTS, &err);
    if (root) fail_msg("accepted: %s", cases[i].text);
    assert_contains(err.text, cases[i].expected);
  }
  Error err;
  assert_null(json_parse("// c\n1", 6, "t", JSON_PLAIN, &err));
  assert_contains(err.text, "comments are not allowed");
  assert_null(json_parse("1\0", 2, "t", JSON_PLAIN, &err));
  assert_contains(err.text, "byte 0x00");
  static const struct {
    const char *text, *encoding;
    size_t n;
  } encodings[] = {
      {"\xff\xfe{\0}\0", "UTF-16 (little-endian)", 6},
      {"\xfe\xff\0{\0}", "UTF-16 (big-endian)", 6},
      {"\xff\xfe\0\0{\0\0\0", "UTF-32 (little-endian)", 8},
      {"\0\0\xfe\xff\0\0\0{", "UTF-32 (big-endian)", 8},
      {"{\0}\0", "UTF-16 (little-endian", 4},
      {"\0{\0}", "UTF-16 (big-endian", 4},
  };
  for (size_t i = 0; i < sizeof encodings / sizeof encodings[0]; i++) {
    assert_null(json_parse(encodings[i].text, encodings[i].n, "t", JSON_PLAIN, &err));
    assert_contains(err.text, encodings[i].encoding);
    assert_contains(err.hint, "UTF-8");
  }
}

static void json_comments_and_lines(void **state) {
  (void)state;
  const char *text =
      "\xEF\xBB\xBF// first\n{ /* two\nlines */ \"a\": [1, // x\n  \"//no /* comment\"],\n\"b\":{\"c\":null}}\n//end";
  Error err;
  cJSON *root = json_parse(text, strlen(text), "t", JSON_WITH_COMMENTS, &err);
  if (!root) fail_msg("%s", err.text);
  cJSON *a = cJSON_GetObjectItemCaseSensitive(root, "a"), *b = cJSON_GetObjectItemCaseSensitive(root, "b");
  assert_int_equal(json_line(root), 2);
  assert_int_equal(json_line(a), 3);
  assert_int_equal(json_line(cJSON_GetArrayItem(a, 1)), 4);
  assert_string_equal(cJSON_GetArrayItem(a, 1)->valuestring, "//no /* comment");
  assert_int_equal(json_line(cJSON_GetObjectItemCaseSensitive(b, "c")), 5);
  cJSON_Delete(root);
}

static void json_hostile(void **state) {
  (void)state;
  size_t n = 1 << 20;
  char *text = xmalloc(n);
  Error err;
  for (int kind = 0; kind < 3; kind++) {
    for (size_t i = 0; i < n; i++) text[i] = kind == 0 ? '[' : kind == 1 ? "{\"a\":"[i % 5] : ' ';
    assert_null(json_parse(text, n, "t", JSON_PLAIN, &err));
    assert_contains(err.text, kind < 2 ? "more than 64 levels" : "a value is expected");
  }
  // 60 levels are fine, and so are 100,000 keys in one object.
  memset(text, '[', 60);
  memset(text + 60, ']', 60);
  cJSON *root = json_parse(text, 120, "t", JSON_PLAIN, &err);
  assert_non_null(root);
  cJSON_Delete(root);
  size_t at = 0;
  for (int i = 0; i < 80000; i++) at += (size_t)snprintf(text + at, n - at, "%s\"%d\":1", i ? "," : "{", i);
  text[at++] = '}';
  root = json_parse(text, at, "t", JSON_PLAIN, &err);
  assert_int_equal(cJSON_GetArraySize(root), 80000);
  cJSON_Delete(root);
  free(text);
}

static void json_writing(void **state) {
  (void)state;
  for (int round = 0; round < 300; round++) {
    // Random bytes come back as valid JSON; valid UTF-8 comes back unchanged.
    char bytes[32] = {0}, *text;
    size_t n;
    for (int i = 0; i < 20; i++) bytes[i] = (char)(1 + philox4(7, round, 0, i).v[0] % (round % 2 ? 127 : 255));
    double number = ldexp((double)philox4(7, round, 1, 0).v[0] - 2e9, (int)(philox4(7, round, 1, 1).v[0] % 200) - 100);
    FILE *f = open_memstream(&text, &n);
    fputc('[', f);
    json_write_string(f, bytes);
    fputc(',', f);
    json_write_number(f, number);
    fputc(']', f);
    fclose(f);
    Error err;
    cJSON *root = json_parse(text, n, "t", JSON_PLAIN, &err);
    if (!root) fail_msg("%s", err.text);
    if (round % 2) assert_string_equal(cJSON_GetArrayItem(root, 0)->valuestring, bytes);
    assert_true(cJSON_GetArrayItem(root, 1)->valuedouble == number);
    cJSON_Delete(root);
    free(text);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(json_errors),
      cmocka_unit_test(json_comments_and_lines),
      cmocka_unit_test(json_hostile),
      cmocka_unit_test(json_writing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
