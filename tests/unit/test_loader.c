// The loader over real files: the same bytes for any number of threads and processes, exact restoring, pixels, and
// images that cannot be decoded.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/sample_patches.h"
#include "tests/unit/data_case.h"
#include "tests/unit/pack_check.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PACKS = 72, BEYOND = 24 }; // a window of documents is less than BEYOND packs

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

// Stands in for the other processes of a run: what all packs of a step count, from the reference's.
typedef struct Others {
  uint8_t *all; // [PACKS, bytes]
  size_t bytes;
  BatchShape shape;
  int packs_per_step, step; // of the next sum
} Others;

static int64_t count_noised(const Batch *b) {
  int64_t noised = 0;
  for (int g = 1; g < b->dims->n_segments; g++) noised += b->seg_kind[g] == SEGMENT_NOISED ? b->seg_len[g] : 0;
  return noised;
}

static void sum_others(void *context, int64_t *value, int n) {
  Others *others = context;
  int64_t total[2] = {0}; // of the other numbers these images, which can all be decoded, have no use
  assert_true(n > 2);
  for (int i = others->step * others->packs_per_step; i < (others->step + 1) * others->packs_per_step && i < PACKS;
       i++) {
    Batch b;
    batch_bind(&b, others->shape, others->all + (size_t)i * others->bytes);
    total[0] += b.dims->n_target;
    total[1] += count_noised(&b);
  }
  for (int i = 0; i < 2; i++) {
    assert_in_range(value[i], 0, total[i]);
    value[i] = total[i];
  }
  others->step++;
}

