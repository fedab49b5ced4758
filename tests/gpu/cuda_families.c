#include "tests/gpu/cuda_families.h"

#include "base/philox.h"

static const int one[MODALITIES] = {1, 1};

// ---- whole spans ----

static void run_copies(CudaCase *c, const CudaShape *shape) {
  if (!c->bench && shape != &cuda_shapes[0]) return; // sizes of their own, here and in run_update
  static const int64_t counts[] = {1, 7, 4099, 1 << 20};
  const int64_t large = (int64_t)256 << 20;
  for (size_t i = c->bench ? 3 : 0; i < sizeof counts / sizeof *counts; i++) {
    int64_t n = c->bench ? large : counts[i] + case_int(&c->ops, 0, 1) * 2;
    cuda_case_variant(c, "%lld bytes", (long long)n);
    void *pattern = case_bytes(&c->ops, (size_t)n, 0x5A);
    for (int64_t j = 0; j < n && !c->bench; j++) ((uint8_t *)pattern)[j] = (uint8_t)case_bits(&c->ops);
    Value src = value_bytes(c, pattern, (size_t)n), dst = src;
    dst.fresh = true;
    cuda_case_call(c, OP_COPY, ARGS(.span = {.count = n}), VALUES_IN(src), VALUES_OUT(dst));
    cuda_case_call(c, OP_ZERO, ARGS(.span = {.count = n}), VALUES_IN(none), VALUES_OUT(dst));
    if (c->bench) n /= 8;
    cuda_case_variant(c, "%lld numbers", (long long)n);
    Value x = value_random(c, DT_REAL, 1, n, 1);
    for (int accumulate = 0; accumulate < 2; accumulate++)
      if (cuda_case_wants(c, accumulate))
        cuda_case_call(c, OP_ADD, ARGS(.accumulate = accumulate, .span = {.count = n}), VALUES_IN(x),
                       VALUES_OUT(value_sum(c, 1, n, accumulate)));
    cuda_case_call(c, OP_CAST, ARGS(.span = {.count = n}), VALUES_IN(x), VALUES_OUT(value_out(c, DT_ACT, 1, n)));
  }
}

// ---- linear layers ----

static Value linear_operand(CudaCase *c, Extent extent, const int width[2], double std) {
  const Dims *d = &c->ops.dims;
  if (extent == EXT_SPLIT && width[0] != width[1]) return value_sided(c, DT_ACT, one, width, std, true);
  int rows = extent == EXT_SEGMENTS ? d->segments : d->T;
  Value v = std > 0 ? value_random(c, DT_ACT, rows, width[0], std) : value_out(c, DT_ACT, rows, width[0]);
  int64_t image = c->ops.batch.dims->n_image;
  if (extent == EXT_IMAGE && std > 0) v.used = image * width[0];
  return v;
}

static void run_linear(CudaCase *c, const char *name, Extent extent, const int in[2], const int out[2], bool biased) {
  if (in[0] + in[1] == 0 || out[0] + out[1] == 0) return;
  int64_t count[2];
  Value x = linear_operand(c, extent, in, 1), dy = linear_operand(c, extent, out, 1), w[2] = {none, none};
  for (int m = 0; m < (extent == EXT_SPLIT ? 2 : 1); m++) {
    count[m] = (int64_t)in[m] * out[m];
    if (count[m]) w[m] = value_weight(c, out[m], in[m], in[m]);
  }
  OpArgs a = {.linear = {.extent = extent, .in_dim = {in[0], in[1]}, .out_dim = {out[0], out[1]}}};
  for (int bias = 0; bias <= biased; bias++) {
    if (!cuda_case_wants(c, bias == biased)) continue;
    cuda_case_variant(c, "%s [%d,%d] -> [%d,%d]%s", name, in[0], in[1], out[0], out[1], bias ? " bias" : "");
    cuda_case_call(c, OP_LINEAR_FWD, a, VALUES_IN(x, w[0], w[1], bias ? value_random(c, DT_ACT, 1, out[0], 1) : none),
                   VALUES_OUT(linear_operand(c, extent, out, 0)));
  }
  for (int add = 0; add < (extent == EXT_SEGMENTS ? 1 : 2); add++) {
    if (!cuda_case_wants(c, add == (extent == EXT_IMAGE))) continue;
    cuda_case_variant(c, "%s [%d,%d] -> [%d,%d]%s", name, in[0], in[1], out[0], out[1], add ? " add" : "");
    cuda_case_call(c, OP_LINEAR_DGRAD, a, VALUES_IN(dy, w[0], w[1], add ? linear_operand(c, extent, in, 1) : none),
                   VALUES_OUT(linear_operand(c, extent, in, 0)));
  }
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    if (!cuda_case_wants(c, !accumulate)) continue;
    a.accumulate = accumulate;
    Value dw[2] = {none, none}, dbias = biased ? value_sum(c, 1, out[0], accumulate) : none;
    for (int m = 0; m < 2; m++)
      if (w[m].data) dw[m] = value_sum(c, out[m], in[m], accumulate);
    cuda_case_variant(c, "%s [%d,%d] -> [%d,%d]%s", name, in[0], in[1], out[0], out[1], accumulate ? " add" : "");
    cuda_case_call(c, OP_LINEAR_WGRAD, a, VALUES_IN(dy, x), VALUES_OUT(dw[0], dw[1], dbias));
  }
}

