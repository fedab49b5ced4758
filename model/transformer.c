// Reads top to bottom: input, condition, blocks, heads; then the same backwards.
//
// T slots, C dim, H query and G kv heads of D, P = 3p^2, V vocab, Z cond_dim, SEG modulation rows, M = 6CL + 2C.
// "two-sided" buffers hold text and image rows at different widths (kernels.h).
#include "model/transformer.h"

#include "base/philox.h"
#include "model/program/compile.h"

#include <stdio.h>
#include <stdlib.h>

#define IN(...) ((const TensorId[OP_MAX_IN]){__VA_ARGS__})
#define OUT(...) ((const TensorId[OP_MAX_OUT]){__VA_ARGS__})

enum { TIME_FEATURES = 256 };
enum { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 }; // column blocks of a layer in the modulation table

typedef struct Forward {                         // what the backward pass of a layer asks for
  TensorId x;                                    // [T, C] block input
  TensorId mean1, rstd1, h1;                     // [T], [T], [T, C]
  TensorId qkv, q, k, v, o, lse;                 // [T,(H+2G)D], [T,H,D], [T,G,D] x 2, [T,HD], [H,T]
  TensorId b1;                                   // [T, C] attention branch
  TensorId mean2, rstd2, h2;                     // [T], [T], [T, C]
  TensorId router_logits, router_weights, route; // two-sided [T,E_m], [T,Kmax], Route
  TensorId shared_pre;                           // two-sided [T, 2 S_m]
  TensorId expert_pre;                           // two-sided [T K_m, 2 F_m]
  TensorId expert_out, shared_out;               // two-sided [T K_m, C], [T, C]: what b2 is the sum of
  TensorId b2;                                   // [T, C] expert branch
} Forward;

// Everything a recording needs at hand.
typedef struct Recording {
  const Model *model;
  const Config *config;
  Program *p;
  Dims d;
  Mode mode;
  int train;
  Space grads;
  int accumulate; // gradients of this program add to what is there
  TensorId mod;   // [SEG, M]
  TensorId dmod;  // [SEG, M]
  TensorId metrics;
  Forward layer[];
} Recording;

// ---- operands ----

static TensorId weight(Recording *r, int param) {
  if (param < 0) return NO_TENSOR;
  const Param *w = &r->model->params.of[param];
  int64_t bytes = (int64_t)r->model->backend->dtype_bytes[DT_ACT];
  return program_external(r->p, SPACE_WEIGHTS, w->offset * bytes, DT_ACT, w->count, w->name);
}

static TensorId gradient(Recording *r, int param) {
  if (param < 0) return NO_TENSOR;
  const Param *w = &r->model->params.of[param];
  int64_t bytes = (int64_t)r->model->backend->dtype_bytes[DT_REAL];
  char name[64];
  snprintf(name, sizeof name, "d %s", w->name);
  return program_external(r->p, r->grads, w->offset * bytes, DT_REAL, w->count, name);
}

// Columns of the modulation table where part `part` of layer l begins; layer L is the final site [shift, scale].
static int column(const Recording *r, int l, int part) {
  return (6 * l + part) * r->d.C;
}

static TensorId rows_tensor(Recording *r, int width, const char *name) {
  return program_tensor(r->p, DT_ACT, (int64_t)r->d.T * width, "%s", name);
}

static TensorId two_sided(Recording *r, Dtype type, const int rows[2], int w0, int w1, const char *name) {
  return program_tensor(r->p, type, two_sided_size(r->d.T, rows, (const int[2]){w0, w1}), "%s", name);
}

static const int one_row[MODALITIES] = {1, 1};

// ---- linear layers ----

static OpArgs linear_args(Extent extent, int in0, int in1, int out0, int out1, int accumulate) {
  return (OpArgs){
      .linear = {.extent = extent, .in_dim = {in0, in1}, .out_dim = {out0, out1}, .accumulate = accumulate}};
}

// y = x W^T (+ bias) into a fresh tensor of `rows` rows.
static TensorId linear(Recording *r, Extent extent, TensorId x, int w, int bias, int in, int out, int rows,
                       const char *name) {
  TensorId y = program_tensor(r->p, DT_ACT, (int64_t)rows * out, "%s", name);
  OpArgs a = linear_args(extent, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(x, weight(r, w), NO_TENSOR, weight(r, bias)), OUT(y), &a);
  return y;
}

// The same with a matrix per modality, or one matrix where w[IMAGE] is absent.
static TensorId linear_rows(Recording *r, TensorId x, const int w[2], int in, int out, const char *name) {
  TensorId y = rows_tensor(r, out, name);
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(x, weight(r, w[TEXT]), weight(r, w[IMAGE]), NO_TENSOR), OUT(y), &a);
  return y;
}

static TensorId linear_dgrad(Recording *r, Extent extent, TensorId dy, int w, TensorId add, int in, int out, int rows,
                             const char *name) {
  TensorId dx = program_tensor(r->p, DT_ACT, (int64_t)rows * in, "%s", name);
  OpArgs a = linear_args(extent, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_DGRAD, IN(dy, weight(r, w), NO_TENSOR, add), OUT(dx), &a);
  return dx;
}

