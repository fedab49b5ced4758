// Times ops of the CUDA backend for a comparison that another program leads (tests/gpu/bench_gpu.py): everything is
// made ready first, then each op named on standard input is timed once, so that the rounds of both can take turns.
//
//   cuda_peer PACK_FILE KEY=VALUE... OP...    exit code 2 without a GPU
//
// Keys: T C H G D Z (Dims), E0 E1 F0 F1 K0 K1 (by modality), I0 I1 O0 O1 (LINEAR_*: widths of x and y by modality),
// side (images are side x side patches; 0: there are none), text (documents of that many text tokens alone), skew (of
// the experts' mean logits, the first is that many hundredths below their middle, the last above; 30: the fullest
// expert has about 1.5 times its share, 160: 3 times). COPY copies 256 MiB. The pack is full: documents of 32-96 text
// tokens, one image and 0-32 text tokens; the last image is as large as still fits. PACK_FILE receives its arrays as
// int32, one after another: n_text, n_image, n_segments, T, and doc_start, kv_end [T] and seg_len [n_segments]. Then it
// prints "ready"; each line "OP" is answered by a line with the median milliseconds of one launch, out of a captured
// graph, over copies of the operands that together exceed the L2 cache.
#include "data/packer.h"
#include "tests/gpu/cuda_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct Peer {
  CudaCase c;
  TimedCall timed[OP_COUNT]; // graph NULL: not named
  bool wanted[OP_COUNT];
  const char *path; // of the pack file
  int side, text, skew;
  int in[MODALITIES], out[MODALITIES];
} Peer;

// ---- the pack ----

// The largest image, up to side x side, that `room` slots hold beside `text` tokens and 4 special ones; 0: none.
static int image_side(int room, int text, int side) {
  while (side > 0 && text + side * side + 4 > room) side--;
  return side;
}

static void make_pack(Peer *p) {
  OpCase *o = &p->c.ops;
  Dims *d = &o->dims;
  BatchShape shape = dims_batch_shape(d);
  Document *docs = xcalloc((size_t)d->T, sizeof *docs);
  const Document **list = xcalloc((size_t)d->T, sizeof *list);
  int32_t *ids = xmalloc((size_t)d->T * sizeof *ids);
  int n = 0;
  for (int i = 0; i < d->T; i++) ids[i] = case_int(o, 0, d->V - 5);
  for (int room = d->T; room > 0; n++) {
    int before = case_int(o, 32, 96), after = case_int(o, 0, 32), side = image_side(room, before + after, p->side);
    const Piece pieces[] = {
        {.ids = ids, .n = before}, {.grid = {side, side}, .tag = 1}, {.ids = ids + before, .n = after}};
    if (p->text)
      document_add_text(&docs[n], ids, (int)min_i64(room, p->text));
    else if (side)
      document_interleaved(&docs[n], (uint64_t)n, d->V, pieces, 3, false, 0);
    else
      document_add_text(&docs[n], ids, room);
    room -= document_size(&docs[n], d->V).slots;
    list[n] = &docs[n];
  }
  Error err;
  size_t bytes = batch_bind(&o->batch, shape, NULL);
  batch_bind(&o->batch, shape, case_bytes(o, bytes, 0));
  if (pack_layout(list, n, shape, &o->batch, &err) != 0) fatal(&err);
  pack_scale(&o->batch, shape, 1, o->batch.dims->n_target, 0, 1, 1);
  for (int i = 0; i < n; i++) document_free(&docs[i]);
  free(docs);
  free(list);
  free(ids);
}

static void write_ints(const char *path, const char *mode, const int32_t *const part[], const size_t n[], int parts) {
  FILE *f = fopen(path, mode);
  if (!f) panic("cannot write %s", path);
  for (int i = 0; i < parts; i++) fwrite(part[i], sizeof(int32_t), n[i], f);
  if (fclose(f) != 0) panic("cannot write %s", path);
}

static void write_pack(const Peer *p) {
  const Batch *b = &p->c.ops.batch;
  size_t T = (size_t)p->c.ops.dims.T, segments = (size_t)b->dims->n_segments;
  int32_t head[4] = {b->dims->n_text, b->dims->n_image, b->dims->n_segments, (int32_t)T};
  write_ints(p->path, "wb", (const int32_t *const[]){head, b->doc_start, b->kv_end, b->seg_len},
             (const size_t[]){4, T, T, segments}, 4);
}

// ---- operands ----

