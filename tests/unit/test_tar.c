// Tar archives: names and sizes of every kind of header, and damage.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/tar.h"
#include "tests/unit/archive.h"

#include <fcntl.h>

static uint32_t rng_state = 4711;

static uint32_t rng(void) {
  rng_state = rng_state * 1664525u + 1013904223u;
  return rng_state >> 8;
}

static int index_file(const char *name, TarIndex *index, Error *err) {
  int fd = open(at(name), O_RDONLY);
  assert_true(fd >= 0);
  *err = (Error){0};
  int rc = tar_index(fd, name, index, err);
  close(fd);
  return rc;
}

static void test_tar_names(void **state) {
  (void)state;
  Archive a = {0};
  char long_name[301], hundred[101], seven_hundred[700];
  memset(seven_hundred, 'q', sizeof(seven_hundred));
  memset(long_name, 'n', 300);
  memcpy(long_name + 290, ".png", 5);
  memset(hundred, 'h', 100);
  hundred[100] = 0;
  archive_text(&a, "plain.txt", "abc");
  archive_header(&a, "folder/", "", '5', 0);
  archive_text(&a, hundred, ""); // fills its field: no NUL
  archive_header(&a, "in/prefix.txt", "long/path", '0', 2);
  archive_append(&a, "xy", 2);
  archive_header(&a, "short.txt", "p", '0', 0);
  archive_header(&a, "././@LongLink", "", 'L', strlen(long_name) + 1);
  archive_append(&a, long_name, strlen(long_name) + 1);
  archive_header(&a, "cut", "", '0', 700);
  archive_append(&a, seven_hundred, sizeof(seven_hundred));
  archive_header(&a, "link", "", '2', 0);
  const char *pax = "26 path=p\xc3\xa4th/to/file.txt\n20 mtime=123.456789\n9 size=5\n";
  archive_header(&a, "PaxHeaders/x", "", 'x', strlen(pax));
  archive_append(&a, pax, strlen(pax));
  archive_header(&a, "ignored", "", '0', 0);
  archive_append(&a, "12345", 5);
  archive_header(&a, "global", "", 'g', 13);
  archive_append(&a, "13 path=nope\n", 13);
  archive_text(&a, "last.txt", "z");
  archive_end(&a);
  archive_write(&a, "names.tar");
  TarIndex index;
  Error err;
  assert_int_equal(index_file("names.tar", &index, &err), 0);
  const char *names[] = {
      "plain.txt", hundred, "long/path/in/prefix.txt", "p/short.txt", long_name, "p\xc3\xa4th/to/file.txt", "last.txt"};
  const int64_t sizes[] = {3, 0, 2, 0, 700, 5, 1};
  assert_int_equal(index.count, 7);
  for (int i = 0; i < 7; i++) {
    assert_string_equal(index.member[i].name, names[i]);
    assert_int_equal(index.member[i].size, sizes[i]);
    assert_int_equal(index.member[i].offset % 512, 0);
  }
  assert_int_equal(index.member[0].offset, 512);
  tar_index_free(&index);
}

