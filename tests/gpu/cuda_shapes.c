#include "tests/gpu/cuda_shapes.h"

#include "base/base.h"
#include "data/packer.h"

#include <stdlib.h>

#define BOTH(a, b)                                                                                                     \
  { (a), (b) }

// clang-format off
const CudaShape cuda_shapes[] = {
    {"demo", PACK_MIXED, ROUTE_ANY,
     {.T = 128, .segments = 12, .C = 128, .H = 4, .G = 2, .D = 32, .P = 192, .V = 512, .Z = 128, .L = 2,
      .E = BOTH(4, 4), .K = BOTH(2, 2), .F = BOTH(128, 192), .S = BOTH(0, 0)}},
    {"least", PACK_MIXED, ROUTE_ANY, // but for a vocabulary that no block of HEAD_CE holds a row of
     {.T = 64, .segments = 6, .C = 128, .H = 1, .G = 1, .D = 32, .P = 48, .V = 20000, .Z = 64, .L = 1,
      .E = BOTH(1, 2), .K = BOTH(1, 1), .F = BOTH(8, 16), .S = BOTH(8, 0)}},
    {"no filler", PACK_FULL, ROUTE_ANY,
     {.T = 259, .segments = 40, .C = 200, .H = 5, .G = 5, .D = 64, .P = 48, .V = 520, .Z = 72, .L = 1,
      .E = BOTH(3, 1), .K = BOTH(1, 1), .F = BOTH(40, 24), .S = BOTH(24, 0)}},
    {"text only", PACK_TEXT, ROUTE_ANY,
     {.T = 201, .segments = 4, .C = 128, .H = 3, .G = 1, .D = 128, .P = 48, .V = 512, .Z = 64, .L = 1,
      .E = BOTH(5, 4), .K = BOTH(3, 2), .F = BOTH(64, 48), .S = BOTH(0, 32)}},
    {"images only", PACK_IMAGE, ROUTE_ANY,
     {.T = 327, .segments = 64, .C = 512, .H = 8, .G = 8, .D = 64, .P = 768, .V = 1000, .Z = 64, .L = 1,
      .E = BOTH(4, 6), .K = BOTH(1, 4), .F = BOTH(72, 136), .S = BOTH(16, 16)}},
    {"empty", PACK_EMPTY, ROUTE_ANY,
     {.T = 130, .segments = 8, .C = 256, .H = 4, .G = 4, .D = 32, .P = 48, .V = 512, .Z = 64, .L = 1,
      .E = BOTH(2, 3), .K = BOTH(2, 1), .F = BOTH(32, 64), .S = BOTH(32, 40)}},
    {"one expert", PACK_LONG, ROUTE_ONE,
     {.T = 1777, .segments = 24, .C = 768, .H = 12, .G = 4, .D = 64, .P = 192, .V = 4096, .Z = 256, .L = 1,
      .E = BOTH(8, 8), .K = BOTH(2, 1), .F = BOTH(512, 768), .S = BOTH(256, 0)}},
    {"idle experts", PACK_MIXED, ROUTE_EVEN,
     {.T = 1000, .segments = 100, .C = 256, .H = 8, .G = 2, .D = 32, .P = 48, .V = 2048, .Z = 64, .L = 2,
      .E = BOTH(64, 16), .K = BOTH(4, 8), .F = BOTH(32, 40), .S = BOTH(0, 0)}},
    {"many experts", PACK_LONG, ROUTE_ANY, // more than one pass of the router's kernels takes
     {.T = 900, .segments = 24, .C = 128, .H = 2, .G = 2, .D = 32, .P = 48, .V = 8000, .Z = 64, .L = 1,
      .E = BOTH(192, 72), .K = BOTH(8, 3), .F = BOTH(16, 24), .S = BOTH(0, 0)}},
    {"wide", PACK_FULL, ROUTE_ANY,
     {.T = 137, .segments = 16, .C = 4096, .H = 32, .G = 8, .D = 128, .P = 768, .V = 2048, .Z = 256, .L = 1,
      .E = BOTH(4, 2), .K = BOTH(2, 1), .F = BOTH(264, 520), .S = BOTH(0, 0)}},
    {"base", PACK_LONG, ROUTE_ANY,
     {.T = 1500, .segments = 16, .C = 2048, .H = 16, .G = 4, .D = 128, .P = 768, .V = 4096, .Z = 256, .L = 1,
      .E = BOTH(16, 8), .K = BOTH(4, 2), .F = BOTH(512, 1024), .S = BOTH(1024, 2048)}},
    {"fine", PACK_TRAINING, ROUTE_ANY,
     {.T = 2048, .segments = 24, .C = 1024, .H = 16, .G = 4, .D = 64, .P = 192, .V = 4096, .Z = 256, .L = 2,
      .E = BOTH(32, 64), .K = BOTH(4, 4), .F = BOTH(128, 128), .S = BOTH(0, 512)}},
    {"many tokens", PACK_LONG, ROUTE_ANY,
     {.T = 4096, .segments = 64, .C = 128, .H = 4, .G = 1, .D = 128, .P = 48, .V = 512, .Z = 64, .L = 1,
      .E = BOTH(4, 4), .K = BOTH(2, 2), .F = BOTH(128, 192), .S = BOTH(64, 64)}},
};

