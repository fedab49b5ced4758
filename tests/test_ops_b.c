// CPU kernels: QK-norm and rotary, attention, routers, experts, SwiGLU. Every op is compared with a naive reference in
// double written from kernels.h, every gradient with central differences of that reference; every call is repeated with
// other numbers of threads and must give the same bits. Built in float and in double.
#include "tests/op_case.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

enum { SEEDS = 30 };

#define assert_small(error, tolerance)                                                                                 \
  do {                                                                                                                 \
    double error_ = (error);                                                                                           \
    if (!(error_ < (tolerance)))                                                                                       \
      fail_msg("%s = %g, more than %g (seed %d)", #error, error_, (double)(tolerance), current_seed(c));               \
  } while (0)

// The seed of a case is kept in the pack's own, where no op under test looks.
static int current_seed(const OpCase *c) {
  return (int)c->batch.dims->seed_lo;
}

// Sizes that matter here, and every kind of pack in turn.
static void make_case(OpCase *c, int seed) {
  op_case_init(c, (uint64_t)seed);
  Dims *d = &c->dims;
  const int ratio[] = {1, 2, 4, 3}, head_dim[] = {32, 64, 2, 10, 18};
  d->D = head_dim[seed % 5];
  d->G = 1 + seed / 2 % 2;
  d->H = d->G * ratio[seed % 4];
  for (int m = 0; m < MODALITIES; m++) {
    d->K[m] = 1 + (seed + 2 * m) % 4;
    d->E[m] = d->K[m] + case_int(c, 0, 4);
    if (seed % 3 == 0) d->F[m] = 16;
    if (seed % 3 == 0) d->S[m] = 8;
  }
  op_case_pack(c, (PackKind)(seed % PACK_KINDS));
  c->batch.dims->seed_lo = (uint32_t)seed;
}

static int used_rows(const OpCase *c) {
  return c->batch.dims->n_text + c->batch.dims->n_image;
}

static int modality_of(const OpCase *c, int64_t row) {
  return row < c->batch.dims->n_text ? TEXT : IMAGE;
}

// Runs an op with 3 threads, then with 1 and 2 from the same state of its outputs, and requires the same bits.
static void run_same(OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out,
                     const size_t bytes[OP_MAX_OUT]) {
  void *before[OP_MAX_OUT], *result[OP_MAX_OUT];
  for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) {
    before[k] = memcpy(case_bytes(c, bytes[k], 0), out[k], bytes[k]);
    result[k] = case_bytes(c, bytes[k], 0);
  }
  for (int run = 0; run < 3; run++) {
    omp_set_num_threads(run == 0 ? 3 : run);
    for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) memcpy(out[k], before[k], bytes[k]);
    op_run(c, kind, args, in, out);
    for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) {
      if (run == 0) memcpy(result[k], out[k], bytes[k]);
      if (!same_bits(result[k], out[k], bytes[k]))
        fail_msg("op %d output %d: other bits with %d threads (seed %d)", (int)kind, k, run, current_seed(c));
    }
  }
}
#define REALS(n) ((size_t)(n) * sizeof(real))
#define SIZES(...) ((const size_t[OP_MAX_OUT]){__VA_ARGS__})

// Requires that an accumulating op adds: got = prior + plain, elementwise within rounding.
static double accumulate_error(OpCase *c, const real *got, const real *prior, const real *plain, int64_t n) {
  double *want = case_zeros(c, n);
  for (int64_t i = 0; i < n; i++) want[i] = (double)prior[i] + (double)plain[i];
  return relative_error(got, want, n);
}

static double dot(const real *seed, const double *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)seed[i] * x[i];
  return sum;
}

// ---- QK-norm and rotary ----

typedef struct RopeRef {
  const OpCase *c;
  double *qkv, *wq, *wk;
  double *q, *k, *v;
  const real *dq, *dk, *dv;
} RopeRef;

static void reference_head(const OpCase *c, const double *x, const double *w, int64_t s, double *y) {
  int D = c->dims.D;
  double mean = 0;
  for (int i = 0; i < D; i++) mean += x[i] * x[i] / D;
  for (int j = 0; j < D / 2; j++) {
    float angle = (float)c->batch.position[2 * s + j % 2] * (float)pow(10000.0, -2.0 * j / D);
    double n = sqrt(mean + 1e-6), a = x[2 * j] / n * w[2 * j], b = x[2 * j + 1] / n * w[2 * j + 1];
    y[2 * j] = a * cos((double)angle) - b * sin((double)angle);
    y[2 * j + 1] = a * sin((double)angle) + b * cos((double)angle);
  }
}

static double rope_loss(void *context) {
  RopeRef *f = context;
  const Dims *d = &f->c->dims;
  int D = d->D, H = d->H, G = d->G, T = d->T;
  memset(f->q, 0, (size_t)(T * H * D) * sizeof *f->q);
  memset(f->k, 0, (size_t)(T * G * D) * sizeof *f->k);
  memset(f->v, 0, (size_t)(T * G * D) * sizeof *f->v);
  for (int r = 0; r < used_rows(f->c); r++) {
    int64_t s = f->c->batch.seq[r], m = modality_of(f->c, r);
    const double *x = f->qkv + r * (H + 2 * G) * D;
    for (int h = 0; h < H; h++) reference_head(f->c, x + h * D, f->wq + m * D, s, f->q + (s * H + h) * D);
    for (int g = 0; g < G; g++) {
      reference_head(f->c, x + (H + g) * D, f->wk + m * D, s, f->k + (s * G + g) * D);
      memcpy(f->v + (s * G + g) * D, x + (H + G + g) * D, (size_t)D * sizeof *f->v);
    }
  }
  return dot(f->dq, f->q, T * H * D) + dot(f->dk, f->k, T * G * D) + dot(f->dv, f->v, T * G * D);
}

