#include "tests/ops/op_calls.h"

#include "base/base.h"
#include "base/philox.h"
#include "kernels/exact.h"

const char *const real_type = sizeof(real) == sizeof(double) ? "F64" : "F32";

size_t value_bytes(const Value *v) {
  size_t element = !strcmp(v->type, "U8") ? 1 : strchr(v->type, '6') ? 8 : 4;
  return (size_t)v->count * element;
}

static const Value none = {0};

static Value random_value(OpCalls *w, int64_t n) {
  return (Value){case_random(&w->c, n, 1.0), n, real_type};
}
// A weight with `fan_in` inputs: scaled so that products stay of order one.
static Value weight_value(OpCalls *w, int64_t n, int fan_in) {
  return (Value){case_random(&w->c, n, 1 / sqrt(fan_in ? fan_in : 1)), n, real_type};
}
static Value poison_value(OpCalls *w, int64_t n) {
  return (Value){case_poison(&w->c, n), n, real_type};
}
// An accumulating output: something to add to, or poison to overwrite.
static Value sum_value(OpCalls *w, int64_t n, int accumulate) {
  return accumulate ? random_value(w, n) : poison_value(w, n);
}
static Value int_value(OpCalls *w, int64_t n) {
  return (Value){case_bytes(&w->c, (size_t)n * 4, 0x80), n, "I32"};
}
static Value double_value(OpCalls *w, int64_t n) {
  return (Value){case_zeros(&w->c, n), n, "F64"};
}
static Value metrics_value(OpCalls *w) {
  Value v = double_value(w, metrics_size(&w->c.dims));
  for (int64_t i = 0; i < v.count; i++) ((double *)v.data)[i] = case_uniform(&w->c);
  return v;
}
static Value optional(OpCalls *w, Value v) {
  return case_int(&w->c, 0, 1) ? v : none;
}
static int coin(OpCalls *w) {
  return case_int(&w->c, 0, 1);
}

static void call(OpCalls *w, OpKind kind, OpArgs args, const Value *in, Value *out) {
  w->call(w, kind, args, in, out);
}
#define IN(...) ((const Value[OP_MAX_IN]){__VA_ARGS__})
#define OUT(...) ((Value[OP_MAX_OUT]){__VA_ARGS__})
#define ARGS(...) ((OpArgs){__VA_ARGS__})

// The ops, family by family.

static void call_copies(OpCalls *w) {
  int n = case_int(&w->c, 1, 300);
  Value src = random_value(w, n);
  call(w, OP_COPY, ARGS(.span = {.count = n * (int)sizeof(real)}), IN(src), OUT(poison_value(w, n)));
  call(w, OP_CAST, ARGS(.span = {.count = n}), IN(src), OUT(poison_value(w, n)));
  call(w, OP_ZERO, ARGS(.span = {.count = n * (int)sizeof(real)}), IN(none), OUT(poison_value(w, n)));
  for (int accumulate = 0; accumulate < 2; accumulate++)
    call(w, OP_ADD, ARGS(.accumulate = accumulate, .span = {.count = n}), IN(src), OUT(sum_value(w, n, accumulate)));
}

