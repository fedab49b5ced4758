#include "data/stream.h"

#include "base/philox.h"

#include <stdlib.h>
#include <string.h>

// Documents [first, first + count) of the loaded sample's pieces.
typedef struct Cut {
  int first, count;
} Cut;

struct Stream {
  StreamConfig config;
  int64_t *sample[STREAM_SOURCES]; // training samples of each source
  int64_t samples[STREAM_SOURCES];
  int64_t unfit[STREAM_SOURCES]; // samples in a row of which nothing fits
  uint64_t draw;
  uint64_t drawn[STREAM_SOURCES];
  StreamStats stats;

  Draft *window[STREAM_WINDOW];
  int count;

  Origin loaded; // the sample below, and the next of its documents to make; source -1: none
  const Sample *loaded_sample;
  int32_t *ids; // tokens of all its texts
  size_t ids_capacity;
  Piece *piece; // its texts (cut to length) and images
  int pieces, piece_capacity;
  Cut *cut; // its documents
  int cuts, cut_capacity;

  PackCell *cell; // [slots + 1]
  DraftList spare;
};

// The round function of the permutation: `half` -> bits. Source and round share the stream's upper bits.
static uint32_t permute_round(uint64_t seed, uint64_t epoch, int source, int round, uint32_t half) {
  return philox4(seed, epoch, STREAM_SHUFFLE | (uint32_t)source << 8 | (uint32_t)round << 24, half).v[0];
}

int64_t stream_permute(uint64_t seed, uint64_t epoch, int source, int64_t n, int64_t i) {
  int bits = 1; // of each half
  while (bits < 31 && (int64_t)1 << (2 * bits) < n) bits++;
  uint32_t mask = (1u << bits) - 1;
  uint64_t value = (uint64_t)i;
  do {
    uint32_t left = (uint32_t)(value >> bits), right = (uint32_t)value & mask;
    for (int round = 0; round < 6; round++) {
      uint32_t next = left ^ (permute_round(seed, epoch, source, round, right) & mask);
      left = right;
      right = next;
    }
    value = (uint64_t)left << bits | right;
  } while (value >= (uint64_t)n);
  return (int64_t)value;
}

int64_t stream_held_out(Source *const *source, int sources, double held_out, HeldOut **list) {
  int64_t n = 0, capacity = 64;
  HeldOut *ordered = xmalloc((size_t)capacity * sizeof *ordered);
  for (int s = 0; s < sources; s++)
    for (int64_t i = 0; i < source_count(source[s]); i++) {
      if (!sample_is_held_out(source_sample(source[s], i)->group, held_out)) continue;
      if (n == capacity) ordered = xrealloc(ordered, (size_t)(capacity *= 2) * sizeof *ordered);
      ordered[n++] = (HeldOut){s, i};
    }
  // Mixed, so that the first few of them, which evaluation takes, are of all kinds.
  *list = xmalloc((size_t)max_i64(n, 1) * sizeof **list);
  for (int64_t i = 0; i < n; i++) (*list)[i] = ordered[stream_permute(0, 0, 0, n, i)];
  free(ordered);
  return n;
}

static int stream_list_samples(Stream *s, int source, Error *err) {
  const Source *from = s->config.source[source];
  int64_t n = source_count(from);
  s->sample[source] = xmalloc((size_t)max_i64(n, 1) * sizeof(int64_t));
  for (int64_t i = 0; i < n; i++) {
    if (sample_is_held_out(source_sample(from, i)->group, s->config.held_out)) continue;
    s->sample[source][s->samples[source]++] = i;
  }
  if (s->samples[source]) return 0;
  return error_set(err, "lower data.held_out, or add samples",
                   "source %d: none of its %lld samples is left for training", source + 1, (long long)n);
}