static void add(Peer *p, OpKind kind, OpArgs args, const Value *in, const Value *out) {
  if (p->wanted[kind]) p->timed[kind] = timed_call_new(&p->c, kind, &args, in, out);
}

static Value value_ones(CudaCase *c, int64_t n, float one) {
  Value v = value_random(c, DT_REAL, n, 1, 0);
  for (int64_t i = 0; i < n; i++) ((real *)v.data)[i] = (real)one;
  return v;
}

static void add_copy(Peer *p) {
  const int64_t bytes = 256 << 20;
  Value src = value_bytes(&p->c, case_bytes(&p->c.ops, (size_t)bytes, 0x5A), (size_t)bytes), dst = src;
  dst.fresh = true;
  add(p, OP_COPY, ARGS(.span = {.count = bytes}), VALUES_IN(src), VALUES_OUT(dst));
}

// Projections with weights for text rows and for image rows, without bias.
static void add_linear(Peer *p) {
  CudaCase *c = &p->c;
  const int one[MODALITIES] = {1, 1};
  OpArgs a = {.linear = {.extent = EXT_SPLIT, .in_dim = {p->in[0], p->in[1]}, .out_dim = {p->out[0], p->out[1]}}};
  Value x = value_sided(c, DT_ACT, one, p->in, 1, true), dy = value_sided(c, DT_ACT, one, p->out, 1, true), w[2], dw[2];
  for (int m = 0; m < 2; m++) {
    w[m] = value_weight(c, p->out[m], p->in[m], p->in[m]);
    dw[m] = value_out(c, DT_REAL, p->out[m], p->in[m]);
  }
  add(p, OP_LINEAR_FWD, a, VALUES_IN(x, w[0], w[1]), VALUES_OUT(value_sided(c, DT_ACT, one, p->out, 0, true)));
  add(p, OP_LINEAR_DGRAD, a, VALUES_IN(dy, w[0], w[1]), VALUES_OUT(value_sided(c, DT_ACT, one, p->in, 0, true)));
  add(p, OP_LINEAR_WGRAD, a, VALUES_IN(dy, x), VALUES_OUT(dw[0], dw[1]));
}

// The second site of a block: gate and residual of attention's branch, then LN and modulation.
static void add_adaln(Peer *p) {
  CudaCase *c = &p->c;
  const Dims *d = &c->ops.dims;
  OpArgs a = {.adaln = {.gate = 2 * d->C, .shift = 3 * d->C, .scale = 4 * d->C}};
#define TOKENS value_random(c, DT_ACT, d->T, d->C, 1)
  Value x = TOKENS, branch = TOKENS, mod = value_random(c, DT_ACT, d->segments, d->M, 0.5);
  Value empty = value_out(c, DT_ACT, d->T, d->C), stat = value_out(c, DT_REAL, d->T, 1);
  add(p, OP_ADALN_FWD, a, VALUES_IN(x, branch, mod), VALUES_OUT(empty, empty, stat, stat));
  add(p, OP_ADALN_BWD, a, VALUES_IN(TOKENS, TOKENS, x, branch, mod, value_ones(c, d->T, 0), value_ones(c, d->T, 1)),
      VALUES_OUT(empty, empty, value_out(c, DT_ACT, d->segments, d->M)));
#undef TOKENS
}

static void add_attention(Peer *p) {
  CudaCase *c = &p->c;
  const Dims *d = &c->ops.dims;
  const Batch *b = &c->ops.batch;
#define HEADS(n) value_random(c, DT_ACT, d->T, (int64_t)(n)*d->D, 1)
#define HEADS_OUT(n) value_out(c, DT_ACT, d->T, (int64_t)(n)*d->D)
  Value q = HEADS(d->H), k = HEADS(d->G), v = HEADS(d->G), lse = value_ones(c, (int64_t)d->H * d->T, 0);
  for (int64_t i = 0; i < lse.count; i++) // of scores with variance 1, about
    ((real *)lse.data)[i] = (real)(log(b->kv_end[i % d->T] - b->doc_start[i % d->T]) + 0.5);
  OpArgs a = {.span = {0}};
  add(p, OP_ATTENTION_FWD, a, VALUES_IN(q, k, v),
      VALUES_OUT(HEADS_OUT(d->H), value_out(c, DT_REAL, (int64_t)d->H * d->T, 1)));
  add(p, OP_ATTENTION_BWD, a, VALUES_IN(HEADS(d->H), HEADS(d->H), q, k, v, lse),
      VALUES_OUT(HEADS_OUT(d->H), HEADS_OUT(d->G), HEADS_OUT(d->G)));
#undef HEADS
#undef HEADS_OUT
}