static void call_linear(OpCalls *w, Extent extent, const int in[2], const int out[2]) {
  const Dims *d = &w->c.dims;
  const int one[2] = {1, 1};
  int rows = extent == EXT_SEGMENTS ? d->segments : d->T, split = extent == EXT_SPLIT;
  int64_t nx = split ? two_sided_size(d->T, one, in) : (int64_t)rows * in[0];
  int64_t ny = split ? two_sided_size(d->T, one, out) : (int64_t)rows * out[0];
  int64_t nw[2] = {(int64_t)in[0] * out[0], (int64_t)in[1] * out[1]};
  Value x = random_value(w, nx), dy = random_value(w, ny), weight[2];
  for (int m = 0; m < 2; m++) weight[m] = nw[m] && m <= split ? weight_value(w, nw[m], in[m]) : none;
  Value bias = split ? none : optional(w, random_value(w, out[0]));
  OpArgs a = {.linear = {.extent = extent, .in_dim = {in[0], in[1]}, .out_dim = {out[0], out[1]}}};
  call(w, OP_LINEAR_FWD, a, IN(x, weight[0], weight[1], bias), OUT(poison_value(w, ny)));
  Value add = extent == EXT_SEGMENTS ? none : optional(w, random_value(w, nx));
  call(w, OP_LINEAR_DGRAD, a, IN(dy, weight[0], weight[1], add), OUT(poison_value(w, nx)));
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    a.accumulate = accumulate;
    Value dw[2], dbias = bias.data ? sum_value(w, out[0], accumulate) : none;
    for (int m = 0; m < 2; m++) dw[m] = weight[m].data ? sum_value(w, nw[m], accumulate) : none;
    call(w, OP_LINEAR_WGRAD, a, IN(dy, x), OUT(dw[0], dw[1], dbias));
  }
}

static void call_linears(OpCalls *w) {
  const Dims *d = &w->c.dims;
  call_linear(w, EXT_ROWS, (int[2]){d->C, 0}, (int[2]){(d->H + 2 * d->G) * d->D, 0});
  call_linear(w, EXT_SPLIT, (int[2]){d->C, d->C}, (int[2]){d->H * d->D, d->H * d->D});
  call_linear(w, EXT_SPLIT, (int[2]){d->C, d->C}, (int[2]){2 * d->S[0], 2 * d->S[1]});
  call_linear(w, EXT_SPLIT, (int[2]){d->S[0], d->S[1]}, (int[2]){d->C, d->C});
  call_linear(w, EXT_IMAGE, (int[2]){d->P, 0}, (int[2]){d->C, 0});
  call_linear(w, EXT_SEGMENTS, (int[2]){d->Z, 0}, (int[2]){d->M, 0});
}

static void call_embedding(OpCalls *w) {
  const Dims *d = &w->c.dims;
  int64_t TC = (int64_t)d->T * d->C, SC = (int64_t)d->segments * d->C, VC = (int64_t)d->V * d->C;
  Value E = random_value(w, VC), dmean = random_value(w, SC);
  for (uint32_t stream = STREAM_NOISE; stream <= STREAM_EVAL; stream++)
    call(w, OP_NOISE, ARGS(.noise = {.stream = stream}), IN(none), OUT(poison_value(w, (int64_t)d->T * d->P)));
  call(w, OP_EMBED_FWD, ARGS(.span = {0}), IN(E, random_value(w, TC)), OUT(poison_value(w, TC)));
  call(w, OP_POOL_FWD, ARGS(.span = {0}), IN(E), OUT(poison_value(w, SC)));
  call(w, OP_POOL_BWD, ARGS(.span = {0}), IN(random_value(w, SC), E), OUT(poison_value(w, SC)));
  for (int accumulate = 0; accumulate < 2; accumulate++)
    call(w, OP_EMBED_BWD, ARGS(.accumulate = accumulate), IN(random_value(w, TC), dmean),
         OUT(sum_value(w, VC, accumulate)));
}

static void call_conditions(OpCalls *w) {
  const Dims *d = &w->c.dims;
  int64_t SZ = (int64_t)d->segments * d->Z, SM = (int64_t)d->segments * d->M;
  Value c = random_value(w, SZ);
  OpArgs a = {.span = {0}};
  call(w, OP_TIME_FEATURES, a, IN(none), OUT(poison_value(w, (int64_t)d->segments * TIME_FEATURES)));
  call(w, OP_SILU_FWD, a, IN(c), OUT(poison_value(w, SZ)));
  call(w, OP_SILU_BWD, a, IN(random_value(w, SZ), c), OUT(poison_value(w, SZ)));
  call(w, OP_COND_FWD, a, IN(c, random_value(w, SZ), random_value(w, 2 * d->Z)),
       OUT(poison_value(w, SZ), poison_value(w, SZ)));
  call(w, OP_MOD_FWD, a, IN(c, weight_value(w, (int64_t)d->M * d->Z, d->Z), random_value(w, 2 * d->M)),
       OUT(poison_value(w, SM)));
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    a.accumulate = accumulate;
    call(w, OP_COND_BWD, a, IN(random_value(w, SZ), c), OUT(poison_value(w, SZ), sum_value(w, 2 * d->Z, accumulate)));
    call(w, OP_MOD_BWD, a, IN(random_value(w, SM)), OUT(sum_value(w, 2 * d->M, accumulate)));
  }
}

