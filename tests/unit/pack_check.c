// It knows the meaning of the arrays (kernels/batch.h), not how they were made.
#include "tests/unit/pack_check.h"

#include "data/tokenizer.h"

#include <stdbool.h>

#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    if (!(condition)) return error_set(err, NULL, "pack: " __VA_ARGS__);                                               \
  } while (0)

static int check_order(const Batch *b, BatchShape shape, Error *err) {
  const BatchDims *dims = b->dims;
  int T = shape.slots, text = dims->n_text, used = text + dims->n_image;
  CHECK(text >= 0 && dims->n_image >= 0 && used <= T, "%d text and %d image rows in %d slots", text, dims->n_image, T);
  CHECK(dims->n_segments >= 1 && dims->n_segments <= shape.segments, "%d segments, room for %d", dims->n_segments,
        shape.segments);
  for (int r = 0; r < T; r++) {
    CHECK(b->seq[r] >= 0 && b->seq[r] < T && b->row[b->seq[r]] == r, "row %d: seq is not the inverse of row", r);
    CHECK(r == 0 || r == text || b->seq[r] > b->seq[r - 1], "row %d: not in sequence order", r);
    CHECK(r < used || b->seq[r] == r, "row %d: filler is not at the end", r);
    bool in_vocabulary = b->token[r] >= 0 && b->token[r] < shape.vocab;
    CHECK(r < text ? in_vocabulary : b->token[r] == -1, "row %d: token %d", r, b->token[r]);
  }
  for (size_t i = (size_t)dims->n_image * (size_t)shape.patch; i < (size_t)T * (size_t)shape.patch; i++)
    CHECK(b->patch[i] == 0, "byte %zu of the unused patches is not 0", i);
  return 0;
}

static int check_segments(const Batch *b, BatchShape shape, Error *err) {
  const BatchDims *dims = b->dims;
  CHECK(b->seg_start[0] == 0 && b->seg_len[0] == dims->n_text, "segment 0 is not the text");
  int row = dims->n_text;
  for (int r = 0; r < shape.slots; r++)
    CHECK((r >= row && r < row + dims->n_image) || b->segment[r] == 0, "row %d: segment %d", r, b->segment[r]);
  for (int g = 1; g < dims->n_segments; g++) {
    CHECK(b->seg_start[g] == row && b->seg_len[g] >= 1 && b->seg_len[g] <= dims->n_text + dims->n_image - row,
          "segment %d: rows %d + %d", g, b->seg_start[g], b->seg_len[g]);
    for (int i = 0; i < b->seg_len[g]; i++, row++) {
      CHECK(b->segment[row] == g, "row %d: segment %d, not %d", row, b->segment[row], g);
      CHECK(b->seq[row] == b->seq[b->seg_start[g]] + i, "segment %d is not one piece of the sequence", g);
    }
    bool noised = b->seg_kind[g] == SEGMENT_NOISED;
    CHECK(noised || b->seg_kind[g] == SEGMENT_CLEAN, "segment %d: kind %d", g, b->seg_kind[g]);
    CHECK(noised ? b->seg_time[g] >= 0 && b->seg_time[g] <= 1 : b->seg_time[g] == 1, "segment %d: time %g", g,
          (double)b->seg_time[g]);
    CHECK(noised || (b->cap_start[g] == b->cap_end[g] && b->seg_ordinal[g] == 0),
          "segment %d: clean, yet has a caption", g);
  }
  CHECK(row == dims->n_text + dims->n_image, "the segments end at row %d", row);
  for (int g = dims->n_segments; g < shape.segments; g++)
    CHECK(!b->seg_kind[g] && !b->seg_start[g] && !b->seg_len[g] && !b->seg_ordinal[g] && !b->cap_start[g] &&
              !b->cap_end[g] && !b->seg_doc[g] && b->seg_time[g] == 0,
          "segment %d: unused, yet not 0", g);
  return 0;
}

// Every pair of the document in slots [first, end), in both forms of the mask; the intervals stay inside it, so no
// other pair is allowed.
static int check_mask(const Batch *b, int first, int end, Error *err) {
  for (int q = first; q < end; q++) {
    CHECK(b->kv_end[q] > q && b->kv_end[q] <= end && b->q_start[q] >= first && b->q_end[q] <= end,
          "slot %d: a mask interval leaves the document [%d, %d)", q, first, end);
    CHECK(q == 0 || (b->kv_end[q] >= b->kv_end[q - 1] && b->q_start[q] >= b->q_start[q - 1]),
          "slot %d: kv_end or q_start decreases", q);
    int own = b->segment[b->row[q]];
    for (int k = first; k < end; k++) {
      int other = b->segment[b->row[k]];
      bool hidden = other && b->seg_kind[other] == SEGMENT_NOISED && other != own;
      bool allowed = (k <= q || (own && own == other)) && !hidden;
      CHECK(allowed == (k < b->kv_end[q] && q < b->q_end[k]), "query %d, key %d: the query's interval is wrong", q, k);
      CHECK(allowed == (q >= b->q_start[k] && q < b->q_end[k]), "query %d, key %d: the key's interval is wrong", q, k);
    }
  }
  return 0;
}

