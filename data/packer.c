#include "data/packer.h"

#include <string.h>
#include <stdbool.h>

int pack_choose(const DocumentSize *size, int n, PackRoom room, PackCell *cell, int *chosen) {
  // cell[s].last: the candidate that first completed a subset of s slots; its other members are those of
  // s - size[last].slots, made of earlier candidates only since sums are visited downwards.
  for (int s = 1; s <= room.slots; s++) cell[s].last = -1;
  cell[0] = (PackCell){0, 0, 0};
  int best = 0;
  for (int i = 0; i < n && best < room.slots; i++) {
    int reach = (int)min_i64(room.slots, (int64_t)best + size[i].slots);
    for (int s = reach; s >= size[i].slots; s--) {
      const PackCell *from = &cell[s - size[i].slots];
      if (cell[s].last >= 0 || from->last < 0) continue;
      PackCell sum = {i, from->text + size[i].text, from->images + size[i].images};
      if (sum.text > room.text || sum.images > room.images) continue;
      cell[s] = sum;
      if (s > best) best = s;
    }
  }
  int count = 0;
  for (int s = best; s > 0; s -= size[cell[s].last].slots) chosen[count++] = cell[s].last;
  for (int i = 0, j = count - 1; i < j; i++, j--) {
    int swap = chosen[i];
    chosen[i] = chosen[j];
    chosen[j] = swap;
  }
  return count;
}

// Groups the text rows by id: a stable radix sort (8 bits a pass) between id_row and id_start, which holds its result
// only afterwards.
static void pack_group_ids(Batch *b, BatchShape shape) {
  int n = b->dims->n_text;
  int32_t *from = b->id_row, *to = b->id_start;
  for (int i = 0; i < n; i++) from[i] = i;
  for (int shift = 0; shift < 31 && (shape.vocab - 1) >> shift > 0; shift += 8) {
    int32_t start[257] = {0};
    for (int i = 0; i < n; i++) start[1 + (b->token[i] >> shift & 255)]++;
    for (int i = 0; i < 256; i++) start[i + 1] += start[i];
    for (int i = 0; i < n; i++) to[start[b->token[from[i]] >> shift & 255]++] = from[i];
    int32_t *swap = from;
    from = to;
    to = swap;
  }
  if (from != b->id_row) memcpy(b->id_row, from, (size_t)n * sizeof *from);
  memset(b->id_row + n, 0, (size_t)(shape.slots - n) * sizeof *b->id_row);

  int ids = 0;
  for (int i = 0; i < n; i++) {
    int32_t id = b->token[b->id_row[i]];
    if (ids && b->id[ids - 1] == id) continue;
    b->id_start[ids] = i;
    b->id[ids++] = id;
  }
  b->dims->n_ids = ids;
  b->id_start[ids] = n;
  memset(b->id + ids, 0, (size_t)(shape.slots - ids) * sizeof *b->id);
  memset(b->id_start + ids + 1, 0, (size_t)(shape.slots - ids) * sizeof *b->id_start);
}

// Whether document x goes before y: first position, end. A longer one before a shorter one, else as they lie.
static bool document_before(const int32_t x[2], const int32_t y[2]) {
  int longer = x[1] - x[0] - (y[1] - y[0]);
  return longer ? longer > 0 : x[0] < y[0];
}

// Lists the tiles. At first their places hold the documents, in Shell's order; then the last document's tiles go to
// the end of the list, and so on.
static void pack_tiles(Batch *b) {
  int used = b->dims->n_text + b->dims->n_image, documents = 0, tiles = 0;
  int32_t(*tile)[2] = (int32_t(*)[2])b->tile;
  for (int q = 0; q < used; q++) {
    if (b->doc_start[q] == q) tile[documents++][0] = q;
    tile[documents - 1][1] = q + 1;
  }
  for (int gap = documents / 2; gap > 0; gap /= 2)
    for (int i = gap; i < documents; i++) {
      int32_t moved[2] = {tile[i][0], tile[i][1]};
      int to = i;
      for (; to >= gap && document_before(moved, tile[to - gap]); to -= gap)
        memcpy(tile[to], tile[to - gap], sizeof *tile);
      memcpy(tile[to], moved, sizeof *tile);
    }
  for (int i = 0; i < documents; i++) tiles += (tile[i][1] - tile[i][0] + BATCH_TILE - 1) / BATCH_TILE;
  b->dims->n_tiles = tiles;
  while (documents-- > 0) {
    int end = tile[documents][1];
    for (int first = tile[documents][0]; first < end; first += BATCH_TILE) {
      tile[--tiles][0] = first;
      tile[tiles][1] = end;
    }
  }
}

