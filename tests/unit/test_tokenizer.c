// The tokenizer: ids, words, merges, files, training.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/tokenizer.h"
#include "tests/unit/slow.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t rng_state = 77;

static uint32_t rng(void) {
  rng_state = rng_state * 1664525u + 1013904223u;
  return rng_state >> 8;
}

static char file_path[64];

static int files_begin(void **state) {
  (void)state;
  snprintf(file_path, sizeof(file_path), "/tmp/tessera-vocab-%d", (int)getpid());
  return 0;
}

static int files_end(void **state) {
  (void)state;
  unlink(file_path);
  return 0;
}

static void merges_write(const char *text) {
  Error err;
  if (file_write(file_path, text, strlen(text), &err) != 0) fail_msg("%s", err.text);
}

static void expect_ids(const Tokenizer *t, const char *text, int n, const int32_t *want) {
  int32_t *ids = xmalloc(4 * strlen(text) + 4);
  int64_t count = tokenizer_encode(t, text, strlen(text), ids);
  assert_int_equal(count, n);
  for (int i = 0; i < n; i++) assert_int_equal(ids[i], want[i]);
  free(ids);
}

static void expect_round_trip(const Tokenizer *t, const char *text, size_t n) {
  int32_t *ids = xmalloc(4 * n + 4);
  int64_t count = tokenizer_encode(t, text, n, ids);
  assert_true(count >= (n > 0) && count <= (int64_t)n);
  for (int64_t i = 0; i < count; i++) assert_in_range(ids[i], 0, tokenizer_used(t) - 1);
  size_t bytes;
  char *back = tokenizer_decode(t, ids, count, &bytes);
  assert_int_equal(bytes, n);
  if (n) assert_memory_equal(back, text, n);
  free(back);
  free(ids);
}

static const char SMALL[] = "#version: 0.2\n"
                            "h e\n"                // 256
                            "l l\n"                // 257
                            "he ll\n"              // 258
                            "hell o\n"             // 259
                            "\xc4\xa0 w\n"         // 260: " w"
                            "\xc3\x83 \xc2\xa9\n"  // 261: the two bytes of U+00E9
                            "a a\n"                // 262
                            "\xc4\x8a \xc4\x8a\n"; // 263: two newlines

static void test_ids(void **state) {
  (void)state;
  Error err;
  Tokenizer *t = tokenizer_load(NULL, 300, &err);
  assert_non_null(t);
  assert_int_equal(tokenizer_vocab(t), 300);
  assert_int_equal(tokenizer_used(t), 256);
  SpecialIds id = special_ids(300);
  assert_true(id.bos == 296 && id.eos == 297 && id.boi == 298 && id.eoi == 299);
  expect_ids(t, "!~\xc2\xa1 \n", 6, (const int32_t[]){0, 93, 126, 94, 220, 198});
  tokenizer_free(t);
}

// GPT-2's order of bytes, spelled out from encoder.py's bytes_to_unicode.
static void test_byte_order(void **state) {
  (void)state;
  Error err;
  Tokenizer *t = tokenizer_load(NULL, 260, &err);
  int order[256], n = 0;
  for (int b = '!'; b <= '~'; b++) order[n++] = b;
  for (int b = 0xA1; b <= 0xAC; b++) order[n++] = b;
  for (int b = 0xAE; b <= 0xFF; b++) order[n++] = b;
  for (int b = 0; b < 256; b++)
    if (!((b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF))) order[n++] = b;
  assert_int_equal(n, 256);
  for (int i = 0; i < 256; i++) {
    char byte = (char)order[i];
    int32_t id = -1;
    assert_int_equal(tokenizer_encode(t, &byte, 1, &id), 1);
    assert_int_equal(id, i);
  }
  tokenizer_free(t);
}

