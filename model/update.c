// The programs between passes: the update, hashes of gradients, the EMA in the weights' place and back.
#include "model/update.h"

#include "model/program/compile.h"
#include "model/recording.h"

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
  if (model->backend->remainder_bytes)
    rest = program_external(p, SPACE_REST, 0, DT_U8, n * model->backend->remainder_bytes, "rest of the weights");
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