// Where the next part goes.
typedef struct Cursor {
  int q;           // sequence slot
  int text, image; // rows
  int segment;     // modulation row
  int target;      // entry of target_row
  int doc;         // the document's first and end slots
  int doc_end;
  int place;          // rotary position
  int image_place;    // that of the image before
  bool image_visible; // a clean image precedes in the document
} Cursor;

static void pack_text(const Document *d, const Part *part, BatchShape shape, Batch *b, Cursor *at) {
  const int32_t *token = d->token + part->first; // [part->tokens]
  for (int i = 0; i < part->tokens; i++, at->q++, at->text++, at->place++) {
    int q = at->q, r = at->text;
    int32_t target = d->silent ? -1 : document_target(token, i, part->tokens, shape.vocab);
    b->row[q] = r;
    b->seq[r] = q;
    b->token[r] = token[i];
    b->target[r] = target;
    if (target >= 0) {
      b->target_kind[r] = at->image_visible ? TARGET_CAPTION : TARGET_TEXT;
      b->target_row[at->target++] = r;
    }
    b->position[2 * q] = b->position[2 * q + 1] = at->place;
    b->doc_start[q] = at->doc;
    b->kv_end[q] = q + 1;
    b->q_start[q] = q;
    b->q_end[q] = at->doc_end;
  }
}

// The pooled caption of noised image `index` of the document: the text part before it without boi, and without what
// opens it (bos, or the eoi that ends the image before).
static void pack_caption(const Document *d, int index, BatchShape shape, Batch *b, const Cursor *at) {
  const Part *text = index ? &d->part[index - 1] : NULL;
  if (!text || text->kind != PART_TEXT) return;
  const int32_t *token = d->token + text->first; // [text->tokens]
  SpecialIds id = special_ids(shape.vocab);
  int first = 0, end = text->tokens;
  if (token[0] == id.bos || token[0] == id.eoi) first++;
  if (end > first && token[end - 1] == id.boi) end--;
  if (first == end) return;
  b->cap_start[at->segment] = at->text - text->tokens + first;
  b->cap_end[at->segment] = at->text - text->tokens + end;
  for (int r = b->cap_start[at->segment]; r < b->cap_end[at->segment]; r++) b->pool_segment[r] = at->segment;
}

static void pack_image(const Document *d, int index, BatchShape shape, Batch *b, Cursor *at) {
  const Part *part = &d->part[index];
  bool noised = part->seg_kind == SEGMENT_NOISED && !d->silent;
  int g = at->segment, first = at->q, end = at->q + part->tokens;
  if (part->copy) at->place = at->image_place;
  b->seg_kind[g] = noised ? SEGMENT_NOISED : SEGMENT_CLEAN;
  b->seg_time[g] = noised ? part->time : 1;
  b->seg_ordinal[g] = noised ? part->ordinal : 0;
  b->seg_start[g] = at->image;
  b->seg_len[g] = part->tokens;
  b->seg_doc[g] = d->draw;
  if (noised) pack_caption(d, index, shape, b, at);

  uint8_t *patch = pack_patches(b, shape, at->image - b->dims->n_text);
  size_t bytes = (size_t)part->tokens * (size_t)shape.patch;
  if (!part->patch)
    memset(patch, 0, bytes);
  else if (part->patch != patch)
    memcpy(patch, part->patch, bytes);

  for (int i = 0; i < part->tokens; i++, at->q++, at->image++) {
    int q = at->q;
    b->row[q] = at->image;
    b->seq[at->image] = q;
    b->segment[at->image] = g;
    b->position[2 * q] = at->place + i / part->columns;
    b->position[2 * q + 1] = at->place + i % part->columns;
    b->doc_start[q] = at->doc;
    b->kv_end[q] = end;
    b->q_start[q] = first;
    b->q_end[q] = noised ? end : at->doc_end;
  }
  at->segment++;
  at->image_place = at->place;
  at->place += part->rows > part->columns ? part->rows : part->columns;
  if (!noised) at->image_visible = true;
}

