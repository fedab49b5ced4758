// Byte-level BPE as in "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) and its encoder.py.
#include "base/hash.h"
#include "data/paths.h"
#include "data/tokenizer_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A longer word than this is merged in parts: it bounds the memory of one call.
static const size_t MAX_PIECE_BYTES = 1 << 20;
static const size_t MAX_VOCAB_FILE_BYTES = 1 << 28;
enum { PRINTABLE = 188 }; // bytes that GPT-2's alphabet writes as themselves; they come first

// ---- pre-tokenization

// (?!\S): the last blank of a run belongs to the word after it. Anchored: the alternatives cover every character.
static const char GPT2_PATTERN[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static pcre2_code *regex_make(Error *err) {
  int code;
  PCRE2_SIZE at;
  pcre2_code *regex = pcre2_compile((PCRE2_SPTR)GPT2_PATTERN, PCRE2_ZERO_TERMINATED,
                                    PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &code, &at, NULL);
  if (!regex) {
    error_set(err, "PCRE2 must be built with Unicode support", "PCRE2 refuses the pattern of words (error %d at %zu)",
              code, at);
    return NULL;
  }
  // Where just-in-time compilation is missing, the interpreter gives the same matches, slower.
  (void)pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE);
  return regex;
}

Pieces pieces_begin(const Tokenizer *t, const char *text, size_t n) {
  pcre2_match_data *match = pcre2_match_data_create(1, NULL);
  if (!match) panic("out of memory in PCRE2");
  return (Pieces){.regex = t->regex, .match = match, .text = (const uint8_t *)text, .end = n};
}

void pieces_end(Pieces *p) {
  pcre2_match_data_free(p->match);
}

const uint8_t *pieces_next(Pieces *p, size_t *n) {
  if (p->at == p->end) return NULL;
  const uint8_t *piece = p->text + p->at;
  int found;
  if (p->at == p->checked) { // a new run: this match checks all that is left, and says where it stops being UTF-8
    p->checked = p->end;
    found = pcre2_match(p->regex, piece, p->end - p->at, 0, 0, p->match, NULL);
    if (found <= PCRE2_ERROR_UTF8_ERR1 && found >= PCRE2_ERROR_UTF8_ERR21) {
      p->checked = p->at + pcre2_get_startchar(p->match);
      if (p->checked == p->at) {
        p->checked = ++p->at;
        *n = 1;
        return piece;
      }
      found = pcre2_match(p->regex, piece, p->checked - p->at, 0, PCRE2_NO_UTF_CHECK, p->match, NULL);
    }
  } else {
    found = pcre2_match(p->regex, piece, p->checked - p->at, 0, PCRE2_NO_UTF_CHECK, p->match, NULL);
  }
  // Only a resource limit of PCRE2 can make it fail here; what is left of the run is then one word.
  size_t length = found >= 0 ? pcre2_get_ovector_pointer(p->match)[1] : 0;
  if (length == 0) length = p->checked - p->at;
  if (length > MAX_PIECE_BYTES) {
    length = MAX_PIECE_BYTES;
    while ((piece[length] & 0xC0) == 0x80) length--; // not inside a character: what is left must stay UTF-8
  }
  p->at += length;
  *n = length;
  return piece;
}

// ---- tables

static int32_t token_find(const Tokenizer *t, const uint8_t *bytes, size_t n, size_t *slot) {
  for (*slot = hash_bytes(bytes, n) & (t->slots - 1);; *slot = (*slot + 1) & (t->slots - 1)) {
    int32_t id = t->bytes_slot[*slot];
    if (id < 0) return -1;
    if (t->start[id + 1] - t->start[id] == n && memcmp(t->bytes + t->start[id], bytes, n) == 0) return id;
  }
}

static PairSlot *pair_find(const Tokenizer *t, uint64_t pair) {
  size_t at = hash_u64(pair) & (t->slots - 1);
  while (t->pair_slot[at].id >= 0 && t->pair_slot[at].pair != pair) at = (at + 1) & (t->slots - 1);
  return &t->pair_slot[at];
}