static int stream_check_config(const StreamConfig *c, Error *err) {
  if (c->sources < 1 || c->sources > STREAM_SOURCES)
    return error_set(err, NULL, "%d data sources; there can be 1 to %d", c->sources, STREAM_SOURCES);
  for (int i = 0; i < c->sources; i++)
    if (!(c->weight[i] > 0)) return error_set(err, NULL, "source %d: its weight must be above 0", i + 1);
  if (tokenizer_vocab(c->tokenizer) != c->shape.vocab)
    return error_set(err, "set model.vocab to the tokenizer's size", "the tokenizer has %d ids, the model %d",
                     tokenizer_vocab(c->tokenizer), c->shape.vocab);
  if (c->shape.patch != 3 * c->fit.patch * c->fit.patch)
    return error_set(err, NULL, "a patch of %d pixels does not have %d values", c->fit.patch, c->shape.patch);
  if (c->max_text < 4 || c->max_document < 3 || c->max_caption < 1 || c->shape.slots < 4 || c->shape.segments < 1)
    return error_set(err, NULL, "packs of %d slots, %d text rows, documents of %d tokens, captions of %d are too small",
                     c->shape.slots, c->max_text, c->max_document, c->max_caption);
  return 0;
}

Stream *stream_open(const StreamConfig *config, Error *err) {
  if (stream_check_config(config, err)) return NULL;
  Stream *s = xcalloc(1, sizeof *s);
  s->config = *config;
  s->loaded.source = -1;
  s->cell = xmalloc((size_t)(config->shape.slots + 1) * sizeof *s->cell);
  for (int i = 0; i < config->sources; i++)
    if (stream_list_samples(s, i, err)) {
      stream_close(s);
      return NULL;
    }
  return s;
}

void draft_list_free(DraftList *list) {
  free(list->draft);
  *list = (DraftList){0};
}

static void draft_list_add(DraftList *list, Draft *draft) {
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? 2 * list->capacity : 64;
    list->draft = xrealloc(list->draft, (size_t)list->capacity * sizeof *list->draft);
  }
  list->draft[list->count++] = draft;
}

void stream_recycle(Stream *s, DraftList *list) {
  while (list->count) draft_list_add(&s->spare, list->draft[--list->count]);
}

void stream_close(Stream *s) {
  if (!s) return;
  while (s->count) draft_list_add(&s->spare, s->window[--s->count]);
  for (int i = 0; i < s->spare.count; i++) {
    document_free(&s->spare.draft[i]->document);
    free(s->spare.draft[i]);
  }
  draft_list_free(&s->spare);
  for (int i = 0; i < s->config.sources; i++) free(s->sample[i]);
  free(s->ids);
  free(s->piece);
  free(s->cut);
  free(s->cell);
  free(s);
}

static void stream_add_piece(Stream *s, Piece piece) {
  if (s->pieces == s->piece_capacity) {
    s->piece_capacity = s->piece_capacity ? 2 * s->piece_capacity : 16;
    s->piece = xrealloc(s->piece, (size_t)s->piece_capacity * sizeof *s->piece);
  }
  s->piece[s->pieces++] = piece;
}

static void stream_add_cut(Stream *s, int first, int count) {
  if (count == 0) return;
  if (s->cuts == s->cut_capacity) {
    s->cut_capacity = s->cut_capacity ? 2 * s->cut_capacity : 16;
    s->cut = xrealloc(s->cut, (size_t)s->cut_capacity * sizeof *s->cut);
  }
  s->cut[s->cuts++] = (Cut){first, count};
}

static PackRoom stream_room(const Stream *s) {
  return (PackRoom){s->config.shape.slots, s->config.max_text, s->config.shape.segments - 1};
}

// Counted for samples drawn for the first time only; the first one is named.
static void stream_drop(Stream *s, const Sample *sample, bool fresh) {
  if (!fresh) return;
  if (s->stats.dropped++ == 0)
    log_warn("sample %s does not fit into a pack of %d slots, %d text rows and %d images; such samples are left out",
             sample->key, s->config.shape.slots, s->config.max_text, s->config.shape.segments - 1);
}