static void run_linears(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  int qkv = (d->H + 2 * d->G) * d->D, HD = d->H * d->D, bottleneck = d->P > 48 ? d->P / 3 : d->P;
#define PAIR(a, b) ((const int[2]){(a), (b)})
  if (!c->bench) run_linear(c, "rows", EXT_ROWS, PAIR(d->C, d->C), PAIR(qkv, qkv), false);
  run_linear(c, "split", EXT_SPLIT, PAIR(d->C, d->C), PAIR(qkv, qkv), false);
  run_linear(c, "split", EXT_SPLIT, PAIR(HD, HD), PAIR(d->C, d->C), false);
  run_linear(c, "split", EXT_SPLIT, PAIR(d->C, d->C), PAIR(2 * d->S[0], 2 * d->S[1]), false);
  run_linear(c, "split", EXT_SPLIT, PAIR(d->S[0], d->S[1]), PAIR(d->C, d->C), false);
  run_linear(c, "image", EXT_IMAGE, PAIR(bottleneck, 0), PAIR(d->C, 0), true);
  run_linear(c, "image", EXT_IMAGE, PAIR(d->C, 0), PAIR(d->P, 0), true);
  run_linear(c, "segments", EXT_SEGMENTS, PAIR(256, 0), PAIR(d->Z, 0), true);
  run_linear(c, "segments", EXT_SEGMENTS, PAIR(d->Z, 0), PAIR(d->M, 0), false);
}

// ---- input and condition ----

// Text rows with a caption that a noised segment pools.
static int64_t caption_rows(const CudaCase *c) {
  int64_t n = 0;
  for (int g = 0; g < c->ops.batch.dims->n_segments; g++) n += c->ops.batch.cap_end[g] - c->ops.batch.cap_start[g];
  return n;
}

static void run_embedding(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  const BatchDims *b = c->ops.batch.dims;
  cuda_case_variant(c, "embedding");
  for (uint32_t stream = STREAM_NOISE; stream <= STREAM_EVAL; stream++)
    if (cuda_case_wants(c, stream == STREAM_NOISE))
      cuda_case_call(c, OP_NOISE, ARGS(.noise = {.stream = stream}), VALUES_IN(none),
                     VALUES_OUT(value_out(c, DT_ACT, d->T, d->P)));
  Value E = value_random(c, DT_ACT, d->V, d->C, 1), dmean = value_random(c, DT_ACT, d->segments, d->C, 1);
  Value image = value_random(c, DT_ACT, d->T, d->C, 1);
  E.used = (int64_t)b->n_ids * d->C;
  image.used = (int64_t)b->n_image * d->C;
  cuda_case_call(c, OP_EMBED_FWD, ARGS(.span = {0}), VALUES_IN(E, image), VALUES_OUT(value_out(c, DT_ACT, d->T, d->C)));
  E.used = caption_rows(c) * d->C;
  cuda_case_call(c, OP_POOL_FWD, ARGS(.span = {0}), VALUES_IN(E), VALUES_OUT(value_out(c, DT_ACT, d->segments, d->C)));
  cuda_case_call(c, OP_POOL_BWD, ARGS(.span = {0}), VALUES_IN(value_random(c, DT_ACT, d->segments, d->C, 1), E),
                 VALUES_OUT(value_out(c, DT_ACT, d->segments, d->C)));
  Value dx = value_random(c, DT_ACT, d->T, d->C, 1);
  dx.used = (int64_t)b->n_text * d->C;
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    if (!cuda_case_wants(c, !accumulate)) continue;
    cuda_case_variant(c, "%s", accumulate ? "add" : "overwrite");
    cuda_case_call(c, OP_EMBED_BWD, ARGS(.accumulate = accumulate), VALUES_IN(dx, dmean),
                   VALUES_OUT(value_sum(c, d->V, d->C, accumulate)));
  }
}

