// The contract between the program and its backends: every op once, with its formula, operands and shapes.
//
// kernels/cpu is the readable specification (type `real`: float, or double when built with -DTESSERA_REAL=double);
// kernels/cuda is the fast one. An op is pure: it reads in[], writes every element of out[] it is said to write, and
// nothing else. Outputs marked '+' in the table are the exception. Gradients and ADD's dst are added to with
// args.accumulate and overwritten without it; metrics are always added to; ADAMW and EMA update theirs in place.
//
// Shapes: T token slots, C dim, H query heads, G kv heads, D head_dim, P = 3p^2 patch elements, V vocab, Z cond_dim,
// L layers, M = 6CL + 2C columns of the modulation table, SEG its rows (capacity); for each modality m: E_m experts of
// width F_m, K_m of them per token, shared expert of width S_m. Kmax = max K_m.
//
// Row extents. n_text, n_image, n_segments come from batch->dims. Filler rows [n_text + n_image, T) of every [T, .]
// output are written as zeros. "Two-sided" buffers hold both modalities at different widths: with R_m rows a token and
// width W_m, the text view is [T R_0, W_0] from the front of the buffer and the image view [T R_1, W_1] ending at its
// end, of T * max(R_0 W_0, R_1 W_1) elements (two_sided_size, two_sided_base). Row r's entries are rows r R_m .. (r+1)
// R_m - 1 of its modality's view, so the used parts never meet. With equal widths and R = 1 it is an ordinary [T, W].
#ifndef TESSERA_KERNELS_H
#define TESSERA_KERNELS_H

#include "base/base.h"
#include "kernels/batch.h"

// DT_ACT: activations and weights as the backend stores them (CPU: real; CUDA: bf16). DT_REAL: fp32 (CPU: real).
typedef enum Dtype { DT_ACT, DT_REAL, DT_I32, DT_U8, DT_F64, DT_COUNT } Dtype;

// Sizes shared by every op of a program.
typedef struct Dims {
  int T, C, H, G, D, P, V, Z, L;
  int M;        // 6CL + 2C
  int segments; // SEG
  int E[MODALITIES], F[MODALITIES], K[MODALITIES], S[MODALITIES];
} Dims;

static inline int dims_kmax(const Dims *d) {
  return d->K[TEXT] > d->K[IMAGE] ? d->K[TEXT] : d->K[IMAGE];
}
static inline BatchShape dims_batch_shape(const Dims *d) {
  BatchShape s = {d->T, d->segments, d->P, d->V};
  return s;
}

// Elements of a two-sided buffer, and where modality m's view begins in it.
static inline int64_t two_sided_size(int T, const int rows[2], const int width[2]) {
  int64_t a = (int64_t)T * rows[0] * width[0], b = (int64_t)T * rows[1] * width[1];
  return a > b ? a : b;
}
static inline int64_t two_sided_base(int T, const int rows[2], const int width[2], int m) {
  return m == TEXT ? 0 : two_sided_size(T, rows, width) - (int64_t)T * rows[1] * width[1];
}

// Where a router has sent the assignments (token, j), j < K_m, of both modalities. Slots are rows of the two-sided
// per-assignment buffers: text slots are 0 .. n_text K_0 - 1 of the text view, image slots n_text K_1 ..
// (n_text + n_image) K_1 - 1 of the image view. Within a modality slots are sorted by (expert, row), stable.
// Expert e of modality m is group g = m ? E_0 + e : e; its slots are [begin[g], begin[g] + count[g]).
typedef struct Route {
  int32_t *begin;              // [E_0 + E_1]
  int32_t *count;              // [E_0 + E_1]
  int32_t *slot;               // [T][Kmax] row, j -> slot in its modality's view; -1 where unused
  int32_t *source[MODALITIES]; // [T K_m] slot -> row * Kmax + j
} Route;

