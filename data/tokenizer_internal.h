// What encoding and training share: the token table and the walk over words. Not for use outside the tokenizer.
#ifndef TESSERA_TOKENIZER_INTERNAL_H
#define TESSERA_TOKENIZER_INTERNAL_H

#include "base/hash.h"
#include "data/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

typedef struct PairSlot {
  uint64_t pair; // left << 32 | right
  int32_t id;    // the merged token; -1 = empty slot
} PairSlot;

struct Tokenizer {
  int vocab, merges;
  uint8_t byte_of_id[256], id_of_byte[256];
  int32_t *left, *right; // [vocab-260] the two tokens that token 256+i is made of
  size_t *start;         // [vocab-260+257] token i is bytes [start[i], start[i+1])
  uint8_t *bytes;
  size_t bytes_capacity;
  PairSlot *pair_slot; // [slots] open addressing: pair -> id
  int32_t *bytes_slot; // [slots] bytes -> id, -1 = empty
  size_t slots;        // a power of two, at most half full
  pcre2_code *regex;
};

// A tokenizer of the 256 bytes alone, with room for vocab-260 merges; NULL with *err set when vocab < 260.
Tokenizer *tokenizer_new(int vocab, Error *err);

// Adds the merge of two tokens as the next id and returns it. -1 when a token of the same bytes exists, which would
// make two spellings of one text. The caller sees to it that there is room.
int32_t tokenizer_merge_add(Tokenizer *t, int32_t left, int32_t right);

// Walks over the words of a text.
typedef struct Pieces {
  const pcre2_code *regex;
  pcre2_match_data *match;
  const uint8_t *text;
  size_t at, checked, end; // text[at, checked) is known to be UTF-8
} Pieces;

Pieces pieces_begin(const Tokenizer *t, const char *text, size_t n);
// The next word, *n bytes long; NULL at the end. A byte that is not UTF-8 is a word of its own.
const uint8_t *pieces_next(Pieces *p, size_t *n);
void pieces_end(Pieces *p);

static inline uint64_t pair_of(int32_t left, int32_t right) {
  return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}
#endif