static void run_conditions(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  int SEG = d->segments;
  Value x = value_random(c, DT_ACT, SEG, d->Z, 2), y = value_out(c, DT_ACT, SEG, d->Z);
  OpArgs a = {.span = {0}};
  cuda_case_variant(c, "condition");
  cuda_case_call(c, OP_TIME_FEATURES, a, VALUES_IN(none), VALUES_OUT(value_out(c, DT_ACT, SEG, TIME_FEATURES)));
  cuda_case_call(c, OP_SILU_FWD, a, VALUES_IN(x), VALUES_OUT(y));
  cuda_case_call(c, OP_SILU_BWD, a, VALUES_IN(value_random(c, DT_ACT, SEG, d->Z, 1), x), VALUES_OUT(y));
  cuda_case_call(c, OP_COND_FWD, a,
                 VALUES_IN(x, value_random(c, DT_ACT, SEG, d->Z, 1), value_random(c, DT_ACT, 2, d->Z, 1)),
                 VALUES_OUT(y, y));
  cuda_case_call(c, OP_MOD_FWD, a, VALUES_IN(x, value_weight(c, d->M, d->Z, d->Z), value_random(c, DT_ACT, 2, d->M, 1)),
                 VALUES_OUT(value_out(c, DT_ACT, SEG, d->M)));
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    if (!cuda_case_wants(c, !accumulate)) continue;
    a.accumulate = accumulate;
    cuda_case_variant(c, "%s", accumulate ? "add" : "overwrite");
    cuda_case_call(c, OP_COND_BWD, a, VALUES_IN(value_random(c, DT_ACT, SEG, d->Z, 1), x),
                   VALUES_OUT(y, value_sum(c, 2, d->Z, accumulate)));
    cuda_case_call(c, OP_MOD_BWD, a, VALUES_IN(value_random(c, DT_ACT, SEG, d->M, 1)),
                   VALUES_OUT(value_sum(c, 2, d->M, accumulate)));
  }
}

// ---- AdaLN ----

// One site with and without branch, residual gradient and activation, xnew rebuilt and given.
static void run_adaln_site(CudaCase *c, bool branched, bool silu, bool residual, bool x_is_new) {
  const Dims *d = &c->ops.dims;
  int layer = case_int(&c->ops, 0, d->L - 1);
  OpArgs a = {.adaln = {.gate = (6 * layer + 2) * d->C,
                        .shift = (6 * layer + 3) * d->C,
                        .scale = (6 * layer + 4) * d->C,
                        .silu_image = silu}};
  const Value rows = value_out(c, DT_ACT, d->T, d->C), stat = value_out(c, DT_REAL, d->T, 1);
  const Value maybe_rows = branched ? rows : none;
  Value mod = value_random(c, DT_ACT, d->segments, d->M, 0.5), dmod = value_out(c, DT_ACT, d->segments, d->M);
  Value x = value_random(c, DT_ACT, d->T, d->C, 1), branch = branched ? value_random(c, DT_ACT, d->T, d->C, 1) : none;
  mod.used = dmod.used = (int64_t)c->ops.batch.dims->n_segments * (branched ? 3 : 2) * d->C;
  cuda_case_variant(c, "%s%s%s%s", branched ? "branch" : "no branch", silu ? " silu" : "", residual ? " residual" : "",
                    x_is_new ? " x is new" : "");
  if (!residual && !x_is_new)
    cuda_case_call(c, OP_ADALN_FWD, a, VALUES_IN(x, branch, mod), VALUES_OUT(maybe_rows, rows, stat, stat));
  if (!c->wanted[OP_ADALN_BWD]) return;
  Value made[OP_MAX_OUT] = {maybe_rows, value_copy(c, rows), value_copy(c, stat), value_copy(c, stat)};
  if (branched) made[0] = value_copy(c, rows);
  cuda_case_cpu(c, OP_ADALN_FWD, a, VALUES_IN(x, branch, mod), made);
  a.adaln.x_is_new = x_is_new;
  cuda_case_call(c, OP_ADALN_BWD, a,
                 VALUES_IN(value_random(c, DT_ACT, d->T, d->C, 1),
                           residual ? value_random(c, DT_ACT, d->T, d->C, 1) : none, x_is_new ? made[0] : x, branch,
                           mod, made[2], made[3]),
                 VALUES_OUT(rows, maybe_rows, dmod));
}

static void run_adaln(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  for (int option = 0; option < 16; option++) {
    bool branched = option & 1, silu = option & 2, residual = option & 4, x_is_new = option & 8;
    if (x_is_new && !branched) continue;
    bool typical = branched && !silu && (residual || !x_is_new);
    if (cuda_case_wants(c, typical)) run_adaln_site(c, branched, silu, residual, x_is_new);
  }
}

// ---- queries and keys, before attention ----

static void run_rope(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  int HD = d->H * d->D, GD = d->G * d->D;
  Value qkv = value_random(c, DT_ACT, d->T, HD + 2 * GD, 1);
  Value w[2] = {value_random(c, DT_ACT, 2, d->D, 1), value_random(c, DT_ACT, 2, d->D, 1)};
  cuda_case_variant(c, "%d/%d heads of %d", d->H, d->G, d->D);
  cuda_case_call(
      c, OP_QKNORM_ROPE_FWD, ARGS(.span = {0}), VALUES_IN(qkv, w[0], w[1]),
      VALUES_OUT(value_out(c, DT_ACT, d->T, HD), value_out(c, DT_ACT, d->T, GD), value_out(c, DT_ACT, d->T, GD)));
  Value dq = value_random(c, DT_ACT, d->T, HD, 1), dk = value_random(c, DT_ACT, d->T, GD, 1);
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    if (!cuda_case_wants(c, !accumulate)) continue;
    cuda_case_variant(c, "%d/%d heads of %d%s", d->H, d->G, d->D, accumulate ? " add" : "");
    cuda_case_call(c, OP_QKNORM_ROPE_BWD, ARGS(.accumulate = accumulate),
                   VALUES_IN(dq, dk, value_random(c, DT_ACT, d->T, GD, 1), qkv, w[0], w[1]),
                   VALUES_OUT(value_out(c, DT_ACT, d->T, HD + 2 * GD), value_sum(c, 2, d->D, accumulate),
                              value_sum(c, 2, d->D, accumulate)));
  }
}

