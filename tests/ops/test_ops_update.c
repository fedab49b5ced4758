// CPU products and whole-slab ops (copies, gradient norm, AdamW, EMA) against plain references in double, and: the ops
// of test_ops_a.c give the same bits for any number of threads. The same source is built for float and for double.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "kernels/bits.h"
#include "tests/ops/op_case.h"

#include <omp.h>

#define assert_close(got, want, n) assert_true(relative_error(got, want, n) < CASE_TOL)

// ---- products ----

static void naive_gemm(int ta, int tb, const GemmItem *g, double beta, double *C) {
  for (int64_t i = 0; i < g->M; i++) {
    for (int64_t j = 0; j < g->N; j++) {
      double sum = 0;
      for (int64_t k = 0; k < g->K; k++)
        sum += (double)g->A[ta ? k * g->lda + i : i * g->lda + k] * (double)g->B[tb ? j * g->ldb + k : k * g->ldb + j];
      double *to = &C[i * g->ldc + j];
      *to = beta == 0 ? sum : sum + beta * *to;
    }
  }
}

// Of the sizes given, with rows longer than they need be.
static GemmItem item_of(OpCase *c, int ta, int tb, int beta, int64_t M, int64_t N, int64_t K) {
  GemmItem g = {.M = M, .N = N, .K = K};
  g.lda = (ta ? g.M : g.K) + case_int(c, 0, 5) + 1;
  g.ldb = (tb ? g.K : g.N) + case_int(c, 0, 5) + 1;
  g.ldc = g.N + case_int(c, 0, 5) + 1;
  g.A = case_random(c, g.lda * (ta ? g.K : g.M), 1);
  g.B = case_random(c, g.ldb * (tb ? g.N : g.K), 1);
  g.C = case_random(c, g.ldc * g.M, 1);
  for (int64_t i = 0; i < g.ldc * g.M && !beta; i++)
    if (i % g.ldc < g.N) g.C[i] = (real)NAN;
  return g;
}

static GemmItem random_item(OpCase *c, int ta, int tb, int beta) {
  int most = case_int(c, 0, 3) ? 40 : 300;
  int64_t M = case_int(c, 0, most), N = case_int(c, 0, most), K = case_int(c, 0, most);
  return item_of(c, ta, tb, beta, M, N, K);
}

// Rows and columns around every number at which C is cut another way, and of several blocks.
static void test_gemm_blocks(void **state) {
  (void)state;
  const int64_t rows[] = {8, 95, 97, 129, 257, 601}, columns[] = {7, 127, 257, 513, 770};
  for (int i = 0; i < 6; i++)
    for (int j = 0; j < 5; j++)
      for (int t = 0; t < 4; t++) {
        OpCase c;
        op_case_init(&c, (uint64_t)(i * 5 + j) * 4 + (uint64_t)t);
        GemmItem g = item_of(&c, t & 1, t >> 1, 1, rows[i], columns[j], case_int(&c, 1, 9));
        double *want = case_double(&c, g.C, g.ldc * g.M);
        naive_gemm(t & 1, t >> 1, &g, 1, want);
        gemm_batch(t & 1, t >> 1, 1, &g, 1);
        assert_close(g.C, want, g.ldc * g.M);
        op_case_free(&c);
      }
}

static void test_gemm(void **state) {
  (void)state;
  for (int round = 0; round < 60; round++) {
    OpCase c;
    op_case_init(&c, (uint64_t)round);
    int ta = round & 1, tb = round >> 1 & 1, beta = round >> 2 & 1, n = case_int(&c, 0, 4);
    GemmItem items[4];
    double *want[4];
    for (int k = 0; k < n; k++) {
      items[k] = random_item(&c, ta, tb, beta);
      want[k] = case_double(&c, items[k].C, items[k].ldc * items[k].M);
      naive_gemm(ta, tb, &items[k], beta, want[k]);
    }
    if (n == 1) {
      GemmItem *g = items;
      gemm(ta, tb, g->M, g->N, g->K, 1, g->A, g->lda, g->B, g->ldb, (real)beta, g->C, g->ldc);
    } else {
      gemm_batch(ta, tb, (real)beta, items, n);
    }
    for (int k = 0; k < n; k++) assert_close(items[k].C, want[k], items[k].ldc * items[k].M);
    op_case_free(&c);
  }
}