// Every combination of branch, residual gradient, activation and a rebuilt or given xnew.
static void call_adaln(OpCalls *w) {
  const Dims *d = &w->c.dims;
  int64_t TC = (int64_t)d->T * d->C, SM = (int64_t)d->segments * d->M;
  for (int option = 0; option < 16; option++) {
    int layer = case_int(&w->c, 0, d->L - 1), with_branch = option & 1, x_is_new = with_branch && option & 8;
    OpArgs a = {.adaln = {.gate = (6 * layer + 2) * d->C,
                          .shift = (6 * layer + 3) * d->C,
                          .scale = (6 * layer + 4) * d->C,
                          .silu_image = option >> 1 & 1}};
    Value x = random_value(w, TC), branch = with_branch ? random_value(w, TC) : none, mod = random_value(w, SM);
    Value xnew = with_branch ? poison_value(w, TC) : none, h = poison_value(w, TC);
    Value mean = poison_value(w, d->T), rstd = poison_value(w, d->T);
    call(w, OP_ADALN_FWD, a, IN(x, branch, mod), OUT(xnew, h, mean, rstd));
    a.adaln.x_is_new = x_is_new;
    call(w, OP_ADALN_BWD, a,
         IN(random_value(w, TC), option & 4 ? random_value(w, TC) : none, x_is_new ? xnew : x, branch, mod, mean, rstd),
         OUT(poison_value(w, TC), with_branch ? poison_value(w, TC) : none, poison_value(w, SM)));
  }
}

static void call_attention(OpCalls *w) {
  const Dims *d = &w->c.dims;
  int64_t nq = (int64_t)d->T * d->H * d->D, nk = (int64_t)d->T * d->G * d->D, nw = 2 * d->D;
  Value qkv = random_value(w, nq + 2 * nk), wq = random_value(w, nw), wk = random_value(w, nw);
  Value q = poison_value(w, nq), k = poison_value(w, nk), v = poison_value(w, nk);
  call(w, OP_QKNORM_ROPE_FWD, ARGS(.span = {0}), IN(qkv, wq, wk), OUT(q, k, v));
  for (int accumulate = 0; accumulate < 2; accumulate++)
    call(w, OP_QKNORM_ROPE_BWD, ARGS(.accumulate = accumulate),
         IN(random_value(w, nq), random_value(w, nk), random_value(w, nk), qkv, wq, wk),
         OUT(poison_value(w, nq + 2 * nk), sum_value(w, nw, accumulate), sum_value(w, nw, accumulate)));
  Value o = poison_value(w, nq), lse = poison_value(w, (int64_t)d->H * d->T);
  call(w, OP_ATTENTION_FWD, ARGS(.span = {0}), IN(q, k, v), OUT(o, lse));
  call(w, OP_ATTENTION_BWD, ARGS(.span = {0}), IN(random_value(w, nq), o, q, k, v, lse),
       OUT(poison_value(w, nq), poison_value(w, nk), poison_value(w, nk)));
  for (int accumulate = 0; accumulate < 2; accumulate++)
    call(w, OP_ATTENTION_ROPE_BWD, ARGS(.accumulate = accumulate),
         IN(random_value(w, nq), o, q, k, v, lse, qkv, wq, wk),
         OUT(poison_value(w, nq + 2 * nk), sum_value(w, nw, accumulate), sum_value(w, nw, accumulate),
             poison_value(w, nq + 2 * nk)));
}