static void test_tar_damage(void **state) {
  (void)state;
  TarIndex index;
  Error err;
  Archive a = {0};
  archive_text(&a, "a.txt", "hello");
  archive_text(&a, "b.txt", "world");
  a.bytes[1024 + 3] ^= 1; // in the second header
  archive_write(&a, "checksum.tar");
  assert_int_equal(index_file("checksum.tar", &index, &err), -1);
  assert_non_null(strstr(err.text, "checksum"));
  assert_non_null(strstr(err.text, "checksum.tar"));
  assert_non_null(strstr(err.text, "1024"));
  assert_int_equal(index.count, 0);

  archive_header(&a, "huge.txt", "", '0', (size_t)8 << 30);
  archive_end(&a);
  archive_write(&a, "huge.tar");
  assert_int_equal(index_file("huge.tar", &index, &err), -1);
  assert_non_null(strstr(err.text, "size"));

  archive_header(&a, "base256.txt", "", '0', 0);
  memset(a.bytes + 124, 0xff, 12); // -1
  header_sign(a.bytes);
  archive_end(&a);
  archive_write(&a, "negative.tar");
  assert_int_equal(index_file("negative.tar", &index, &err), -1);
  archive_header(&a, "base256.txt", "", '0', 0);
  memset(a.bytes + 124, 0, 12);
  a.bytes[124] = 0x80;
  a.bytes[135] = 4;
  header_sign(a.bytes);
  archive_append(&a, "data", 4);
  archive_write(&a, "base256.tar"); // also without closing zeros
  assert_int_equal(index_file("base256.tar", &index, &err), 0);
  assert_int_equal(index.count, 1);
  assert_int_equal(index.member[0].size, 4);
  tar_index_free(&index);

  archive_text(&a, "a.txt", "hello");
  a.n = 700; // data of a.txt ends at 517, the padding is cut: the next header would begin past the end
  archive_write(&a, "padding.tar");
  assert_int_equal(index_file("padding.tar", &index, &err), 0);
  tar_index_free(&index);
  archive_text(&a, "a.txt", "hello");
  a.n = 515;
  archive_write(&a, "cut.tar");
  assert_int_equal(index_file("cut.tar", &index, &err), -1);
  archive_text(&a, "a.txt", "hello");
  archive_text(&a, "b.txt", "world");
  a.n = 1024 + 100;
  archive_write(&a, "cut-header.tar");
  assert_int_equal(index_file("cut-header.tar", &index, &err), -1);
  assert_non_null(strstr(err.text, "truncated"));

  const char *bad_pax[] = {"5 path=abc\n",
                           "99 path=abc\n",
                           "path=abc\n",
                           "11 pathabcd\n",
                           "12 size=12x4\n",
                           "0 a=b\n",
                           "30 size=99999999999999999999\n",
                           "11 path=abcd"};
  for (int i = 0; i < 8; i++) {
    archive_header(&a, "x", "", 'x', strlen(bad_pax[i]));
    archive_append(&a, bad_pax[i], strlen(bad_pax[i]));
    archive_text(&a, "a.txt", "hello");
    archive_end(&a);
    archive_write(&a, "pax.tar");
    assert_int_equal(index_file("pax.tar", &index, &err), -1);
    assert_non_null(strstr(err.text, "pax"));
  }
  write_text("text.tar",
             "this is no archive at all, but it is long enough to hold a header, or would be if it were "
             "five hundred and twelve bytes long, so it is repeated........................................"
             "................................................................................................"
             "................................................................................................"
             "................................................................................................"
             "................................................................................................");
  assert_int_equal(index_file("text.tar", &index, &err), -1);
  write_text("empty.tar", "");
  assert_int_equal(index_file("empty.tar", &index, &err), 0);
  assert_int_equal(index.count, 0);
}

// Random damage to an archive with every kind of header: an index within the file, or an error; never a crash.
static void test_tar_random_damage(void **state) {
  (void)state;
  Archive a = {0};
  archive_text(&a, "a.txt", "hello");
  archive_header(&a, "././@LongLink", "", 'L', 6);
  archive_append(&a, "b.json", 6);
  archive_text(&a, "cut", "{}");
  archive_header(&a, "x", "", 'x', 16);
  archive_append(&a, "16 path=abcdefg\n", 16);
  archive_text(&a, "c.txt", "x");
  archive_end(&a);
  int good = 0, bad = 0;
  for (int trial = 0; trial < 600; trial++) {
    Archive b = {xmalloc(a.n), a.n};
    memcpy(b.bytes, a.bytes, a.n);
    for (int k = (int)(rng() % 4); k > 0; k--) {
      size_t block = rng() % 8 * 512;
      b.bytes[block + rng() % 512] = (uint8_t)rng();
      if (b.bytes[block + 257] == 'u' && rng() % 4) header_sign(b.bytes + block);
    }
    if (rng() % 4 == 0) b.n = rng() % a.n;
    size_t n = b.n;
    archive_write(&b, "random.tar");
    TarIndex index;
    Error err;
    if (index_file("random.tar", &index, &err) == 0) {
      good++;
      for (int64_t i = 0; i < index.count; i++)
        assert_true(index.member[i].size >= 0 && index.member[i].offset + index.member[i].size <= (int64_t)n);
      tar_index_free(&index);
    } else {
      bad++;
      assert_true(err.text[0] && index.count == 0 && !index.member);
    }
  }
  assert_true(good > 50 && bad > 50);
  free(a.bytes);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_tar_names),
      cmocka_unit_test(test_tar_damage),
      cmocka_unit_test(test_tar_random_damage),
  };
  return cmocka_run_group_tests(tests, scratch_begin, scratch_end);
}