static void test_rope(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    int64_t T = d->T, D = d->D, nq = T * d->H * D, nk = T * d->G * D, nx = nq + 2 * nk;
    for (int64_t i = 0; i < 2 * T && seed % 4 == 1; i++) // far along a document
      c->batch.position[i] += 2000;
    real *qkv = case_random(c, nx, 1), *wq = case_random(c, 2 * D, 1), *wk = case_random(c, 2 * D, 1);
    real *q = case_poison(c, nq), *k = case_poison(c, nk), *v = case_poison(c, nk);
    run_same(c, OP_QKNORM_ROPE_FWD, (OpArgs){0}, OP_IN(qkv, wq, wk), OP_OUT(q, k, v),
             SIZES(REALS(nq), REALS(nk), REALS(nk)));
    real *dq = case_random(c, nq, 1), *dk = case_random(c, nk, 1), *dv = case_random(c, nk, 1);
    RopeRef f = {.c = c,
                 .qkv = case_double(c, qkv, nx),
                 .wq = case_double(c, wq, 2 * D),
                 .wk = case_double(c, wk, 2 * D),
                 .q = case_zeros(c, nq),
                 .k = case_zeros(c, nk),
                 .v = case_zeros(c, nk),
                 .dq = dq,
                 .dk = dk,
                 .dv = dv};
    rope_loss(&f);
    assert_small(relative_error(q, f.q, nq), CASE_TOL);
    assert_small(relative_error(k, f.k, nk), CASE_TOL);
    assert_small(relative_error(v, f.v, nk), CASE_TOL);

    const void *const *in = OP_IN(dq, dk, dv, qkv, wq, wk);
    real *dx = case_poison(c, nx), *dwq = case_poison(c, 2 * D), *dwk = case_poison(c, 2 * D);
    const size_t *sizes = SIZES(REALS(nx), REALS(2 * D), REALS(2 * D));
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){0}, in, OP_OUT(dx, dwq, dwk), sizes);
    int64_t used = used_rows(c) * (d->H + 2 * d->G) * D;
    assert_true(all_zero(dx + used, nx - used));
    assert_small(gradient_error(c, rope_loss, &f, f.qkv, dx, nx, 60), CASE_GRAD_TOL);
    assert_small(gradient_error(c, rope_loss, &f, f.wq, dwq, 2 * D, 20), CASE_GRAD_TOL);
    assert_small(gradient_error(c, rope_loss, &f, f.wk, dwk, 2 * D, 20), CASE_GRAD_TOL);

    real *prior = case_random(c, 2 * D, 3), *more_q = case_copy(c, prior, 2 * D), *more_k = case_copy(c, prior, 2 * D);
    run_same(c, OP_QKNORM_ROPE_BWD, (OpArgs){.span = {.accumulate = 1}}, in, OP_OUT(dx, more_q, more_k), sizes);
    assert_small(accumulate_error(c, more_q, prior, dwq, 2 * D), CASE_TOL);
    assert_small(accumulate_error(c, more_k, prior, dwk, 2 * D), CASE_TOL);
    op_case_free(c);
  }
}

// ---- attention ----

typedef struct AttentionRef {
  const OpCase *c;
  double *q, *k, *v;
  double *o, *lse;
  const real *dout;
} AttentionRef;

static int allowed(const Batch *b, int q, int k) {
  return b->doc_start[q] <= k && k < b->kv_end[q] && q < b->q_end[k];
}

// The scores of one (query, head) over all T keys as probabilities [T]; returns lse.
static double reference_row(const AttentionRef *f, int query, int h, double *p) {
  const Dims *d = &f->c->dims;
  int T = d->T, D = d->D, g = h / (d->H / d->G);
  double top = -INFINITY, sum = 0;
  for (int k = 0; k < T; k++) {
    p[k] = -INFINITY;
    if (!allowed(&f->c->batch, query, k)) continue;
    double s = 0;
    for (int i = 0; i < D; i++) s += f->q[(query * d->H + h) * D + i] * f->k[(k * d->G + g) * D + i];
    p[k] = s / sqrt(D);
    top = p[k] > top ? p[k] : top;
  }
  for (int k = 0; k < T; k++) sum += p[k] = p[k] == -INFINITY ? 0 : exp(p[k] - top);
  for (int k = 0; k < T; k++) p[k] /= sum;
  return top + log(sum);
}

static double attention_loss(void *context) {
  AttentionRef *f = context;
  const Dims *d = &f->c->dims;
  int T = d->T, D = d->D, H = d->H, G = d->G;
  double *p = malloc((size_t)T * sizeof *p);
  memset(f->o, 0, (size_t)(T * H * D) * sizeof *f->o);
  for (int query = 0; query < used_rows(f->c); query++) {
    for (int h = 0; h < H; h++) {
      f->lse[h * T + query] = reference_row(f, query, h, p);
      double *o = f->o + (f->c->batch.row[query] * H + h) * D;
      for (int k = 0; k < T; k++)
        for (int i = 0; i < D && p[k] != 0; i++) o[i] += p[k] * f->v[(k * G + h / (H / G)) * D + i];
    }
  }
  free(p);
  return dot(f->dout, f->o, T * H * D);
}