const CudaShape cuda_bench_shapes[CUDA_BENCH_SHAPES] = {
    {"", PACK_TRAINING, ROUTE_ANY,
     {.T = 16384, .segments = 80, .C = 2048, .H = 16, .G = 4, .D = 128, .P = 768, .V = 16384, .Z = 512, .L = 20,
      .E = BOTH(16, 8), .K = BOTH(4, 2), .F = BOTH(512, 1024), .S = BOTH(1024, 2048)}},
    {"small", PACK_TRAINING, ROUTE_ANY,
     {.T = 16384, .segments = 80, .C = 512, .H = 8, .G = 4, .D = 64, .P = 192, .V = 4096, .Z = 256, .L = 8,
      .E = BOTH(8, 8), .K = BOTH(2, 2), .F = BOTH(384, 512), .S = BOTH(0, 0)}},
    {"fine", PACK_TRAINING, ROUTE_ANY,
     {.T = 16384, .segments = 80, .C = 1024, .H = 16, .G = 4, .D = 64, .P = 192, .V = 4096, .Z = 256, .L = 16,
      .E = BOTH(32, 64), .K = BOTH(4, 4), .F = BOTH(512, 512), .S = BOTH(0, 0)}},
};
// clang-format on
const int n_cuda_shapes = sizeof cuda_shapes / sizeof *cuda_shapes;

// ---- packs of longer documents ----

enum { DOCUMENT_KINDS = 8, MAX_TOKENS = 1024 };

typedef struct Pixels { // of all images, one after another
  const uint8_t *patch;
  int64_t used, patch_bytes;
} Pixels;

// A document of kind `kind`; the last kinds are LONG's alone.
static void make_document(CudaCase *c, int kind, Document *doc) {
  OpCase *o = &c->ops;
  int V = o->dims.V, n = case_int(o, 32, 96);
  int32_t ids[MAX_TOKENS];
  for (int i = 0; i < MAX_TOKENS; i++) ids[i] = case_int(o, 0, case_int(o, 0, 1) ? 20 : V - 5);
  uint64_t draw = case_bits(o) >> 16;
  float time = (float)(0.02 + 0.95 * case_uniform(o));
  const ImageGrid square = {16, 16}, odd = {17, 19}, large = {32, 33}, small = {9, 7}, pixel = {1, 1};
  const Piece pieces[] = {{.ids = ids, .n = 5},
                          {.grid = small, .tag = 1},
                          {.ids = ids + 5, .n = 130},
                          {.grid = odd, .tag = 2},
                          {.ids = ids + 200, .n = 70}};
  switch (kind) {
  case 0:
    document_caption_to_image(doc, draw, V, ids, n, square, time);
    return;
  case 1:
    document_image_to_caption(doc, draw, V, ids, n, square);
    return;
  case 2:
    document_text(doc, draw, V, ids, case_int(o, 300, 700), true);
    return;
  case 3:
    document_interleaved(doc, draw, V, pieces, sizeof pieces / sizeof *pieces, case_int(o, 0, 1), time);
    return;
  case 4:
    document_image_to_caption(doc, draw, V, ids, 50, odd);
    return;
  case 5:
    document_caption_to_image(doc, draw, V, ids, 0, pixel, time);
    return;
  case 6:
    document_caption_to_image(doc, draw, V, ids, n, large, time);
    return;
  default: // one token
    document_reset(doc, draw);
    document_add_text(doc, ids, 1);
  }
}

