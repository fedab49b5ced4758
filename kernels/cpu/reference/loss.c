// The text head with its cross-entropy, and the flow loss.
#include "kernels/cpu/reference/rows.h"

// logits [V] = h [C] Wout^T
static void logits_row(const KernelCall *c, const double *h, const double *wout, double *logits) {
  const int64_t C = c->dims->C, V = c->dims->V;
  for (int64_t v = 0; v < V; v++) {
    logits[v] = 0;
    for (int64_t i = 0; i < C; i++) logits[v] += h[i] * wout[v * C + i];
  }
}

void reference_HEAD_CE(const KernelCall *c) {
  const Batch *b = c->batch;
  const int64_t T = c->dims->T, C = c->dims->C, V = c->dims->V;
  const double *h = c->in.HEAD_CE.h, *wout = c->in.HEAD_CE.wout;       // [T, C], [V, C]
  double *nll = c->out.HEAD_CE.nll, *dh = c->out.HEAD_CE.dh;           // [T], [T, C]
  double *dwout = c->out.HEAD_CE.dwout, *logits = c->out.HEAD_CE.work; // [V, C], [V]
  Metrics *metrics = c->out.HEAD_CE.metrics;
  memset(nll, 0, (size_t)T * sizeof *nll);
  if (dh) memset(dh, 0, (size_t)(T * C) * sizeof *dh);
  if (dwout && !c->args->accumulate) memset(dwout, 0, (size_t)(V * C) * sizeof *dwout);
  for (int64_t r = 0; r < b->dims->n_text; r++) {
    const int target = b->target[r];
    if (target < 0) continue;
    double top = -INFINITY, sum = 0;
    logits_row(c, h + r * C, wout, logits);
    for (int64_t v = 0; v < V; v++) top = fmax(top, logits[v]);
    for (int64_t v = 0; v < V; v++) sum += exp(logits[v] - top);
    nll[r] = top + log(sum) - logits[target];
    metrics->nll[b->target_kind[r]] += nll[r];
    metrics->targets[b->target_kind[r]] += 1;
    for (int64_t v = 0; v < V; v++) {
      double dlogit = (double)b->dims->ce_scale * (exp(logits[v] - top) / sum - (v == target));
      for (int64_t i = 0; i < C && dh; i++) dh[r * C + i] += dlogit * wout[v * C + i];
      for (int64_t i = 0; i < C && dwout; i++) dwout[v * C + i] += dlogit * h[r * C + i];
    }
  }
}

void reference_HEAD_LOGITS(const KernelCall *c) {
  const Batch *b = c->batch;
  const double *h = c->in.HEAD_LOGITS.h, *wout = c->in.HEAD_LOGITS.wout; // [T, C], [V, C]
  double *logits = c->out.HEAD_LOGITS.logits;                            // [n_target, V]
  for (int64_t j = 0; j < b->dims->n_target; j++)
    logits_row(c, h + b->target_row[j] * c->dims->C, wout, logits + j * c->dims->V);
}

void reference_FLOW_LOSS(const KernelCall *c) {
  const Batch *b = c->batch;
  const int64_t T = c->dims->T, P = c->dims->P;
  const double *xhat = c->in.FLOW_LOSS.xhat;                                       // [T, P]
  double *dxhat = c->out.FLOW_LOSS.dxhat, *seg_error = c->out.FLOW_LOSS.seg_error; // [T, P], [SEG]
  Metrics *metrics = c->out.FLOW_LOSS.metrics;
  memset(seg_error, 0, (size_t)c->dims->segments * sizeof *seg_error);
  if (dxhat) memset(dxhat, 0, (size_t)(T * P) * sizeof *dxhat);
  for (int64_t r = b->dims->n_text; r < used_rows(c); r++) {
    const int g = b->segment[r];
    if (b->seg_kind[g] != SEGMENT_NOISED) continue;
    const double weight = 1 / pow(fmax(1 - (double)b->seg_time[g], c->args->flow.t_floor), 2);
    for (int64_t e = 0; e < P; e++) {
      double x = b->patch[(r - b->dims->n_text) * P + e] / 127.5 - 1, error = xhat[r * P + e] - x;
      metrics->flow += weight * error * error;
      metrics->flow_elems += 1;
      seg_error[g] += error * error / (double)(b->seg_len[g] * P);
      if (dxhat) dxhat[r * P + e] = 2 * (double)b->dims->flow_scale * weight * error;
    }
  }
}