// Everything is set to what an unused entry holds; the arrays before `patch` lie one after the other.
static void pack_clear(BatchShape shape, Batch *b) {
  memset(b->dims, 0, (size_t)((char *)b->patch - (char *)b->dims));
  memset(b->token, 255, (size_t)shape.slots * sizeof *b->token);
  memset(b->target, 255, (size_t)shape.slots * sizeof *b->target);
}

// Sums the documents' sizes into dims and checks that they fit.
static int pack_measure(const Document *const *docs, int n, BatchShape shape, Batch *b, Error *err) {
  int64_t text = 0, image = 0, segments = 1;
  for (int i = 0; i < n; i++) {
    const Document *d = docs[i];
    for (int j = 0; j < d->parts; j++) {
      segments += d->part[j].kind == PART_IMAGE;
      *(d->part[j].kind == PART_IMAGE ? &image : &text) += d->part[j].tokens;
    }
    for (int j = 0; j < d->tokens; j++)
      if (d->token[j] < 0 || d->token[j] >= shape.vocab)
        return error_set(err, "the tokenizer and the model must have the same vocabulary",
                         "pack: token %d of document %d is %d, the vocabulary has %d ids", j, i, d->token[j],
                         shape.vocab);
  }
  if (text + image > shape.slots)
    return error_set(err, "raise data.micro_batch_tokens", "pack: %lld tokens, %d slots", (long long)(text + image),
                     shape.slots);
  if (segments > shape.segments)
    return error_set(err, "raise data.max_images", "pack: %lld images, room for %d", (long long)segments - 1,
                     shape.segments - 1);
  b->dims->n_text = (int32_t)text;
  b->dims->n_image = (int32_t)image;
  b->dims->n_segments = (int32_t)segments;
  return 0;
}

int pack_layout(const Document *const *docs, int n, BatchShape shape, Batch *b, Error *err) {
  pack_clear(shape, b);
  if (pack_measure(docs, n, shape, b, err)) return -1;
  BatchDims *dims = b->dims;
  Cursor at = {.image = dims->n_text, .segment = 1};
  for (int i = 0; i < n; i++) {
    const Document *d = docs[i];
    at.doc = at.doc_end = at.q;
    for (int j = 0; j < d->parts; j++) at.doc_end += d->part[j].tokens;
    at.place = 0;
    at.image_visible = false;
    for (int j = 0; j < d->parts; j++) {
      if (d->part[j].kind == PART_TEXT)
        pack_text(d, &d->part[j], shape, b, &at);
      else
        pack_image(d, j, shape, b, &at);
    }
  }
  for (int q = at.q; q < shape.slots; q++) // filler
    b->row[q] = b->seq[q] = b->doc_start[q] = b->kv_end[q] = b->q_start[q] = b->q_end[q] = q;
  dims->n_target = at.target;
  b->seg_len[0] = dims->n_text;
  pack_group_ids(b, shape);
  pack_tiles(b);
  memset(pack_patches(b, shape, dims->n_image), 0, (size_t)(shape.slots - dims->n_image) * (size_t)shape.patch);
  return 0;
}

void pack_scale(Batch *b, BatchShape shape, double ce_weight, int64_t targets, int64_t noised, int packs,
                uint64_t seed) {
  b->dims->ce_scale = (float)(ce_weight / (double)max_i64(targets, 1));
  b->dims->flow_scale = (float)(1.0 / ((double)max_i64(noised, 1) * shape.patch));
  b->dims->router_scale = (float)(1.0 / packs);
  b->dims->seed_lo = (uint32_t)seed;
  b->dims->seed_hi = (uint32_t)(seed >> 32);
}
