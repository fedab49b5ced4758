// CPU ops give the same bits for any number of threads. Built in float and in double.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/ops/op_slab.h"

#include <omp.h>

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
  run_digest(&c, &hash, OP_TIME_FEATURES, none, OP_IN(NULL), OP_OUT(o[0]), COUNTS(d->segments * TIME_FEATURES));
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
  double squares[PARAMS * EXACT_WORDS];
  run_digest(&c, &hash, OP_GRAD_SQUARES, s.args, OP_IN(grads), OP_OUT(squares),
             COUNTS((int64_t)sizeof squares / (int64_t)sizeof(real)));
  run_digest(&c, &hash, OP_GRAD_DECIDE, s.args, OP_IN(squares, &metrics, &k), OP_OUT(&status), COUNTS(STATUS));
  uint64_t hashes[PARAMS];
  run_digest(&c, &hash, OP_GRAD_HASH, s.args, OP_IN(grads), OP_OUT(hashes),
             COUNTS(PARAMS * (int64_t)sizeof(uint64_t) / (int64_t)sizeof(real)));
  run_digest(&c, &hash, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(p[0], p[1], p[2], NULL, p[3]),
             COUNTS(s.size, s.size, s.size, 0, s.size));
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
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads)};
  return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
