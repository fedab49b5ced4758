// Learning merges: the most frequent pair again and again (Sennrich et al. 2016, "Neural Machine Translation of Rare
// Words with Subword Units"), with pair counts kept up to date and a heap of candidates, so that a merge costs only the
// words it changes.
#include "data/tokenizer_internal.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct Word {
  const uint8_t *bytes; // in the caller's text
  int32_t *symbol;      // [symbols]
  int32_t length, symbols;
  int64_t count;
} Word;

typedef struct Pair {
  uint64_t pair;
  int64_t count; // occurrences in the words as they are now
  int32_t *word; // [words] where it occurs or once did
  int32_t words, capacity;
} Pair;

// What the heap holds: most frequent first, then the lower pair. Its count may be out of date, but only too high.
typedef struct Candidate {
  int64_t count;
  uint64_t pair;
  int32_t index;
} Candidate;

typedef struct Trainer {
  Word *word;
  int32_t *word_slot; // [word_slots] -1 = empty
  size_t words, word_capacity, word_slots;
  int32_t *symbol;
  Pair *pair;
  int32_t *pair_slot; // [pair_slots] -1 = empty
  size_t pairs, pair_capacity, pair_slots;
  Candidate *heap;
  size_t heaped, heap_capacity;
} Trainer;

static int32_t *slots_make(size_t n) {
  int32_t *slot = xmalloc(n * sizeof(int32_t));
  memset(slot, 0xff, n * sizeof(int32_t));
  return slot;
}

// Counts one occurrence of a word, which is added when it is new.
static void word_count(Trainer *r, const uint8_t *bytes, size_t n) {
  if (r->words == r->word_capacity) {
    r->word_capacity = r->word_capacity ? 2 * r->word_capacity : 1024;
    r->word = xrealloc(r->word, r->word_capacity * sizeof(Word));
  }
  if (2 * (r->words + 1) > r->word_slots) {
    r->word_slots = r->word_slots ? 2 * r->word_slots : 4096;
    free(r->word_slot);
    r->word_slot = slots_make(r->word_slots);
    for (size_t i = 0; i < r->words; i++) {
      size_t at = hash_bytes(r->word[i].bytes, (size_t)r->word[i].length) & (r->word_slots - 1);
      while (r->word_slot[at] >= 0) at = (at + 1) & (r->word_slots - 1);
      r->word_slot[at] = (int32_t)i;
    }
  }
  size_t at = hash_bytes(bytes, n) & (r->word_slots - 1);
  for (; r->word_slot[at] >= 0; at = (at + 1) & (r->word_slots - 1)) {
    Word *w = &r->word[r->word_slot[at]];
    if ((size_t)w->length != n || memcmp(w->bytes, bytes, n) != 0) continue;
    w->count++;
    return;
  }
  r->word_slot[at] = (int32_t)r->words;
  r->word[r->words++] = (Word){.bytes = bytes, .length = (int32_t)n, .symbols = (int32_t)n, .count = 1};
}

static size_t pair_slot_find(const Trainer *r, uint64_t pair) {
  size_t at = hash_u64(pair) & (r->pair_slots - 1);
  while (r->pair_slot[at] >= 0 && r->pair[r->pair_slot[at]].pair != pair) at = (at + 1) & (r->pair_slots - 1);
  return at;
}

// The pair's entry, made when it is new; valid until the next call.
static Pair *pair_entry(Trainer *r, uint64_t pair) {
  if (2 * (r->pairs + 1) > r->pair_slots) {
    r->pair_slots = r->pair_slots ? 2 * r->pair_slots : 4096;
    free(r->pair_slot);
    r->pair_slot = slots_make(r->pair_slots);
    for (size_t i = 0; i < r->pairs; i++) r->pair_slot[pair_slot_find(r, r->pair[i].pair)] = (int32_t)i;
  }
  size_t at = pair_slot_find(r, pair);
  if (r->pair_slot[at] >= 0) return &r->pair[r->pair_slot[at]];
  if (r->pairs == r->pair_capacity) {
    r->pair_capacity = r->pair_capacity ? 2 * r->pair_capacity : 1024;
    r->pair = xrealloc(r->pair, r->pair_capacity * sizeof(Pair));
  }
  r->pair_slot[at] = (int32_t)r->pairs;
  r->pair[r->pairs] = (Pair){.pair = pair};
  return &r->pair[r->pairs++];
}

static void pair_add_word(Pair *p, int32_t word) {
  if (p->words > 0 && p->word[p->words - 1] == word) return;
  if (p->words == p->capacity) {
    p->capacity = p->capacity ? 2 * p->capacity : 4;
    p->word = xrealloc(p->word, (size_t)p->capacity * sizeof(int32_t));
  }
  p->word[p->words++] = word;
}

static bool candidate_before(const Candidate *a, const Candidate *b) {
  return a->count != b->count ? a->count > b->count : a->pair < b->pair;
}