// Lays a Route out from `base` (NULL to measure); returns its size in int32 elements.
static inline int64_t route_bind(Route *r, const Dims *d, int32_t *base) {
  int64_t groups = d->E[0] + d->E[1], at = 0, T = d->T;
#define ROUTE_TAKE(field, n)                                                                                           \
  do {                                                                                                                 \
    r->field = base ? base + at : NULL;                                                                                \
    at += (n);                                                                                                         \
  } while (0)
  ROUTE_TAKE(begin, groups);
  ROUTE_TAKE(count, groups);
  ROUTE_TAKE(slot, T * dims_kmax(d));
  ROUTE_TAKE(source[TEXT], T * d->K[TEXT]);
  ROUTE_TAKE(source[IMAGE], T * d->K[IMAGE]);
#undef ROUTE_TAKE
  return at;
}

// Sums over a step, accumulated by ops in fp64 and read by the trainer once a step. `load` follows: [L][E_0 + E_1]
// assignments counted per expert.
typedef struct Metrics {
  double nll[2];     // summed negative log likelihood by target_kind
  double targets[2]; // rows in those sums
  double flow;       // sum of squared velocity errors over elements
  double flow_elems; // elements in that sum
  double balance, z; // router losses, as they enter the total: coefficients and scales applied
} Metrics;
static inline int64_t metrics_size(const Dims *d) { // in doubles
  return (int64_t)(sizeof(Metrics) / sizeof(double)) + (int64_t)d->L * (d->E[0] + d->E[1]);
}

// Scalars the host sets before each update.
typedef struct StepScalars {
  double lr, beta1, beta2, eps, weight_decay, clip; // clip 0: none
  double bias1, bias2;                              // 1 - beta1^t, 1 - beta2^t, t = updates applied, this one included
  double ema_decay;
  double norm_limit; // a step whose gradient norm is beyond it is skipped, 0: none
} StepScalars;

// What GRAD_NORM found; ADAMW and EMA do nothing when `skip` is set.
typedef struct UpdateStatus {
  double norm;  // global gradient norm before clipping
  double scale; // what gradients are multiplied by
  int32_t skip; // a gradient or the loss is not finite, or the norm is beyond scalars->norm_limit
  int32_t bad;  // n_params: the loss itself is not finite; else the first parameter whose gradient is not; -1: none
} UpdateStatus;

// A parameter's place in the weight, gradient and optimiser slabs.
typedef struct ParamSpan {
  int64_t offset, count; // elements
  int32_t decay;         // weight decay applies
} ParamSpan;

// Which rows a linear op covers. Rows of the output outside the extent (of its capacity) are written as zeros.
typedef enum Extent {
  EXT_ROWS,    // text and image rows with one weight matrix
  EXT_SPLIT,   // text rows with w0, image rows with w1; x and y two-sided (R = 1) where their widths differ
  EXT_IMAGE,   // image rows with w0
  EXT_SEGMENTS // rows [1, n_segments) of [SEG, .] tensors with w0
} Extent;

// `accumulate` comes first in every member that has it, so that it may be read through any of them
// (args->span.accumulate is LINEAR_WGRAD's too). Which ops read a member stands beside it; ops that none names take no
// arguments.
typedef union OpArgs {
  struct { // LINEAR_*; accumulate: LINEAR_WGRAD
    int accumulate;
    Extent extent;
    int in_dim[MODALITIES], out_dim[MODALITIES]; // [1] only with EXT_SPLIT; a width of 0 gives zeros
  } linear;
  struct {                  // ADALN_*, COMBINE_ADALN_*
    int gate, shift, scale; // first columns in the modulation table; gate is that of the branch just added
    int silu_image;         // image rows: h = silu(n); the final site
    int x_is_new;           // ADALN_BWD: x already is xnew (the branch only serves dgate and dbranch)
  } adaln;
  struct { // ROUTER_LOSS, ROUTER_BWD; accumulate: ROUTER_BWD
    int accumulate;
    double balance, z; // router loss coefficients, already divided by the number of layers
    int layer;
  } router;
  struct { // HEAD_CE; accumulate: dwout
    int accumulate;
    int chunk; // rows of logits at a time
  } head;
  struct { // FLOW_LOSS
    double t_floor;
  } flow;
  struct {           // NOISE
    uint32_t stream; // STREAM_NOISE or STREAM_EVAL
  } noise;
  struct { // COPY, ZERO, ADD, CAST; accumulate alone: EMBED_BWD, COND_BWD, MOD_BWD, QKNORM_ROPE_BWD, EXPERT_*_WGRAD
    int accumulate;
    int64_t count; // elements, or bytes for COPY and ZERO
  } span;
  struct {                  // GRAD_NORM, GRAD_HASH, ADAMW, EMA
    const ParamSpan *spans; // [n]
    int n;
  } params;
} OpArgs;

