// Documents and packs: the kinds of documents by hand, random packs against brute force, the choice of documents.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/flow_time.h"
#include "data/packer.h"
#include "tests/unit/pack_check.h"

#include <stdlib.h>
#include <string.h>

enum { VOCAB = 300, BOS = VOCAB - 4, EOS = VOCAB - 3, BOI = VOCAB - 2, EOI = VOCAB - 1, VALUES = 12 };

static const FlowTimes times = {.mean = -0.8, .std = 0.8};

typedef struct Random {
  uint64_t seed, n;
} Random;

static int random_below(Random *r, int n) {
  return (int)(philox4(r->seed, r->n++, 99, 0).v[0] % (uint32_t)n);
}

typedef struct Block {
  Batch batch;
  void *memory;
  size_t bytes;
} Block;

static Block block_new(BatchShape shape, int junk) {
  Block block;
  block.bytes = batch_bind(&block.batch, shape, NULL);
  if (posix_memalign(&block.memory, 64, block.bytes)) abort();
  memset(block.memory, junk, block.bytes);
  batch_bind(&block.batch, shape, block.memory);
  return block;
}

// A document of a random kind with pixels; *pixels is to be freed.
static void random_document(Random *r, Document *d, uint64_t draw, uint8_t **pixels) {
  int32_t ids[40];
  Piece piece[6];
  int n = 1 + random_below(r, 12), kind = random_below(r, 8), pieces = 1 + random_below(r, 6);
  for (int i = 0; i < 40; i++) ids[i] = random_below(r, random_below(r, 2) ? 5 : VOCAB - 4);
  ImageGrid grid = {1 + random_below(r, 4), 1 + random_below(r, 4)};
  float time = flow_time_draw(&times, 3, draw, 0);
  for (int i = 0; i < pieces; i++) {
    int at = random_below(r, 30);
    piece[i] = (Piece){.grid = {1 + random_below(r, 3), 1 + random_below(r, 3)}, .tag = i};
    if (random_below(r, 2)) piece[i] = (Piece){.ids = ids + at, .n = 1 + random_below(r, 10)};
  }
  if (kind == 0) document_text(d, draw, VOCAB, ids, n, true);
  if (kind == 1) document_caption_to_image(d, draw, VOCAB, ids, n, grid, time);
  if (kind == 2) document_caption_to_image(d, draw, VOCAB, ids, 0, grid, time);
  if (kind == 3) document_image_to_caption(d, draw, VOCAB, ids, n, grid);
  if (kind == 4) document_interleaved(d, draw, VOCAB, piece, pieces, random_below(r, 2), time);
  if (kind == 5) { // one token
    document_reset(d, draw);
    document_add_text(d, ids, 1);
  }
  if (kind == 6) { // an image alone
    document_reset(d, draw);
    document_add_image(d, grid, random_below(r, 2), time);
  }
  if (kind == 7) { // several noised images, each with its caption
    document_reset(d, draw);
    int32_t special[3] = {BOS, BOI, EOI};
    document_add_text(d, special, 1);
    for (int i = 0; i < 3; i++) {
      document_add_text(d, ids + i, random_below(r, 4));
      document_add_text(d, special + 1, 1);
      document_add_image(d, grid, SEGMENT_NOISED, flow_time_draw(&times, 3, draw, i));
      document_add_text(d, special + 2, random_below(r, 2));
    }
  }
  if (random_below(r, 10) == 0)
    for (int i = 0; i < d->parts; i++) d->silent = d->silent || d->part[i].kind == PART_IMAGE;
  DocumentSize size = document_size(d, VOCAB);
  int image = size.slots - size.text;
  uint8_t *at = *pixels = malloc((size_t)(image ? image : 1) * VALUES);
  for (int i = 0; i < image * VALUES; i++) at[i] = (uint8_t)random_below(r, 256);
  for (int i = 0; i < d->parts; i++) {
    if (d->part[i].kind != PART_IMAGE) continue;
    d->part[i].patch = at;
    at += d->part[i].tokens * VALUES;
  }
}

