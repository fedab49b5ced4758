// Tensor files: what opens can be read to its last byte and written again.
#include "model/files/safetensors.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

static void check_again(const SafeFile *f) {
  Error err = {0};
  char *path = fuzz_path("again.safetensors");
  if (safetensors_write(path, f->tensor, f->n, f->metadata, f->n_metadata, false, &err) != 0)
    fuzz_fail(err.text, __FILE__, __LINE__);
  SafeFile *again = safetensors_open(path, &err);
  if (!again) fuzz_fail(err.text, __FILE__, __LINE__);
  FUZZ_CHECK(again->n == f->n && again->n_metadata == f->n_metadata);
  for (int i = 0; i < f->n; i++) {
    const SafeTensor *t = &f->tensor[i];
    const SafeTensor *same = safetensors_get(again, t->name, t->dtype, t->rank, t->shape, &err);
    FUZZ_CHECK(same && safe_bytes(same) == safe_bytes(t));
    FUZZ_CHECK(safe_bytes(t) == 0 || memcmp(same->data, t->data, safe_bytes(t)) == 0);
    FUZZ_CHECK(!safetensors_get(f, t->name, t->dtype, t->rank + 1, t->shape, &err) && err.text[0]);
  }
  for (int i = 0; i < f->n_metadata; i++)
    FUZZ_CHECK(strcmp(again->metadata[i].key, f->metadata[i].key) == 0 &&
               strcmp(again->metadata[i].value, f->metadata[i].value) == 0);
  safetensors_close(again);
  free(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Error err = {0};
  SafeFile *f = safetensors_open(fuzz_memory(data, size), &err);
  if (!f) {
    FUZZ_CHECK(err.text[0]);
    return 0;
  }
  check_again(f);
  safetensors_close(f);
  return 0;
}
