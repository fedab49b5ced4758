#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "tests/unit/data_case.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

FILE *data_file(const char *folder, const char *name) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  return f;
}

static void write_image(const char *folder, const char *name, int width, int height, uint32_t seed) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  Image image = {width, height, malloc((size_t)(width * height * 3))};
  for (int i = 0; i < width * height * 3; i++) image.rgb[i] = (uint8_t)(philox4(seed, 0, 99, (uint32_t)i / 3).v[i % 3]);
  Error err;
  assert_int_equal(image_write_png(path, &image, &err), 0);
  image_free(&image);
}

static Source *open_source(const char *type, const char *folder, const char *name) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  Error err;
  Source *source = source_open(type, path, NULL, &err);
  if (!source) fail_msg("%s", err.text);
  return source;
}

int data_make(void **state) {
  Data *d = calloc(1, sizeof *d);
  snprintf(d->folder, sizeof d->folder, "/tmp/test_loader_XXXXXX");
  assert_non_null(mkdtemp(d->folder));
  char name[64];
  FILE *f = data_file(d->folder, "captions.tsv");
  for (int i = 0; i < IMAGES; i++) {
    snprintf(name, sizeof name, "image%02d.png", i);
    write_image(d->folder, name, 8 + i % 5 * 6, 8 + i % 7 * 4, (uint32_t)i);
    fprintf(f, "%s\tcaption number %d%.*s\n", name, i, i % 6 * 2, " of many kinds");
  }
  fclose(f);
  f = data_file(d->folder, "text.txt");
  for (int i = 0; i < TEXTS; i++) {
    for (int j = 0; j <= i * i * 2 / 3; j++) fputc('a' + (i + j) % 26, f);
    fputs("\n\n", f);
  }
  fclose(f);
  f = data_file(d->folder, "stories.jsonl");
  for (int i = 0; i < STORIES; i++)
    fprintf(f,
            "{\"segments\":[{\"text\":\"look\"},{\"image\":\"image%02d.png\"},{\"text\":\"then %d\"},"
            "{\"image\":\"image%02d.png\"}%s]}\n",
            i, i, i + 9, i % 2 ? ",{\"text\":\"the end\"}" : "");
  fclose(f);
  d->source[0] = open_source("folder", d->folder, "");
  d->source[1] = open_source("text", d->folder, "text.txt");
  d->source[2] = open_source("text", d->folder, "stories.jsonl");
  Error err;
  d->tokenizer = tokenizer_load(NULL, VOCAB, &err);
  assert_non_null(d->tokenizer);
  *state = d;
  return 0;
}

int data_remove(void **state) {
  Data *d = *state;
  source_close(d->source[0]);
  source_close(d->source[1]);
  source_close(d->source[2]);
  tokenizer_free(d->tokenizer);
  char path[256];
  for (int i = 0; i < IMAGES; i++) {
    snprintf(path, sizeof path, "%s/image%02d.png", d->folder, i);
    unlink(path);
  }
  const char *name[] = {"captions.tsv", "text.txt", "stories.jsonl"};
  for (int i = 0; i < 3; i++) {
    snprintf(path, sizeof path, "%s/%s", d->folder, name[i]);
    unlink(path);
  }
  int rc = rmdir(d->folder);
  free(d);
  return rc;
}

void *pack_alloc(size_t bytes) {
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

LoaderConfig data_config(Data *d) {
  static const double weight[] = {3, 2, 1};
  return (LoaderConfig){.stream = {.source = d->source,
                                   .weight = weight,
                                   .sources = 3,
                                   .tokenizer = d->tokenizer,
                                   .shape = {256, 33, VALUES, VOCAB},
                                   .max_text = 256,
                                   .max_document = 100,
                                   .max_caption = 20,
                                   .fit = {IMAGE_ASPECT, 16, PATCH, 24},
                                   .max_pixels = 1 << 20,
                                   .held_out = 0.1,
                                   .cfg_drop = 0.2,
                                   .caption_to_image = 0.5,
                                   .flow_times = {.mean = -0.8, .std = 0.8},
                                   .seed = 11},
                        .flip = true,
                        .ce_weight = 0.5,
                        .packs_per_step = 3,
                        .world = 1,
                        .threads = 1,
                        .cache_mb = 1,
                        .held = 1,
                        .host_alloc = pack_alloc,
                        .host_release = free};
}

Loader *open_loader(const LoaderConfig *config, const char *state) {
  Error err;
  Loader *loader = loader_open(config, state, &err);
  if (!loader) fail_msg("%s (%s)", err.text, err.hint);
  return loader;
}

Pack *next_pack(Loader *loader) {
  Error err;
  Pack *pack;
  double waited = loader_next(loader, &pack, &err);
  if (waited < 0) fail_msg("%s", err.text);
  return pack;
}