// OP(name, inputs, outputs): operand names in order; '?' optional, '+' an output that is also read. What each
// computes stands below.
#define OP_LIST(OP)                                                                                                    \
  OP(COPY, "src", "dst")                                                                                               \
  OP(ZERO, "", "dst")                                                                                                  \
  OP(ADD, "src", "dst+")                                                                                               \
  OP(NOISE, "", "z")                                                                                                   \
  OP(LINEAR_FWD, "x w0? w1? bias?", "y")                                                                               \
  OP(LINEAR_DGRAD, "dy w0? w1? add?", "dx")                                                                            \
  OP(LINEAR_WGRAD, "dy x", "dw0+? dw1+? dbias+?")                                                                      \
  OP(EMBED_FWD, "E image_rows", "x")                                                                                   \
  OP(EMBED_BWD, "dx dmean", "dE+")                                                                                     \
  OP(POOL_FWD, "E", "pooled")                                                                                          \
  OP(POOL_BWD, "dpooled E", "dmean")                                                                                   \
  OP(TIME_FEATURES, "", "features")                                                                                    \
  OP(SILU_FWD, "x", "y")                                                                                               \
  OP(SILU_BWD, "dy x", "dx")                                                                                           \
  OP(COND_FWD, "time pool e_kind", "c a")                                                                              \
  OP(COND_BWD, "da c", "dc de_kind+")                                                                                  \
  OP(MOD_FWD, "a U S", "mod")                                                                                          \
  OP(MOD_BWD, "dmod", "dS+")                                                                                           \
  OP(ADALN_FWD, "x branch? mod", "xnew? h mean rstd")                                                                  \
  OP(ADALN_BWD, "dh dxnew? x branch? mod mean rstd", "dx dbranch? dmod")                                               \
  OP(QKNORM_ROPE_FWD, "qkv wq wk", "q k v")                                                                            \
  OP(QKNORM_ROPE_BWD, "dq dk dv qkv wq wk", "dqkv dwq+ dwk+")                                                          \
  OP(ATTENTION_FWD, "q k v", "o lse")                                                                                  \
  OP(ATTENTION_BWD, "do o q k v lse", "dq dk dv")                                                                      \
  OP(ROUTER_FWD, "h wr0 wr1", "logits weights route")                                                                  \
  OP(ROUTER_LOSS, "logits route", "metrics+")                                                                          \
  OP(ROUTER_BWD, "dweights logits weights route h wr0 wr1 add?", "dh dwr0+ dwr1+")                                     \
  OP(EXPERT_UP_FWD, "h route w1_0 w1_1", "pre a")                                                                      \
  OP(EXPERT_DOWN_FWD, "a route w2_0 w2_1", "y")                                                                        \
  OP(EXPERT_COMBINE, "y route weights? add?", "out")                                                                   \
  OP(EXPERT_DOWN_BWD, "dout pre weights route w2_0 w2_1", "dpre sa dweights")                                          \
  OP(EXPERT_DOWN_WGRAD, "dout sa route", "dw2_0+ dw2_1+")                                                              \
  OP(EXPERT_UP_DGRAD, "dpre route w1_0 w1_1", "dslot")                                                                 \
  OP(EXPERT_UP_WGRAD, "dpre h route", "dw1_0+ dw1_1+")                                                                 \
  OP(COMBINE_ADALN_FWD, "y route weights add? x mod", "b2? xnew h mean rstd")                                          \
  OP(COMBINE_ADALN_BWD, "dslot route add dxnew x branch mod mean rstd", "dx dbranch dmod")                             \
  OP(SWIGLU_FWD, "pre", "a")                                                                                           \
  OP(SWIGLU_BWD, "da pre", "dpre a")                                                                                   \
  OP(HEAD_CE, "h wout", "nll dh? dwout+? metrics+ work")                                                               \
  OP(HEAD_LOGITS, "h wout", "logits")                                                                                  \
  OP(FLOW_LOSS, "xhat", "dxhat? seg_error metrics+")                                                                   \
  OP(GRAD_NORM, "grads metrics scalars", "status partial")                                                             \
  OP(GRAD_HASH, "grads", "hash")                                                                                       \
  OP(ADAMW, "grads status scalars", "weights+ m+ v+ rest+?")                                                           \
  OP(EMA, "weights status scalars rest?", "ema+")                                                                      \
  OP(CAST, "src", "dst")

