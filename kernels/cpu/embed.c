// Ops at the entrance of the model: noised patches, token embeddings, pooled captions.
#include "base/philox.h"
#include "kernels/cpu/cpu.h"

void cpu_NOISE(const KernelCall *c) {
  const Batch *b = c->batch;
  real *z = c->out.NOISE.z; // [T, P]
  int64_t T = c->dims->T, P = c->dims->P, first = b->dims->n_text, end = first + b->dims->n_image;
  uint64_t seed = (uint64_t)b->dims->seed_hi << 32 | b->dims->seed_lo;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < T; r++) {
    real *row = z + r * P;
    if (r < first || r >= end) {
      memset(row, 0, (size_t)P * sizeof *row);
      continue;
    }
    const uint8_t *pixel = b->patch + (r - first) * P;
    int g = b->segment[r];
    for (int64_t e = 0; e < P; e++) row[e] = (real)pixel[e] / (real)127.5 - 1;
    if (b->seg_kind[g] != SEGMENT_NOISED) continue;
    real t = (real)b->seg_time[g];
    uint32_t stream = c->args->noise.stream | (uint32_t)b->seg_ordinal[g] << 8;
    // The row's elements are numbers n .. n + P - 1 of the stream, which need not begin a block of four.
    int64_t n = (r - b->seg_start[g]) * P;
    for (int64_t block = n / 4; block * 4 < n + P; block++) {
      float eps[4];
      philox_normal4(seed, b->seg_doc[g], stream, (uint32_t)block, eps);
      for (int i = 0; i < 4; i++) {
        int64_t e = block * 4 + i - n;
        if (e >= 0 && e < P) row[e] = t * row[e] + (1 - t) * (real)eps[i];
      }
    }
  }
}

void cpu_EMBED_FWD(const KernelCall *c) {
  const Batch *b = c->batch;
  const real *E = c->in.EMBED_FWD.E, *image_rows = c->in.EMBED_FWD.image_rows; // [V, C], [T, C]
  real *x = c->out.EMBED_FWD.x;                                                // [T, C]
  int64_t T = c->dims->T, C = c->dims->C, n_text = b->dims->n_text, end = n_text + b->dims->n_image;
  for (int64_t r = 0; r < n_text; r++) memcpy(x + r * C, E + b->token[r] * C, (size_t)C * sizeof *x);
  memcpy(x + n_text * C, image_rows + n_text * C, (size_t)((end - n_text) * C) * sizeof *x);
  memset(x + end * C, 0, (size_t)((T - end) * C) * sizeof *x);
}

void cpu_EMBED_BWD(const KernelCall *c) {
  const Batch *b = c->batch;
  const real *dx = c->in.EMBED_BWD.dx, *dmean = c->in.EMBED_BWD.dmean; // [T, C], [SEG, C]
  real *dE = c->out.EMBED_BWD.dE;                                      // [V, C]
  int64_t V = c->dims->V, C = c->dims->C;
  int n_ids = b->dims->n_ids, accumulate = c->args->accumulate;
  // Item j also clears the rows between the id before and its own; the last item, those behind the last id.
#pragma omp parallel for schedule(dynamic, 8)
  for (int j = 0; j <= n_ids; j++) {
    int64_t gap = j ? b->id[j - 1] + 1 : 0, id = j < n_ids ? b->id[j] : V;
    if (!accumulate) memset(dE + gap * C, 0, (size_t)((id - gap + (j < n_ids)) * C) * sizeof *dE);
    if (j == n_ids) continue;
    real *sum = dE + id * C;
    for (int k = b->id_start[j]; k < b->id_start[j + 1]; k++) {
      int64_t r = b->id_row[k], g = b->pool_segment[r];
      const real *row = dx + r * C, *mean = dmean + g * C;
      real share = g ? 1 / (real)(b->cap_end[g] - b->cap_start[g]) : 0;
      if (g)
        for (int64_t i = 0; i < C; i++) sum[i] += row[i] + share * mean[i];
      else
        for (int64_t i = 0; i < C; i++) sum[i] += row[i];
    }
  }
}

// u [C] = mean embedding of segment g's caption; returns 1 / sqrt(mean(u^2) + 1e-6), or 0 without a caption.
static real pool_caption(const Batch *b, const real *E, int64_t C, int g, real *u) {
  int first = b->cap_start[g], end = b->cap_end[g];
  memset(u, 0, (size_t)C * sizeof *u);
  if (g == 0 || g >= b->dims->n_segments || first >= end) return 0;
  for (int r = first; r < end; r++) {
    const real *row = E + b->token[r] * C;
    for (int64_t i = 0; i < C; i++) u[i] += row[i];
  }
  real share = 1 / (real)(end - first), squares = 0;
  for (int64_t i = 0; i < C; i++) u[i] *= share;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < C; i++) squares += u[i] * u[i];
  return 1 / (real)sqrt((double)squares / (double)C + 1e-6);
}

void cpu_POOL_FWD(const KernelCall *c) {
  const real *E = c->in.POOL_FWD.E;      // [V, C]
  real *pooled = c->out.POOL_FWD.pooled; // [SEG, C]
  int64_t C = c->dims->C;
#pragma omp parallel for schedule(dynamic, 4)
  for (int g = 0; g < c->dims->segments; g++) {
    real *u = pooled + g * C, scale = pool_caption(c->batch, E, C, g, u);
    for (int64_t i = 0; i < C; i++) u[i] *= scale;
  }
}

void cpu_POOL_BWD(const KernelCall *c) {
  const real *dpooled = c->in.POOL_BWD.dpooled, *E = c->in.POOL_BWD.E; // [SEG, C], [V, C]
  real *dmean = c->out.POOL_BWD.dmean;                                 // [SEG, C]
  int64_t C = c->dims->C;
#pragma omp parallel for schedule(dynamic, 4)
  for (int g = 0; g < c->dims->segments; g++) {
    // The mean is rebuilt where its gradient goes. With y = s u: du = s (dy - u s^2 mean(dy u)).
    real *u = dmean + g * C, s = pool_caption(c->batch, E, C, g, u), dot = 0;
    if (s == 0) continue;
    const real *dy = dpooled + g * C;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < C; i++) dot += dy[i] * u[i];
    real along = s * s * dot / (real)C;
    for (int64_t i = 0; i < C; i++) u[i] = s * (dy[i] - u[i] * along);
  }
}
