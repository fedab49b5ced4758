// QK-norm and rotary positions: qkv in row order -> q, k, v in sequence order, and back. One kernel each way, bound by
// memory; the backward one leaves sums for dwq and dwk, which a second, small kernel adds up. Behind a backward
// attention that leaves dq as sums in fp32 it takes these (ATTENTION_ROPE_BWD), which nothing else has to read and
// round.
//
// A thread holds 8 elements (4 rotary pairs) of a head: D / 8 lanes make a head, a warp walks over the heads of one
// token. All heads of a token turn by the same angles, which are computed once a token.
#include "kernels/cuda/attention_pass.h"
#include "kernels/cuda/sums.h"

#include <math.h>

enum { FORWARD_THREADS = 256, FORWARD_WARPS = FORWARD_THREADS / 32 };
enum { BACKWARD_THREADS = 128, BACKWARD_WARPS = BACKWARD_THREADS / 32, RUN_ROWS = 16 }; // RUN_ROWS: rows of a block
enum { MAX_HEAD = 128 };

static const float norm_eps = 1e-6f;

typedef struct Rope {
  const int32_t *seq;      // [T] row -> sequence
  const int32_t *position; // [T, 2] sequence order
  const BatchDims *dims;
  int T, H, G;
  float freq[MAX_HEAD / 2]; // 10000^(-2j/D), rounded from double: at position 4096 one ulp would turn by 2e-4
} Rope;

static Rope rope_of(const KernelCall *c) {
  const Dims *d = c->dims;
  Rope p = {};
  p.seq = c->batch->seq;
  p.position = c->batch->position;
  p.dims = c->batch->dims;
  p.T = d->T;
  p.H = d->H;
  p.G = d->G;
  for (int j = 0; j < d->D / 2; j++) p.freq[j] = (float)pow(10000.0, -2.0 * j / d->D);
  return p;
}

// sin and cos of 0 <= angle < 1e5, to about 1e-7: reduced by multiples of pi/2 in three steps, then Cephes' sinf and
// cosf. (sincosf keeps a slow path for huge angles on the stack.)
static __device__ inline void sine_cosine(float angle, float *sine, float *cosine) {
  float turns = rintf(angle * 0.636619772f);
  float x = __fmaf_rn(turns, -1.57079601e+00f, angle);
  x = __fmaf_rn(turns, -3.13916473e-07f, x);
  x = __fmaf_rn(turns, -5.39030253e-15f, x);
  float z = x * x;
  float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  float c =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  int quadrant = (int)turns;
  float even = quadrant & 1 ? s : c, odd = quadrant & 1 ? c : s;
  *cosine = (quadrant + 1) & 2 ? -even : even;
  *sine = quadrant & 2 ? -odd : odd;
}

// A lane's place: which 8 elements of a head, and which of the heads that the warp works on at a time.
template <int D> struct HeadLane {
  static constexpr int parts = D / 8, heads = 32 / parts;
  static_assert(D == 32 || D == 64 || D == MAX_HEAD, "lanes form whole heads, and D / 64 of the turns each");
  int part, head;
  __device__ HeadLane() : part((threadIdx.x & 31) % parts), head((threadIdx.x & 31) / parts) {}
  // Over the lanes of one head.
  static __device__ float sum(float v) {
#pragma unroll
    for (int d = parts / 2; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
  }
};

// The turns of the lane's 4 pairs at sequence slot s: even pairs turn by the row coordinate, odd pairs by the column.
// Lanes form D / 64 of them each and hand them round. Called by whole warps.
struct Turn {
  float cosine[4], sine[4];
};
template <int D> static __device__ inline Turn turn_at(const Rope &p, int s, int part) {
  constexpr int own = D > 64 ? D / 64 : 1;
  int2 at = __ldg(reinterpret_cast<const int2 *>(p.position) + s);
  float cosine[own], sine[own];
#pragma unroll
  for (int k = 0; k < own; k++) {
    int pair = ((threadIdx.x & 31) * own + k) % (D / 2);
    sine_cosine(__fmul_rn((float)(pair & 1 ? at.y : at.x), p.freq[pair]), &sine[k], &cosine[k]);
  }
  Turn t;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int from = (4 * part + i) / own;
    t.cosine[i] = __shfl_sync(0xffffffffu, cosine[i % own], from);
    t.sine[i] = __shfl_sync(0xffffffffu, sine[i % own], from);
  }
  return t;
}

