// QK-norm and rotary positions: qkv in row order -> q, k, v in sequence order, and back.
#include "kernels/cpu/reference/rows.h"

// The angle of pair j of the token at sequence position s: even pairs turn by its row, odd ones by its column. In fp32,
// as the model defines it.
static double angle_of(const KernelCall *c, int64_t s, int j) {
  float frequency = (float)pow(10000, -2.0 * j / c->dims->D);
  return (double)((float)c->batch->position[2 * s + j % 2] * frequency);
}

// 1 / sqrt(mean(x^2) + 1e-6)
static double rms_scale(const double *x, int D) {
  double mean = 0;
  for (int i = 0; i < D; i++) mean += x[i] * x[i] / D;
  return 1 / sqrt(mean + 1e-6);
}

// y [D] = rotary(RMSnorm(x) w)
static void head_forward(const KernelCall *c, const double *x, const double *w, int64_t s, double *y) {
  const int D = c->dims->D;
  const double scale = rms_scale(x, D);
  for (int j = 0; j < D / 2; j++) {
    double angle = angle_of(c, s, j), a = x[2 * j] * scale * w[2 * j], b = x[2 * j + 1] * scale * w[2 * j + 1];
    y[2 * j] = a * cos(angle) - b * sin(angle);
    y[2 * j + 1] = a * sin(angle) + b * cos(angle);
  }
}

// dx [D], and dw [D] added to.
static void head_backward(const KernelCall *c, const double *dy, const double *x, const double *w, int64_t s,
                          double *dx, double *dw) {
  const int D = c->dims->D;
  const double scale = rms_scale(x, D);
  double mean = 0; // of dn n, n = RMSnorm(x)
  for (int j = 0; j < D / 2; j++) {
    double angle = angle_of(c, s, j);
    dx[2 * j] = dy[2 * j] * cos(angle) + dy[2 * j + 1] * sin(angle); // turned back: the gradient of n w
    dx[2 * j + 1] = dy[2 * j + 1] * cos(angle) - dy[2 * j] * sin(angle);
  }
  for (int i = 0; i < D; i++) {
    dw[i] += dx[i] * x[i] * scale;
    dx[i] *= w[i]; // dn
    mean += dx[i] * x[i] * scale / D;
  }
  for (int i = 0; i < D; i++) dx[i] = scale * (dx[i] - x[i] * scale * mean);
}

void reference_QKNORM_ROPE_FWD(const KernelCall *c) {
  const double *qkv = c->in.QKNORM_ROPE_FWD.qkv;                               // [T, (H+2G) D]
  const double *wq = c->in.QKNORM_ROPE_FWD.wq, *wk = c->in.QKNORM_ROPE_FWD.wk; // [2, D]
  double *q = c->out.QKNORM_ROPE_FWD.q;                                        // [T, H, D]
  double *k = c->out.QKNORM_ROPE_FWD.k, *v = c->out.QKNORM_ROPE_FWD.v;         // [T, G, D]
  const int64_t T = c->dims->T, H = c->dims->H, G = c->dims->G, D = c->dims->D;
  memset(q, 0, (size_t)(T * H * D) * sizeof *q);
  memset(k, 0, (size_t)(T * G * D) * sizeof *k);
  memset(v, 0, (size_t)(T * G * D) * sizeof *v);
  for (int64_t r = 0; r < used_rows(c); r++) {
    int64_t s = c->batch->seq[r], m = row_modality(c, r);
    const double *x = qkv + r * (H + 2 * G) * D;
    for (int64_t h = 0; h < H; h++) head_forward(c, x + h * D, wq + m * D, s, q + (s * H + h) * D);
    for (int64_t g = 0; g < G; g++) {
      head_forward(c, x + (H + g) * D, wk + m * D, s, k + (s * G + g) * D);
      memcpy(v + (s * G + g) * D, x + (H + G + g) * D, (size_t)D * sizeof *v);
    }
  }
}

void reference_QKNORM_ROPE_BWD(const KernelCall *c) {
  const double *dq = c->in.QKNORM_ROPE_BWD.dq;                                 // [T, H, D]
  const double *dk = c->in.QKNORM_ROPE_BWD.dk, *dv = c->in.QKNORM_ROPE_BWD.dv; // [T, G, D]
  const double *qkv = c->in.QKNORM_ROPE_BWD.qkv;                               // [T, (H+2G) D]
  const double *wq = c->in.QKNORM_ROPE_BWD.wq, *wk = c->in.QKNORM_ROPE_BWD.wk; // [2, D]
  double *dqkv = c->out.QKNORM_ROPE_BWD.dqkv;                                  // [T, (H+2G) D]
  double *dwq = c->out.QKNORM_ROPE_BWD.dwq, *dwk = c->out.QKNORM_ROPE_BWD.dwk; // [2, D]
  const int64_t T = c->dims->T, H = c->dims->H, G = c->dims->G, D = c->dims->D;
  memset(dqkv, 0, (size_t)(T * (H + 2 * G) * D) * sizeof *dqkv);
  if (!c->args->accumulate) {
    memset(dwq, 0, (size_t)(2 * D) * sizeof *dwq);
    memset(dwk, 0, (size_t)(2 * D) * sizeof *dwk);
  }
  for (int64_t r = 0; r < used_rows(c); r++) {
    int64_t s = c->batch->seq[r], m = row_modality(c, r);
    const double *x = qkv + r * (H + 2 * G) * D;
    double *dx = dqkv + r * (H + 2 * G) * D;
    for (int64_t h = 0; h < H; h++)
      head_backward(c, dq + (s * H + h) * D, x + h * D, wq + m * D, s, dx + h * D, dwq + m * D);
    for (int64_t g = 0; g < G; g++) {
      int64_t at = (H + g) * D;
      head_backward(c, dk + (s * G + g) * D, x + at, wk + m * D, s, dx + at, dwk + m * D);
      memcpy(dx + (H + G + g) * D, dv + (s * G + g) * D, (size_t)D * sizeof *dx);
    }
  }
}
