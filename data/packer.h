// The packer: which documents go into a pack, and a pack's arrays (kernels/batch.h) from its documents.
#ifndef TESSERA_PACKER_H
#define TESSERA_PACKER_H

#include "data/document.h"
#include "kernels/batch.h"
#include "model/config/config.h"

// Room in a pack: token slots, text rows, image segments.
typedef struct PackRoom {
  int slots, text, images;
} PackRoom;

static inline bool pack_room_fits(PackRoom room, DocumentSize size) {
  return size.slots <= room.slots && size.text <= room.text && size.images <= room.images;
}
static inline PackRoom pack_room_left(PackRoom room, DocumentSize size) {
  return (PackRoom){room.slots - size.slots, room.text - size.text, room.images - size.images};
}

// Memory for pack_choose.
typedef struct PackCell {
  int32_t last, text, images;
} PackCell;

// Chooses from candidates in order of preference the ones that fill `room` best: the largest sum of slots that a subset
// has, found as a subset-sum (dynamic programme over slots, each sum keeping the first subset that reached it within
// the text and image limits; earlier candidates first). `cell` has room.slots + 1 entries. Writes the chosen indices,
// ascending, and returns their number.
int pack_choose(const DocumentSize *size, int n, PackRoom room, PackCell *cell, int *chosen);

// Where a pack's image row `row` (the first is 0) has its patch.
static inline uint8_t *pack_patches(const Batch *b, BatchShape shape, int row) {
  return b->patch + (size_t)row * (size_t)shape.patch;
}

// Lays n documents out, in order, as one pack: fills every array of *b, whose pointers are bound for `shape`, and the
// counts of *b->dims; the scales and the seed of dims are 0 (pack_scale). The patches of its images are copied to where
// they go, unless they are there. Allocates nothing. Returns -1 with *err set, the pack undefined, when the documents
// do not fit the shape or a token is not an id.
int pack_layout(const Document *const *docs, int n, BatchShape shape, Batch *b, Error *err);

// Sets the scales of the losses: `targets` and `noised` (image tokens) count over `packs` micro-batches, a whole step;
// a count of 0 counts as 1.
void pack_scale(Batch *b, BatchShape shape, double ce_weight, int64_t targets, int64_t noised, int packs,
                uint64_t seed);
#endif
