// Every op: its arguments, its row in the table, its formula. Shapes and row extents: kernels.h.
#ifndef TESSERA_OP_TABLE_H
#define TESSERA_OP_TABLE_H

#include "base/base.h"
#include "kernels/batch.h"

// A parameter's place in the weight, gradient and optimiser slabs.
typedef struct ParamSpan {
  int64_t offset, count; // elements
  int32_t decay;         // weight decay applies
} ParamSpan;

// Which rows a linear op covers. Rows of the output outside the extent (of its capacity) are written as zeros.
typedef enum Extent {
  EXT_ROWS,    // text and image rows with one weight matrix
  EXT_SPLIT,   // text rows with w[TEXT], image rows with w[IMAGE]; x and y two-sided (R = 1) where their widths differ
  EXT_IMAGE,   // image rows with w[TEXT]
  EXT_SEGMENTS // rows [1, n_segments) of [SEG, .] tensors with w[TEXT]
} Extent;

// Arguments of an op. Which ops read a member of the union stands beside it; ops that none names have no others.
typedef struct OpArgs {
  int accumulate; // outputs that the table marks ADDS_IF_ASKED are added to rather than overwritten
  union {
    struct { // LINEAR_*
      Extent extent;
      int in_dim[MODALITIES], out_dim[MODALITIES]; // [1] only with EXT_SPLIT; a width of 0 gives zeros
    } linear;
    struct {                  // ADALN_*, COMBINE_ADALN_*
      int gate, shift, scale; // first columns in the modulation table; gate is that of the branch just added
      int silu_image;         // image rows: h = silu(n); the final site
      int x_is_new;           // ADALN_BWD: x already is xnew (the branch only serves dgate and dbranch)
    } adaln;
    struct {             // ROUTER_*
      double balance, z; // router loss coefficients, already divided by the number of layers
      int layer;
      int even; // ROUTER_FWD: experts in turn, not those of the largest logits
    } router;
    struct {                 // EXPERT_UP_*, EXPERT_DOWN_*
      int tiles[MODALITIES]; // columns of a product's tiles, 0: those that the backend finds best
    } experts;
    struct {     // HEAD_CE
      int chunk; // rows of logits at a time
    } head;
    struct { // FLOW_LOSS
      double t_floor;
    } flow;
    struct {           // NOISE
      uint32_t stream; // STREAM_NOISE or STREAM_EVAL
    } noise;
    struct {         // COPY, ZERO, ADD, CAST
      int64_t count; // elements, or bytes for COPY and ZERO
    } span;
    struct {         // ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER
      int64_t count; // elements
      int is_f64;    // of F64, rather than DT_REAL (ALL_GATHER: DT_ACT)
    } group;
    struct {                  // GRAD_SQUARES, GRAD_DECIDE, GRAD_HASH, ADAMW
      const ParamSpan *spans; // [n]
      int n;
      int64_t begin, end; // elements of the slabs that the operands hold, which are all that is covered of the spans
      int bf16_moments;   // ADAMW: m and v are bf16
    } params;
  };
} OpArgs;

// What of a parameter an op covers, with its offset in the operands.
static inline ParamSpan params_span(const OpArgs *args, int p) {
  ParamSpan s = args->params.spans[p];
  int64_t begin = max_i64(s.offset, args->params.begin), end = min_i64(s.offset + s.count, args->params.end);
  return (ParamSpan){begin - args->params.begin, max_i64(end - begin, 0), s.decay};
}

// What an op reads of the pack. Its indices are in every op's reach that reads any of it; few read pixels.
typedef enum PackUse { READS_NONE, READS_PACK, READS_PIXELS } PackUse;

// How much of an operand an op touches in a pack that fills its capacity partly.
typedef enum OperandExtent {
  OF_WHOLE,    // all of it, whatever is in the pack
  OF_ROWS,     // text and image rows
  OF_TARGETS,  // text rows with a target
  OF_SEGMENTS, // rows of segments
  OF_SITE,     // of the modulation table [SEG, M] one site's columns, in the rows of segments
  OF_READ,     // the rows that args.linear.extent names
  OF_WRITTEN,  // the same, but zeros elsewhere are written too
  OF_SLOTS_F,  // two-sided, a row an assignment: [T K_m, F_m], or multiples of F_m
  OF_SLOTS_C,  // the same, [T K_m, C]
  OF_SHARED,   // two-sided, [T, S_m], or multiples of S_m
  OF_TOKENS,   // of a table [V, C] the rows of the pack's tokens
  OF_CHUNKS    // one chunk of logits, through which every target goes: written, and read three times
} OperandExtent;