// clang-format off
// COPY            dst[0..count) = src, bytes; the only op of the d2h and h2d lanes.
// ZERO            dst[0..count) = 0, bytes.
// ADD             dst += src (accumulate) or dst = src, count elements of DT_REAL.
// NOISE           z [T,P]: image rows x = v/127.5 - 1 (v: batch->patch); noised segments: z = t x + (1-t) eps, clean: z
//                 = x; text and filler rows 0. eps of segment g, its token i, element e: normal number n = i P + e of
//                 stream (args.stream | seg_ordinal << 8) of document seg_doc[g] (philox_normal4, block n/4).
// LINEAR_FWD      y = x W^T (+ bias [out], one for both modalities). x [rows, in], W [out, in]. A weight of width 0 is
//                 absent (NULL).
// LINEAR_DGRAD    dx = dy W (+ add, shaped as dx). Outside the extent the product is 0: dx = add there, or 0; filler
//                 rows 0.
// LINEAR_WGRAD    dW (+)= dy^T x; dbias (+)= column sums of dy over the extent.
// EMBED_FWD       x [T,C]: text rows E[token] (E [V,C]), image rows image_rows (a [T,C] tensor), filler 0.
// EMBED_BWD       dE [V,C] (+)= by id: sum over its text rows r, ascending, of dx[r] + dmean[g] / (cap_end[g] -
//                 cap_start[g]) with g = pool_segment[r] where that is not 0. Rows of E without a token: overwritten
//                 with 0 unless accumulating. dx [T,C], dmean [SEG,C].
// POOL_FWD        pooled [SEG,C]: u = mean over text rows [cap_start, cap_end) of E[token]; u / sqrt(mean(u^2) + 1e-6).
//                 Empty caption, row 0 and rows past n_segments: 0.
// POOL_BWD        dmean [SEG,C]: gradient with respect to u; 0 for an empty caption, in row 0 and in unused rows.
// TIME_FEATURES   features [SEG,256]: cos(1000 t f_i), then sin, f_i = 10000^(-i/128), i < 128; row 0 and unused: 0.
// SILU_FWD        [SEG,Z] elementwise over rows [1, n_segments), others 0: y = x sigmoid(x).
// SILU_BWD        the same rows: dx = dy silu'(x), others 0.
// COND_FWD        c = time + pool + e_kind[seg_kind], a = silu(c); all [SEG,Z], e_kind [2,Z]; row 0 and unused: 0.
// COND_BWD        dc = da silu'(c), row 0 and unused: 0; de_kind [2,Z] (+)= sums of dc by kind. The gradient of time
//                 and of pool is dc.
// MOD_FWD         mod [SEG,M]: row 0 = S[TEXT]; image rows = S[IMAGE] + U a; S [2,M], U [M,Z], a [SEG,Z]. Unused: 0.
// MOD_BWD         dS[TEXT] (+)= dmod row 0, dS[IMAGE] (+)= sum of the image rows. (dU and da are LINEAR ops,
//                 EXT_SEGMENTS.)
// ADALN_FWD       x, branch [T,C], g = segment[row]: xnew = x + mod[g, gate..] * branch, rounded to its storage type
//                 first; without branch xnew = x and the output is absent. mean, rstd [T] over C (two-pass, eps 1e-6)
//                 of xnew; n = (1 + mod[g, scale..]) (xnew - mean) rstd + mod[g, shift..]; h = n, or silu(n) on image
//                 rows with silu_image. Filler rows of all outputs 0.
// ADALN_BWD       from dh and dxnew (gradient arriving at xnew by the residual path; absent: 0). xnew is rebuilt from x
//                 and branch, or is x itself with x_is_new. dx = dxnew + LayerNorm backward; dbranch = gate * dx; dmod
//                 [SEG,M]: of the used segments' rows writes the columns shift.., scale.. (and gate.. with a branch),
//                 sums over the segment's rows (row 0: all text rows); other columns and rows are left alone. dx,
//                 dbranch filler rows 0.
// QKNORM_ROPE_FWD qkv [T,(H+2G)D] row order: q heads, k heads, v heads. q = rope(rmsnorm_D(q) wq[m]), k likewise with
//                 wk, v as it is; rmsnorm: x / sqrt(mean(x^2) + 1e-6). q [T,H,D], k, v [T,G,D] in sequence order;
//                 filler 0. wq, wk [2,D] by modality. Pair j = elements (2j, 2j+1) turns by angle pos * 10000^(-2j/D),
//                 pos = row coordinate for even j, column for odd.
// QKNORM_ROPE_BWD the reverse; dqkv [T,(H+2G)D] row order, filler 0; dwq, dwk [2,D] (+)=.
// ATTENTION_FWD   o[q] = softmax(q k^T / sqrt(D) over allowed keys) v. Allowed: doc_start[q] <= k < kv_end[q] and q <
//                 q_end[k]. Query head h uses kv head h / (H/G). o [T,H D] in ROW order; lse [H,T] (natural log) in
//                 sequence order. Filler: o = 0, lse = +inf.
// ATTENTION_BWD   do, o in row order; dq [T,H,D], dk, dv [T,G,D] in sequence order; filler 0.
// ROUTER_FWD      logits (two-sided, R = 1, widths E_m; filler rows 0) = h Wr_m^T in DT_REAL; top-k of each row, ties
//                 to the lower index, in descending order; weights [T,Kmax] = softmax over the chosen logits (K_m = 1:
//                 the full-softmax probability), 0 where unused; route (struct Route).
// ROUTER_LOSS     per modality with rows: balance * E_m sum_e f_e P_e + z * mean(lse^2), times dims->router_scale,
//                 added to metrics->balance and ->z; f_e = count_e / (rows K_m), P_e = mean full-softmax probability.
//                 Adds counts to load[layer].
// ROUTER_BWD      dlogits from dweights through the softmax over the chosen, plus the router losses' gradient (f
//                 constant; balance, z, router_scale applied); dh = add + dlogits Wr, filler 0; dWr (+)= dlogits^T h.
// EXPERT_UP_FWD   for each slot s of group e with source row r: pre[s] = h[r] W1_e^T (two-sided, R = K, widths 2 F_m;
//                 W1 [E,2F,C], rows 2f gate, 2f+1 up); a[s] = silu(gate) * up (widths F_m). Unused slots are left alone
//                 here and in every per-slot buffer: no op reads them.
// EXPERT_DOWN_FWD y[s] = a[s] W2_e^T (two-sided, R = K, widths C); W2 [E,C,F].
// EXPERT_COMBINE  out[r] = add[r] + sum_j weights[r,j] y[slot(r,j)], experts in ascending index; weights absent: 1.
//                 Filler 0. Also the backward's gather-sum.
// EXPERT_DOWN_BWD dA[s] = dout[r] W2_e; a recomputed from pre; with w = weights[r,j]: dweights[r,j] = <dA, a>; sa[s] =
//                 w a; dpre[s] = gradient of pre for w dA. dweights [T,Kmax] DT_REAL, 0 where unused.
// EXPERT_DOWN_WGRAD dW2_e (+)= sum over its slots of dout[r]^T sa[s]. A group with no rows stores zeros unless
//                 accumulating, here and in EXPERT_UP_WGRAD.
// EXPERT_UP_DGRAD dslot[s] = dpre[s] W1_e (two-sided, R = K, widths C).
// EXPERT_UP_WGRAD dW1_e (+)= sum over its slots of dpre[s]^T h[r].
// COMBINE_ADALN_FWD EXPERT_COMBINE(y, route, weights, add) gives b2, rounded to its storage type; ADALN_FWD(x, b2, mod)
//                 with the args of ADALN_* gives the other outputs: both with the bits of the two ops. b2 is absent
//                 where nothing reads it again.
// COMBINE_ADALN_BWD EXPERT_COMBINE(dslot, route, no weights, add) gives dh, rounded to its storage type; ADALN_BWD(dh,
//                 dxnew, x, branch, mod, mean, rstd) gives the outputs, likewise. silu_image and x_is_new are 0.
// SWIGLU_FWD      the shared expert's activation: pre two-sided (R = 1, widths 2 S_m, columns as the experts'), a
//                 widths S_m. Filler rows 0.
// SWIGLU_BWD      dpre from da; also rebuilds a. Filler rows of both 0.
// HEAD_CE         text rows with a target, in chunks of args.chunk rows: logits = h Wout^T, nll [T] DT_REAL (0
//                 elsewhere), dlogits = ce_scale (softmax - onehot) in place, dh = dlogits Wout (0 elsewhere), dWout
//                 (+)= dlogits^T h. dh and dwout both absent: loss only. Adds to metrics->nll, ->targets. work: [chunk,
//                 V] DT_REAL. Overwrites dWout unless accumulating, also with no targets.
// HEAD_LOGITS     logits [n_target, V] DT_REAL of the rows target_row; n_target is at most the rows that the recording
//                 gave `logits`.
// FLOW_LOSS       noised image rows: err = xhat - x, w = 1/max(1-t, t_floor)^2; adds sum w err^2 to metrics->flow and
//                 the number of elements to ->flow_elems; dxhat = 2 flow_scale w err (0 in other rows); seg_error [SEG]
//                 DT_REAL = mean err^2 over the segment's elements (0 for clean and unused).
// GRAD_NORM       status from the gradients of all parameters (args.params) and the losses in metrics: norm = sqrt(sum
//                 g^2), scale = min(1, scalars->clip / norm) (1 with clip 0); skip and bad as UpdateStatus says.
//                 partial [n_params] F64: each parameter's sum of squares.
// GRAD_HASH       hash [n_params] U64: of each parameter's gradient, the sum modulo 2^64 of bits_mix(bits of g[i], i) over
//                 its elements i (kernels/bits.h). Equal bits, equal hash, in any order of summation.
// ADAMW           decoupled weight decay (Loshchilov and Hutter 2019): g = scale * grad; m = beta1 m + (1 - beta1) g, v
//                 = beta2 v + (1 - beta2) g^2; w -= lr (m^ / (sqrt(v^) + eps) + weight_decay w [decay]) with m^ = m /
//                 bias1, v^ = v / bias2. w is the weight itself, or with rest [n] U16 the fp32 master that the two
//                 stand for (master_join). Does nothing with status->skip.
// EMA             ema += (1 - ema_decay) (w - ema), w as in ADAMW. Does nothing with status->skip.
// CAST            dst (DT_ACT) = src (DT_REAL), count elements, rounded to nearest.
// clang-format on

