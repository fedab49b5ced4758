// FLOPs of every op, and the bytes it must move: each operand once, one that accumulates twice.
#include "model/program/cost.h"

#include "model/program/ops.h"
#include "model/program/program_internal.h"

#include <math.h>
#include <string.h>

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

// One product of every assignment with a [C, width of an expert] matrix.
static double expert_flops(const Dims *d, const Extents *x) {
  return 2.0 * d->C * by_modality(x, d->K[TEXT] * d->F[TEXT], d->K[IMAGE] * d->F[IMAGE]);
}

static double params_count(const OpArgs *args) {
  double n = 0;
  for (int i = 0; i < args->params.n; i++) n += (double)args->params.spans[i].count;
  return n;
}

static double operand_count(const Program *p, TensorId t) {
  return t == NO_TENSOR ? 0 : (double)p->tensors[t].count;
}

// Operands with a row an assignment, by name; the others of the same ops have a row a token.
static int has_slot_rows(OpKind kind, const char *name, const Dims *d, double width[MODALITIES]) {
  int expert = kind == OP_EXPERT_UP_FWD || kind == OP_EXPERT_DOWN_FWD || kind == OP_EXPERT_DOWN_BWD ||
               kind == OP_EXPERT_DOWN_WGRAD || kind == OP_EXPERT_UP_DGRAD || kind == OP_EXPERT_UP_WGRAD;
  int narrow = strcmp(name, "pre") == 0 || strcmp(name, "a") == 0 || strcmp(name, "sa") == 0 ||
               strcmp(name, "dpre") == 0 || strcmp(name, "da") == 0;
  int wide = strcmp(name, "y") == 0 || strcmp(name, "dslot") == 0;
  int combine = kind == OP_EXPERT_COMBINE || kind == OP_COMBINE_ADALN_FWD || kind == OP_COMBINE_ADALN_BWD;
  int shared = kind == OP_SWIGLU_FWD || kind == OP_SWIGLU_BWD;
  for (int m = 0; m < MODALITIES; m++) width[m] = shared ? d->S[m] : d->K[m] * (wide ? d->C : d->F[m]);
  return shared || (expert && (narrow || wide)) || (combine && wide);
}

// The share of an operand that the op touches at these extents.
static double operand_used(const Program *p, const Op *op, int is_out, int i, const Extents *x) {
  const Dims *d = &p->dims;
  TensorId t = is_out ? op->out[i] : op->in[i];
  Operands o = op_operands(op->kind);
  const char *name = is_out ? o.out[i].name : o.in[i].name;
  double rows = (x->text + x->image) / d->T, segments = x->segments / d->segments, width[MODALITIES];
  if (t == NO_TENSOR) return 0;
  if (p->tensors[t].space != SPACE_ARENA && p->tensors[t].space != SPACE_INPUT) return 1;
  if (has_slot_rows(op->kind, name, d, width)) {
    double most = d->T * fmax(width[TEXT], width[IMAGE]);
    return most > 0 ? by_modality(x, width[TEXT], width[IMAGE]) / most : 0;
  }
  switch (op->kind) {
  case OP_COPY:
  case OP_ZERO:
  case OP_ADD:
  case OP_CAST:
  case OP_GRAD_NORM:
  case OP_GRAD_HASH:
    return 1;
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    if (op->args.linear.extent == EXT_SEGMENTS) return segments;
    // What is read of image rows alone; whole tensors are written.
    return op->args.linear.extent == EXT_IMAGE && !is_out ? x->image / d->T : rows;
  case OP_POOL_FWD:
  case OP_POOL_BWD:
  case OP_TIME_FEATURES:
  case OP_SILU_FWD:
  case OP_SILU_BWD:
  case OP_COND_FWD:
  case OP_COND_BWD:
  case OP_MOD_FWD:
  case OP_MOD_BWD:
    return segments;
  case OP_ADALN_FWD:
  case OP_COMBINE_ADALN_FWD:
  case OP_ADALN_BWD:
  case OP_COMBINE_ADALN_BWD: // of the table, the columns of one site
    if (strcmp(name, "mod") == 0 || strcmp(name, "dmod") == 0) return segments * 3 * d->C / d->M;
    return rows;
  case OP_HEAD_CE:
    return strcmp(name, "h") == 0 ? x->targets / d->T : strcmp(name, "work") == 0 ? 0 : rows;
  default:
    return rows;
  }
}