static void test_small_table(void **state) {
  (void)state;
  Error err;
  merges_write(SMALL);
  Tokenizer *t = tokenizer_load(file_path, 400, &err);
  assert_non_null(t);
  assert_int_equal(tokenizer_used(t), 264);
  const int32_t o = 'o' - '!', r = 'r' - '!', l = 'l' - '!', d = 'd' - '!', a = 'a' - '!', h = 'h' - '!', e = 'e' - '!';
  expect_ids(t, "hello world", 6, (const int32_t[]){259, 260, o, r, l, d});
  expect_ids(t, "hell", 1, (const int32_t[]){258});
  expect_ids(t, "hel", 2, (const int32_t[]){256, l});
  expect_ids(t, "h ello", 5, (const int32_t[]){h, 220, e, 257, o}); // no merge crosses words
  expect_ids(t, "aaa", 2, (const int32_t[]){262, a});               // from the left
  expect_ids(t, "aaaa", 2, (const int32_t[]){262, 262});
  expect_ids(t, "\xc3\xa9", 1, (const int32_t[]){261});
  expect_ids(t, "\n\n\n", 2, (const int32_t[]){263, 198});
  expect_ids(t, "", 0, NULL);
  tokenizer_free(t);
  t = tokenizer_load(file_path, 262, &err); // only the first two merges have room
  assert_int_equal(tokenizer_used(t), 258);
  expect_ids(t, "hello", 3, (const int32_t[]){256, 257, o});
  tokenizer_free(t);
}

static void test_specials_are_silent(void **state) {
  (void)state;
  Error err;
  merges_write(SMALL);
  Tokenizer *t = tokenizer_load(file_path, 400, &err);
  const int32_t ids[] = {396, 259, 398, 399, 264, 395, -1, 400, 1 << 30, 260, 397};
  size_t n;
  char *text = tokenizer_decode(t, ids, 11, &n);
  assert_int_equal(n, 7);
  assert_string_equal(text, "hello w");
  free(text);
  // The names of specials are ordinary text.
  expect_round_trip(t, "<|endoftext|><bos>", 18);
  tokenizer_free(t);
}

// The words of a text, made visible by a tokenizer that has learned each of them whole.
static void test_words(void **state) {
  (void)state;
  static const char *const words[][16] = {
      {"Hello", " world", "'s", " ", " 123", " foo", "!!", "\n\n", " bar", NULL},
      {"I", "'m", " sure", " they", "'ll", " we", "'ve", " don", "'t", "...", NULL},
      {"na\xc3\xafve", " \xd0\x9c\xd0\xb8\xd1\x80", "42", "abc", "\xc2\xb2", "\t", "\t", "x", "   ", NULL},
      {"a", "\xc2\xa0", "b", "\xe2\x80\x83", "c", " \xf0\x9f\x98\x80", " '", "DON", "'", "T", NULL},
  };
  for (int w = 0; w < 4; w++) {
    char text[256] = "";
    for (int i = 0; words[w][i]; i++) strcat(text, words[w][i]);
    const char *texts[] = {text, text, text};
    size_t n = strlen(text), bytes[] = {n, n, n};
    Error err;
    Tokenizer *t = tokenizer_train(texts, bytes, 3, 1000, &err);
    assert_non_null(t);
    int32_t ids[256];
    int64_t count = tokenizer_encode(t, text, n, ids);
    int64_t i = 0;
    for (; words[w][i]; i++) {
      assert_true(i < count);
      char *word = tokenizer_decode(t, ids + i, 1, NULL);
      assert_string_equal(word, words[w][i]);
      free(word);
    }
    assert_int_equal(i, count);
    tokenizer_free(t);
  }
}

// A byte that is not UTF-8 is a word of its own; what stands around it is cut as if it were alone.
static void test_invalid_utf8(void **state) {
  (void)state;
  Error err;
  merges_write(SMALL);
  Tokenizer *t = tokenizer_load(file_path, 400, &err);
  const int32_t ff = 187, c3 = 94 + 12 + (0xC3 - 0xAE);
  expect_ids(t, "hello\xffhello", 3, (const int32_t[]){259, ff, 259});
  expect_ids(t, "\xff\xff", 2, (const int32_t[]){ff, ff});
  expect_ids(t, "\xc3hell", 2, (const int32_t[]){c3, 258});
  expect_ids(t, "hell\xc3", 2, (const int32_t[]){258, c3});
  expect_ids(t, "\xc3\xa9\xc3\xc3\xa9", 3, (const int32_t[]){261, c3, 261});
  tokenizer_free(t);
}

static Tokenizer *trained(int vocab) {
  static const char *const words[] = {"red ", "blue ",  "circle ",           "square at the ",
                                      "top ", "left\n", "\xc3\xa9t\xc3\xa9 "};
  char *text[200];
  size_t bytes[200];
  for (int i = 0; i < 200; i++) {
    text[i] = xcalloc(1, 400);
    for (int k = 0; k < 12; k++) strcat(text[i], words[rng() % 7]);
    bytes[i] = strlen(text[i]);
  }
  Error err;
  Tokenizer *t = tokenizer_train((const char *const *)text, bytes, 200, vocab, &err);
  assert_non_null(t);
  for (int i = 0; i < 200; i++) free(text[i]);
  return t;
}

