// Documents: what the packer packs and the loader, the evaluation and the sampler build. A document is a list of parts;
// a part is a run of text tokens or one image.
//
// clang-format off
//   text               [bos] text [eos]
//   caption to image   [bos] caption [boi] noised-image
//   unconditional      [bos] [boi] noised-image
//   image to caption   [bos] [boi] clean-image [eoi] caption [eos]
//   interleaved        [bos] then each text as it is and each image as [boi] clean-image [eoi], and [eos]. Where one
//                      image is noised, it ends the document; with text after it, it appears twice, noised and then
//                      clean ([boi] noised-image clean-image [eoi]), at the same rotary positions.
// clang-format on
#ifndef TESSERA_DOCUMENT_H
#define TESSERA_DOCUMENT_H

#include <stdbool.h>
#include <stdint.h>

#include "data/image.h"
#include "data/part.h"
#include "data/tokenizer.h"

typedef struct Part {
  PartKind kind;
  int first, tokens;    // text: token[first .. first + tokens) of the document, at least one; image: tokens =
                        // rows * columns
  int rows, columns;    // image: in patches
  int seg_kind;         // image: SEGMENT_NOISED or SEGMENT_CLEAN
  float time;           // image: flow time t; 1 for clean ones
  int ordinal;          // image: which noised image of the document, 0, 1, ..; 0 for clean ones
  bool copy;            // image: the clean copy of the noised image just before it, at the same rotary positions
  int tag;              // image: the caller's name for it (the loader's: the part of the sample it comes from)
  const uint8_t *patch; // image: [tokens, 3p^2], the caller's, or in the pack already, where they go (pack_patches);
                        // NULL = zeros
} Part;

typedef struct Document {
  uint64_t draw; // the document's number in the run: the counter of all its random numbers
  bool silent;   // nothing in it carries a loss: no targets, all images clean. For samples that fail to decode
  Part *part;    // [parts]
  int parts, part_capacity;
  int32_t *token; // [tokens] of all text parts
  int tokens, token_capacity;
  int padding; // how many of the tokens, the last ones, are padding
} Document;

// What a document takes of a pack, and what it adds to the denominators of the losses.
typedef struct DocumentSize {
  int slots, text, images; // tokens, text tokens, image segments
  int targets, noised;     // text tokens with a target, tokens of noised images
} DocumentSize;

// Empties a document (a zeroed one is empty) and sets its number; memory is kept for the next use.
void document_reset(Document *d, uint64_t draw);
void document_free(Document *d);

// Appends n >= 0 tokens to the text part at the end, or opens one.
void document_add_text(Document *d, const int32_t *ids, int n);
// Appends an image of rows x columns patches (both >= 1) and returns its part, valid until the next addition. Noised
// images are numbered as they come; `time` is ignored for clean ones.
Part *document_add_image(Document *d, ImageGrid grid, int seg_kind, float time);

// The kinds of documents: each resets d first. `vocab` is V.
// ids [n] is the text; eos false for a text that goes on in another document.
void document_text(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, bool eos);
// n = 0: unconditional.
void document_caption_to_image(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, ImageGrid grid,
                               float time);
void document_image_to_caption(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, ImageGrid grid);

// A piece of an interleaved document: text (ids != NULL) or an image with the caller's tag.
typedef struct Piece {
  const int32_t *ids;
  int n;
  ImageGrid grid;
  int tag;
} Piece;
// `noise`: the last image is noised to flow time `time`; no matter when there is no image.
void document_interleaved(Document *d, uint64_t draw, int vocab, const Piece *piece, int n, bool noise, float time);

// Appends padding to a document that has none, up to `slots` tokens in all; a longer one stays as it is. Padding is
// eoi, again and again: eoi is never a target, so neither the padding nor the token before it has one, and no token of
// the document sees what follows it.
void document_pad(Document *d, int slots, int vocab);
// The (query, key) pairs whose query is padding: each such token sees itself and all before it but noised images.
int64_t document_padding_pairs(const Document *d);

// Sums over the parts; with `silent`, as it would be without.
DocumentSize document_size(const Document *d, int vocab);

// The target of token i of the n tokens of a text part: the next one, or -1 at the end of the part, for boi, and where
// the next is eoi.
static inline int32_t document_target(const int32_t *token, int i, int n, int vocab) {
  SpecialIds id = special_ids(vocab);
  if (i + 1 >= n || token[i] == id.boi || token[i + 1] == id.eoi) return -1;
  return token[i + 1];
}

// True with probability p, from one of the document's streams (STREAM_KIND, STREAM_CFG_DROP, ..).
bool document_chance(uint64_t seed, uint64_t draw, uint32_t stream, double p);
#endif
