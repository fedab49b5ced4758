// Operands, linear layers and AdaLN sites as every part of the model records them.
#include "model/recording.h"

#include "model/placement.h"

#include <stdio.h>

const int one_row[MODALITIES] = {1, 1};

TensorId weight(Recording *r, int param) {
  if (param < 0) return NO_TENSOR;
  const Param *w = &r->model->params.of[param];
  int64_t bytes = (int64_t)r->model->backend->dtype_bytes[DT_ACT];
  return program_external(r->p, SPACE_WEIGHTS, w->offset * bytes, DT_ACT, w->count, w->name);
}

TensorId gradient(Recording *r, int param) {
  if (param < 0) return NO_TENSOR;
  const Param *w = &r->model->params.of[param];
  int64_t bytes = (int64_t)r->model->backend->dtype_bytes[DT_REAL];
  char name[64];
  snprintf(name, sizeof name, "d %s", w->name);
  const ParamBucket *b = bucket_of(&r->model->params, param);
  int64_t at = r->grads == gradients_space(r->model) ? gradients_begin(r->model, b) : b->begin;
  return program_external(r->p, r->grads, (at + w->offset - b->begin) * bytes, DT_REAL, w->count, name);
}

TensorId rows_tensor(Recording *r, int width, const char *name) {
  return program_tensor(r->p, DT_ACT, (int64_t)r->d.T * width, "%s", name);
}

TensorId two_sided(Recording *r, Dtype type, const int rows[MODALITIES], int w0, int w1, const char *name) {
  return program_tensor(r->p, type, two_sided_size(r->d.T, rows, (const int[2]){w0, w1}), "%s", name);
}

// ---- linear layers ----

OpArgs linear_args(Extent extent, int in0, int in1, int out0, int out1, int accumulate) {
  return (OpArgs){.accumulate = accumulate,
                  .linear = {.extent = extent, .in_dim = {in0, in1}, .out_dim = {out0, out1}}};
}

TensorId linear(Recording *r, Extent extent, TensorId x, int w, int bias, int in, int out, int rows, const char *name) {
  TensorId y = program_tensor(r->p, DT_ACT, (int64_t)rows * out, "%s", name);
  OpArgs a = linear_args(extent, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(x, weight(r, w), NO_TENSOR, weight(r, bias)), OUT(y), &a);
  return y;
}

TensorId linear_rows(Recording *r, TensorId x, const int w[MODALITIES], int in, int out, const char *name) {
  TensorId y = rows_tensor(r, out, name);
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(x, weight(r, w[TEXT]), weight(r, w[IMAGE]), NO_TENSOR), OUT(y), &a);
  return y;
}

TensorId linear_dgrad(Recording *r, Extent extent, TensorId dy, int w, TensorId add, int in, int out, int rows,
                      const char *name) {
  TensorId dx = program_tensor(r->p, DT_ACT, (int64_t)rows * in, "%s", name);
  OpArgs a = linear_args(extent, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_DGRAD, IN(dy, weight(r, w), NO_TENSOR, add), OUT(dx), &a);
  return dx;
}

TensorId linear_rows_dgrad(Recording *r, TensorId dy, const int w[MODALITIES], int in, int out, const char *name) {
  TensorId dx = rows_tensor(r, in, name);
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, 0);
  program_op(r->p, OP_LINEAR_DGRAD, IN(dy, weight(r, w[TEXT]), weight(r, w[IMAGE]), NO_TENSOR), OUT(dx), &a);
  return dx;
}

void linear_wgrad(Recording *r, Extent extent, TensorId dy, TensorId x, int w, int bias, int in, int out) {
  OpArgs a = linear_args(extent, in, in, out, out, r->accumulate);
  program_op(r->p, OP_LINEAR_WGRAD, IN(dy, x), OUT(gradient(r, w), NO_TENSOR, gradient(r, bias)), &a);
}

void linear_rows_wgrad(Recording *r, TensorId dy, TensorId x, const int w[MODALITIES], int in, int out) {
  OpArgs a = linear_args(w[IMAGE] < 0 ? EXT_ROWS : EXT_SPLIT, in, in, out, out, r->accumulate);
  program_op(r->p, OP_LINEAR_WGRAD, IN(dy, x), OUT(gradient(r, w[TEXT]), gradient(r, w[IMAGE]), NO_TENSOR), &a);
}

// ---- AdaLN ----

int mod_column(const Recording *r, int l, int part) {
  return (6 * l + part) * r->d.C;
}

OpArgs site_args(const Recording *r, int gate, int l, int shift_part) {
  return (OpArgs){.adaln = {.gate = gate,
                            .shift = mod_column(r, l, shift_part),
                            .scale = mod_column(r, l, shift_part) + r->d.C,
                            .silu_image = l == r->d.L}};
}

Site record_site(Recording *r, TensorId x, TensorId branch, OpArgs args) {
  TensorId xnew = branch < 0 ? NO_TENSOR : rows_tensor(r, r->d.C, "x");
  Site s = {.x = branch < 0 ? x : xnew};
  s.h = rows_tensor(r, r->d.C, "h");
  s.mean = program_tensor(r->p, DT_REAL, r->d.T, "mean");
  s.rstd = program_tensor(r->p, DT_REAL, r->d.T, "rstd");
  program_op(r->p, OP_ADALN_FWD, IN(x, branch, r->mod), OUT(xnew, s.h, s.mean, s.rstd), &args);
  return s;
}

BranchGradient record_site_backward(Recording *r, OpArgs args, SiteGradient g, TensorId x, TensorId branch,
                                    TensorId mean, TensorId rstd) {
  BranchGradient to = {.dx = rows_tensor(r, r->d.C, "dx"), .dbranch = NO_TENSOR};
  if (branch != NO_TENSOR) to.dbranch = rows_tensor(r, r->d.C, "d branch");
  program_op(r->p, OP_ADALN_BWD, IN(g.dh, g.dx, x, branch, r->mod, mean, rstd), OUT(to.dx, to.dbranch, r->dmod), &args);
  return to;
}