enum { OPTIONAL = 1, ADDS_ALWAYS = 2, ADDS_IF_ASKED = 4 }; // ADDS: an output that is read too, always or by args

// OP(name, pack, flops, inputs, outputs): what it reads of the pack; its FLOPs; then operands in order,
// IN(name, extent, marks), with _PAIR one for each modality. FLOPs are counted for the pack whose extents are x
// (model/program/cost.h), with `rows` = its text and image rows and what else op_flops() in cost.c names. Elementwise
// ops are counted at a few FLOPs an element, transcendental functions as one.
//
// Structs, names, checks, costs, the order of operands in a program and the tests' calls follow from here.
// clang-format off
#define OP_TABLE(OP, IN, IN_PAIR, OUT, OUT_PAIR)                                                                       \
  OP(COPY, NONE, 0, IN(src, WHOLE), OUT(dst, WHOLE))                                                                   \
  OP(ZERO, NONE, 0, , OUT(dst, WHOLE))                                                                                 \
  OP(ADD, NONE, out, IN(src, WHOLE), OUT(dst, WHOLE, ADDS_IF_ASKED))                                                   \
  OP(NOISE, PIXELS, 20 * x->image * d->P, , OUT(z, ROWS))                                                              \
  OP(LINEAR_FWD, PACK, linear_flops(x, args),                                                                          \
     IN(x, READ) IN_PAIR(w, WHOLE, OPTIONAL) IN(bias, WHOLE, OPTIONAL), OUT(y, WRITTEN))                               \
  OP(LINEAR_DGRAD, PACK, linear_flops(x, args),                                                                        \
     IN(dy, READ) IN_PAIR(w, WHOLE, OPTIONAL) IN(add, READ, OPTIONAL), OUT(dx, WRITTEN))                               \
  OP(LINEAR_WGRAD, PACK, linear_flops(x, args), IN(dy, READ) IN(x, READ),                                              \
     OUT_PAIR(dw, WHOLE, (OPTIONAL | ADDS_IF_ASKED)) OUT(dbias, WHOLE, (OPTIONAL | ADDS_IF_ASKED)))                    \
  OP(EMBED_FWD, PACK, 0, IN(E, TOKENS) IN(image_rows, ROWS), OUT(x, ROWS))                                             \
  OP(EMBED_BWD, PACK, 2 * rows * d->C, IN(dx, ROWS) IN(dmean, SEGMENTS), OUT(dE, WHOLE, ADDS_IF_ASKED))                \
  OP(POOL_FWD, PACK, 2 * rows * d->C, IN(E, TOKENS), OUT(pooled, SEGMENTS))                                            \
  OP(POOL_BWD, PACK, 2 * rows * d->C, IN(dpooled, SEGMENTS) IN(E, TOKENS), OUT(dmean, SEGMENTS))                       \
  OP(TIME_FEATURES, PACK, 6 * out, , OUT(features, SEGMENTS))                                                          \
  OP(SILU_FWD, PACK, 6 * out, IN(x, SEGMENTS), OUT(y, SEGMENTS))                                                       \
  OP(SILU_BWD, PACK, 6 * out, IN(dy, SEGMENTS) IN(x, SEGMENTS), OUT(dx, SEGMENTS))                                     \
  OP(COND_FWD, PACK, 6 * out, IN(time, SEGMENTS) IN(pool, SEGMENTS) IN(e_kind, WHOLE),                                 \
     OUT(c, SEGMENTS) OUT(a, SEGMENTS))                                                                                \
  OP(COND_BWD, PACK, 6 * out, IN(da, SEGMENTS) IN(c, SEGMENTS),                                                        \
     OUT(dc, SEGMENTS) OUT(de_kind, WHOLE, ADDS_IF_ASKED))                                                             \
  OP(MOD_FWD, PACK, 2 * x->segments * d->Z * d->M, IN(a, SEGMENTS) IN(U, WHOLE) IN(S, WHOLE), OUT(mod, SEGMENTS))      \
  OP(MOD_BWD, PACK, x->segments * d->M, IN(dmod, SEGMENTS), OUT(dS, WHOLE, ADDS_IF_ASKED))                             \
  OP(ADALN_FWD, PACK, 10 * rows * d->C, IN(x, ROWS) IN(branch, ROWS, OPTIONAL) IN(mod, SITE),                          \
     OUT(xnew, ROWS, OPTIONAL) OUT(h, ROWS) OUT(mean, ROWS) OUT(rstd, ROWS))                                           \
  OP(ADALN_BWD, PACK, 20 * rows * d->C,                                                                                \
     IN(dh, ROWS) IN(dxnew, ROWS, OPTIONAL) IN(x, ROWS) IN(branch, ROWS, OPTIONAL) IN(mod, SITE) IN(mean, ROWS)        \
     IN(rstd, ROWS), OUT(dx, ROWS) OUT(dbranch, ROWS, OPTIONAL) OUT(dmod, SITE))                                       \
  OP(QKNORM_ROPE_FWD, PACK, 9 * qk, IN(qkv, ROWS) IN(wq, WHOLE) IN(wk, WHOLE),                                         \
     OUT(q, ROWS) OUT(k, ROWS) OUT(v, ROWS))                                                                           \
  OP(QKNORM_ROPE_BWD, PACK, 20 * qk,                                                                                   \
     IN(dq, ROWS) IN(dk, ROWS) IN(dv, ROWS) IN(qkv, ROWS) IN(wq, WHOLE) IN(wk, WHOLE),                                 \
     OUT(dqkv, ROWS) OUT(dwq, WHOLE, ADDS_IF_ASKED) OUT(dwk, WHOLE, ADDS_IF_ASKED))                                    \
  OP(ATTENTION_FWD, PACK, 4 * x->pairs * heads, IN(q, ROWS) IN(k, ROWS) IN(v, ROWS), OUT(o, ROWS) OUT(lse, ROWS))      \
  OP(ATTENTION_BWD, PACK, 10 * x->pairs * heads,                                                                       \
     IN(dout, ROWS) IN(o, ROWS) IN(q, ROWS) IN(k, ROWS) IN(v, ROWS) IN(lse, ROWS),                                     \
     OUT(dq, ROWS) OUT(dk, ROWS) OUT(dv, ROWS))                                                                        \
  OP(ATTENTION_ROPE_BWD, PACK, 10 * x->pairs * heads + 20 * qk,                                                        \
     IN(dout, ROWS) IN(o, ROWS) IN(q, ROWS) IN(k, ROWS) IN(v, ROWS) IN(lse, ROWS) IN(qkv, ROWS) IN(wq, WHOLE)          \
     IN(wk, WHOLE),                                                                                                    \
     OUT(dqkv, ROWS) OUT(dwq, WHOLE, ADDS_IF_ASKED) OUT(dwk, WHOLE, ADDS_IF_ASKED) OUT(work, ROWS))                    \
  OP(ROUTER_FWD, PACK, 2 * d->C * scores, IN(h, ROWS) IN_PAIR(wr, WHOLE),                                              \
     OUT(logits, ROWS) OUT(weights, ROWS) OUT(route, ROWS))                                                            \
  OP(ROUTER_LOSS, PACK, 4 * scores, IN(logits, ROWS) IN(route, ROWS), OUT(metrics, WHOLE, ADDS_ALWAYS))                \
  OP(ROUTER_BWD, PACK, 4 * d->C * scores,                                                                              \
     IN(dweights, ROWS) IN(logits, ROWS) IN(weights, ROWS) IN(route, ROWS) IN(h, ROWS) IN_PAIR(wr, WHOLE)              \
     IN(add, ROWS, OPTIONAL), OUT(dh, ROWS) OUT_PAIR(dwr, WHOLE, ADDS_IF_ASKED))                                       \
  OP(EXPERT_UP_FWD, PACK, 2 * experts, IN(h, ROWS) IN(route, ROWS) IN_PAIR(w1, WHOLE),                                 \
     OUT(pre, SLOTS_F) OUT(a, SLOTS_F))                                                                                \
  OP(EXPERT_DOWN_FWD, PACK, experts, IN(a, SLOTS_F) IN(route, ROWS) IN_PAIR(w2, WHOLE), OUT(y, SLOTS_C))               \
  OP(EXPERT_COMBINE, PACK, combine,                                                                                    \
     IN(y, SLOTS_C) IN(route, ROWS) IN(weights, ROWS, OPTIONAL) IN(add, ROWS, OPTIONAL), OUT(out, ROWS))               \
  OP(EXPERT_DOWN_BWD, PACK, experts, IN(dout, ROWS) IN(pre, SLOTS_F) IN(weights, ROWS) IN(route, ROWS)                 \
     IN_PAIR(w2, WHOLE), OUT(dpre, SLOTS_F) OUT(sa, SLOTS_F) OUT(dweights, ROWS))                                      \
  OP(EXPERT_DOWN_WGRAD, PACK, experts, IN(dout, ROWS) IN(sa, SLOTS_F) IN(route, ROWS),                                 \
     OUT_PAIR(dw2, WHOLE, ADDS_IF_ASKED))                                                                              \
  OP(EXPERT_UP_DGRAD, PACK, 2 * experts, IN(dpre, SLOTS_F) IN(route, ROWS) IN_PAIR(w1, WHOLE), OUT(dslot, SLOTS_C))    \
  OP(EXPERT_UP_WGRAD, PACK, 2 * experts, IN(dpre, SLOTS_F) IN(h, ROWS) IN(route, ROWS),                                \
     OUT_PAIR(dw1, WHOLE, ADDS_IF_ASKED))                                                                              \
  OP(COMBINE_ADALN_FWD, PACK, combine + 10 * rows * d->C,                                                              \
     IN(y, SLOTS_C) IN(route, ROWS) IN(weights, ROWS) IN(add, ROWS, OPTIONAL) IN(x, ROWS) IN(mod, SITE),               \
     OUT(b2, ROWS, OPTIONAL) OUT(xnew, ROWS) OUT(h, ROWS) OUT(mean, ROWS) OUT(rstd, ROWS))                             \
  OP(COMBINE_ADALN_BWD, PACK, combine + 20 * rows * d->C,                                                              \
     IN(dslot, SLOTS_C) IN(route, ROWS) IN(add, ROWS) IN(dxnew, ROWS) IN(x, ROWS) IN(branch, ROWS) IN(mod, SITE)       \
     IN(mean, ROWS) IN(rstd, ROWS), OUT(dx, ROWS) OUT(dbranch, ROWS) OUT(dmod, SITE))                                  \
  OP(SHARED_UP_FWD, PACK, 2 * shared, IN(h, ROWS) IN_PAIR(w1, WHOLE, OPTIONAL), OUT(pre, SHARED) OUT(a, SHARED))       \
  OP(SHARED_DOWN_BWD, PACK, shared, IN(dout, ROWS) IN(pre, SHARED) IN_PAIR(w2, WHOLE, OPTIONAL),                       \
     OUT(dpre, SHARED) OUT(a, SHARED))                                                                                 \
  OP(HEAD_CE, PACK, 2 * head_products(op) * x->targets * d->C * d->V,                                                  \
     IN(h, TARGETS) IN(wout, WHOLE),                                                                                   \
     OUT(nll, ROWS) OUT(dh, ROWS, OPTIONAL) OUT(dwout, WHOLE, (OPTIONAL | ADDS_IF_ASKED))                              \
     OUT(metrics, WHOLE, ADDS_ALWAYS) OUT(work, CHUNKS))                                                               \
  OP(HEAD_LOGITS, PACK, 2 * d->C * out, IN(h, ROWS) IN(wout, WHOLE), OUT(logits, ROWS))                                \
  OP(FLOW_LOSS, PIXELS, 6 * x->image * d->P, IN(xhat, ROWS),                                                           \
     OUT(dxhat, ROWS, OPTIONAL) OUT(seg_error, SEGMENTS) OUT(metrics, WHOLE, ADDS_ALWAYS))                             \
  OP(GRAD_SQUARES, NONE, 2 * params_count(args), IN(grads, WHOLE), OUT(squares, WHOLE))                                \
  OP(GRAD_DECIDE, NONE, 0, IN(squares, WHOLE) IN(metrics, WHOLE) IN(scalars, WHOLE), OUT(status, WHOLE))               \
  OP(GRAD_HASH, NONE, 0, IN(grads, WHOLE), OUT(hash, WHOLE))                                                           \
  OP(ADAMW, NONE, adamw_flops(op) * params_count(args), IN(grads, WHOLE) IN(status, WHOLE) IN(scalars, WHOLE),                      \
     OUT(weights, WHOLE, ADDS_ALWAYS) OUT(m, WHOLE, ADDS_ALWAYS) OUT(v, WHOLE, ADDS_ALWAYS)                            \
     OUT(remainder, WHOLE, (OPTIONAL | ADDS_ALWAYS)) OUT(ema, WHOLE, (OPTIONAL | ADDS_ALWAYS)))                        \
  OP(CAST, NONE, 0, IN(src, WHOLE), OUT(dst, WHOLE))                                                                   \
  OP(ALL_REDUCE, NONE, args->group.count, , OUT(values, WHOLE, ADDS_ALWAYS))                                           \
  OP(REDUCE_SCATTER, NONE, args->group.count, , OUT(values, WHOLE, ADDS_ALWAYS))                                       \
  OP(ALL_GATHER, NONE, 0, , OUT(values, WHOLE, ADDS_ALWAYS))

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
// ATTENTION_BWD   dout, o in row order; dq [T,H,D], dk, dv [T,G,D] in sequence order; filler 0.
// ATTENTION_ROPE_BWD ATTENTION_BWD(dout, o, q, k, v, lse) gives dq, dk, dv, rounded to their storage type;
//                 QKNORM_ROPE_BWD(dq, dk, dv, qkv, wq, wk) gives dqkv, dwq, dwk: both with the bits of the two ops. work:
//                 room for dq, dk and dv.
// ROUTER_FWD      logits (two-sided, R = 1, widths E_m; filler rows 0) = h Wr_m^T in DT_REAL; top-k of each row, ties
//                 to the lower index, in descending order; weights [T,Kmax] = softmax over the chosen logits (K_m = 1:
//                 the full-softmax probability), 0 where unused; route (struct Route). Where loads are to be even,
//                 choice j of a modality's i-th row is expert (i K_m + j) mod E_m instead.
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
// SHARED_UP_FWD   the shared expert: pre = h W1_m^T (two-sided, R = 1, widths 2 S_m; W1 [2S,C], rows as the experts'), a =
//                 silu(gate) * up (widths S_m). Filler rows of both 0. A width of 0 has no weight (NULL). (The other
//                 products are LINEAR ops, EXT_SPLIT.)
// SHARED_DOWN_BWD dA = dout W2_m (W2 [C,S]); dpre = gradient of pre; also rebuilds a. Filler rows of both 0.
// HEAD_CE         text rows with a target, in chunks of args.chunk rows: logits = h Wout^T, nll [T] DT_REAL (0
//                 elsewhere), dlogits = ce_scale (softmax - onehot) in place, dh = dlogits Wout (0 elsewhere), dWout
//                 (+)= dlogits^T h. dh and dwout both absent: loss only. Adds to metrics->nll, ->targets. work: [chunk,
//                 V] DT_REAL. Overwrites dWout unless accumulating, also with no targets.
// HEAD_LOGITS     logits [n_target, V] DT_REAL of the rows target_row; n_target is at most the rows that the recording
//                 gave `logits`.
// FLOW_LOSS       noised image rows: err = xhat - x, w = 1/max(1-t, t_floor)^2; adds sum w err^2 to metrics->flow and
//                 the number of elements to ->flow_elems; dxhat = 2 flow_scale w err (0 in other rows); seg_error [SEG]
//                 DT_REAL = mean err^2 over the segment's elements (0 for clean and unused).
// GRAD_SQUARES    squares [n, EXACT_WORDS] F64: of each parameter's gradient, the sum of g^2 as an exact sum (exact.h) of
//                 those of 64 elements, from its first on; processes add up the words of their shares.
// GRAD_DECIDE     status from the squares of all n parameters and the losses in metrics: norm = sqrt(sum of squares),
//                 scale = min(1, scalars->clip / norm) (1 with clip 0); skip and bad as UpdateStatus says.
// GRAD_HASH       hash [n] U64: of each parameter's gradient, the sum modulo 2^64 of bits_mix(bits of g[i], i)
//                 over its elements i (kernels/bits.h). Equal bits, equal hash, in any order of summation.
// ADAMW           decoupled weight decay (Loshchilov and Hutter 2019): g = scale * grad; m = beta1 m + (1 - beta1) g, v
//                 = beta2 v + (1 - beta2) g^2; w -= lr (m^ / (sqrt(v^) + eps) + weight_decay w [decay]) with m^ = m /
//                 bias1, v^ = v / bias2. w is the weight itself, or with remainder [n] U16 the fp32 master that the two
//                 stand for (master_join). ema += (1 - ema_decay) (w - ema), w as it is then. m and v [n]
//                 DT_MOMENT, with args.bf16_moments as moment_round rounds them. Does nothing with status->skip.
// CAST            dst (DT_ACT) = src (DT_REAL), count elements, rounded to nearest.
// ALL_REDUCE      of the process group (base/ranks.h), on the comm lane, and so in the same order in all processes:
//                 values = the sum of what every process has there, added in the order of ranks.
// REDUCE_SCATTER  of the group, likewise: of N processes that of rank r gets the sums of the r-th of N equal shares of
//                 values; what the others of its shares hold then is of no use.
// ALL_GATHER      of the group: of N equal shares of values rank r has the r-th, and gets all others.
// clang-format on
#endif