static TensorId linear_rows_dgrad(Recording *r, TensorId dy, const int w[2], int in, int out, const char *name) {
  TensorId dx = rows_tensor(r, in, name);
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_DGRAD, IN(dy, weight(r, w[TEXT]), weight(r, w[IMAGE]), NO_TENSOR), OUT(dx), &a);
  return dx;
}

static void linear_wgrad(Recording *r, Extent extent, TensorId dy, TensorId x, int w, int bias, int in, int out) {
  OpArgs a = linear_args(extent, in, in, out, out, r->accumulate);
  program_op(r->p, OP_LINEAR_WGRAD, IN(dy, x), OUT(gradient(r, w), NO_TENSOR, gradient(r, bias)), &a);
}

static void linear_rows_wgrad(Recording *r, TensorId dy, TensorId x, const int w[2], int in, int out) {
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, r->accumulate);
  program_op(r->p, OP_LINEAR_WGRAD, IN(dy, x), OUT(gradient(r, w[TEXT]), gradient(r, w[IMAGE]), NO_TENSOR), &a);
}

// ---- forward ----

typedef struct Input {           // of the condition and the embeddings, for the backward pass
  TensorId z, bottleneck;        // [T, P], [T, B]
  TensorId features, t1, t1_act; // [SEG, 256], [SEG, Z] x 2
  TensorId pooled, c, a;         // [SEG, C], [SEG, Z] x 2
} Input;

// c = W2 silu(W1 features) + Wp pooled + e_kind; mod = S + U silu(c).
static void record_condition(Recording *r, Input *in) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  int64_t SEG = d->segments, Z = d->Z;
  in->features = program_tensor(r->p, DT_ACT, SEG * TIME_FEATURES, "time features");
  program_op(r->p, OP_TIME_FEATURES, NULL, OUT(in->features), NULL);
  in->t1 = linear(r, EXT_SEGMENTS, in->features, w->time1, w->time1_bias, TIME_FEATURES, d->Z, d->segments, "time1");
  in->t1_act = program_tensor(r->p, DT_ACT, SEG * Z, "time1 activation");
  program_op(r->p, OP_SILU_FWD, IN(in->t1), OUT(in->t1_act), NULL);
  TensorId t2 = linear(r, EXT_SEGMENTS, in->t1_act, w->time2, w->time2_bias, d->Z, d->Z, d->segments, "time2");
  in->pooled = program_tensor(r->p, DT_ACT, SEG * d->C, "pooled caption");
  program_op(r->p, OP_POOL_FWD, IN(weight(r, w->embed)), OUT(in->pooled), NULL);
  TensorId pool = linear(r, EXT_SEGMENTS, in->pooled, w->cond_pool, -1, d->C, d->Z, d->segments, "pool projection");
  in->c = program_tensor(r->p, DT_ACT, SEG * Z, "condition");
  in->a = program_tensor(r->p, DT_ACT, SEG * Z, "condition activation");
  program_op(r->p, OP_COND_FWD, IN(t2, pool, weight(r, w->cond_kind)), OUT(in->c, in->a), NULL);
  r->mod = program_tensor(r->p, DT_ACT, SEG * d->M, "modulation");
  program_op(r->p, OP_MOD_FWD, IN(in->a, weight(r, w->mod_weight), weight(r, w->mod_base)), OUT(r->mod), NULL);
}

// Text rows: their embedding. Image rows: patch -> optional bottleneck -> C. Returns x [T, C].
static TensorId record_embedding(Recording *r, Input *in) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  int B = r->config->model.patch_bottleneck;
  if (r->mode == MODE_DRAW) {
    in->z = program_external(r->p, SPACE_INPUT, 0, DT_ACT, (int64_t)d->T * d->P, "z");
  } else {
    OpArgs a = {.noise = {.stream = r->mode == MODE_EVAL ? STREAM_EVAL : STREAM_NOISE}};
    in->z = rows_tensor(r, d->P, "z");
    program_op(r->p, OP_NOISE, NULL, OUT(in->z), &a);
  }
  in->bottleneck = B ? linear(r, EXT_IMAGE, in->z, w->patch_down, -1, d->P, B, d->T, "patch bottleneck") : in->z;
  TensorId image =
      linear(r, EXT_IMAGE, in->bottleneck, w->patch_in, w->patch_in_bias, B ? B : d->P, d->C, d->T, "patch embedding");
  TensorId x = rows_tensor(r, d->C, "x");
  program_op(r->p, OP_EMBED_FWD, IN(weight(r, w->embed), image), OUT(x), NULL);
  return x;
}

// One site: (gate + residual of the branch before, if any) + LayerNorm + modulation. Returns the new x.
static TensorId record_adaln(Recording *r, TensorId x, TensorId branch, OpArgs args, TensorId *h, TensorId *mean,
                             TensorId *rstd) {
  const Dims *d = &r->d;
  TensorId xnew = branch < 0 ? NO_TENSOR : rows_tensor(r, d->C, "x");
  *h = rows_tensor(r, d->C, "h");
  *mean = program_tensor(r->p, DT_REAL, d->T, "mean");
  *rstd = program_tensor(r->p, DT_REAL, d->T, "rstd");
  program_op(r->p, OP_ADALN_FWD, IN(x, branch, r->mod), OUT(xnew, *h, *mean, *rstd), &args);
  return branch < 0 ? x : xnew;
}

