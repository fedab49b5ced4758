// The sum over a token's experts, gate + residual and the next AdaLN (or, backward, the gradient's sum over the experts
// and the AdaLN's backward) in one kernel each way: the sum is never read back.
//
// Both kernels are bound by memory. With K experts a token, forward moves 2 (K + 4) bytes an element (K rows of y and x
// in; b2, xnew, h out) and 2 more with a shared expert, backward 2 (K + 6) (K rows of dslot, the router's gradient,
// dxnew, x, branch in; dx, dbranch out) and the sums over segments.
#include "kernels/cuda/adaln_rows.h"

#include <limits.h>

static constexpr unsigned ALL = 0xffffffffu; // lanes of a warp
enum { TOGETHER = 4 };                       // experts whose rows are asked for together
enum { COMBINE_THREADS = 64 }; // of a forward block: few, so that blocks are at different stages of their rows

typedef struct Combine {
  const bf16 *y[MODALITIES]; // [slots, C] views
  const int32_t *slot;       // [T, Kmax]
  const float *weights;      // [T, Kmax] or NULL
  const bf16 *add;           // [T, C] or NULL
  int kmax, K[MODALITIES];
} Combine;

static Combine combine_of(const KernelCall *c, const void *weights, const void *add) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  Route route;
  route_bind(&route, d, (int32_t *)(uintptr_t)c->in[1]);
  Combine s = {};
  s.slot = route.slot;
  s.weights = (const float *)weights;
  s.add = (const bf16 *)add;
  s.kmax = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    s.y[m] = (const bf16 *)c->in[0] + two_sided_base(d->T, d->K, C, m);
    s.K[m] = d->K[m];
  }
  return s;
}

// A row's assignments by ascending expert, which is the order of the slots: lane n of a warp holds the n-th of k.
typedef struct Picks {
  int slot, k;
  float weight;
} Picks;

// Whole warps, all of the same row.
static __device__ inline Picks picks_load(const Combine &s, int64_t r, int n_text) {
  const int lane = threadIdx.x & 31;
  Picks p = {0, r < n_text ? s.K[TEXT] : s.K[IMAGE], 1};
  const int mine = lane < p.k ? __ldg(s.slot + r * s.kmax + lane) : INT_MAX;
  const float weight = lane < p.k && s.weights ? __ldg(s.weights + r * s.kmax + lane) : 1;
  for (int n = 0, last = -1; n < p.k; n++) {
    const int next = __reduce_min_sync(ALL, mine > last ? mine : INT_MAX);
    const float w = __shfl_sync(ALL, weight, __ffs(__ballot_sync(ALL, mine == next)) - 1);
    if (lane == n) {
      p.slot = next;
      p.weight = w;
    }
    last = next;
  }
  return p;
}

// 8 columns of what a row's sum is made of, on their way: those of the experts from `first` on.
typedef struct Parts {
  uint4 y[TOGETHER];
} Parts;

static __device__ inline void parts_load(Parts *parts, int first, const Combine &s, const Picks &p, bool text, int C,
                                         int column, bool there) {
  const bf16 *y = (text ? s.y[TEXT] : s.y[IMAGE]) + column;
#pragma unroll
  for (int n = 0; n < TOGETHER; n++)
    parts->y[n] = load_once(y + (int64_t)__shfl_sync(ALL, p.slot, first + n) * C, there && first + n < p.k);
}