Tokenizer *tokenizer_new(int vocab, Error *err) {
  if (vocab < TOKENIZER_MIN_VOCAB) {
    error_set(err, "256 bytes and 4 specials are the least", "a vocabulary of %d ids is too small", vocab);
    return NULL;
  }
  pcre2_code *regex = regex_make(err);
  if (!regex) return NULL;
  Tokenizer *t = xcalloc(1, sizeof(Tokenizer));
  size_t room = (size_t)(vocab - TOKENIZER_MIN_VOCAB);
  t->vocab = vocab;
  t->regex = regex;
  t->left = xmalloc((room + 1) * sizeof(int32_t));
  t->right = xmalloc((room + 1) * sizeof(int32_t));
  t->start = xcalloc(room + 257, sizeof(size_t));
  t->bytes_capacity = 4096;
  t->bytes = xmalloc(t->bytes_capacity);
  for (t->slots = 512; t->slots < 2 * (room + 256); t->slots *= 2) continue;
  t->pair_slot = xmalloc(t->slots * sizeof(PairSlot));
  t->bytes_slot = xmalloc(t->slots * sizeof(int32_t));
  for (size_t i = 0; i < t->slots; i++) {
    t->pair_slot[i] = (PairSlot){.id = -1};
    t->bytes_slot[i] = -1;
  }
  int printable = 0, other = PRINTABLE;
  for (int b = 0; b < 256; b++) {
    bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    int id = prints ? printable++ : other++;
    t->byte_of_id[id] = (uint8_t)b;
    t->id_of_byte[b] = (uint8_t)id;
  }
  for (int id = 0; id < 256; id++) {
    size_t slot;
    t->bytes[id] = t->byte_of_id[id];
    t->start[id + 1] = (size_t)id + 1;
    token_find(t, t->bytes + id, 1, &slot);
    t->bytes_slot[slot] = id;
  }
  return t;
}

int32_t tokenizer_merge_add(Tokenizer *t, int32_t left, int32_t right) {
  int32_t id = 256 + t->merges;
  size_t n_left = t->start[left + 1] - t->start[left], n_right = t->start[right + 1] - t->start[right];
  size_t at = t->start[id];
  while (at + n_left + n_right > t->bytes_capacity) t->bytes = xrealloc(t->bytes, t->bytes_capacity *= 2);
  memcpy(t->bytes + at, t->bytes + t->start[left], n_left);
  memcpy(t->bytes + at + n_left, t->bytes + t->start[right], n_right);
  size_t slot;
  if (token_find(t, t->bytes + at, n_left + n_right, &slot) >= 0) return -1;
  t->bytes_slot[slot] = id;
  t->start[id + 1] = at + n_left + n_right;
  t->left[t->merges] = left;
  t->right[t->merges++] = right;
  *pair_find(t, pair_of(left, right)) = (PairSlot){.pair = pair_of(left, right), .id = id};
  return id;
}

void tokenizer_free(Tokenizer *t) {
  if (!t) return;
  pcre2_code_free(t->regex);
  free(t->left);
  free(t->right);
  free(t->start);
  free(t->bytes);
  free(t->pair_slot);
  free(t->bytes_slot);
  free(t);
}

// ---- files

// The bytes a word of GPT-2's alphabet stands for, written over it (they are never more); their number, 0 if bad.
static size_t alphabet_decode(const Tokenizer *t, uint8_t *word, size_t n) {
  size_t length = 0;
  for (size_t i = 0; i < n;) {
    int code = word[i++];
    if (code >= 0xC2 && code <= 0xC5 && i < n && (word[i] & 0xC0) == 0x80) // two bytes of UTF-8: U+0080 to U+017F
      code = (code & 0x1F) << 6 | (word[i++] & 0x3F);
    else if (code >= 0x80)
      return 0;
    int id = code < 256 ? t->id_of_byte[code] : PRINTABLE + code - 256;
    if ((code < 256 && id >= PRINTABLE) || id > 255) return 0; // written as itself though not printable, or no letter
    word[length++] = t->byte_of_id[id];
  }
  return length;
}

