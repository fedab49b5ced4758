// The fuzz targets without libFuzzer: every file of tests/fuzz/corpus, cut short, and with bytes changed. Run from the
// root of the repository: test_fuzz [ROUNDS], each of 16 mutations of each file.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/paths.h"
#include "tests/fuzz/fuzz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Each target is compiled with its one function renamed.
int fuzz_config(const uint8_t *data, size_t size);
int fuzz_tar(const uint8_t *data, size_t size);
int fuzz_index(const uint8_t *data, size_t size);
int fuzz_safetensors(const uint8_t *data, size_t size);
int fuzz_tokenizer(const uint8_t *data, size_t size);
int fuzz_captions(const uint8_t *data, size_t size);
int fuzz_image(const uint8_t *data, size_t size);

enum { CUTS = 4, CHANGES = 12, MAX_INPUT = 1 << 20, STREAM_REPLAY = 77 };

typedef int Target(const uint8_t *data, size_t size);

// On the heap at its exact size, so that sanitizers see every read past the end.
static void feed(Target *target, const char *bytes, size_t n) {
  uint8_t *copy = xmalloc(n);
  memcpy(copy, bytes, n);
  target(copy, n);
  free(copy);
}

// Returns the mutations fed.
static int feed_damaged(Target *target, uint64_t seed, int rounds, const char *bytes, size_t n) {
  if (n == 0) return 0;
  for (uint32_t i = 0; i < (uint32_t)(CUTS * rounds); i++)
    feed(target, bytes, philox4(seed, i, STREAM_REPLAY, 0).v[0] % n);
  char *changed = xmalloc(n);
  for (uint32_t i = 0; i < (uint32_t)(CHANGES * rounds); i++) {
    memcpy(changed, bytes, n);
    for (uint32_t k = 0; k <= i % 4; k++) {
      Philox4 r = philox4(seed, i, STREAM_REPLAY, 1 + k);
      changed[r.v[0] % n] = (char)(r.v[1] & 1 ? r.v[2] : (uint32_t)changed[r.v[0] % n] ^ 1u << r.v[2] % 8);
    }
    feed(target, changed, n);
  }
  free(changed);
  return (CUTS + CHANGES) * rounds;
}

static void replay(Target *target, const char *name, int rounds) {
  char folder[64];
  snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", name);
  PathList files;
  Error err;
  if (path_list_expand(folder, "", "", &files, &err) != 0) fail_msg("%s", err.text);
  int n_files = 0, mutations = 0;
  for (int i = 0; i < files.count; i++) {
    size_t n;
    char *bytes = file_read(files.path[i], MAX_INPUT, &n, &err);
    if (!bytes) continue; // "." and ".."
    feed(target, bytes, n);
    mutations += feed_damaged(target, (uint64_t)i, rounds, bytes, n);
    free(bytes);
    n_files++;
  }
  path_list_free(&files);
  print_message("%d mutations of %d files for %s\n", mutations, n_files, name);
  assert_true(n_files >= 3);
}

#define REPLAY(name)                                                                                                   \
  static void replay_##name(void **state) {                                                                            \
    replay(fuzz_##name, #name, *(const int *)*state);                                                                  \
  }
REPLAY(config)
REPLAY(tar)
REPLAY(index)
REPLAY(safetensors)
REPLAY(tokenizer)
REPLAY(captions)
REPLAY(image)

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 1;
  if (rounds < 1) panic("at least one round, not %s", argv[1]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(replay_config, &rounds),    cmocka_unit_test_prestate(replay_tar, &rounds),
      cmocka_unit_test_prestate(replay_index, &rounds),     cmocka_unit_test_prestate(replay_safetensors, &rounds),
      cmocka_unit_test_prestate(replay_tokenizer, &rounds), cmocka_unit_test_prestate(replay_captions, &rounds),
      cmocka_unit_test_prestate(replay_image, &rounds),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
