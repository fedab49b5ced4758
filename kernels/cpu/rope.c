// QK-norm and rotary positions: qkv in row order -> q, k, v in sequence order, and back. As plain
// loops: reference/rope.c.
#include "kernels/cpu/cpu.h"

enum { NORM_BLOCKS = 32 }; // fixed split of the rows for sums over them

static const real norm_eps = (real)1e-6;

// freq [D/2]: 10000^(-2j/D), rounded to fp32 as the angles are.
static void rope_frequencies(int64_t D, float *freq) {
  for (int64_t j = 0; j < D / 2; j++) freq[j] = (float)pow(10000.0, -2.0 * (double)j / (double)D);
}

// cosine [D/2], sine [D/2] of one token's angles: even pairs turn by its row, odd pairs by its column.
static void rope_angles(const int32_t position[2], const float *freq, int64_t D, real *cosine, real *sine) {
  const float at[2] = {(float)position[0], (float)position[1]};
  if (sizeof(real) == sizeof(double)) {
    for (int64_t j = 0; j < D / 2; j++) {
      float angle = at[j & 1] * freq[j];
      cosine[j] = (real)cos((double)angle);
      sine[j] = (real)sin((double)angle);
    }
    return;
  }
  // Reduced by multiples of pi/2 in double, then Cephes' sinf and cosf on [-pi/4, pi/4]: a loop that vectorises.
#pragma omp simd
  for (int64_t j = 0; j < D / 2; j++) {
    float angle = (j & 1 ? at[1] : at[0]) * freq[j];
    double turns = floor((double)angle * 0.63661977236758134308 + 0.5);
    float x = (float)((double)angle - turns * 1.57079632679489661923), z = x * x;
    float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    float c =
        1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    int32_t quadrant = (int32_t)turns;
    float even = quadrant & 1 ? s : c, odd = quadrant & 1 ? c : s;
    cosine[j] = (real)((quadrant + 1) & 2 ? -even : even);
    sine[j] = (real)(quadrant & 2 ? -odd : odd);
  }
}

static real norm_rstd(const real *x, int64_t D) {
  real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; i++) sum += x[i] * x[i];
  return 1 / real_sqrt(sum / (real)D + norm_eps);
}

// y [D] = rope(rmsnorm(x) w).
static void head_forward(const real *restrict x, const real *restrict w, const real *restrict cosine,
                         const real *restrict sine, int64_t D, real *restrict y) {
  real rstd = norm_rstd(x, D);
  for (int64_t j = 0; j < D / 2; j++) {
    real a = x[2 * j] * rstd * w[2 * j], b = x[2 * j + 1] * rstd * w[2 * j + 1];
    y[2 * j] = a * cosine[j] - b * sine[j];
    y[2 * j + 1] = b * cosine[j] + a * sine[j];
  }
}

// dx [D] from dy [D]; dw [D] is added to.
static void head_backward(const real *restrict dy, const real *restrict x, const real *restrict w,
                          const real *restrict cosine, const real *restrict sine, int64_t D, real *restrict dx,
                          real *restrict dw) {
  real rstd = norm_rstd(x, D);
  for (int64_t j = 0; j < D / 2; j++) { // the gradient before the rotation
    dx[2 * j] = dy[2 * j] * cosine[j] + dy[2 * j + 1] * sine[j];
    dx[2 * j + 1] = dy[2 * j + 1] * cosine[j] - dy[2 * j] * sine[j];
  }
  real dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < D; i++) {
    real n = x[i] * rstd, d = dx[i] * w[i];
    dw[i] += dx[i] * n;
    dot += d * n;
    dx[i] = d;
  }
  real mean = dot / (real)D;
  for (int64_t i = 0; i < D; i++) dx[i] = rstd * (dx[i] - x[i] * rstd * mean);
}

void cpu_QKNORM_ROPE_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Batch *b = c->batch;
  const real *qkv = c->in.QKNORM_ROPE_FWD.qkv;                               // [T, (H+2G) D]
  const real *wq = c->in.QKNORM_ROPE_FWD.wq, *wk = c->in.QKNORM_ROPE_FWD.wk; // [2, D]
  real *q = c->out.QKNORM_ROPE_FWD.q;                                        // [T, H, D]
  real *k = c->out.QKNORM_ROPE_FWD.k, *v = c->out.QKNORM_ROPE_FWD.v;         // [T, G, D]
  int64_t D = d->D, H = d->H, G = d->G, width = (H + 2 * G) * D;
  int64_t n_text = b->dims->n_text, used = n_text + b->dims->n_image;
  const Scratch scratch = scratch_take(2 * D * (int64_t)sizeof(real)); // cosine, sine; the first thread's: freq behind
  float *freq = (float *)((real *)scratch_own(&scratch) + D);          // [D/2]
  rope_frequencies(D, freq);
#pragma omp parallel for
  for (int64_t r = 0; r < used; r++) {
    int64_t s = b->seq[r], m = r < n_text ? TEXT : IMAGE;
    real *cosine = scratch_own(&scratch), *sine = cosine + D / 2; // [D/2] each
    rope_angles(b->position + 2 * s, freq, D, cosine, sine);
    const real *x = qkv + r * width;
    for (int64_t h = 0; h < H; h++) head_forward(x + h * D, wq + m * D, cosine, sine, D, q + (s * H + h) * D);
    x += H * D;
    for (int64_t g = 0; g < G; g++) head_forward(x + g * D, wk + m * D, cosine, sine, D, k + (s * G + g) * D);
    x += G * D;
    memcpy(v + s * G * D, x, (size_t)(G * D) * sizeof *v);
  }
  // Filler comes last in either order.
  size_t filler = (size_t)((d->T - used) * D) * sizeof(real);
  memset(q + used * H * D, 0, (size_t)H * filler);
  memset(k + used * G * D, 0, (size_t)G * filler);
  memset(v + used * G * D, 0, (size_t)G * filler);
}

