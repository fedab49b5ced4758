// FLOPs and bytes of every op at capacity: T text rows and T image rows each, whichever costs more.
#include "model/program.h"

#include "model/program_state.h"

// The larger of the two modalities' costs.
static double widest(double text, double image) {
  return text > image ? text : image;
}

// One product over an op's rows: 2 rows in out.
static double linear_flops(const Dims *d, const OpArgs *args) {
  const int *in = args->linear.in_dim, *out = args->linear.out_dim;
  double rows = args->linear.extent == EXT_SEGMENTS ? d->segments : d->T;
  double text = 2 * rows * in[0] * out[0];
  return args->linear.extent == EXT_SPLIT ? widest(text, 2 * rows * in[1] * out[1]) : text;
}

// One product of every assignment with a [C, width of an expert] matrix.
static double expert_flops(const Dims *d) {
  return 2.0 * d->T * d->C * widest((double)d->K[TEXT] * d->F[TEXT], (double)d->K[IMAGE] * d->F[IMAGE]);
}

static double params_count(const OpArgs *args) {
  double n = 0;
  for (int i = 0; i < args->params.n; i++) n += (double)args->params.spans[i].count;
  return n;
}

static double operand_count(const Program *p, TensorId t) {
  return t == NO_TENSOR ? 0 : (double)p->tensors[t].count;
}

// Elementwise ops are counted at a few FLOPs an element, transcendental functions as one.
static double op_flops(const Program *p, const Op *op) {
  const Dims *d = &p->dims;
  double T = d->T, out = operand_count(p, op->out[0]);
  // Allowed pairs of attention: those of one causal document of T tokens.
  double pairs = T * (T + 1) / 2, heads = (double)d->H * d->D;
  double router = 2 * T * d->C * widest(d->E[TEXT], d->E[IMAGE]);
  double qk = T * (d->H + d->G) * d->D;
  switch (op->kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    return linear_flops(d, &op->args);
  case OP_ATTENTION_FWD:
    return 4 * pairs * heads;
  case OP_ATTENTION_BWD:
    return 10 * pairs * heads;
  case OP_ROUTER_FWD:
    return router;
  case OP_ROUTER_BWD:
    return 2 * router;
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_UP_DGRAD:
  case OP_EXPERT_UP_WGRAD:
    return 2 * expert_flops(d);
  case OP_EXPERT_DOWN_FWD:
  case OP_EXPERT_DOWN_BWD:
  case OP_EXPERT_DOWN_WGRAD:
    return expert_flops(d);
  case OP_EXPERT_COMBINE:
    return 2 * T * d->C * dims_kmax(d);
  case OP_HEAD_CE:
    return (op->out[1] == NO_TENSOR && op->out[2] == NO_TENSOR ? 2 : 6) * T * d->C * d->V;
  case OP_HEAD_LOGITS:
    return 2 * d->C * out;
  case OP_MOD_FWD:
    return 2 * (double)d->segments * d->Z * d->M;
  case OP_MOD_BWD:
    return (double)d->segments * d->M;
  case OP_ADALN_FWD:
    return 10 * T * d->C;
  case OP_ADALN_BWD:
    return 20 * T * d->C;
  case OP_QKNORM_ROPE_FWD:
    return 9 * qk;
  case OP_QKNORM_ROPE_BWD:
    return 20 * qk;
  case OP_EMBED_BWD:
  case OP_POOL_FWD:
  case OP_POOL_BWD:
    return 2 * T * d->C;
  case OP_ROUTER_LOSS:
    return 4 * operand_count(p, op->in[0]);
  case OP_FLOW_LOSS:
    return 6 * operand_count(p, op->in[0]);
  case OP_NOISE:
    return 20 * out;
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
  case OP_EMBED_FWD:
  case OP_COUNT:
    break;
  }
  return 0;
}

// Of the embedding table E [V, C] only the rows of the tokens are touched.
static double embedding_bytes(const Program *p, const Op *op) {
  const Dims *d = &p->dims;
  const Tensor *table = &p->tensors[op->in[op->kind == OP_POOL_BWD ? 1 : 0]];
  double rows = d->T < d->V ? d->T : d->V;
  return (rows - d->V) * d->C * (double)p->backend->dtype_bytes[table->dtype];
}

void op_cost(const Program *p, const Op *op, double *flops, double *bytes) {
  *flops = op_flops(p, op);
  Access access[OP_MAX_ACCESS];
  int n = op_access(p, op, access);
  *bytes = 0;
  for (int i = 0; i < n; i++)
    if (access[i].tensor != NO_TENSOR)
      *bytes += (double)(access[i].end - access[i].begin) * (access[i].read + access[i].write);
  if (op->kind == OP_EMBED_FWD || op->kind == OP_POOL_FWD || op->kind == OP_POOL_BWD) *bytes += embedding_bytes(p, op);
  if (op->kind == OP_NOISE) *bytes += (double)p->dims.T * p->dims.P; // the pack's pixels
  // The chunk of logits is one operand, but T rows go through it: written, and read for softmax and both products.
  if (op->kind == OP_HEAD_CE)
    *bytes += 4.0 * p->dims.T * p->dims.V * (double)p->backend->dtype_bytes[p->tensors[op->out[4]].dtype];
}
