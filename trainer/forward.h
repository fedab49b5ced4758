// Documents on their way through the forward-only programs: a pack of them in host memory, laid out for the smallest
// program that has room.
#ifndef TESSERA_FORWARD_H
#define TESSERA_FORWARD_H

#include "data/packer.h"
#include "data/tokenizer.h"
#include "trainer/engine.h"

// Documents [0, docs) of the pack keep their order. Text rows of document i are [text[i], text[i+1]), its image
// segments [segment[i], segment[i+1]). A zeroed pack is empty.
typedef struct ForwardPack {
  const ForwardProgram *program;
  Batch batch;        // the host arrays; entries may be changed once a run's results were read
  void *block;        // all of them, as engine_run takes them
  int docs;           //
  int *text;          // [docs + 1]
  int *segment;       // [docs + 1]
  size_t block_bytes; // allocated
  int doc_capacity;
} ForwardPack;

// What the largest forward-only program holds.
PackRoom forward_room(const Engine *e);

// Lays out as many of the n >= 1 documents as fit, taken from the front; p keeps its memory for the next use. `seed` is
// that of the noise of MODE_EVAL. Returns their number, or -1 with *err set when the first does not fit by itself or
// holds a token that is no id of the model.
int forward_pack_fill(ForwardPack *p, const Engine *e, Mode mode, const Document *const *docs, int n, uint64_t seed,
                      Error *err);
void forward_pack_free(ForwardPack *p);

// -1 with *err set when the tokenizer's ids are not the model's.
int forward_check_tokenizer(const Engine *e, const Tokenizer *t, Error *err);
#endif