// Rotary positions and targets of the document in slots [first, end).
static int check_text(const Batch *b, BatchShape shape, int first, int end, Error *err) {
  SpecialIds id = special_ids(shape.vocab);
  int place = 0, targets = 0, expected = 0, images = 0, noised = 0;
  bool visible = false;
  for (int q = first; q < end; q++) targets += b->target[b->row[q]] >= 0;
  for (int q = first; q < end;) {
    int r = b->row[q], g = b->segment[r];
    if (g == 0) {
      int32_t next = q + 1 < end ? b->token[b->row[q + 1]] : -1; // -1 for image rows as well
      if (b->token[r] == id.boi || next == id.eoi) next = -1;
      expected += next >= 0;
      CHECK(b->target[r] == (targets ? next : -1), "row %d: target %d, not %d", r, b->target[r], next);
      int kind = b->target[r] >= 0 && visible ? TARGET_CAPTION : TARGET_TEXT;
      CHECK(b->target_kind[r] == kind, "row %d: target_kind %d", r, b->target_kind[r]);
      CHECK(b->position[2 * q] == place && b->position[2 * q + 1] == place, "slot %d: position (%d, %d), not %d twice",
            q, b->position[2 * q], b->position[2 * q + 1], place);
      q++;
      place++;
      continue;
    }
    int columns = 1, n = b->seg_len[g], before = q > first ? b->segment[b->row[q - 1]] : 0;
    // An image may stand where the noised one just before it stands.
    if (before && b->seg_kind[g] == SEGMENT_CLEAN && b->position[2 * q] != place)
      place = b->position[2 * b->seq[b->seg_start[before]]];
    while (columns < n && b->position[2 * (q + columns)] == b->position[2 * q]) columns++;
    CHECK(n % columns == 0, "segment %d: %d tokens in rows of %d", g, n, columns);
    for (int i = 0; i < n; i++)
      CHECK(b->position[2 * (q + i)] == place + i / columns && b->position[2 * (q + i) + 1] == place + i % columns,
            "slot %d: position (%d, %d) in an image at %d", q + i, b->position[2 * (q + i)],
            b->position[2 * (q + i) + 1], place);
    place += n / columns > columns ? n / columns : columns;
    visible = visible || b->seg_kind[g] == SEGMENT_CLEAN;
    noised += b->seg_kind[g] == SEGMENT_NOISED;
    images++;
    q += n;
  }
  CHECK(targets == expected || (images && !noised), "the document at slot %d has lost its targets", first);
  return 0;
}

// Image segments of the document in slots [first, end): draw number, ordinal and pooled caption.
static int check_captions(const Batch *b, BatchShape shape, int first, int end, Error *err) {
  int ordinal = 0, open = first, document = 0; // `open`: where the text since the image before begins
  for (int q = first; q < end;) {
    int g = b->segment[b->row[q]];
    if (g == 0) {
      q++;
      continue;
    }
    CHECK(!document || b->seg_doc[g] == b->seg_doc[document], "segment %d: another draw number in one document", g);
    document = g;
    if (b->seg_kind[g] == SEGMENT_NOISED) {
      CHECK(b->seg_ordinal[g] == ordinal, "segment %d: ordinal %d, not %d", g, b->seg_ordinal[g], ordinal);
      ordinal++;
    }
    int count = 0;
    for (int k = open; k < q; k++) {
      int r = b->row[k];
      bool pooled = b->seg_kind[g] == SEGMENT_NOISED && b->token[r] < special_ids(shape.vocab).bos;
      bool listed = r >= b->cap_start[g] && r < b->cap_end[g];
      CHECK(pooled == listed && b->pool_segment[r] == (pooled ? g : 0), "row %d: pooled by segment %d, range [%d, %d)",
            r, b->pool_segment[r], b->cap_start[g], b->cap_end[g]);
      count += pooled;
    }
    CHECK(b->cap_end[g] - b->cap_start[g] == count, "segment %d: %d rows pooled, not %d", g,
          b->cap_end[g] - b->cap_start[g], count);
    for (open = q; open < end && b->segment[b->row[open]] == g;)
      CHECK(!b->pool_segment[b->row[open++]], "pooled image");
    q = open;
  }
  for (int q = open; q < end; q++)
    CHECK(b->pool_segment[b->row[q]] == 0, "row %d: pooled without an image after it", b->row[q]);
  return 0;
}

