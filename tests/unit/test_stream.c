// The stream of documents over real files: epochs, the split, long texts and captions, how full the packs are.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "tests/unit/data_case.h"
#include "tests/unit/pack_check.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
  int64_t held_count = stream_held_out(d->source, 3, 0.1, &held);
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
      const SamplePart *text = &draft->sample->part[0];
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

// A document and where it comes from, copied; no parts: there is none.
typedef struct Made {
  Origin origin;
  DocumentSize size;
  int parts, tokens; // without padding
  int32_t token[256];
  float time;
} Made;

static void keep_document(const Draft *draft, Made *made) {
  const Document *d = &draft->document;
  *made = (Made){draft->origin, draft->size, d->parts, d->tokens - d->padding, {0}, 0};
  assert_true(made->tokens <= 256);
  memcpy(made->token, d->token, (size_t)made->tokens * sizeof *made->token);
  for (int i = 0; i < d->parts; i++) made->time += d->part[i].kind == PART_IMAGE ? d->part[i].time : 0;
  // Padding behind an image is a part of its own.
  if (d->padding && d->part[d->parts - 1].tokens == d->padding) made->parts--;
}

// Padded packs hold the documents of the varlen ones, in the order they are made, as many as fit.
static void test_padded(void **state) {
  LoaderConfig config = data_config(*state);
  config.stream.max_text = 200;
  enum { ALL = 1200 };
  static Made varlen[ALL], padded[ALL];
  Error err;
  DraftList list = {0};
  memset(varlen, 0, sizeof varlen);
  memset(padded, 0, sizeof padded);
  Stream *stream = stream_open(&config.stream, &err);
  assert_non_null(stream);
  StreamState now = {0};
  while (now.draw < ALL) {
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    for (int i = 0; i < list.count; i++) {
      assert_int_equal(list.draft[i]->document.padding, 0);
      if (list.draft[i]->document.draw < ALL) keep_document(list.draft[i], &varlen[list.draft[i]->document.draw]);
    }
    stream_recycle(stream, &list);
    stream_save(stream, &now);
  }
  stream_close(stream);

  config.stream.packing = PACKING_PADDED;
  stream = stream_open(&config.stream, &err);
  assert_non_null(stream);
  uint64_t draw = 0;
  int64_t real = 0, slots = 0, by_text = 0;
  while (draw < ALL) {
    DocumentSize sum = {0};
    int longest = 0, least = INT32_MAX;
    assert_int_equal(stream_pack(stream, &list, &err), 0);
    assert_true(list.count > 0);
    for (int i = 0; i < list.count; i++) {
      const Draft *draft = list.draft[i];
      DocumentSize size = document_size(&draft->document, VOCAB);
      assert_int_equal(draft->document.draw, draw); // strictly in order
      if (draw < ALL) keep_document(draft, &padded[draw]);
      draw++;
      assert_int_equal(size.slots, draft->size.slots + draft->document.padding);
      assert_int_equal(size.targets, draft->size.targets);
      assert_int_equal(size.noised, draft->size.noised);
      assert_true(i == 0 || size.slots == longest); // all are of one length
      longest = size.slots;
      if (draft->document.padding < least) least = draft->document.padding;
      sum.slots += size.slots;
      sum.text += size.text;
      sum.images += size.images;
      real += draft->size.slots;
    }
    assert_int_equal(least, 0); // that of the longest
    assert_true(sum.slots <= 256 && sum.text <= 200 && sum.images <= 32);
    slots += sum.slots;
    // The next document did not fit.
    stream_save(stream, &now);
    int count = list.count;
    stream_recycle(stream, &list);
    Stream *ahead = stream_open(&config.stream, &err);
    assert_non_null(ahead);
    assert_int_equal(stream_restore(ahead, &now, &err), 0);
    assert_int_equal(stream_pack(ahead, &list, &err), 0);
    DocumentSize next = list.draft[0]->size;
    int length = next.slots > longest ? next.slots : longest;
    int text = sum.text + next.text + (length - longest) * count + length - next.slots;
    assert_true((count + 1) * length > 256 || text > 200 || sum.images + next.images > 32);
    by_text += (count + 1) * length <= 256;
    stream_recycle(ahead, &list);
    draft_list_free(&list);
    stream_close(ahead);
  }
  print_message("padded: %.1f%% of the tokens in 256 slots are padding\n", 100 * (1 - (double)real / (double)slots));
  assert_true(real < slots && by_text > 0);
  int compared = 0;
  for (int i = 0; i < ALL; i++) {
    if (!varlen[i].parts) continue; // still waited when the stream ended
    compared++;
    assert_memory_equal(&varlen[i], &padded[i], sizeof varlen[i]);
  }
  assert_true(compared > ALL - 200);
  draft_list_free(&list);
  stream_close(stream);
}

