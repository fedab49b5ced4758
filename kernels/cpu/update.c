// Whole-slab ops: copies, and what happens to parameters once a step.
#include "kernels/bits.h"
#include "kernels/cpu/cpu.h"
#include "kernels/exact.h"
#include "kernels/moments.h"

// What one loop iteration covers. Fixed, so that sums do not depend on the number of threads.
enum { BLOCK = 16384, COPY_BLOCK = 1 << 18 };

static int64_t block_length(int64_t count, int64_t at, int64_t block) {
  return count - at < block ? count - at : block;
}

void cpu_COPY(const KernelCall *c) {
  const char *src = c->in.COPY.src;
  char *dst = c->out.COPY.dst;
  int64_t bytes = c->args->span.count;
#pragma omp parallel for schedule(static) if (bytes > COPY_BLOCK)
  for (int64_t at = 0; at < bytes; at += COPY_BLOCK)
    memcpy(dst + at, src + at, (size_t)block_length(bytes, at, COPY_BLOCK));
}

void cpu_ZERO(const KernelCall *c) {
  char *dst = c->out.ZERO.dst;
  int64_t bytes = c->args->span.count;
#pragma omp parallel for schedule(static) if (bytes > COPY_BLOCK)
  for (int64_t at = 0; at < bytes; at += COPY_BLOCK) memset(dst + at, 0, (size_t)block_length(bytes, at, COPY_BLOCK));
}

void cpu_ADD(const KernelCall *c) {
  const real *src = c->in.ADD.src;
  real *dst = c->out.ADD.dst;
  int64_t count = c->args->span.count;
  int accumulate = c->args->accumulate;
#pragma omp parallel for schedule(static) if (count > BLOCK)
  for (int64_t at = 0; at < count; at += BLOCK) {
    int64_t end = at + block_length(count, at, BLOCK);
    if (accumulate)
      for (int64_t i = at; i < end; i++) dst[i] += src[i];
    else
      memcpy(dst + at, src + at, (size_t)(end - at) * sizeof *dst);
  }
}

// Of at most EXACT_LEAF elements: of neighbours, of pairs of these, and from there on halves.
static double leaf_squares(const real *x, int64_t n) {
  real padded[EXACT_LEAF] = {0};
  double pair[EXACT_LEAF / 2], sum[EXACT_LEAF / 4];
  if (n < EXACT_LEAF) x = memcpy(padded, x, (size_t)n * sizeof *x);
  for (int k = 0; k < EXACT_LEAF / 2; k++)
    pair[k] = (double)x[2 * k] * (double)x[2 * k] + (double)x[2 * k + 1] * (double)x[2 * k + 1];
  for (int k = 0; k < 16; k++) sum[k] = pair[2 * k] + pair[2 * k + 1];
  for (int k = 0; k < 8; k++) sum[k] += sum[k + 8];
  for (int k = 0; k < 4; k++) sum[k] += sum[k + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

void cpu_GRAD_SQUARES(const KernelCall *c) {
  const real *grads = c->in.GRAD_SQUARES.grads;
  double *squares = c->out.GRAD_SQUARES.squares; // [n, EXACT_WORDS]
  memset(squares, 0, (size_t)c->args->params.n * EXACT_WORDS * sizeof *squares);
#pragma omp parallel
  for (int p = 0; p < c->args->params.n; p++) {
    ParamSpan span = params_span(c->args, p);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t at = 0; at < span.count; at += BLOCK) {
      double words[EXACT_WORDS] = {0};
      int64_t end = at + block_length(span.count, at, BLOCK);
      for (int64_t i = at; i < end; i += EXACT_LEAF)
        exact_add(words, leaf_squares(grads + span.offset + i, min_i64(EXACT_LEAF, end - i)));
#pragma omp critical(grad_squares)
      for (int i = 0; i < EXACT_WORDS; i++) squares[(int64_t)p * EXACT_WORDS + i] += words[i];
    }
  }
}

void cpu_GRAD_DECIDE(const KernelCall *c) {
  const double *squares = c->in.GRAD_DECIDE.squares; // [n, EXACT_WORDS]
  const Metrics *metrics = c->in.GRAD_DECIDE.metrics;
  const StepScalars *scalars = c->in.GRAD_DECIDE.scalars;
  UpdateStatus *status = c->out.GRAD_DECIDE.status;
  int n = c->args->params.n;
  // The loss first: where it is not finite, all the gradients behind it are not either.
  double total[EXACT_WORDS] = {0}, loss = metrics_losses(metrics);
  int bad = isfinite(loss) ? -1 : n;
  for (int p = 0; p < n; p++, squares += EXACT_WORDS) {
    for (int i = 0; i < EXACT_WORDS; i++) total[i] += squares[i];
    if (bad < 0 && squares[EXACT_BAD] > 0) bad = p;
  }
  double norm = sqrt(exact_value(total));
  int clipped = scalars->clip > 0 && norm > scalars->clip;
  int beyond = scalars->norm_limit > 0 && norm > scalars->norm_limit;
  *status =
      (UpdateStatus){.norm = norm, .scale = clipped ? scalars->clip / norm : 1, .skip = bad >= 0 || beyond, .bad = bad};
}

void cpu_GRAD_HASH(const KernelCall *c) {
  const real *grads = c->in.GRAD_HASH.grads;
  uint64_t *hash = c->out.GRAD_HASH.hash; // [n]
  for (int p = 0; p < c->args->params.n; p++) {
    ParamSpan span = params_span(c->args, p);
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) if (span.count > BLOCK)
    for (int64_t i = 0; i < span.count; i++) {
      uint64_t bits = 0;
      memcpy(&bits, &grads[span.offset + i], sizeof *grads);
      sum += bits_mix(bits, i);
    }
    hash[p] = sum;
  }
}

