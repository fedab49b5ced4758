// The condition of an image segment and the modulation table: ops over [SEG, .] tensors, row 0 being text.
#include "kernels/cpu/cpu.h"

enum { FREQUENCIES = 128 };

// Zeros in row 0 and in the rows past n_segments.
static void zero_unused(const KernelCall *c, real *x, int64_t width) {
  int64_t used = c->batch->dims->n_segments;
  memset(x, 0, (size_t)width * sizeof *x);
  memset(x + used * width, 0, (size_t)((c->dims->segments - used) * width) * sizeof *x);
}

void cpu_TIME_FEATURES(const KernelCall *c) {
  real *features = c->out[0]; // [SEG, 256]
  int n_segments = c->batch->dims->n_segments;
  zero_unused(c, features, 2 * FREQUENCIES);
  // In fp64: the angle reaches 1000, where its own rounding in fp32 would show in the result.
#pragma omp parallel for schedule(static)
  for (int i = 0; i < FREQUENCIES; i++) {
    double f = pow(10000, -(double)i / FREQUENCIES);
    for (int g = 1; g < n_segments; g++) {
      double angle = 1000 * (double)c->batch->seg_time[g] * f;
      features[g * 2 * FREQUENCIES + i] = (real)cos(angle);
      features[g * 2 * FREQUENCIES + FREQUENCIES + i] = (real)sin(angle);
    }
  }
}

static real silu(real x) {
  return x * real_sigmoid(x);
}

static real silu_slope(real x) {
  real s = real_sigmoid(x);
  return s * (1 + x * (1 - s));
}

void cpu_SILU_FWD(const KernelCall *c) {
  const real *x = c->in[0]; // [SEG, Z]
  real *y = c->out[0];      // [SEG, Z]
  int64_t Z = c->dims->Z, end = c->batch->dims->n_segments * Z;
  zero_unused(c, y, Z);
  for (int64_t i = Z; i < end; i++) y[i] = silu(x[i]);
}

void cpu_SILU_BWD(const KernelCall *c) {
  const real *dy = c->in[0], *x = c->in[1]; // [SEG, Z]
  real *dx = c->out[0];                     // [SEG, Z]
  int64_t Z = c->dims->Z, end = c->batch->dims->n_segments * Z;
  zero_unused(c, dx, Z);
  for (int64_t i = Z; i < end; i++) dx[i] = dy[i] * silu_slope(x[i]);
}

void cpu_COND_FWD(const KernelCall *c) {
  const real *time = c->in[0], *pool = c->in[1], *e_kind = c->in[2]; // [SEG, Z], [SEG, Z], [2, Z]
  real *sum = c->out[0], *a = c->out[1];                             // [SEG, Z]
  int64_t Z = c->dims->Z;
  zero_unused(c, sum, Z);
  zero_unused(c, a, Z);
  for (int64_t g = 1; g < c->batch->dims->n_segments; g++) {
    const real *kind = e_kind + c->batch->seg_kind[g] * Z;
    for (int64_t i = 0; i < Z; i++) {
      real v = time[g * Z + i] + pool[g * Z + i] + kind[i];
      sum[g * Z + i] = v;
      a[g * Z + i] = silu(v);
    }
  }
}

void cpu_COND_BWD(const KernelCall *c) {
  const real *da = c->in[0], *sum = c->in[1]; // [SEG, Z]
  real *dc = c->out[0], *de_kind = c->out[1]; // [SEG, Z], [2, Z]
  int64_t Z = c->dims->Z;
  zero_unused(c, dc, Z);
  if (!c->args->span.accumulate) memset(de_kind, 0, (size_t)(2 * Z) * sizeof *de_kind);
  for (int64_t g = 1; g < c->batch->dims->n_segments; g++) {
    real *kind = de_kind + c->batch->seg_kind[g] * Z;
    for (int64_t i = 0; i < Z; i++) {
      real d = da[g * Z + i] * silu_slope(sum[g * Z + i]);
      dc[g * Z + i] = d;
      kind[i] += d;
    }
  }
}

void cpu_MOD_FWD(const KernelCall *c) {
  const real *a = c->in[0], *U = c->in[1], *S = c->in[2]; // [SEG, Z], [M, Z], [2, M]
  real *mod = c->out[0];                                  // [SEG, M]
  int64_t M = c->dims->M, Z = c->dims->Z, used = c->batch->dims->n_segments;
  zero_unused(c, mod, M);
  for (int64_t g = 0; g < used; g++) memcpy(mod + g * M, S + (g ? IMAGE : TEXT) * M, (size_t)M * sizeof *mod);
  gemm(0, 1, used - 1, M, Z, 1, a + Z, Z, U, Z, 1, mod + M, M);
}

void cpu_MOD_BWD(const KernelCall *c) {
  enum { BLOCK = 256 };
  const real *dmod = c->in[0]; // [SEG, M]
  real *dS = c->out[0];        // [2, M]
  int64_t M = c->dims->M, used = c->batch->dims->n_segments;
  int accumulate = c->args->span.accumulate;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < M; first += BLOCK) {
    int64_t n = M - first < BLOCK ? M - first : BLOCK;
    real *text = dS + TEXT * M + first, *image = dS + IMAGE * M + first, sum[BLOCK] = {0};
    for (int64_t g = 1; g < used; g++)
      for (int64_t j = 0; j < n; j++) sum[j] += dmod[g * M + first + j];
    for (int64_t j = 0; j < n; j++) {
      text[j] = dmod[first + j] + (accumulate ? text[j] : 0);
      image[j] = sum[j] + (accumulate ? image[j] : 0);
    }
  }
}