// The mask, targets, positions and pixels of a pack from its documents, slot by slot.
static void compare_with_documents(const Document *const *docs, int n, BatchShape shape, const Batch *b) {
  int T = shape.slots, q = 0;
  int *doc = malloc((size_t)T * sizeof(int)), *part = malloc((size_t)T * sizeof(int));
  for (int i = 0; i < T; i++) doc[i] = -1;
  for (int d = 0; d < n; d++) {
    bool clean = false;
    int place = 0, text = 0;
    for (int p = 0; p < docs[d]->parts; p++) {
      const Part *at = &docs[d]->part[p];
      bool noised = at->kind == PART_IMAGE && at->seg_kind == SEGMENT_NOISED && !docs[d]->silent;
      if (at->copy) {
        const Part *before = at - 1;
        place -= before->rows > before->columns ? before->rows : before->columns;
      }
      for (int i = 0; i < at->tokens; i++, q++) {
        int r = b->row[q], g = b->segment[r];
        doc[q] = d;
        part[q] = p;
        if (at->kind == PART_TEXT) {
          int32_t id = docs[d]->token[text++];
          int32_t next = i + 1 < at->tokens ? docs[d]->token[text] : -1;
          if (id == BOI || next == EOI || docs[d]->silent) next = -1;
          assert_int_equal(b->token[r], id);
          assert_int_equal(b->target[r], next);
          assert_int_equal(b->target_kind[r], next >= 0 && clean ? TARGET_CAPTION : TARGET_TEXT);
          assert_int_equal(b->position[2 * q], place + i);
          assert_int_equal(b->position[2 * q + 1], place + i);
          continue;
        }
        assert_int_equal(b->position[2 * q], place + i / at->columns);
        assert_int_equal(b->position[2 * q + 1], place + i % at->columns);
        assert_int_equal(b->seg_kind[g], noised ? SEGMENT_NOISED : SEGMENT_CLEAN);
        assert_true(b->seg_time[g] == (noised ? at->time : 1));
        assert_true(b->seg_doc[g] == docs[d]->draw);
        assert_memory_equal(b->patch + (r - b->dims->n_text) * VALUES, at->patch + i * VALUES, VALUES);
      }
      place += at->kind == PART_TEXT ? at->tokens : at->rows > at->columns ? at->rows : at->columns;
      clean = clean || (at->kind == PART_IMAGE && !noised);
    }
  }
  assert_int_equal(q, b->dims->n_text + b->dims->n_image);
  for (q = 0; q < T; q++)
    for (int k = 0; k < T; k++) {
      bool allowed = doc[q] >= 0 && doc[q] == doc[k];
      if (allowed) {
        const Part *from = &docs[doc[k]]->part[part[k]];
        bool same = part[q] == part[k] && from->kind == PART_IMAGE;
        bool hidden = from->kind == PART_IMAGE && from->seg_kind == SEGMENT_NOISED && !docs[doc[k]]->silent;
        allowed = same || (k <= q && !hidden);
      }
      bool by_query = k >= b->doc_start[q] && k < b->kv_end[q] && q < b->q_end[k];
      bool by_key = q >= b->q_start[k] && q < b->q_end[k] && k >= b->doc_start[q];
      if (by_query != allowed || by_key != allowed) fail_msg("query %d key %d", q, k);
    }
  free(doc);
  free(part);
}

static void test_random_packs(void **state) {
  (void)state;
  Random r = {.seed = 1};
  Error err = {0};
  for (int trial = 0; trial < 500; trial++) {
    Document document[40] = {0};
    const Document *docs[40];
    uint8_t *pixels[40];
    int n = random_below(&r, 16), slots = 0, images = 0, targets = 0;
    for (int i = 0; i < n; i++) {
      random_document(&r, &document[i], (uint64_t)(trial * 100 + i), &pixels[i]);
      docs[i] = &document[i];
      DocumentSize size = document_size(docs[i], VOCAB);
      slots += size.slots;
      images += size.images;
      if (!docs[i]->silent) targets += size.targets;
    }
    BatchShape shape = {slots + random_below(&r, 3) * 7 + 1, images + 1 + random_below(&r, 3), VALUES, VOCAB};
    Block block = block_new(shape, trial & 255);
    assert_int_equal(pack_layout(docs, n, shape, &block.batch, &err), 0);
    if (pack_check(&block.batch, shape, &err)) fail_msg("trial %d: %s", trial, err.text);
    assert_int_equal(block.batch.dims->n_target, targets);
    assert_int_equal(block.batch.dims->n_segments, images + 1);
    compare_with_documents(docs, n, shape, &block.batch);
    free(block.memory);
    for (int i = 0; i < n; i++) {
      document_free(&document[i]);
      free(pixels[i]);
    }
  }
}