// What all elements of an update share.
typedef struct Adam {
  real beta1, beta2, fresh1, fresh2, step, unbias2, eps, scale, rate; // fresh: 1 - beta
} Adam;

static Adam adam_of(const StepScalars *s, const UpdateStatus *status) {
  return (Adam){.beta1 = (real)s->beta1,
                .beta2 = (real)s->beta2,
                .fresh1 = (real)(1 - s->beta1),
                .fresh2 = (real)(1 - s->beta2),
                .step = (real)(s->lr / s->bias1),
                .unbias2 = (real)(1 / s->bias2),
                .eps = (real)s->eps,
                .scale = (real)status->scale,
                .rate = (real)(1 - s->ema_decay)};
}

// Elements [n]; ema may be NULL.
static void adam_elements(const Adam *all, real shrink, int64_t n, const real *grad, real *w, real *m, real *v,
                          real *ema) {
  const Adam a = *all;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    real g = a.scale * grad[i];
    real mi = a.beta1 * m[i] + a.fresh1 * g, vi = a.beta2 * v[i] + a.fresh2 * g * g;
    m[i] = mi;
    v[i] = vi;
    w[i] -= a.step * mi / (real_sqrt(vi * a.unbias2) + a.eps) + shrink * w[i];
  }
  if (!ema) return;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) ema[i] += a.rate * (w[i] - ema[i]);
}

// The same with moments in bf16; `first` of all elements is the first of these.
static void adam_elements_bf16(const Adam *a, real shrink, int64_t n, const real *grad, real *w, uint16_t *m,
                               uint16_t *v, real *ema, int64_t step, int64_t first) {
  enum { PIECE = 256 };
  real wide_m[PIECE], wide_v[PIECE];
  for (int64_t at = 0; at < n; at += PIECE) {
    int64_t count = block_length(n, at, PIECE);
    for (int64_t i = 0; i < count; i++) {
      wide_m[i] = (real)moment_float(m[at + i]);
      wide_v[i] = (real)moment_float(v[at + i]);
    }
    adam_elements(a, shrink, count, grad + at, w + at, wide_m, wide_v, ema ? ema + at : NULL);
    Philox4 chances = {{0}};
    for (int64_t i = 0; i < count; i++) {
      int64_t element = first + at + i;
      if (i == 0 || element % 4 == 0) chances = moment_chances(step, element / 4);
      m[at + i] = moment_round((float)wide_m[i], chances.v[element % 4]);
      v[at + i] = moment_round((float)wide_v[i], chances.v[element % 4] >> 16);
    }
  }
}

void cpu_ADAMW(const KernelCall *c) {
  const real *grads = c->in.ADAMW.grads;
  const UpdateStatus *status = c->in.ADAMW.status;
  const StepScalars *s = c->in.ADAMW.scalars;
  real *weights = c->out.ADAMW.weights, *emas = c->out.ADAMW.ema;
  if (status->skip) return;
  const Adam a = adam_of(s, status);
#pragma omp parallel
  for (int p = 0; p < c->args->params.n; p++) {
    ParamSpan span = params_span(c->args, p);
    real shrink = span.decay ? (real)(s->lr * s->weight_decay) : 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t at = 0; at < span.count; at += BLOCK) {
      int64_t first = span.offset + at, n = block_length(span.count, at, BLOCK);
      real *ema = emas ? emas + first : NULL;
      if (c->args->params.bf16_moments)
        adam_elements_bf16(&a, shrink, n, grads + first, weights + first, (uint16_t *)c->out.ADAMW.m + first,
                           (uint16_t *)c->out.ADAMW.v + first, ema, (int64_t)s->step, c->args->params.begin + first);
      else
        adam_elements(&a, shrink, n, grads + first, weights + first, (real *)c->out.ADAMW.m + first,
                      (real *)c->out.ADAMW.v + first, ema);
    }
  }
}

void cpu_CAST(const KernelCall *c) {
  const real *src = c->in.CAST.src;
  real *dst = c->out.CAST.dst;
  int64_t count = c->args->span.count;
#pragma omp parallel for schedule(static) if (count > BLOCK)
  for (int64_t at = 0; at < count; at += BLOCK)
    memcpy(dst + at, src + at, (size_t)block_length(count, at, BLOCK) * sizeof *dst);
}