// The products of both modalities' experts and the router's ops, rows sent where random router weights send them, and
// more to the last experts where the pack is skewed.
static void add_experts(Peer *p) {
  CudaCase *c = &p->c;
  const Dims *d = &c->ops.dims;
  const int one[2] = {1, 1}, two_f[2] = {2 * d->F[0], 2 * d->F[1]}, dims[2] = {d->C, d->C};
  Value h = value_random(c, DT_ACT, d->T, d->C, 1), dout = value_repeated(c, DT_ACT, (int64_t)d->T * d->C, 1);
  Value wr[2], w1[2], w2[2];
  for (int m = 0; m < 2; m++) {
    wr[m] = value_weight(c, d->E[m], d->C, d->C);
    w1[m] = value_repeated(c, DT_ACT, (int64_t)d->E[m] * two_f[m] * d->C, 1 / sqrt(d->C));
    w2[m] = value_repeated(c, DT_ACT, (int64_t)d->E[m] * d->C * d->F[m], 1 / sqrt(d->F[m]));
  }
  for (int64_t r = 0; r < d->T && p->skew; r++) ((real *)h.data)[r * d->C] = 1;
  for (int m = 0; m < 2 && p->skew; m++)
    for (int64_t e = 0; e < d->E[m]; e++)
      ((real *)wr[m].data)[e * d->C] = (real)(0.01 * p->skew * ((2.0 * (double)e + 1) / d->E[m] - 1));
  Value routed[OP_MAX_OUT] = {value_sided(c, DT_REAL, one, d->E, 0, true), value_out(c, DT_REAL, d->T, dims_kmax(d)),
                              value_out(c, DT_I32, 1, route_bind(&(Route){0}, d, NULL))};
  const Value no_rows = value_out(c, DT_ACT, d->T, d->C), no_weights = value_out(c, DT_REAL, d->T, dims_kmax(d));
  OpArgs plain = {.span = {0}}, router = {.router = {.balance = 0.01 / d->L, .z = 1e-3 / d->L}};
  add(p, OP_ROUTER_FWD, router, VALUES_IN(h, wr[0], wr[1]), routed);
  cuda_case_cpu(c, OP_ROUTER_FWD, router, VALUES_IN(h, wr[0], wr[1]), routed);
  for (int i = 0; i < 3; i++) routed[i].fresh = false; // now inputs
  Value logits = routed[0], weights = routed[1], route = routed[2];
  Route bound;
  route_bind(&bound, d, route.data);
  write_ints(p->path, "ab", (const int32_t *const[]){bound.count}, (const size_t[]){(size_t)(d->E[0] + d->E[1])}, 1);
#define SLOTS(width, std) value_repeated(c, DT_ACT, two_sided_size(d->T, d->K, width), std)
#define GRADIENT(m, rows, width) value_repeated(c, DT_REAL, (int64_t)d->E[m] * (rows) * (width), 0)
  Value pre = SLOTS(two_f, 1), a = SLOTS(d->F, 1), y = SLOTS(dims, 1);
  add(p, OP_EXPERT_UP_FWD, plain, VALUES_IN(h, route, w1[0], w1[1]), VALUES_OUT(SLOTS(two_f, 0), SLOTS(d->F, 0)));
  add(p, OP_EXPERT_DOWN_FWD, plain, VALUES_IN(a, route, w2[0], w2[1]), VALUES_OUT(SLOTS(dims, 0)));
  add(p, OP_EXPERT_COMBINE, plain, VALUES_IN(y, route, weights), VALUES_OUT(no_rows));
  add(p, OP_EXPERT_DOWN_BWD, plain, VALUES_IN(dout, pre, weights, route, w2[0], w2[1]),
      VALUES_OUT(SLOTS(two_f, 0), SLOTS(d->F, 0), no_weights));
  add(p, OP_EXPERT_UP_DGRAD, plain, VALUES_IN(pre, route, w1[0], w1[1]), VALUES_OUT(SLOTS(dims, 0)));
  add(p, OP_EXPERT_DOWN_WGRAD, plain, VALUES_IN(dout, a, route),
      VALUES_OUT(GRADIENT(0, d->C, d->F[0]), GRADIENT(1, d->C, d->F[1])));
  add(p, OP_EXPERT_UP_WGRAD, plain, VALUES_IN(pre, h, route),
      VALUES_OUT(GRADIENT(0, two_f[0], d->C), GRADIENT(1, two_f[1], d->C)));
  add(p, OP_ROUTER_BWD, router,
      VALUES_IN(value_random(c, DT_REAL, d->T, dims_kmax(d), 1), logits, weights, route, h, wr[0], wr[1], dout),
      VALUES_OUT(no_rows, GRADIENT(0, 1, d->C), GRADIENT(1, 1, d->C)));
#undef SLOTS
#undef GRADIENT
}