// dq, dk, dv by the textbook formulas, for packs too long for differences.
static void reference_backward(const AttentionRef *f, double *dq, double *dk, double *dv) {
  const Dims *d = &f->c->dims;
  int T = d->T, D = d->D, H = d->H, G = d->G;
  double *p = malloc((size_t)T * sizeof *p), *dp = malloc((size_t)T * sizeof *dp);
  for (int query = 0; query < used_rows(f->c); query++) {
    for (int h = 0; h < H; h++) {
      int g = h / (H / G);
      const real *dout = f->dout + (f->c->batch.row[query] * H + h) * D;
      double mean = 0;
      reference_row(f, query, h, p);
      for (int k = 0; k < T; k++) {
        dp[k] = 0;
        for (int i = 0; i < D && p[k] != 0; i++) dp[k] += (double)dout[i] * f->v[(k * G + g) * D + i];
        mean += p[k] * dp[k];
      }
      for (int k = 0; k < T; k++) {
        double ds = p[k] * (dp[k] - mean) / sqrt(D);
        for (int i = 0; i < D && p[k] != 0; i++) {
          dq[(query * H + h) * D + i] += ds * f->k[(k * G + g) * D + i];
          dk[(k * G + g) * D + i] += ds * f->q[(query * H + h) * D + i];
          dv[(k * G + g) * D + i] += p[k] * (double)dout[i];
        }
      }
    }
  }
  free(p);
  free(dp);
}

// Forward and backward of one pack; differences too when `checked` elements of each input are to be compared so.
static void check_attention(OpCase *c, int checked) {
  const Dims *d = &c->dims;
  int64_t T = d->T, D = d->D, nq = T * d->H * D, nk = T * d->G * D, nl = T * d->H, used = used_rows(c);
  real *q = case_random(c, nq, 1.5), *k = case_random(c, nk, 1.5), *v = case_random(c, nk, 1);
  real *o = case_poison(c, nq), *lse = case_poison(c, nl), *dout = case_random(c, nq, 1);
  run_same(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse), SIZES(REALS(nq), REALS(nl)));
  AttentionRef f = {.c = c,
                    .q = case_double(c, q, nq),
                    .k = case_double(c, k, nk),
                    .v = case_double(c, v, nk),
                    .o = case_zeros(c, nq),
                    .lse = case_zeros(c, nl),
                    .dout = dout};
  attention_loss(&f);
  assert_small(relative_error(o, f.o, nq), CASE_TOL);
  assert_true(all_zero(o + used * d->H * D, (T - used) * d->H * D));
  for (int64_t i = 0; i < nl; i++) {
    if (i % T >= used)
      assert_true(isinf(lse[i]) && lse[i] > 0);
    else
      assert_true(fabs((double)lse[i] - f.lse[i]) <= CASE_TOL * (1 + fabs(f.lse[i])));
  }

  real *dq = case_poison(c, nq), *dk = case_poison(c, nk), *dv = case_poison(c, nk);
  run_same(c, OP_ATTENTION_BWD, (OpArgs){0}, OP_IN(dout, o, q, k, v, lse), OP_OUT(dq, dk, dv),
           SIZES(REALS(nq), REALS(nk), REALS(nk)));
  double *want_q = case_zeros(c, nq), *want_k = case_zeros(c, nk), *want_v = case_zeros(c, nk);
  reference_backward(&f, want_q, want_k, want_v);
  assert_small(relative_error(dq, want_q, nq), CASE_TOL);
  assert_small(relative_error(dk, want_k, nk), CASE_TOL);
  assert_small(relative_error(dv, want_v, nk), CASE_TOL);
  assert_true(all_zero(dq + used * d->H * D, (T - used) * d->H * D));
  assert_true(all_zero(dk + used * d->G * D, (T - used) * d->G * D));
  assert_true(all_zero(dv + used * d->G * D, (T - used) * d->G * D));
  if (checked == 0) return;
  assert_small(gradient_error(c, attention_loss, &f, f.q, dq, nq, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, attention_loss, &f, f.k, dk, nk, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, attention_loss, &f, f.v, dv, nk, checked), CASE_GRAD_TOL);
}

static void test_attention(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    check_attention(c, 25);
    op_case_free(c);
  }
}

// Overwrites the attention arrays of an empty pack with documents of random length up to `longest`: runs of text, clean
// images, and noised images hidden from what follows. Rows are a random permutation: attention must not care.
static void long_documents(OpCase *c, int longest) {
  Batch *b = &c->batch;
  int at = 0, used = c->dims.T - case_int(c, 0, 20);
  while (at < used) {
    int start = at, want = at + case_int(c, 1, longest), end = want < used ? want : used;
    while (at < end) {
      int kind = case_int(c, 0, 3), n = case_int(c, 1, 150), stop = at + n < end ? at + n : end; // 2: clean, 3: noised
      for (int s = at; s < stop; s++) {
        b->doc_start[s] = start;
        b->kv_end[s] = kind < 2 ? s + 1 : stop;
        b->q_start[s] = kind < 2 ? s : at;
        b->q_end[s] = kind == 3 ? stop : end;
      }
      at = stop;
    }
  }
  for (int s = 0; s < used; s++) {
    int other = case_int(c, 0, s);
    b->row[s] = b->row[other];
    b->row[other] = s;
  }
  for (int s = 0; s < used; s++) b->seq[b->row[s]] = s;
  b->dims->n_text = used;
}

// Documents of many tiles, on both sides of the length where the backward pass changes its way.
static void test_attention_long(void **state) {
  (void)state;
  const int longest[] = {140, 300, 500, 5000, 5000, 700};
  for (int seed = 0; seed < 6; seed++) {
    OpCase box, *c = &box;
    op_case_init(c, (uint64_t)(1000 + seed));
    Dims *d = &c->dims;
    d->T = seed < 2 ? 300 : case_int(c, 530, 800);
    d->D = seed % 2 ? 32 : 6;
    d->G = 1;
    d->H = (const int[]){1, 2, 4, 2, 1, 3}[seed];
    op_case_pack(c, PACK_EMPTY);
    c->batch.dims->seed_lo = (uint32_t)(1000 + seed);
    long_documents(c, longest[seed]);
    check_attention(c, 0);
    op_case_free(c);
  }
}