// One line "a b" -> the next merge.
static int merge_parse(Tokenizer *t, uint8_t *line, size_t n, Error *err) {
  uint8_t *space = memchr(line, ' ', n);
  size_t slot, n_left = space ? (size_t)(space - line) : 0, n_right = space ? n - n_left - 1 : 0;
  n_left = alphabet_decode(t, line, n_left);
  n_right = n_left ? alphabet_decode(t, space + 1, n_right) : 0;
  if (n_left == 0 || n_right == 0)
    return error_set(err, "a line is two words of GPT-2's byte alphabet with a blank between", "no merge");
  int32_t left = token_find(t, line, n_left, &slot), right = token_find(t, space + 1, n_right, &slot);
  if (left < 0 || right < 0)
    return error_set(err, "merges must stand in the order they were learned in",
                     "the %s part is no token made by the lines before", left < 0 ? "first" : "second");
  if (tokenizer_merge_add(t, left, right) < 0)
    return error_set(err, NULL, "the line makes a token that exists already");
  return 0;
}

Tokenizer *tokenizer_load(const char *path, int vocab, Error *err) {
  Tokenizer *t = tokenizer_new(vocab, err);
  if (!t || !path) return t;
  size_t n;
  char *file = path_home(path), *text = file_read(file, MAX_VOCAB_FILE_BYTES, &n, err);
  free(file);
  if (!text) {
    tokenizer_free(t);
    return NULL;
  }
  bool versioned = strncmp(text, "#version", 8) == 0;
  int rc = 0, number = 1;
  for (char *line = text, *end = text + n; rc == 0 && line < end && t->merges < vocab - TOKENIZER_MIN_VOCAB; number++) {
    char *newline = memchr(line, '\n', (size_t)(end - line)), *stop = newline ? newline : end, *next = stop + 1;
    if (stop > line && stop[-1] == '\r') stop--;
    if (stop > line && !(number == 1 && versioned)) {
      rc = merge_parse(t, (uint8_t *)line, (size_t)(stop - line), err);
      if (rc != 0) error_prefix(err, "%s line %d", path, number);
    }
    line = next;
  }
  if (rc == 0 && t->merges == 0 && !versioned)
    rc = error_set(err, "it begins with \"#version: 0.2\", then a merge per line", "%s holds no merges", path);
  free(text);
  if (rc == 0) return t;
  tokenizer_free(t);
  return NULL;
}

static void token_print(const Tokenizer *t, int32_t id, FILE *f) {
  for (size_t i = t->start[id]; i < t->start[id + 1]; i++) {
    int letter = t->id_of_byte[t->bytes[i]];
    int code = letter < PRINTABLE ? t->bytes[i] : 256 + letter - PRINTABLE;
    if (code >= 0x80) putc(0xC0 | code >> 6, f);
    putc(code >= 0x80 ? 0x80 | (code & 0x3F) : code, f);
  }
}

int tokenizer_save(const Tokenizer *t, const char *path, Error *err) {
  FILE *f = fopen(path, "wb");
  if (!f) return error_set(err, "check the folder and its permissions", "cannot write %s: %s", path, strerror(errno));
  fputs("#version: 0.2\n", f);
  for (int i = 0; i < t->merges; i++) {
    token_print(t, t->left[i], f);
    putc(' ', f);
    token_print(t, t->right[i], f);
    putc('\n', f);
  }
  int bad = ferror(f);
  bad |= fclose(f) != 0;
  if (bad) return error_set(err, "is the disk full?", "cannot write %s: %s", path, strerror(errno));
  return 0;
}

// ---- ids

char *tokenizer_identity(const Tokenizer *t) {
  uint64_t hash = 0;
  for (int32_t id = 0; id < tokenizer_used(t); id++) {
    size_t n;
    char *bytes = tokenizer_decode(t, &id, 1, &n);
    hash = hash64(bytes, n, hash);
    free(bytes);
  }
  return xasprintf("%016" PRIx64, hash);
}

int tokenizer_vocab(const Tokenizer *t) {
  return t->vocab;
}

int tokenizer_used(const Tokenizer *t) {
  return 256 + t->merges;
}

// ---- encode and decode

// Symbols of one word as a linked list, and a heap of the merges that may apply: n log n even for long words.
typedef struct Merger {
  int32_t *symbol, *next, *previous; // [capacity] -1 = merged away; index of the neighbours, -1 = none
  uint64_t *heap;                    // [3 * capacity] id << 32 | index of the left symbol: lowest id, then leftmost
  size_t heaped, capacity;
} Merger;

