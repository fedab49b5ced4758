// The log under threads, texts and whole files, the lines of a file from its end, random numbers, hashes.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/hash.h"
#include "base/philox.h"
#include "base/text_out.h"
#include "trainer/output/tail.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- the log ----

enum { THREADS = 3, LINES = 200 };

static void before_line(void) {
  fputs("<", stderr);
  for (int i = 0; i < 3; i++) sched_yield(); // another thread's line would come in between
}

static void *say_lines(void *arg) {
  (void)arg;
  for (int i = 0; i < LINES; i++) log_info("line");
  return NULL;
}

// Runs say_lines in threads, with the hook put in and taken out meanwhile, and returns what was said.
static char *said_by_threads(int changes) {
  Error err;
  char path[] = "/tmp/tessera-log-XXXXXX";
  int file = mkstemp(path), real = dup(STDERR_FILENO);
  assert_true(file >= 0 && real >= 0 && dup2(file, STDERR_FILENO) == STDERR_FILENO);
  pthread_t thread[THREADS];
  log_set_hook(before_line);
  for (int i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, say_lines, NULL);
  for (int i = 0; i < changes; i++) log_set_hook(i % 2 ? before_line : NULL);
  for (int i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
  log_set_hook(NULL);
  assert_true(dup2(real, STDERR_FILENO) == STDERR_FILENO);
  close(real);
  close(file);
  char *said = file_read(path, 1 << 20, NULL, &err);
  unlink(path);
  assert_non_null(said);
  return said;
}

static void test_log(void **state) {
  (void)state;
  // Every line right behind its hook, whichever thread said it.
  char *said = said_by_threads(0);
  for (int i = 0; i < THREADS * LINES; i++) assert_memory_equal(said + 6 * i, "<line\n", 6);
  assert_int_equal(strlen(said), 6 * THREADS * LINES);
  free(said);
  // The hook comes and goes; a line has it or not.
  said = said_by_threads(2000);
  int lines = 0;
  for (char *at = said; *at; at += 5, lines++) {
    at += *at == '<';
    assert_memory_equal(at, "line\n", 5);
  }
  assert_int_equal(lines, THREADS * LINES);
  free(said);
}

// ---- the lines of a file from its end ----

// Writes `bytes` of text and expects its lines, last first.
static void check_tail(const char *text, size_t bytes) {
  char path[] = "/tmp/tessera-tail-XXXXXX";
  int file = mkstemp(path);
  assert_true(file >= 0 && write(file, text, bytes) == (ssize_t)bytes);
  close(file);
  Error err;
  Tail tail;
  TailLine line;
  if (tail_open(&tail, path, &err) != 0) fail_msg("%s", err.text);
  size_t end = bytes; // of what is still to come; behind the last newline there is no line
  while (end && text[end - 1] != '\n') end--;
  while (end) {
    size_t start = end - 1;
    while (start && text[start - 1] != '\n') start--;
    assert_int_equal(tail_line(&tail, &line, &err), 1);
    assert_int_equal(line.end, end);
    assert_int_equal(line.bytes, end - 1 - start);
    assert_memory_equal(line.text, text + start, line.bytes);
    end = start;
  }
  assert_int_equal(tail_line(&tail, &line, &err), 0);
  assert_int_equal(tail_line(&tail, &line, &err), 0);
  tail_close(&tail);
  unlink(path);
}

static void test_tail(void **state) {
  (void)state;
  const char *const texts[] = {"", "\n", "half", "a\n", "a\nb", "\n\n", "\na\n\nbc\n"};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) check_tail(texts[i], strlen(texts[i]));
  // Lines that end before, at and behind the ends of blocks, and one of many blocks.
  enum { BLOCK = 1 << 16, SIZE = 9 * BLOCK };
  char *text = xmalloc(SIZE);
  for (int shift = -2; shift <= 2; shift++) {
    for (int i = 0; i < SIZE; i++) text[i] = (char)('a' + i % 23);
    for (int i = 1; i <= 3; i++) text[SIZE - 1 - i * BLOCK + shift] = '\n';
    text[SIZE - 5 * BLOCK] = text[SIZE - 100] = text[SIZE - 1] = '\n';
    check_tail(text, SIZE);
  }
  free(text);
  Error err;
  Tail tail;
  assert_int_equal(tail_open(&tail, "/nowhere/at/all", &err), -1);
  assert_non_null(strstr(err.text, "/nowhere/at/all"));
}

// ---- texts and files ----