// More query heads to a kv head than a tile has rows.
static void test_attention_many_heads(void **state) {
  (void)state;
  OpCase box, *c = &box;
  op_case_init(c, 77);
  c->dims.G = 1;
  c->dims.H = 70;
  c->dims.D = 4;
  op_case_pack(c, PACK_MIXED);
  c->batch.dims->seed_lo = 77;
  check_attention(c, 5);
  op_case_free(c);
}

// Large scores neither overflow nor lose the sum; NaN in a query reaches its output.
static void test_attention_extremes(void **state) {
  (void)state;
  OpCase box, *c = &box;
  op_case_init(c, 78);
  c->dims.G = c->dims.H = 1;
  c->dims.D = 8;
  op_case_pack(c, PACK_FULL);
  int64_t n = c->dims.T * 8;
  real *q = case_random(c, n, 60), *k = case_random(c, n, 60), *v = case_random(c, n, 1);
  real *o = case_poison(c, n), *lse = case_poison(c, c->dims.T);
  op_run(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse));
  for (int64_t i = 0; i < n; i++) assert_true(isfinite(o[i]));
  int query = c->dims.T / 2;
  q[query * 8] = (real)NAN;
  op_run(c, OP_ATTENTION_FWD, (OpArgs){0}, OP_IN(q, k, v), OP_OUT(o, lse));
  for (int64_t i = 0; i < n; i++) assert_true(isnan(o[i]) == (i / 8 == c->batch.row[query]));
  op_case_free(c);
}

// ---- routers ----

typedef struct RouterRef {
  const OpCase *c;
  double *h, *wr[MODALITIES];
  int *chosen;             // [T][Kmax], fixed by the first evaluation
  double *weight, *counts; // [T][Kmax]; [E_0 + E_1]
  double balance, z, balance_loss, z_loss;
  const real *dweights, *add_seed;
} RouterRef;

static void reference_logits(const RouterRef *f, int r, double *s) {
  int m = modality_of(f->c, r), C = f->c->dims.C;
  for (int e = 0; e < f->c->dims.E[m]; e++) {
    s[e] = 0;
    for (int i = 0; i < C; i++) s[e] += f->h[r * C + i] * f->wr[m][e * C + i];
  }
}

// Chooses by sorting: descending logits, ties to the lower index.
static void reference_choice(RouterRef *f) {
  const Dims *d = &f->c->dims;
  int kmax = dims_kmax(d);
  double s[32];
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), order[32];
    reference_logits(f, r, s);
    for (int e = 0; e < d->E[m]; e++) order[e] = e;
    for (int i = 1; i < d->E[m]; i++)
      for (int j = i; j > 0 && s[order[j]] > s[order[j - 1]]; j--) {
        int t = order[j];
        order[j] = order[j - 1];
        order[j - 1] = t;
      }
    for (int j = 0; j < d->K[m]; j++) {
      f->chosen[r * kmax + j] = order[j];
      f->counts[(m ? d->E[0] : 0) + order[j]]++;
    }
  }
}

static double router_loss(void *context) {
  RouterRef *f = context;
  const Dims *d = &f->c->dims;
  const BatchDims *n = f->c->batch.dims;
  int kmax = dims_kmax(d);
  double s[32], P[MODALITIES][32] = {{0}}, total = 0;
  double rows[MODALITIES] = {n->n_text, n->n_image};
  memset(f->weight, 0, (size_t)(d->T * kmax) * sizeof *f->weight);
  f->balance_loss = f->z_loss = 0;
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), E = d->E[m], K = d->K[m];
    const int *chosen = f->chosen + r * kmax;
    double all = 0, sum = 0;
    reference_logits(f, r, s);
    for (int e = 0; e < E; e++) all += exp(s[e]);
    for (int e = 0; e < E; e++) P[m][e] += exp(s[e]) / all / rows[m];
    for (int j = 0; j < K; j++) sum += exp(s[chosen[j]]);
    for (int j = 0; j < K; j++) f->weight[r * kmax + j] = exp(s[chosen[j]]) / (K == 1 ? all : sum);
    f->z_loss += (double)n->router_scale * f->z * log(all) * log(all) / rows[m];
    for (int i = 0; i < d->C; i++) total += (double)f->add_seed[r * d->C + i] * f->h[r * d->C + i];
  }
  for (int m = 0; m < MODALITIES; m++)
    for (int e = 0; e < d->E[m] && rows[m] > 0; e++)
      f->balance_loss += (double)n->router_scale * f->balance * d->E[m] * P[m][e] * f->counts[(m ? d->E[0] : 0) + e] /
                         (rows[m] * d->K[m]);
  return total + f->balance_loss + f->z_loss + dot(f->dweights, f->weight, d->T * kmax);
}

// The route leads from assignments to slots sorted by (expert, row) and back; the used slots are exactly the packed
// range of each modality; everything else is -1.
static void check_route(const OpCase *c, const int *chosen, const double *counts, int32_t *memory) {
  const Dims *d = &c->dims;
  const BatchDims *n = c->batch.dims;
  Route route;
  route_bind(&route, d, memory);
  int kmax = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    int first = (m ? n->n_text : 0) * d->K[m], rows = m ? n->n_image : n->n_text, at = first;
    for (int e = 0; e < d->E[m]; e++) {
      int g = (m ? d->E[0] : 0) + e;
      assert_int_equal(route.begin[g], at);
      assert_int_equal(route.count[g], (int)counts[g]);
      for (int s = at; s < at + route.count[g]; s++) {
        int source = route.source[m][s];
        assert_int_equal(chosen[source], e);
        assert_int_equal(route.slot[source], s);
        assert_int_equal(modality_of(c, source / kmax), m);
        if (s > at) assert_true(route.source[m][s - 1] / kmax < source / kmax);
      }
      at += route.count[g];
    }
    assert_int_equal(at, first + rows * d->K[m]);
    for (int s = 0; s < d->T * d->K[m]; s++)
      if (s < first || s >= at) assert_int_equal(route.source[m][s], -1);
  }
  for (int r = 0; r < d->T; r++)
    for (int j = 0; j < kmax; j++)
      if (r >= used_rows(c) || j >= d->K[modality_of(c, r)]) assert_int_equal(route.slot[r * kmax + j], -1);
}