// What piece p takes of a pack inside an interleaved document, at most.
static DocumentSize piece_size(const Piece *p) {
  if (p->ids) return (DocumentSize){.slots = p->n, .text = p->n};
  int tokens = p->grid.rows * p->grid.columns;
  return (DocumentSize){.slots = tokens + 2, .text = 2, .images = 1};
}

// Cuts the pieces of an interleaved sample into documents: as many in a row as surely fit, whichever image is noised.
static void stream_cut_interleaved(Stream *s, bool fresh) {
  PackRoom whole = stream_room(s);
  whole.slots -= 2; // bos, eos
  whole.text -= 2;
  PackRoom room = whole;
  int first = 0, kept = 0, twice = 0; // `twice`: tokens of the largest image, which may appear twice
  for (int i = 0; i < s->pieces; i++) {
    Piece piece = s->piece[i];
    DocumentSize size = piece_size(&piece);
    int again = piece.ids ? 0 : size.slots - 2;
    DocumentSize doubled = size;
    doubled.slots += again;
    doubled.images += piece.ids ? 0 : 1;
    if (!pack_room_fits(whole, doubled)) {
      stream_drop(s, s->loaded_sample, fresh);
      continue;
    }
    int both = twice > again ? twice : again;
    PackRoom left = room;
    left.slots -= both;
    left.images -= both > 0;
    if (!pack_room_fits(left, size)) {
      stream_add_cut(s, first, kept - first);
      first = kept;
      room = whole;
      both = again;
    }
    room = pack_room_left(room, size);
    twice = both;
    s->piece[kept++] = piece;
  }
  stream_add_cut(s, first, kept - first);
}

// Appends the tokens of a text as pieces of at most `longest` tokens; returns where the next text's tokens go.
static int32_t *stream_add_text(Stream *s, const SamplePart *part, int64_t longest, int32_t *ids) {
  int64_t n = tokenizer_encode(s->config.tokenizer, part->text, part->text_bytes, ids);
  for (int64_t i = 0; i < n; i += longest)
    stream_add_piece(s, (Piece){.ids = ids + i, .n = (int)min_i64(longest, n - i)});
  return ids + n;
}

// Loads a sample: its tokens and image grids as pieces, its documents as cuts of them.
static void stream_load(Stream *s, int source, uint64_t ordinal, bool fresh) {
  const StreamConfig *c = &s->config;
  uint64_t n = (uint64_t)s->samples[source];
  int64_t place = stream_permute(c->seed, ordinal / n, source, (int64_t)n, (int64_t)(ordinal % n));
  const Sample *sample = source_sample(c->source[source], s->sample[source][place]);
  s->loaded = (Origin){.source = source, .ordinal = ordinal};
  s->loaded_sample = sample;
  s->pieces = s->cuts = 0;

  size_t bytes = 0;
  for (int i = 0; i < sample->parts; i++)
    if (sample->part[i].kind == PART_TEXT) bytes += sample->part[i].text_bytes;
  if (bytes > s->ids_capacity) {
    s->ids_capacity = 2 * bytes;
    s->ids = xrealloc(s->ids, s->ids_capacity * sizeof *s->ids);
  }
  PackRoom room = stream_room(s);
  int64_t longest = min_i64(c->max_document, min_i64(room.slots, room.text)) - 2;
  if (sample->kind == SAMPLE_CAPTIONED) longest = INT32_MAX;
  int32_t *ids = s->ids;
  for (int i = 0; i < sample->parts; i++) {
    const SamplePart *part = &sample->part[i];
    if (part->kind == PART_TEXT)
      ids = stream_add_text(s, part, longest, ids);
    else
      stream_add_piece(s, (Piece){.grid = image_fit_grid(&c->fit, part->width, part->height), .tag = i});
  }

  if (sample->kind == SAMPLE_TEXT) {
    for (int i = 0; i < s->pieces; i++) stream_add_cut(s, i, 1);
  } else if (sample->kind == SAMPLE_INTERLEAVED) {
    stream_cut_interleaved(s, fresh);
  } else {
    if (s->piece[0].n > c->max_caption) {
      s->piece[0].n = c->max_caption;
      s->stats.truncated += fresh;
    }
    int tokens = s->piece[1].grid.rows * s->piece[1].grid.columns;
    DocumentSize size = {.slots = s->piece[0].n + 4 + tokens, .text = s->piece[0].n + 4, .images = 1};
    if (pack_room_fits(room, size))
      stream_add_cut(s, 0, 2);
    else
      stream_drop(s, sample, fresh);
  }
  s->stats.cut += fresh && s->cuts > 1;
}

