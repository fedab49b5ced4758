// Configurations: a file, then what --set says, each after a NUL. What loads must save to a text that loads again to
// the same.
#include "model/config/config.h"
#include "model/config/load.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_SETS = 8 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char *text = xmalloc(size + 1);
  if (size) memcpy(text, data, size);
  text[size] = 0;
  const char *sets[MOST_SETS], *end = text + size;
  int n = 0;
  for (const char *p = text + strlen(text) + 1; p < end && n < MOST_SETS; p += strlen(p) + 1) sets[n++] = p;
  Config *c = xmalloc(sizeof *c), *again = xmalloc(sizeof *again);
  Error err = {0};
  if (config_load(c, fuzz_memory(text, strlen(text)), sets, n, &err) == 0) {
    char *saved = config_to_json(c);
    if (config_load(again, fuzz_memory(saved, strlen(saved)), NULL, 0, &err) != 0) fuzz_fail(err.text, __FILE__, 0);
    char *second = config_to_json(again);
    FUZZ_CHECK(strcmp(saved, second) == 0);
    FUZZ_CHECK(config_max_image_tokens(c) >= 1 && config_max_images(c) >= 1);
    FUZZ_CHECK(config_max_document(c) <= config_max_text(c) && config_max_text(c) <= c->data.micro_batch_tokens);
    free(config_run_folder(c));
    free(second);
    free(saved);
  } else {
    FUZZ_CHECK(err.text[0]);
  }
  free(again);
  free(c);
  free(text);
  return 0;
}