static OpArgs adaln_args(const Recording *r, int gate, int l, int shift_part) {
  return (OpArgs){.adaln = {.gate = gate,
                            .shift = column(r, l, shift_part),
                            .scale = column(r, l, shift_part) + r->d.C,
                            .silu_image = l == r->d.L}};
}

// b1 = attention(h1) Wo.
static void record_attention(Recording *r, int l) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  Forward *f = &r->layer[l];
  int HD = d->H * d->D, GD = d->G * d->D;
  f->qkv = linear_rows(r, f->h1, w->qkv, d->C, HD + 2 * GD, "qkv");
  program_save(r->p, f->qkv, SAVED_QKV);
  f->q = rows_tensor(r, HD, "q");
  f->k = rows_tensor(r, GD, "k");
  f->v = rows_tensor(r, GD, "v");
  program_op(r->p, OP_QKNORM_ROPE_FWD, IN(f->qkv, weight(r, w->q_norm), weight(r, w->k_norm)), OUT(f->q, f->k, f->v),
             NULL);
  program_save(r->p, f->q, SAVED_QKV_ROTATED);
  program_save(r->p, f->k, SAVED_QKV_ROTATED);
  program_save(r->p, f->v, SAVED_QKV_ROTATED);
  f->o = rows_tensor(r, HD, "attention out");
  f->lse = program_tensor(r->p, DT_REAL, (int64_t)d->H * d->T, "attention lse");
  program_op(r->p, OP_ATTENTION_FWD, IN(f->q, f->k, f->v), OUT(f->o, f->lse), NULL);
  program_save(r->p, f->o, SAVED_ATTENTION);
  program_save(r->p, f->lse, SAVED_ATTENTION);
  f->b1 = linear_rows(r, f->o, w->out, HD, d->C, "attention branch");
  program_save(r->p, f->b1, SAVED_B1);
}

static int has_shared(const Dims *d) {
  return d->S[TEXT] || d->S[IMAGE];
}

// Shared_m(h2), or NO_TENSOR where neither modality has a shared expert.
static TensorId record_shared(Recording *r, int l) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  Forward *f = &r->layer[l];
  f->shared_pre = NO_TENSOR;
  if (!has_shared(d)) return NO_TENSOR;
  f->shared_pre = two_sided(r, DT_ACT, one_row, 2 * d->S[0], 2 * d->S[1], "shared pre-activation");
  OpArgs up = linear_args(EXT_SPLIT, d->C, d->C, 2 * d->S[0], 2 * d->S[1], 0);
  program_op(r->p, OP_LINEAR_FWD, IN(f->h2, weight(r, w->shared1[0]), weight(r, w->shared1[1]), NO_TENSOR),
             OUT(f->shared_pre), &up);
  program_save(r->p, f->shared_pre, SAVED_SHARED_PRE);
  TensorId a = two_sided(r, DT_ACT, one_row, d->S[0], d->S[1], "shared activation");
  program_op(r->p, OP_SWIGLU_FWD, IN(f->shared_pre), OUT(a), NULL);
  TensorId y = rows_tensor(r, d->C, "shared out");
  OpArgs down = linear_args(EXT_SPLIT, d->S[0], d->S[1], d->C, d->C, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(a, weight(r, w->shared2[0]), weight(r, w->shared2[1]), NO_TENSOR), OUT(y), &down);
  return y;
}

static OpArgs router_args(const Recording *r, int l) {
  return (OpArgs){.router = {.accumulate = r->accumulate,
                             .balance = r->config->router.balance / r->d.L,
                             .z = r->config->router.z / r->d.L,
                             .layer = l}};
}

// The terms of b2 = Shared(h2) + MoE(h2).
static void record_experts(Recording *r, int l) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  Forward *f = &r->layer[l];
  f->router_logits = two_sided(r, DT_REAL, one_row, d->E[0], d->E[1], "router logits");
  f->router_weights = program_tensor(r->p, DT_REAL, (int64_t)d->T * dims_kmax(d), "router weights");
  f->route = program_tensor(r->p, DT_I32, route_bind(&(Route){0}, d, NULL), "route");
  OpArgs router = router_args(r, l);
  program_op(r->p, OP_ROUTER_FWD, IN(f->h2, weight(r, w->router[0]), weight(r, w->router[1])),
             OUT(f->router_logits, f->router_weights, f->route), &router);
  program_save(r->p, f->router_logits, SAVED_ROUTER);
  program_save(r->p, f->router_weights, SAVED_ROUTER);
  program_save(r->p, f->route, SAVED_ROUTER);
  if (r->train || r->mode == MODE_EVAL)
    program_op(r->p, OP_ROUTER_LOSS, IN(f->router_logits, f->route), OUT(r->metrics), &router);
  f->shared_out = record_shared(r, l);
  f->expert_pre = two_sided(r, DT_ACT, d->K, 2 * d->F[0], 2 * d->F[1], "expert pre-activation");
  TensorId a = two_sided(r, DT_ACT, d->K, d->F[0], d->F[1], "expert activation");
  program_op(r->p, OP_EXPERT_UP_FWD, IN(f->h2, f->route, weight(r, w->w1[0]), weight(r, w->w1[1])),
             OUT(f->expert_pre, a), NULL);
  program_save(r->p, f->expert_pre, SAVED_EXPERT_PRE);
  f->expert_out = two_sided(r, DT_ACT, d->K, d->C, d->C, "expert out");
  program_op(r->p, OP_EXPERT_DOWN_FWD, IN(a, f->route, weight(r, w->w2[0]), weight(r, w->w2[1])), OUT(f->expert_out),
             NULL);
}