static void test_round_trip(void **state) {
  (void)state;
  Error err;
  merges_write(SMALL);
  Tokenizer *t[3] = {tokenizer_load(NULL, 260, &err), tokenizer_load(file_path, 400, &err), trained(320)};
  for (int trial = 0; trial < 3000; trial++) {
    size_t n = trial < 5 ? (size_t)trial : rng() % 300;
    char *text = xmalloc(n + 1);
    for (size_t i = 0; i < n; i++) {
      if (trial % 3 == 0) text[i] = (char)rng();                           // anything
      if (trial % 3 == 1) text[i] = "he llo\xc3\xa9\xff\n'sw"[rng() % 14]; // with the NUL
      if (trial % 3 == 2) text[i] = (char)(' ' + rng() % 95);
    }
    for (int k = 0; k < 3; k++) expect_round_trip(t[k], text, n);
    free(text);
  }
  for (int k = 0; k < 3; k++) tokenizer_free(t[k]);
}

// Merging one word the slow way: the lowest merge anywhere, all its places from left to right, until none applies.
static int naive_encode(char merge[][2][64], int merges, char symbol[][64], int n) {
  for (;;) {
    int best = merges;
    for (int i = 0; i + 1 < n; i++)
      for (int m = 0; m < best; m++)
        if (!strcmp(symbol[i], merge[m][0]) && !strcmp(symbol[i + 1], merge[m][1])) best = m;
    if (best == merges) return n;
    int kept = 0;
    for (int i = 0; i < n; kept++) {
      bool joins = i + 1 < n && !strcmp(symbol[i], merge[best][0]) && !strcmp(symbol[i + 1], merge[best][1]);
      char joined[128];
      snprintf(joined, sizeof(joined), "%s%s", symbol[i], joins ? symbol[i + 1] : "");
      snprintf(symbol[kept], 64, "%.63s", joined);
      i += joins ? 2 : 1;
    }
    n = kept;
  }
}

static void test_against_naive(void **state) {
  (void)state;
  Error err;
  for (int round = 0; round < 5; round++) {
    char *text = xmalloc(4000); // words of few letters overlap a lot
    for (int i = 0; i < 4000; i++) text[i] = "aaabbc "[rng() % 7];
    size_t bytes = 4000;
    Tokenizer *t = tokenizer_train((const char *const[]){text}, &bytes, 1, 330, &err);
    assert_int_equal(tokenizer_save(t, file_path, &err), 0);
    char merge[70][2][64];
    int merges = 0;
    FILE *f = fopen(file_path, "rb");
    assert_int_equal(fscanf(f, "#version: 0.2 "), 0);
    while (merges < 70 && fscanf(f, "%63s %63s", merge[merges][0], merge[merges][1]) == 2) merges++;
    fclose(f);
    assert_int_equal(256 + merges, tokenizer_used(t));
    for (int trial = 0; trial < 200; trial++) {
      int n = 1 + (int)(rng() % 40);
      char word[41] = "", symbol[40][64];
      int32_t ids[40];
      for (int i = 0; i < n; i++) {
        word[i] = "aabc"[rng() % 4];
        snprintf(symbol[i], 64, "%c", word[i]);
      }
      int64_t count = tokenizer_encode(t, word, (size_t)n, ids);
      assert_int_equal(count, naive_encode(merge, merges, symbol, n));
      for (int64_t i = 0; i < count; i++) {
        char *token = tokenizer_decode(t, ids + i, 1, NULL);
        assert_string_equal(token, symbol[i]);
        free(token);
      }
    }
    tokenizer_free(t);
    free(text);
  }
}