typedef enum OpKind {
#define OP_ENUM(name, in, out) OP_##name,
  OP_LIST(OP_ENUM)
#undef OP_ENUM
      OP_COUNT
} OpKind;

enum { OP_MAX_IN = 9, OP_MAX_OUT = 5 };

// One call: operands in table order, NULL where an optional one is absent.
typedef struct KernelCall {
  const void *in[OP_MAX_IN];
  void *out[OP_MAX_OUT];
  const Batch *batch; // the live pack; its pointers are device pointers of the backend
  const Dims *dims;
  const OpArgs *args;
  void *stream;  // the lane's queue on the device (CUDA: cudaStream_t); NULL on the CPU
  void *scratch; // Backend.scratch_bytes of memory that is this op's alone while it runs, of any content
} KernelCall;

typedef void (*KernelFn)(const KernelCall *call);

// Queues of work, each in order. Nothing is ordered between them but by events.
typedef enum Lane { LANE_COMPUTE, LANE_D2H, LANE_H2D, LANE_COUNT } Lane;

enum { SLAB_SLOTS = 4 };

// Events of a device's queues, by number. A program's replay uses those from EVENT_REPLAY on.
enum {
  EVENT_PACK_READY,                            // the staged pack has arrived; two, in turn
  EVENT_PACK_TAKEN = EVENT_PACK_READY + 2,     // it was copied to its place: the next may be staged
  EVENT_RESULTS,                               // what the host reads of a step has arrived; two, in turn
  EVENT_SLAB_FREE = EVENT_RESULTS + 2,         // what was given before reads or writes the slabs no more
  EVENT_SLAB_SENT,                             // a piece of a slab has arrived; SLAB_SLOTS, in turn
  EVENT_STAGED = EVENT_SLAB_SENT + SLAB_SLOTS, // a piece of one has arrived on the host; two, in turn
  EVENT_TIMED = EVENT_STAGED + 2,              // where what is being timed begins and ends
  EVENT_REPLAY = EVENT_TIMED + 2
};