// ---- routers and experts ----

typedef struct Routed { // by the CPU
  Value h, wr[MODALITIES], logits, weights, route;
} Routed;

static Routed route_rows(CudaCase *c, const CudaShape *shape) {
  const Dims *d = &c->ops.dims;
  Value out[OP_MAX_OUT] = {value_sided(c, DT_REAL, one, d->E, 0, true), value_out(c, DT_REAL, d->T, dims_kmax(d)),
                           value_out(c, DT_I32, 1, route_bind(&(Route){0}, d, NULL))};
  Routed r = {.h = cuda_shape_router_input(c)};
  for (int m = 0; m < MODALITIES; m++) r.wr[m] = cuda_shape_router(c, shape, m);
  cuda_case_cpu(c, OP_ROUTER_FWD, ARGS(.span = {0}), VALUES_IN(r.h, r.wr[0], r.wr[1]), out);
  r.logits = out[0];
  r.weights = out[1];
  r.route = out[2];
  return r;
}

static Value gradient(CudaCase *c, int64_t rows, int64_t width, int accumulate) {
  Value v = value_sum(c, rows, width, accumulate);
  v.tolerance = ACT_TOLERANCE; // what it is summed from may have been rounded to bf16
  return v;
}

static void run_router(CudaCase *c, const CudaShape *shape) {
  const Dims *d = &c->ops.dims;
  Routed r = route_rows(c, shape);
  int kmax = dims_kmax(d), layer = case_int(&c->ops, 0, d->L - 1);
  cuda_case_variant(c, "%d/%d experts, top %d/%d", d->E[0], d->E[1], d->K[0], d->K[1]);
  cuda_case_call(c, OP_ROUTER_FWD, ARGS(.span = {0}), VALUES_IN(r.h, r.wr[0], r.wr[1]),
                 VALUES_OUT(value_sided(c, DT_REAL, one, d->E, 0, true), value_out(c, DT_REAL, d->T, kmax),
                            value_out(c, DT_I32, 1, r.route.count)));
  if (!c->bench) {
    cuda_case_variant(c, "%d/%d experts in turn, top %d/%d", d->E[0], d->E[1], d->K[0], d->K[1]);
    cuda_case_call(c, OP_ROUTER_FWD, ARGS(.router = {.even = 1}), VALUES_IN(r.h, r.wr[0], r.wr[1]),
                   VALUES_OUT(value_sided(c, DT_REAL, one, d->E, 0, true), value_out(c, DT_REAL, d->T, kmax),
                              value_out(c, DT_I32, 1, r.route.count)));
    cuda_case_variant(c, "%d/%d experts, top %d/%d", d->E[0], d->E[1], d->K[0], d->K[1]);
  }
  OpArgs a = {.router = {.balance = 0.3, .z = 0.2, .layer = layer}};
  cuda_case_call(c, OP_ROUTER_LOSS, a, VALUES_IN(r.logits, r.route), VALUES_OUT(value_metrics(c)));
  Value dweights = value_random(c, DT_REAL, d->T, kmax, 1);
  for (int option = 0; option < 4; option++) {
    bool add = option & 1, accumulate = option & 2;
    if (!cuda_case_wants(c, option == 1)) continue;
    a.accumulate = accumulate;
    cuda_case_variant(c, "%d/%d experts, top %d/%d%s%s", d->E[0], d->E[1], d->K[0], d->K[1], add ? ", add" : "",
                      accumulate ? ", accumulate" : "");
    cuda_case_call(c, OP_ROUTER_BWD, a,
                   VALUES_IN(dweights, r.logits, r.weights, r.route, r.h, r.wr[0], r.wr[1],
                             add ? value_random(c, DT_ACT, d->T, d->C, 1) : none),
                   VALUES_OUT(value_out(c, DT_ACT, d->T, d->C), gradient(c, d->E[0], d->C, accumulate),
                              gradient(c, d->E[1], d->C, accumulate)));
  }
}

