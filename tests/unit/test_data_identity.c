// Every key of the data and of the flow either changes the identity of the stream or is known not to change the stream.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/config/keys.h"
#include "model/config/load.h"
#include "trainer/state.h"

#include <stdlib.h>
#include <string.h>

// Another value for each key that decides which documents there are, what they hold, or which of them make a step.
static const char *const deciding[] = {
    "model.patch=4",           "data.micro_batch_tokens=2048",
    "data.image_size=40",      "data.image_mode=square",
    "data.max_image_tokens=9", "data.flip=true",
    "data.cfg_drop=0.11",      "data.caption_to_image=0.51",
    "data.held_out=0.06",      "data.held_out_by=caption",
    "data.max_text=900",       "data.max_images=17",
    "data.max_document=800",   "data.max_caption=63",
    "flow.t_mean=-0.81",       "flow.t_std=0.81",
    "flow.t_uniform=0.1",      "kernels.packing=padded",
};

// Sources and max_pixels are told by their numbers of samples, the tokenizer by its own identity; the others change no
// document.
static const char *const others[] = {"data.sources", "data.max_pixels", "data.tokenizer", "data.cache_mb",
                                     "data.max_bad", "data.threads",    "flow.t_floor"};

enum { DECIDING = sizeof deciding / sizeof deciding[0], OTHERS = sizeof others / sizeof others[0] };

static int is_key_of(const char *set, const char *path) {
  size_t n = strlen(path);
  return strncmp(set, path, n) == 0 && (set[n] == '=' || !set[n]);
}

static void test_every_key(void **state) {
  (void)state;
  Config c;
  Error err;
  char identity[DECIDING + 1][17];
  for (int i = 0; i <= DECIDING; i++) {
    const char *const sets[2] = {"data.image_mode=aspect", i < DECIDING ? deciding[i] : NULL};
    if (config_load(&c, NULL, sets, i < DECIDING ? 2 : 1, &err) != 0) fail_msg("%s", err.text);
    state_data_identity(&c, identity[i]);
    assert_int_equal(strlen(identity[i]), 16);
    for (int k = 0; k < i; k++)
      if (strcmp(identity[i], identity[k]) == 0)
        fail_msg("%s has the identity of %s", i < DECIDING ? deciding[i] : "the default", deciding[k]);
  }
  for (int i = 0; i < config_key_count; i++) {
    const char *path = config_keys[i].path;
    int known = 0;
    for (int k = 0; k < DECIDING; k++) known += is_key_of(deciding[k], path);
    for (int k = 0; k < OTHERS; k++) known += is_key_of(others[k], path);
    int concerns = strncmp(path, "data.", 5) == 0 || strncmp(path, "flow.", 5) == 0;
    if (concerns && known != 1) fail_msg("does %s decide what the stream of documents holds?", path);
  }
}

// Checkpoints of earlier versions hold it: settings that were there before their key have the identity they had.
static void test_same_as_ever(void **state) {
  (void)state;
  const char *const old[] = {"flow.t_std=0.8", "flow.t_mean=-0.8", "flow.t_uniform=0"};
  Config c;
  Error err;
  char identity[17];
  assert_int_equal(config_load(&c, NULL, old, 3, &err), 0);
  state_data_identity(&c, identity);
  assert_string_equal(identity, "f282895cf86fa479");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_key), cmocka_unit_test(test_same_as_ever)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