static __device__ inline uint4 load_or_zero(const bf16 *p, bool there) {
  return there ? __ldg(reinterpret_cast<const uint4 *>(p)) : make_uint4(0, 0, 0, 0);
}

// The heads of one token: H of q, G of k, G of v, side by side in qkv, apart in sequence order.
struct Heads {
  int q, qk, all; // ends: H, H + G, H + 2G
};
static __device__ inline Heads heads_of(const Rope &p) {
  return {p.H, p.H + p.G, p.H + 2 * p.G};
}

// Where head `head` begins in one token's q [H, D], k [G, D], v [G, D].
template <int D, class T> static __device__ inline T *head_at(const Heads &n, int head, T *q, T *k, T *v) {
  return head < n.q ? q + head * D : head < n.qk ? k + (head - n.q) * D : v + (head - n.qk) * D;
}

// n bf16, a multiple of 8, by one warp.
static __device__ inline void warp_zero(bf16 *to, int n) {
  for (int i = (threadIdx.x & 31) * 8; i < n; i += 32 * 8) *reinterpret_cast<uint4 *>(to + i) = make_uint4(0, 0, 0, 0);
}

// ---- forward: a warp a token ----

template <int D>
static __global__ void __launch_bounds__(FORWARD_THREADS, 4)
    rope_forward(const __grid_constant__ Rope p, const bf16 *qkv, const bf16 *wq, const bf16 *wk, bf16 *q, bf16 *k,
                 bf16 *v) {
  await_previous(false);
  constexpr int unroll = 4, step = HeadLane<D>::heads;
  int r = blockIdx.x * FORWARD_WARPS + threadIdx.x / 32;
  if (r >= p.T) return;
  HeadLane<D> lane;
  Heads n = heads_of(p);
  int n_text = p.dims->n_text, s = p.seq[r], query = p.H * D, key = p.G * D;
  if (r >= n_text + p.dims->n_image) { // filler comes last in either order
    warp_zero(q + (int64_t)r * query, query);
    warp_zero(k + (int64_t)r * key, key);
    warp_zero(v + (int64_t)r * key, key);
    return;
  }
  const bf16 *x = qkv + (int64_t)r * n.all * D + 8 * lane.part;
  bf16 *to_q = q + (int64_t)s * query + 8 * lane.part;
  bf16 *to_k = k + (int64_t)s * key + 8 * lane.part, *to_v = v + (int64_t)s * key + 8 * lane.part;
  int weights = (r >= n_text) * D + 8 * lane.part;
  uint4 raw[unroll], weight_q = load_or_zero(wq + weights, true), weight_k = load_or_zero(wk + weights, true);
  Turn t;
  for (int base = 0; base < n.all; base += unroll * step) {
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      int head = base + u * step + lane.head;
      raw[u] = load_or_zero(x + head * D, head < n.all);
    }
    if (base == 0) t = turn_at<D>(p, s, lane.part); // while the first heads are on their way
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      int head = base + u * step + lane.head;
      uint4 y = raw[u];
      if (base + u * step < n.qk) { // some of the warp's heads are not v
        float a[8], w[8], squares = 0;
        unpack8(raw[u], a);
        unpack8(head < n.q ? weight_q : weight_k, w);
#pragma unroll
        for (int i = 0; i < 8; i++) squares += a[i] * a[i];
        float rstd = rsqrtf(HeadLane<D>::sum(squares) * (1.0f / D) + norm_eps);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float even = a[2 * i] * rstd * w[2 * i], odd = a[2 * i + 1] * rstd * w[2 * i + 1];
          a[2 * i] = even * t.cosine[i] - odd * t.sine[i];
          a[2 * i + 1] = odd * t.cosine[i] + even * t.sine[i];
        }
        if (head < n.qk) y = pack8(a);
      }
      if (head < n.all) *reinterpret_cast<uint4 *>(head_at<D>(n, head, to_q, to_k, to_v)) = y;
    }
  }
}