// The end of layer l: b2, and the site that follows, `site`, which adds it to x. Returns the new x. One op where the
// backend has it.
static TensorId record_combine_adaln(Recording *r, int l, TensorId x, OpArgs site, TensorId *h, TensorId *mean,
                                     TensorId *rstd) {
  const Dims *d = &r->d;
  Forward *f = &r->layer[l];
  const TensorId terms[OP_MAX_IN] = {f->expert_out, f->route, f->router_weights, f->shared_out};
  if (!r->model->backend->fn[OP_COMBINE_ADALN_FWD]) {
    f->b2 = rows_tensor(r, d->C, "expert branch");
    program_op(r->p, OP_EXPERT_COMBINE, terms, OUT(f->b2), NULL);
    program_save(r->p, f->b2, SAVED_B2);
    return record_adaln(r, x, f->b2, site, h, mean, rstd);
  }
  f->b2 = r->train ? rows_tensor(r, d->C, "expert branch") : NO_TENSOR;
  TensorId xnew = rows_tensor(r, d->C, "x");
  *h = rows_tensor(r, d->C, "h");
  *mean = program_tensor(r->p, DT_REAL, d->T, "mean");
  *rstd = program_tensor(r->p, DT_REAL, d->T, "rstd");
  program_op(r->p, OP_COMBINE_ADALN_FWD, IN(terms[0], terms[1], terms[2], terms[3], x, r->mod),
             OUT(f->b2, xnew, *h, *mean, *rstd), &site);
  if (r->train) {
    program_save(r->p, f->b2, SAVED_B2);
    program_save_rebuild(r->p, OUT(f->b2, NO_TENSOR, NO_TENSOR, NO_TENSOR, NO_TENSOR), OP_EXPERT_COMBINE, terms, NULL);
  }
  return xnew;
}

// The site in front of layer l's attention (l = L: of the heads). Takes the residual stream before the branch of the
// layer below was added, or the input (l = 0); returns it after. Belongs to the layer below, as b2 does.
static TensorId record_site1(Recording *r, int l, TensorId x, TensorId *h, TensorId *mean, TensorId *rstd) {
  OpArgs site = adaln_args(r, l ? column(r, l - 1, GATE2) : 0, l, SHIFT1);
  if (l == 0) return record_adaln(r, x, NO_TENSOR, site, h, mean, rstd);
  return record_combine_adaln(r, l - 1, x, site, h, mean, rstd);
}

// h = AdaLN(x); b1 = attention(h); x2 = x + gate1 b1; h = AdaLN(x2); the terms of b2 = experts(h). Returns x2: the sum
// x2 + gate2 b2 belongs to the next site.
static TensorId record_block(Recording *r, int l, TensorId x) {
  Forward *f = &r->layer[l];
  f->x = record_site1(r, l, x, &f->h1, &f->mean1, &f->rstd1);
  program_layer(r->p, l);
  program_save(r->p, f->x, SAVED_X);
  program_save(r->p, f->mean1, SAVED_NORM_STATS);
  program_save(r->p, f->rstd1, SAVED_NORM_STATS);
  program_save(r->p, f->h1, SAVED_H1);
  OpArgs again = adaln_args(r, 0, l, SHIFT1);
  // x alone rebuilds h1 with the same bits: the site took them from the rounded x.
  program_save_rebuild(r->p, OUT(NO_TENSOR, f->h1, f->mean1, f->rstd1), OP_ADALN_FWD, IN(f->x, NO_TENSOR, r->mod),
                       &again);
  record_attention(r, l);
  TensorId x2 =
      record_adaln(r, f->x, f->b1, adaln_args(r, column(r, l, GATE1), l, SHIFT2), &f->h2, &f->mean2, &f->rstd2);
  program_save(r->p, x2, SAVED_X2);
  program_save(r->p, f->h2, SAVED_H2);
  program_save(r->p, f->mean2, SAVED_NORM_STATS);
  program_save(r->p, f->rstd2, SAVED_NORM_STATS);
  record_experts(r, l);
  return x2;
}

typedef struct Ends { // the final site and the heads
  TensorId x, h, mean, rstd;
  TensorId dh;    // [T, C] from the text head, where training
  TensorId dxhat; // [T, P]
} Ends;

static void record_text_head(Recording *r, Ends *e, ModelProgram *out) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  int head = w->head < 0 ? w->embed : w->head;
  if (r->mode == MODE_WRITE) {
    // One row is asked for per document, and each has at least an image.
    out->logits = program_tensor(r->p, DT_REAL, (int64_t)d->segments * d->V, "logits");
    program_op(r->p, OP_HEAD_LOGITS, IN(e->h, weight(r, head)), OUT(out->logits), NULL);
    return;
  }
  int chunk = (int)min_i64(r->model->backend->head_chunk, d->T);
  OpArgs a = {.head = {.accumulate = r->accumulate, .chunk = chunk}};
  TensorId work = program_tensor(r->p, DT_REAL, (int64_t)chunk * d->V, "logits chunk");
  out->nll = program_tensor(r->p, DT_REAL, d->T, "nll");
  e->dh = r->train ? rows_tensor(r, d->C, "dh") : NO_TENSOR;
  program_op(r->p, OP_HEAD_CE, IN(e->h, weight(r, head)),
             OUT(out->nll, e->dh, r->train ? gradient(r, head) : NO_TENSOR, r->metrics, work), &a);
}