// Makes every row of a modality prefer its expert 0: h becomes positive, and the router's first row too.
static void send_to_first_expert(const OpCase *c, real *h, real *wr) {
  const Dims *d = &c->dims;
  for (int64_t i = 0; i < d->C; i++) wr[i] = (real)(1 + fabs((double)wr[i]));
  for (int64_t i = 0; i < (int64_t)d->T * d->C; i++) h[i] = (real)fabs((double)h[i]);
}

static void test_router(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1};
    int kmax = dims_kmax(d), groups = d->E[0] + d->E[1];
    int64_t T = d->T, C = d->C, nl = two_sided_size(d->T, one, d->E), nw = T * kmax, nx = T * C;
    real *h = case_random(c, nx, 1), *wr[2];
    for (int m = 0; m < 2; m++) {
      wr[m] = case_random(c, d->E[m] * C, 0.5);
      if (seed % 6 == 3) send_to_first_expert(c, h, wr[m]);
    }
    size_t route_bytes = (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t);
    real *logits = case_poison(c, nl), *weights = case_poison(c, nw);
    int32_t *route = case_bytes(c, route_bytes, 0x5a);
    run_same(c, OP_ROUTER_FWD, (OpArgs){0}, OP_IN(h, wr[0], wr[1]), OP_OUT(logits, weights, route),
             SIZES(REALS(nl), REALS(nw), route_bytes));

    real *dweights = case_random(c, nw, 1), *add = seed % 2 ? case_random(c, nx, 1) : NULL;
    RouterRef f = {.c = c,
                   .h = case_double(c, h, nx),
                   .wr = {case_double(c, wr[0], d->E[0] * C), case_double(c, wr[1], d->E[1] * C)},
                   .chosen = case_bytes(c, (size_t)nw * sizeof(int), 0xff),
                   .weight = case_zeros(c, nw),
                   .counts = case_zeros(c, groups),
                   .balance = 0.7,
                   .z = 0.3,
                   .dweights = dweights,
                   .add_seed = add ? add : case_random(c, nx, 0)};
    reference_choice(&f);
    router_loss(&f);
    assert_small(relative_error(weights, f.weight, nw), CASE_TOL);
    check_route(c, f.chosen, f.counts, route);
    if (seed % 6 == 3)
      for (int m = 0; m < 2; m++) // all rows really are on one expert
        assert_int_equal((int)f.counts[m ? d->E[0] : 0], m ? c->batch.dims->n_image : c->batch.dims->n_text);
    for (int r = 0; r < used_rows(c); r++) {
      double s[32];
      int m = modality_of(c, r);
      reference_logits(&f, r, s);
      assert_small(relative_error(logits + two_sided_base(d->T, one, d->E, m) + r * d->E[m], s, d->E[m]), CASE_TOL);
    }
    int64_t filler = (T - used_rows(c)) * d->E[1];
    assert_true(all_zero(logits + nl - filler, filler));

    // Losses and loads add to what is there.
    OpArgs args = {.router = {.balance = f.balance, .z = f.z, .layer = d->L - 1}};
    double *metrics = case_zeros(c, metrics_size(d));
    for (int64_t i = 0; i < metrics_size(d); i++) metrics[i] = (double)i;
    Metrics *m = (Metrics *)metrics, prior = *m;
    run_same(c, OP_ROUTER_LOSS, args, OP_IN(logits, route), OP_OUT(metrics),
             SIZES((size_t)metrics_size(d) * sizeof(double)));
    assert_true(fabs(m->balance - prior.balance - f.balance_loss) <= CASE_TOL * (1 + f.balance_loss));
    assert_true(fabs(m->z - prior.z - f.z_loss) <= CASE_TOL * (1 + f.z_loss));
    int64_t base = (int64_t)(sizeof(Metrics) / sizeof(double)), layer = base + (d->L - 1) * groups;
    for (int64_t i = base; i < metrics_size(d); i++)
      assert_true(metrics[i] == (double)i + (i >= layer ? f.counts[i - layer] : 0));
    assert_true(same_bits(&prior.nll, &m->nll, offsetof(Metrics, balance)));

    const void *const *in = OP_IN(dweights, logits, weights, route, h, wr[0], wr[1], add);
    real *dh = case_poison(c, nx), *dwr[2] = {case_poison(c, d->E[0] * C), case_poison(c, d->E[1] * C)};
    const size_t *sizes = SIZES(REALS(nx), REALS(d->E[0] * C), REALS(d->E[1] * C));
    run_same(c, OP_ROUTER_BWD, args, in, OP_OUT(dh, dwr[0], dwr[1]), sizes);
    int64_t used = used_rows(c) * C;
    assert_true(all_zero(dh + used, nx - used));
    assert_small(gradient_error(c, router_loss, &f, f.h, dh, nx, 80), CASE_GRAD_TOL);
    for (int k = 0; k < 2; k++)
      assert_small(gradient_error(c, router_loss, &f, f.wr[k], dwr[k], d->E[k] * C, 40), CASE_GRAD_TOL);

    args.router.accumulate = 1;
    real *start[2] = {case_random(c, d->E[0] * C, 3), case_random(c, d->E[1] * C, 3)};
    real *more[2] = {case_copy(c, start[0], d->E[0] * C), case_copy(c, start[1], d->E[1] * C)};
    run_same(c, OP_ROUTER_BWD, args, in, OP_OUT(dh, more[0], more[1]), sizes);
    for (int k = 0; k < 2; k++) assert_small(accumulate_error(c, more[k], start[k], dwr[k], d->E[k] * C), CASE_TOL);
    op_case_free(c);
  }
}