static void test_exp(void **state) {
  (void)state;
  double worst = 0;
  for (double x = -86.9; x < 88; x += 0.00137) {
    double want = exp((double)(real)x);
    worst = fmax(worst, fabs((double)real_exp((real)x) - want) / want);
  }
  assert_true(worst < (CASE_DOUBLE ? 1e-15 : 2.5e-7));
  assert_true(isnan(real_exp((real)NAN)));
  assert_true(real_exp((real)INFINITY) == (real)INFINITY && real_exp((real)1e4) == (real)INFINITY);
  assert_true(real_exp((real)-INFINITY) == 0 && real_exp((real)-1e4) == 0);
  assert_true(real_exp(0) == 1);
}

// ---- slabs ----

static void test_spans(void **state) {
  (void)state;
  const int64_t counts[] = {0, 1, 77, 16384, 16385, 70001};
  for (int k = 0; k < 6; k++) {
    OpCase c;
    op_case_init(&c, (uint64_t)k);
    int64_t n = counts[k];
    size_t bytes = (size_t)n * sizeof(real);
    real *src = case_random(&c, n, 1), *copied = case_poison(&c, n), *zeroed = case_poison(&c, n);
    real *set = case_poison(&c, n), *added = case_random(&c, n, 1), *cast = case_poison(&c, n);
    double *sum = case_double(&c, added, n);
    for (int64_t i = 0; i < n; i++) sum[i] += (double)src[i];
    op_run(&c, OP_COPY, (OpArgs){.span = {.count = (int64_t)bytes}}, OP_IN(src), OP_OUT(copied));
    op_run(&c, OP_ZERO, (OpArgs){.span = {.count = (int64_t)bytes}}, OP_IN(NULL), OP_OUT(zeroed));
    op_run(&c, OP_ADD, (OpArgs){.span = {.count = n}}, OP_IN(src), OP_OUT(set));
    op_run(&c, OP_CAST, (OpArgs){.span = {.count = n}}, OP_IN(src), OP_OUT(cast));
    op_run(&c, OP_ADD, (OpArgs){.span = {.count = n, .accumulate = 1}}, OP_IN(src), OP_OUT(added));
    assert_true(same_bits(src, copied, bytes) && all_zero(zeroed, n) && same_bits(src, set, bytes) &&
                same_bits(src, cast, bytes));
    assert_close(added, sum, n);
    op_case_free(&c);
  }
}

// A slab of parameters of every length, with gaps between them that no op may touch.
enum { PARAMS = 9 };
typedef struct Slab {
  ParamSpan span[PARAMS];
  int64_t size;
  OpArgs args;
} Slab;

static void slab_make(OpCase *c, Slab *s) {
  const int64_t counts[PARAMS] = {0, 1, 5, 64, 16384, 16385, 40000, 1000, 33};
  s->size = 3;
  for (int p = 0; p < PARAMS; p++) {
    s->span[p] = (ParamSpan){.offset = s->size, .count = counts[p], .decay = p & 1};
    s->size += counts[p] + case_int(c, 1, 20);
  }
  s->args = (OpArgs){.params = {.spans = s->span, .n = PARAMS}};
}

// The parameter element i belongs to, or -1 in a gap.
static int slab_param(const Slab *s, int64_t i) {
  for (int p = 0; p < PARAMS; p++)
    if (i >= s->span[p].offset && i < s->span[p].offset + s->span[p].count) return p;
  return -1;
}

// NaN in the gaps.
static real *slab_random(OpCase *c, const Slab *s, double std) {
  real *x = case_random(c, s->size, std);
  for (int64_t i = 0; i < s->size; i++)
    if (slab_param(s, i) < 0) x[i] = (real)NAN;
  return x;
}