static void record_image_head(Recording *r, Ends *e, ModelProgram *out) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  out->xhat = linear(r, EXT_IMAGE, e->h, w->image_head, w->image_head_bias, d->C, d->P, d->T, "xhat");
  if (r->mode == MODE_DRAW) return;
  OpArgs a = {.flow = {.t_floor = r->config->flow.t_floor}};
  e->dxhat = r->train ? rows_tensor(r, d->P, "dxhat") : NO_TENSOR;
  out->seg_error = program_tensor(r->p, DT_REAL, d->segments, "segment error");
  program_op(r->p, OP_FLOW_LOSS, IN(out->xhat), OUT(e->dxhat, out->seg_error, r->metrics), &a);
}

// ---- backward ----

// What dh2 [T, C] is the sum of: EXPERT_COMBINE's operands.
typedef struct ExpertGradient {
  TensorId slots, route, router; // two-sided [T K_m, C], Route, [T, C]
} ExpertGradient;

// The terms of dh2 from db2, and the gradients of the layer's experts, shared expert and router.
static ExpertGradient record_experts_backward(Recording *r, int l, TensorId db2) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const Forward *f = &r->layer[l];
  Program *p = r->p;
  TensorId route = program_need(p, f->route), weights = program_need(p, f->router_weights);
  TensorId pre = program_need(p, f->expert_pre), h2 = program_need(p, f->h2);
  OpArgs acc = {.span = {.accumulate = r->accumulate}};
  TensorId dpre = two_sided(r, DT_ACT, d->K, 2 * d->F[0], 2 * d->F[1], "d expert pre-activation");
  TensorId sa = two_sided(r, DT_ACT, d->K, d->F[0], d->F[1], "weighted activation");
  TensorId dweights = program_tensor(p, DT_REAL, (int64_t)d->T * dims_kmax(d), "d router weights");
  program_op(p, OP_EXPERT_DOWN_BWD, IN(db2, pre, weights, route, weight(r, w->w2[0]), weight(r, w->w2[1])),
             OUT(dpre, sa, dweights), NULL);
  program_op(p, OP_EXPERT_DOWN_WGRAD, IN(db2, sa, route), OUT(gradient(r, w->w2[0]), gradient(r, w->w2[1])), &acc);
  TensorId dslot = two_sided(r, DT_ACT, d->K, d->C, d->C, "d expert input");
  program_op(p, OP_EXPERT_UP_DGRAD, IN(dpre, route, weight(r, w->w1[0]), weight(r, w->w1[1])), OUT(dslot), NULL);
  program_op(p, OP_EXPERT_UP_WGRAD, IN(dpre, h2, route), OUT(gradient(r, w->w1[0]), gradient(r, w->w1[1])), &acc);

  TensorId dh = NO_TENSOR;
  if (has_shared(d)) {
    TensorId spre = program_need(p, f->shared_pre);
    TensorId da = two_sided(r, DT_ACT, one_row, d->S[0], d->S[1], "d shared activation");
    OpArgs down = linear_args(EXT_SPLIT, d->S[0], d->S[1], d->C, d->C, r->accumulate);
    program_op(p, OP_LINEAR_DGRAD, IN(db2, weight(r, w->shared2[0]), weight(r, w->shared2[1]), NO_TENSOR), OUT(da),
               &down);
    TensorId dspre = two_sided(r, DT_ACT, one_row, 2 * d->S[0], 2 * d->S[1], "d shared pre-activation");
    TensorId a = two_sided(r, DT_ACT, one_row, d->S[0], d->S[1], "shared activation");
    program_op(p, OP_SWIGLU_BWD, IN(da, spre), OUT(dspre, a), NULL);
    program_op(p, OP_LINEAR_WGRAD, IN(db2, a), OUT(gradient(r, w->shared2[0]), gradient(r, w->shared2[1]), NO_TENSOR),
               &down);
    OpArgs up = linear_args(EXT_SPLIT, d->C, d->C, 2 * d->S[0], 2 * d->S[1], r->accumulate);
    program_op(p, OP_LINEAR_WGRAD, IN(dspre, h2),
               OUT(gradient(r, w->shared1[0]), gradient(r, w->shared1[1]), NO_TENSOR), &up);
    dh = rows_tensor(r, d->C, "dh shared");
    program_op(p, OP_LINEAR_DGRAD, IN(dspre, weight(r, w->shared1[0]), weight(r, w->shared1[1]), NO_TENSOR), OUT(dh),
               &up);
  }
  OpArgs router = router_args(r, l);
  TensorId dh_router = rows_tensor(r, d->C, "dh router");
  program_op(p, OP_ROUTER_BWD,
             IN(dweights, program_need(p, f->router_logits), weights, route, h2, weight(r, w->router[0]),
                weight(r, w->router[1]), dh),
             OUT(dh_router, gradient(r, w->router[0]), gradient(r, w->router[1])), &router);
  return (ExpertGradient){dslot, route, dh_router};
}