// Training takes the most frequent pair each time, recounted here from scratch by encoding with what is known so far.
static void test_training_is_greedy(void **state) {
  (void)state;
  Error err;
  char text[1500];
  for (size_t i = 0; i < sizeof(text); i++)
    text[i] = "abcd "[rng() % (i > 0 && text[i - 1] != ' ' ? 5 : 4)]; // single blanks
  size_t bytes = sizeof(text);
  const char *texts[] = {text};
  for (int vocab = 261; vocab < 300; vocab += 3) {
    Tokenizer *before = tokenizer_train(texts, &bytes, 1, vocab - 1, &err);
    Tokenizer *after = tokenizer_train(texts, &bytes, 1, vocab, &err);
    assert_int_equal(tokenizer_used(after), tokenizer_used(before) + 1);
    int32_t ids[1500];
    static int64_t count[300][300];
    memset(count, 0, sizeof(count));
    int64_t n = tokenizer_encode(before, text, bytes, ids), most = 0;
    for (int64_t i = 0; i + 1 < n; i++) {
      char *next = tokenizer_decode(before, ids + i + 1, 1, NULL);
      bool same_word = next[0] != ' ';
      free(next);
      if (same_word && ++count[ids[i]][ids[i + 1]] > most) most = count[ids[i]][ids[i + 1]];
    }
    // The new token's two parts are what `before` makes of its text.
    int32_t id = tokenizer_used(before), parts[64];
    size_t length;
    char *token = tokenizer_decode(after, &id, 1, &length);
    assert_int_equal(tokenizer_encode(before, token, length, parts), 2);
    assert_int_equal(count[parts[0]][parts[1]], most);
    for (int a = 0; a < id; a++) // the first of the most frequent
      for (int b = 0; b < id; b++)
        if (count[a][b] == most) assert_true(a > parts[0] || (a == parts[0] && b >= parts[1]));
    free(token);
    tokenizer_free(before);
    tokenizer_free(after);
  }
}

static void test_save_and_load(void **state) {
  (void)state;
  Error err;
  Tokenizer *t = trained(310);
  assert_true(tokenizer_used(t) > 280);
  assert_int_equal(tokenizer_save(t, file_path, &err), 0);
  Tokenizer *again = tokenizer_load(file_path, 310, &err);
  assert_non_null(again);
  assert_int_equal(tokenizer_used(again), tokenizer_used(t));
  size_t n, m;
  char *first = file_read(file_path, 1 << 20, &n, &err);
  assert_int_equal(tokenizer_save(again, file_path, &err), 0);
  char *second = file_read(file_path, 1 << 20, &m, &err);
  assert_string_equal(first, second);
  const char *text = "a red circle at the \xc3\xa9t\xc3\xa9 square\n";
  int32_t a[64], b[64];
  int64_t count = tokenizer_encode(t, text, strlen(text), a);
  assert_int_equal(tokenizer_encode(again, text, strlen(text), b), count);
  assert_memory_equal(a, b, 4 * (size_t)count);
  assert_true(count < 30);
  free(first);
  free(second);
  tokenizer_free(again);
  tokenizer_free(t);
  t = trained(260);
  assert_int_equal(tokenizer_save(t, "/nonexistent/folder/vocab.bpe", &err), -1);
  assert_non_null(strstr(err.text, "/nonexistent/folder/vocab.bpe"));
  tokenizer_free(t);
}

static void test_training_edges(void **state) {
  (void)state;
  Error err;
  Tokenizer *t = tokenizer_train(NULL, NULL, 0, 300, &err); // nothing to learn from
  assert_int_equal(tokenizer_used(t), 256);
  assert_int_equal(tokenizer_save(t, file_path, &err), 0);
  tokenizer_free(t);
  t = tokenizer_load(file_path, 300, &err); // no merges, but a version line: a valid file
  assert_non_null(t);
  tokenizer_free(t);
  size_t bytes[] = {7, 0};
  t = tokenizer_train((const char *const[]){"abcdefg", ""}, bytes, 2, 300, &err); // no pair occurs twice
  assert_int_equal(tokenizer_used(t), 256);
  tokenizer_free(t);
  bytes[0] = 4;
  t = tokenizer_train((const char *const[]){"abab"}, bytes, 1, 300, &err); // twice is enough, and (ab, ab) comes once
  assert_int_equal(tokenizer_used(t), 257);
  tokenizer_free(t);
  assert_null(tokenizer_train(NULL, NULL, 0, 259, &err));
}

static void test_bad_files(void **state) {
  (void)state;
  static const struct {
    const char *text, *says;
  } bad[] = {
      {"", "no merges"},
      {"#version: 0.2\nab c\n", "line 2"},
      {"#version: 0.2\na b\nab\n", "line 3"},
      {"#version: 0.2\na b\nab c\na bc\n", "line 4"},
      {"a b\na b\n", "line 2"},
      {"a b\n c\n", "line 2"},
      {"a b\nc \n", "line 2"},
      {"a b c\n", "line 1"},
      {"\xff\xfe a\n", "line 1"},
      {"\xe4\xbd\xa0 a\n", "line 1"},
      {"\xc2\x80 a\n", "line 1"},
      {"\xc5\xbf a\n", "line 1"},
      {"\xc4", "line 1"},
  };
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    Error err = {0};
    merges_write(bad[i].text);
    assert_null(tokenizer_load(file_path, 400, &err));
    assert_non_null(strstr(err.text, bad[i].says));
    assert_non_null(strstr(err.text, file_path));
  }
  Error err = {0};
  assert_null(tokenizer_load("/nonexistent/vocab.bpe", 400, &err));
  assert_non_null(strstr(err.text, "/nonexistent/vocab.bpe"));
  assert_null(tokenizer_load(NULL, 259, &err));
  assert_null(tokenizer_load(NULL, -5, &err));
  merges_write("a b\r\nab c\r\n"); // line ends of another system, no version line: fine
  Tokenizer *t = tokenizer_load(file_path, 400, &err);
  assert_non_null(t);
  assert_int_equal(tokenizer_used(t), 258);
  tokenizer_free(t);
}

