// The tokenizer: byte 0 says how large the vocabulary may be, bytes 1 and 2 how much of the others is a vocab.bpe; what
// remains is text. Any bytes come back as they were, whatever the merges, loaded or learnt.
#include "data/tokenizer.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

static void check_round_trip(const Tokenizer *t, const char *text, size_t n) {
  int32_t *ids = xmalloc((n + 1) * sizeof *ids);
  int64_t count = tokenizer_encode(t, text, n, ids);
  FUZZ_CHECK(count >= 0 && (size_t)count <= n && (count > 0) == (n > 0));
  for (int64_t i = 0; i < count; i++) FUZZ_CHECK(ids[i] >= 0 && ids[i] < tokenizer_used(t));
  size_t bytes;
  char *back = tokenizer_decode(t, ids, count, &bytes);
  FUZZ_CHECK(bytes == n && back[n] == 0 && (n == 0 || memcmp(back, text, n) == 0));
  free(back);
  free(ids);
}

// A saved tokenizer is the same tokenizer.
static void check_saved(const Tokenizer *t, const char *text, size_t n) {
  Error err = {0};
  char *path = fuzz_path("saved.bpe");
  if (tokenizer_save(t, path, &err) != 0) fuzz_fail(err.text, __FILE__, __LINE__);
  Tokenizer *again = tokenizer_load(path, tokenizer_vocab(t), &err);
  if (!again) fuzz_fail(err.text, __FILE__, __LINE__);
  FUZZ_CHECK(tokenizer_used(again) == tokenizer_used(t));
  int32_t *a = xmalloc((n + 1) * sizeof *a), *b = xmalloc((n + 1) * sizeof *b);
  int64_t count = tokenizer_encode(t, text, n, a);
  FUZZ_CHECK(tokenizer_encode(again, text, n, b) == count && memcmp(a, b, (size_t)count * sizeof *a) == 0);
  free(a);
  free(b);
  tokenizer_free(again);
  free(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 3) return 0;
  int vocab = TOKENIZER_MIN_VOCAB + data[0];
  size_t table = (size_t)data[1] << 8 | data[2], n = size - 3;
  if (table > n) table = n;
  const char *text = (const char *)data + 3 + table;
  n -= table;
  Error err = {0};
  Tokenizer *loaded = tokenizer_load(table ? fuzz_memory(data + 3, table) : NULL, vocab, &err);
  if (loaded) {
    check_round_trip(loaded, text, n);
    check_saved(loaded, text, n);
  } else {
    FUZZ_CHECK(err.text[0]);
  }
  tokenizer_free(loaded);
  const char *half[2] = {text, text + n / 2};
  size_t bytes[2] = {n / 2, n - n / 2};
  Tokenizer *learnt = tokenizer_train(half, bytes, 2, vocab, &err);
  if (!learnt) fuzz_fail(err.text, __FILE__, __LINE__);
  check_round_trip(learnt, text, n);
  check_saved(learnt, text, n);
  tokenizer_free(learnt);
  return 0;
}