typedef struct Queues {
  void *(*stream)(Lane lane);           // what KernelCall.stream is for ops of the lane
  void (*record)(Lane lane, int event); // the event: all that the lane was given so far has run
  void (*wait)(Lane lane, int event);   // what the lane is given from here on runs after the event
  void (*finish)(int event);            // the host waits for it; at once where it was never recorded
  double (*seconds)(int from, int to);  // between two events that have happened; waits for the second
  void (*range)(const char *name);      // begins a range for profilers (NVTX), or ends it (NULL)
  void (*capture_begin)(void);          // from here to capture_end nothing runs: it goes into a graph
  void *(*capture_end)(void);           // the graph
  void (*graph_launch)(void *graph);    // on the compute lane
  void (*graph_free)(void *graph);
} Queues;

// Which of several ways of computing the same ops, equal within rounding; the others are there to be compared with.
typedef struct KernelChoice {
  int adaln_unfused; // residual, norm, modulation, activation and mask as kernels of their own
  int experts_loop;  // a library product per expert, whose extents the host waits for: no graphs
} KernelChoice;

// What a device can do a second: the floor that ops are held against.
typedef struct DeviceRates {
  double bytes;       // of a large copy, read and written; 0: there was no room to measure it
  double flops;       // dense bf16, of a large product that goes on for a while
  int flops_measured; // with a library's product; 0: there is none, it is a share of the data sheet's
} DeviceRates;

