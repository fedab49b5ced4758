// CPU ops on whole slabs (copies, gradient norm, AdamW, EMA) against plain references in double. The same source is
// built for float and for double.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "kernels/bits.h"
#include "kernels/moments.h"
#include "tests/ops/op_slab.h"

#include <omp.h>
#include <stdlib.h>

#define assert_close(got, want, n) assert_true(relative_error(got, want, n) < CASE_TOL)

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
    op_run(&c, OP_ADD, (OpArgs){.accumulate = 1, .span = {.count = n}}, OP_IN(src), OP_OUT(added));
    assert_true(same_bits(src, copied, bytes) && all_zero(zeroed, n) && same_bits(src, set, bytes) &&
                same_bits(src, cast, bytes));
    assert_close(added, sum, n);
    op_case_free(&c);
  }
}

static void test_grad_norm(void **state) {
  (void)state;
  OpCase c;
  Slab s;
  op_case_init(&c, 1);
  slab_make(&c, &s);
  real *grads = slab_random(&c, &s, 0.1);
  double want[PARAMS] = {0}, total = 0, partial[PARAMS * EXACT_WORDS];
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
    slab_norm(&c, s.args, grads, &metrics, &scalars, &status, partial);
    for (int p = 0; p < PARAMS; p++)
      assert_true(fabs(exact_value(partial + p * EXACT_WORDS) - want[p]) <= 1e-12 * want[p]);
    assert_true(fabs(status.norm - sqrt(total)) < 1e-12 * sqrt(total));
    assert_true(fabs(status.scale - scales[k]) < 1e-12);
    assert_true(status.skip == 0 && status.bad == -1);
  }
  // A limit on the norm skips the step, and names no parameter.
  for (int beyond = 0; beyond < 2; beyond++) {
    StepScalars scalars = {.clip = 1, .norm_limit = sqrt(total) * (beyond ? 0.999 : 1.001)};
    slab_norm(&c, s.args, grads, &metrics, &scalars, &status, partial);
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
    slab_norm(&c, s.args, bad, &metrics, &scalars, &status, partial);
    assert_true(status.skip == 1 && status.bad == PARAMS);
    const int params[] = {7, 5, 1};
    for (int j = 0; j < 3; j++) {
      const ParamSpan *span = &s.span[params[j]];
      bad[span->offset + span->count - 1] = (real)bad_values[(j + k) % 3];
      slab_norm(&c, s.args, bad, &metrics, &scalars, &status, partial);
      assert_true(status.skip == 1 && status.bad == PARAMS);
      slab_norm(&c, s.args, bad, &fine, &scalars, &status, partial);
      assert_true(status.skip == 1 && status.bad == params[j]);
    }
    metrics = (Metrics){0};
  }
  // A huge but finite gradient is no reason to skip.
  real *huge = case_copy(&c, grads, s.size);
  huge[s.span[3].offset] = (real)1e30;
  slab_norm(&c, s.args, huge, &metrics, &(StepScalars){.clip = 1}, &status, partial);
  assert_true(status.skip == 0 && fabs(status.norm / 1e30 - 1) < 1e-6);
  op_case_free(&c);
}

// Many parameters, and one of many blocks.
static void test_grad_norm_blocks(void **state) {
  (void)state;
  enum { MANY = 1300, LONG = 700, LONG_COUNT = 40 * 16384 + 5 };
  static ParamSpan span[MANY];
  static double partial[MANY * EXACT_WORDS];
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
  OpArgs args = {.params = {.spans = span, .n = MANY, .end = size}};
  slab_norm(&c, args, grads, &metrics, &scalars, &status, partial);
  double total = 0;
  for (int p = 0; p < MANY; p++) {
    double want = 0;
    for (int64_t i = 0; i < span[p].count; i++) {
      double g = (double)grads[span[p].offset + i];
      want += g * g;
    }
    assert_true(fabs(exact_value(partial + p * EXACT_WORDS) - want) <= 1e-12 * want);
    total += want;
  }
  assert_true(fabs(status.norm - sqrt(total)) <= 1e-12 * status.norm);
  op_case_free(&c);
}

