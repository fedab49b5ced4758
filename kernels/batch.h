// One packed micro-batch as the kernels see it: BatchDims and the arrays of a pack, in one block of memory whose layout
// depends on capacities only, so that a pack is uploaded with one copy and its addresses never change.
//
// Two orders. Sequence order is the order of the pack; attention lives in it. Row order is [text | image | filler],
// each part in sequence order; everything else lives in it. `row` and `seq` lead from one to the other.
#ifndef TESSERA_BATCH_H
#define TESSERA_BATCH_H

#include "base/modality.h"

#include <stddef.h>
#include <stdint.h>

enum { SEGMENT_NOISED = 0, SEGMENT_CLEAN = 1 }; // seg_kind
enum { TARGET_TEXT = 0, TARGET_CAPTION = 1 };   // target_kind: plain text, or text that follows an image it can see
enum { BATCH_TILE = 128 };                      // positions of a tile

// Capacities that fix the layout of a pack.
typedef struct BatchShape {
  int slots;    // T
  int segments; // rows of the modulation table: row 0 is text, the others image segments
  int patch;    // elements of a patch, 3p^2
  int vocab;    // V
} BatchShape;

// What changes from pack to pack.
typedef struct BatchDims {
  int32_t n_text, n_image; // rows [0, n_text) are text, [n_text, n_text + n_image) image, all others filler
  int32_t n_segments;      // used modulation rows, row 0 (text) included
  int32_t n_target;        // text rows with a target
  int32_t n_ids;           // distinct token ids among the text rows
  int32_t n_tiles;         // tiles of positions
  float ce_scale;          // what one row's negative log likelihood is multiplied by: ce_weight / targets of the step
  float flow_scale;        // likewise for one element of the flow loss: 1 / (noised image tokens of the step * 3p^2)
  float router_scale;      // 1 / number of micro-batches of the step, all processes
  uint32_t seed_lo, seed_hi;
} BatchDims;

// Pointers into the block. Every array has its full capacity; entries past the used part are 0 (-1 where said).
typedef struct Batch {
  BatchDims *dims;
  int32_t *row;          // [T] sequence -> row
  int32_t *seq;          // [T] row -> sequence
  int32_t *token;        // [T] row order: text id, -1 for image and filler rows
  int32_t *target;       // [T] row order: the id to predict, or -1
  int32_t *target_kind;  // [T] row order: TARGET_TEXT or TARGET_CAPTION where target >= 0
  int32_t *target_row;   // [T] the n_target rows with a target, ascending
  int32_t *segment;      // [T] row order: modulation row; 0 for text and filler
  int32_t *position;     // [T][2] sequence order: (row, column) for rotary
  int32_t *doc_start;    // [T] sequence order: query q attends keys [doc_start[q], kv_end[q]) with q < q_end[k];
  int32_t *kv_end;       // [T]   filler: doc_start = kv_end = q
  int32_t *q_start;      // [T] sequence order: key k is seen by queries [q_start[k], q_end[k]);
  int32_t *q_end;        // [T]   filler: q_start = q_end = k
  int32_t *tile;         // [T][2] sequence order, cut at documents every BATCH_TILE positions: where a tile begins and
                         //   its document ends; the longest document first, the last tile of each first
  int32_t *id;           // [T] by-id token list: distinct ids ascending, the first n_ids entries
  int32_t *id_start;     // [T + 1] id j's rows are id_row[id_start[j] .. id_start[j+1])
  int32_t *id_row;       // [T] text rows grouped by id, ascending within an id
  int32_t *pool_segment; // [T] row order: the noised segment whose pooled caption this text row is part of, or 0
  int32_t *seg_kind;     // [segments] SEGMENT_NOISED or SEGMENT_CLEAN; row 0 is text and unused
  int32_t *seg_start;    // [segments] first row (row order); row 0: 0
  int32_t *seg_len;      // [segments] rows; row 0: n_text
  int32_t *seg_ordinal;  // [segments] which noised image of its document this is: 0, 1, ..
  int32_t *cap_start;    // [segments] pooled caption: text rows [cap_start, cap_end); empty for clean and unconditional
  int32_t *cap_end;      // [segments]
  uint64_t *seg_doc;     // [segments] the document's draw number
  float *seg_time;       // [segments] flow time t; 1 for clean images
  uint8_t *patch;        // [T][3p^2] image rows only, packed: image row r is at patch[(r - n_text) * 3p^2];
                         //   v/127.5 - 1 on the device
} Batch;

// Lays the arrays out from `base` (which may be NULL to measure) and returns the size of the block in bytes.
// `base` must be aligned to 64.
static inline size_t batch_bind(Batch *b, BatchShape s, void *base) {
  char *at = (char *)base;
  size_t used = 0, T = (size_t)s.slots, G = (size_t)s.segments;
#define BATCH_TAKE(field, type, count)                                                                                 \
  do {                                                                                                                 \
    b->field = (type *)(void *)(base ? at + used : NULL);                                                              \
    used += ((count) * sizeof(type) + 63) / 64 * 64;                                                                   \
  } while (0)
  BATCH_TAKE(dims, BatchDims, 1);
  BATCH_TAKE(row, int32_t, T);
  BATCH_TAKE(seq, int32_t, T);
  BATCH_TAKE(token, int32_t, T);
  BATCH_TAKE(target, int32_t, T);
  BATCH_TAKE(target_kind, int32_t, T);
  BATCH_TAKE(target_row, int32_t, T);
  BATCH_TAKE(segment, int32_t, T);
  BATCH_TAKE(position, int32_t, 2 * T);
  BATCH_TAKE(doc_start, int32_t, T);
  BATCH_TAKE(kv_end, int32_t, T);
  BATCH_TAKE(q_start, int32_t, T);
  BATCH_TAKE(q_end, int32_t, T);
  BATCH_TAKE(tile, int32_t, 2 * T);
  BATCH_TAKE(id, int32_t, T);
  BATCH_TAKE(id_start, int32_t, T + 1);
  BATCH_TAKE(id_row, int32_t, T);
  BATCH_TAKE(pool_segment, int32_t, T);
  BATCH_TAKE(seg_kind, int32_t, G);
  BATCH_TAKE(seg_start, int32_t, G);
  BATCH_TAKE(seg_len, int32_t, G);
  BATCH_TAKE(seg_ordinal, int32_t, G);
  BATCH_TAKE(cap_start, int32_t, G);
  BATCH_TAKE(cap_end, int32_t, G);
  BATCH_TAKE(seg_doc, uint64_t, G);
  BATCH_TAKE(seg_time, float, G);
  BATCH_TAKE(patch, uint8_t, T * (size_t)s.patch);
#undef BATCH_TAKE
  return used;
}

// Allowed (query, key) pairs of a pack.
static inline int64_t batch_pairs(const Batch *b) {
  int64_t pairs = 0;
  for (int k = 0; k < b->dims->n_text + b->dims->n_image; k++) pairs += b->q_end[k] - b->q_start[k];
  return pairs;
}
#endif