// Equal logits go to the lower indices; NaN logits still give a valid route.
static void test_router_ties(void **state) {
  (void)state;
  for (int nan = 0; nan < 2; nan++) {
    OpCase box, *c = &box;
    make_case(c, 20);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1};
    int kmax = dims_kmax(d);
    real *h = case_random(c, (int64_t)d->T * d->C, nan ? (double)NAN : 1);
    real *wr[2] = {case_random(c, d->E[0] * d->C, 0), case_random(c, d->E[1] * d->C, 0)};
    real *logits = case_poison(c, two_sided_size(d->T, one, d->E)), *weights = case_poison(c, d->T * kmax);
    int32_t *memory = case_bytes(c, (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t), 0);
    op_run(c, OP_ROUTER_FWD, (OpArgs){0}, OP_IN(h, wr[0], wr[1]), OP_OUT(logits, weights, memory));
    Route route;
    route_bind(&route, d, memory);
    for (int m = 0; m < 2; m++)
      for (int e = 0; e < d->E[m]; e++)
        assert_int_equal(route.count[(m ? d->E[0] : 0) + e],
                         e < d->K[m] ? (m ? c->batch.dims->n_image : c->batch.dims->n_text) : 0);
    for (int r = 0; r < used_rows(c) && !nan; r++) {
      int m = modality_of(c, r), K = d->K[m];
      for (int j = 0; j < K; j++)
        assert_true(fabs((double)weights[r * kmax + j] - 1.0 / (K == 1 ? d->E[m] : K)) < 1e-6);
    }
    op_case_free(c);
  }
}

// ---- experts ----

typedef struct ExpertRef {
  const OpCase *c;
  double *h, *w1[MODALITIES], *w2[MODALITIES], *weights;
  const int *expert; // [T][Kmax]
  double *out, *y;   // [T, C]; [T][Kmax][C] before weighting
  const real *dout, *add;
} ExpertRef;

static double expert_loss(void *context) {
  ExpertRef *f = context;
  const Dims *d = &f->c->dims;
  int C = d->C, kmax = dims_kmax(d);
  memset(f->out, 0, (size_t)(d->T * C) * sizeof *f->out);
  for (int r = 0; r < used_rows(f->c); r++) {
    int m = modality_of(f->c, r), F = d->F[m];
    for (int i = 0; i < C && f->add; i++) f->out[r * C + i] = (double)f->add[r * C + i];
    for (int j = 0; j < d->K[m]; j++) {
      int e = f->expert[r * kmax + j];
      const double *w1 = f->w1[m] + e * 2 * F * C, *w2 = f->w2[m] + e * C * F;
      double *y = f->y + (r * kmax + j) * C, a[32];
      for (int k = 0; k < F; k++) {
        double gate = 0, up = 0;
        for (int i = 0; i < C; i++) {
          gate += f->h[r * C + i] * w1[2 * k * C + i];
          up += f->h[r * C + i] * w1[(2 * k + 1) * C + i];
        }
        a[k] = gate / (1 + exp(-gate)) * up;
      }
      for (int i = 0; i < C; i++) {
        y[i] = 0;
        for (int k = 0; k < F; k++) y[i] += a[k] * w2[i * F + k];
        f->out[r * C + i] += f->weights[r * kmax + j] * y[i];
      }
    }
  }
  return dot(f->dout, f->out, d->T * C);
}

// A routing that is not a router's: random distinct experts, or always the first ones. Returns the experts [T][Kmax].
static int *make_route(OpCase *c, int32_t *memory, bool first_ones) {
  const Dims *d = &c->dims;
  Route route;
  memset(memory, 0xff, (size_t)route_bind(&route, d, memory) * sizeof *memory);
  int kmax = dims_kmax(d), *expert = case_bytes(c, (size_t)(d->T * kmax) * sizeof *expert, 0xff);
  for (int r = 0; r < used_rows(c); r++) {
    int E = d->E[modality_of(c, r)], K = d->K[modality_of(c, r)], all[32];
    for (int e = 0; e < E; e++) all[e] = e;
    for (int j = 0; j < K; j++) {
      int pick = first_ones ? j : case_int(c, j, E - 1), t = all[pick];
      all[pick] = all[j];
      all[j] = t;
      expert[r * kmax + j] = t;
    }
  }
  for (int m = 0; m < MODALITIES; m++) {
    int first = m ? c->batch.dims->n_text : 0, at = first * d->K[m];
    int end = first + (m ? c->batch.dims->n_image : c->batch.dims->n_text);
    for (int e = 0; e < d->E[m]; e++) {
      int g = (m ? d->E[0] : 0) + e;
      route.begin[g] = at;
      for (int r = first; r < end; r++)
        for (int j = 0; j < d->K[m]; j++)
          if (expert[r * kmax + j] == e) {
            route.slot[r * kmax + j] = at;
            route.source[m][at++] = r * kmax + j;
          }
      route.count[g] = at - route.begin[g];
    }
  }
  return expert;
}

