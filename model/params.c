#include "model/params.h"

#include "base/base.h"
#include "base/normals.h"
#include "base/philox.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARAM_ALIGN = 64 };

Dims dims_from_config(const Config *c, int slots, int segments) {
  Dims d = {.T = slots,
            .C = c->model.dim,
            .H = c->model.heads,
            .G = c->model.kv_heads,
            .D = c->model.head_dim,
            .P = 3 * c->model.patch * c->model.patch,
            .V = c->model.vocab,
            .Z = c->model.cond_dim,
            .L = c->model.layers,
            .M = 6 * c->model.dim * c->model.layers + 2 * c->model.dim,
            .segments = segments};
  for (int m = 0; m < MODALITIES; m++) {
    d.E[m] = c->model.moe[m].experts;
    d.F[m] = c->model.moe[m].expert_dim;
    d.K[m] = c->model.moe[m].top_k;
    d.S[m] = c->model.moe[m].shared_dim;
  }
  return d;
}

static int add(ParamTable *t, int decay, ParamInit init, double std, int64_t n0, int64_t n1, int64_t n2,
               const char *fmt, ...) __attribute__((format(printf, 8, 9)));

// Appends a parameter; a dimension of 0 ends the shape.
static int add(ParamTable *t, int decay, ParamInit init, double std, int64_t n0, int64_t n1, int64_t n2,
               const char *fmt, ...) {
  t->of = xrealloc(t->of, (size_t)(t->n + 1) * sizeof *t->of);
  Param *p = &t->of[t->n];
  *p = (Param){.shape = {n0, n1, n2}, .init = init, .std = std, .decay = decay, .offset = t->total};
  p->rank = n2 ? 3 : n1 ? 2 : 1;
  p->count = n0 * (n1 ? n1 : 1) * (n2 ? n2 : 1);
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(p->name, sizeof p->name, fmt, ap);
  va_end(ap);
  t->parameters += p->count;
  t->total += (p->count + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
  return t->n++;
}

// A matrix of a linear layer, with the standard deviation its size asks for.
static int add_matrix(ParamTable *t, const Config *c, double gain, int64_t n0, int64_t n1, int64_t n2,
                      const char *name) {
  int64_t fan_in = n2 ? n2 : n1;
  if (c->model.dim >= 512) return add(t, 1, INIT_TRUNCATED, 0.02 * gain, n0, n1, n2, "%s", name);
  return add(t, 1, INIT_NORMAL, gain / sqrt((double)fan_in), n0, n1, n2, "%s", name);
}

static void add_layer(ParamTable *t, const Config *c, const Dims *d, int l) {
  static const char *const modality[MODALITIES] = {"text", "image"};
  LayerParams *p = &t->layer[l];
  double residual = 1 / sqrt(2.0 * d->L); // of what writes into the residual stream
  char name[56];
  int per_modality = c->model.attn_per_modality, qkv = (d->H + 2 * d->G) * d->D;
  memset(p, -1, sizeof *p);
  for (int m = 0; m < (per_modality ? MODALITIES : 1); m++) {
    snprintf(name, sizeof name, "layers.%d.attn.qkv%s%s.weight", l, per_modality ? "." : "",
             per_modality ? modality[m] : "");
    p->qkv[m] = add_matrix(t, c, 1, qkv, d->C, 0, name);
    snprintf(name, sizeof name, "layers.%d.attn.out%s%s.weight", l, per_modality ? "." : "",
             per_modality ? modality[m] : "");
    p->out[m] = add_matrix(t, c, residual, d->C, d->H * d->D, 0, name);
  }
  p->q_norm = add(t, 0, INIT_ONE, 0, 2, d->D, 0, "layers.%d.attn.q_norm", l);
  p->k_norm = add(t, 0, INIT_ONE, 0, 2, d->D, 0, "layers.%d.attn.k_norm", l);
  for (int m = 0; m < MODALITIES; m++) {
    p->router[m] = add(t, 0, INIT_NORMAL, 0.02, d->E[m], d->C, 0, "layers.%d.%s.router.weight", l, modality[m]);
    snprintf(name, sizeof name, "layers.%d.%s.experts.w1", l, modality[m]);
    p->w1[m] = add_matrix(t, c, 1, d->E[m], 2 * d->F[m], d->C, name);
    snprintf(name, sizeof name, "layers.%d.%s.experts.w2", l, modality[m]);
    p->w2[m] = add_matrix(t, c, residual, d->E[m], d->C, d->F[m], name);
    if (!d->S[m]) continue;
    snprintf(name, sizeof name, "layers.%d.%s.shared.w1", l, modality[m]);
    p->shared1[m] = add_matrix(t, c, 1, 2 * d->S[m], d->C, 0, name);
    snprintf(name, sizeof name, "layers.%d.%s.shared.w2", l, modality[m]);
    p->shared2[m] = add_matrix(t, c, residual, d->C, d->S[m], 0, name);
  }
}

// What was added since the bucket before is one, which the processes that it is shared out to divide evenly.
static void end_bucket(ParamTable *t, const Config *c, int layer) {
  int64_t align = (int64_t)PARAM_ALIGN * config_shards(c);
  t->total = (t->total + align - 1) / align * align;
  const ParamBucket *before = t->buckets ? &t->bucket[t->buckets - 1] : NULL;
  int first = before ? before->first + before->n : 0;
  t->bucket[t->buckets++] = (ParamBucket){
      .first = first, .n = t->n - first, .begin = before ? before->end : 0, .end = t->total, .layer = layer};
}

ParamTable params_build(const Config *c) {
  Dims d = dims_from_config(c, 1, 1);
  ParamTable t = {.head = -1, .patch_down = -1};
  double embed_std = d.C >= 512 ? 0.02 : 0.1;
  int bottleneck = c->model.patch_bottleneck;
  t.layer = xcalloc((size_t)d.L, sizeof *t.layer);
  t.bucket = xcalloc((size_t)d.L + 3, sizeof *t.bucket);
  t.embed = add(&t, 0, INIT_NORMAL, embed_std, d.V, d.C, 0, "embed.weight");
  if (bottleneck) t.patch_down = add_matrix(&t, c, 1, bottleneck, d.P, 0, "patch.down.weight");
  t.patch_in = add_matrix(&t, c, 1, d.C, bottleneck ? bottleneck : d.P, 0, "patch.in.weight");
  t.patch_in_bias = add(&t, 0, INIT_ZERO, 0, d.C, 0, 0, "patch.in.bias");
  t.time1 = add_matrix(&t, c, 1, d.Z, TIME_FEATURES, 0, "cond.time1.weight");
  t.time1_bias = add(&t, 0, INIT_ZERO, 0, d.Z, 0, 0, "cond.time1.bias");
  t.time2 = add_matrix(&t, c, 1, d.Z, d.Z, 0, "cond.time2.weight");
  t.time2_bias = add(&t, 0, INIT_ZERO, 0, d.Z, 0, 0, "cond.time2.bias");
  t.cond_pool = add_matrix(&t, c, 1, d.Z, d.C, 0, "cond.pool.weight");
  t.cond_kind = add(&t, 0, INIT_ZERO, 0, 2, d.Z, 0, "cond.kind");
  t.mod_base = add(&t, 0, INIT_TEXT_GATES, 0, 2, d.M, 0, "mod.base");
  end_bucket(&t, c, -1);
  for (int l = 0; l < d.L; l++) {
    add_layer(&t, c, &d, l);
    end_bucket(&t, c, l);
  }
  if (!c->model.tie_embeddings) t.head = add(&t, 0, INIT_NORMAL, 1 / sqrt((double)d.C), d.V, d.C, 0, "head.weight");
  t.image_head = add(&t, 0, INIT_ZERO, 0, d.P, d.C, 0, "image_head.weight");
  t.image_head_bias = add(&t, 0, INIT_ZERO, 0, d.P, 0, 0, "image_head.bias");
  end_bucket(&t, c, -1);
  t.mod_weight = add(&t, 1, INIT_ZERO, 0, d.M, d.Z, 0, "mod.weight");
  end_bucket(&t, c, -1);
  t.spans = xcalloc((size_t)t.n, sizeof *t.spans);
  for (int i = 0; i < t.n; i++)
    t.spans[i] = (ParamSpan){.offset = t.of[i].offset, .count = t.of[i].count, .decay = t.of[i].decay};
  return t;
}

const ParamBucket *bucket_of(const ParamTable *t, int param) {
  const ParamBucket *b = t->bucket;
  while (param >= b->first + b->n) b++;
  return b;
}

const ParamBucket *layer_bucket(const ParamTable *t, int layer) {
  return bucket_of(t, t->layer[layer].q_norm);
}

int bucket_opens(const ParamTable *t, const ParamBucket *b) {
  return b->layer <= 0 && b != bucket_of(t, t->image_head);
}

void params_free(ParamTable *t) {
  free(t->of);
  free(t->layer);
  free(t->spans);
  free(t->bucket);
  *t = (ParamTable){0};
}

// ---- values ----

// A piece is drawn in runs of RUN_BLOCKS Philox blocks, each by one thread; a run of truncated normals is shorter than
// what was drawn for it, so runs are put together once all of a piece are there. Neither size is seen in the values.
enum { RUN_BLOCKS = 4096, MOST_RUNS = PARAMS_PIECE / (4 * RUN_BLOCKS) };

typedef struct Pieces {
  ParamSink sink;
  void *arg;
  size_t element_bytes;
  void *values;  // [PARAMS_PIECE] of the next piece, its padding too
  float *normal; // [MOST_RUNS][4 RUN_BLOCKS]
  int64_t at;    // elements of the slab handed over
} Pieces;

static void store(const Pieces *s, int64_t i, double value) {
  if (s->element_bytes == sizeof(double))
    ((double *)s->values)[i] = value;
  else
    ((float *)s->values)[i] = (float)value;
}

// Hands over the next n values of a parameter, and behind its last one the zeros up to where the next one begins.
static void piece_end(Pieces *s, const Param *p, int64_t n) {
  int64_t ends = p->offset + p->count, aligned = (ends + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
  for (int64_t i = s->at + n == ends ? ends : aligned; i < aligned; i++) store(s, n++, 0);
  s->sink(s->arg, s->at, n, s->values);
  s->at += n;
}

// Elements of a parameter that the next piece may hold, with room for its padding.
static int64_t piece_room(const Pieces *s, const Param *p) {
  return min_i64(p->offset + p->count - s->at, PARAMS_PIECE - PARAM_ALIGN);
}

// Zeros up to where the next bucket begins.
static void fill_gap(Pieces *s, int64_t end) {
  int64_t n = end - s->at;
  for (int64_t i = 0; i < n; i++) store(s, i, 0);
  if (n) s->sink(s->arg, s->at, n, s->values);
  s->at = end;
}

// The normals of some blocks of a parameter's stream, without those beyond two standard deviations where they are cut
// off; returns how many.
static int64_t draw_run(uint64_t seed, int index, uint32_t block, int64_t blocks, int truncated, float *out) {
  int64_t n = 0;
  for (int64_t b = 0; b < blocks; b += NORMALS_BLOCKS) {
    float normal[4 * NORMALS_BLOCKS];
    int drawn = 4 * (int)min_i64(blocks - b, NORMALS_BLOCKS);
    normals_draw(seed, (uint64_t)index, STREAM_INIT, block + (uint32_t)b, normal);
    for (int k = 0; k < drawn; k++) {
      out[n] = normal[k]; // of one that is cut off the next one takes the place: a branch would be foretold badly
      n += !truncated || !(fabsf(normal[k]) > 2);
    }
  }
  return n;
}

// mean + std times the parameter's stream of normals.
static void fill_normal(Pieces *s, const Param *p, int index, uint64_t seed, double mean, double std, int truncated) {
  uint32_t block = 0;
  while (s->at < p->offset + p->count) {
    int64_t count[MOST_RUNS], first[MOST_RUNS + 1] = {0}, room = piece_room(s, p);
    int64_t wanted = truncated ? room + room / 16 + 64 : room; // a twentieth and more is cut off
    int64_t blocks = min_i64((wanted + 3) / 4, (int64_t)MOST_RUNS * RUN_BLOCKS);
    int runs = (int)((blocks + RUN_BLOCKS - 1) / RUN_BLOCKS);
#pragma omp parallel for schedule(dynamic, 1) if (runs > 1)
    for (int r = 0; r < runs; r++)
      count[r] =
          draw_run(seed, index, block + (uint32_t)r * RUN_BLOCKS, min_i64(RUN_BLOCKS, blocks - (int64_t)r * RUN_BLOCKS),
                   truncated, s->normal + (int64_t)r * 4 * RUN_BLOCKS);
    for (int r = 0; r < runs; r++) first[r + 1] = min_i64(first[r] + count[r], room);
#pragma omp parallel for schedule(static) if (runs > 1)
    for (int r = 0; r < runs; r++)
      for (int64_t i = first[r]; i < first[r + 1]; i++)
        store(s, i, mean + std * (double)s->normal[(int64_t)r * 4 * RUN_BLOCKS + i - first[r]]);
    piece_end(s, p, first[runs]);
    block += (uint32_t)blocks;
  }
}

static void fill_constant(Pieces *s, const Param *p, double value) {
  while (s->at < p->offset + p->count) {
    int64_t n = piece_room(s, p);
    for (int64_t i = 0; i < n; i++) store(s, i, value);
    piece_end(s, p, n);
  }
}

// S: the gates of text rows start at 1, so that text alone is an ordinary transformer.
static void fill_text_gates(Pieces *s, const Param *p, const ParamTable *t) {
  int64_t M = p->shape[1], C = t->of[t->patch_in_bias].count;
  while (s->at < p->offset + p->count) {
    int64_t n = piece_room(s, p), begin = s->at - p->offset;
    for (int64_t i = begin; i < begin + n; i++) {
      int64_t row = i / M, part = i % M / C, in_block = part % 6;
      store(s, i - begin, row == TEXT && i % M < M - 2 * C && (in_block == 2 || in_block == 5));
    }
    piece_end(s, p, n);
  }
}

static void fill_initial(Pieces *s, const ParamTable *t, int index, uint64_t seed) {
  const Param *p = &t->of[index];
  switch (p->init) {
  case INIT_ZERO:
    fill_constant(s, p, 0);
    break;
  case INIT_ONE:
    fill_constant(s, p, 1);
    break;
  case INIT_NORMAL:
  case INIT_TRUNCATED:
    fill_normal(s, p, index, seed, 0, p->std, p->init == INIT_TRUNCATED);
    break;
  case INIT_TEXT_GATES:
    fill_text_gates(s, p, t);
    break;
  }
}

static void fill_random(Pieces *s, const ParamTable *t, int index, uint64_t seed) {
  const Param *p = &t->of[index];
  double fan_in = (double)p->shape[p->rank - 1];
  if (p->init == INIT_ONE)
    fill_normal(s, p, index, seed, 1, 0.3, 0);
  else if (p->rank == 1 || p->init == INIT_TEXT_GATES)
    fill_normal(s, p, index, seed, 0, 0.3, 0);
  else
    fill_normal(s, p, index, seed, 0, index == t->embed ? 1 : 0.7 / sqrt(fan_in), 0);
}

void params_stream(const ParamTable *t, ParamValues which, uint64_t seed, size_t element_bytes, ParamSink sink,
                   void *arg) {
  Pieces s = {.sink = sink,
              .arg = arg,
              .element_bytes = element_bytes,
              .values = xmalloc((size_t)PARAMS_PIECE * element_bytes),
              .normal = xmalloc((size_t)PARAMS_PIECE * sizeof(float))};
  for (int i = 0; i < t->n; i++) {
    if (which == PARAMS_INITIAL)
      fill_initial(&s, t, i, seed);
    else
      fill_random(&s, t, i, seed);
    fill_gap(&s, i + 1 < t->n ? t->of[i + 1].offset : t->total);
  }
  free(s.values);
  free(s.normal);
}

int64_t params_active(const Config *c, int modality) {
  Dims d = dims_from_config(c, 1, 1);
  int64_t attn = (int64_t)d.C * (d.H + 2 * d.G) * d.D + (int64_t)d.C * d.H * d.D;
  int64_t experts = 3LL * d.C * (d.K[modality] * d.F[modality] + d.S[modality]) + (int64_t)d.C * d.E[modality];
  int64_t ends = (int64_t)d.C * d.V;
  if (modality == IMAGE) {
    int64_t B = c->model.patch_bottleneck;
    ends = (B ? B * (d.P + d.C) : (int64_t)d.P * d.C) + (int64_t)d.P * d.C;
  }
  return d.L * (attn + experts) + ends;
}
