// The update family: gradient norm, AdamW with its masters in two parts or in one, with the EMA and without; spoiled
// steps among them.
#include "tests/gpu/cuda_families.h"

#include "kernels/exact.h"
#include "kernels/master.h"
#include "kernels/moments.h"

#include <stdlib.h>

enum { PARAMS = 300, PARAM_ALIGN = 64 };
static const StepScalars step = {.lr = 0.01,
                                 .beta1 = 0.9,
                                 .beta2 = 0.95,
                                 .eps = 1e-8,
                                 .weight_decay = 0.1,
                                 .clip = 1,
                                 .bias1 = 1 - 0.9 * 0.9,
                                 .bias2 = 1 - 0.95 * 0.95,
                                 .ema_decay = 0.97,
                                 .step = 12345};

// Parameters of 1 to 5000 elements, and a few large ones; returns the elements of a slab.
static int64_t make_spans(CudaCase *c, ParamSpan spans[PARAMS]) {
  int64_t n = 0;
  for (int i = 0; i < PARAMS; i++) {
    int64_t count = i % 97 == 3 ? case_int(&c->ops, 200000, 700000) : case_int(&c->ops, 1, 5000);
    if (c->bench) count = i % 3 ? 2048 * 300 : 1000;
    spans[i] = (ParamSpan){.offset = n, .count = count, .decay = case_int(&c->ops, 0, 1)};
    n += (count + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
  }
  return n;
}

// A random slab; what lies between the spans is 0.
static Value make_slab(CudaCase *c, Dtype type, const ParamSpan *spans, int64_t n) {
  Value v = value_random(c, type, 1, n, 1);
  for (int i = 0; i < PARAMS; i++) {
    int64_t end = i + 1 < PARAMS ? spans[i + 1].offset : n;
    for (int64_t j = spans[i].offset + spans[i].count; j < end; j++) ((real *)v.data)[j] = 0;
  }
  return v;
}

// fp32 masters as the backend holds them: weights [n] DT_ACT and remainders [n] U16.
static void split_masters(CudaCase *c, Value master, Value *weights, Value *remainder) {
  uint16_t *low = case_bytes(&c->ops, (size_t)master.count * 2, 0);
  *weights = value_copy(c, master);
  weights->dtype = DT_ACT;
  for (int64_t i = 0; i < master.count; i++) {
    uint16_t high;
    master_split(((float *)master.data)[i], &high, &low[i]);
    uint32_t bits = (uint32_t)high << 16;
    memcpy((float *)weights->data + i, &bits, sizeof bits);
  }
  *remainder = value_bytes(c, low, (size_t)master.count * 2);
}

static Value join_masters(CudaCase *c, Value like, Value weights, Value remainder) {
  Value master = value_copy(c, like);
  for (int64_t i = 0; i < master.count; i++) {
    uint32_t bits;
    memcpy(&bits, (float *)weights.data + i, sizeof bits);
    ((float *)master.data)[i] = master_join((uint16_t)(bits >> 16), ((const uint16_t *)remainder.data)[i]);
  }
  return master;
}

static void judge_status(CudaCase *c, const Value *got, const UpdateStatus *want) {
  UpdateStatus s;
  memcpy(&s, got->data, sizeof s);
  bool norm = isfinite(want->norm) ? fabs(s.norm - want->norm) <= 1e-6 * want->norm : !isfinite(s.norm);
  bool scale = isfinite(want->norm) ? fabs(s.scale - want->scale) <= 1e-6 * want->scale : true;
  if (norm && scale && s.skip == want->skip && s.bad == want->bad) return;
  cuda_case_fail(c, OP_GRAD_DECIDE, "status: expected norm %.9g scale %.9g skip %d bad %d, got %.9g %.9g %d %d",
                 want->norm, want->scale, want->skip, want->bad, s.norm, s.scale, s.skip, s.bad);
}

// Numbers [n] as bf16 has them, in two bytes each; and back.
static Value to_halves(CudaCase *c, Value x) {
  uint16_t *half = xmalloc((size_t)x.count * sizeof *half);
  for (int64_t i = 0; i < x.count; i++) half[i] = bf16_from_float(((real *)x.data)[i]);
  Value v = value_bytes(c, half, (size_t)x.count * sizeof *half);
  free(half);
  return v;
}
static Value from_halves(CudaCase *c, Value like, const Value *halves) {
  Value v = value_copy(c, like);
  for (int64_t i = 0; i < v.count; i++) ((real *)v.data)[i] = moment_float(((const uint16_t *)halves->data)[i]);
  return v;
}

// AdamW with moments in bf16: those of the CPU, but where fp32 differs in the last place, which seldom rounds
// otherwise.
static void run_bf16_moments(CudaCase *c, OpArgs a, const Value *in, Value master, Value m, Value v, Value ema) {
  Value weights = value_copy(c, master), remainder, got[OP_MAX_OUT];
  a.params.bf16_moments = 1;
  weights.dtype = DT_ACT;
  value_round(weights);
  split_masters(c, master, &weights, &remainder);
  Value half_m = to_halves(c, m), half_v = to_halves(c, v);
  Value after[OP_MAX_OUT] = {value_copy(c, master), value_copy(c, half_m), value_copy(c, half_v), none,
                             value_copy(c, ema)};
  after[0].tolerance = 1e-6;
  cuda_case_cpu(c, OP_ADAMW, a, in, after);
  cuda_case_variant(c, "%lld numbers, moments in bf16", (long long)a.params.end);
  Value *out = VALUES_OUT(weights, half_m, half_v, remainder, ema);
  if (c->bench) {
    cuda_case_call(c, OP_ADAMW, a, in, out);
  } else if (cuda_case_run(c, OP_ADAMW, a, in, out, got)) {
    static const char *const names[] = {"weights", "m in bf16", "v in bf16", "remainder", "ema"};
    got[0] = join_masters(c, master, got[0], got[3]);
    for (int i = 1; i < 3; i++) {
      got[i] = from_halves(c, m, &got[i]);
      after[i] = from_halves(c, m, &after[i]);
    }
    for (int i = 0; i < OP_MAX_OUT; i++)
      if (after[i].data) cuda_case_judge(c, OP_ADAMW, i, names[i], &got[i], &after[i]);
  }
}

// The spoiled step: nothing is wrong, a gradient is infinite, the loss is NaN, the norm is beyond its limit.
static void run_update_step(CudaCase *c, int spoil, double clip) {
  ParamSpan spans[PARAMS];
  int64_t n = make_spans(c, spans);
  OpArgs a = {.params = {.spans = spans, .n = PARAMS, .end = n}};
  Value grads = make_slab(c, DT_REAL, spans, n), metrics = value_metrics(c), master = make_slab(c, DT_REAL, spans, n);
  Value m = make_slab(c, DT_REAL, spans, n), v = make_slab(c, DT_REAL, spans, n), ema = make_slab(c, DT_REAL, spans, n);
  for (int64_t i = 0; i < n; i++) ((real *)v.data)[i] *= ((real *)v.data)[i];
  if (spoil == 1) ((real *)grads.data)[spans[200].offset + spans[200].count / 2] = (real)INFINITY;
  if (spoil == 2) ((Metrics *)metrics.data)->flow = NAN;
  StepScalars scalars_now = step;
  scalars_now.clip = clip;
  if (spoil == 3) scalars_now.norm_limit = 1e-3;
  Value scalars = value_bytes(c, &scalars_now, sizeof scalars_now), squares = value_out(c, DT_F64, PARAMS, EXACT_WORDS);
  UpdateStatus unset = {0};
  Value status = value_bytes(c, &unset, sizeof unset), got[OP_MAX_OUT], empty_status = status;
  Value want_squares[OP_MAX_OUT] = {value_copy(c, squares)}, want_status[OP_MAX_OUT] = {status};
  static const char *const spoils[] = {"", ", a gradient is infinite", ", the loss is not a number",
                                       ", the norm is beyond its limit"};
  empty_status.fresh = true;
  want_squares[0].tolerance = 0; // of floats, added as the CPU does: the same bits
  cuda_case_variant(c, "%lld numbers, clip %g%s", (long long)n, clip, spoils[spoil]);
  cuda_case_cpu(c, OP_GRAD_SQUARES, a, VALUES_IN(grads), want_squares);
  cuda_case_expect(c, OP_GRAD_SQUARES, a, VALUES_IN(grads), VALUES_OUT(squares), want_squares);
  cuda_case_cpu(c, OP_GRAD_DECIDE, a, VALUES_IN(want_squares[0], metrics, scalars), want_status);
  if (c->bench)
    cuda_case_call(c, OP_GRAD_DECIDE, a, VALUES_IN(want_squares[0], metrics, scalars), VALUES_OUT(empty_status));
  else if (cuda_case_run(c, OP_GRAD_DECIDE, a, VALUES_IN(want_squares[0], metrics, scalars), VALUES_OUT(empty_status),
                         got))
    judge_status(c, &got[0], status.data);
  Value hash = value_out(c, DT_U8, 1, 8 * PARAMS), want_hash[OP_MAX_OUT] = {value_copy(c, hash)};
  cuda_case_cpu(c, OP_GRAD_HASH, a, VALUES_IN(grads), want_hash);
  if (c->bench)
    cuda_case_call(c, OP_GRAD_HASH, a, VALUES_IN(grads), VALUES_OUT(hash));
  else if (cuda_case_run(c, OP_GRAD_HASH, a, VALUES_IN(grads), VALUES_OUT(hash), got) &&
           memcmp(got[0].data, want_hash[0].data, 8 * PARAMS) != 0)
    cuda_case_fail(c, OP_GRAD_HASH, "the hashes differ from the CPU's");
  for (int way = 0; way < 4; way++) { // the master is weight and remainder, or the weight alone; with the average
    const bool split = way & 1, averages = way & 2;
    if (!cuda_case_wants(c, split)) continue;
    Value weights = value_copy(c, master), remainder = none, reference = master, average = averages ? ema : none;
    weights.dtype = DT_ACT;
    value_round(weights);
    if (split) split_masters(c, master, &weights, &remainder);
    if (!split) reference = weights;
    Value after[OP_MAX_OUT] = {value_copy(c, reference), value_copy(c, m), value_copy(c, v), none,
                               averages ? value_copy(c, ema) : none};
    after[0].tolerance = split ? 1e-6 : ACT_TOLERANCE;
    if (!split) after[4].tolerance = ACT_TOLERANCE; // it is of weights in bf16
    cuda_case_cpu(c, OP_ADAMW, a, VALUES_IN(grads, status, scalars), after);
    cuda_case_variant(c, "%lld numbers, clip %g%s%s%s", (long long)n, clip, spoils[spoil], split ? ", remainder" : "",
                      averages ? ", average" : "");
    Value *out = VALUES_OUT(weights, m, v, remainder, average);
    if (c->bench) {
      cuda_case_call(c, OP_ADAMW, a, VALUES_IN(grads, status, scalars), out);
    } else if (cuda_case_run(c, OP_ADAMW, a, VALUES_IN(grads, status, scalars), out, got)) {
      if (split) got[0] = join_masters(c, master, got[0], got[3]);
      static const char *const names[] = {"weights", "m", "v", "remainder", "ema"};
      for (int i = 0; i < OP_MAX_OUT; i++)
        if (after[i].data) cuda_case_judge(c, OP_ADAMW, i, names[i], &got[i], &after[i]);
    }
  }
  if (cuda_case_wants(c, true)) run_bf16_moments(c, a, VALUES_IN(grads, status, scalars), master, m, v, ema);
}

void run_update(CudaCase *c, const CudaShape *shape) {
  if (!c->bench && shape != &cuda_shapes[0]) return;
  if (!c->bench)
    for (int spoil = 0; spoil < 4; spoil++) run_update_step(c, spoil, 1);
  run_update_step(c, 0, c->bench ? 1 : 0);
}
