// The condition of an image segment and the modulation table: ops over [SEG, .] tensors, row 0 being text.
#include "kernels/cpu/cpu.h"

enum { FREQUENCIES = TIME_FEATURES / 2 };

// Zeros in row 0 and in the rows past n_segments.
static void zero_unused(const KernelCall *c, real *x, int64_t width) {
  int64_t used = c->batch->dims->n_segments;
  memset(x, 0, (size_t)width * sizeof *x);
  memset(x + used * width, 0, (size_t)((c->dims->segments - used) * width) * sizeof *x);
}

void cpu_TIME_FEATURES(const KernelCall *c) {
  real *features = c->out.TIME_FEATURES.features; // [SEG, TIME_FEATURES]
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
  const real *x = c->in.SILU_FWD.x; // [SEG, Z]
  real *y = c->out.SILU_FWD.y;      // [SEG, Z]
  int64_t Z = c->dims->Z, end = c->batch->dims->n_segments * Z;
  zero_unused(c, y, Z);
  for (int64_t i = Z; i < end; i++) y[i] = silu(x[i]);
}

void cpu_SILU_BWD(const KernelCall *c) {
  const real *dy = c->in.SILU_BWD.dy, *x = c->in.SILU_BWD.x; // [SEG, Z]
  real *dx = c->out.SILU_BWD.dx;                             // [SEG, Z]
  int64_t Z = c->dims->Z, end = c->batch->dims->n_segments * Z;
  zero_unused(c, dx, Z);
  for (int64_t i = Z; i < end; i++) dx[i] = dy[i] * silu_slope(x[i]);
}

void cpu_COND_FWD(const KernelCall *c) {
  const real *time = c->in.COND_FWD.time, *pool = c->in.COND_FWD.pool; // [SEG, Z]
  const real *e_kind = c->in.COND_FWD.e_kind;                          // [2, Z]
  real *sum = c->out.COND_FWD.c, *a = c->out.COND_FWD.a;               // [SEG, Z]
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
  const real *da = c->in.COND_BWD.da, *sum = c->in.COND_BWD.c;       // [SEG, Z]
  real *dc = c->out.COND_BWD.dc, *de_kind = c->out.COND_BWD.de_kind; // [SEG, Z], [2, Z]
  int64_t Z = c->dims->Z;
  zero_unused(c, dc, Z);
  if (!c->args->accumulate) memset(de_kind, 0, (size_t)(2 * Z) * sizeof *de_kind);
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
  const real *a = c->in.MOD_FWD.a, *U = c->in.MOD_FWD.U, *S = c->in.MOD_FWD.S; // [SEG, Z], [M, Z], [2, M]
  real *mod = c->out.MOD_FWD.mod;                                              // [SEG, M]
  int64_t M = c->dims->M, Z = c->dims->Z, used = c->batch->dims->n_segments;
  zero_unused(c, mod, M);
  for (int64_t g = 0; g < used; g++) memcpy(mod + g * M, S + (g ? IMAGE : TEXT) * M, (size_t)M * sizeof *mod);
  gemm(0, 1, used - 1, M, Z, 1, a + Z, Z, U, Z, 1, mod + M, M);
}

void cpu_MOD_BWD(const KernelCall *c) {
  enum { BLOCK = 256 };
  const real *dmod = c->in.MOD_BWD.dmod; // [SEG, M]
  real *dS = c->out.MOD_BWD.dS;          // [2, M]
  int64_t M = c->dims->M, used = c->batch->dims->n_segments;
  int accumulate = c->args->accumulate;
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