static void give_pixels(Document *doc, Pixels *pixels) {
  for (int i = 0; i < doc->parts; i++) {
    if (doc->part[i].kind != PART_IMAGE) continue;
    doc->part[i].patch = pixels->patch + pixels->used * pixels->patch_bytes;
    pixels->used += doc->part[i].tokens;
  }
}

static void pack_documents(CudaCase *c, int kinds) {
  OpCase *o = &c->ops;
  const Dims *d = &o->dims;
  BatchShape shape = dims_batch_shape(d);
  PackRoom room = {d->T, d->T, d->segments - 1};
  Document *docs = xcalloc((size_t)d->T, sizeof *docs);
  const Document **list = xcalloc((size_t)d->T, sizeof *list);
  uint8_t *patch = case_bytes(o, (size_t)d->T * (size_t)d->P, 0);
  for (int64_t i = 0; i < (int64_t)d->T * d->P; i++) patch[i] = (uint8_t)case_bits(o);
  Pixels pixels = {.patch = patch, .patch_bytes = d->P};
  int n = 0, failures = 0;
  for (int kind = 0; failures < 2 * kinds; kind++) {
    make_document(c, kind % kinds, &docs[n]);
    DocumentSize size = document_size(&docs[n], d->V);
    if (!pack_room_fits(room, size)) {
      failures++;
      continue;
    }
    room = pack_room_left(room, size);
    give_pixels(&docs[n], &pixels);
    list[n] = &docs[n];
    n++;
    failures = 0;
    if (room.slots < 8) break;
  }
  Error err;
  size_t bytes = batch_bind(&o->batch, shape, NULL);
  batch_bind(&o->batch, shape, case_bytes(o, bytes, 0));
  if (pack_layout(list, n, shape, &o->batch, &err) != 0) panic("%s: %s", c->what, err.text);
  pack_scale(&o->batch, shape, 1, o->batch.dims->n_target, o->batch.dims->n_image, 2, case_bits(o));
  for (int i = 0; i < d->T; i++) document_free(&docs[i]);
  free(docs);
  free(list);
}

void cuda_shape_open(CudaCase *c, const CudaShape *shape, uint64_t seed) {
  op_case_init(&c->ops, seed);
  Dims *d = &c->ops.dims;
  *d = shape->dims;
  d->M = 6 * d->C * d->L + 2 * d->C;
  cuda_case_shape(c, shape->name);
  if (shape->pack < PACK_KINDS)
    op_case_pack(&c->ops, (PackKind)shape->pack);
  else
    pack_documents(c, shape->pack == PACK_TRAINING ? 2 : DOCUMENT_KINDS);
}

// ---- routers ----

static void to_grid(Value v, real step) {
  real *x = v.data;
  for (int64_t i = 0; i < v.count; i++) x[i] = (real)round((double)(x[i] / step)) * step;
}

Value cuda_shape_router_input(CudaCase *c) {
  const Dims *d = &c->ops.dims;
  Value h = value_random(c, DT_ACT, d->T, d->C, 1);
  to_grid(h, (real)0.125);
  for (int64_t r = 0; r < d->T; r++) ((real *)h.data)[r * d->C] = 1;
  return h;
}

Value cuda_shape_router(CudaCase *c, const CudaShape *shape, int m) {
  const Dims *d = &c->ops.dims;
  Value w = value_random(c, DT_ACT, d->E[m], d->C, 1 / sqrt(d->C));
  to_grid(w, (real)0.015625);
  for (int64_t e = 0; e < d->E[m]; e++) {
    bool favoured = shape->routing == ROUTE_ONE ? e == 1 % d->E[m] : e % 2 == 0;
    if (shape->routing != ROUTE_ANY) ((real *)w.data)[e * d->C] = favoured ? 32 : -32;
  }
  return w;
}