static int check_lists(const Batch *b, BatchShape shape, Error *err) {
  const BatchDims *dims = b->dims;
  int targets = 0;
  for (int r = 0; r < shape.slots; r++) {
    if (b->target[r] == -1) continue;
    CHECK(r < dims->n_text && b->target_row[targets] == r, "row %d is missing in target_row", r);
    targets++;
  }
  CHECK(targets == dims->n_target, "%d rows have a target, dims say %d", targets, dims->n_target);
  CHECK(dims->n_ids >= 0 && dims->n_ids <= dims->n_text && b->id_start[0] == 0 &&
            b->id_start[dims->n_ids] == dims->n_text,
        "the by-id list does not cover the text");
  for (int j = 0; j < dims->n_ids; j++) {
    CHECK(j == 0 || b->id[j] > b->id[j - 1], "by-id entry %d: ids do not ascend", j);
    CHECK(b->id_start[j + 1] > b->id_start[j] && b->id_start[j + 1] <= dims->n_text, "by-id entry %d: no rows", j);
    for (int i = b->id_start[j]; i < b->id_start[j + 1]; i++) {
      int r = b->id_row[i];
      CHECK(r >= 0 && r < dims->n_text && b->token[r] == b->id[j], "by-id entry %d: row %d has another id", j, r);
      CHECK(i == b->id_start[j] || r > b->id_row[i - 1], "by-id entry %d: rows do not ascend", j);
    }
  }
  for (int i = 0; i < shape.slots; i++)
    CHECK((i < targets || !b->target_row[i]) && (i < dims->n_ids || (!b->id[i] && !b->id_start[i + 1])) &&
              (i < dims->n_text || (!b->id_row[i] && !b->pool_segment[i] && !b->target_kind[i])),
          "entry %d of a list is unused, yet not 0", i);
  return 0;
}

// Every document in tiles, one behind the other from its last to its first, the longest document first.
static int check_tiles(const Batch *b, BatchShape shape, Error *err) {
  const BatchDims *dims = b->dims;
  int used = dims->n_text + dims->n_image, covered = 0, i = 0;
  CHECK(dims->n_tiles >= 0 && dims->n_tiles <= used, "%d tiles of %d positions", dims->n_tiles, used);
  for (int length = shape.slots, start = 0; i < dims->n_tiles;) {
    int first = b->tile[2 * i], end = b->tile[2 * i + 1], before = start;
    CHECK(first >= 0 && first < used && end > first && end <= used, "tile %d: [%d, %d)", i, first, end);
    start = b->doc_start[first];
    CHECK(b->doc_start[end - 1] == start && (end == used || b->doc_start[end] == end),
          "tile %d: no document ends at %d", i, end);
    CHECK(end - start < length || (end - start == length && (!covered || start > before)),
          "tile %d: a document of %d after one of %d", i, end - start, length);
    length = end - start;
    for (int at = start + (length - 1) / BATCH_TILE * BATCH_TILE; at >= start; at -= BATCH_TILE, i++)
      CHECK(i < dims->n_tiles && b->tile[2 * i] == at && b->tile[2 * i + 1] == end, "tile %d: not at %d", i, at);
    covered += length;
  }
  CHECK(covered == used, "tiles of %d positions, not %d", covered, used);
  for (; i < shape.slots; i++) CHECK(!b->tile[2 * i] && !b->tile[2 * i + 1], "tile %d is unused, yet not 0", i);
  return 0;
}

int pack_check(const Batch *b, BatchShape shape, Error *err) {
  if (check_order(b, shape, err) || check_segments(b, shape, err) || check_lists(b, shape, err) ||
      check_tiles(b, shape, err))
    return -1;
  int used = b->dims->n_text + b->dims->n_image;
  for (int first = 0, end; first < used; first = end) {
    for (end = first; end < used && b->doc_start[end] == first;) end++;
    CHECK(end > first, "slot %d: document start %d", first, b->doc_start[first]);
    if (check_mask(b, first, end, err) || check_text(b, shape, first, end, err) ||
        check_captions(b, shape, first, end, err))
      return -1;
  }
  for (int q = used; q < shape.slots; q++) {
    CHECK(b->doc_start[q] == q && b->kv_end[q] == q && b->q_start[q] == q && b->q_end[q] == q,
          "slot %d: filler attends or is attended", q);
    CHECK(b->position[2 * q] == 0 && b->position[2 * q + 1] == 0, "slot %d: filler has a position", q);
  }
  return 0;
}