// A row whose logits are NaN must still get valid, distinct slots: a broken step is skipped, not a crash.
static void run_router_nan(CudaCase *c, const CudaShape *shape) {
  const Dims *d = &c->ops.dims;
  int used = c->ops.batch.dims->n_text + c->ops.batch.dims->n_image, n_text = c->ops.batch.dims->n_text;
  if (c->bench || !used) return;
  Routed r = route_rows(c, shape);
  for (int row = 0; row < used; row += 3) ((real *)r.h.data)[(int64_t)row * d->C + 5] = (real)NAN;
  cuda_case_variant(c, "logits that are not numbers");
  Value got[OP_MAX_OUT];
  if (!cuda_case_run(c, OP_ROUTER_FWD, ARGS(.span = {0}), VALUES_IN(r.h, r.wr[0], r.wr[1]),
                     VALUES_OUT(value_sided(c, DT_REAL, one, d->E, 0, true), value_out(c, DT_REAL, d->T, dims_kmax(d)),
                                value_out(c, DT_I32, 1, r.route.count)),
                     got))
    return;
  Route route;
  route_bind(&route, d, got[2].data);
  for (int row = 0; row < used; row++) {
    int m = row < n_text ? TEXT : IMAGE, first = m == TEXT ? 0 : n_text * d->K[IMAGE];
    int end = (m == TEXT ? n_text : used) * d->K[m], kmax = dims_kmax(d);
    for (int j = 0; j < d->K[m]; j++) {
      int slot = route.slot[row * kmax + j];
      if (slot >= first && slot < end && route.source[m][slot] == row * kmax + j) continue;
      cuda_case_fail(c, OP_ROUTER_FWD, "row %d, choice %d: slot %d of %d .. %d does not lead back", row, j, slot, first,
                     end);
      return;
    }
  }
}

static void run_routers(CudaCase *c, const CudaShape *shape) {
  run_router(c, shape);
  run_router_nan(c, shape);
}

void compare_bits(CudaCase *c, OpKind kind, const Value *got, const Value *want) {
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (got[i].data && want[i].data && !same_bits(got[i].data, want[i].data, (size_t)got[i].count * sizeof(real)))
      cuda_case_fail(c, kind, "output %d: not the bits that it should have", i);
}

#define SLOTS(w, std) value_sided(c, DT_ACT, d->K, w, std, false)

static void run_experts(CudaCase *c, const CudaShape *shape) {
  const Dims *d = &c->ops.dims;
  const int two_f[2] = {2 * d->F[0], 2 * d->F[1]}, width[2] = {d->C, d->C};
  Routed r = route_rows(c, shape);
  Value w1[2], w2[2];
  for (int m = 0; m < 2; m++) {
    w1[m] = value_weight(c, (int64_t)d->E[m] * 2 * d->F[m], d->C, d->C);
    w2[m] = value_weight(c, (int64_t)d->E[m] * d->C, d->F[m], d->F[m]);
  }
  Value h = value_random(c, DT_ACT, d->T, d->C, 1), dout = value_random(c, DT_ACT, d->T, d->C, 1);
  Value pre = SLOTS(two_f, 1), a = SLOTS(d->F, 1), y = SLOTS(width, 1), empty_rows = value_out(c, DT_ACT, d->T, d->C);
  Value dweights = value_out(c, DT_REAL, d->T, dims_kmax(d));
  // Made of a dA in bf16 where the activation's backward is a kernel of its own.
  if (c->act_tolerance > ACT_TOLERANCE) dweights.tolerance = c->act_tolerance;
  OpArgs plain = {.span = {0}};
  cuda_case_variant(c, "%dx%d top %d, %dx%d top %d", d->E[0], d->F[0], d->K[0], d->E[1], d->F[1], d->K[1]);
  cuda_case_call(c, OP_EXPERT_UP_FWD, plain, VALUES_IN(h, r.route, w1[0], w1[1]),
                 VALUES_OUT(SLOTS(two_f, 0), SLOTS(d->F, 0)));
  cuda_case_call(c, OP_EXPERT_DOWN_FWD, plain, VALUES_IN(a, r.route, w2[0], w2[1]), VALUES_OUT(SLOTS(width, 0)));
  cuda_case_call(c, OP_EXPERT_DOWN_BWD, plain, VALUES_IN(dout, pre, r.weights, r.route, w2[0], w2[1]),
                 VALUES_OUT(SLOTS(two_f, 0), SLOTS(d->F, 0), dweights));
  cuda_case_call(c, OP_EXPERT_UP_DGRAD, plain, VALUES_IN(pre, r.route, w1[0], w1[1]), VALUES_OUT(SLOTS(width, 0)));
  for (int option = 0; option < 4; option++) {
    if (!cuda_case_wants(c, option == 3 || option == 2)) continue;
    cuda_case_variant(c, "%s%s", option & 1 ? "weights" : "no weights", option & 2 ? ", add" : "");
    cuda_case_call(c, OP_EXPERT_COMBINE, plain,
                   VALUES_IN(y, r.route, option & 1 ? r.weights : none,
                             option & 2 ? value_random(c, DT_ACT, d->T, d->C, 1) : none),
                   VALUES_OUT(empty_rows));
  }
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    if (!cuda_case_wants(c, !accumulate)) continue;
    OpArgs s = {.accumulate = accumulate};
    cuda_case_variant(c, "%dx%d, %dx%d%s", d->E[0], d->F[0], d->E[1], d->F[1], accumulate ? ", add" : "");
    cuda_case_call(c, OP_EXPERT_DOWN_WGRAD, s, VALUES_IN(dout, a, r.route),
                   VALUES_OUT(value_sum(c, (int64_t)d->E[0] * d->C, d->F[0], accumulate),
                              value_sum(c, (int64_t)d->E[1] * d->C, d->F[1], accumulate)));
    cuda_case_call(c, OP_EXPERT_UP_WGRAD, s, VALUES_IN(pre, h, r.route),
                   VALUES_OUT(value_sum(c, (int64_t)d->E[0] * 2 * d->F[0], d->C, accumulate),
                              value_sum(c, (int64_t)d->E[1] * 2 * d->F[1], d->C, accumulate)));
  }
}