static void test_grad_norm(void **state) {
  (void)state;
  OpCase c;
  Slab s;
  op_case_init(&c, 1);
  slab_make(&c, &s);
  real *grads = slab_random(&c, &s, 0.1);
  double want[PARAMS] = {0}, total = 0, partial[PARAMS];
  for (int64_t i = 0; i < s.size; i++) {
    int p = slab_param(&s, i);
    if (p >= 0) want[p] += (double)grads[i] * (double)grads[i];
  }
  for (int p = 0; p < PARAMS; p++) total += want[p];
  Metrics metrics = {.nll = {1, 2}}, fine = metrics;
  UpdateStatus status;
  const double clips[] = {0, 0.5 * sqrt(total), 2 * sqrt(total)}, scales[] = {1, 0.5, 1};
  for (int k = 0; k < 3; k++) {
    StepScalars scalars = {.clip = clips[k]};
    memset(&status, 0x7f, sizeof status);
    memset(partial, 0x7f, sizeof partial);
    op_run(&c, OP_GRAD_NORM, s.args, OP_IN(grads, &metrics, &scalars), OP_OUT(&status, partial));
    for (int p = 0; p < PARAMS; p++) assert_true(fabs(partial[p] - want[p]) <= 1e-12 * want[p]);
    assert_true(fabs(status.norm - sqrt(total)) < 1e-12 * sqrt(total));
    assert_true(fabs(status.scale - scales[k]) < 1e-12);
    assert_true(status.skip == 0 && status.bad == -1);
  }
  // A limit on the norm skips the step, and names no parameter.
  for (int beyond = 0; beyond < 2; beyond++) {
    StepScalars scalars = {.clip = 1, .norm_limit = sqrt(total) * (beyond ? 0.999 : 1.001)};
    op_run(&c, OP_GRAD_NORM, s.args, OP_IN(grads, &metrics, &scalars), OP_OUT(&status, partial));
    assert_true(status.skip == beyond && status.bad == -1 && fabs(status.norm - sqrt(total)) < 1e-12 * sqrt(total));
  }
  // Something not finite: the loss, which is named whatever the gradients are; without it a gradient; then an earlier
  // one.
  const double bad_values[] = {NAN, INFINITY, -INFINITY};
  for (int k = 0; k < 5; k++) {
    StepScalars scalars = {.clip = 1};
    real *bad = case_copy(&c, grads, s.size);
    double *loss[] = {&metrics.nll[0], &metrics.nll[1], &metrics.flow, &metrics.balance, &metrics.z};
    *loss[k] = bad_values[k % 3];
    op_run(&c, OP_GRAD_NORM, s.args, OP_IN(bad, &metrics, &scalars), OP_OUT(&status, partial));
    assert_true(status.skip == 1 && status.bad == PARAMS);
    const int params[] = {7, 5, 1};
    for (int j = 0; j < 3; j++) {
      const ParamSpan *span = &s.span[params[j]];
      bad[span->offset + span->count - 1] = (real)bad_values[(j + k) % 3];
      op_run(&c, OP_GRAD_NORM, s.args, OP_IN(bad, &metrics, &scalars), OP_OUT(&status, partial));
      assert_true(status.skip == 1 && status.bad == PARAMS);
      op_run(&c, OP_GRAD_NORM, s.args, OP_IN(bad, &fine, &scalars), OP_OUT(&status, partial));
      assert_true(status.skip == 1 && status.bad == params[j]);
    }
    metrics = (Metrics){0};
  }
  // A huge but finite gradient is no reason to skip.
  real *huge = case_copy(&c, grads, s.size);
  huge[s.span[3].offset] = (real)1e30;
  op_run(&c, OP_GRAD_NORM, s.args, OP_IN(huge, &metrics, &(StepScalars){.clip = 1}), OP_OUT(&status, partial));
  assert_true(status.skip == 0 && fabs(status.norm / 1e30 - 1) < 1e-6);
  op_case_free(&c);
}

// More parameters, and a longer one, than one round of the sums takes.
static void test_grad_norm_rounds(void **state) {
  (void)state;
  enum { MANY = 1300, LONG = 700, LONG_COUNT = 40 * 16384 + 5 };
  static ParamSpan span[MANY];
  static double partial[MANY];
  OpCase c;
  op_case_init(&c, 3);
  int64_t size = 0;
  for (int p = 0; p < MANY; p++) {
    span[p] = (ParamSpan){.offset = size, .count = p == LONG ? LONG_COUNT : case_int(&c, 0, 3)};
    size += span[p].count;
  }
  real *grads = case_random(&c, size, 1);
  Metrics metrics = {0};
  StepScalars scalars = {0};
  UpdateStatus status;
  OpArgs args = {.params = {.spans = span, .n = MANY}};
  op_run(&c, OP_GRAD_NORM, args, OP_IN(grads, &metrics, &scalars), OP_OUT(&status, partial));
  double total = 0;
  for (int p = 0; p < MANY; p++) {
    double want = 0;
    for (int64_t i = 0; i < span[p].count; i++) {
      double g = (double)grads[span[p].offset + i];
      want += g * g;
    }
    assert_true(fabs(partial[p] - want) <= 1e-12 * want);
    total += want;
  }
  assert_true(fabs(status.norm - sqrt(total)) <= 1e-12 * status.norm);
  op_case_free(&c);
}