// Elements of a per-assignment buffer of these widths that belong to no assignment: they must still hold the poison.
static void check_unused(const OpCase *c, const real *x, const int width[2]) {
  const Dims *d = &c->dims;
  int64_t size = two_sided_size(d->T, d->K, width), image = two_sided_base(d->T, d->K, width, IMAGE);
  int64_t n_text = c->batch.dims->n_text, k1 = d->K[1] * width[1];
  for (int64_t i = 0; i < size; i++) {
    bool used = i < n_text * d->K[0] * width[0] || (i >= image + n_text * k1 && i < image + used_rows(c) * k1);
    assert_true(isnan(x[i]) == !used);
  }
}

static void check_experts(OpCase *c, int checked, bool first_ones) {
  const Dims *d = &c->dims;
  int kmax = dims_kmax(d), seed = current_seed(c);
  int64_t T = d->T, C = d->C, nx = T * C, nw = T * kmax;
  const int wide[2] = {2 * d->F[0], 2 * d->F[1]}, out_width[2] = {d->C, d->C};
  int64_t na = two_sided_size(d->T, d->K, d->F), np = 2 * na, ny = two_sided_size(d->T, d->K, out_width);
  int32_t *route = case_bytes(c, (size_t)route_bind(&(Route){0}, d, NULL) * sizeof(int32_t), 0);
  int *expert = make_route(c, route, first_ones);
  Route bound;
  route_bind(&bound, d, route);
  real *h = case_random(c, nx, 1), *weights = case_random(c, nw, 1), *w1[2], *w2[2];
  int64_t n1[2], n2[2];
  for (int m = 0; m < 2; m++) {
    n1[m] = (int64_t)d->E[m] * 2 * d->F[m] * C;
    n2[m] = (int64_t)d->E[m] * d->F[m] * C;
    w1[m] = case_random(c, n1[m], 0.3);
    w2[m] = case_random(c, n2[m], 0.3);
  }

  // Forward.
  real *pre = case_poison(c, np), *a = case_poison(c, na), *y = case_poison(c, ny), *out = case_poison(c, nx);
  real *add = seed % 2 ? case_random(c, nx, 1) : NULL, *dout = case_random(c, nx, 1);
  run_same(c, OP_EXPERT_UP_FWD, (OpArgs){0}, OP_IN(h, route, w1[0], w1[1]), OP_OUT(pre, a),
           SIZES(REALS(np), REALS(na)));
  run_same(c, OP_EXPERT_DOWN_FWD, (OpArgs){0}, OP_IN(a, route, w2[0], w2[1]), OP_OUT(y), SIZES(REALS(ny)));
  run_same(c, OP_EXPERT_COMBINE, (OpArgs){0}, OP_IN(y, route, weights, add), OP_OUT(out), SIZES(REALS(nx)));
  check_unused(c, pre, wide);
  check_unused(c, a, d->F);
  check_unused(c, y, out_width);
  ExpertRef f = {.c = c,
                 .h = case_double(c, h, nx),
                 .w1 = {case_double(c, w1[0], n1[0]), case_double(c, w1[1], n1[1])},
                 .w2 = {case_double(c, w2[0], n2[0]), case_double(c, w2[1], n2[1])},
                 .weights = case_double(c, weights, nw),
                 .expert = expert,
                 .out = case_zeros(c, nx),
                 .y = case_zeros(c, nw * C),
                 .dout = dout,
                 .add = add};
  expert_loss(&f);
  assert_small(relative_error(out, f.out, nx), CASE_TOL);
  int64_t used = used_rows(c) * C;
  assert_true(all_zero(out + used, nx - used));
  for (int64_t i = 0; i < nw; i++) {
    if (expert[i] < 0) continue;
    int m = modality_of(c, i / kmax);
    const real *row = y + two_sided_base(d->T, d->K, out_width, m) + bound.slot[i] * C;
    assert_small(relative_error(row, f.y + i * C, C), 10 * CASE_TOL);
  }

  // Backward.
  real *dpre = case_poison(c, np), *sa = case_poison(c, na), *dw = case_poison(c, nw);
  run_same(c, OP_EXPERT_DOWN_BWD, (OpArgs){0}, OP_IN(dout, pre, weights, route, w2[0], w2[1]), OP_OUT(dpre, sa, dw),
           SIZES(REALS(np), REALS(na), REALS(nw)));
  check_unused(c, dpre, wide);
  check_unused(c, sa, d->F);
  for (int64_t i = 0; i < nw; i++) assert_true(expert[i] >= 0 || dw[i] == 0);
  real *dslot = case_poison(c, ny), *dh = case_poison(c, nx);
  run_same(c, OP_EXPERT_UP_DGRAD, (OpArgs){0}, OP_IN(dpre, route, w1[0], w1[1]), OP_OUT(dslot), SIZES(REALS(ny)));
  run_same(c, OP_EXPERT_COMBINE, (OpArgs){0}, OP_IN(dslot, route), OP_OUT(dh), SIZES(REALS(nx)));
  real *dw1[2] = {case_poison(c, n1[0]), case_poison(c, n1[1])};
  real *dw2[2] = {case_poison(c, n2[0]), case_poison(c, n2[1])};
  const void *const *in1 = OP_IN(dpre, h, route), *const *in2 = OP_IN(dout, sa, route);
  const size_t *sizes1 = SIZES(REALS(n1[0]), REALS(n1[1])), *sizes2 = SIZES(REALS(n2[0]), REALS(n2[1]));
  run_same(c, OP_EXPERT_UP_WGRAD, (OpArgs){0}, in1, OP_OUT(dw1[0], dw1[1]), sizes1);
  run_same(c, OP_EXPERT_DOWN_WGRAD, (OpArgs){0}, in2, OP_OUT(dw2[0], dw2[1]), sizes2);
  assert_small(gradient_error(c, expert_loss, &f, f.h, dh, nx, checked), CASE_GRAD_TOL);
  assert_small(gradient_error(c, expert_loss, &f, f.weights, dw, nw, checked), CASE_GRAD_TOL);
  OpArgs more = {.span = {.accumulate = 1}};
  real *prior1[2], *prior2[2], *sum1[2], *sum2[2];
  for (int m = 0; m < 2; m++) {
    assert_small(gradient_error(c, expert_loss, &f, f.w1[m], dw1[m], n1[m], checked), CASE_GRAD_TOL);
    assert_small(gradient_error(c, expert_loss, &f, f.w2[m], dw2[m], n2[m], checked), CASE_GRAD_TOL);
    for (int e = 0; e < d->E[m]; e++) { // an expert without rows
      if (bound.count[(m ? d->E[0] : 0) + e]) continue;
      assert_true(all_zero(dw1[m] + e * 2 * d->F[m] * C, 2 * d->F[m] * C));
      assert_true(all_zero(dw2[m] + e * d->F[m] * C, d->F[m] * C));
    }
    prior1[m] = case_random(c, n1[m], 3);
    prior2[m] = case_random(c, n2[m], 3);
    sum1[m] = case_copy(c, prior1[m], n1[m]);
    sum2[m] = case_copy(c, prior2[m], n2[m]);
  }
  run_same(c, OP_EXPERT_UP_WGRAD, more, in1, OP_OUT(sum1[0], sum1[1]), sizes1);
  run_same(c, OP_EXPERT_DOWN_WGRAD, more, in2, OP_OUT(sum2[0], sum2[1]), sizes2);
  for (int m = 0; m < 2; m++) {
    assert_small(accumulate_error(c, sum1[m], prior1[m], dw1[m], n1[m]), CASE_TOL);
    assert_small(accumulate_error(c, sum2[m], prior2[m], dw2[m], n2[m]), CASE_TOL);
  }
}