// Padding adds text without targets that nothing before it sees; what the documents ask of the model stays.
static void test_padded_packs(void **state) {
  (void)state;
  Random r = {.seed = 6};
  Error err = {0};
  for (int trial = 0; trial < 200; trial++) {
    enum { N = 6 };
    Document document[N] = {0};
    const Document *docs[N];
    uint8_t *pixels[N];
    DocumentSize size[N];
    int longest = 0, used = 0, images = 0, padding = 0;
    for (int i = 0; i < N; i++) {
      random_document(&r, &document[i], (uint64_t)(trial * 100 + i), &pixels[i]);
      docs[i] = &document[i];
      size[i] = document_size(docs[i], VOCAB);
      used += size[i].slots;
      images += size[i].images;
      if (size[i].slots > longest) longest = size[i].slots;
      assert_int_equal(document_padding_pairs(docs[i]), 0);
    }
    BatchShape shape = {N * longest + 5, images + 1, VALUES, VOCAB};
    Block plain = block_new(shape, 0), padded = block_new(shape, 255);
    const Batch *a = &plain.batch, *b = &padded.batch;
    assert_int_equal(pack_layout(docs, N, shape, &plain.batch, &err), 0);
    int64_t pairs = batch_pairs(a);
    for (int i = 0; i < N; i++) {
      document_pad(&document[i], longest, VOCAB);
      DocumentSize now = document_size(docs[i], VOCAB);
      assert_int_equal(docs[i]->padding, longest - size[i].slots);
      assert_int_equal(now.slots, longest);
      assert_int_equal(now.text, size[i].text + docs[i]->padding);
      assert_int_equal(now.targets, size[i].targets);
      assert_int_equal(now.noised, size[i].noised);
      padding += docs[i]->padding;
      pairs += document_padding_pairs(docs[i]);
    }
    assert_int_equal(pack_layout(docs, N, shape, &padded.batch, &err), 0);
    if (pack_check(b, shape, &err)) fail_msg("trial %d: %s", trial, err.text);
    compare_with_documents(docs, N, shape, b);
    assert_int_equal(batch_pairs(b), pairs);
    assert_int_equal(used + padding, N * longest);
    assert_int_equal(b->dims->n_image, a->dims->n_image);
    assert_int_equal(b->dims->n_text, a->dims->n_text + padding);
    assert_int_equal(b->dims->n_target, a->dims->n_target);
    for (int i = 0, p = 0, q = 0; i < N; i++, q += document[i - 1].padding) // slot p of one is slot q of the other
      for (int end = p + size[i].slots; p < end; p++, q++) {
        int x = a->row[p], y = b->row[q];
        assert_int_equal(b->token[y], a->token[x]);
        assert_int_equal(b->target[y], a->target[x]);
        assert_int_equal(b->target_kind[y], a->target_kind[x]);
        assert_int_equal(b->segment[y], a->segment[x]);
        assert_int_equal(b->pool_segment[y], a->pool_segment[x]);
        assert_memory_equal(b->position + 2 * q, a->position + 2 * p, 2 * sizeof *b->position);
        assert_int_equal(b->kv_end[q] - q, a->kv_end[p] - p);
        assert_int_equal(b->doc_start[q] - q, a->doc_start[p] - p);
      }
    free(plain.memory);
    free(padded.memory);
    for (int i = 0; i < N; i++) {
      document_reset(&document[i], 0);
      assert_int_equal(document[i].padding, 0);
      document_free(&document[i]);
      free(pixels[i]);
    }
  }
}