// Without the branch for the backward pass, a shared expert's output, and the activation, or with them.
static void run_combine_forward(CudaCase *c, const Routed *r, OpArgs a, Value mod, bool add, bool kept) {
  const Dims *d = &c->ops.dims;
  const int width[2] = {d->C, d->C};
  const Value rows = value_out(c, DT_ACT, d->T, d->C), stat = value_out(c, DT_REAL, d->T, 1);
  Value x = value_random(c, DT_ACT, d->T, d->C, 1), y = SLOTS(width, 1);
  Value shared = add ? value_random(c, DT_ACT, d->T, d->C, 1) : none, got[OP_MAX_OUT], parts[OP_MAX_OUT];
  cuda_case_variant(c, "%s%s%s", add ? "add" : "no add", a.adaln.silu_image ? " silu" : "", kept ? "" : " no branch");
  const Value *in = VALUES_IN(y, r->route, r->weights, shared, x, mod);
  const Value *out = VALUES_OUT(kept ? rows : none, rows, rows, stat, stat);
  cuda_case_call(c, OP_COMBINE_ADALN_FWD, a, in, out);
  if (c->bench || !kept || !cuda_case_run(c, OP_EXPERT_COMBINE, a, in, VALUES_OUT(rows), parts)) return;
  if (cuda_case_run(c, OP_ADALN_FWD, a, VALUES_IN(x, parts[0], mod), VALUES_OUT(rows, rows, stat, stat), parts + 1) &&
      cuda_case_run(c, OP_COMBINE_ADALN_FWD, a, in, out, got))
    compare_bits(c, OP_COMBINE_ADALN_FWD, got, parts);
}

static void run_combine_backward(CudaCase *c, const Routed *r, OpArgs a, Value mod) {
  const Dims *d = &c->ops.dims;
  const int width[2] = {d->C, d->C};
  const Value rows = value_out(c, DT_ACT, d->T, d->C), stat = value_out(c, DT_REAL, d->T, 1);
  Value x = value_random(c, DT_ACT, d->T, d->C, 1), branch = value_random(c, DT_ACT, d->T, d->C, 1);
  Value add = value_random(c, DT_ACT, d->T, d->C, 1), dxnew = value_random(c, DT_ACT, d->T, d->C, 1);
  Value dslot = SLOTS(width, 1), dmod = value_out(c, DT_ACT, d->segments, d->M);
  Value made[OP_MAX_OUT] = {value_copy(c, rows), value_copy(c, rows), value_copy(c, stat), value_copy(c, stat)};
  Value got[OP_MAX_OUT], parts[OP_MAX_OUT], dh[OP_MAX_OUT];
  dmod.used = mod.used;
  cuda_case_cpu(c, OP_ADALN_FWD, a, VALUES_IN(x, branch, mod), made);
  cuda_case_variant(c, "top %d/%d", d->K[0], d->K[1]);
  const Value *in = VALUES_IN(dslot, r->route, add, dxnew, x, branch, mod, made[2], made[3]);
  const Value *out = VALUES_OUT(rows, rows, dmod);
  cuda_case_call(c, OP_COMBINE_ADALN_BWD, a, in, out);
  if (c->bench || !cuda_case_run(c, OP_EXPERT_COMBINE, a, VALUES_IN(dslot, r->route, none, add), VALUES_OUT(rows), dh))
    return;
  if (cuda_case_run(c, OP_ADALN_BWD, a, VALUES_IN(dh[0], dxnew, x, branch, mod, made[2], made[3]), out, parts) &&
      cuda_case_run(c, OP_COMBINE_ADALN_BWD, a, in, out, got))
    compare_bits(c, OP_COMBINE_ADALN_BWD, got, parts);
}