// One word of 1.5 million letters: parts of at most 1 MiB, and no quadratic time.
static void test_long_word(void **state) {
  (void)state;
  Error err;
  merges_write("a a\naa aa\naaaa aaaa\n\xc3\x83 \xc2\xa9\n");
  Tokenizer *t = tokenizer_load(file_path, 400, &err);
  size_t n = 1500000;
  char *text = xmalloc(n);
  memset(text, 'a', n);
  double start = cpu_seconds();
  expect_round_trip(t, text, n);
  for (size_t i = 1; i + 1 < n; i += 2) memcpy(text + i, "\xc3\xa9", 2); // a character across the 1 MiB mark
  expect_round_trip(t, text, n);
  assert_true(cpu_seconds() - start < 8 * TIMES_SLOWER);
  free(text);
  tokenizer_free(t);
}

typedef struct Job {
  const Tokenizer *t;
  int64_t sum;
} Job;

static void *encode_many(void *argument) {
  Job *job = argument;
  int32_t ids[64];
  for (int i = 0; i < 2000; i++) {
    char text[64];
    int n = snprintf(text, sizeof(text), "red square at the top %d left\n", i);
    int64_t count = tokenizer_encode(job->t, text, (size_t)n, ids);
    for (int64_t k = 0; k < count; k++) job->sum = job->sum * 31 % 1000003 + ids[k];
  }
  return NULL;
}

static void test_threads(void **state) {
  (void)state;
  Tokenizer *t = trained(330);
  Job job[4];
  pthread_t thread[4];
  for (int i = 0; i < 4; i++) {
    job[i] = (Job){.t = t};
    assert_int_equal(pthread_create(&thread[i], NULL, encode_many, &job[i]), 0);
  }
  for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
  for (int i = 1; i < 4; i++) assert_int_equal(job[i].sum, job[0].sum);
  assert_true(job[0].sum != 0);
  tokenizer_free(t);
}

// GPT-2's own table, where it has been fetched: TESSERA_VOCAB_BPE or .cache/vocab.bpe.
static void test_gpt2(void **state) {
  (void)state;
  const char *path = getenv("TESSERA_VOCAB_BPE");
  if (!path) path = ".cache/vocab.bpe";
  if (access(path, R_OK) != 0) {
    print_message("there is no %s (scripts/vocab_bpe.sh fetches it, and make test-long runs this)\n", path);
    skip();
  }
  Error err;
  Tokenizer *t = tokenizer_load(path, 50260, &err);
  assert_non_null(t);
  assert_int_equal(tokenizer_used(t), 50256);
  expect_ids(t, "grinning face", 3, (const int32_t[]){2164, 23062, 1986});
  expect_ids(t, "Hello, world!", 4, (const int32_t[]){15496, 11, 995, 0});
  expect_round_trip(t, "It's \xf0\x9f\x98\x80 \xff done\n\n ok", 20);
  tokenizer_free(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_ids),
      cmocka_unit_test(test_byte_order),
      cmocka_unit_test(test_small_table),
      cmocka_unit_test(test_specials_are_silent),
      cmocka_unit_test(test_words),
      cmocka_unit_test(test_invalid_utf8),
      cmocka_unit_test(test_round_trip),
      cmocka_unit_test(test_against_naive),
      cmocka_unit_test(test_training_is_greedy),
      cmocka_unit_test(test_save_and_load),
      cmocka_unit_test(test_training_edges),
      cmocka_unit_test(test_bad_files),
      cmocka_unit_test(test_long_word),
      cmocka_unit_test(test_threads),
      cmocka_unit_test(test_gpt2),
  };
  return cmocka_run_group_tests(tests, files_begin, files_end);
}
