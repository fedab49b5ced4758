// The heads, forward and backward: from the last site's h to logits, predicted patches and losses.
#include "model/recording.h"

static void record_text_head(Recording *r, Heads *heads, TensorId h, ModelProgram *out) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  int head = w->head < 0 ? w->embed : w->head;
  if (r->mode == MODE_WRITE) {
    // One row per document is read, and each document has at least an image.
    out->logits = program_tensor(r->p, DT_REAL, (int64_t)d->segments * d->V, "logits");
    program_op(r->p, OP_HEAD_LOGITS, IN(h, weight(r, head)), OUT(out->logits), NULL);
    return;
  }
  int chunk = (int)min_i64(r->model->backend->head_chunk, d->T);
  OpArgs a = {.accumulate = r->accumulate, .head = {.chunk = chunk}};
  TensorId work = program_tensor(r->p, DT_REAL, (int64_t)chunk * d->V, "logits chunk");
  out->nll = program_tensor(r->p, DT_REAL, d->T, "nll");
  heads->dh = r->train ? rows_tensor(r, d->C, "dh") : NO_TENSOR;
  program_op(r->p, OP_HEAD_CE, IN(h, weight(r, head)),
             OUT(out->nll, heads->dh, r->train ? gradient(r, head) : NO_TENSOR, r->metrics, work), &a);
}

static void record_image_head(Recording *r, Heads *heads, TensorId h, ModelProgram *out) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  out->xhat = linear(r, EXT_IMAGE, h, w->image_head, w->image_head_bias, d->C, d->P, d->T, "xhat");
  if (r->mode == MODE_GENERATE) return;
  OpArgs a = {.flow = {.t_floor = r->config->flow.t_floor}};
  heads->dxhat = r->train ? rows_tensor(r, d->P, "dxhat") : NO_TENSOR;
  out->seg_error = program_tensor(r->p, DT_REAL, d->segments, "segment error");
  program_op(r->p, OP_FLOW_LOSS, IN(out->xhat), OUT(heads->dxhat, out->seg_error, r->metrics), &a);
}

Heads record_heads(Recording *r, TensorId h, ModelProgram *out) {
  Heads heads = {.dh = NO_TENSOR, .dxhat = NO_TENSOR};
  if (r->mode != MODE_GENERATE) record_text_head(r, &heads, h, out);
  if (r->mode != MODE_WRITE) record_image_head(r, &heads, h, out);
  return heads;
}

SiteGradient record_heads_backward(Recording *r, const Heads *heads, TensorId h) {
  const ParamTable *w = &r->model->params;
  const Dims *d = &r->d;
  linear_wgrad(r, EXT_IMAGE, heads->dxhat, h, w->image_head, w->image_head_bias, d->C, d->P);
  TensorId dh = linear_dgrad(r, EXT_IMAGE, heads->dxhat, w->image_head, heads->dh, d->C, d->P, d->T, "dh final");
  return (SiteGradient){.dx = NO_TENSOR, .dh = dh};
}
