#include "tests/ops/op_case.h"
#include "base/base.h"

#include <stdlib.h>

uint64_t case_bits(OpCase *c) { // splitmix64
  uint64_t z = (c->rng += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int case_int(OpCase *c, int lo, int hi) {
  return lo + (int)(case_bits(c) % (uint64_t)(hi - lo + 1));
}

double case_uniform(OpCase *c) {
  return ((double)(case_bits(c) >> 11) + 0.5) * 0x1p-53;
}

double case_normal(OpCase *c) {
  double radius = sqrt(-2 * log(case_uniform(c)));
  return radius * cos(6.283185307179586 * case_uniform(c));
}

static void *own(OpCase *c, size_t bytes) {
  void *p = NULL;
  if (posix_memalign(&p, 64, bytes ? bytes : 1)) panic("the op tests ran out of memory (%zu bytes)", bytes);
  c->owned = xrealloc(c->owned, (size_t)(c->n_owned + 1) * sizeof *c->owned);
  c->owned[c->n_owned++] = p;
  return p;
}

void op_case_init(OpCase *c, uint64_t seed) {
  *c = (OpCase){.rng = seed * 0x2545F4914F6CDD1Du + 1};
  Dims *d = &c->dims;
  d->T = case_int(c, 40, 90);
  d->C = case_int(c, 5, 40);
  d->G = case_int(c, 1, 3);
  d->H = d->G * case_int(c, 1, 3);
  d->D = 2 * case_int(c, 1, 9);
  int patch = case_int(c, 1, 4);
  d->P = 3 * patch * patch;
  d->V = case_int(c, 12, 60);
  d->Z = case_int(c, 3, 24);
  d->L = case_int(c, 1, 3);
  d->M = 6 * d->C * d->L + 2 * d->C;
  d->segments = case_int(c, 4, 12);
  for (int m = 0; m < MODALITIES; m++) {
    d->E[m] = case_int(c, 1, 6);
    d->K[m] = case_int(c, 1, d->E[m] < 4 ? d->E[m] : 4);
    d->F[m] = case_int(c, 1, 20);
    d->S[m] = case_int(c, 0, 1) ? case_int(c, 1, 20) : 0;
  }
}

void op_case_init_large(OpCase *c, int number) {
  op_case_init(c, 9000 + (uint64_t)number);
  Dims *d = &c->dims;
  d->T = (const int[LARGE_CASES]){331, 407, 290}[number];
  d->C = (const int[LARGE_CASES]){133, 70, 195}[number]; // blocks of 64
  d->Z = 67;
  d->V = (const int[LARGE_CASES]){270, 90, 131}[number];
  d->P = 3 * 25;
  d->L = 1;
  d->M = 8 * d->C; // blocks of 256
  d->segments = 24;
  c->image_side = 11;
}

bool op_case_is_large(const OpCase *c) {
  return c->image_side > 4;
}

void op_case_free(OpCase *c) {
  for (int i = 0; i < c->n_owned; i++) free(c->owned[i]);
  free(c->owned);
  *c = (OpCase){0};
}

// The pack. Slots are first laid out in sequence order, then given rows.

typedef struct Slot {
  int modality, segment; // segment: number in order of appearance from 1; 0 for text
  int token, target, kind, pool;
  int doc_start, kv_end, q_start, q_end, row, column;
} Slot;

typedef struct Layout {
  OpCase *c;
  Slot *slot; // [T]
  int used, segments;
  int doc, at, next_position; // current document: first slot, and position of its next text token
  int caption;                // first slot of the text run that would caption the next image
  int ordinal, seen_clean;
  uint64_t draw;
  int *seg_kind, *seg_slot, *seg_len, *seg_ordinal, *cap_slot, *cap_end;
  uint64_t *seg_doc;
} Layout;

enum { BOS = 4, EOS = 3, BOI = 2, EOI = 1 }; // from the end of the vocabulary

static void doc_begin(Layout *l) {
  l->doc = l->used;
  l->next_position = 0;
  l->caption = l->used;
  l->ordinal = l->seen_clean = 0;
  l->draw = case_bits(l->c) >> 8;
}

static void put_text(Layout *l, int id) {
  int q = l->used++, p = l->next_position++;
  l->slot[q] = (Slot){.modality = TEXT,
                      .token = id,
                      .target = -1,
                      .kind = l->seen_clean ? TARGET_CAPTION : TARGET_TEXT,
                      .doc_start = l->doc,
                      .kv_end = q + 1,
                      .q_start = q,
                      .row = p,
                      .column = p};
}

static void put_special(Layout *l, int special) {
  put_text(l, l->c->dims.V - special);
  l->caption = l->used;
}

static void put_words(Layout *l, int n) {
  for (int i = 0; i < n; i++) put_text(l, case_int(l->c, 0, l->c->dims.V - 5));
}

// An image of h x w tokens. A noised one takes the text since the last special token or image as its caption.
static void put_image(Layout *l, int h, int w, int kind, bool boi) {
  int caption_end = l->used;
  if (boi) put_text(l, l->c->dims.V - BOI);
  int g = ++l->segments, start = l->used;
  for (int i = 0; i < h * w; i++)
    l->slot[l->used++] = (Slot){.modality = IMAGE,
                                .segment = g,
                                .token = -1,
                                .target = -1,
                                .doc_start = l->doc,
                                .kv_end = start + h * w,
                                .q_start = start,
                                .row = l->next_position + i / w,
                                .column = l->next_position + i % w};
  l->next_position += h > w ? h : w;
  l->seg_kind[g] = kind;
  l->seg_slot[g] = start;
  l->seg_len[g] = h * w;
  l->seg_doc[g] = l->draw;
  l->seg_ordinal[g] = kind == SEGMENT_NOISED ? l->ordinal++ : 0;
  l->cap_slot[g] = kind == SEGMENT_NOISED ? l->caption : 0;
  l->cap_end[g] = kind == SEGMENT_NOISED ? caption_end : 0;
  for (int q = l->cap_slot[g]; q < l->cap_end[g]; q++) l->slot[q].pool = g;
  l->caption = l->used;
  l->seen_clean |= kind == SEGMENT_CLEAN;
}

// Closes the document: what depends on the tokens after. A target is the next token if it is text; boi has none, eoi is
// none. Text sees to the document's end, a noised image is seen by itself alone.
static void doc_end(Layout *l) {
  int V = l->c->dims.V, end = l->used;
  for (int q = l->doc; q < end; q++) {
    Slot *s = &l->slot[q], *next = q + 1 < end ? s + 1 : NULL;
    if (s->modality == TEXT && s->token != V - BOI && next && next->modality == TEXT && next->token != V - EOI)
      s->target = next->token;
    bool hidden = s->modality == IMAGE && l->seg_kind[s->segment] == SEGMENT_NOISED;
    s->q_end = hidden ? s->kv_end : end;
  }
}

// One random document; false when it does not fit any more.
static bool put_document(Layout *l, PackKind pack) {
  OpCase *c = l->c;
  int left = c->dims.T - l->used, left_segments = c->dims.segments - 1 - l->segments;
  int side = c->image_side ? c->image_side : 4;
  int h = case_int(c, 1, side), w = case_int(c, 1, side), n = case_int(c, 1, 9);
  int kind = pack == PACK_TEXT ? case_int(c, 0, 1) : pack == PACK_IMAGE ? 2 : case_int(c, 0, 6);
  int images = kind < 2 ? 0 : kind == 6 ? 3 : 1, need = 3 * n + 12 + images * h * w;
  if (left < need || left_segments < images) return false;
  doc_begin(l);
  switch (kind) {
  case 0: // text
    put_special(l, BOS);
    put_words(l, n);
    put_special(l, EOS);
    break;
  case 1: // one token
    put_words(l, 1);
    break;
  case 2: // an image and nothing else
    put_image(l, h, w, case_int(c, 0, 1), false);
    break;
  case 3: // caption to image
    put_special(l, BOS);
    put_words(l, n);
    put_image(l, h, w, SEGMENT_NOISED, true);
    break;
  case 4: // image to caption
    put_special(l, BOS);
    put_image(l, h, w, SEGMENT_CLEAN, true);
    put_special(l, EOI);
    put_words(l, n);
    put_special(l, EOS);
    break;
  case 5: // unconditional
    put_special(l, BOS);
    put_image(l, h, w, SEGMENT_NOISED, true);
    break;
  default: // interleaved: an image drawn, then read, then another drawn
    put_special(l, BOS);
    put_words(l, n);
    put_image(l, h, w, SEGMENT_NOISED, true);
    put_image(l, h, w, SEGMENT_CLEAN, true);
    put_special(l, EOI);
    put_words(l, case_int(c, 0, n));
    put_image(l, h, w, SEGMENT_NOISED, true);
    put_special(l, EOI);
    put_words(l, n);
    put_special(l, EOS);
  }
  doc_end(l);
  return true;
}

// Rows from slots: [text | image | filler], each in sequence order.
static void assign_rows(Layout *l) {
  OpCase *c = l->c;
  Batch *b = &c->batch;
  int T = c->dims.T, row = 0;
  for (int m = TEXT; m <= IMAGE; m++) {
    for (int q = 0; q < l->used; q++) {
      if (l->slot[q].modality != m) continue;
      b->row[q] = row;
      b->seq[row++] = q;
    }
    *(m == TEXT ? &b->dims->n_text : &b->dims->n_image) = m == TEXT ? row : row - b->dims->n_text;
  }
  for (int q = l->used; q < T; q++) {
    b->row[q] = b->seq[q] = q;
    b->doc_start[q] = b->kv_end[q] = b->q_start[q] = b->q_end[q] = q;
    b->token[q] = b->target[q] = -1;
  }
  for (int q = 0; q < l->used; q++) {
    const Slot *s = &l->slot[q];
    int r = b->row[q];
    b->token[r] = s->token;
    b->target[r] = s->target;
    b->target_kind[r] = s->target >= 0 ? s->kind : 0;
    b->segment[r] = s->segment;
    b->pool_segment[r] = s->pool;
    b->position[2 * q] = s->row;
    b->position[2 * q + 1] = s->column;
    b->doc_start[q] = s->doc_start;
    b->kv_end[q] = s->kv_end;
    b->q_start[q] = s->q_start;
    b->q_end[q] = s->q_end;
  }
}

// The lists derived from rows: targets, tokens by id.
static void make_lists(OpCase *c) {
  Batch *b = &c->batch;
  BatchDims *d = b->dims;
  for (int r = 0; r < d->n_text; r++)
    if (b->target[r] >= 0) b->target_row[d->n_target++] = r;
  int at = 0;
  for (int id = 0; id < c->dims.V; id++) {
    int first = at;
    for (int r = 0; r < d->n_text; r++)
      if (b->token[r] == id) b->id_row[at++] = r;
    if (at == first) continue;
    b->id[d->n_ids] = id;
    b->id_start[d->n_ids++] = first;
    b->id_start[d->n_ids] = at;
  }
}

// Tiles of documents, the longest first.
static void make_tiles(Layout *l) {
  Batch *b = &l->c->batch;
  int n = 0;
  for (int length = l->used; length > 0; length--)
    for (int q = 0, end; q < l->used; q = end) {
      for (end = q; end < l->used && b->doc_start[end] == q;) end++;
      if (end - q != length) continue;
      for (int first = q + (length - 1) / BATCH_TILE * BATCH_TILE; first >= q; first -= BATCH_TILE, n++)
        b->tile[2 * n] = first, b->tile[2 * n + 1] = end;
    }
  b->dims->n_tiles = n;
}

static void make_segments(Layout *l) {
  OpCase *c = l->c;
  Batch *b = &c->batch;
  b->dims->n_segments = l->segments + 1;
  b->seg_len[0] = b->dims->n_text;
  for (int g = 1; g <= l->segments; g++) {
    bool captioned = l->cap_end[g] > l->cap_slot[g];
    b->seg_kind[g] = l->seg_kind[g];
    b->seg_start[g] = b->row[l->seg_slot[g]];
    b->seg_len[g] = l->seg_len[g];
    b->seg_ordinal[g] = l->seg_ordinal[g];
    b->seg_doc[g] = l->seg_doc[g];
    b->cap_start[g] = captioned ? b->row[l->cap_slot[g]] : 0;
    b->cap_end[g] = captioned ? b->cap_start[g] + l->cap_end[g] - l->cap_slot[g] : 0;
    // One in eight lies above 1 - t_floor.
    double t = case_int(c, 0, 7) ? 0.02 + 0.9 * case_uniform(c) : 0.97;
    b->seg_time[g] = l->seg_kind[g] == SEGMENT_CLEAN ? 1.0f : (float)t;
  }
  for (int64_t i = 0; i < (int64_t)b->dims->n_image * c->dims.P; i++) b->patch[i] = (uint8_t)case_int(c, 0, 255);
}

void op_case_pack(OpCase *c, PackKind kind) {
  BatchShape shape = dims_batch_shape(&c->dims);
  size_t bytes = batch_bind(&c->batch, shape, NULL), G = (size_t)c->dims.segments;
  batch_bind(&c->batch, shape, case_bytes(c, bytes, 0));
  Layout l = {.c = c, .slot = xcalloc((size_t)c->dims.T, sizeof(Slot)), .seg_doc = xcalloc(G, sizeof(uint64_t))};
  int *arrays = xcalloc(6 * G, sizeof(int));
  int **field[6] = {&l.seg_kind, &l.seg_slot, &l.seg_len, &l.seg_ordinal, &l.cap_slot, &l.cap_end};
  for (size_t i = 0; i < 6; i++) *field[i] = arrays + i * G;

  int failures = kind == PACK_EMPTY ? 20 : 0;
  while (failures < 20) failures += !put_document(&l, kind);
  while (kind == PACK_FULL && l.used < c->dims.T) {
    doc_begin(&l);
    put_words(&l, 1);
    doc_end(&l);
  }
  assign_rows(&l);
  make_segments(&l);
  make_lists(c);
  make_tiles(&l);
  c->batch.dims->ce_scale = (float)(0.01 + 0.1 * case_uniform(c));
  c->batch.dims->flow_scale = (float)(0.001 + 0.01 * case_uniform(c));
  c->batch.dims->router_scale = (float)(0.2 + 0.8 * case_uniform(c));
  c->batch.dims->seed_lo = (uint32_t)case_bits(c);
  c->batch.dims->seed_hi = (uint32_t)case_bits(c);
  free(l.slot);
  free(l.seg_doc);
  free(arrays);
}

// Operands.

real *case_random(OpCase *c, int64_t n, double std) {
  real *x = own(c, (size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = (real)(std * case_normal(c));
  return x;
}

real *case_poison(OpCase *c, int64_t n) {
  real *x = own(c, (size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = (real)NAN;
  return x;
}

real *case_copy(OpCase *c, const real *x, int64_t n) {
  real *y = own(c, (size_t)n * sizeof *y);
  memcpy(y, x, (size_t)n * sizeof *y);
  return y;
}

void *case_bytes(OpCase *c, size_t bytes, int fill) {
  return memset(own(c, bytes), fill, bytes);
}

double *case_double(OpCase *c, const real *x, int64_t n) {
  double *y = own(c, (size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) y[i] = (double)x[i];
  return y;
}

double *case_zeros(OpCase *c, int64_t n) {
  return case_bytes(c, (size_t)n * sizeof(double), 0);
}

void op_run(const OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out) {
  KernelCall call = {.batch = &c->batch, .dims = &c->dims, .args = &args};
  memcpy(call.in.at, in, sizeof call.in.at);
  memcpy(call.out.at, out, sizeof call.out.at);
  backend_cpu.fn[kind](&call);
}

double norm_of(const real *x, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i];
  return sqrt(s);
}

double relative_error(const real *got, const double *want, int64_t n) {
  double diff = 0, a = 0, b = 0;
  for (int64_t i = 0; i < n; i++) {
    double g = (double)got[i], w = want[i];
    if (!isfinite(g) || !isfinite(w)) return INFINITY;
    diff += (g - w) * (g - w);
    a += g * g;
    b += w * w;
  }
  double scale = a > b ? a : b;
  return scale > 0 ? sqrt(diff / scale) : 0;
}

bool all_zero(const real *x, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (!(x[i] == 0)) return false;
  return true;
}

bool same_bits(const void *a, const void *b, size_t bytes) {
  return memcmp(a, b, bytes) == 0;
}

// The same along a random direction of length 1: a wrong block of a large gradient is as visible as a wrong gradient of
// that size. Relative to what a direction finds on average, |grad| / sqrt(n).
static double direction_error(OpCase *c, double (*loss)(void *), void *context, double *x, const real *grad,
                              int64_t n) {
  const double h = 1e-3;
  double *kept = xmalloc((size_t)n * sizeof *kept), *direction = xmalloc((size_t)n * sizeof *direction);
  double squares = 0, got = 0, size = 0, side[2];
  for (int64_t i = 0; i < n; i++) {
    direction[i] = case_normal(c);
    squares += direction[i] * direction[i];
  }
  memcpy(kept, x, (size_t)n * sizeof *kept);
  for (int64_t i = 0; i < n; i++) {
    direction[i] /= sqrt(squares);
    got += (double)grad[i] * direction[i];
    size += (double)grad[i] * (double)grad[i];
  }
  for (int s = 0; s < 2; s++) {
    for (int64_t i = 0; i < n; i++) x[i] = kept[i] + (s ? -h : h) * direction[i];
    side[s] = loss(context);
  }
  memcpy(x, kept, (size_t)n * sizeof *kept);
  free(kept);
  free(direction);
  double want = (side[0] - side[1]) / (2 * h), scale = fmax(sqrt(size / (double)n), fabs(want));
  return scale > 0 ? fabs(got - want) / scale : 0;
}

double gradient_error(OpCase *c, double (*loss)(void *), void *context, double *x, const real *grad, int64_t n,
                      int max_checked) {
  const double h = 1e-5;
  int64_t checked = min_i64(n, max_checked);
  real *got = xmalloc((size_t)(checked + 1) * sizeof *got);
  double *want = xmalloc((size_t)(checked + 1) * sizeof *want);
  for (int64_t k = 0; k < checked; k++) {
    int64_t i = checked == n ? k : (int64_t)(case_bits(c) % (uint64_t)n);
    double keep = x[i];
    x[i] = keep + h;
    double up = loss(context);
    x[i] = keep - h;
    double down = loss(context);
    x[i] = keep;
    want[k] = (up - down) / (2 * h);
    got[k] = grad[i];
  }
  double error = relative_error(got, want, checked);
  for (int k = 0; k < 3 && checked < n; k++) {
    double along = direction_error(c, loss, context, x, grad, n);
    if (!(along <= error)) error = along; // NaN too
  }
  free(got);
  free(want);
  return error;
}

double probe_loss(void *probe) {
  const Probe *p = probe;
  op_run(p->c, p->kind, p->args, p->in, p->out);
  double sum = 0;
  for (int k = 0; k < OP_MAX_OUT; k++) {
    const real *out = p->out[k];
    for (int64_t i = 0; i < p->n[k]; i++) sum += (double)p->seed[k][i] * (double)out[i];
  }
  return sum;
}
