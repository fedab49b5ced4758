// Attention: both passes against the CPU, and what one document may do to another.
#include "tests/gpu/cuda_families.h"

#include <math.h>

// Sets the rows of positions [begin, end) of x [T, width] to NaN and infinity; in row order, if so.
static void spoil_rows(const CudaCase *c, Value x, int width, int begin, int end, bool row_order) {
  for (int t = begin; t < end; t++) {
    int64_t row = row_order ? c->ops.batch.row[t] : t;
    for (int i = 0; i < width; i++) ((real *)x.data)[row * width + i] = i % 2 ? (real)NAN : (real)INFINITY;
  }
}

// Rows of positions outside [begin, end) must have the same bits in got as in want.
static void judge_spared(CudaCase *c, OpKind kind, const char *name, const Value *got, const Value *want, int width,
                         int begin, int end, bool row_order) {
  for (int t = 0; t < c->ops.dims.T; t++) {
    int64_t row = row_order && t < c->ops.batch.dims->n_text + c->ops.batch.dims->n_image ? c->ops.batch.row[t] : t;
    const real *x = (const real *)got->data + row * width, *y = (const real *)want->data + row * width;
    if ((t >= begin && t < end) || memcmp(x, y, (size_t)width * sizeof *x) == 0) continue;
    cuda_case_fail(c, kind, "%s: what is infinite in positions %d to %d changes position %d", name, begin, end - 1, t);
    return;
  }
}

// Nothing of a document reaches another one, be it NaN or infinite.
static void run_attention_spoilt(CudaCase *c, Value q, Value k, Value v, Value dout, const Value *forward) {
  const Dims *d = &c->ops.dims;
  const Batch *b = &c->ops.batch;
  int HD = d->H * d->D, GD = d->G * d->D, used = b->dims->n_text + b->dims->n_image;
  if (used == 0) return;
  int begin = b->doc_start[used / 2], end = begin;
  while (end < used && b->doc_start[end] == begin) end++;
  Value o = value_out(c, DT_ACT, d->T, HD), lse = value_out(c, DT_REAL, (int64_t)d->H * d->T, 1);
  Value dkv = value_out(c, DT_ACT, d->T, GD), clean[2][OP_MAX_OUT], spoilt[2][OP_MAX_OUT];
  cuda_case_variant(c, "%d/%d heads of %d, one document infinite", d->H, d->G, d->D);
  for (int i = 0; i < 2; i++) {
    Value *got = i ? spoilt[0] : clean[0], *back = i ? spoilt[1] : clean[1];
    if (!cuda_case_run(c, OP_ATTENTION_FWD, ARGS(.span = {0}), VALUES_IN(q, k, v), VALUES_OUT(o, lse), got)) return;
    if (c->wanted[OP_ATTENTION_BWD] &&
        !cuda_case_run(c, OP_ATTENTION_BWD, ARGS(.span = {0}), VALUES_IN(dout, forward[0], q, k, v, forward[1]),
                       VALUES_OUT(o, dkv, dkv), back))
      return;
    if (i) break;
    q = value_copy(c, q), k = value_copy(c, k), v = value_copy(c, v), dout = value_copy(c, dout);
    spoil_rows(c, q, HD, begin, end, false);
    spoil_rows(c, k, GD, begin, end, false);
    spoil_rows(c, v, GD, begin, end, false);
    spoil_rows(c, dout, HD, begin, end, true);
  }
  judge_spared(c, OP_ATTENTION_FWD, "o", &spoilt[0][0], &clean[0][0], HD, begin, end, true);
  if (!c->wanted[OP_ATTENTION_BWD]) return;
  judge_spared(c, OP_ATTENTION_BWD, "dq", &spoilt[1][0], &clean[1][0], HD, begin, end, false);
  judge_spared(c, OP_ATTENTION_BWD, "dk", &spoilt[1][1], &clean[1][1], GD, begin, end, false);
  judge_spared(c, OP_ATTENTION_BWD, "dv", &spoilt[1][2], &clean[1][2], GD, begin, end, false);
}

