// The loader over real files: the same bytes for any number of threads and processes, exact restoring, epochs, fill,
// and images that cannot be decoded.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/loader.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { IMAGES = 40, TEXTS = 25, STORIES = 12, PATCH = 4, VALUES = 3 * PATCH * PATCH, VOCAB = 300 };

typedef struct Data {
  char folder[64];
  Source *source[3]; // captioned, text, stories
  Tokenizer *tokenizer;
} Data;

static FILE *data_file(const char *folder, const char *name) {
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

// Captioned images of many sizes, texts from one byte to 400, interleaved stories.
static int data_make(void **state) {
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

static int data_remove(void **state) {
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

// All three sources in packs of 256 slots.
static LoaderConfig data_config(Data *d) {
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
                                   .t_mean = -0.8,
                                   .t_std = 0.8,
                                   .seed = 11},
                        .flip = true,
                        .ce_weight = 0.5,
                        .packs_per_step = 3,
                        .world = 1,
                        .threads = 1,
                        .cache_mb = 1};
}

static Loader *open_loader(const LoaderConfig *config, const char *state) {
  Error err;
  Loader *loader = loader_open(config, state, &err);
  if (!loader) fail_msg("%s (%s)", err.text, err.hint);
  return loader;
}

static Pack *next_pack(Loader *loader) {
  Error err;
  Pack *pack;
  double waited = loader_next(loader, &pack, &err);
  if (waited < 0) fail_msg("%s", err.text);
  return pack;
}

enum { PACKS = 60, BEYOND = 24 }; // a window of documents is less than BEYOND packs

// The blocks of the first packs: [PACKS, bytes].
static uint8_t *reference_packs(const LoaderConfig *config, size_t *bytes) {
  Loader *loader = open_loader(config, NULL);
  uint8_t *all = NULL;
  for (int i = 0; i < PACKS; i++) {
    Pack *pack = next_pack(loader);
    *bytes = pack->bytes;
    if (!all) all = malloc(PACKS * pack->bytes);
    memcpy(all + (size_t)i * pack->bytes, pack->block, pack->bytes);
    assert_int_equal(pack->number, i);
    Error err;
    if (pack_check(&pack->batch, config->stream.shape, &err)) fail_msg("pack %d: %s", i, err.text);
    loader_release(loader, pack);
  }
  loader_close(loader);
  return all;
}

static void test_threads_and_processes(void **state) {
  LoaderConfig config = data_config(*state);
  config.packs_per_step = 6;
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  assert_memory_not_equal(all, all + bytes, bytes);
  for (int threads = 1; threads <= 4; threads *= 2)
    for (int world = 1; world <= 3; world++)
      for (int rank = 0; rank < world; rank++) {
        config.threads = threads;
        config.world = world;
        config.rank = rank;
        config.cache_mb = threads == 2 ? 0 : 1;
        Loader *loader = open_loader(&config, NULL);
        for (int i = rank; i < PACKS; i += world) {
          Pack *pack = next_pack(loader);
          assert_int_equal(pack->number, i);
          assert_memory_equal(pack->block, all + (size_t)i * bytes, bytes);
          loader_release(loader, pack);
        }
        loader_close(loader);
      }
  free(all);
}

static void test_restore(void **state) {
  LoaderConfig config = data_config(*state);
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  int halfway = 0; // states between two documents of a sample
  for (int stop = 0; stop < PACKS - BEYOND; stop++) {
    config.threads = 1 + stop % 3;
    Loader *loader = open_loader(&config, NULL);
    for (int i = 0; i < stop; i++) loader_release(loader, next_pack(loader));
    char *saved = loader_state(loader);
    loader_close(loader);
    config.threads = 1 + stop % 2;
    loader = open_loader(&config, saved);
    char *again = loader_state(loader);
    if (stop % 3) assert_string_equal(saved, again);
    halfway += strstr(saved, "\"pending\":[-1") == NULL;
    for (int i = stop; i < stop + BEYOND; i++) {
      Pack *pack = next_pack(loader);
      assert_int_equal(pack->number, i);
      assert_memory_equal(pack->block, all + (size_t)i * bytes, bytes);
      loader_release(loader, pack);
    }
    loader_close(loader);
    free(saved);
    free(again);
  }
  assert_true(halfway > 0);
  free(all);
}

// In the middle of a step of several processes.
static void test_restore_midway(void **state) {
  LoaderConfig config = data_config(*state);
  config.packs_per_step = 9;
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  config.world = 3;
  config.rank = 2;
  config.threads = 2;
  for (int stop = 1; stop < 6; stop++) { // packs of this process, three a step
    Loader *loader = open_loader(&config, NULL);
    for (int i = 0; i < stop; i++) loader_release(loader, next_pack(loader));
    char *saved = loader_state(loader);
    loader_close(loader);
    loader = open_loader(&config, saved);
    for (int i = stop * 3 + 2; i < PACKS; i += 3) {
      Pack *pack = next_pack(loader);
      assert_int_equal(pack->number, i);
      assert_memory_equal(pack->block, all + (size_t)i * bytes, bytes);
      loader_release(loader, pack);
    }
    loader_close(loader);
    free(saved);
  }
  free(all);
}

// At the end of a step a state fits other numbers of processes and of packs a step.
static void test_restore_elsewhere(void **state) {
  LoaderConfig config = data_config(*state);
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  config.world = 3;
  char *saved[3];
  for (int rank = 0; rank < 3; rank++) {
    config.rank = rank;
    Loader *loader = open_loader(&config, NULL);
    for (int i = 0; i < 4; i++) loader_release(loader, next_pack(loader));
    saved[rank] = loader_state(loader);
    loader_close(loader);
  }
  assert_string_equal(saved[0], saved[1]);
  assert_string_equal(saved[0], saved[2]);
  config.world = config.packs_per_step = 2;
  config.rank = 1;
  Loader *loader = open_loader(&config, saved[0]);
  BatchShape shape = config.stream.shape;
  for (int i = 13; i < PACKS; i += 2) {
    Pack *pack = next_pack(loader);
    assert_int_equal(pack->number, i);
    uint8_t *expected = all + (size_t)i * bytes;
    Batch batch;
    batch_bind(&batch, shape, expected);
    *batch.dims = *pack->batch.dims; // the scales are those of another step
    assert_memory_equal(pack->block, expected, bytes);
    loader_release(loader, pack);
  }
  loader_close(loader);
  for (int i = 0; i < 3; i++) free(saved[i]);
  free(all);
}

static void test_bad_states(void **state) {
  LoaderConfig config = data_config(*state);
  Error err;
  Loader *loader = open_loader(&config, NULL);
  loader_release(loader, next_pack(loader));
  char *saved = loader_state(loader);
  loader_close(loader);
  size_t n = strlen(saved);
  uint64_t refused = 0;
  for (uint32_t trial = 0; trial < 400; trial++) { // truncated and changed ones: refused, or as good as another
    char *copy = strdup(saved);
    Philox4 r = philox4(5, trial, 99, 0);
    if (trial % 4 == 0)
      copy[r.v[0] % n] = 0;
    else
      copy[r.v[0] % n] = "0123456789,[]{}\"-ex"[r.v[1] % 19];
    loader = loader_open(&config, copy, &err);
    refused += loader == NULL;
    if (!loader) assert_true(strlen(err.text) > 0);
    loader_close(loader);
    free(copy);
  }
  assert_true(refused >= 200);
  config.packs_per_step = 4; // one pack into a step of three
  assert_null(loader_open(&config, saved, &err));
  assert_non_null(strstr(err.text, "into a step of 3"));
  config.packs_per_step = 3;
  config.stream.held_out = 0.4;
  assert_null(loader_open(&config, saved, &err));
  assert_non_null(strstr(err.text, "not what it was"));
  free(saved);
}

// The scales count the whole step.
static void test_scales(void **state) {
  LoaderConfig config = data_config(*state);
  config.threads = 2;
  Loader *loader = open_loader(&config, NULL);
  for (int step = 0; step < 8; step++) {
    int64_t targets = 0, noised = 0;
    Pack *pack[3];
    for (int i = 0; i < 3; i++) {
      pack[i] = next_pack(loader);
      const Batch *b = &pack[i]->batch;
      targets += b->dims->n_target;
      for (int g = 1; g < b->dims->n_segments; g++) noised += b->seg_kind[g] == SEGMENT_NOISED ? b->seg_len[g] : 0;
    }
    assert_true(targets > 0 && noised > 0);
    for (int i = 0; i < 3; i++) {
      const BatchDims *dims = pack[i]->batch.dims;
      assert_float_equal(dims->ce_scale, 0.5 / (double)targets, 1e-9);
      assert_float_equal(dims->flow_scale, 1.0 / ((double)noised * VALUES), 1e-9);
      assert_float_equal(dims->router_scale, 1.0 / 3, 1e-7);
      assert_int_equal(dims->seed_lo, 11);
      loader_release(loader, pack[i]);
    }
  }
  loader_close(loader);
}

// Every training sample once per epoch and source, none that is held out, sources by weight; draw numbers count up.
static void test_epochs(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  Error err;
  Stream *stream = stream_open(&config.stream, &err);
  assert_non_null(stream);
  enum { ALL = 4000, EPOCHS = 100 };
  Origin made[ALL]; // by draw number
  bool seen[ALL] = {false};
  int64_t samples[3] = {0}, documents = 0;
  static int64_t count[3][64][EPOCHS]; // documents by source, sample and epoch
  int64_t place[2][64] = {{0}};        // where in epochs 0 and 1 a sample of source 0 came
  memset(count, 0, sizeof count);
  DraftList list = {0};
  StreamState now = {0};
  while (now.draw < ALL - 300) {
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    for (int i = 0; i < list.count; i++) {
      const Draft *draft = list.draft[i];
      const Source *source = d->source[draft->origin.source];
      assert_true(draft->document.draw < ALL && !seen[draft->document.draw]);
      seen[draft->document.draw] = true;
      made[draft->document.draw] = draft->origin;
      assert_false(sample_is_held_out(draft->sample->group, 0.1));
      int64_t j = 0;
      while (source_sample(source, j) != draft->sample) j++;
      uint64_t epoch = draft->origin.ordinal / (uint64_t)stream_samples(stream, draft->origin.source);
      assert_true(epoch < EPOCHS);
      if (draft->origin.piece == 0) count[draft->origin.source][j][epoch]++;
      if (draft->origin.source == 0 && epoch < 2)
        place[epoch][j] = (int64_t)(draft->origin.ordinal % (uint64_t)stream_samples(stream, 0));
    }
    documents += list.count;
    stream_recycle(stream, &list);
    stream_save(stream, &now);
  }
  // What was made is either in a pack or waits in the window.
  assert_int_equal(documents + now.count, now.draw);
  uint64_t begun[3] = {UINT64_MAX, UINT64_MAX, UINT64_MAX}; // the earliest sample that waits, by source
  for (int i = 0; i < now.count; i++) {
    Origin origin = now.window[i];
    assert_false(seen[origin.draw]);
    made[origin.draw] = origin;
    if (origin.ordinal < begun[origin.source]) begun[origin.source] = origin.ordinal;
  }
  uint64_t next[3] = {0};
  for (uint64_t i = 0; i < now.draw; i++) { // draw numbers follow the order of the sources' samples
    if (made[i].piece) continue;
    assert_int_equal(made[i].ordinal, next[made[i].source]);
    next[made[i].source]++;
    samples[made[i].source]++;
  }
  for (int s = 0; s < 3; s++) {
    uint64_t n = (uint64_t)stream_samples(stream, s), epochs = (begun[s] < next[s] ? begun[s] : next[s]) / n;
    assert_true(epochs >= 5);
    for (uint64_t epoch = 0; epoch < epochs; epoch++) {
      int64_t shown = 0;
      for (int64_t j = 0; j < source_count(d->source[s]); j++) {
        assert_in_range(count[s][j][epoch], 0, 1);
        shown += count[s][j][epoch];
      }
      assert_int_equal(shown, n);
    }
    assert_float_equal((double)samples[s] / (double)(samples[0] + samples[1] + samples[2]), (3.0 - s) / 6, 0.01);
  }
  int same = 0;
  for (int j = 0; j < IMAGES; j++) same += place[0][j] == place[1][j];
  assert_true(same < IMAGES / 2);
  HeldOut *held;
  int64_t held_count = stream_held_out(d->source, 3, 0.1, config.stream.max_pixels, &held);
  int64_t left = stream_samples(stream, 0) + stream_samples(stream, 1) + stream_samples(stream, 2);
  assert_true(held_count > 0);
  assert_int_equal(left + held_count, IMAGES + TEXTS + STORIES);
  for (int64_t i = 0; i < held_count; i++) {
    assert_true(sample_is_held_out(source_sample(d->source[held[i].source], held[i].sample)->group, 0.1));
    assert_int_equal(count[held[i].source][held[i].sample][0], 0);
    for (int64_t j = 0; j < i; j++) assert_true(held[i].source != held[j].source || held[i].sample != held[j].sample);
  }
  free(held);
  draft_list_free(&list);
  stream_close(stream);
}

static void test_permutation(void **state) {
  (void)state;
  for (int64_t n = 1; n < 300; n += 1 + n / 5) {
    int64_t moved = 0;
    bool *hit = calloc((size_t)n, sizeof *hit);
    for (int64_t i = 0; i < n; i++) {
      int64_t to = stream_permute(3, 1, 2, n, i);
      assert_true(to >= 0 && to < n && !hit[to]);
      hit[to] = true;
      moved += to != stream_permute(3, 2, 2, n, i);
    }
    if (n > 20) assert_true(moved > n / 2);
    free(hit);
  }
}

// A text that is too long becomes documents that hold all of it, eos at its end only; captions are truncated.
static void test_long_texts(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  static const double weight[] = {1};
  config.stream.source = &d->source[1];
  config.stream.weight = weight;
  config.stream.sources = 1;
  config.stream.max_document = 50;
  config.stream.held_out = 0;
  Error err;
  Stream *stream = stream_open(&config.stream, &err);
  assert_non_null(stream);
  DraftList list = {0};
  int64_t cut = 0;
  for (int pack = 0; pack < 40; pack++) {
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    for (int i = 0; i < list.count; i++) {
      const Draft *draft = list.draft[i];
      const SampleSegment *text = &draft->sample->segment[0];
      const Document *doc = &draft->document;
      int64_t pieces = ((int64_t)text->text_bytes + 47) / 48;
      bool last = draft->origin.piece == pieces - 1;
      assert_true(doc->tokens <= 50 && draft->origin.piece < pieces);
      assert_int_equal(doc->token[0], VOCAB - 4);
      assert_int_equal(doc->token[doc->tokens - 1] == VOCAB - 3, last);
      size_t bytes;
      char *back = tokenizer_decode(d->tokenizer, doc->token, doc->tokens, &bytes);
      assert_int_equal(bytes, last ? text->text_bytes - (size_t)(pieces - 1) * 48 : 48);
      assert_memory_equal(back, text->text + draft->origin.piece * 48, bytes);
      free(back);
      cut += pieces > 1;
    }
    stream_recycle(stream, &list);
  }
  assert_true(cut > 0 && stream_stats(stream).cut > 0);
  draft_list_free(&list);
  stream_close(stream);

  config.stream.source = d->source;
  config.stream.max_caption = 10;
  stream = stream_open(&config.stream, &err);
  assert_non_null(stream);
  assert_int_equal(stream_pack(stream, &list, &err), 0);
  for (int i = 0; i < list.count; i++) assert_true(list.draft[i]->document.tokens <= 14);
  assert_true(stream_stats(stream).truncated >= list.count); // all of them are longer, as are those in the window
  stream_recycle(stream, &list);
  draft_list_free(&list);
  stream_close(stream);
}

// Fill with documents of random lengths in [least, most] and a limit on text rows.
static double text_fill(const char *folder, const Tokenizer *tokenizer, int least, int most, int slots) {
  char path[256];
  FILE *f = data_file(folder, "fill.txt");
  for (uint32_t i = 0; i < 3000; i++) {
    int n = least - 2 + (int)(philox4(8, i, 99, 0).v[0] % (uint32_t)(most - least + 1));
    for (int j = 0; j < n; j++) fputc('a' + j % 26, f);
    fputs("\n\n", f);
  }
  fclose(f);
  snprintf(path, sizeof path, "%s/fill.txt", folder);
  Error err;
  Source *source = source_open("text", path, NULL, &err);
  assert_non_null(source);
  double weight = 1;
  StreamConfig config = {.source = &source,
                         .weight = &weight,
                         .sources = 1,
                         .tokenizer = tokenizer,
                         .shape = {slots, 1, VALUES, VOCAB},
                         .max_text = slots,
                         .max_document = slots,
                         .max_caption = 20,
                         .fit = {IMAGE_SQUARE, 16, PATCH, 0},
                         .seed = 1};
  Stream *stream = stream_open(&config, &err);
  assert_non_null(stream);
  DraftList list = {0};
  int64_t used = 0, worst = slots;
  uint64_t oldest = 0;
  for (int pack = 0; pack < 200; pack++) {
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    int64_t sum = 0;
    for (int i = 0; i < list.count; i++) sum += list.draft[i]->size.slots;
    assert_true(sum <= slots);
    // Nothing waits for ever: the first of a pack is the oldest document there is.
    assert_true(pack == 0 || list.draft[0]->document.draw > oldest);
    for (int i = 1; i < list.count; i++) assert_true(list.draft[i]->document.draw > list.draft[0]->document.draw);
    oldest = list.draft[0]->document.draw;
    used += sum;
    if (sum < worst) worst = sum;
    stream_recycle(stream, &list);
  }
  double fill = (double)used / (200.0 * slots);
  print_message("fill with %d-%d tokens in %d slots: %.2f%%, worst pack %.2f%%\n", least, most, slots, 100 * fill,
                100.0 * (double)worst / slots);
  draft_list_free(&list);
  stream_close(stream);
  source_close(source);
  unlink(path);
  return fill;
}

static void test_fill(void **state) {
  Data *d = *state;
  assert_true(text_fill(d->folder, d->tokenizer, 30, 300, 4096) >= 0.97);
  assert_true(text_fill(d->folder, d->tokenizer, 25, 33, 1024) >= 0.97);
  assert_true(text_fill(d->folder, d->tokenizer, 3, 1000, 1024) >= 0.95);
  assert_true(text_fill(d->folder, d->tokenizer, 29, 29, 1024) >= 0.97);

  LoaderConfig config = data_config(d); // images of many sizes, with a limit on text rows
  config.stream.max_text = 200;
  config.threads = 2;
  Loader *loader = open_loader(&config, NULL);
  for (int i = 0; i < 60; i++) {
    Pack *pack = next_pack(loader);
    assert_true(pack->batch.dims->n_text <= 200);
    loader_release(loader, pack);
  }
  LoaderStats stats = loader_stats(loader);
  assert_int_equal(stats.packs, 60);
  assert_int_equal(stats.slots, 60 * 256);
  print_message("fill of the mixed set in 256 slots, 200 of text: %.2f%%\n",
                100.0 * (double)stats.slots_used / (double)stats.slots);
  assert_true((double)stats.slots_used >= 0.97 * (double)stats.slots);
  loader_close(loader);
}

// The pixels of a pack are those of its samples, mirrored for half of them.
static void test_pixels(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  config.stream.sources = 1;
  Error err;
  Stream *stream = stream_open(&config.stream, &err); // the same stream, without pixels
  assert_non_null(stream);
  Loader *loader = open_loader(&config, NULL);
  DraftList list = {0};
  int mirrored = 0, images = 0;
  for (int n = 0; n < 20; n++) {
    Pack *pack = next_pack(loader);
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    assert_int_equal(pack->documents, list.count);
    for (int g = 1; g < pack->batch.dims->n_segments; g++) {
      const Draft *draft = list.draft[g - 1]; // one image a document
      const SampleSegment *segment = &draft->sample->segment[1];
      assert_true(pack->batch.seg_doc[g] == draft->document.draw);
      uint8_t *bytes, plain[24 * VALUES], flipped[24 * VALUES];
      size_t size;
      Image image, fitted;
      assert_int_equal(sample_patches(d->source[0], segment, &config.stream.fit, 1 << 20, plain, &err), 0);
      assert_int_equal(source_read_image(d->source[0], segment->image, &bytes, &size, &err), 0);
      assert_int_equal(image_decode(bytes, size, 1 << 20, &image, &err), 0);
      assert_int_equal(image_fit(&image, &config.stream.fit, true, &fitted, &err), 0);
      image_to_patches(&fitted, PATCH, flipped);
      const uint8_t *patch = pack->batch.patch + (size_t)(pack->batch.seg_start[g] - pack->batch.dims->n_text) * VALUES;
      size_t n_bytes = (size_t)pack->batch.seg_len[g] * VALUES;
      bool is_plain = memcmp(patch, plain, n_bytes) == 0;
      if (!is_plain) assert_memory_equal(patch, flipped, n_bytes);
      mirrored += !is_plain;
      images++;
      image_free(&image);
      image_free(&fitted);
      free(bytes);
    }
    stream_recycle(stream, &list);
    loader_release(loader, pack);
  }
  print_message("%d of %d images are mirrored\n", mirrored, images);
  assert_true(images > 100 && mirrored > images / 3 && mirrored < images * 2 / 3);
  draft_list_free(&list);
  loader_close(loader);
  stream_close(stream);
}

// Images damaged after the index was read: their documents keep their slots, and nothing else changes.
static void test_failing_images(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  config.threads = 2;
  config.flip = false;
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  char path[256], kept[264];
  for (int i = 3; i < 9; i += 5) {
    snprintf(path, sizeof path, "%s/image%02d.png", d->folder, i);
    snprintf(kept, sizeof kept, "%s.kept", path);
    assert_int_equal(rename(path, kept), 0);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs("not an image any more", f);
    fclose(f);
  }
  Loader *loader = open_loader(&config, NULL);
  int64_t silent = 0;
  for (int i = 0; i < PACKS; i++) {
    Pack *pack = next_pack(loader);
    const Batch *b = &pack->batch;
    Batch good;
    batch_bind(&good, config.stream.shape, all + (size_t)i * bytes);
    Error err;
    if (pack_check(b, config.stream.shape, &err)) fail_msg("pack %d: %s", i, err.text);
    if (pack->silent == 0) assert_memory_equal(pack->block, good.dims, bytes);
    assert_int_equal(b->dims->n_text, good.dims->n_text);
    assert_int_equal(b->dims->n_image, good.dims->n_image);
    assert_true(b->dims->ce_scale == good.dims->ce_scale && b->dims->flow_scale == good.dims->flow_scale);
    assert_memory_equal(b->token, good.token, 256 * sizeof(int32_t));
    assert_memory_equal(b->position, good.position, 512 * sizeof(int32_t));
    for (int r = 0; r < 256; r++) assert_true(b->target[r] == good.target[r] || (pack->silent && b->target[r] == -1));
    int changed = 0;
    for (int g = 1; g < b->dims->n_segments; g++) {
      size_t at = (size_t)(b->seg_start[g] - b->dims->n_text) * VALUES, n = (size_t)b->seg_len[g] * VALUES;
      if (memcmp(b->patch + at, good.patch + at, n) == 0) continue;
      assert_int_equal(b->seg_kind[g], SEGMENT_CLEAN);
      changed++;
    }
    assert_true(changed >= pack->silent && (changed > 0) == (pack->silent > 0));
    silent += pack->silent;
    loader_release(loader, pack);
  }
  assert_true(silent > 0);
  assert_int_equal(loader_stats(loader).silent, silent);
  loader_close(loader);
  for (int i = 3; i < 9; i += 5) {
    snprintf(path, sizeof path, "%s/image%02d.png", d->folder, i);
    snprintf(kept, sizeof kept, "%s.kept", path);
    assert_int_equal(rename(kept, path), 0);
  }
  free(all);
}

static void test_bad_configs(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  Error err;
  config.world = 2;
  assert_null(loader_open(&config, NULL, &err));
  config = data_config(d);
  config.stream.shape.vocab = 301;
  assert_null(loader_open(&config, NULL, &err));
  assert_non_null(strstr(err.text, "300"));
  config = data_config(d);
  config.stream.held_out = 1;
  assert_null(loader_open(&config, NULL, &err));
  assert_non_null(strstr(err.text, "left for training"));
  // No captioned image fits: an error from loader_next, not an endless search.
  config = data_config(d);
  config.stream.shape.segments = 1;
  config.threads = 3;
  Loader *loader = open_loader(&config, NULL);
  Pack *pack;
  assert_true(loader_next(loader, &pack, &err) == -1);
  assert_non_null(strstr(err.text, "none of its samples fits"));
  loader_close(loader);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_threads_and_processes),
      cmocka_unit_test(test_restore),
      cmocka_unit_test(test_restore_midway),
      cmocka_unit_test(test_restore_elsewhere),
      cmocka_unit_test(test_bad_states),
      cmocka_unit_test(test_scales),
      cmocka_unit_test(test_epochs),
      cmocka_unit_test(test_permutation),
      cmocka_unit_test(test_long_texts),
      cmocka_unit_test(test_fill),
      cmocka_unit_test(test_pixels),
      cmocka_unit_test(test_failing_images),
      cmocka_unit_test(test_bad_configs),
  };
  return cmocka_run_group_tests(tests, data_make, data_remove);
}