// What copies between a device and large pinned memory of the host carry, in bytes a second of one direction.
typedef struct LinkRates {
  double d2h, h2d;           // alone
  double both_d2h, both_h2d; // while the other direction is busy too
  double latency;            // seconds that a copy takes besides
} LinkRates;

struct Config; // model/config/config.h
typedef struct Backend Backend;
struct Backend {
  const char *name;
  size_t dtype_bytes[DT_COUNT];
  int gradient_per_micro; // each micro-step forms its gradient from zero and adds it (bit-equal to reducing processes)
  int head_chunk;         // rows of logits at a time (HEAD_CE)
  int remainder_bytes;    // of a weight, beside its DT_ACT value: the two are its master. 0: DT_ACT is the master
  KernelFn fn[OP_COUNT];
  size_t (*scratch_bytes)(OpKind kind, const Dims *dims, const OpArgs *args); // NULL: no op needs any
  // Masters [n] of weights, as DT_REAL, from what is stored of them and back, in host memory. Without remainders
  // (NULL) those nearest to the weights are read. NULL: DT_ACT is the master.
  void (*weights_read)(const void *weights, const void *remainders, int64_t n, void *masters);
  void (*weights_write)(const void *masters, int64_t n, void *weights, void *remainders);
  const Queues *queues; // NULL: an op has run when its function returns (CPU)
  // -1 with *err naming what of the config's model it cannot run. NULL: any model.
  int (*accepts)(const struct Config *c, Error *err);
  int (*open)(Error *err);      // before anything below; with *err: -1 there is no such device, -2 it cannot be used
  const char *(*kernels)(void); // whose kernels compute (OpenBLAS's name, the GPU's): only equal ones give equal bits
  // Dense bf16 FLOPs a second by the open device's data sheet, which MFU is a share of. NULL: not known.
  double (*sheet_flops)(void);
  DeviceRates (*rates)(void); // measures the open device; NULL: nothing is known
  // Measures copies, with all queues empty; zeros where no device is open. NULL: there is no link.
  LinkRates (*link)(void);
  DeviceRates assumed; // of the device that plans are made for where none is open
  LinkRates assumed_link;
  int64_t (*cache_bytes)(void); // of the open device, its last level (L2); NULL: not known
  int64_t (*memory)(void);      // bytes that a run may plan with
  int64_t (*in_use)(void);      // of the open device, taken since it was opened; NULL: not known
  void *(*alloc)(size_t bytes); // device memory of any content, aligned to 256; NULL when there is not enough
  void (*release)(void *p);
  void *(*host_alloc)(size_t bytes); // memory of the host that copy lanes reach at full speed, likewise
  void (*host_release)(void *p);
  void (*upload)(void *device, const void *host, size_t bytes);   // in order with the ops of the compute lane
  void (*download)(void *host, const void *device, size_t bytes); // after all ops so far
  void (*clear)(void *device, size_t bytes);                      // to zeros, in order with the ops of the compute lane
  void (*choose)(Backend *b, KernelChoice choice); // changes b's table accordingly; NULL: there is one way only
};

// Operand names of an op ("x w0? w1? bias?"), and its name.
typedef struct OpInfo {
  const char *name, *in, *out;
} OpInfo;
extern const OpInfo op_info[OP_COUNT];

// Elements of a backend's DT_ACT or DT_REAL on the host, by their size (2: bf16, 4: float, 8: double), to float and
// back; to bf16 rounded to nearest, ties to even.
void floats_from(const void *elements, size_t element, int64_t n, float *out);
void floats_to(const float *x, size_t element, int64_t n, void *elements);
uint16_t bf16_from_float(float x);

// Copies bytes on a lane of a backend with queues.
void queue_copy(const Backend *b, Lane lane, void *to, const void *from, size_t bytes);

extern const Backend backend_cpu;
extern const Backend backend_cuda; // where the build has it (TESSERA_CUDA)
#endif