// Who adds up which part of a parameter is not seen in the sum, where parts begin at multiples of a leaf.
static void test_grad_norm_shares(void **state) {
  (void)state;
  enum { COUNT = 3 * 16384 + 77, PARTS = 7 };
  OpCase c;
  op_case_init(&c, 4);
  real *grads = case_random(&c, COUNT, 1);
  for (int i = 0; i < COUNT; i++) grads[i] *= (real)pow(10, i % 23 - 11);
  ParamSpan span = {.offset = 0, .count = COUNT};
  double want[EXACT_WORDS], part[EXACT_WORDS];
  op_run(&c, OP_GRAD_SQUARES, (OpArgs){.params = {.spans = &span, .n = 1, .end = COUNT}}, OP_IN(grads), OP_OUT(want));
  for (int round = 0; round < 20; round++) {
    double sum[EXACT_WORDS] = {0};
    for (int64_t begin = 0, k = 0; k < PARTS; k++) {
      int64_t end = k == PARTS - 1 ? COUNT : begin + case_int(&c, 0, COUNT / PARTS / EXACT_LEAF) * EXACT_LEAF;
      OpArgs a = {.params = {.spans = &span, .n = 1, .begin = begin, .end = end}};
      op_run(&c, OP_GRAD_SQUARES, a, OP_IN(grads + begin), OP_OUT(part));
      for (int w = 0; w < EXACT_WORDS; w++) sum[w] += part[w];
      begin = end;
    }
    assert_memory_equal(sum, want, sizeof want);
  }
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
    int averages = step != 3; // with and without
    op_run(&c, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(w, m, v, NULL, averages ? ema : NULL));
    for (int64_t i = 0; i < s.size; i++) {
      int p = slab_param(&s, i);
      if (p < 0) continue;
      double g = 0.5 * (double)grads[i];
      m2[i] = k.beta1 * m2[i] + (1 - k.beta1) * g;
      v2[i] = k.beta2 * v2[i] + (1 - k.beta2) * g * g;
      double decay = s.span[p].decay ? k.weight_decay * w2[i] : 0;
      w2[i] -= k.lr * (m2[i] / k.bias1 / (sqrt(v2[i] / k.bias2) + k.eps) + decay);
      if (averages) ema2[i] += (1 - k.ema_decay) * (w2[i] - ema2[i]);
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
  op_run(&c, OP_ADAMW, s.args, OP_IN(case_poison(&c, s.size), &skip, &k), OP_OUT(w, m, v, NULL, ema));
  assert_true(same_bits(w, before[0], bytes) && same_bits(m, before[1], bytes) && same_bits(v, before[2], bytes) &&
              same_bits(ema, before[3], bytes));
  op_case_free(&c);
}

// In the mean what is rounded stays what it was, whatever lies below the last place; what bf16 has stays as it is.
static void test_moments_round(void **state) {
  (void)state;
  enum { DRAWS = 40000 };
  const float values[] = {1.001f, -3.1416f, 1.2345e-9f, 255.99f, -1e-41f, 0.5f, 0};
  for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
    double mean = 0, step = fmax(ldexp(fabs((double)values[k]), -7), ldexp(1, -133)); // at least the last place's worth
    for (int i = 0; i < DRAWS; i++) {
      Philox4 r = moment_chances(i / 7, i % 7);
      float rounded = moment_float(moment_round(values[k], r.v[i % 4] >> 16 * (i % 2)));
      assert_true(fabs((double)rounded - (double)values[k]) <= step);
      mean += (double)rounded / DRAWS;
    }
    assert_true(fabs(mean - (double)values[k]) <= 2.5 * step / sqrt(DRAWS));
  }
  assert_true(moment_round(1, 0xffff) == 0x3f80 && moment_round(-2, 0xffff) == 0xc000 && moment_round(0, 0xffff) == 0);
  assert_true(moment_round(INFINITY, 0xffff) == 0x7f80 && moment_round(-INFINITY, 0xffff) == 0xff80);
  assert_true(isnan(moment_float(moment_round(NAN, 0xffff))));
}

