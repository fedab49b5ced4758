// The programs of passes: training, evaluation and sampling (input.c, layer.c and heads.c, in this order and back).
#include "model/transformer.h"

#include "model/placement.h"
#include "model/program/compile.h"
#include "model/recording.h"
#include "model/update.h"

#include <stdlib.h>

// ---- gradients of a layer ----

// The gradient of a micro-step formed apart is added to the step's.
static void record_gradient_sum(Recording *r, const ParamBucket *b) {
  TensorId micro = bucket_gradients(r->p, r->model, b, SPACE_MICRO_GRADS);
  OpArgs a = {.accumulate = 1, .span = {.count = b->end - b->begin}};
  program_op(r->p, OP_ADD, IN(micro), OUT(bucket_gradients(r->p, r->model, b, SPACE_GRADS)), &a);
}

// Where gradients leave (placement.h), later micro-steps add to what was sent: it comes back, a layer ahead.
static void record_sums_return(Recording *r, int l) {
  const ParamBucket *b = layer_bucket(&r->model->params, l);
  if (mode_is_first(r->mode) || !bucket_leaves(r->model, b)) return;
  program_copy(r->p, LANE_H2D, bucket_gradients(r->p, r->model, b, SPACE_HOST_GRADS),
               bucket_gradients(r->p, r->model, b, SPACE_GRADS));
}

// Where gradients are shared out, this process's share of what the processes have summed is added to the step's.
static void record_share_sum(Recording *r) {
  const ParamBucket *b = r->summing;
  if (!b) return;
  Shard share = bucket_shard(r->model, b);
  OpArgs a = {.accumulate = !mode_is_first(r->mode), .span = {.count = share.end - share.begin}};
  program_op(r->p, OP_ADD, IN(bucket_gradient_share(r->p, r->model, b, SPACE_MICRO_GRADS)),
             OUT(bucket_gradient_share(r->p, r->model, b, SPACE_GRADS)), &a);
  r->summing = NULL;
}

// A layer's gradients are there: they are summed over the processes, those that leave do, and the step's are squared
// while they are at hand.
static void record_gradients_end(Recording *r, const ParamBucket *b) {
  if (gradients_are_shared(r->model)) {
    program_collective(r->p, OP_REDUCE_SCATTER, bucket_gradients(r->p, r->model, b, SPACE_MICRO_GRADS));
    record_share_sum(r); // of the bucket before, whose collective has run beside the ops since
    r->summing = b;
    return;
  }
  if (r->grads == SPACE_MICRO_GRADS) record_gradient_sum(r, b);
  if (mode_is_last(r->mode) && r->config->processes > 1)
    program_collective(r->p, config_shards(r->config) > 1 ? OP_REDUCE_SCATTER : OP_ALL_REDUCE,
                       bucket_gradients(r->p, r->model, b, SPACE_GRADS));
  if (!bucket_leaves(r->model, b)) return;
  TensorId gradients = bucket_gradients(r->p, r->model, b, SPACE_GRADS);
  if (mode_is_last(r->mode)) bucket_squares(r->p, r->model, b);
  program_copy(r->p, LANE_D2H, gradients, bucket_gradients(r->p, r->model, b, SPACE_HOST_GRADS));
}

// Of all buckets, in the order in which the processes sum them: beside the last sums of the step, which no other op is
// left to hide.
static void record_squares(Recording *r, const ParamBucket *of_heads) {
  const ParamTable *w = &r->model->params;
  bucket_squares(r->p, r->model, of_heads);
  for (int l = r->d.L - 1; l >= 0; l--) bucket_squares(r->p, r->model, layer_bucket(w, l));
  for (int b = w->buckets - 1; b >= 0; b--)
    if (w->bucket[b].layer < 0 && &w->bucket[b] != of_heads) bucket_squares(r->p, r->model, &w->bucket[b]);
}

static void record_backward(Recording *r, const Input *in, const Heads *heads) {
  const ParamTable *w = &r->model->params;
  const int L = r->d.L;
  program_layer(r->p, L);
  record_sums_return(r, L - 1);
  SiteGradient g = record_heads_backward(r, heads, r->layer[L - 1].end.h);
  const ParamBucket *of_heads = bucket_of(w, w->image_head);
  record_gradients_end(r, of_heads);
  r->dmod = program_tensor(r->p, DT_ACT, (int64_t)r->d.segments * r->d.M, "d modulation");
  for (int l = L - 1; l >= 0; l--) {
    if (l) record_sums_return(r, l - 1);
    g = record_layer_backward(r, l, g);
    record_gradients_end(r, layer_bucket(w, l));
  }
  TensorId dx = record_first_site_backward(r, g);
  program_layer(r->p, -1);
  record_input_backward(r, in, dx);
  for (int b = w->buckets - 1; b >= 0; b--) // the modulation table's first: they are there before the embedding's
    if (w->bucket[b].layer < 0 && &w->bucket[b] != of_heads) record_gradients_end(r, &w->bucket[b]);
  record_share_sum(r);
  if (mode_is_last(r->mode) && r->config->processes > 1) record_squares(r, of_heads);
}