// One wrong entry anywhere is found.
static void test_check_finds_faults(void **state) {
  (void)state;
  Random r = {.seed = 2};
  Error err;
  BatchShape shape = {400, 60, VALUES, VOCAB};
  for (int trial = 0; trial < 40; trial++) {
    Document document[8] = {0};
    const Document *docs[8];
    uint8_t *pixels[8];
    for (int i = 0; i < 8; i++) {
      random_document(&r, &document[i], (uint64_t)i, &pixels[i]);
      document[i].silent = false;
      docs[i] = &document[i];
    }
    Block block = block_new(shape, 0);
    Batch *b = &block.batch;
    assert_int_equal(pack_layout(docs, 8, shape, b, &err), 0);
    int T = shape.slots, G = shape.segments;
    struct {
      int32_t *array;
      int count;
    } place[] = {
        {b->row, T},          {b->seq, T},      {b->token, T},        {b->target, T},        {b->target_kind, T},
        {b->target_row, T},   {b->segment, T},  {b->position, 2 * T}, {b->doc_start, T},     {b->kv_end, T},
        {b->q_start, T},      {b->q_end, T},    {b->id, T},           {b->id_start, T + 1},  {b->id_row, T},
        {b->pool_segment, T}, {b->seg_kind, G}, {b->seg_start, G},    {b->seg_len, G},       {b->seg_ordinal, G},
        {b->cap_start, G},    {b->cap_end, G},  {b->tile, 2 * T},     {&b->dims->n_text, 4}, {&b->dims->n_ids, 2}};
    for (size_t i = 0; i < sizeof place / sizeof *place; i++) {
      // Entry 0 of seg_kind, seg_ordinal, cap_start and cap_end stands for text and says nothing.
      bool table = place[i].count == G && place[i].array != b->seg_start && place[i].array != b->seg_len;
      int at = random_below(&r, place[i].count);
      if (table && at == 0) at = 1;
      int32_t old = place[i].array[at];
      place[i].array[at] += random_below(&r, 2) ? 1 : -1;
      // A caption that stays empty is as right somewhere else.
      int g = place[i].array == b->cap_start || place[i].array == b->cap_end ? at : 0;
      if (pack_check(b, shape, &err) == 0 && !(g && b->cap_start[g] == b->cap_end[g]))
        fail_msg("trial %d: entry %d of array %zu, %d -> %d, was not found", trial, at, i, old, place[i].array[at]);
      place[i].array[at] = old;
    }
    assert_int_equal(pack_check(b, shape, &err), 0);
    free(block.memory);
    for (int i = 0; i < 8; i++) {
      document_free(&document[i]);
      free(pixels[i]);
    }
  }
}

static void assert_rows(const int32_t *array, const int32_t *expected, int n) {
  for (int i = 0; i < n; i++)
    if (array[i] != expected[i]) fail_msg("entry %d is %d, not %d", i, array[i], expected[i]);
}

// [bos] 7 8 [boi] image [eoi] 9 [boi] noised clean [eoi] 10 [eos]
static void test_interleaved_by_hand(void **state) {
  (void)state;
  Document d = {0};
  const int32_t ids[] = {7, 8, 9, 10};
  const Piece piece[] = {{.ids = ids, .n = 2},
                         {.grid = {1, 2}, .tag = 1},
                         {.ids = ids + 2, .n = 1},
                         {.grid = {2, 1}, .tag = 3},
                         {.ids = ids + 3, .n = 1}};
  document_interleaved(&d, 5, VOCAB, piece, 5, true, 0.25f);
  BatchShape shape = {20, 6, VALUES, VOCAB};
  Block block = block_new(shape, 85);
  const Batch *b = &block.batch;
  const Document *docs[] = {&d};
  Error err;
  assert_int_equal(pack_layout(docs, 1, shape, &block.batch, &err), 0);
  assert_int_equal(pack_check(b, shape, &err), 0);
  assert_rows(b->token, (int32_t[]){BOS, 7, 8, BOI, EOI, 9, BOI, EOI, 10, EOS, -1, -1, -1, -1, -1, -1, -1}, 17);
  assert_rows(b->target, (int32_t[]){7, 8, BOI, -1, 9, BOI, -1, 10, EOS, -1, -1}, 11);
  assert_rows(b->target_kind, (int32_t[]){0, 0, 0, 0, 1, 1, 0, 1, 1, 0}, 10);
  assert_rows(b->target_row, (int32_t[]){0, 1, 2, 4, 5, 7, 8, 0}, 8);
  assert_rows(b->pool_segment, (int32_t[]){0, 0, 0, 0, 0, 2, 0, 0, 0, 0}, 10);
  assert_rows(b->seg_kind, (int32_t[]){0, 1, 0, 1}, 4);
  assert_rows(b->cap_start + 2, (int32_t[]){5, 0}, 2);
  assert_rows(b->cap_end + 2, (int32_t[]){6, 0}, 2);
  assert_true(b->seg_time[1] == 1 && b->seg_time[2] == 0.25f && b->seg_time[3] == 1);
  // Sequence: bos 7 8 boi | 2 clean | eoi 9 boi | 2 noised | 2 clean | eoi 10 eos
  assert_rows(b->position, (int32_t[]){0, 0, 1, 1,  2, 2, 3, 3,  4, 4,  4,  5,  6,  6,  7,  7, 8,
                                       8, 9, 9, 10, 9, 9, 9, 10, 9, 11, 11, 12, 12, 13, 13, 0, 0},
              34);
  assert_rows(b->q_end, (int32_t[]){16, 16, 16, 16, 16, 16, 16, 16, 16, 11, 11, 16, 16, 16, 16, 16, 16, 17}, 18);
  free(block.memory);

  document_interleaved(&d, 5, VOCAB, piece, 4, true, 0.25f); // nothing after the drawn image: it ends the document
  assert_int_equal(d.parts, 4);
  assert_int_equal(d.part[3].seg_kind, SEGMENT_NOISED);
  document_interleaved(&d, 5, VOCAB, piece, 4, false, 0.25f);
  assert_int_equal(d.token[d.tokens - 2], EOI);
  assert_int_equal(d.token[d.tokens - 1], EOS);
  document_free(&d);
}