static void merger_reserve(Merger *m, size_t n) {
  if (n <= m->capacity) return;
  m->capacity = 2 * n;
  m->symbol = xrealloc(m->symbol, m->capacity * sizeof(int32_t));
  m->next = xrealloc(m->next, m->capacity * sizeof(int32_t));
  m->previous = xrealloc(m->previous, m->capacity * sizeof(int32_t));
  m->heap = xrealloc(m->heap, 3 * m->capacity * sizeof(uint64_t)); // n-1 pairs, and two more a merge
}

static void merger_free(Merger *m) {
  free(m->symbol);
  free(m->next);
  free(m->previous);
  free(m->heap);
}

static void merger_push(Merger *m, const Tokenizer *t, int32_t left, int32_t right) {
  if (left < 0 || right < 0) return;
  int32_t id = pair_find(t, pair_of(m->symbol[left], m->symbol[right]))->id;
  if (id < 0) return;
  uint64_t entry = pair_of(id, left);
  size_t at = m->heaped++;
  for (size_t up; at > 0 && m->heap[up = (at - 1) / 2] > entry; at = up) m->heap[at] = m->heap[up];
  m->heap[at] = entry;
}

static uint64_t merger_pop(Merger *m) {
  uint64_t top = m->heap[0], last = m->heap[--m->heaped];
  size_t at = 0;
  for (size_t down; (down = 2 * at + 1) < m->heaped; at = down) {
    if (down + 1 < m->heaped && m->heap[down + 1] < m->heap[down]) down++;
    if (m->heap[down] >= last) break;
    m->heap[at] = m->heap[down];
  }
  m->heap[at] = last;
  return top;
}

// Merges the word's bytes, lowest id first and from left to right; appends what is left to ids and returns its number.
static int64_t piece_encode(const Tokenizer *t, Merger *m, const uint8_t *piece, size_t n, int32_t *ids) {
  merger_reserve(m, n);
  m->heaped = 0;
  for (size_t i = 0; i < n; i++) {
    m->symbol[i] = t->id_of_byte[piece[i]];
    m->previous[i] = (int32_t)i - 1;
    m->next[i] = i + 1 < n ? (int32_t)i + 1 : -1;
    if (i > 0) merger_push(m, t, (int32_t)i - 1, (int32_t)i);
  }
  while (m->heaped > 0) {
    uint64_t top = merger_pop(m);
    int32_t id = (int32_t)(top >> 32), left = (int32_t)(top & 0xffffffffu), right = m->next[left];
    // An entry is stale once one of its two symbols was merged with something else.
    if (m->symbol[left] != t->left[id - 256] || right < 0 || m->symbol[right] != t->right[id - 256]) continue;
    m->symbol[left] = id;
    m->symbol[right] = -1;
    m->next[left] = m->next[right];
    if (m->next[right] >= 0) m->previous[m->next[right]] = left;
    merger_push(m, t, m->previous[left], left);
    merger_push(m, t, left, m->next[left]);
  }
  int64_t count = 0;
  for (int32_t i = 0; i >= 0; i = m->next[i]) ids[count++] = m->symbol[i];
  return count;
}

int64_t tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, int32_t *ids) {
  Pieces pieces = pieces_begin(t, text, bytes);
  Merger merger = {0};
  int64_t count = 0;
  size_t n;
  for (const uint8_t *piece; (piece = pieces_next(&pieces, &n));)
    count += piece_encode(t, &merger, piece, n, ids + count);
  merger_free(&merger);
  pieces_end(&pieces);
  return count;
}

char *tokenizer_decode(const Tokenizer *t, const int32_t *ids, int64_t n, size_t *bytes) {
  size_t total = 0;
  for (int64_t i = 0; i < n; i++)
    if (ids[i] >= 0 && ids[i] < tokenizer_used(t)) total += t->start[ids[i] + 1] - t->start[ids[i]];
  char *text = xmalloc(total + 1), *at = text;
  for (int64_t i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= tokenizer_used(t)) continue;
    size_t length = t->start[ids[i] + 1] - t->start[ids[i]];
    memcpy(at, t->bytes + t->start[ids[i]], length);
    at += length;
  }
  *at = 0;
  if (bytes) *bytes = total;
  return text;
}