// What a step opens with, of a bucket.
static void record_opening(Recording *r, const ParamBucket *b) {
  if (r->model->opening == OPEN_WEIGHTS)
    bucket_gather(r->p, r->model, b);
  else
    bucket_update(r->p, r->model, b, r->model->opening == OPEN_UPDATE_EMA);
}

// Weights that only come together do so from here on, on the comm lane, but for those that are read at once, which have
// (update.h). Where buckets are updated it is these, as they are read; others are a layer ahead of their own
// (record_next_opening).
static void record_first_openings(Recording *r) {
  const ParamTable *w = &r->model->params;
  if (r->model->opening != OPEN_WEIGHTS) {
    record_opening(r, &w->bucket[0]);
    record_opening(r, bucket_of(w, w->mod_weight));
    record_opening(r, layer_bucket(w, 0));
    return;
  }
  for (const ParamBucket *b = w->bucket; b < w->bucket + w->buckets; b++)
    if (!bucket_opens(w, b)) record_opening(r, b);
}

// Of what follows layer l.
static void record_next_opening(Recording *r, int l) {
  const ParamTable *w = &r->model->params;
  if (mode_is_first(r->mode) && r->model->opening != OPEN_WEIGHTS) record_opening(r, layer_bucket(w, l) + 1);
}

ModelProgram transformer_record(const Model *model, Mode mode, int slots, int segments, const PolicyTable *policy) {
  static const char *const names[] = {[MODE_TRAIN_MIDDLE] = "train later",
                                      [MODE_TRAIN_FIRST] = "train first",
                                      [MODE_TRAIN_LAST] = "train last",
                                      [MODE_TRAIN_ONLY] = "train first",
                                      [MODE_EVAL] = "eval",
                                      [MODE_GENERATE] = "generate",
                                      [MODE_WRITE] = "write"};
  const Config *c = model->config;
  ModelProgram out = {.z = NO_TENSOR, .xhat = NO_TENSOR, .nll = NO_TENSOR, .seg_error = NO_TENSOR, .logits = NO_TENSOR};
  Recording *r = xcalloc(1, sizeof *r + (size_t)c->model.layers * sizeof *r->layer);
  r->model = model;
  r->config = c;
  r->d = dims_from_config(c, slots, segments);
  r->mode = mode;
  r->train = mode_trains(mode);
  int adds = r->train && !mode_is_first(mode);
  int apart = gradients_are_shared(model) || (adds && model->backend->gradient_per_micro);
  r->accumulate = adds && !apart;
  r->grads = apart ? SPACE_MICRO_GRADS : SPACE_GRADS;
  Program *p = r->p = program_new(names[mode], &r->d, model->backend, r->train ? policy : NULL);

  p->shares_gradients = mode == MODE_TRAIN_ONLY && gradients_share_arena(model);
  // With the average an element has 36 bytes of traffic instead of 28.
  p->update_share = c->kernels.update_share * (model->opening == OPEN_UPDATE_EMA ? 36 : 28) / 28;
  int64_t pack_bytes = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&r->d), NULL);
  OpArgs copy = {.span = {.count = pack_bytes}};
  program_op(p, OP_COPY, IN(program_external(p, SPACE_STAGING, 0, DT_U8, pack_bytes, "staged pack")),
             OUT(program_external(p, SPACE_BATCH, 0, DT_U8, pack_bytes, "pack")), &copy);
  p->takes_pack = 1;
  int64_t n_metrics = metrics_size(&r->d);
  r->metrics = program_external(p, SPACE_METRICS, 0, DT_F64, n_metrics, "metrics");
  if (mode_is_first(mode)) { // evaluation sums over many replays
    OpArgs zero = {.span = {.count = n_metrics * (int64_t)sizeof(double)}};
    program_op(p, OP_ZERO, IN(), OUT(r->metrics), &zero);
    record_first_openings(r);
  }

  Input in;
  program_layer(p, -1);
  Site site = record_first_site(r, record_input(r, &in));
  for (int l = 0; l < r->d.L; l++) {
    record_next_opening(r, l);
    site = record_layer(r, l, site);
  }
  program_layer(p, r->d.L);
  Heads heads = record_heads(r, site.h, &out);
  if (r->train) record_backward(r, &in, &heads);
  if (mode_is_last(mode) && c->processes > 1) program_collective(p, OP_ALL_REDUCE, r->metrics);

  if (mode != MODE_GENERATE) out.z = in.z;
  const TensorId results[] = {out.z, out.xhat, out.nll, out.seg_error, out.logits};
  for (size_t i = 0; i < sizeof results / sizeof *results; i++)
    if (results[i] != NO_TENSOR) program_output(p, results[i]);
  program_finish(p);
  out.program = p;
  free(r);
  return out;
}

double transformer_flops(const Config *c, double text_tokens, double image_tokens, double pairs) {
  return 6 * ((double)params_active(c, TEXT) * text_tokens + (double)params_active(c, IMAGE) * image_tokens) +
         12.0 * c->model.layers * c->model.heads * c->model.head_dim * pairs;
}