// Padded micro-batches: sound, the losses' scales those of the documents, padding counted apart; restored to the byte.
static void test_padded_loader(void **state) {
  LoaderConfig config = data_config(*state);
  config.stream.packing = PACKING_PADDED;
  config.threads = 2;
  enum { PACKS = 30, MORE = 9 };
  Error err;
  uint8_t *all = NULL;
  size_t bytes = 0;
  int64_t used = 0, targets = 0, noised = 0;
  Loader *loader = open_loader(&config, NULL);
  for (int i = 0; i < PACKS + MORE; i++) {
    Pack *pack = next_pack(loader);
    const Batch *b = &pack->batch;
    const BatchDims *dims = b->dims;
    if (pack_check(b, config.stream.shape, &err)) fail_msg("pack %d: %s", i, err.text);
    if (!all) all = malloc((PACKS + MORE) * (bytes = pack->bytes));
    memcpy(all + (size_t)i * bytes, pack->block, bytes);

    int rows = dims->n_text + dims->n_image, length = rows / pack->documents, padding = 0;
    double pairs = 0;
    assert_int_equal(rows, length * pack->documents);
    for (int first = 0; first < rows; first += length) {
      assert_int_equal(b->doc_start[first + length - 1], first);
      // No document ends in eoi, so those at the end are padding.
      for (int q = first + length - 1; b->token[b->row[q]] == VOCAB - 1; q--, padding++)
        for (int k = first; k <= q; k++) pairs += q < b->q_end[k];
    }
    assert_int_equal(pack->padding, padding);
    assert_true(pack->padding_pairs == pairs);
    used += rows - padding;
    targets += dims->n_target;
    for (int g = 1; g < dims->n_segments; g++) noised += b->seg_kind[g] == SEGMENT_NOISED ? b->seg_len[g] : 0;
    if (i % 3 == 2) {
      assert_true(dims->ce_scale == (float)(0.5 / (double)targets)); // of the whole step
      assert_true(dims->flow_scale == (float)(1.0 / ((double)max_i64(noised, 1) * VALUES)));
      targets = noised = 0;
    }
    loader_release(loader, pack);
    LoaderStats stats = loader_stats(loader);
    assert_int_equal(stats.slots_used, used);
  }
  loader_close(loader);
  for (int stop = 0; stop < PACKS; stop++) {
    config.threads = 1 + stop % 3;
    loader = open_loader(&config, NULL);
    for (int i = 0; i < stop; i++) loader_release(loader, next_pack(loader));
    char *saved = loader_state(loader);
    loader_close(loader);
    loader = open_loader(&config, saved);
    for (int i = stop; i < stop + MORE; i++) {
      Pack *pack = next_pack(loader);
      assert_memory_equal(pack->block, all + (size_t)i * bytes, bytes);
      loader_release(loader, pack);
    }
    loader_close(loader);
    free(saved);
  }
  free(all);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_epochs), cmocka_unit_test(test_permutation), cmocka_unit_test(test_long_texts),
      cmocka_unit_test(test_fill),   cmocka_unit_test(test_padded),      cmocka_unit_test(test_padded_loader),
  };
  return cmocka_run_group_tests(tests, data_make, data_remove);
}