static void test_whole_files(void **state) {
  (void)state;
  char path[] = "/tmp/test_base.XXXXXX";
  close(mkstemp(path));
  Error err;
  for (int n = 3000; n >= 0; n -= 1000) { // each shorter than what it replaces
    TextOut out;
    FILE *f = text_begin(&out);
    for (int i = 0; i < n; i++) fputc('a' + i % 23, f);
    char *text = text_end(&out);
    assert_int_equal(out.bytes, n);
    assert_int_equal(strlen(text), n);
    assert_int_equal(file_write(path, text, out.bytes, &err), 0);
    size_t bytes;
    char *back = file_read(path, 3000, &bytes, &err);
    assert_int_equal(bytes, n);
    assert_memory_equal(back, text, (size_t)n + 1);
    free(back);
    free(text);
  }
  unlink(path);
  assert_int_equal(file_write("/dev/full", "text", 4, &err), -1); // fails as late as it is closed
  assert_string_equal(err.text, "cannot write /dev/full: No space left on device");
  assert_int_equal(file_write("/nowhere/at/all", "text", 4, &err), -1);
  assert_string_equal(err.text, "cannot write /nowhere/at/all: No such file or directory");
}

// A file that cannot take its place leaves what was there, and nothing beside it.
static void test_replaced_files(void **state) {
  (void)state;
  char folder[] = "/tmp/test_base.XXXXXX";
  assert_non_null(mkdtemp(folder));
  char *path = xasprintf("%s/file", folder), *next = xasprintf("%s.new", path);
  Error err;
  size_t bytes;
  assert_int_equal(file_replace(path, "first", 5, &err), 0);
  assert_int_equal(file_replace(path, "then", 4, &err), 0);
  char *back = file_read(path, 100, &bytes, &err);
  assert_string_equal(back, "then");
  assert_int_equal(access(next, F_OK), -1);
  free(back);
  assert_int_equal(file_replace(folder, "text", 4, &err), -1);
  char *said = xasprintf("cannot write %s: ", folder), *beside = xasprintf("%s.new", folder);
  assert_memory_equal(err.text, said, strlen(said));
  assert_int_equal(access(beside, F_OK), -1);
  assert_int_equal(access(path, F_OK), 0);
  unlink(path);
  rmdir(folder);
  free(path);
  free(next);
  free(said);
  free(beside);
}

// The vectors that its authors publish (Random123, kat_vectors).
static void test_philox(void **state) {
  (void)state;
  static const struct {
    uint32_t counter[4], key[2], want[4];
  } known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (int i = 0; i < 3; i++) {
    const uint32_t *c = known[i].counter, *k = known[i].key;
    Philox4 got = philox4((uint64_t)k[1] << 32 | k[0], (uint64_t)c[1] << 32 | c[0], c[2], c[3]);
    for (int j = 0; j < 4; j++) assert_int_equal(got.v[j], known[i].want[j]);
  }
}

static void test_hash(void **state) {
  (void)state;
  assert_true(hash64("", 0, 0) == 0xEF46DB3751D8E999ull);
  assert_true(hash64("abc", 3, 0) == 0x44BC2CF5AD770999ull);
  // From xxHash's own sanity test: bytes of a multiplicative generator; the lengths reach every branch.
  uint8_t bytes[222];
  uint64_t gen = 2654435761u;
  for (int i = 0; i < 222; i++, gen *= 11400714785074694797ull) bytes[i] = (uint8_t)(gen >> 56);
  static const struct {
    size_t n;
    uint64_t seed, expected;
  } cases[] = {{1, 0, 0xE934A84ADB052768ull},   {1, 2654435761u, 0x5014607643A9B4C3ull},
               {14, 0, 0x8282DCC4994E35C8ull},  {14, 2654435761u, 0xC3BD6BF63DEB6DF0ull},
               {222, 0, 0xB641AE8CB691C174ull}, {222, 2654435761u, 0x20CB8AB7AE10C14Aull}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    assert_true(hash64(bytes, cases[i].n, cases[i].seed) == cases[i].expected);
  // The same in pieces of any length.
  for (uint64_t round = 0; round < 200; round++) {
    size_t n = philox4(5, round, 20, 0).v[0] % sizeof bytes;
    Hash64 h = hash64_begin(round);
    for (size_t at = 0, piece; at < n; at += piece) {
      piece = philox4(5, round, 21, (uint32_t)at).v[0] % (round % 70 + 1);
      if (piece > n - at) piece = n - at;
      hash64_add(&h, bytes + at, piece);
      if (!piece) piece = 1, hash64_add(&h, bytes + at, 1);
    }
    assert_true(hash64_end(&h) == hash64(bytes, n, round));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_log),         cmocka_unit_test(test_tail),
                                     cmocka_unit_test(test_whole_files), cmocka_unit_test(test_replaced_files),
                                     cmocka_unit_test(test_philox),      cmocka_unit_test(test_hash)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