// Each bit of each element counts, at its place, and nothing outside of the parameters.
static void test_grad_hash(void **state) {
  (void)state;
  OpCase c;
  Slab s;
  op_case_init(&c, 3);
  slab_make(&c, &s);
  real *grads = slab_random(&c, &s, 0.1);
  uint64_t hash[PARAMS], other[PARAMS];
  memset(hash, 0x55, sizeof hash);
  op_run(&c, OP_GRAD_HASH, s.args, OP_IN(grads), OP_OUT(hash));
  for (int p = 0; p < PARAMS; p++) {
    uint64_t want = 0;
    for (int64_t i = 0; i < s.span[p].count; i++) {
      uint64_t bits = 0;
      memcpy(&bits, &grads[s.span[p].offset + i], sizeof *grads);
      want += bits_mix(bits, i);
    }
    assert_true(hash[p] == want);
  }
  for (int64_t i = 0; i < s.size; i += 1 + s.size / 500) {
    unsigned char *byte = (unsigned char *)&grads[i] + i % (int64_t)sizeof *grads;
    int param = slab_param(&s, i);
    *byte ^= (unsigned char)(1 << i % 8);
    op_run(&c, OP_GRAD_HASH, s.args, OP_IN(grads), OP_OUT(other));
    for (int p = 0; p < PARAMS; p++) assert_true((other[p] != hash[p]) == (p == param));
    *byte ^= (unsigned char)(1 << i % 8);
  }
  // Two elements that change places, and a zero that changes its sign.
  real *swapped = case_copy(&c, grads, s.size), *at = swapped + s.span[3].offset, first = at[0];
  at[0] = at[1];
  at[1] = first;
  op_run(&c, OP_GRAD_HASH, s.args, OP_IN(swapped), OP_OUT(other));
  assert_true(other[3] != hash[3]);
  at[0] = 0;
  op_run(&c, OP_GRAD_HASH, s.args, OP_IN(swapped), OP_OUT(other));
  at[0] = (real)-0.0;
  op_run(&c, OP_GRAD_HASH, s.args, OP_IN(swapped), OP_OUT(hash));
  assert_true(other[3] != hash[3]);
  op_case_free(&c);
}

static void test_adamw_ema(void **state) {
  (void)state;
  OpCase c;
  Slab s;
  op_case_init(&c, 2);
  slab_make(&c, &s);
  real *w = slab_random(&c, &s, 1), *m = slab_random(&c, &s, 0), *v = slab_random(&c, &s, 0);
  real *ema = slab_random(&c, &s, 1);
  double *w2 = case_double(&c, w, s.size), *m2 = case_double(&c, m, s.size), *v2 = case_double(&c, v, s.size);
  double *ema2 = case_double(&c, ema, s.size);
  for (int step = 1; step <= 4; step++) {
    real *grads = slab_random(&c, &s, 0.3);
    for (int64_t i = 0; step == 2 && i < s.size; i++) grads[i] *= 0; // no gradient at all
    StepScalars k = {.lr = 0.01 * step,
                     .beta1 = 0.9,
                     .beta2 = 0.95,
                     .eps = 1e-8,
                     .weight_decay = 0.1,
                     .bias1 = 1 - pow(0.9, step),
                     .bias2 = 1 - pow(0.95, step),
                     .ema_decay = 0.7};
    UpdateStatus status = {.scale = 0.5};
    op_run(&c, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(w, m, v));
    op_run(&c, OP_EMA, s.args, OP_IN(w, &status, &k), OP_OUT(ema));
    for (int64_t i = 0; i < s.size; i++) {
      int p = slab_param(&s, i);
      if (p < 0) continue;
      double g = 0.5 * (double)grads[i];
      m2[i] = k.beta1 * m2[i] + (1 - k.beta1) * g;
      v2[i] = k.beta2 * v2[i] + (1 - k.beta2) * g * g;
      double decay = s.span[p].decay ? k.weight_decay * w2[i] : 0;
      w2[i] -= k.lr * (m2[i] / k.bias1 / (sqrt(v2[i] / k.bias2) + k.eps) + decay);
      ema2[i] += (1 - k.ema_decay) * (w2[i] - ema2[i]);
    }
  }
  for (int p = 0; p < PARAMS; p++) {
    int64_t at = s.span[p].offset, n = s.span[p].count;
    assert_close(w + at, w2 + at, n);
    assert_close(m + at, m2 + at, n);
    assert_close(v + at, v2 + at, n);
    assert_close(ema + at, ema2 + at, n);
  }
  for (int64_t i = 0; i < s.size; i++)
    if (slab_param(&s, i) < 0) assert_true(isnan(w[i]) && isnan(m[i]) && isnan(v[i]) && isnan(ema[i]));
  // A skipped step changes nothing, whatever the gradients hold.
  size_t bytes = (size_t)s.size * sizeof(real);
  real *before[] = {case_copy(&c, w, s.size), case_copy(&c, m, s.size), case_copy(&c, v, s.size),
                    case_copy(&c, ema, s.size)};
  UpdateStatus skip = {.norm = NAN, .scale = NAN, .skip = 1};
  StepScalars k = {.lr = 1, .bias1 = 1, .bias2 = 1};
  op_run(&c, OP_ADAMW, s.args, OP_IN(case_poison(&c, s.size), &skip, &k), OP_OUT(w, m, v));
  op_run(&c, OP_EMA, s.args, OP_IN(w, &skip, &k), OP_OUT(ema));
  assert_true(same_bits(w, before[0], bytes) && same_bits(m, before[1], bytes) && same_bits(v, before[2], bytes) &&
              same_bits(ema, before[3], bytes));
  op_case_free(&c);
}

