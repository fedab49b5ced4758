#include "model/params.h"

#include "base/base.h"
#include "base/philox.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARAM_ALIGN = 64, TIME_FEATURES = 256 };

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

ParamTable params_build(const Config *c) {
  Dims d = dims_from_config(c, 1, 1);
  ParamTable t = {.head = -1, .patch_down = -1};
  double embed_std = d.C >= 512 ? 0.02 : 0.1;
  int bottleneck = c->model.patch_bottleneck;
  t.layer = xcalloc((size_t)d.L, sizeof *t.layer);
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
  for (int l = 0; l < d.L; l++) add_layer(&t, c, &d, l);
  if (!c->model.tie_embeddings) t.head = add(&t, 0, INIT_NORMAL, 1 / sqrt((double)d.C), d.V, d.C, 0, "head.weight");
  t.image_head = add(&t, 0, INIT_ZERO, 0, d.P, d.C, 0, "image_head.weight");
  t.image_head_bias = add(&t, 0, INIT_ZERO, 0, d.P, 0, 0, "image_head.bias");
  t.mod_weight = add(&t, 1, INIT_ZERO, 0, d.M, d.Z, 0, "mod.weight");
  t.spans = xcalloc((size_t)t.n, sizeof *t.spans);
  for (int i = 0; i < t.n; i++)
    t.spans[i] = (ParamSpan){.offset = t.of[i].offset, .count = t.of[i].count, .decay = t.of[i].decay};
  return t;
}

void params_free(ParamTable *t) {
  free(t->of);
  free(t->layer);
  free(t->spans);
  *t = (ParamTable){0};
}

static void store(void *slab, size_t element_bytes, int64_t i, double value) {
  if (element_bytes == sizeof(double))
    ((double *)slab)[i] = value;
  else
    ((float *)slab)[i] = (float)value;
}

// Normals of one parameter, cut at two standard deviations where asked: cells beyond are drawn again from later blocks.
static void fill_normal(const Param *p, int index, uint64_t seed, double mean, double std, int truncated,
                        size_t element_bytes, void *slab) {
  float n[4];
  uint32_t block = 0;
  int at = 4;
  for (int64_t i = 0; i < p->count;) {
    if (at == 4) {
      philox_normal4(seed, (uint64_t)index, STREAM_INIT, block++, n);
      at = 0;
    }
    float v = n[at++];
    if (truncated && fabsf(v) > 2) continue;
    store(slab, element_bytes, p->offset + i++, mean + std * (double)v);
  }
}

// S: the gates of text rows start at 1, so that text alone is an ordinary transformer.
static void fill_text_gates(const Param *p, size_t element_bytes, void *slab, const ParamTable *t) {
  int64_t M = p->shape[1], C = t->of[t->patch_in_bias].count;
  for (int64_t i = 0; i < p->count; i++) {
    int64_t row = i / M, part = i % M / C, in_block = part % 6;
    int gate = row == TEXT && i % M < M - 2 * C && (in_block == 2 || in_block == 5);
    store(slab, element_bytes, p->offset + i, gate);
  }
}

void params_init(const ParamTable *t, uint64_t seed, size_t element_bytes, void *slab) {
  memset(slab, 0, (size_t)t->total * element_bytes);
#pragma omp parallel for schedule(dynamic, 1)
  for (int i = 0; i < t->n; i++) {
    const Param *p = &t->of[i];
    switch (p->init) {
    case INIT_ZERO:
      break;
    case INIT_ONE:
      for (int64_t j = 0; j < p->count; j++) store(slab, element_bytes, p->offset + j, 1);
      break;
    case INIT_NORMAL:
    case INIT_TRUNCATED:
      fill_normal(p, i, seed, 0, p->std, p->init == INIT_TRUNCATED, element_bytes, slab);
      break;
    case INIT_TEXT_GATES:
      fill_text_gates(p, element_bytes, slab, t);
      break;
    }
  }
}

void params_randomize(const ParamTable *t, uint64_t seed, size_t element_bytes, void *slab) {
  params_init(t, seed, element_bytes, slab);
  for (int i = 0; i < t->n; i++) {
    const Param *p = &t->of[i];
    int64_t fan_in = p->shape[p->rank - 1];
    if (p->init == INIT_ONE)
      fill_normal(p, i, seed, 1, 0.3, 0, element_bytes, slab);
    else if (p->rank == 1 || p->init == INIT_TEXT_GATES)
      fill_normal(p, i, seed, 0, 0.3, 0, element_bytes, slab);
    else
      fill_normal(p, i, seed, 0, (i == t->embed ? 1 : 0.7) / sqrt((double)(i == t->embed ? 1 : fan_in)), 0,
                  element_bytes, slab);
  }
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