// Returns the route, weights and the router's input through pointers, for the experts.
static void call_router(OpCalls *w, Value *route, Value *weights, Value h) {
  const Dims *d = &w->c.dims;
  const int one[2] = {1, 1};
  int64_t n_logits = two_sided_size(d->T, one, d->E), TC = (int64_t)d->T * d->C;
  int64_t TK = (int64_t)d->T * dims_kmax(d), nw[2] = {(int64_t)d->E[0] * d->C, (int64_t)d->E[1] * d->C};
  Value wr[2], logits = poison_value(w, n_logits);
  for (int m = 0; m < 2; m++) wr[m] = weight_value(w, nw[m], d->C);
  *weights = poison_value(w, TK);
  Route bound;
  *route = int_value(w, route_bind(&bound, d, NULL));
  call(w, OP_ROUTER_FWD, ARGS(.router = {.even = 1}), IN(h, wr[0], wr[1]),
       OUT(poison_value(w, n_logits), poison_value(w, TK), int_value(w, route_bind(&bound, d, NULL))));
  call(w, OP_ROUTER_FWD, ARGS(.router = {0}), IN(h, wr[0], wr[1]), OUT(logits, *weights, *route));
  OpArgs a = {.router = {.balance = 0.3, .z = 0.2, .layer = case_int(&w->c, 0, d->L - 1)}};
  call(w, OP_ROUTER_LOSS, a, IN(logits, *route), OUT(metrics_value(w)));
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    a.accumulate = accumulate;
    call(w, OP_ROUTER_BWD, a,
         IN(random_value(w, TK), logits, *weights, *route, h, wr[0], wr[1], optional(w, random_value(w, TC))),
         OUT(poison_value(w, TC), sum_value(w, nw[0], accumulate), sum_value(w, nw[1], accumulate)));
  }
}

// The sum over the experts with the site that follows. y, dslot: per-assignment buffers.
static void call_combine_adaln(OpCalls *w, Value y, Value dslot, Value route, Value weights) {
  const Dims *d = &w->c.dims;
  int64_t TC = (int64_t)d->T * d->C, SM = (int64_t)d->segments * d->M;
  OpArgs a = {.adaln = {.gate = 2 * d->C, .shift = 3 * d->C, .scale = 4 * d->C}};
  for (int option = 0; option < 4; option++) {
    a.adaln.silu_image = option & 1;
    call(w, OP_COMBINE_ADALN_FWD, a,
         IN(y, route, weights, optional(w, random_value(w, TC)), random_value(w, TC), random_value(w, SM)),
         OUT(option & 2 ? poison_value(w, TC) : none, poison_value(w, TC), poison_value(w, TC), poison_value(w, d->T),
             poison_value(w, d->T)));
  }
  a.adaln.silu_image = 0;
  Value x = random_value(w, TC), branch = random_value(w, TC), mod = random_value(w, SM);
  Value mean = poison_value(w, d->T), rstd = poison_value(w, d->T);
  call(w, OP_ADALN_FWD, a, IN(x, branch, mod), OUT(poison_value(w, TC), poison_value(w, TC), mean, rstd));
  call(w, OP_COMBINE_ADALN_BWD, a,
       IN(dslot, route, random_value(w, TC), random_value(w, TC), x, branch, mod, mean, rstd),
       OUT(poison_value(w, TC), poison_value(w, TC), poison_value(w, SM)));
}