// ---- threads ----

// A running digest (FNV-1a over 64-bit words) of what ops wrote.
static void digest(uint64_t *hash, const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) *hash = (*hash ^ ((const uint8_t *)data)[i]) * 0x100000001B3u;
}

static void run_digest(OpCase *c, uint64_t *hash, OpKind kind, OpArgs args, const void *const *in, void *const *out,
                       const int64_t n[OP_MAX_OUT]) {
  op_run(c, kind, args, in, out);
  for (int k = 0; k < OP_MAX_OUT; k++)
    if (out[k]) digest(hash, out[k], (size_t)n[k] * sizeof(real));
}
#define COUNTS(...) ((int64_t[OP_MAX_OUT]){__VA_ARGS__})
enum { METRICS = sizeof(Metrics) / sizeof(real), STATUS = sizeof(UpdateStatus) / sizeof(real) };

// Every op at sizes that make several blocks, on inputs that depend on the seed alone.
static uint64_t digest_of_all(int threads) {
  omp_set_num_threads(threads);
  OpCase c;
  uint64_t hash = 0xCBF29CE484222325u;
  op_case_init(&c, 77);
  Dims *d = &c.dims;
  d->T = 700;
  d->C = 130;
  d->Z = 33;
  d->L = 1;
  d->M = 8 * d->C;
  d->V = 301;
  d->P = 27;
  d->segments = 60;
  op_case_pack(&c, PACK_MIXED);
  int64_t C = d->C, T = d->T, n = T * C, ns = d->segments * C, nm = (int64_t)d->segments * d->M;
  real *x = case_random(&c, n, 1), *y = case_random(&c, n, 1), *z = case_random(&c, n, 1);
  real *w = case_random(&c, C * C, 0.1), *w1 = case_random(&c, C * C, 0.1), *E = case_random(&c, d->V * C, 0.1);
  real *bias = case_random(&c, C, 1), *mod = case_random(&c, nm, 1), *U = case_random(&c, (int64_t)d->M * d->Z, 1);
  real *seg = case_random(&c, ns, 1), *a = case_random(&c, d->segments * d->Z, 1), *S = case_random(&c, 2 * d->M, 1);
  real *o[4] = {case_poison(&c, n), case_poison(&c, n), case_poison(&c, n), case_poison(&c, n)};
  real *table = case_poison(&c, nm), *big = case_poison(&c, T * 301);
  for (Extent e = EXT_ROWS; e <= EXT_IMAGE; e++) {
    OpArgs args = {.linear = {.extent = e, .in_dim = {(int)C, (int)C}, .out_dim = {(int)C, (int)C}}};
    run_digest(&c, &hash, OP_LINEAR_FWD, args, OP_IN(x, w, w1, bias), OP_OUT(o[0]), COUNTS(n));
    run_digest(&c, &hash, OP_LINEAR_DGRAD, args, OP_IN(x, w, w1, y), OP_OUT(o[0]), COUNTS(n));
    run_digest(&c, &hash, OP_LINEAR_WGRAD, args, OP_IN(x, y), OP_OUT(o[0], o[1], o[2]), COUNTS(C * C, 0, C));
  }
  OpArgs none = {0};
  run_digest(&c, &hash, OP_NOISE, none, OP_IN(NULL), OP_OUT(o[0]), COUNTS(T * d->P));
  run_digest(&c, &hash, OP_EMBED_FWD, none, OP_IN(E, x), OP_OUT(o[0]), COUNTS(n));
  run_digest(&c, &hash, OP_EMBED_BWD, none, OP_IN(x, seg), OP_OUT(o[0]), COUNTS(d->V * C));
  run_digest(&c, &hash, OP_POOL_FWD, none, OP_IN(E), OP_OUT(o[0]), COUNTS(ns));
  run_digest(&c, &hash, OP_POOL_BWD, none, OP_IN(seg, E), OP_OUT(o[0]), COUNTS(ns));
  run_digest(&c, &hash, OP_TIME_FEATURES, none, OP_IN(NULL), OP_OUT(o[0]), COUNTS(d->segments * 256));
  run_digest(&c, &hash, OP_MOD_FWD, none, OP_IN(a, U, S), OP_OUT(table), COUNTS(nm));
  run_digest(&c, &hash, OP_MOD_BWD, none, OP_IN(mod), OP_OUT(o[0]), COUNTS(2 * d->M));
  OpArgs site = {.adaln = {.gate = 0, .shift = (int)C, .scale = 2 * (int)C, .silu_image = 1}};
  real *mean = case_poison(&c, T), *rstd = case_poison(&c, T);
  run_digest(&c, &hash, OP_ADALN_FWD, site, OP_IN(x, y, mod), OP_OUT(o[0], o[1], mean, rstd), COUNTS(n, n, T, T));
  run_digest(&c, &hash, OP_ADALN_BWD, site, OP_IN(x, z, x, y, mod, mean, rstd), OP_OUT(o[0], o[1], table),
             COUNTS(n, n, nm));
  Metrics metrics = {0};
  run_digest(&c, &hash, OP_HEAD_CE, (OpArgs){.head = {.chunk = 200}}, OP_IN(x, E),
             OP_OUT(o[0], o[1], o[2], &metrics, big), COUNTS(T, n, d->V * C, METRICS));
  run_digest(&c, &hash, OP_FLOW_LOSS, (OpArgs){.flow = {.t_floor = 0.05}}, OP_IN(x), OP_OUT(o[0], o[1], &metrics),
             COUNTS(T * d->P, d->segments, METRICS));
  Slab s;
  slab_make(&c, &s);
  StepScalars k = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1, .bias1 = 0.1, .bias2 = 0.05};
  UpdateStatus status;
  real *grads = case_random(&c, s.size, 1), *p[4];
  for (int i = 0; i < 4; i++) p[i] = case_random(&c, s.size, i != 2);
  double partial[PARAMS];
  run_digest(&c, &hash, OP_GRAD_NORM, s.args, OP_IN(grads, &metrics, &k), OP_OUT(&status, partial), COUNTS(STATUS));
  uint64_t hashes[PARAMS];
  run_digest(&c, &hash, OP_GRAD_HASH, s.args, OP_IN(grads), OP_OUT(hashes),
             COUNTS(PARAMS * (int64_t)sizeof(uint64_t) / (int64_t)sizeof(real)));
  run_digest(&c, &hash, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(p[0], p[1], p[2]),
             COUNTS(s.size, s.size, s.size));
  run_digest(&c, &hash, OP_EMA, s.args, OP_IN(p[0], &status, &k), OP_OUT(p[3]), COUNTS(s.size));
  assert_true(isfinite(status.norm) && !status.skip && status.scale < 1);
  op_case_free(&c);
  return hash;
}

static void test_threads(void **state) {
  (void)state;
  uint64_t one = digest_of_all(1);
  for (int threads = 1; threads <= 5; threads++) assert_true(digest_of_all(threads) == one);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_gemm),      cmocka_unit_test(test_gemm_blocks), cmocka_unit_test(test_exp),
      cmocka_unit_test(test_spans),     cmocka_unit_test(test_grad_norm),   cmocka_unit_test(test_grad_norm_rounds),
      cmocka_unit_test(test_grad_hash), cmocka_unit_test(test_adamw_ema),   cmocka_unit_test(test_threads),
  };
  return cmocka_run_group_tests_name("ops update", tests, NULL, NULL);
}