// Makes document `index` of the loaded sample, as number `draw` of the run.
static Draft *stream_make(Stream *s, int index, uint64_t draw) {
  const StreamConfig *c = &s->config;
  const Piece *piece = s->piece + s->cut[index].first;
  int n = s->cut[index].count, vocab = c->shape.vocab;
  if (s->spare.count == 0) draft_list_add(&s->spare, xcalloc(1, sizeof(Draft)));
  Draft *draft = s->spare.draft[--s->spare.count];
  Document *d = &draft->document;
  float time = flow_time_draw(&c->flow_times, c->seed, draw, 0);
  bool noise = document_chance(c->seed, draw, STREAM_KIND, c->caption_to_image);
  if (s->loaded_sample->kind == SAMPLE_TEXT) {
    document_text(d, draw, vocab, piece->ids, piece->n, index == s->cuts - 1);
  } else if (s->loaded_sample->kind == SAMPLE_INTERLEAVED) {
    document_interleaved(d, draw, vocab, piece, n, noise, time);
  } else if (noise) {
    bool drop = document_chance(c->seed, draw, STREAM_CFG_DROP, c->cfg_drop);
    document_caption_to_image(d, draw, vocab, piece[0].ids, drop ? 0 : piece[0].n, piece[1].grid, time);
  } else {
    document_image_to_caption(d, draw, vocab, piece[0].ids, piece[0].n, piece[1].grid);
  }
  if (s->loaded_sample->kind == SAMPLE_CAPTIONED)
    for (int i = 0; i < d->parts; i++)
      if (d->part[i].kind == PART_IMAGE) d->part[i].tag = piece[1].tag;
  draft->size = document_size(d, vocab);
  draft->origin = (Origin){s->loaded.source, index, s->loaded.ordinal, draw};
  draft->sample = s->loaded_sample;
  return draft;
}

// The next document of the stream.
static Draft *stream_draw(Stream *s, Error *err) {
  while (s->loaded.source < 0 || s->loaded.piece >= s->cuts) {
    int source = 0;
    double least = 0;
    for (int i = 0; i < s->config.sources; i++) {
      double turn = ((double)s->drawn[i] + 0.5) / s->config.weight[i];
      if (i && turn >= least) continue;
      least = turn;
      source = i;
    }
    stream_load(s, source, s->drawn[source]++, true);
    s->unfit[source] = s->cuts ? 0 : s->unfit[source] + 1;
    if (s->unfit[source] < s->samples[source]) continue;
    error_set(err, "raise data.micro_batch_tokens, data.max_text or data.max_images, or lower data.max_caption",
              "source %d: none of its samples fits into a pack of %d slots, %d text rows and %d images", source + 1,
              s->config.shape.slots, s->config.max_text, s->config.shape.segments - 1);
    return NULL;
  }
  return stream_make(s, s->loaded.piece++, s->draw++);
}

static void window_take(Stream *s, int i, DraftList *list) {
  draft_list_add(list, s->window[i]);
  s->count--;
  memmove(s->window + i, s->window + i + 1, (size_t)(s->count - i) * sizeof *s->window);
}

static int window_fill(Stream *s, Error *err) {
  for (; s->count < STREAM_WINDOW; s->count++)
    if (!(s->window[s->count] = stream_draw(s, err))) return -1;
  return 0;
}