// Returns dh1 from db1.
static TensorId record_attention_backward(Recording *r, int l, TensorId db1) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const Forward *f = &r->layer[l];
  Program *p = r->p;
  int HD = d->H * d->D, GD = d->G * d->D;
  TensorId o = program_need(p, f->o);
  linear_rows_wgrad(r, db1, o, w->out, HD, d->C);
  TensorId d_o = linear_rows_dgrad(r, db1, w->out, HD, d->C, "d attention out");
  TensorId dq = rows_tensor(r, HD, "dq"), dk = rows_tensor(r, GD, "dk"), dv = rows_tensor(r, GD, "dv");
  program_op(p, OP_ATTENTION_BWD,
             IN(d_o, o, program_need(p, f->q), program_need(p, f->k), program_need(p, f->v), program_need(p, f->lse)),
             OUT(dq, dk, dv), NULL);
  TensorId dqkv = rows_tensor(r, HD + 2 * GD, "dqkv");
  OpArgs acc = {.span = {.accumulate = r->accumulate}};
  program_op(p, OP_QKNORM_ROPE_BWD, IN(dq, dk, dv, program_need(p, f->qkv), weight(r, w->q_norm), weight(r, w->k_norm)),
             OUT(dqkv, gradient(r, w->q_norm), gradient(r, w->k_norm)), &acc);
  linear_rows_wgrad(r, dqkv, program_need(p, f->h1), w->qkv, d->C, HD + 2 * GD);
  return linear_rows_dgrad(r, dqkv, w->qkv, d->C, HD + 2 * GD, "dh1");
}

// Backward of one site. x: the residual stream after the branch was added (x_is_new), or before. Gives dx of the stream
// before the branch, and the branch's gradient where it has one.
static TensorId record_adaln_backward(Recording *r, OpArgs args, TensorId dh, TensorId dxnew, TensorId x,
                                      TensorId branch, TensorId mean, TensorId rstd, TensorId *dbranch) {
  TensorId dx = rows_tensor(r, r->d.C, "dx");
  *dbranch = branch < 0 ? NO_TENSOR : rows_tensor(r, r->d.C, "d branch");
  program_op(r->p, OP_ADALN_BWD, IN(dh, dxnew, x, branch, r->mod, mean, rstd), OUT(dx, *dbranch, r->dmod), &args);
  return dx;
}

// dh2, and the backward of the layer's second site: from dx of x2 to dx of x, and db1. One op where the backend has it.
static TensorId record_combine_adaln_backward(Recording *r, int l, ExpertGradient dh, TensorId dxnew, TensorId *db1) {
  const Forward *f = &r->layer[l];
  Program *p = r->p;
  const OpArgs site = adaln_args(r, column(r, l, GATE1), l, SHIFT2);
  TensorId x = program_need(p, f->x), b1 = program_need(p, f->b1);
  TensorId mean = program_need(p, f->mean2), rstd = program_need(p, f->rstd2);
  if (!r->model->backend->fn[OP_COMBINE_ADALN_BWD]) {
    TensorId dh2 = rows_tensor(r, r->d.C, "dh2");
    program_op(p, OP_EXPERT_COMBINE, IN(dh.slots, dh.route, NO_TENSOR, dh.router), OUT(dh2), NULL);
    return record_adaln_backward(r, site, dh2, dxnew, x, b1, mean, rstd, db1);
  }
  TensorId dx = rows_tensor(r, r->d.C, "dx");
  *db1 = rows_tensor(r, r->d.C, "d branch");
  program_op(p, OP_COMBINE_ADALN_BWD, IN(dh.slots, dh.route, dh.router, dxnew, x, b1, r->mod, mean, rstd),
             OUT(dx, *db1, r->dmod), &site);
  return dx;
}

// From dx (of x2) and db2 to dx of what came before the layer's first site, and the branch gradient of the layer below.
static TensorId record_block_backward(Recording *r, int l, TensorId dx, TensorId *dbranch) {
  const Forward *f = &r->layer[l];
  Program *p = r->p;
  TensorId db1;
  dx = record_combine_adaln_backward(r, l, record_experts_backward(r, l, *dbranch), dx, &db1);
  TensorId dh1 = record_attention_backward(r, l, db1);
  OpArgs site1 = adaln_args(r, l ? column(r, l - 1, GATE2) : 0, l, SHIFT1);
  site1.adaln.x_is_new = 1;
  TensorId below = l ? program_need(p, r->layer[l - 1].b2) : NO_TENSOR;
  return record_adaln_backward(r, site1, dh1, dx, program_need(p, f->x), below, program_need(p, f->mean1),
                               program_need(p, f->rstd1), dbranch);
}