static void test_captioned_by_hand(void **state) {
  (void)state;
  Document d[3] = {0};
  const Document *docs[] = {&d[0], &d[1], &d[2]};
  const int32_t ids[] = {4, 4};
  document_caption_to_image(&d[0], 1, VOCAB, ids, 2, (ImageGrid){1, 1}, 0.5f);
  document_caption_to_image(&d[1], 2, VOCAB, ids, 0, (ImageGrid){1, 1}, 0.5f);
  document_image_to_caption(&d[2], 3, VOCAB, ids, 2, (ImageGrid){1, 1});
  BatchShape shape = {16, 4, VALUES, VOCAB};
  Block block = block_new(shape, 255);
  const Batch *b = &block.batch;
  Error err;
  assert_int_equal(pack_layout(docs, 3, shape, &block.batch, &err), 0);
  assert_rows(b->token, (int32_t[]){BOS, 4, 4, BOI, BOS, BOI, BOS, BOI, EOI, 4, 4, EOS, -1, -1}, 14);
  assert_rows(b->target, (int32_t[]){4, 4, BOI, -1, BOI, -1, BOI, -1, 4, 4, EOS, -1, -1, -1}, 14);
  assert_rows(b->target_kind, (int32_t[]){0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0}, 12);
  assert_rows(b->cap_start, (int32_t[]){0, 1, 0, 0}, 4);
  assert_rows(b->cap_end, (int32_t[]){0, 3, 0, 0}, 4);
  assert_rows(b->id, (int32_t[]){4, BOS, EOS, BOI, EOI, 0}, 6);
  assert_rows(b->id_start, (int32_t[]){0, 4, 7, 8, 11, 12, 0}, 7);
  assert_rows(b->id_row, (int32_t[]){1, 2, 9, 10, 0, 4, 6, 11, 3, 5, 7, 8}, 12);
  d[2].silent = true;
  assert_int_equal(pack_layout(docs, 3, shape, &block.batch, &err), 0);
  assert_int_equal(b->dims->n_target, 4);
  pack_scale(&block.batch, shape, 2.0, 4, 0, 3, 0x123456789abcdefu);
  assert_true(b->dims->ce_scale == 0.5f && b->dims->flow_scale == (float)(1.0 / VALUES));
  assert_true(b->dims->router_scale == (float)(1.0 / 3));
  assert_true(b->dims->seed_lo == 0x89abcdefu && b->dims->seed_hi == 0x1234567u);
  free(block.memory);
  for (int i = 0; i < 3; i++) document_free(&d[i]);
}

// Documents of 1, 128, 300, 129 and 128 tokens: the longest first, equal ones as they lie, the last tile of each first.
static void test_tiles_by_hand(void **state) {
  (void)state;
  enum { N = 5 };
  const int length[N] = {1, BATCH_TILE, 300, BATCH_TILE + 1, BATCH_TILE};
  int32_t ids[300] = {0};
  Document d[N] = {0};
  const Document *docs[N];
  for (int i = 0; i < N; i++) {
    document_reset(&d[i], (uint64_t)i);
    document_add_text(&d[i], ids, length[i]);
    docs[i] = &d[i];
  }
  BatchShape shape = {700, 1, VALUES, VOCAB};
  Block block = block_new(shape, 255);
  Error err;
  assert_int_equal(pack_layout(docs, N, shape, &block.batch, &err), 0);
  assert_int_equal(block.batch.dims->n_tiles, 8);
  assert_rows(block.batch.tile,
              (int32_t[]){385, 429, 257, 429, 129, 429, 557, 558, 429, 558, 1, 129, 558, 686, 0, 1, 0, 0}, 18);
  if (pack_check(&block.batch, shape, &err)) fail_msg("%s", err.text);
  free(block.memory);
  for (int i = 0; i < N; i++) document_free(&d[i]);
}