static void call_experts(OpCalls *w) {
  const Dims *d = &w->c.dims;
  const int two_f[2] = {2 * d->F[0], 2 * d->F[1]}, c[2] = {d->C, d->C};
  int64_t n_pre = two_sided_size(d->T, d->K, two_f), n_a = two_sided_size(d->T, d->K, d->F);
  int64_t n_y = two_sided_size(d->T, d->K, c), TC = (int64_t)d->T * d->C;
  Value h = random_value(w, TC), route, weights, w1[2], w2[2];
  call_router(w, &route, &weights, h);
  for (int m = 0; m < 2; m++) {
    w1[m] = weight_value(w, (int64_t)d->E[m] * 2 * d->F[m] * d->C, d->C);
    w2[m] = weight_value(w, (int64_t)d->E[m] * d->F[m] * d->C, d->F[m]);
  }
  OpArgs plain = {.span = {0}};
  Value pre = poison_value(w, n_pre), a = poison_value(w, n_a), y = poison_value(w, n_y);
  call(w, OP_EXPERT_UP_FWD, plain, IN(h, route, w1[0], w1[1]), OUT(pre, a));
  call(w, OP_EXPERT_DOWN_FWD, plain, IN(a, route, w2[0], w2[1]), OUT(y));
  for (int option = 0; option < 4; option++)
    call(w, OP_EXPERT_COMBINE, plain,
         IN(y, route, option & 1 ? weights : none, option & 2 ? random_value(w, TC) : none), OUT(poison_value(w, TC)));
  Value dout = random_value(w, TC), dpre = poison_value(w, n_pre), sa = poison_value(w, n_a);
  call(w, OP_EXPERT_DOWN_BWD, plain, IN(dout, pre, weights, route, w2[0], w2[1]),
       OUT(dpre, sa, poison_value(w, weights.count)));
  Value dslot = poison_value(w, n_y);
  call(w, OP_EXPERT_UP_DGRAD, plain, IN(dpre, route, w1[0], w1[1]), OUT(dslot));
  call_combine_adaln(w, y, dslot, route, weights);
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    OpArgs s = {.accumulate = accumulate};
    call(w, OP_EXPERT_DOWN_WGRAD, s, IN(dout, sa, route),
         OUT(sum_value(w, w2[0].count, accumulate), sum_value(w, w2[1].count, accumulate)));
    call(w, OP_EXPERT_UP_WGRAD, s, IN(dpre, h, route),
         OUT(sum_value(w, w1[0].count, accumulate), sum_value(w, w1[1].count, accumulate)));
  }
}

static void call_shared(OpCalls *w) {
  const Dims *d = &w->c.dims;
  const int one[2] = {1, 1}, two_s[2] = {2 * d->S[0], 2 * d->S[1]};
  int64_t n_pre = two_sided_size(d->T, one, two_s), n_a = two_sided_size(d->T, one, d->S);
  int64_t TC = (int64_t)d->T * d->C;
  Value pre = poison_value(w, n_pre), w1[2] = {none, none}, w2[2] = {none, none};
  for (int m = 0; m < 2; m++) {
    if (d->S[m] == 0) continue;
    w1[m] = weight_value(w, (int64_t)2 * d->S[m] * d->C, d->C);
    w2[m] = weight_value(w, (int64_t)d->S[m] * d->C, d->S[m]);
  }
  call(w, OP_SHARED_UP_FWD, ARGS(.span = {0}), IN(random_value(w, TC), w1[0], w1[1]), OUT(pre, poison_value(w, n_a)));
  call(w, OP_SHARED_DOWN_BWD, ARGS(.span = {0}), IN(random_value(w, TC), pre, w2[0], w2[1]),
       OUT(poison_value(w, n_pre), poison_value(w, n_a)));
}

static void call_losses(OpCalls *w) {
  const Dims *d = &w->c.dims;
  int64_t TC = (int64_t)d->T * d->C, VC = (int64_t)d->V * d->C, TP = (int64_t)d->T * d->P;
  Value h = random_value(w, TC), wout = weight_value(w, VC, d->C), xhat = random_value(w, TP);
  for (int option = 0; option < 3; option++) { // overwrite, accumulate, loss only
    int chunk = case_int(&w->c, 1, d->T), accumulate = option == 1, loss_only = option == 2;
    call(w, OP_HEAD_CE, ARGS(.accumulate = accumulate, .head = {.chunk = chunk}), IN(h, wout),
         OUT(poison_value(w, d->T), loss_only ? none : poison_value(w, TC),
             loss_only ? none : sum_value(w, VC, accumulate), metrics_value(w),
             poison_value(w, (int64_t)chunk * d->V)));
  }
  call(w, OP_HEAD_LOGITS, ARGS(.span = {0}), IN(h, wout), OUT(poison_value(w, (int64_t)d->T * d->V)));
  for (int loss_only = 0; loss_only < 2; loss_only++)
    call(w, OP_FLOW_LOSS, ARGS(.flow = {.t_floor = 0.05}), IN(xhat),
         OUT(loss_only ? none : poison_value(w, TP), poison_value(w, d->segments), metrics_value(w)));
}