static void run_combine_adaln(CudaCase *c, const CudaShape *shape) {
  const Dims *d = &c->ops.dims;
  const Routed r = route_rows(c, shape);
  const int first = 6 * case_int(&c->ops, 0, d->L - 1) * d->C;
  OpArgs a = {.adaln = {.gate = first + 2 * d->C, .shift = first + 3 * d->C, .scale = first + 4 * d->C}};
  Value mod = value_random(c, DT_ACT, d->segments, d->M, 0.5);
  mod.used = (int64_t)c->ops.batch.dims->n_segments * 3 * d->C;
  if (c->wanted[OP_COMBINE_ADALN_BWD]) run_combine_backward(c, &r, a, mod);
  for (int option = 0; option < 8 && c->wanted[OP_COMBINE_ADALN_FWD]; option++) {
    if (!cuda_case_wants(c, option == 1 || option == 0)) continue;
    a.adaln.silu_image = option >> 1 & 1;
    run_combine_forward(c, &r, a, mod, option & 1, !(option & 4));
  }
}

static void run_shared(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  const int two_s[2] = {2 * d->S[0], 2 * d->S[1]};
  if (d->S[0] + d->S[1] == 0) return;
  Value h = value_random(c, DT_ACT, d->T, d->C, 1), a = value_sided(c, DT_ACT, one, d->S, 0, true);
  Value w1[2] = {none, none}, w2[2] = {none, none};
  for (int m = 0; m < 2; m++) {
    if (!d->S[m]) continue;
    w1[m] = value_weight(c, two_s[m], d->C, d->C);
    w2[m] = value_weight(c, d->C, d->S[m], d->C);
  }
  cuda_case_variant(c, "widths %d, %d", d->S[0], d->S[1]);
  cuda_case_call(c, OP_SHARED_UP_FWD, ARGS(.span = {0}), VALUES_IN(h, w1[0], w1[1]),
                 VALUES_OUT(value_sided(c, DT_ACT, one, two_s, 0, true), a));
  cuda_case_call(c, OP_SHARED_DOWN_BWD, ARGS(.span = {0}),
                 VALUES_IN(h, value_sided(c, DT_ACT, one, two_s, 1, true), w2[0], w2[1]),
                 VALUES_OUT(value_sided(c, DT_ACT, one, two_s, 0, true), a));
}

// ---- heads and losses ----

extern void cuda_HEAD_CE_rows(const KernelCall *call); // kernels/cuda/head.cu

// Times the pass over the logits, which a comparison of the whole op covers.
static void bench_head_rows(CudaCase *c, int chunk, Value h, Value wout) {
  const Dims *d = &c->ops.dims;
  const Backend *own = c->backend;
  Backend part = *own;
  part.fn[OP_HEAD_CE] = cuda_HEAD_CE_rows;
  c->backend = &part;
  cuda_case_variant(c, "%d targets, rows of %d logits alone", c->ops.batch.dims->n_target, d->V);
  cuda_case_call(c, OP_HEAD_CE, ARGS(.head = {.chunk = chunk}), VALUES_IN(h, wout),
                 VALUES_OUT(value_out(c, DT_REAL, d->T, 1), none, none, value_metrics(c),
                            value_random(c, DT_REAL, chunk, d->V, 1)));
  c->backend = own;
}

static void run_heads(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  const BatchDims *b = c->ops.batch.dims;
  Value h = value_random(c, DT_ACT, d->T, d->C, 1), wout = value_weight(c, d->V, d->C, d->C);
  h.used = (int64_t)b->n_target * d->C;
  for (int option = 0; option < 3; option++) { // overwrite, accumulate, loss only
    if (!cuda_case_wants(c, option == 0)) continue;
    bool accumulate = option == 1, loss_only = option == 2;
    // One odd length of a chunk and one that takes all rows, beside the backend's own.
    int chunk = option == 1 ? (int)min_i64(d->T, 72 + 8 * case_int(&c->ops, 0, 20)) : d->T;
    if (option == 0 && backend_cuda.head_chunk < d->T) chunk = backend_cuda.head_chunk;
    Value work = value_out(c, DT_REAL, chunk, d->V);
    work.anything = true;
    cuda_case_variant(c, "%d targets, chunk %d%s", b->n_target, chunk,
                      accumulate ? ", add" : (loss_only ? ", loss only" : ""));
    cuda_case_call(c, OP_HEAD_CE, ARGS(.accumulate = accumulate, .head = {.chunk = chunk}), VALUES_IN(h, wout),
                   VALUES_OUT(value_out(c, DT_REAL, d->T, 1), loss_only ? none : value_out(c, DT_ACT, d->T, d->C),
                              loss_only ? none : gradient(c, d->V, d->C, accumulate), value_metrics(c), work));
    if (c->bench && b->n_target <= chunk) bench_head_rows(c, chunk, h, wout);
  }
  cuda_case_variant(c, "%d targets", b->n_target);
  // It has the rows that are needed and no more; one where there are none, so that there is an operand.
  int rows = b->n_target ? b->n_target : 1;
  if (cuda_case_wants(c, false))
    cuda_case_call(c, OP_HEAD_LOGITS, ARGS(.span = {0}), VALUES_IN(h, wout),
                   VALUES_OUT(value_out(c, DT_REAL, rows, d->V)));
}