// Every document fits alone: then it is the longest and has no padding.
static int stream_pack_padded(Stream *s, DraftList *list, Error *err) {
  const PackRoom room = stream_room(s);
  DocumentSize sum = {0}; // without padding
  int longest = 0;
  for (;;) {
    if (window_fill(s, err)) return -1;
    const DocumentSize *next = &s->window[0]->size;
    int64_t length = max_i64(longest, next->slots), slots = (list->count + 1) * length;
    int64_t text = sum.text + next->text + slots - sum.slots - next->slots;
    if (slots > room.slots || text > room.text || sum.images + next->images > room.images) break;
    sum.slots += next->slots;
    sum.text += next->text;
    sum.images += next->images;
    longest = (int)length;
    window_take(s, 0, list);
  }
  for (int i = 0; i < list->count; i++) document_pad(&list->draft[i]->document, longest, s->config.shape.vocab);
  return 0;
}

static int stream_pack_varlen(Stream *s, DraftList *list, Error *err) {
  PackRoom room = stream_room(s);
  for (;;) {
    if (window_fill(s, err)) return -1;
    int longest = 0, next = 0;
    for (int i = 0; i < s->count; i++)
      if (s->window[i]->size.slots > longest) longest = s->window[i]->size.slots;
    // Room for a few documents leaves enough subsets to fill it without a gap. The oldest document always goes in.
    if (list->count && room.slots <= 4 * longest) break;
    while (next < s->count && !pack_room_fits(room, s->window[next]->size)) next++;
    if (next == s->count) break;
    room = pack_room_left(room, s->window[next]->size);
    window_take(s, next, list);
  }
  DocumentSize size[STREAM_WINDOW];
  int chosen[STREAM_WINDOW];
  for (int i = 0; i < s->count; i++) size[i] = s->window[i]->size;
  int n = pack_choose(size, s->count, room, s->cell, chosen);
  for (int i = 0; i < n; i++) window_take(s, chosen[i] - i, list);
  return 0;
}

int stream_pack(Stream *s, DraftList *list, Error *err) {
  return s->config.packing == PACKING_PADDED ? stream_pack_padded(s, list, err) : stream_pack_varlen(s, list, err);
}

void stream_save(const Stream *s, StreamState *state) {
  bool pending = s->loaded.source >= 0 && s->loaded.piece < s->cuts;
  *state = (StreamState){.draw = s->draw, .pending = {.source = -1}, .count = s->count};
  if (pending) state->pending = s->loaded;
  memcpy(state->drawn, s->drawn, sizeof s->drawn);
  for (int i = 0; i < s->count; i++) state->window[i] = s->window[i]->origin;
}

// Loads the sample of an origin again, if the state can be right about it.
static int stream_reload(Stream *s, const Origin *origin, Error *err) {
  bool known = origin->source >= 0 && origin->source < s->config.sources && origin->piece >= 0 &&
               origin->ordinal < s->drawn[origin->source] && origin->draw <= s->draw;
  if (known) stream_load(s, origin->source, origin->ordinal, false);
  if (known && origin->piece < s->cuts) return 0;
  return error_set(err, "continue with the data, tokenizer and data settings the run was started with",
                   "the saved data state does not belong to this data");
}

int stream_restore(Stream *s, const StreamState *state, Error *err) {
  while (s->count) draft_list_add(&s->spare, s->window[--s->count]);
  s->draw = state->draw;
  memcpy(s->drawn, state->drawn, sizeof s->drawn);
  if (state->count < 0 || state->count > STREAM_WINDOW)
    return error_set(err, NULL, "the saved data state has a window of %d documents", state->count);
  for (int i = 0; i < state->count; i++) {
    const Origin *origin = &state->window[i];
    if (stream_reload(s, origin, err)) return -1;
    s->window[s->count++] = stream_make(s, origin->piece, origin->draw);
  }
  s->loaded.source = -1;
  if (state->pending.source < 0) return 0;
  if (stream_reload(s, &state->pending, err)) return -1;
  s->loaded.piece = state->pending.piece;
  return 0;
}

StreamStats stream_stats(const Stream *s) {
  return s->stats;
}

int64_t stream_samples(const Stream *s, int source) {
  return s->samples[source];
}
