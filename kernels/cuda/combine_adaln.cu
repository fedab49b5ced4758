// The sum over a token's experts, gate + residual and the next AdaLN (or, backward, the gradient's sum over the experts
// and the AdaLN's backward) in one kernel each way: the sum is never read back.
//
// Both kernels are bound by memory. With K experts a token, forward moves 2 (K + 4) bytes an element (K rows of y and x
// in; b2, xnew, h out) and 2 more with a shared expert, backward 2 (K + 6) (K rows of dslot, the router's gradient,
// dxnew, x, branch in; dx, dbranch out) and the sums over segments.
#include "kernels/cuda/adaln_rows.h"
#include "kernels/cuda/combine.h"

#include <limits.h>

enum { TOGETHER = 4 }; // experts whose rows are loaded together; few models have more for a token

// Assignments of a row, in registers of every thread. `weights` below is the Combine's, or a NULL that the compiler
// sees: the gradient's sum has none, and no registers for them.
typedef struct Picks {
  int slot[TOGETHER];
  float weight[TOGETHER];
} Picks;

// The first assignments of row r in the router's order, whether or not they are used.
static __device__ inline Picks picks_load(const Combine &s, const float *weights, int64_t r) {
  Picks p;
#pragma unroll
  for (int n = 0; n < TOGETHER; n++) {
    p.slot[n] = n < s.kmax ? __ldg(s.slot + r * s.kmax + n) : INT_MAX;
    p.weight[n] = n < s.kmax && weights ? __ldg(weights + r * s.kmax + n) : 1;
  }
  return p;
}

// The assignment with the lesser slot goes to a.
static __device__ inline void picks_order(int *slot_a, float *weight_a, int *slot_b, float *weight_b) {
  const int slot = *slot_a;
  const float weight = *weight_a;
  const bool swap = slot > *slot_b;
  *slot_a = swap ? *slot_b : slot;
  *weight_a = swap ? *weight_b : weight;
  *slot_b = swap ? slot : *slot_b;
  *weight_b = swap ? weight : *weight_b;
}

// Of row r's k assignments the TOGETHER least with slots after `after`.
static __device__ inline Picks picks_next(const Combine &s, const float *weights, int64_t r, int k, int after) {
  Picks p;
#pragma unroll
  for (int n = 0; n < TOGETHER; n++) {
    p.slot[n] = INT_MAX;
    p.weight[n] = 0;
  }
  for (int j = 0; j < k; j++) {
    int slot = __ldg(s.slot + r * s.kmax + j);
    float weight = weights ? __ldg(weights + r * s.kmax + j) : 1;
    if (slot <= after) continue;
#pragma unroll
    for (int n = 0; n < TOGETHER; n++) picks_order(&p.slot[n], &p.weight[n], &slot, &weight);
  }
  return p;
}

// By ascending expert, which is the order of the slots: the first TOGETHER of row r's k assignments, from what
// picks_load has loaded of it where that is all of them.
static __device__ inline void picks_sort(Picks *p, const Combine &s, const float *weights, int64_t r, int k) {
  if (k > TOGETHER) {
    *p = picks_next(s, weights, r, k, -1);
    return;
  }
#pragma unroll
  for (int n = 0; n < TOGETHER; n++)
    if (n >= k) p->slot[n] = INT_MAX;
#pragma unroll
  for (int last = TOGETHER - 1; last; last--)
#pragma unroll
    for (int n = 0; n < last; n++) picks_order(&p->slot[n], &p->weight[n], &p->slot[n + 1], &p->weight[n + 1]);
}

// 8 columns, from `column` on, of the rows of at most k picks, on their way. `y`: the view's first row.
typedef struct Parts {
  uint4 y[TOGETHER];
} Parts;

static __device__ inline void parts_load(Parts *parts, const bf16 *y, const Picks &p, int k, int C, int column) {
#pragma unroll
  for (int n = 0; n < TOGETHER; n++) parts->y[n] = load_once(y + (int64_t)p.slot[n] * C + column, column < C && n < k);
}