// ---- backward: a block RUN_ROWS rows ----

typedef struct RopeGradients {
  const bf16 *dq, *dk, *dv; // [T, H D], [T, G D] twice, sequence order
  const float *dq_sums;     // instead of dq: [H T, D] as attention_pass.h leaves it, to be multiplied by shape.scale
  const int32_t *doc_start; // [T] sequence order, with dq_sums
  AttentionShape shape;     // with dq_sums
  const bf16 *qkv;          // [T, (H+2G) D]
  const bf16 *wq, *wk;      // [2, D]
  bf16 *dqkv;               // [T, (H+2G) D]
  float *dwq, *dwk;         // [2, D]
  float *partial; // [blocks + 1][2][D]: block b's sums for dwq and dwk over text rows in slot b, image rows b + 1
} RopeGradients;

// What a lane reads of a row, for `unroll` heads at a time. SUMS: dq comes as sums.
template <int D, bool SUMS> struct RowReader {
  static constexpr int unroll = 2, step = HeadLane<D>::heads;
  const bf16 *x, *dq, *dk, *dv;
  int position, in_document; // from the pack's first and from the document's
  struct Raw {
    uint4 x[unroll], dy[unroll], dy_second[SUMS ? unroll : 1];
  };

  __device__ RowReader(const Rope &p, const RopeGradients &a, HeadLane<D> lane, int r, int s) {
    x = a.qkv + (int64_t)r * (p.H + 2 * p.G) * D + 8 * lane.part;
    dk = a.dk + (int64_t)s * p.G * D + 8 * lane.part, dv = a.dv + (int64_t)s * p.G * D + 8 * lane.part;
    if constexpr (SUMS) {
      position = s, in_document = s - a.doc_start[s];
    } else
      dq = a.dq + (int64_t)s * p.H * D + 8 * lane.part;
  }

  __device__ void load(Raw &raw, const RopeGradients &a, const Heads &n, HeadLane<D> lane, int base) const {
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const int head = base + u * step + lane.head;
      raw.x[u] = load_or_zero(x + head * D, head < n.qk); // v needs none: its gradient passes as it is
      if constexpr (SUMS) {
        const PassRow own = pass_row(a.shape, head, position, in_document);
        const float *row = a.dq_sums + own.line * D;
        const int place = lane.part / 4 * 8 + lane.part % 4;
        const bf16 *first = (const bf16 *)(row + 4 * dq_place(place, own.local));
        raw.dy[u] = load_or_zero(head < n.q ? first : head_at<D>(n, head, first, dk, dv), head < n.all);
        raw.dy_second[u] = load_or_zero((const bf16 *)(row + 4 * dq_place(place + 4, own.local)), head < n.q);
      } else
        raw.dy[u] = load_or_zero(head_at<D>(n, head, dq, dk, dv), head < n.all);
    }
  }

  // Eight elements of head `head`'s gradient; all lanes of the warp.
  static __device__ uint4 gradient(const Raw &raw, int u, bool any_q, bool is_q, float scale) {
    uint4 dy = raw.dy[u];
    if constexpr (SUMS) {
      if (!any_q) return dy;
      const float4 a = floats(dy), b = floats(raw.dy_second[u]);
      const uint4 rounded = quad_transpose(pack2(a.x * scale, a.y * scale), pack2(a.z * scale, a.w * scale),
                                           pack2(b.x * scale, b.y * scale), pack2(b.z * scale, b.w * scale));
      if (is_q) dy = rounded;
    }
    return dy;
  }
  static __device__ float4 floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
  }
};

