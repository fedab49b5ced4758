// Losses and the text head. As plain loops: reference/loss.c.
#include "kernels/cpu/cpu.h"

// One row of logits [V] against its target: returns the negative log likelihood; logits become
// scale (softmax - onehot).
static real row_cross_entropy(real *logits, int64_t V, int target, real scale) {
  real most = logits[0], sum = 0, chosen = logits[target];
#pragma omp simd reduction(max : most)
  for (int64_t v = 0; v < V; v++) most = logits[v] > most ? logits[v] : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < V; v++) {
    real e = real_exp(logits[v] - most);
    logits[v] = e;
    sum += e;
  }
  real share = scale / sum;
  for (int64_t v = 0; v < V; v++) logits[v] *= share;
  logits[target] -= scale;
  return (real)log((double)sum) + most - chosen;
}

// Chunks are runs of text rows, rows without a target among them: their dlogits are zero, which costs a few rows of
// products and spares a gathered copy of h.
void cpu_HEAD_CE(const KernelCall *c) {
  const Batch *b = c->batch;
  const real *h = c->in.HEAD_CE.h, *wout = c->in.HEAD_CE.wout;                            // [T, C], [V, C]
  real *nll = c->out.HEAD_CE.nll, *dh = c->out.HEAD_CE.dh, *dwout = c->out.HEAD_CE.dwout; // [T], [T, C], [V, C]
  Metrics *metrics = c->out.HEAD_CE.metrics;
  real *work = c->out.HEAD_CE.work; // [chunk, V]
  int64_t T = c->dims->T, C = c->dims->C, V = c->dims->V, chunk = c->args->head.chunk, n_target = b->dims->n_target;
  int64_t first = n_target ? b->target_row[0] : 0, end = n_target ? b->target_row[n_target - 1] + 1 : 0;
  real scale = (real)b->dims->ce_scale, beta = c->args->accumulate ? 1 : 0;
  memset(nll, 0, (size_t)T * sizeof *nll);
  if (dh) {
    memset(dh, 0, (size_t)(first * C) * sizeof *dh);
    memset(dh + end * C, 0, (size_t)((T - end) * C) * sizeof *dh);
  }
  if (dwout && !n_target && beta == 0) memset(dwout, 0, (size_t)(V * C) * sizeof *dwout);
  for (int64_t at = first; at < end; at += chunk) {
    int64_t n = end - at < chunk ? end - at : chunk;
    gemm(0, 1, n, V, C, 1, h + at * C, C, wout, C, 0, work, V); // logits [n, V]
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; r++) {
      int target = b->target[at + r];
      if (target >= 0)
        nll[at + r] = row_cross_entropy(work + r * V, V, target, scale);
      else
        memset(work + r * V, 0, (size_t)V * sizeof *work);
    }
    if (dh) gemm(0, 0, n, C, V, 1, work, V, wout, C, 0, dh + at * C, C);
    if (dwout) gemm(1, 0, V, C, n, 1, work, V, h + at * C, C, at == first ? beta : 1, dwout, C);
  }
  for (int64_t i = 0; i < n_target; i++) {
    int r = b->target_row[i], kind = b->target_kind[r];
    metrics->nll[kind] += (double)nll[r];
    metrics->targets[kind] += 1;
  }
}

void cpu_HEAD_LOGITS(const KernelCall *c) {
  const int32_t *row = c->batch->target_row;
  const real *h = c->in.HEAD_LOGITS.h, *wout = c->in.HEAD_LOGITS.wout; // [T, C], [V, C]
  real *logits = c->out.HEAD_LOGITS.logits;                            // [n_target, V]
  int64_t C = c->dims->C, V = c->dims->V, n_target = c->batch->dims->n_target, n = 0;
  // A run of adjacent rows at a time.
  for (int64_t at = 0; at < n_target; at += n) {
    for (n = 1; at + n < n_target && row[at + n] == row[at] + n; n++) {
    }
    gemm(0, 1, n, V, C, 1, h + row[at] * C, C, wout, C, 0, logits + at * V, V);
  }
}

// One image row: sum of (xhat - x)^2 over its P elements; d = slope (xhat - x) where d is wanted. Two loops, so that
// the sum has the same bits with and without d.
static real row_squared_error(const real *xhat, const uint8_t *pixel, int64_t P, real slope, real *d) {
  real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < P; e++) {
    real error = xhat[e] - ((real)pixel[e] / (real)127.5 - 1);
    sum += error * error;
  }
  for (int64_t e = 0; d && e < P; e++) d[e] = slope * (xhat[e] - ((real)pixel[e] / (real)127.5 - 1));
  return sum;
}

void cpu_FLOW_LOSS(const KernelCall *c) {
  const Batch *b = c->batch;
  const real *xhat = c->in.FLOW_LOSS.xhat;                                       // [T, P]
  real *dxhat = c->out.FLOW_LOSS.dxhat, *seg_error = c->out.FLOW_LOSS.seg_error; // [T, P], [SEG]
  Metrics *metrics = c->out.FLOW_LOSS.metrics;
  int64_t T = c->dims->T, P = c->dims->P, n_text = b->dims->n_text, image_end = n_text + b->dims->n_image;
  int n_segments = b->dims->n_segments;
  double t_floor = c->args->flow.t_floor;
  memset(seg_error, 0, (size_t)c->dims->segments * sizeof *seg_error);
  if (dxhat) {
    memset(dxhat, 0, (size_t)(n_text * P) * sizeof *dxhat);
    memset(dxhat + image_end * P, 0, (size_t)((T - image_end) * P) * sizeof *dxhat);
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int g = 1; g < n_segments; g++) {
    int64_t start = b->seg_start[g], end = start + b->seg_len[g];
    if (b->seg_kind[g] != SEGMENT_NOISED) {
      if (dxhat) memset(dxhat + start * P, 0, (size_t)((end - start) * P) * sizeof *dxhat);
      continue;
    }
    double left = fmax(1 - (double)b->seg_time[g], t_floor), sum = 0;
    real slope = (real)(2 * (double)b->dims->flow_scale / (left * left));
    for (int64_t r = start; r < end; r++)
      sum +=
          (double)row_squared_error(xhat + r * P, b->patch + (r - n_text) * P, P, slope, dxhat ? dxhat + r * P : NULL);
    seg_error[g] = (real)(sum / (double)((end - start) * P));
  }
  for (int g = 1; g < n_segments; g++) {
    if (b->seg_kind[g] != SEGMENT_NOISED) continue;
    double left = fmax(1 - (double)b->seg_time[g], t_floor), elements = (double)(b->seg_len[g] * P);
    metrics->flow += (double)seg_error[g] * elements / (left * left);
    metrics->flow_elems += elements;
  }
}