// Moments in bf16 are those in fp32, rounded by chances that depend on step and element alone: whatever parts the slabs
// are updated in, the bits are the same.
static void test_adamw_bf16(void **state) {
  (void)state;
  OpCase c;
  Slab s;
  op_case_init(&c, 8);
  slab_make(&c, &s);
  real *w = slab_random(&c, &s, 1), *grads = slab_random(&c, &s, 0.3);
  real *w32 = case_copy(&c, w, s.size), *m32 = case_random(&c, s.size, 0), *v32 = case_random(&c, s.size, 0);
  uint16_t *m = xcalloc((size_t)s.size, sizeof *m), *v = xcalloc((size_t)s.size, sizeof *v);
  for (int64_t i = 0; i < s.size; i++) {
    m[i] = bf16_from_float((float)(grads[i] * (real)-0.1));
    v[i] = bf16_from_float((float)(grads[i] * grads[i]));
    if (slab_param(&s, i) < 0) m[i] = v[i] = 0;
    m32[i] = (real)moment_float(m[i]);
    v32[i] = (real)moment_float(v[i]);
  }
  real *w_parts = case_copy(&c, w, s.size);
  uint16_t *m_parts = xmalloc((size_t)s.size * sizeof *m), *v_parts = xmalloc((size_t)s.size * sizeof *v);
  memcpy(m_parts, m, (size_t)s.size * sizeof *m);
  memcpy(v_parts, v, (size_t)s.size * sizeof *v);
  StepScalars k = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .bias1 = 0.2, .bias2 = 0.1, .step = 41};
  UpdateStatus status = {.scale = 0.5};
  op_run(&c, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(w32, m32, v32));
  s.args.params.bf16_moments = 1;
  op_run(&c, OP_ADAMW, s.args, OP_IN(grads, &status, &k), OP_OUT(w, m, v));
  int64_t up = 0, inexact = 0;
  for (int64_t i = 0; i < s.size; i++) {
    if (slab_param(&s, i) < 0) continue;
    Philox4 r = moment_chances(41, i / 4);
    assert_int_equal(m[i], moment_round((float)m32[i], r.v[i % 4]));
    assert_int_equal(v[i], moment_round((float)v32[i], r.v[i % 4] >> 16));
    assert_true(w[i] == w32[i]);
    up += moment_float(v[i]) > (float)v32[i];
    inexact += moment_float(v[i]) != (float)v32[i];
  }
  assert_true(up > inexact / 3 && up < inexact * 2 / 3);
  OpArgs part = s.args;
  for (int64_t end = 0; end < s.size;) {
    part.params.begin = end;
    part.params.end = end = min_i64(end + 8 * 1000, s.size);
    int64_t at = part.params.begin;
    op_run(&c, OP_ADAMW, part, OP_IN(grads + at, &status, &k), OP_OUT(w_parts + at, m_parts + at, v_parts + at));
  }
  for (int64_t i = 0; i < s.size; i++)
    if (slab_param(&s, i) >= 0) assert_true(w_parts[i] == w[i] && m_parts[i] == m[i] && v_parts[i] == v[i]);
  free(m);
  free(v);
  free(m_parts);
  free(v_parts);
  op_case_free(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_spans),
                                     cmocka_unit_test(test_grad_norm),
                                     cmocka_unit_test(test_grad_norm_blocks),
                                     cmocka_unit_test(test_grad_norm_shares),
                                     cmocka_unit_test(test_grad_hash),
                                     cmocka_unit_test(test_adamw_ema),
                                     cmocka_unit_test(test_moments_round),
                                     cmocka_unit_test(test_adamw_bf16)};
  return cmocka_run_group_tests_name("update", tests, NULL, NULL);
}