// dqkv of row r. dw [2][8]: the lane's sums for dwq and dwk.
template <int D, bool SUMS>
static __device__ inline void row_backward(const Rope &p, const RopeGradients &a, HeadLane<D> lane, int r, int modality,
                                           float dw[2][8]) {
  typedef RowReader<D, SUMS> Reader;
  constexpr int unroll = Reader::unroll, step = Reader::step;
  const Heads n = heads_of(p);
  const int s = p.seq[r];
  const Reader from(p, a, lane, r, s);
  bf16 *dx = a.dqkv + (int64_t)r * n.all * D + 8 * lane.part;
  typename Reader::Raw raw;
  from.load(raw, a, n, lane, 0);
  const Turn t = turn_at<D>(p, s, lane.part); // while the first heads are on their way
  for (int base = 0; base < n.all; base += unroll * step) {
    typename Reader::Raw next;
    from.load(next, a, n, lane, base + unroll * step);
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const int head = base + u * step + lane.head;
      uint4 y = Reader::gradient(raw, u, base + u * step < n.q, head < n.q, a.shape.scale);
      if (base + u * step < n.qk) {                    // some of the warp's heads are not v
        float x8[8], g[8], w[8], squares = 0, dot = 0; // g: the gradient before the rotation
        unpack8(raw.x[u], x8);
        unpack8(y, g);
        load8((head < n.q ? a.wq : a.wk) + modality * D + 8 * lane.part, w); // from L1: registers are short
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float even = g[2 * i], odd = g[2 * i + 1];
          g[2 * i] = even * t.cosine[i] + odd * t.sine[i];
          g[2 * i + 1] = odd * t.cosine[i] - even * t.sine[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          w[i] *= g[i];
          squares += x8[i] * x8[i];
          dot += w[i] * x8[i];
        }
        float rstd = rsqrtf(HeadLane<D>::sum(squares) * (1.0f / D) + norm_eps);
        float mean = HeadLane<D>::sum(dot) * rstd * (1.0f / D);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          x8[i] *= rstd;
          w[i] = rstd * (w[i] - x8[i] * mean);
        }
        if (head < n.q) {
#pragma unroll
          for (int i = 0; i < 8; i++) dw[0][i] += g[i] * x8[i];
        } else if (head < n.qk) {
#pragma unroll
          for (int i = 0; i < 8; i++) dw[1][i] += g[i] * x8[i];
        }
        if (head < n.qk) y = pack8(w);
      }
      if (head < n.all) *reinterpret_cast<uint4 *>(dx + head * D) = y;
    }
    raw = next;
  }
}

// The block's sums for dwq and dwk of one modality: over warps and the heads they work on at a time, in order.
template <int D> static __device__ void sums_store(const float dw[2][8], HeadLane<D> lane, float *slot /* [2][D] */) {
  constexpr int owners = BACKWARD_WARPS * HeadLane<D>::heads;
  static_assert(owners * 2 * D * sizeof(float) <= CUDA_STATIC_SHARED, "every owner has its sums in shared memory");
  __shared__ __align__(16) float shared[owners][2][D];
  int owner = threadIdx.x / 32 * HeadLane<D>::heads + lane.head;
#pragma unroll
  for (int k = 0; k < 2; k++) store_sums(&shared[owner][k][8 * lane.part], dw[k]);
  __syncthreads();
  for (int at = threadIdx.x; at < 2 * D; at += BACKWARD_THREADS) {
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < owners; i++) sum += (&shared[i][0][0])[at];
    slot[at] = sum;
  }
  __syncthreads();
}

template <int D, bool SUMS>
static __global__ void __launch_bounds__(BACKWARD_THREADS, 4)
    rope_backward(const __grid_constant__ Rope p, const __grid_constant__ RopeGradients a) {
  await_previous();
  HeadLane<D> lane;
  int warp = threadIdx.x / 32, n_text = p.dims->n_text, used = n_text + p.dims->n_image;
  int begin = blockIdx.x * RUN_ROWS, end = min(begin + RUN_ROWS, p.T), width = (p.H + 2 * p.G) * D;
  for (int modality = 0; modality < MODALITIES; modality++) {
    int from = modality ? max(begin, n_text) : begin, to = min(end, modality ? used : n_text);
    if (from >= to) continue;
    float dw[2][8] = {};
    for (int r = from + warp; r < to; r += BACKWARD_WARPS) row_backward<D, SUMS>(p, a, lane, r, modality, dw);
    sums_store<D>(dw, lane, a.partial + (int64_t)(blockIdx.x + modality) * 2 * D);
  }
  for (int r = max(begin, used) + warp; r < end; r += BACKWARD_WARPS) warp_zero(a.dqkv + (int64_t)r * width, width);
}