// The same additions as EXPERT_COMBINE's.
static __device__ inline void parts_add(float sum[8], const Parts &parts, int first, const Picks &p) {
#pragma unroll
  for (int n = 0; n < TOGETHER; n++) {
    if (first + n >= p.k) break;
    const float weight = __shfl_sync(ALL, p.weight, first + n);
    float x[8];
    unpack8(parts.y[n], x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(weight, x[i], sum[i]);
  }
}

// ---- forward ----

template <class L>
static __global__ void __launch_bounds__(COMBINE_THREADS)
    combine_adaln_forward(const AdalnForward f, const Combine s, bf16 *b2) {
  int lane = threadIdx.x % L::LANES, vectors = f.C / 8;
  int64_t r = (int64_t)blockIdx.x * (COMBINE_THREADS / L::LANES) + threadIdx.x / L::LANES;
  if (r >= f.T) return;
  int64_t at = r * f.C + 8 * lane;
  uint4 x[L::VEC];
#pragma unroll
  for (int v = 0; v < L::VEC; v++) x[v] = load_once(f.x + at + 8 * v * L::LANES, lane + v * L::LANES < vectors);
  int n_text = f.dims->n_text;
  if (r >= n_text + f.dims->n_image) {
    adaln_row_zero<L>(b2, at, lane, vectors);
    adaln_row_filler<L>(f, r, lane);
    return;
  }

  const Picks picks = picks_load(s, r, n_text);
  const bf16 *mod = f.mod + f.segment[r] * f.M + 8 * lane;
  float sum = 0;
#pragma unroll
  for (int v = 0; v < L::VEC; v++) {
    int column = 8 * (lane + v * L::LANES);
    bool there = column < f.C;
    float gate[8], b[8];
    uint4 add = load_once(s.add + at + 8 * v * L::LANES, there && s.add);
    Parts parts;
    parts_load(&parts, 0, s, picks, r < n_text, f.C, column, there);
    load_mod8(mod + f.gate + 8 * v * L::LANES, there, gate);
    unpack8(add, b);
    parts_add(b, parts, 0, picks);
    for (int first = TOGETHER; first < picks.k; first += TOGETHER) {
      parts_load(&parts, first, s, picks, r < n_text, f.C, column, there);
      parts_add(b, parts, first, picks);
    }
    uint4 branch = pack8(b);
    if (there && b2) *reinterpret_cast<uint4 *>(b2 + at + 8 * v * L::LANES) = branch;
    x[v] = adaln_residual(x[v], gate, branch);
    if (there) *reinterpret_cast<uint4 *>(f.xnew + at + 8 * v * L::LANES) = x[v];
    sum = adaln_add8(sum, x[v]);
  }
  adaln_row_norm<L>(f, x, sum, mod, r, lane, n_text);
}

extern "C" void cuda_COMBINE_ADALN_FWD(const KernelCall *c) {
  const AdalnForward f = adaln_forward_of(c, c->in[4], c->in[5], c->out + 1);
  const Combine s = combine_of(c, c->in[2], c->in[3]);
  bf16 *b2 = (bf16 *)c->out[0]; // [T, C] or NULL
  adaln_layout(f.C, [&](auto layout) {
    using L = decltype(layout);
    int grid = ceil_div(f.T, COMBINE_THREADS / L::LANES);
    CUDA_LAUNCH(combine_adaln_forward<L>, grid, COMBINE_THREADS, 0, call_stream(c), f, s, b2);
  });
}

// ---- backward ----

// dh as the sum over the experts.
typedef struct CombinedGradient {
  Combine s;

  typedef struct Ahead {
    Picks picks;
    Parts parts; // of the first experts; the others', which few models have, are asked for when they are due
    uint4 add;
  } Ahead;
  __device__ inline void load(Ahead *ahead, int r, int n_text, int C, int column, bool there) const {
    ahead->picks = picks_load(s, r, n_text);
    parts_load(&ahead->parts, 0, s, ahead->picks, r < n_text, C, column, there);
    ahead->add = load_once(s.add + (int64_t)r * C + column, there);
  }
  __device__ inline uint4 value(const Ahead &ahead, int r, int n_text, int C, int column, bool there) const {
    float sum[8];
    unpack8(ahead.add, sum);
    parts_add(sum, ahead.parts, 0, ahead.picks);
    for (int first = TOGETHER; first < ahead.picks.k; first += TOGETHER) {
      Parts parts;
      parts_load(&parts, first, s, ahead.picks, r < n_text, C, column, there);
      parts_add(sum, parts, first, ahead.picks);
    }
    return pack8(sum);
  }
} CombinedGradient;

extern "C" void cuda_COMBINE_ADALN_BWD(const KernelCall *c) {
  const AdalnBackward b = adaln_backward_of(c, c->in + 3);
  const CombinedGradient dh = {combine_of(c, NULL, c->in[2])};
  const AdalnRuns runs = adaln_runs(b.C);
  CUDA_LAUNCH((adaln_backward<CombinedGradient, true, false>), runs.blocks, 32 * runs.warps * runs.groups, 0,
              call_stream(c), b, dh);
  adaln_backward_sums(c, &b);
}