// Gradients of patch embedding, condition and text embedding from dx of the input and dmod.
static void record_input_backward(Recording *r, const Input *in, TensorId dx) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  Program *p = r->p;
  int64_t SEG = d->segments;
  int B = r->config->model.patch_bottleneck;
  OpArgs acc = {.span = {.accumulate = r->accumulate}};

  linear_wgrad(r, EXT_IMAGE, dx, in->bottleneck, w->patch_in, w->patch_in_bias, B ? B : d->P, d->C);
  if (B) {
    TensorId db = linear_dgrad(r, EXT_IMAGE, dx, w->patch_in, NO_TENSOR, B, d->C, d->T, "d patch bottleneck");
    linear_wgrad(r, EXT_IMAGE, db, in->z, w->patch_down, -1, d->P, B);
  }
  program_op(p, OP_MOD_BWD, IN(r->dmod), OUT(gradient(r, w->mod_base)), &acc);
  linear_wgrad(r, EXT_SEGMENTS, r->dmod, in->a, w->mod_weight, -1, d->Z, d->M);
  TensorId da = linear_dgrad(r, EXT_SEGMENTS, r->dmod, w->mod_weight, NO_TENSOR, d->Z, d->M, d->segments, "da");
  TensorId dc = program_tensor(p, DT_ACT, SEG * d->Z, "d condition");
  program_op(p, OP_COND_BWD, IN(da, in->c), OUT(dc, gradient(r, w->cond_kind)), &acc);

  linear_wgrad(r, EXT_SEGMENTS, dc, in->t1_act, w->time2, w->time2_bias, d->Z, d->Z);
  TensorId dt1_act = linear_dgrad(r, EXT_SEGMENTS, dc, w->time2, NO_TENSOR, d->Z, d->Z, d->segments, "d time1 act");
  TensorId dt1 = program_tensor(p, DT_ACT, SEG * d->Z, "d time1");
  program_op(p, OP_SILU_BWD, IN(dt1_act, in->t1), OUT(dt1), NULL);
  linear_wgrad(r, EXT_SEGMENTS, dt1, in->features, w->time1, w->time1_bias, TIME_FEATURES, d->Z);

  linear_wgrad(r, EXT_SEGMENTS, dc, in->pooled, w->cond_pool, -1, d->C, d->Z);
  TensorId dpooled = linear_dgrad(r, EXT_SEGMENTS, dc, w->cond_pool, NO_TENSOR, d->C, d->Z, d->segments, "d pooled");
  TensorId dmean = program_tensor(p, DT_ACT, SEG * d->C, "d caption mean");
  program_op(p, OP_POOL_BWD, IN(dpooled, weight(r, w->embed)), OUT(dmean), NULL);
  // Tied: the text head has already written this gradient.
  if (w->head < 0) acc.span.accumulate = 1;
  program_op(p, OP_EMBED_BWD, IN(dx, dmean), OUT(gradient(r, w->embed)), &acc);
}

static void record_backward(Recording *r, const Input *in, const Ends *e) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  Program *p = r->p;
  int L = d->L;
  program_layer(p, L);
  linear_wgrad(r, EXT_IMAGE, e->dxhat, e->h, w->image_head, w->image_head_bias, d->C, d->P);
  TensorId dh = linear_dgrad(r, EXT_IMAGE, e->dxhat, w->image_head, e->dh, d->C, d->P, d->T, "dh final");
  r->dmod = program_tensor(p, DT_ACT, (int64_t)d->segments * d->M, "d modulation");
  OpArgs final = adaln_args(r, column(r, L - 1, GATE2), L, SHIFT1);
  final.adaln.x_is_new = 1;
  TensorId dbranch;
  TensorId dx = record_adaln_backward(r, final, dh, NO_TENSOR, e->x, program_need(p, r->layer[L - 1].b2), e->mean,
                                      e->rstd, &dbranch);
  for (int l = L - 1; l >= 0; l--) {
    program_layer(p, l);
    dx = record_block_backward(r, l, dx, &dbranch);
  }
  program_layer(p, -1);
  record_input_backward(r, in, dx);
}

// ---- programs ----

// The gradient of a micro-step formed apart is added to the step's.
static void record_gradient_sum(Recording *r) {
  int64_t n = r->model->params.total;
  TensorId micro = program_external(r->p, SPACE_MICRO_GRADS, 0, DT_REAL, n, "micro-step gradients");
  TensorId total = program_external(r->p, SPACE_GRADS, 0, DT_REAL, n, "gradients");
  OpArgs a = {.span = {.count = n, .accumulate = 1}};
  program_op(r->p, OP_ADD, IN(micro), OUT(total), &a);
}