static void test_experts(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    check_experts(c, 20, seed % 4 == 2);
    op_case_free(c);
  }
}

// More rows and columns than one block of any kind holds.
static void test_experts_large(void **state) {
  (void)state;
  OpCase box, *c = &box;
  op_case_init(c, 50);
  Dims *d = &c->dims;
  d->T = 650;
  d->C = 530;
  d->segments = 100;
  for (int m = 0; m < 2; m++) {
    d->E[m] = 2;
    d->K[m] = 1 + m;
    d->F[m] = 3 + m;
  }
  op_case_pack(c, PACK_EMPTY);
  c->batch.dims->n_text = 620; // experts look at no more of a pack than this
  c->batch.dims->n_image = 20;
  c->batch.dims->seed_lo = 50;
  check_experts(c, 6, true); // 620 rows on one expert: two chunks of a weight gradient
  op_case_free(c);
}

// ---- the shared expert's activation ----

static void test_swiglu(void **state) {
  (void)state;
  for (int seed = 0; seed < SEEDS; seed++) {
    OpCase box, *c = &box;
    make_case(c, seed);
    const Dims *d = &c->dims;
    const int one[2] = {1, 1}, wide[2] = {2 * d->S[0], 2 * d->S[1]};
    int64_t na = two_sided_size(d->T, one, d->S), np = two_sided_size(d->T, one, wide);
    real *pre = case_random(c, np, 2), *da = case_random(c, na, 1);
    real *a = case_poison(c, na), *dpre = case_poison(c, np), *again = case_poison(c, na);
    run_same(c, OP_SWIGLU_FWD, (OpArgs){0}, OP_IN(pre), OP_OUT(a), SIZES(REALS(na)));
    run_same(c, OP_SWIGLU_BWD, (OpArgs){0}, OP_IN(da, pre), OP_OUT(dpre, again), SIZES(REALS(np), REALS(na)));
    double worst = 0;
    for (int r = 0; r < used_rows(c); r++) {
      int m = modality_of(c, r), S = d->S[m];
      int64_t at = two_sided_base(d->T, one, d->S, m) + r * S, pre_at = two_sided_base(d->T, one, wide, m) + r * 2 * S;
      for (int i = 0; i < S; i++) {
        double gate = (double)pre[pre_at + 2 * i], up = (double)pre[pre_at + 2 * i + 1], g = (double)da[at + i];
        double sigmoid = 1 / (1 + exp(-gate)), h = 1e-5;
        double down = (gate - h) / (1 + exp(h - gate)), plus = (gate + h) / (1 + exp(-gate - h));
        worst = fmax(worst, fabs((double)a[at + i] - gate * sigmoid * up));
        worst = fmax(worst, fabs((double)again[at + i] - gate * sigmoid * up));
        worst = fmax(worst, 0.01 * fabs((double)dpre[pre_at + 2 * i] - g * up * (plus - down) / (2 * h)));
        worst = fmax(worst, fabs((double)dpre[pre_at + 2 * i + 1] - g * gate * sigmoid));
      }
    }
    assert_small(worst, CASE_DOUBLE ? 1e-10 : 2e-5);
    int64_t filler = (d->T - used_rows(c)) * d->S[1];
    assert_true(all_zero(a + na - filler, filler) && all_zero(again + na - filler, filler));
    assert_true(all_zero(dpre + np - 2 * filler, 2 * filler));
    op_case_free(c);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_rope),
      cmocka_unit_test(test_attention),
      cmocka_unit_test(test_attention_long),
      cmocka_unit_test(test_attention_many_heads),
      cmocka_unit_test(test_attention_extremes),
      cmocka_unit_test(test_router),
      cmocka_unit_test(test_router_ties),
      cmocka_unit_test(test_experts),
      cmocka_unit_test(test_experts_large),
      cmocka_unit_test(test_swiglu),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