void cpu_QKNORM_ROPE_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Batch *b = c->batch;
  const real *dq = c->in.QKNORM_ROPE_BWD.dq;                                 // [T, H, D]
  const real *dk = c->in.QKNORM_ROPE_BWD.dk, *dv = c->in.QKNORM_ROPE_BWD.dv; // [T, G, D]
  const real *qkv = c->in.QKNORM_ROPE_BWD.qkv;                               // [T, (H+2G) D]
  const real *wq = c->in.QKNORM_ROPE_BWD.wq, *wk = c->in.QKNORM_ROPE_BWD.wk; // [2, D]
  real *dqkv = c->out.QKNORM_ROPE_BWD.dqkv;                                  // [T, (H+2G) D]
  real *dw[2] = {c->out.QKNORM_ROPE_BWD.dwq, c->out.QKNORM_ROPE_BWD.dwk};    // [2, D] of q, of k
  int64_t D = d->D, H = d->H, G = d->G, width = (H + 2 * G) * D;
  int64_t n_text = b->dims->n_text, used = n_text + b->dims->n_image;
  int64_t block_rows = (d->T + NORM_BLOCKS - 1) / NORM_BLOCKS;
  const Scratch scratch = scratch_take((2 + NORM_BLOCKS * 4) * D * (int64_t)sizeof(real)); // as above; and partial
  float *freq = (float *)((real *)scratch_own(&scratch) + D);                              // [D/2]
  real *partial = (real *)scratch_own(&scratch) + 2 * D;                                   // [block][q, k][modality][D]
  rope_frequencies(D, freq);
#pragma omp parallel for
  for (int64_t block = 0; block < NORM_BLOCKS; block++) {
    real *sum = partial + block * 4 * D;
    memset(sum, 0, (size_t)(4 * D) * sizeof *sum);
    int64_t end = (block + 1) * block_rows < used ? (block + 1) * block_rows : used;
    for (int64_t r = block * block_rows; r < end; r++) {
      int64_t s = b->seq[r], m = r < n_text ? TEXT : IMAGE;
      real *cosine = scratch_own(&scratch), *sine = cosine + D / 2;
      rope_angles(b->position + 2 * s, freq, D, cosine, sine);
      const real *x = qkv + r * width;
      real *dx = dqkv + r * width;
      for (int64_t h = 0; h < H; h++)
        head_backward(dq + (s * H + h) * D, x + h * D, wq + m * D, cosine, sine, D, dx + h * D, sum + m * D);
      x += H * D;
      dx += H * D;
      for (int64_t g = 0; g < G; g++)
        head_backward(dk + (s * G + g) * D, x + g * D, wk + m * D, cosine, sine, D, dx + g * D, sum + (2 + m) * D);
      dx += G * D;
      memcpy(dx, dv + s * G * D, (size_t)(G * D) * sizeof *dx);
    }
  }
  memset(dqkv + used * width, 0, (size_t)((d->T - used) * width) * sizeof *dqkv);
  for (int64_t which = 0; which < 2; which++) {
    for (int64_t i = 0; i < 2 * D; i++) {
      real sum = c->args->accumulate ? dw[which][i] : 0;
      for (int64_t block = 0; block < NORM_BLOCKS; block++) sum += partial[(block * 2 + which) * 2 * D + i];
      dw[which][i] = sum;
    }
  }
}

// ---- with attention before it ----

void cpu_ATTENTION_ROPE_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  real *dq = c->out.ATTENTION_ROPE_BWD.work;   // [T, H, D]
  real *dk = dq + (int64_t)d->T * d->H * d->D; // [T, G, D]
  real *dv = dk + (int64_t)d->T * d->G * d->D; // [T, G, D]
  KernelCall attention = *c, rope = *c;
  attention.in = (OpInputs){.ATTENTION_BWD = {.dout = c->in.ATTENTION_ROPE_BWD.dout,
                                              .o = c->in.ATTENTION_ROPE_BWD.o,
                                              .q = c->in.ATTENTION_ROPE_BWD.q,
                                              .k = c->in.ATTENTION_ROPE_BWD.k,
                                              .v = c->in.ATTENTION_ROPE_BWD.v,
                                              .lse = c->in.ATTENTION_ROPE_BWD.lse}};
  attention.out = (OpOutputs){.ATTENTION_BWD = {.dq = dq, .dk = dk, .dv = dv}};
  cpu_ATTENTION_BWD(&attention);
  rope.in = (OpInputs){.QKNORM_ROPE_BWD = {.dq = dq,
                                           .dk = dk,
                                           .dv = dv,
                                           .qkv = c->in.ATTENTION_ROPE_BWD.qkv,
                                           .wq = c->in.ATTENTION_ROPE_BWD.wq,
                                           .wk = c->in.ATTENTION_ROPE_BWD.wk}};
  rope.out = (OpOutputs){.QKNORM_ROPE_BWD = {.dqkv = c->out.ATTENTION_ROPE_BWD.dqkv,
                                             .dwq = c->out.ATTENTION_ROPE_BWD.dwq,
                                             .dwk = c->out.ATTENTION_ROPE_BWD.dwk}};
  cpu_QKNORM_ROPE_BWD(&rope);
}