// dw[modality] (+)= the slots' sums in order. A block forms 32 columns of one [D] of (modality, wq or wk); 8 threads
// with 4 columns each walk down a share of the slots.
enum { SUM_PARTS = 128, SUM_LANES = 8, SUM_WARPS = SUM_PARTS * SUM_LANES / 32 };

static_assert(SUM_PARTS * SUM_LANES <= 1024 && 32 % SUM_LANES == 0,
              "a block's threads; a warp's lanes are whole parts");

static __global__ void __launch_bounds__(SUM_PARTS *SUM_LANES)
    rope_sums(const float *partial, const BatchDims *dims, int D, float *dwq, float *dwk, int accumulate) {
  await_previous();
  __shared__ float4 shared[SUM_WARPS][SUM_LANES];
  int modality = blockIdx.y >> 1, key = blockIdx.y & 1;
  int lane = threadIdx.x % SUM_LANES, part = threadIdx.x / SUM_LANES, first = blockIdx.x * 4 * SUM_LANES;
  int n_text = dims->n_text, from = modality ? n_text : 0, to = modality ? n_text + dims->n_image : n_text;
  int begin = from / RUN_ROWS, slots = to > from ? (to - 1) / RUN_ROWS - begin + 1 : 0;
  const float *slot = partial + ((int64_t)(begin + modality) * 2 + key) * D + first + 4 * lane;
  float4 sum = slots_sum(slot, 2 * D, (int)((int64_t)slots * part / SUM_PARTS),
                         (int)((int64_t)slots * (part + 1) / SUM_PARTS), 1);
  // The four parts of a warp, then the warps.
#pragma unroll
  for (int d = SUM_LANES; d < 32; d *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, d);
    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, d);
  }
  if ((threadIdx.x & 31) < SUM_LANES) shared[threadIdx.x / 32][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= 4 * SUM_LANES) return;
  float *dw = (key ? dwk : dwq) + modality * D + first + threadIdx.x, total = 0;
#pragma unroll
  for (int i = 0; i < SUM_WARPS; i++) total += reinterpret_cast<const float *>(shared[i])[threadIdx.x];
  *dw = accumulate ? *dw + total : total;
}

// ---- the ops ----

static int backward_blocks(int T) {
  return ceil_div(T, RUN_ROWS);
}

// Where the blocks' sums begin in ATTENTION_ROPE_BWD's scratch, behind attention's.
static size_t partial_at(const Dims *d) {
  const size_t align = 256;
  return (attention_bwd_scratch(OP_ATTENTION_BWD, d, NULL) + align - 1) / align * align;
}

size_t rope_scratch(OpKind kind, const Dims *d, const OpArgs *args) {
  (void)args;
  if (kind == OP_QKNORM_ROPE_FWD) return 0;
  const size_t partial = (size_t)(backward_blocks(d->T) + 1) * 2 * (size_t)d->D * sizeof(float);
  return (kind == OP_ATTENTION_ROPE_BWD ? partial_at(d) : 0) + partial;
}

// Runs `launch`, which uses the constant D, for the head dimension of the call.
#define FOR_HEAD_DIM(head_dim, launch)                                                                                 \
  do {                                                                                                                 \
    if ((head_dim) == 32) {                                                                                            \
      constexpr int D = 32;                                                                                            \
      launch;                                                                                                          \
    } else if ((head_dim) == 64) {                                                                                     \
      constexpr int D = 64;                                                                                            \
      launch;                                                                                                          \
    } else if ((head_dim) == 128) {                                                                                    \
      constexpr int D = 128;                                                                                           \
      launch;                                                                                                          \
    } else {                                                                                                           \
      cuda_check(cudaErrorInvalidValue, "QK-norm: head_dim", __FILE__, __LINE__);                                      \
    }                                                                                                                  \
  } while (0)