static void test_threads_and_processes(void **state) {
  LoaderConfig config = data_config(*state);
  config.packs_per_step = 6;
  size_t bytes;
  uint8_t *all = reference_packs(&config, &bytes);
  Others others = {all, bytes, config.stream.shape, 6, 0};
  config.sum = sum_others;
  config.sum_context = &others;
  assert_memory_not_equal(all, all + bytes, bytes);
  for (int threads = 1; threads <= 4; threads *= 2)
    for (int world = 1; world <= 3; world++)
      for (int rank = 0; rank < world; rank++) {
        config.threads = threads;
        config.world = world;
        config.rank = rank;
        config.cache_mb = threads == 2 ? 0 : 1;
        others.step = 0;
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
  Others others = {all, bytes, config.stream.shape, 9, 0};
  config.sum = sum_others;
  config.sum_context = &others;
  config.world = 3;
  config.rank = 2;
  config.threads = 2;
  for (int stop = 1; stop < 6; stop++) { // packs of this process, three a step
    others.step = 0;
    Loader *loader = open_loader(&config, NULL);
    for (int i = 0; i < stop; i++) loader_release(loader, next_pack(loader));
    char *saved = loader_state(loader);
    loader_close(loader);
    others.step = stop / 3; // a step that was begun is counted again
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
  Others others = {all, bytes, config.stream.shape, 3, 0};
  config.sum = sum_others;
  config.sum_context = &others;
  config.world = 3;
  char *saved[3];
  for (int rank = 0; rank < 3; rank++) {
    config.rank = rank;
    others.step = 0;
    Loader *loader = open_loader(&config, NULL);
    for (int i = 0; i < 4; i++) loader_release(loader, next_pack(loader));
    saved[rank] = loader_state(loader);
    loader_close(loader);
  }
  assert_string_equal(saved[0], saved[1]);
  assert_string_equal(saved[0], saved[2]);
  config.world = config.packs_per_step = others.packs_per_step = 2;
  config.rank = 1;
  others.step = 6;
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
  char *end = strstr(saved, ",\"bad\":[]}"), copy[8000];
  assert_true(end && end[strlen(",\"bad\":[]}")] == 0 && n < sizeof copy - 40);
  const char *const lists[][2] = {{"", NULL}, // as older versions wrote it
                                  {",\"bad\":[[2,1],[0,0]]", NULL},
                                  {",\"bad\":3", "the data state is not one"},
                                  {",\"bad\":[[0]]", "the data state is not one"},
                                  {",\"bad\":[[0,-1]]", "the data state is not one"},
                                  {",\"bad\":[[0,0],[99,0]]", "the data state is not one"},
                                  {",\"bad\":[[0,4000]]", "not what it was"},
                                  {",\"bad\":[[3,0]]", "not what it was"}};
  for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
    snprintf(copy, sizeof copy, "%.*s%s}", (int)(end - saved), saved, lists[i][0]);
    loader = loader_open(&config, copy, &err);
    assert_int_equal(loader == NULL, lists[i][1] != NULL);
    if (!loader) assert_non_null(strstr(err.text, lists[i][1]));
    loader_close(loader);
  }
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
  config.held = 3;
  config.threads = 2;
  Loader *loader = open_loader(&config, NULL);
  for (int step = 0; step < 8; step++) {
    int64_t targets = 0, noised = 0;
    Pack *pack[3];
    for (int i = 0; i < 3; i++) {
      pack[i] = next_pack(loader);
      const Batch *b = &pack[i]->batch;
      targets += b->dims->n_target;
      noised += count_noised(b);
      assert_int_equal(pack[i]->noised, count_noised(b));
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

static void image_mirror(Image *image) {
  for (int y = 0; y < image->height; y++)
    for (int a = 0, b = image->width - 1; a < b; a++, b--) {
      uint8_t *row = image->rgb + 3 * (size_t)y * (size_t)image->width, pixel[3];
      memcpy(pixel, row + 3 * a, 3);
      memcpy(row + 3 * a, row + 3 * b, 3);
      memcpy(row + 3 * b, pixel, 3);
    }
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
      const SamplePart *segment = &draft->sample->part[1];
      assert_true(pack->batch.seg_doc[g] == draft->document.draw);
      uint8_t *bytes, plain[24 * VALUES], flipped[24 * VALUES];
      size_t size;
      Image image, fitted;
      assert_int_equal(sample_patches(d->source[0], segment, &config.stream.fit, 1 << 20, false, plain, &err), 0);
      assert_int_equal(source_read_image(d->source[0], segment->image, &bytes, &size, &err), 0);
      assert_int_equal(image_decode(bytes, size, 1 << 20, &image, &err), 0);
      assert_int_equal(image_fit(&image, &config.stream.fit, &fitted, &err), 0);
      image_mirror(&fitted);
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

enum { BROKEN = 2 };
static const int broken[BROKEN] = {3, 8};

static void images_break(const Data *d) {
  char path[256], kept[264];
  for (int i = 0; i < BROKEN; i++) {
    snprintf(path, sizeof path, "%s/image%02d.png", d->folder, broken[i]);
    snprintf(kept, sizeof kept, "%s.kept", path);
    assert_int_equal(rename(path, kept), 0);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs("not an image any more", f);
    fclose(f);
  }
}

static void images_mend(const Data *d) {
  char path[256], kept[264];
  for (int i = 0; i < BROKEN; i++) {
    snprintf(path, sizeof path, "%s/image%02d.png", d->folder, broken[i]);
    snprintf(kept, sizeof kept, "%s.kept", path);
    assert_int_equal(rename(kept, path), 0);
  }
}

// Whether an image of the document is one of the broken ones.
static bool draft_is_broken(const Data *d, const Draft *draft) {
  for (int i = 0; i < draft->document.parts; i++) {
    const Part *part = &draft->document.part[i];
    if (part->kind != PART_IMAGE) continue;
    char *name = source_image_name(d->source[draft->origin.source], draft->sample->part[part->tag].image), end[32];
    bool bad = false;
    for (int j = 0; j < BROKEN; j++) {
      snprintf(end, sizeof end, "image%02d.png", broken[j]);
      bad = bad || strstr(name, end);
    }
    free(name);
    if (bad) return true;
  }
  return false;
}

// The documents of the first packs with the pixels of all images.
static Stream *draft_packs(const Data *d, const LoaderConfig *config, DraftList *list) {
  Error err;
  Stream *stream = stream_open(&config->stream, &err);
  assert_non_null(stream);
  for (int n = 0; n < PACKS; n++) {
    assert_int_equal(stream_pack(stream, &list[n], &err), 0);
    for (int i = 0; i < list[n].count; i++) {
      Draft *draft = list[n].draft[i];
      for (int j = 0; j < draft->document.parts; j++) {
        Part *part = &draft->document.part[j];
        if (part->kind != PART_IMAGE) continue;
        uint8_t *patches = malloc((size_t)part->tokens * VALUES);
        const SamplePart *segment = &draft->sample->part[part->tag];
        assert_int_equal(sample_patches(d->source[draft->origin.source], segment, &config->stream.fit,
                                        config->stream.max_pixels, false, patches, &err),
                         0);
        part->patch = patches;
      }
    }
  }
  return stream;
}

// Images damaged after the index was read: the packs are those of the other documents alone, byte for byte, with losses
// that are means over what is there, and no document is in another pack than before.
static void test_failing_images(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  config.flip = false;
  BatchShape shape = config.stream.shape;
  DraftList list[PACKS] = {0};
  Stream *stream = draft_packs(d, &config, list);
  images_break(d);
  for (config.threads = 1; config.threads <= 3; config.threads++) {
    Loader *loader = open_loader(&config, NULL);
    int lost = 0, partly = 0;
    for (int first = 0; first < PACKS; first += 3) {
      Batch expected[3];
      void *block[3];
      int64_t targets = 0, noised = 0;
      int missing[3] = {0}, step_lost = 0;
      Error err;
      for (int i = 0; i < 3; i++) {
        const Document *docs[64];
        int n = 0;
        for (int j = 0; j < list[first + i].count; j++) {
          const Draft *draft = list[first + i].draft[j];
          if (draft_is_broken(d, draft)) {
            missing[i]++;
            continue;
          }
          assert_true(n < 64);
          docs[n++] = &draft->document;
          targets += draft->size.targets;
          noised += draft->size.noised;
        }
        size_t bytes = batch_bind(&expected[i], shape, NULL);
        block[i] = aligned_alloc(64, bytes);
        memset(block[i], 0, bytes);
        batch_bind(&expected[i], shape, block[i]);
        assert_int_equal(pack_layout(docs, n, shape, &expected[i], &err), 0);
        step_lost += missing[i];
      }
      for (int i = 0; i < 3; i++) {
        Pack *pack = next_pack(loader);
        pack_scale(&expected[i], shape, 0.5, targets, noised, 3, 11);
        assert_int_equal(pack->number, first + i);
        assert_int_equal(pack->lost, missing[i]);
        assert_int_equal(pack->documents + pack->lost, list[first + i].count);
        assert_memory_equal(pack->block, block[i], pack->bytes);
        if (pack_check(&pack->batch, shape, &err)) fail_msg("pack %d: %s", first + i, err.text);
        partly += step_lost > 0 && missing[i] == 0; // a whole pack whose scales know what another one lost
        loader_release(loader, pack);
        free(block[i]);
      }
      lost += step_lost;
    }
    assert_true(lost > 10 && partly > 3);
    assert_int_equal(loader_stats(loader).lost, lost);
    loader_close(loader);
  }
  images_mend(d);
  for (int n = 0; n < PACKS; n++) {
    for (int i = 0; i < list[n].count; i++) {
      Document *doc = &list[n].draft[i]->document;
      for (int j = 0; j < doc->parts; j++) free((void *)(uintptr_t)doc->part[j].patch);
    }
    stream_recycle(stream, &list[n]);
    draft_list_free(&list[n]);
  }
  stream_close(stream);
}

// A loader's state after `packs` more packs.
static char *state_after(const LoaderConfig *config, const char *state, int packs) {
  Loader *loader = open_loader(config, state);
  for (int i = 0; i < packs; i++) loader_release(loader, next_pack(loader));
  char *saved = loader_state(loader);
  loader_close(loader);
  return saved;
}

// Images in the list of a state.
static int count_bad(const char *state) {
  const char *list = strstr(state, "\"bad\":[");
  assert_non_null(list);
  int n = 0;
  for (const char *p = list + strlen("\"bad\":["); (p = strchr(p, '[')); p++) n++;
  return n;
}

// Images that cannot be decoded are counted once in a run, whatever the threads are ahead by, and over resumes.
static void test_bad_images_are_counted(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  config.max_bad = 10;
  images_break(d);
  char *straight = state_after(&config, NULL, PACKS);
  int bad = count_bad(straight);
  assert_in_range(bad, BROKEN, 2 * BROKEN); // the stories show some of the captioned images
  for (int threads = 1; threads <= 4; threads++) {
    config.threads = threads;
    char *half = state_after(&config, NULL, PACKS / 2), *whole = state_after(&config, half, PACKS / 2);
    assert_string_equal(whole, straight);
    free(half);
    free(whole);
  }
  config.max_bad = 0; // without a limit there is nothing to count
  char *unlimited = state_after(&config, NULL, PACKS);
  assert_int_equal(count_bad(unlimited), 0);
  free(unlimited);

  // One that is not in the list is one too many; those that are may be met again.
  config.max_bad = bad;
  free(state_after(&config, straight, PACKS));
  char *fewer = strdup(straight), *last = strrchr(fewer, '[');
  strcpy(last - 1, "]}"); // ,[source,image]]} of the last one
  assert_int_equal(count_bad(fewer), bad - 1);
  config.max_bad = bad - 1;
  Loader *loader = open_loader(&config, fewer);
  Error err = {0};
  Pack *pack;
  int packs = 0;
  while (packs < PACKS && loader_next(loader, &pack, &err) >= 0) {
    loader_release(loader, pack);
    packs++;
  }
  assert_true(packs < PACKS);
  assert_non_null(strstr(err.text, "images cannot be decoded, more than data.max_bad"));
  loader_close(loader);

  images_mend(d); // and those that were mended leave it
  config.max_bad = 10;
  char *mended = state_after(&config, straight, PACKS);
  assert_int_equal(count_bad(mended), 0);
  free(mended);
  free(fewer);
  free(straight);
}

static void test_bad_configs(void **state) {
  Data *d = *state;
  LoaderConfig config = data_config(d);
  Error err;
  config.world = 2;
  assert_null(loader_open(&config, NULL, &err));
  config.world = 3; // which have to count together
  assert_null(loader_open(&config, NULL, &err));
  assert_non_null(strstr(err.text, "cannot sum"));
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
      cmocka_unit_test(test_pixels),
      cmocka_unit_test(test_failing_images),
      cmocka_unit_test(test_bad_images_are_counted),
      cmocka_unit_test(test_bad_configs),
  };
  return cmocka_run_group_tests(tests, data_make, data_remove);
}
