// The input, forward and backward: the condition of image segments with the modulation it gives, and the embeddings.
#include "base/philox.h"
#include "model/recording.h"

// c = W2 silu(W1 features) + Wp pooled + e_kind; mod = S + U silu(c).
static void record_condition(Recording *r, Input *in) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  int64_t SEG = d->segments, Z = d->Z;
  in->features = program_tensor(r->p, DT_ACT, SEG * TIME_FEATURES, "time features");
  program_op(r->p, OP_TIME_FEATURES, IN(), OUT(in->features), NULL);
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
  if (r->mode == MODE_GENERATE) {
    in->z = program_external(r->p, SPACE_INPUT, 0, DT_ACT, (int64_t)d->T * d->P, "z");
  } else {
    OpArgs a = {.noise = {.stream = r->mode == MODE_EVAL ? STREAM_EVAL : STREAM_NOISE}};
    in->z = rows_tensor(r, d->P, "z");
    program_op(r->p, OP_NOISE, IN(), OUT(in->z), &a);
  }
  in->bottleneck = B ? linear(r, EXT_IMAGE, in->z, w->patch_down, -1, d->P, B, d->T, "patch bottleneck") : in->z;
  TensorId image =
      linear(r, EXT_IMAGE, in->bottleneck, w->patch_in, w->patch_in_bias, B ? B : d->P, d->C, d->T, "patch embedding");
  TensorId x = rows_tensor(r, d->C, "x");
  program_op(r->p, OP_EMBED_FWD, IN(weight(r, w->embed), image), OUT(x), NULL);
  return x;
}

TensorId record_input(Recording *r, Input *in) {
  record_condition(r, in);
  return record_embedding(r, in);
}

// Gradients of patch embedding, condition and text embedding from dx of the input and dmod.
void record_input_backward(Recording *r, const Input *in, TensorId dx) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  Program *p = r->p;
  int64_t SEG = d->segments;
  int B = r->config->model.patch_bottleneck;
  OpArgs acc = {.accumulate = r->accumulate};

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
  if (w->head < 0) acc.accumulate = 1;
  program_op(p, OP_EMBED_BWD, IN(dx, dmean), OUT(gradient(r, w->embed)), &acc);
}