extern "C" void cuda_QKNORM_ROPE_FWD(const KernelCall *c) {
  const bf16 *qkv = (const bf16 *)c->in.QKNORM_ROPE_FWD.qkv; // [T, (H+2G) D] row order
  const bf16 *wq = (const bf16 *)c->in.QKNORM_ROPE_FWD.wq, *wk = (const bf16 *)c->in.QKNORM_ROPE_FWD.wk; // [2, D]
  bf16 *q = (bf16 *)c->out.QKNORM_ROPE_FWD.q, *k = (bf16 *)c->out.QKNORM_ROPE_FWD.k,
       *v = (bf16 *)c->out.QKNORM_ROPE_FWD.v; // sequence order
  Rope p = rope_of(c);
  int grid = ceil_div(p.T, FORWARD_WARPS);
  FOR_HEAD_DIM(c->dims->D,
               CUDA_LAUNCH(rope_forward<D>, grid, FORWARD_THREADS, 0, call_stream(c), p, qkv, wq, wk, q, k, v));
}

// The kernels of a backward call, whose outputs and scratch `a` has.
template <int D, bool SUMS> static void backward_launch(const KernelCall *c, const RopeGradients &a) {
  const Rope p = rope_of(c);
  CUDA_LAUNCH((rope_backward<D, SUMS>), backward_blocks(p.T), BACKWARD_THREADS, 0, call_stream(c), p, a);
  const dim3 grid(D / (4 * SUM_LANES), 2 * MODALITIES);
  CUDA_LAUNCH(rope_sums, grid, SUM_PARTS * SUM_LANES, 0, call_stream(c), a.partial, p.dims, D, a.dwq, a.dwk,
              c->args->accumulate);
}

extern "C" void cuda_QKNORM_ROPE_BWD(const KernelCall *c) {
  const auto &in = c->in.QKNORM_ROPE_BWD;
  const auto &out = c->out.QKNORM_ROPE_BWD;
  RopeGradients a = {};
  a.dq = (const bf16 *)in.dq, a.dk = (const bf16 *)in.dk, a.dv = (const bf16 *)in.dv;
  a.qkv = (const bf16 *)in.qkv, a.wq = (const bf16 *)in.wq, a.wk = (const bf16 *)in.wk;
  a.dqkv = (bf16 *)out.dqkv, a.dwq = (float *)out.dwq, a.dwk = (float *)out.dwk;
  a.partial = (float *)c->scratch;
  FOR_HEAD_DIM(c->dims->D, (backward_launch<D, false>(c, a)));
}

extern "C" void cuda_ATTENTION_ROPE_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const auto &in = c->in.ATTENTION_ROPE_BWD;
  const auto &out = c->out.ATTENTION_ROPE_BWD;
  bf16 *dq = (bf16 *)out.work, *dk = dq + (int64_t)d->T * d->H * d->D, *dv = dk + (int64_t)d->T * d->G * d->D;
  RopeGradients a = {};
  a.dq_sums = attention_backward(c, dq, dk, dv, true);
  a.doc_start = c->batch->doc_start;
  a.shape = attention_shape(d);
  a.dq = dq, a.dk = dk, a.dv = dv;
  a.qkv = (const bf16 *)in.qkv, a.wq = (const bf16 *)in.wq, a.wk = (const bf16 *)in.wk;
  a.dqkv = (bf16 *)out.dqkv, a.dwq = (float *)out.dwq, a.dwk = (float *)out.dwk;
  a.partial = (float *)((char *)c->scratch + partial_at(d));
  if (a.dq_sums)
    backward_launch<MAX_HEAD, true>(c, a);
  else
    FOR_HEAD_DIM(d->D, (backward_launch<D, false>(c, a)));
}