// `spoil`: -1 nothing, 0 a gradient is infinite, 1 the loss is NaN; then nothing may be updated.
static void call_update(OpCalls *w, int spoil) {
  enum { PARAMS = 4 };
  ParamSpan spans[PARAMS];
  int64_t n = 0;
  for (int i = 0; i < PARAMS; i++) {
    spans[i] = (ParamSpan){.offset = n, .count = case_int(&w->c, 1, 3000), .decay = coin(w)};
    n += (spans[i].count + 15) / 16 * 16;
  }
  OpArgs a = {.params = {.spans = spans, .n = PARAMS, .end = n}};
  Value grads = random_value(w, n), weights = random_value(w, n), m = random_value(w, n), v = random_value(w, n);
  Value ema = random_value(w, n), metrics = metrics_value(w), squares = double_value(w, PARAMS * EXACT_WORDS);
  // Gaps between spans are 0 in every slab.
  Value slabs[5] = {grads, weights, m, v, ema};
  for (int s = 0; s < 5; s++)
    for (int i = 0; i < PARAMS; i++)
      for (int64_t j = spans[i].offset + spans[i].count; j < (i + 1 < PARAMS ? spans[i + 1].offset : n); j++)
        ((real *)slabs[s].data)[j] = 0;
  for (int64_t i = 0; i < n; i++) ((real *)v.data)[i] *= ((real *)v.data)[i];
  StepScalars step = {.lr = 0.01,
                      .beta1 = 0.9,
                      .beta2 = 0.95,
                      .eps = 1e-8,
                      .weight_decay = 0.1,
                      .clip = coin(w) ? 1.0 : 0.0,
                      .bias1 = 1 - 0.9 * 0.9,
                      .bias2 = 1 - 0.95 * 0.95,
                      .ema_decay = 0.97,
                      .norm_limit = (double[]){0, 0, 1e6, 1}[case_int(&w->c, 0, 3)]}; // 1: beyond it
  Value scalars = double_value(w, sizeof step / sizeof(double));
  memcpy(scalars.data, &step, sizeof step);
  if (spoil == 0) ((real *)grads.data)[spans[2].offset + spans[2].count / 2] = (real)INFINITY;
  if (spoil == 1) ((Metrics *)metrics.data)->flow = NAN;
  Value status = {case_bytes(&w->c, sizeof(UpdateStatus), 0x55), sizeof(UpdateStatus), "U8"};
  Value hash = {case_bytes(&w->c, PARAMS * 8, 0x55), PARAMS * 8, "U8"};
  call(w, OP_GRAD_SQUARES, a, IN(grads), OUT(squares));
  call(w, OP_GRAD_DECIDE, a, IN(squares, metrics, scalars), OUT(status));
  call(w, OP_GRAD_HASH, a, IN(grads), OUT(hash));
  call(w, OP_ADAMW, a, IN(grads, status, scalars), OUT(weights, m, v, none, optional(w, ema)));
}

void op_calls_run(OpCalls *w) {
  call_copies(w);
  call_linears(w);
  call_embedding(w);
  call_conditions(w);
  call_adaln(w);
  call_attention(w);
  call_experts(w);
  call_shared(w);
  call_losses(w);
  for (int spoil = -1; spoil < 2; spoil++) call_update(w, spoil);
}