static __device__ inline void parts_add(float sum[8], const Parts &parts, const Picks &p, int k) {
#pragma unroll
  for (int n = 0; n < TOGETHER; n++) {
    if (n >= k) break;
    float x[8];
    unpack8(parts.y[n], x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(p.weight[n], x[i], sum[i]);
  }
}

// The parts of a row's k picks after those in p; all is waited for, in turn.
static __device__ inline void parts_add_others(float sum[8], const Combine &s, const float *weights, const bf16 *y,
                                               Picks p, int64_t r, int k, int C, int column) {
  for (int left = k - TOGETHER; left > 0; left -= TOGETHER) {
    p = picks_next(s, weights, r, k, p.slot[TOGETHER - 1]);
    Parts parts;
    parts_load(&parts, y, p, left, C, column);
    parts_add(sum, parts, p, left);
  }
}

// ---- forward ----

template <class L>
static __global__ void __launch_bounds__(L::THREADS)
    combine_adaln_forward(const AdalnForward f, const Combine s, bf16 *b2) {
  await_previous();
  const AdalnRow row = adaln_row_of<L>(f);
  if (row.r >= f.T) return;
  Picks picks = picks_load(s, s.weights, row.r);
  int segment = __ldg(f.segment + row.r), n_text = __ldg(&f.dims->n_text), n_image = __ldg(&f.dims->n_image);
  uint4 x[L::VEC], add[L::VEC], gate[L::VEC], shift[L::VEC], scale[L::VEC];
  adaln_row_load<L>(x, f.x, row);
  adaln_row_load<L>(add, s.add, row);
  if (row.r >= n_text + n_image) {
    adaln_row_zero<L>(b2, row);
    adaln_row_filler<L>(f, row);
    return;
  }

  const int k = combine_experts(s, row.r, n_text);
  const bf16 *y = combine_slots(s, row.r, n_text), *mod = f.mod + segment * f.M;
  picks_sort(&picks, s, s.weights, row.r, k);
  Parts parts[L::VEC];
#pragma unroll
  for (int v = 0; v < L::VEC; v++) parts_load(&parts[v], y, picks, k, f.C, adaln_column<L>(row, v));
  adaln_mod_load<L>(gate, mod + f.gate, row);
  float sum = 0;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    float b[8];
    unpack8(add[v], b);
    parts_add(b, parts[v], picks, k);
    if (k > TOGETHER) parts_add_others(b, s, s.weights, y, picks, row.r, k, f.C, adaln_column<L>(row, v));
    uint4 branch = pack8(b);
    if (b2) adaln_row_store<L>(b2, row, v, branch);
    sum = adaln_row_residual<L>(f, row, v, x[v], gate[v], branch, sum);
  }
  // Only now, when the parts' registers are free.
  adaln_mod_load<L>(shift, mod + f.shift, row);
  adaln_mod_load<L>(scale, mod + f.scale, row);
  adaln_row_norm<L>(f, row, x, sum, shift, scale, n_text);
}

extern "C" void cuda_COMBINE_ADALN_FWD(const KernelCall *c) {
  const auto &in = c->in.COMBINE_ADALN_FWD;
  const auto &out = c->out.COMBINE_ADALN_FWD;
  KernelCall site = *c;
  site.in.ADALN_FWD = {in.x, NULL, in.mod};
  site.out.ADALN_FWD = {out.xnew, out.h, out.mean, out.rstd};
  const AdalnForward f = adaln_forward_of(&site);
  const Combine s = combine_of(c, in.y, in.route, in.weights, in.add);
  bf16 *b2 = (bf16 *)out.b2; // [T, C] or NULL
  adaln_layout(f.C, [&](auto layout) {
    using L = decltype(layout);
    CUDA_LAUNCH(combine_adaln_forward<L>, ceil_div(f.T, L::ROWS), L::THREADS, 0, call_stream(c), f, s, b2);
  });
}

// ---- backward ----

// dh as the sum over the experts. Rows are loaded with their slots at hand: those of the row `groups` further, which
// is next but at a piece's end, are on their way since the row before.
typedef struct CombinedGradient {
  Combine s;
  int groups, last; // last: T - 1

  typedef struct Ahead {
    Picks picks, next; // next: not sorted
    int next_row = -1;
    Parts parts; // of the first experts; the others' are loaded when they are due
    uint4 add;
  } Ahead;
  __device__ inline void load(Ahead *ahead, int r, int n_text, int C, int column, bool there) const {
    const int k = combine_experts(s, r, n_text);
    ahead->picks = ahead->next_row == r ? ahead->next : picks_load(s, NULL, r);
    ahead->next_row = min(r + groups, last);
    ahead->next = picks_load(s, NULL, ahead->next_row);
    picks_sort(&ahead->picks, s, NULL, r, k);
    parts_load(&ahead->parts, combine_slots(s, r, n_text), ahead->picks, k, C, column);
    ahead->add = load_once(s.add + (int64_t)r * C + column, there);
  }
  __device__ inline uint4 value(const Ahead &ahead, int r, int n_text, int C, int column, bool) const {
    const int k = combine_experts(s, r, n_text);
    float sum[8];
    unpack8(ahead.add, sum);
    parts_add(sum, ahead.parts, ahead.picks, k);
    if (k > TOGETHER) parts_add_others(sum, s, NULL, combine_slots(s, r, n_text), ahead.picks, r, k, C, column);
    return pack8(sum);
  }
} CombinedGradient;

extern "C" void cuda_COMBINE_ADALN_BWD(const KernelCall *c) {
  const auto &in = c->in.COMBINE_ADALN_BWD;
  const auto &out = c->out.COMBINE_ADALN_BWD;
  KernelCall site = *c;
  site.in.ADALN_BWD = {NULL, in.dxnew, in.x, in.branch, in.mod, in.mean, in.rstd};
  site.out.ADALN_BWD = {out.dx, out.dbranch, out.dmod};
  const AdalnBackward b = adaln_backward_of(&site);
  const AdalnRuns runs = adaln_runs(b.C);
  const CombinedGradient dh = {combine_of(c, in.dslot, in.route, NULL, in.add), runs.groups, b.T - 1};
  CUDA_LAUNCH((adaln_backward<CombinedGradient, true, false>), runs.blocks, 32 * runs.warps * runs.groups, 0,
              call_stream(c), b, dh);
  adaln_backward_sums(&site, &b, runs.blocks);
}
