// The programs of passes: training, evaluation and sampling (input.c, layer.c and heads.c, in this order and back).
#include "model/transformer.h"

#include "model/program/compile.h"
#include "model/recording.h"

#include <stdlib.h>

static void record_backward(Recording *r, const Input *in, const Heads *heads) {
  const int L = r->d.L;
  program_layer(r->p, L);
  SiteGradient g = record_heads_backward(r, heads, r->layer[L - 1].end.h);
  r->dmod = program_tensor(r->p, DT_ACT, (int64_t)r->d.segments * r->d.M, "d modulation");
  for (int l = L - 1; l >= 0; l--) g = record_layer_backward(r, l, g);
  TensorId dx = record_first_site_backward(r, g);
  program_layer(r->p, -1);
  record_input_backward(r, in, dx);
}

// The gradient of a micro-step formed apart is added to the step's.
static void record_gradient_sum(Recording *r) {
  int64_t n = r->model->params.total;
  TensorId micro = program_external(r->p, SPACE_MICRO_GRADS, 0, DT_REAL, n, "micro-step gradients");
  TensorId total = program_external(r->p, SPACE_GRADS, 0, DT_REAL, n, "gradients");
  OpArgs a = {.accumulate = 1, .span = {.count = n}};
  program_op(r->p, OP_ADD, IN(micro), OUT(total), &a);
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
  int adds = r->train && !mode_is_first(mode), apart = adds && model->backend->gradient_per_micro;
  r->accumulate = adds && !apart;
  r->grads = apart ? SPACE_MICRO_GRADS : SPACE_GRADS;
  Program *p = r->p = program_new(names[mode], &r->d, model->backend, r->train ? policy : NULL);

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
  }

  Input in;
  program_layer(p, -1);
  Site site = record_first_site(r, record_input(r, &in));
  for (int l = 0; l < r->d.L; l++) site = record_layer(r, l, site);
  program_layer(p, r->d.L);
  Heads heads = record_heads(r, site.h, &out);
  if (r->train) record_backward(r, &in, &heads);
  if (apart) record_gradient_sum(r);

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