// QK-norm and rotary positions behind the backward pass. forward: o, lse.
static void run_attention_rope(CudaCase *c, Value q, Value k, Value v, Value dout, const Value *forward) {
  const Dims *d = &c->ops.dims;
  const int HD = d->H * d->D, GD = d->G * d->D;
  const OpArgs a = {.accumulate = case_int(&c->ops, 0, 1)};
  Value qkv = value_random(c, DT_ACT, d->T, HD + 2 * GD, 1), work = value_out(c, DT_ACT, d->T, HD + 2 * GD);
  Value wq = value_random(c, DT_ACT, 2, d->D, 1), wk = value_random(c, DT_ACT, 2, d->D, 1);
  Value dq = value_out(c, DT_ACT, d->T, HD), dkv = value_out(c, DT_ACT, d->T, GD);
  Value dqkv = work, dwq = value_sum(c, 2, d->D, a.accumulate), dwk = value_sum(c, 2, d->D, a.accumulate);
  Value grads[OP_MAX_OUT], parts[OP_MAX_OUT] = {none}, got[OP_MAX_OUT];
  work.anything = true;
  dqkv.tolerance = dwq.tolerance = dwk.tolerance = UNFUSED_TOLERANCE; // dq, dk and dv are rounded on one backend
  cuda_case_variant(c, "%d/%d heads of %d, QK-norm%s", d->H, d->G, d->D, a.accumulate ? " add" : "");
  const Value *in = VALUES_IN(dout, forward[0], q, k, v, forward[1], qkv, wq, wk);
  const Value *out = VALUES_OUT(dqkv, dwq, dwk, work);
  cuda_case_call(c, OP_ATTENTION_ROPE_BWD, a, in, out);
  if (c->bench || !cuda_case_part(c, OP_ATTENTION_BWD, a, in, VALUES_OUT(dq, dkv, dkv), grads)) return;
  if (cuda_case_part(c, OP_QKNORM_ROPE_BWD, a, VALUES_IN(grads[0], grads[1], grads[2], qkv, wq, wk),
                     VALUES_OUT(dqkv, dwq, dwk), parts) &&
      cuda_case_run(c, OP_ATTENTION_ROPE_BWD, a, in, out, got))
    compare_bits(c, OP_ATTENTION_ROPE_BWD, got, parts);
}

void run_attention(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  int HD = d->H * d->D, GD = d->G * d->D;
  Value q = value_random(c, DT_ACT, d->T, HD, 1), k = value_random(c, DT_ACT, d->T, GD, 1);
  Value v = value_random(c, DT_ACT, d->T, GD, 1), o = value_out(c, DT_ACT, d->T, HD);
  Value lse = value_out(c, DT_REAL, (int64_t)d->H * d->T, 1);
  cuda_case_variant(c, "%d/%d heads of %d", d->H, d->G, d->D);
  cuda_case_call(c, OP_ATTENTION_FWD, ARGS(.span = {0}), VALUES_IN(q, k, v), VALUES_OUT(o, lse));
  if (!c->wanted[OP_ATTENTION_BWD] && !c->wanted[OP_ATTENTION_ROPE_BWD]) return;
  Value forward[OP_MAX_OUT] = {value_copy(c, o), value_copy(c, lse)};
  cuda_case_cpu(c, OP_ATTENTION_FWD, ARGS(.span = {0}), VALUES_IN(q, k, v), forward);
  // Where one key is allowed, dq and dk are differences of equal numbers: zero on one backend, rounding on the other.
  Value dq = value_out(c, DT_ACT, d->T, HD), dkv = value_out(c, DT_ACT, d->T, GD);
  dq.zero_from = dkv.zero_from = c->ops.batch.dims->n_text + c->ops.batch.dims->n_image;
  Value dout = value_random(c, DT_ACT, d->T, HD, 1);
  cuda_case_call(c, OP_ATTENTION_BWD, ARGS(.span = {0}), VALUES_IN(dout, forward[0], q, k, v, forward[1]),
                 VALUES_OUT(dq, dkv, dkv));
  if (!c->bench) run_attention_spoilt(c, q, k, v, dout, forward);
  if (c->wanted[OP_ATTENTION_ROPE_BWD]) run_attention_rope(c, q, k, v, dout, forward);
}
