// FLOPs of every op, and the bytes it must move: each operand once, one that accumulates twice.
#include "model/program/cost.h"

#include "model/program/program_internal.h"

#include <math.h>

// Text and image rows times what each costs.
static double by_modality(const Extents *x, double text, double image) {
  return x->text * text + x->image * image;
}

// One product over an op's rows: 2 rows in out.
static double linear_flops(const Extents *x, const OpArgs *args) {
  const int *in = args->linear.in_dim, *out = args->linear.out_dim;
  double text = 2.0 * in[0] * out[0];
  switch (args->linear.extent) {
  case EXT_ROWS:
    return by_modality(x, text, text);
  case EXT_SPLIT:
    return by_modality(x, text, 2.0 * in[1] * out[1]);
  case EXT_IMAGE:
    return x->image * text;
  case EXT_SEGMENTS:
    break;
  }
  return x->segments * text;
}

// One product of every token with a [C, width of its shared expert] matrix.
static double shared_flops(const Dims *d, const Extents *x) {
  return 2.0 * d->C * by_modality(x, d->S[TEXT], d->S[IMAGE]);
}

// One product of every assignment with a [C, width of an expert] matrix.
static double expert_flops(const Dims *d, const Extents *x) {
  return 2.0 * d->C * by_modality(x, d->K[TEXT] * d->F[TEXT], d->K[IMAGE] * d->F[IMAGE]);
}

static double params_count(const OpArgs *args) {
  double n = 0;
  for (int i = 0; i < args->params.n; i++) n += (double)params_span(args, i).count;
  return n;
}

// Products with the output matrix: the logits and, where they are wanted, two gradients.
static int head_products(const Op *op) {
  int has_gradients = op->out[OUT_AT(HEAD_CE, dh)] != NO_TENSOR || op->out[OUT_AT(HEAD_CE, dwout)] != NO_TENSOR;
  return has_gradients ? 3 : 1;
}

// Of a parameter; the average is only updated where it is due.
static int adamw_flops(const Op *op) {
  return op->out[OUT_AT(ADAMW, ema)] != NO_TENSOR ? 17 : 14;
}

// The share of a two-sided buffer that the text and image rows use, with these elements a token.
static double sided_used(const Extents *x, const Dims *d, double text, double image) {
  double most = d->T * fmax(text, image);
  return most > 0 ? by_modality(x, text, image) / most : 0;
}

// The part of an operand that moves; one that is read twice counts twice.
static double operand_used(const Program *p, const Op *op, OperandExtent extent, TensorId t, const Extents *x) {
  const Dims *d = &p->dims;
  const Extent linear = op->args.linear.extent; // of LINEAR_*
  double rows = (x->text + x->image) / d->T, segments = x->segments / d->segments;
  switch (extent) {
  case OF_WHOLE:
    break;
  case OF_ROWS:
    return rows;
  case OF_TARGETS:
    return x->targets / d->T;
  case OF_SEGMENTS:
    return segments;
  case OF_SITE:
    return segments * 3 * d->C / d->M;
  case OF_READ:
    return linear == EXT_SEGMENTS ? segments : linear == EXT_IMAGE ? x->image / d->T : rows;
  case OF_WRITTEN:
    return linear == EXT_SEGMENTS ? segments : rows;
  case OF_SLOTS_F:
    return sided_used(x, d, d->K[TEXT] * d->F[TEXT], d->K[IMAGE] * d->F[IMAGE]);
  case OF_SLOTS_C:
    return sided_used(x, d, d->K[TEXT] * d->C, d->K[IMAGE] * d->C);
  case OF_SHARED:
    return sided_used(x, d, d->S[TEXT], d->S[IMAGE]);
  case OF_TOKENS:
    return fmin(x->text, d->V) / d->V;
  case OF_CHUNKS:
    return 4 * x->targets * d->V / (double)p->tensors[t].count;
  }
  return 1;
}

// Of the first output.
static double first_elements(const Program *p, const Op *op, const Extents *x) {
  TensorId t = op->out[0];
  if (t == NO_TENSOR) return 0;
  return (double)p->tensors[t].count * operand_used(p, op, op_info[op->kind].out[0].extent, t, x);
}

static double operand_bytes(const Program *p, const Op *op, const OperandInfo *operand, TensorId t, const Extents *x) {
  return t == NO_TENSOR ? 0 : (double)p->tensors[t].bytes * operand_used(p, op, operand->extent, t, x);
}

// What the table's FLOPs are counted in: the names here, x, args, d and the functions above.
static double op_flops(const Program *p, const Op *op, const Extents *x) {
  const Dims *d = &p->dims;
  const OpArgs *args = &op->args;
  double rows = x->text + x->image, heads = (double)d->H * d->D;
  double qk = rows * (d->H + d->G) * d->D;                 // elements of q and k
  double scores = by_modality(x, d->E[TEXT], d->E[IMAGE]); // a router's
  double experts = expert_flops(d, x);                     // one product of all assignments
  double shared = shared_flops(d, x);
  double combine = 2.0 * d->C * by_modality(x, d->K[TEXT], d->K[IMAGE]); // their sum
  double out = first_elements(p, op, x);
  switch (op->kind) {
#define OP_FLOPS(name, pack, flops, ...)                                                                               \
  case OP_##name:                                                                                                      \
    return flops;
    OP_LIST(OP_FLOPS)
#undef OP_FLOPS
  case OP_COUNT:
    break;
  }
  return 0;
}

void op_cost(const Program *p, const Op *op, const Extents *x, double *flops, double *bytes) {
  const OpInfo *info = &op_info[op->kind];
  *flops = op_flops(p, op, x);
  *bytes = info->pack == READS_PIXELS ? x->image * p->dims.P : 0;
  for (int i = 0; i < info->n_in; i++) *bytes += operand_bytes(p, op, &info->in[i], op->in[i], x);
  for (int i = 0; i < info->n_out; i++)
    *bytes += operand_bytes(p, op, &info->out[i], op->out[i], x) * (1 + (op->acc >> i & 1));
}