// Elementwise ops are counted at a few FLOPs an element, transcendental functions as one.
static double op_flops(const Program *p, const Op *op, const Extents *x) {
  const Dims *d = &p->dims;
  double rows = x->text + x->image, heads = (double)d->H * d->D;
  double out = operand_count(p, op->out[0]) * operand_used(p, op, 1, 0, x);
  double router = 2.0 * d->C * by_modality(x, d->E[TEXT], d->E[IMAGE]);
  double qk = rows * (d->H + d->G) * d->D;
  double combine = 2.0 * d->C * by_modality(x, d->K[TEXT], d->K[IMAGE]);
  switch (op->kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    return linear_flops(x, &op->args);
  case OP_ATTENTION_FWD:
    return 4 * x->pairs * heads;
  case OP_ATTENTION_BWD:
    return 10 * x->pairs * heads;
  case OP_ROUTER_FWD:
    return router;
  case OP_ROUTER_BWD:
    return 2 * router;
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_UP_DGRAD:
  case OP_EXPERT_UP_WGRAD:
    return 2 * expert_flops(d, x);
  case OP_EXPERT_DOWN_FWD:
  case OP_EXPERT_DOWN_BWD:
  case OP_EXPERT_DOWN_WGRAD:
    return expert_flops(d, x);
  case OP_EXPERT_COMBINE:
    return combine;
  case OP_HEAD_CE:
    return (op->out[1] == NO_TENSOR && op->out[2] == NO_TENSOR ? 2 : 6) * x->targets * d->C * d->V;
  case OP_HEAD_LOGITS:
    return 2 * d->C * out;
  case OP_MOD_FWD:
    return 2 * x->segments * d->Z * d->M;
  case OP_MOD_BWD:
    return x->segments * d->M;
  case OP_ADALN_FWD:
    return 10 * rows * d->C;
  case OP_COMBINE_ADALN_FWD:
    return combine + 10 * rows * d->C;
  case OP_ADALN_BWD:
    return 20 * rows * d->C;
  case OP_COMBINE_ADALN_BWD:
    return combine + 20 * rows * d->C;
  case OP_QKNORM_ROPE_FWD:
    return 9 * qk;
  case OP_QKNORM_ROPE_BWD:
    return 20 * qk;
  case OP_EMBED_BWD:
  case OP_POOL_FWD:
  case OP_POOL_BWD:
    return 2 * rows * d->C;
  case OP_ROUTER_LOSS:
    return 4 * by_modality(x, d->E[TEXT], d->E[IMAGE]);
  case OP_FLOW_LOSS:
    return 6 * x->image * d->P;
  case OP_NOISE:
    return 20 * x->image * d->P;
  case OP_ADD:
    return out;
  case OP_SILU_FWD:
  case OP_SILU_BWD:
  case OP_COND_FWD:
  case OP_COND_BWD:
  case OP_SWIGLU_FWD:
  case OP_SWIGLU_BWD:
  case OP_TIME_FEATURES:
    return 6 * out;
  case OP_GRAD_NORM:
    return 2 * params_count(&op->args);
  case OP_ADAMW:
    return 14 * params_count(&op->args);
  case OP_EMA:
    return 3 * params_count(&op->args);
  case OP_COPY:
  case OP_ZERO:
  case OP_CAST:
  case OP_GRAD_HASH:
  case OP_EMBED_FWD:
  case OP_COUNT:
    break;
  }
  return 0;
}

// Of the embedding table E [V, C] only the rows of the tokens are touched.
static double embedding_bytes(const Program *p, const Op *op, const Extents *x) {
  const Dims *d = &p->dims;
  const Tensor *table = &p->tensors[op->in[op->kind == OP_POOL_BWD ? 1 : 0]];
  double rows = x->text < d->V ? x->text : d->V;
  return (rows - d->V) * d->C * (double)p->backend->dtype_bytes[table->dtype];
}

void op_cost(const Program *p, const Op *op, const Extents *x, double *flops, double *bytes) {
  *flops = op_flops(p, op, x);
  *bytes = 0;
  for (int i = 0; i < OP_MAX_IN; i++)
    if (op->in[i] != NO_TENSOR) *bytes += (double)p->tensors[op->in[i]].bytes * operand_used(p, op, 0, i, x);
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (op->out[i] != NO_TENSOR)
      *bytes += (double)p->tensors[op->out[i]].bytes * operand_used(p, op, 1, i, x) * (1 + (op->acc >> i & 1));
  if (op->kind == OP_EMBED_FWD || op->kind == OP_POOL_FWD || op->kind == OP_POOL_BWD)
    *bytes += embedding_bytes(p, op, x);
  if (op->kind == OP_NOISE || op->kind == OP_FLOW_LOSS) *bytes += x->image * p->dims.P; // the pack's pixels
  // The chunk of logits is one operand, but every target goes through it: written, and read for softmax and both
  // products.
  if (op->kind == OP_HEAD_CE)
    *bytes += 4.0 * x->targets * p->dims.V * (double)p->backend->dtype_bytes[p->tensors[op->out[4]].dtype];
}

void op_cost_full(const Program *p, const Op *op, double *flops, double *bytes) {
  double T = p->dims.T, pairs = T * (T + 1) / 2, other_flops, other_bytes; // one causal document
  const Extents text = {.text = T, .segments = p->dims.segments, .targets = T, .pairs = pairs};
  const Extents image = {.image = T, .segments = p->dims.segments, .pairs = pairs};
  op_cost(p, op, &text, flops, bytes);
  op_cost(p, op, &image, &other_flops, &other_bytes);
  *flops = fmax(*flops, other_flops);
  *bytes = fmax(*bytes, other_bytes);
}
