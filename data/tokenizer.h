// Byte-level byte-pair encoding with GPT-2's pre-tokenization.
//
// Ids: 0-255 single bytes in GPT-2's order ('!'..'~', 0xA1..0xAC, 0xAE..0xFF, then the others ascending), then one id a
// merge in file order, then unused ids, and the specials last: bos V-4, eos V-3, boi V-2, eoi V-1. Special names inside
// text are plain text. A Tokenizer never changes after it is made: every function is thread-safe.
#ifndef TESSERA_TOKENIZER_H
#define TESSERA_TOKENIZER_H

#include "base/base.h"

enum { TOKENIZER_SPECIALS = 4, TOKENIZER_MIN_VOCAB = 256 + TOKENIZER_SPECIALS };

typedef struct Tokenizer Tokenizer;

// Loads the first min(N, vocab-260) of the N merges of a vocab.bpe file ("#version" line, then a line "a b" per merge
// in GPT-2's byte-to-unicode alphabet). path NULL: no merges, raw bytes; "~/": the home folder. NULL with *err set,
// naming the line, on a file that is not one, or when vocab < 260.
Tokenizer *tokenizer_load(const char *path, int vocab, Error *err);

// Learns up to vocab-260 merges from n texts: the most frequent pair within pre-tokenized words first, ties to the
// lower (left, right) ids; it ends early when no pair is left that occurs twice. The texts are not kept.
Tokenizer *tokenizer_train(const char *const *text, const size_t *bytes, int64_t n, int vocab, Error *err);

// A hash over what every id stands for, 16 hexadecimal digits; malloc'd.
char *tokenizer_identity(const Tokenizer *t);

// Writes the merges as a vocab.bpe file that tokenizer_load reads; 0, or -1 with *err set.
int tokenizer_save(const Tokenizer *t, const char *path, Error *err);
void tokenizer_free(Tokenizer *t);

int tokenizer_vocab(const Tokenizer *t); // V
int tokenizer_used(const Tokenizer *t);  // 256 + merges: ids in [used, V-4) stand for nothing and are never sampled

// The last ids of a vocabulary: a document begins, it ends, an image begins, it has ended.
typedef struct SpecialIds {
  int32_t bos, eos, boi, eoi;
} SpecialIds;
static inline SpecialIds special_ids(int vocab) {
  return (SpecialIds){.bos = vocab - 4, .eos = vocab - 3, .boi = vocab - 2, .eoi = vocab - 1};
}

// Text (any bytes; those that are not UTF-8 stand for themselves) to ids; returns their number, at most `bytes`, for
// which ids must have room. No specials are added.
int64_t tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, int32_t *ids);

// Ids back to bytes: malloc'd, a NUL appended, *bytes (may be NULL) without it. Specials, unused and out-of-range ids
// decode to nothing. The inverse of encode for any bytes.
char *tokenizer_decode(const Tokenizer *t, const int32_t *ids, int64_t n, size_t *bytes);
#endif