static void run_flow(CudaCase *c, const CudaShape *shape) {
  (void)shape;
  const Dims *d = &c->ops.dims;
  const Batch *b = &c->ops.batch;
  Value xhat = value_random(c, DT_ACT, d->T, d->P, 1);
  xhat.used = 0;
  for (int g = 1; g < b->dims->n_segments; g++)
    if (b->seg_kind[g] == SEGMENT_NOISED) xhat.used += (int64_t)b->seg_len[g] * d->P;
  for (int loss_only = 0; loss_only < 2; loss_only++) {
    if (!cuda_case_wants(c, !loss_only)) continue;
    cuda_case_variant(c, "%d images%s", b->dims->n_segments - 1, loss_only ? ", loss only" : "");
    cuda_case_call(c, OP_FLOW_LOSS, ARGS(.flow = {.t_floor = 0.05}), VALUES_IN(xhat),
                   VALUES_OUT(loss_only ? none : value_out(c, DT_ACT, d->T, d->P),
                              value_out(c, DT_REAL, d->segments, 1), value_metrics(c)));
  }
}

// ---- the table ----

const Family families[FAMILIES] = {
    {"copies", run_copies, {OP_COPY, OP_ZERO, OP_ADD, OP_CAST}, .n = 4},
    {"update", run_update, {OP_GRAD_SQUARES, OP_GRAD_DECIDE, OP_GRAD_HASH, OP_ADAMW}, .n = 4},
    {"linear", run_linears, {OP_LINEAR_FWD, OP_LINEAR_DGRAD, OP_LINEAR_WGRAD}, .n = 3, .both_timed = true},
    {"embedding", run_embedding, {OP_NOISE, OP_EMBED_FWD, OP_EMBED_BWD, OP_POOL_FWD, OP_POOL_BWD}, .n = 5},
    {"condition",
     run_conditions,
     {OP_TIME_FEATURES, OP_SILU_FWD, OP_SILU_BWD, OP_COND_FWD, OP_COND_BWD, OP_MOD_FWD, OP_MOD_BWD},
     .n = 7},
    {"adaln", run_adaln, {OP_ADALN_FWD, OP_ADALN_BWD}, .n = 2},
    {"adaln_unfused",
     run_adaln,
     {OP_ADALN_FWD, OP_ADALN_BWD},
     .n = 2,
     .way = "unfused",
     .act_tolerance = UNFUSED_TOLERANCE,
     .mark = "unfused"},
    {"adaln_stability", run_adaln_stability, {OP_ADALN_FWD, OP_ADALN_BWD}, .n = 2, .mark = "stability", .apart = true},
    {"rope", run_rope, {OP_QKNORM_ROPE_FWD, OP_QKNORM_ROPE_BWD}, .n = 2},
    {"attention", run_attention, {OP_ATTENTION_FWD, OP_ATTENTION_BWD, OP_ATTENTION_ROPE_BWD}, .n = 3},
    {"router", run_routers, {OP_ROUTER_FWD, OP_ROUTER_LOSS, OP_ROUTER_BWD}, .n = 3},
    {"experts",
     run_experts,
     {OP_EXPERT_UP_FWD, OP_EXPERT_DOWN_FWD, OP_EXPERT_COMBINE, OP_EXPERT_DOWN_BWD, OP_EXPERT_DOWN_WGRAD,
      OP_EXPERT_UP_DGRAD, OP_EXPERT_UP_WGRAD},
     .n = 7,
     .both_timed = true},
    {"experts_grouped",
     run_experts,
     {OP_EXPERT_UP_FWD, OP_EXPERT_DOWN_FWD, OP_EXPERT_DOWN_BWD, OP_EXPERT_DOWN_WGRAD, OP_EXPERT_UP_DGRAD,
      OP_EXPERT_UP_WGRAD},
     .n = 6,
     .way = "grouped",
     .mark = "grouped",
     .apart = true},
    {"experts_loop",
     run_experts,
     {OP_EXPERT_UP_FWD, OP_EXPERT_DOWN_FWD, OP_EXPERT_DOWN_BWD, OP_EXPERT_DOWN_WGRAD, OP_EXPERT_UP_DGRAD,
      OP_EXPERT_UP_WGRAD},
     .n = 6,
     .way = "loop",
     .act_tolerance = LOOP_TOLERANCE,
     .mark = "loop",
     .apart = true},
    {"combine_adaln", run_combine_adaln, {OP_COMBINE_ADALN_FWD, OP_COMBINE_ADALN_BWD}, .n = 2},
    {"shared", run_shared, {OP_SHARED_UP_FWD, OP_SHARED_DOWN_BWD}, .n = 2, .both_timed = true},
    {"head", run_heads, {OP_HEAD_CE, OP_HEAD_LOGITS}, .n = 2},
    {"flow", run_flow, {OP_FLOW_LOSS}, .n = 1},
};