static void candidate_push(Trainer *r, int32_t index) {
  Candidate c = {.count = r->pair[index].count, .pair = r->pair[index].pair, .index = index};
  if (c.count < 2) return; // a merge that is used once shortens nothing
  if (r->heaped == r->heap_capacity) {
    r->heap_capacity = r->heap_capacity ? 2 * r->heap_capacity : 1024;
    r->heap = xrealloc(r->heap, r->heap_capacity * sizeof(Candidate));
  }
  size_t at = r->heaped++;
  for (size_t up; at > 0 && candidate_before(&c, &r->heap[up = (at - 1) / 2]); at = up) r->heap[at] = r->heap[up];
  r->heap[at] = c;
}

static Candidate candidate_pop(Trainer *r) {
  Candidate top = r->heap[0], last = r->heap[--r->heaped];
  size_t at = 0;
  for (size_t down; (down = 2 * at + 1) < r->heaped; at = down) {
    if (down + 1 < r->heaped && candidate_before(&r->heap[down + 1], &r->heap[down])) down++;
    if (!candidate_before(&r->heap[down], &last)) break;
    r->heap[at] = r->heap[down];
  }
  r->heap[at] = last;
  return top;
}

// Splits the words into bytes and counts their pairs.
static void trainer_begin(Trainer *r, const Tokenizer *t) {
  size_t total = 0;
  for (size_t i = 0; i < r->words; i++) total += (size_t)r->word[i].length;
  r->symbol = xmalloc(total * sizeof(int32_t) + 1);
  int32_t *symbol = r->symbol;
  for (size_t i = 0; i < r->words; i++) {
    Word *w = &r->word[i];
    w->symbol = symbol;
    symbol += w->length;
    for (int32_t j = 0; j < w->length; j++) w->symbol[j] = t->id_of_byte[w->bytes[j]];
    for (int32_t j = 0; j + 1 < w->length; j++) {
      Pair *p = pair_entry(r, pair_of(w->symbol[j], w->symbol[j + 1]));
      p->count += w->count;
      pair_add_word(p, (int32_t)i);
    }
  }
  for (size_t i = 0; i < r->pairs; i++) candidate_push(r, (int32_t)i);
}

// Replaces (left, right) by id in one word, keeping the pair counts true.
static void word_merge(Trainer *r, int32_t index, int32_t left, int32_t right, int32_t id) {
  Word *w = &r->word[index];
  for (int32_t j = 0; j + 1 < w->symbols; j++)
    pair_entry(r, pair_of(w->symbol[j], w->symbol[j + 1]))->count -= w->count;
  int32_t n = 0;
  for (int32_t j = 0; j < w->symbols; n++) {
    bool merges = j + 1 < w->symbols && w->symbol[j] == left && w->symbol[j + 1] == right;
    w->symbol[n] = merges ? id : w->symbol[j];
    j += merges ? 2 : 1;
  }
  w->symbols = n;
  for (int32_t j = 0; j + 1 < n; j++) {
    Pair *p = pair_entry(r, pair_of(w->symbol[j], w->symbol[j + 1]));
    p->count += w->count;
    if (w->symbol[j] == id || w->symbol[j + 1] == id) pair_add_word(p, index);
  }
}

static void trainer_run(Trainer *r, Tokenizer *t) {
  while (r->heaped > 0 && t->merges < t->vocab - TOKENIZER_MIN_VOCAB) {
    Candidate best = candidate_pop(r);
    Pair *p = &r->pair[best.index];
    if (p->count != best.count) { // counts of known pairs only fall: look again at its true place
      candidate_push(r, best.index);
      continue;
    }
    int32_t left = (int32_t)(best.pair >> 32), right = (int32_t)(best.pair & 0xffffffffu);
    int32_t id = tokenizer_merge_add(t, left, right);
    if (id < 0) continue; // the same bytes were merged another way before
    int32_t *word = p->word, words = p->words;
    *p = (Pair){.pair = p->pair, .count = p->count};
    size_t known = r->pairs;
    for (int32_t i = 0; i < words; i++) word_merge(r, word[i], left, right, id);
    free(word);
    for (size_t i = known; i < r->pairs; i++) candidate_push(r, (int32_t)i);
  }
}

Tokenizer *tokenizer_train(const char *const *text, const size_t *bytes, int64_t n, int vocab, Error *err) {
  Tokenizer *t = tokenizer_new(vocab, err);
  if (!t) return NULL;
  Trainer r = {0};
  for (int64_t i = 0; i < n; i++) {
    Pieces pieces = pieces_begin(t, text[i], bytes[i]);
    size_t length;
    for (const uint8_t *piece; (piece = pieces_next(&pieces, &length));) word_count(&r, piece, length);
    pieces_end(&pieces);
  }
  trainer_begin(&r, t);
  trainer_run(&r, t);
  for (size_t i = 0; i < r.pairs; i++) free(r.pair[i].word);
  free(r.word);
  free(r.word_slot);
  free(r.symbol);
  free(r.pair);
  free(r.pair_slot);
  free(r.heap);
  return t;
}