ModelProgram transformer_record(const Model *model, Mode mode, int slots, int segments, const PolicyTable *policy) {
  static const char *const names[] = {"train first", "train later", "eval", "draw", "write"};
  const Config *c = model->config;
  ModelProgram out = {.z = NO_TENSOR, .xhat = NO_TENSOR, .nll = NO_TENSOR, .seg_error = NO_TENSOR, .logits = NO_TENSOR};
  Recording *r = xcalloc(1, sizeof *r + (size_t)c->model.layers * sizeof(Forward));
  r->model = model;
  r->config = c;
  r->d = dims_from_config(c, slots, segments);
  r->mode = mode;
  r->train = mode == MODE_TRAIN_FIRST || mode == MODE_TRAIN_LATER;
  int apart = mode == MODE_TRAIN_LATER && model->backend->gradient_per_micro;
  r->accumulate = mode == MODE_TRAIN_LATER && !apart;
  r->grads = apart ? SPACE_MICRO_GRADS : SPACE_GRADS;
  Program *p = r->p = program_new(names[mode], &r->d, model->backend, r->train ? policy : NULL);

  int64_t pack_bytes = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&r->d), NULL);
  OpArgs copy = {.span = {.count = pack_bytes}};
  program_op(p, OP_COPY, IN(program_external(p, SPACE_STAGING, 0, DT_U8, pack_bytes, "staged pack")),
             OUT(program_external(p, SPACE_BATCH, 0, DT_U8, pack_bytes, "pack")), &copy);
  p->takes_pack = 1;
  int64_t n_metrics = metrics_size(&r->d);
  r->metrics = program_external(p, SPACE_METRICS, 0, DT_F64, n_metrics, "metrics");
  if (mode == MODE_TRAIN_FIRST) { // evaluation sums over many replays
    OpArgs zero = {.span = {.count = n_metrics * (int64_t)sizeof(double)}};
    program_op(p, OP_ZERO, NULL, OUT(r->metrics), &zero);
  }

  Input in;
  Ends e = {.dh = NO_TENSOR, .dxhat = NO_TENSOR};
  program_layer(p, -1);
  record_condition(r, &in);
  TensorId x = record_embedding(r, &in);
  for (int l = 0; l < r->d.L; l++) x = record_block(r, l, x);
  e.x = record_site1(r, r->d.L, x, &e.h, &e.mean, &e.rstd);
  program_layer(p, r->d.L);
  if (mode != MODE_DRAW) record_text_head(r, &e, &out);
  if (mode != MODE_WRITE) record_image_head(r, &e, &out);
  if (r->train) record_backward(r, &in, &e);
  if (apart) record_gradient_sum(r);

  if (mode != MODE_DRAW) out.z = in.z;
  const TensorId results[] = {out.z, out.xhat, out.nll, out.seg_error, out.logits};
  for (size_t i = 0; i < sizeof results / sizeof *results; i++)
    if (results[i] != NO_TENSOR) program_output(p, results[i]);
  program_finish(p);
  out.program = p;
  free(r);
  return out;
}

Program *update_record(const Model *model, int ema) {
  const ParamTable *w = &model->params;
  Dims d = dims_from_config(model->config, 1, 1);
  Program *p = program_new(ema ? "update with ema" : "update", &d, model->backend, NULL);
  int64_t n = w->total;
  TensorId weights = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, n, "weights");
  TensorId grads = program_external(p, SPACE_GRADS, 0, DT_REAL, n, "gradients");
  TensorId m = program_external(p, SPACE_ADAM_M, 0, DT_REAL, n, "adam m");
  TensorId v = program_external(p, SPACE_ADAM_V, 0, DT_REAL, n, "adam v");
  TensorId scalars = program_external(p, SPACE_SCALARS, 0, DT_U8, sizeof(StepScalars), "scalars");
  TensorId status = program_external(p, SPACE_STATUS, 0, DT_U8, sizeof(UpdateStatus), "status");
  TensorId metrics = program_external(p, SPACE_METRICS, 0, DT_F64, metrics_size(&d), "metrics");
  TensorId partial = program_tensor(p, DT_F64, w->n, "squared norms");
  OpArgs a = {.params = {.spans = w->spans, .n = w->n}};
  program_op(p, OP_GRAD_NORM, IN(grads, metrics, scalars), OUT(status, partial), &a);
  TensorId rest = NO_TENSOR;
  if (model->backend->master_rest) rest = program_external(p, SPACE_REST, 0, DT_U8, 2 * n, "rest of the weights");
  program_op(p, OP_ADAMW, IN(grads, status, scalars), OUT(weights, m, v, rest), &a);
  if (ema)
    program_op(p, OP_EMA, IN(weights, status, scalars, rest), OUT(program_external(p, SPACE_EMA, 0, DT_REAL, n, "ema")),
               &a);
  program_finish(p);
  return p;
}

Program *hash_record(const Model *model, TensorId *hash) {
  const ParamTable *w = &model->params;
  Dims d = dims_from_config(model->config, 1, 1);
  Program *p = program_new("gradient hash", &d, model->backend, NULL);
  TensorId grads = program_external(p, SPACE_GRADS, 0, DT_REAL, w->total, "gradients");
  *hash = program_tensor(p, DT_U8, w->n * (int64_t)sizeof(uint64_t), "hashes"); // [n] U64
  program_op(p, OP_GRAD_HASH, IN(grads), OUT(*hash), &(OpArgs){.params = {.spans = w->spans, .n = w->n}});
  program_output(p, *hash);
  program_finish(p);
  return p;
}

Program *ema_record(const Model *model, int enter) {
  Dims d = dims_from_config(model->config, 1, 1);
  Program *p = program_new(enter ? "ema in" : "ema out", &d, model->backend, NULL);
  int64_t n = model->params.total, bytes = n * (int64_t)model->backend->dtype_bytes[DT_ACT];
  TensorId weights = program_external(p, SPACE_WEIGHTS, 0, DT_ACT, n, "weights");
  TensorId aside = program_external(p, SPACE_GRADS, 0, DT_ACT, n, "weights laid aside");
  OpArgs copy = {.span = {.count = bytes}}, cast = {.span = {.count = n}};
  program_op(p, OP_COPY, IN(enter ? weights : aside), OUT(enter ? aside : weights), &copy);
  if (enter) program_op(p, OP_CAST, IN(program_external(p, SPACE_EMA, 0, DT_REAL, n, "ema")), OUT(weights), &cast);
  program_finish(p);
  return p;
}

double transformer_flops(const Config *c, double text_tokens, double image_tokens, double pairs) {
  return 6 * ((double)params_active(c, TEXT) * text_tokens + (double)params_active(c, IMAGE) * image_tokens) +
         12.0 * c->model.layers * c->model.heads * c->model.head_dim * pairs;
}
