#include "data/document.h"

#include "base/philox.h"
#include "kernels/batch.h"

#include <stdlib.h>
#include <string.h>

void document_reset(Document *d, uint64_t draw) {
  d->draw = draw;
  d->silent = false;
  d->parts = 0;
  d->tokens = 0;
  d->padding = 0;
}

void document_free(Document *d) {
  free(d->part);
  free(d->token);
  *d = (Document){0};
}

static Part *document_add_part(Document *d) {
  if (!d->part || d->parts == d->part_capacity) {
    d->part_capacity = d->part_capacity ? 2 * d->part_capacity : 4;
    d->part = xrealloc(d->part, (size_t)d->part_capacity * sizeof *d->part);
  }
  Part *part = &d->part[d->parts++];
  *part = (Part){0};
  return part;
}

void document_add_text(Document *d, const int32_t *ids, int n) {
  if (n == 0) return;
  if (d->tokens + n > d->token_capacity) {
    d->token_capacity = (int)max_i64(2 * (int64_t)d->token_capacity, d->tokens + n + 16);
    d->token = xrealloc(d->token, (size_t)d->token_capacity * sizeof *d->token);
  }
  memcpy(d->token + d->tokens, ids, (size_t)n * sizeof *ids);
  Part *part = d->parts ? &d->part[d->parts - 1] : NULL;
  if (!part || part->kind != PART_TEXT) {
    part = document_add_part(d);
    part->kind = PART_TEXT;
    part->first = d->tokens;
  }
  part->tokens += n;
  d->tokens += n;
}

static void document_add_token(Document *d, int32_t id) {
  document_add_text(d, &id, 1);
}

Part *document_add_image(Document *d, ImageGrid grid, int seg_kind, float time) {
  int ordinal = 0;
  for (int i = 0; i < d->parts; i++) ordinal += d->part[i].kind == PART_IMAGE && d->part[i].seg_kind == SEGMENT_NOISED;
  Part *part = document_add_part(d);
  part->kind = PART_IMAGE;
  part->rows = grid.rows;
  part->columns = grid.columns;
  part->tokens = grid.rows * grid.columns;
  part->seg_kind = seg_kind;
  part->time = seg_kind == SEGMENT_NOISED ? time : 1;
  part->ordinal = seg_kind == SEGMENT_NOISED ? ordinal : 0;
  return part;
}

void document_text(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, bool eos) {
  SpecialIds id = special_ids(vocab);
  document_reset(d, draw);
  document_add_token(d, id.bos);
  document_add_text(d, ids, n);
  if (eos) document_add_token(d, id.eos);
}

void document_caption_to_image(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, ImageGrid grid,
                               float time) {
  SpecialIds id = special_ids(vocab);
  document_reset(d, draw);
  document_add_token(d, id.bos);
  document_add_text(d, ids, n);
  document_add_token(d, id.boi);
  document_add_image(d, grid, SEGMENT_NOISED, time);
}

void document_image_to_caption(Document *d, uint64_t draw, int vocab, const int32_t *ids, int n, ImageGrid grid) {
  SpecialIds id = special_ids(vocab);
  document_reset(d, draw);
  document_add_token(d, id.bos);
  document_add_token(d, id.boi);
  document_add_image(d, grid, SEGMENT_CLEAN, 1);
  document_add_token(d, id.eoi);
  document_add_text(d, ids, n);
  document_add_token(d, id.eos);
}

void document_interleaved(Document *d, uint64_t draw, int vocab, const Piece *piece, int n, bool noise, float time) {
  SpecialIds id = special_ids(vocab);
  int noised = -1;
  for (int i = 0; noise && i < n; i++)
    if (!piece[i].ids) noised = i;
  document_reset(d, draw);
  document_add_token(d, id.bos);
  for (int i = 0; i < n; i++) {
    if (piece[i].ids) {
      document_add_text(d, piece[i].ids, piece[i].n);
      continue;
    }
    document_add_token(d, id.boi);
    if (i == noised) {
      document_add_image(d, piece[i].grid, SEGMENT_NOISED, time)->tag = piece[i].tag;
      if (i == n - 1) return;
    }
    Part *clean = document_add_image(d, piece[i].grid, SEGMENT_CLEAN, 1);
    clean->tag = piece[i].tag;
    clean->copy = i == noised;
    document_add_token(d, id.eoi);
  }
  document_add_token(d, id.eos);
}

void document_pad(Document *d, int slots, int vocab) {
  int32_t eoi = special_ids(vocab).eoi;
  int n = slots;
  for (int i = 0; i < d->parts; i++) n -= d->part[i].tokens;
  if (n <= 0) return;
  for (int i = 0; i < n; i++) document_add_token(d, eoi);
  d->padding = n;
}

int64_t document_padding_pairs(const Document *d) {
  int64_t seen = -d->padding, n = d->padding;
  for (int i = 0; i < d->parts; i++) {
    bool noised = d->part[i].kind == PART_IMAGE && d->part[i].seg_kind == SEGMENT_NOISED;
    if (!noised || d->silent) seen += d->part[i].tokens;
  }
  return n * seen + n * (n + 1) / 2;
}

DocumentSize document_size(const Document *d, int vocab) {
  DocumentSize size = {0};
  for (int i = 0; i < d->parts; i++) {
    const Part *part = &d->part[i];
    size.slots += part->tokens;
    if (part->kind == PART_IMAGE) {
      size.images++;
      if (part->seg_kind == SEGMENT_NOISED) size.noised += part->tokens;
      continue;
    }
    size.text += part->tokens;
    for (int j = 0; j < part->tokens; j++)
      size.targets += document_target(d->token + part->first, j, part->tokens, vocab) >= 0;
  }
  return size;
}

bool document_chance(uint64_t seed, uint64_t draw, uint32_t stream, double p) {
  return p >= 1 || philox_uniform(philox4(seed, draw, stream, 0).v[0]) < p;
}