static void test_layout_errors(void **state) {
  (void)state;
  Document d = {0};
  const Document *docs[] = {&d, &d};
  int32_t ids[] = {1, 2};
  Error err;
  document_caption_to_image(&d, 0, VOCAB, ids, 2, (ImageGrid){2, 2}, 0.5f); // 8 slots
  BatchShape shape = {16, 3, VALUES, VOCAB};
  Block block = block_new(shape, 0);
  assert_int_equal(pack_layout(docs, 2, shape, &block.batch, &err), 0);
  BatchShape slots = shape, segments = shape, vocab = shape;
  slots.slots = 15;
  segments.segments = 2;
  vocab.vocab = VOCAB - 2;
  assert_int_equal(pack_layout(docs, 2, slots, &block.batch, &err), -1);
  assert_non_null(strstr(err.text, "15 slots"));
  assert_int_equal(pack_layout(docs, 2, segments, &block.batch, &err), -1);
  assert_non_null(strstr(err.text, "2 images"));
  assert_int_equal(pack_layout(docs, 2, vocab, &block.batch, &err), -1);
  assert_non_null(strstr(err.text, "vocabulary"));
  free(block.memory);
  document_free(&d);
}

// What a document draws is its own, wherever and with whatever it is packed.
static void test_randomness_follows_documents(void **state) {
  (void)state;
  enum { N = 30 };
  Document d[N] = {0};
  const Document *docs[N];
  BatchShape shape = {400, N + 1, VALUES, VOCAB};
  Block block = block_new(shape, 0);
  Error err;
  for (int order = 0; order < 4; order++) {
    for (int i = 0; i < N; i++) {
      int j = (i * 7 + order * 11) % N;
      uint64_t draw = (uint64_t)j << 33 | 5;
      document_caption_to_image(&d[i], draw, VOCAB, (int32_t[]){1}, j % 2, (ImageGrid){1 + j % 3, 2},
                                flow_time_draw(&times, 9, draw, 0));
      docs[i] = &d[i];
    }
    assert_int_equal(pack_layout(docs, N - order, shape, &block.batch, &err), 0);
    for (int g = 1; g <= N - order; g++) {
      float normal[4];
      philox_normal4(9, block.batch.seg_doc[g], STREAM_TIME, 0, normal);
      assert_float_equal(block.batch.seg_time[g], 1 / (1 + exp(0.8 - 0.8 * (double)normal[0])), 1e-6);
      assert_int_equal(block.batch.seg_ordinal[g], 0);
    }
  }
  free(block.memory);
  for (int i = 0; i < N; i++) document_free(&d[i]);
}

static void test_choice_is_the_best(void **state) {
  (void)state;
  Random r = {.seed = 4};
  PackCell cell[301];
  for (int trial = 0; trial < 300; trial++) {
    DocumentSize size[10];
    int n = random_below(&r, 11), chosen[10], best = 0;
    bool limited = trial % 2;
    PackRoom room = {random_below(&r, 301), limited ? random_below(&r, 100) : 1000, limited ? 2 : 100};
    for (int i = 0; i < n; i++) {
      size[i] = (DocumentSize){.slots = 1 + random_below(&r, 90)};
      size[i].images = random_below(&r, 2);
      size[i].text = size[i].images ? size[i].slots / 2 : size[i].slots;
    }
    for (int set = 0; set < 1 << n; set++) {
      int sum = 0;
      for (int i = 0; i < n; i++) sum += set >> i & 1 ? size[i].slots : 0;
      if (sum <= room.slots && sum > best) best = sum;
    }
    int count = pack_choose(size, n, room, cell, chosen);
    DocumentSize sum = {0};
    for (int i = 0; i < count; i++) {
      assert_true(chosen[i] >= 0 && chosen[i] < n && (i == 0 || chosen[i] > chosen[i - 1]));
      sum.slots += size[chosen[i]].slots;
      sum.text += size[chosen[i]].text;
      sum.images += size[chosen[i]].images;
    }
    assert_true(pack_room_fits(room, sum));
    if (!limited) assert_int_equal(sum.slots, best);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_captioned_by_hand),  cmocka_unit_test(test_interleaved_by_hand),
      cmocka_unit_test(test_random_packs),       cmocka_unit_test(test_check_finds_faults),
      cmocka_unit_test(test_layout_errors),      cmocka_unit_test(test_randomness_follows_documents),
      cmocka_unit_test(test_choice_is_the_best), cmocka_unit_test(test_padded_packs),
      cmocka_unit_test(test_tiles_by_hand),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