// ---- the command line ----

static int *size_named(Peer *p, const char *key) {
  Dims *d = &p->c.ops.dims;
  const struct {
    const char *key;
    int *size;
  } sizes[] = {{"T", &d->T},       {"C", &d->C},       {"H", &d->H},       {"G", &d->G},      {"D", &d->D},
               {"Z", &d->Z},       {"E0", &d->E[0]},   {"E1", &d->E[1]},   {"F0", &d->F[0]},  {"F1", &d->F[1]},
               {"K0", &d->K[0]},   {"K1", &d->K[1]},   {"I0", &p->in[0]},  {"I1", &p->in[1]}, {"O0", &p->out[0]},
               {"O1", &p->out[1]}, {"side", &p->side}, {"text", &p->text}, {"skew", &p->skew}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (strcmp(sizes[i].key, key) == 0) return sizes[i].size;
  fprintf(stderr, "cuda_peer: there is no size %s\n", key);
  exit(2);
}

static OpKind op_named(const char *name) {
  for (int k = 0; k < OP_COUNT; k++)
    if (strcmp(op_info[k].name, name) == 0) return (OpKind)k;
  fprintf(stderr, "cuda_peer: there is no op %s\n", name);
  exit(2);
}

static bool any_wanted(const Peer *p, OpKind first, OpKind last) {
  bool any = false;
  for (int k = first; k <= (int)last; k++) any |= p->wanted[k];
  return any;
}

static void answer(const Peer *p) {
  char line[64];
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = 0;
    const TimedCall *t = &p->timed[op_named(line)];
    if (!t->graph) panic("%s was not named on the command line", line);
    printf("%.6f\n", timed_call_seconds(t) * 1e3);
    fflush(stdout);
  }
}

int main(int argc, char **argv) {
  Report report = {0};
  Peer p = {.c = {.backend = &backend_cuda, .report = &report, .wanted = p.wanted},
            .path = argc > 1 ? argv[1] : NULL,
            .side = 16,
            .in = {128, 128},
            .out = {128, 128}};
  Dims *d = &p.c.ops.dims;
  Error err;
  if (argc < 4) {
    fprintf(stderr, "usage: cuda_peer PACK_FILE KEY=VALUE... OP...\n");
    return 2;
  }
  op_case_init(&p.c.ops, 1);
  *d = (Dims){.T = 1024,
              .C = 128,
              .H = 2,
              .G = 2,
              .D = 64,
              .P = 48,
              .V = 4096,
              .Z = 64,
              .L = 1,
              .E = {2, 2},
              .F = {64, 64},
              .K = {1, 1}};
  for (int i = 2; i < argc; i++) {
    char *equals = strchr(argv[i], '=');
    if (!equals) {
      p.wanted[op_named(argv[i])] = true;
      continue;
    }
    *equals = 0;
    *size_named(&p, argv[i]) = atoi(equals + 1);
  }
  d->M = 6 * d->C * d->L + 2 * d->C;
  d->segments = d->T / (p.side * p.side + 36) + 16; // whole images, and the few smaller ones at the end
  make_pack(&p);
  write_pack(&p);
  if (backend_cuda.open(&err) != 0) fatal(&err);
  if (p.wanted[OP_COPY]) add_copy(&p);
  if (any_wanted(&p, OP_LINEAR_FWD, OP_LINEAR_WGRAD)) add_linear(&p);
  if (any_wanted(&p, OP_ADALN_FWD, OP_ADALN_BWD)) add_adaln(&p);
  if (any_wanted(&p, OP_ATTENTION_FWD, OP_ATTENTION_BWD)) add_attention(&p);
  if (any_wanted(&p, OP_ROUTER_FWD, OP_EXPERT_UP_WGRAD)) add_experts(&p);
  op_case_free(&p.c.ops);
  for (int k = 0; k < OP_COUNT; k++)
    if (p.wanted[k] && !p.timed[k].graph) panic("cuda_peer does not time %s", op_info[k].name);
  printf("ready\n");
  fflush(stdout);
  answer(&p);
  for (int k = 0; k < OP_COUNT; k++)
    if (p.timed[k].graph) timed_call_free(&p.timed[k]);
  return 0;
}
