// Ops at the entrance of the model: token embeddings, and captions pooled from them.
#include "kernels/cuda/sums.h"

enum {
  THREADS = 256,
  WARPS = THREADS / 32,
  POOL_THREADS = 512, // eight columns each, so that one row of C <= 4096 is one access of the block
  HALF = 16,          // lanes
  HALVES = THREADS / HALF,
  BWD_IDS = 32,           // rows of dE in a block
  BWD_COLUMNS = HALF * 8, // and columns
  LONG_RUN = 32           // an id of more rows is summed by the whole block
};

static_assert(POOL_THREADS * 8 >= CUDA_MOST_DIM, "pooling: one access of the block is a row");
static_assert(BWD_IDS == 32, "a warp looks up a block's ids");
static_assert(HALVES * BWD_COLUMNS * sizeof(float) <= CUDA_STATIC_SHARED, "half warps' sums lie in shared memory");

static __device__ inline void add8(float sum[8], const float x[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] += x[i];
}

// ---- EMBED_FWD ----

// A warp a row.
static __global__ void __launch_bounds__(THREADS)
    embed_fwd_kernel(const BatchDims *n, const int32_t *token, int T, int C, const bf16 *E, const bf16 *image_rows,
                     bf16 *x) {
  await_previous();
  int lane = threadIdx.x % 32, text = n->n_text, used = text + n->n_image;
  for (int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; r < T; r += (int64_t)gridDim.x * WARPS) {
    const bf16 *from = r < text ? E + (int64_t)token[r] * C : r < used ? image_rows + r * C : NULL;
#pragma unroll 4
    for (int i = lane; i < C / 8; i += 32)
      *(uint4 *)(x + r * C + i * 8) = from ? *(const uint4 *)(from + i * 8) : make_uint4(0, 0, 0, 0);
  }
}

extern "C" void cuda_EMBED_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(embed_fwd_kernel, ceil_div(d->T, WARPS), THREADS, 0, call_stream(c), c->batch->dims, c->batch->token,
              d->T, d->C, (const bf16 *)c->in.EMBED_FWD.E, (const bf16 *)c->in.EMBED_FWD.image_rows,
              (bf16 *)c->out.EMBED_FWD.x);
}

// ---- EMBED_BWD ----

// First of the ascending id[0 .. n) that is >= v, by a whole warp: 32 probes a step.
static __device__ inline int lower_bound_warp(const int32_t *id, int n, int v) {
  int low = 0, high = n; // id[low - 1] < v <= id[high]
  while (low < high) {
    int step = ceil_div(high - low, 32), at = low + (threadIdx.x % 32) * step;
    int below = __popc(__ballot_sync(0xffffffffu, at < high && id[at] < v)); // the first `below` probes
    if (below == 0) return low;
    if (low + below * step < high) high = low + below * step;
    low += (below - 1) * step + 1;
  }
  return low;
}

// sum [8 columns] of the rows id_row[k] for k = first, first + step, .. < end, by a half warp of converged lanes (first
// may differ between the halves, and the loops run as long as either has rows). The lanes look up 16 rows at once and
// hand them round, so that what the sum waits for is the rows alone.
static __device__ inline void sum_rows(const Batch &b, int first, int end, int step, int C, int column, const bf16 *dx,
                                       const bf16 *dmean, float sum[8]) {
  int lane = threadIdx.x % HALF;
  for (; __any_sync(0xffffffffu, first < end); first += HALF * step) {
    int k = first + lane * step, row = -1, segment = 0;
    float part = 0;
    if (k < end) {
      row = b.id_row[k];
      segment = b.pool_segment[row];
      if (segment) part = __fdividef(1, (float)(b.cap_end[segment] - b.cap_start[segment]));
    }
    int many = __reduce_max_sync(0xffffffffu, first < end ? ceil_div(end - first, step) : 0);
#pragma unroll 4
    for (int i = 0; i < (many < HALF ? many : HALF); i++) {
      int r = __shfl_sync(0xffffffffu, row, i, HALF), g = __shfl_sync(0xffffffffu, segment, i, HALF);
      float share = __shfl_sync(0xffffffffu, part, i, HALF), x[8], mean[8];
      const uint4 zero = make_uint4(0, 0, 0, 0);
      unpack8(r >= 0 ? *(const uint4 *)(dx + (int64_t)r * C + column) : zero, x);
      unpack8(g ? *(const uint4 *)(dmean + (int64_t)g * C + column) : zero, mean);
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += x[e] + share * mean[e];
    }
  }
}

// to [8] (+)= sum.
static __device__ inline void add_sum(float *to, const float sum[8], int accumulate) {
  float4 *at = (float4 *)to;
  float4 a = make_float4(sum[0], sum[1], sum[2], sum[3]), b = make_float4(sum[4], sum[5], sum[6], sum[7]);
  if (accumulate) {
    float4 c = at[0], d = at[1];
    a = add4(a, c);
    b = add4(b, d);
  }
  at[0] = a;
  at[1] = b;
}

// Block (x, y): BWD_COLUMNS columns of BWD_IDS rows of dE. A half warp takes every HALVES-th of those rows; ids of many
// rows come last, each summed by all half warps, the w-th taking its rows w, w + HALVES, .. The last ids are the
// special tokens, which stand in every document: their block, the longest, goes first.
static __global__ void __launch_bounds__(THREADS, 4)
    embed_bwd_kernel(const __grid_constant__ Batch b, int V, int C, int accumulate, const bf16 *dx, const bf16 *dmean,
                     float *dE) {
  await_previous();
  __shared__ int first[BWD_IDS], end[BWD_IDS]; // of the id's rows in id_row; none: 0, 0
  __shared__ __align__(16) float partial[HALVES][BWD_COLUMNS];
  int lane = threadIdx.x % HALF, half = threadIdx.x / HALF, n_ids = b.dims->n_ids;
  int v0 = (int)((blockIdx.y + gridDim.y - 1) % gridDim.y) * BWD_IDS, column = blockIdx.x * BWD_COLUMNS + lane * 8;
  bool inside = column < C;
  if (!inside) column = 0; // the lane reads along, and writes nothing
  if (threadIdx.x < 32) {
    first[threadIdx.x] = end[threadIdx.x] = 0;
    __syncwarp();
    int j = lower_bound_warp(b.id, n_ids, v0) + threadIdx.x, v = j < n_ids ? b.id[j] - v0 : BWD_IDS;
    if (v < BWD_IDS) {
      first[v] = b.id_start[j];
      end[v] = b.id_start[j + 1];
    }
  }
  __syncthreads();
  for (int i = half; i < BWD_IDS; i += HALVES) {
    int rows = end[i] - first[i];
    bool mine = rows <= LONG_RUN && v0 + i < V && (rows || !accumulate);
    float sum[8] = {};
    sum_rows(b, first[i], mine ? end[i] : 0, 1, C, column, dx, dmean, sum);
    if (mine && inside) add_sum(dE + (int64_t)(v0 + i) * C + column, sum, accumulate);
  }
  for (int i = 0; i < BWD_IDS; i++) {
    if (end[i] - first[i] <= LONG_RUN) continue;
    float sum[8] = {};
    sum_rows(b, first[i] + half, end[i], HALVES, C, column, dx, dmean, sum);
    __syncthreads(); // the id before has been read from `partial`
    store_sums(&partial[half][lane * 8], sum);
    __syncthreads();
    if (half || !inside) continue;
#pragma unroll
    for (int h = 1; h < HALVES; h++) add8(sum, &partial[h][lane * 8]);
    add_sum(dE + (int64_t)(v0 + i) * C + column, sum, accumulate);
  }
}

extern "C" void cuda_EMBED_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(embed_bwd_kernel, dim3(ceil_div(d->C, BWD_COLUMNS), ceil_div(d->V, BWD_IDS)), THREADS, 0, call_stream(c),
              *c->batch, d->V, d->C, c->args->accumulate, (const bf16 *)c->in.EMBED_BWD.dx,
              (const bf16 *)c->in.EMBED_BWD.dmean, (float *)c->out.EMBED_BWD.dE);
}

// ---- POOL_FWD, POOL_BWD ----

// u [C] = mean embedding of segment g's caption: thread v < C / 8 gets columns 8v .. 8v + 7. Returns 1 / sqrt(mean(u^2)
// + 1e-6), or 0 without a caption, in every thread. Threads that a row does not need take other rows of the caption.
static __device__ inline float pool_caption(const Batch &b, const bf16 *E, int C, int g, float u[8]) {
  __shared__ __align__(16) float partial[POOL_THREADS][8];
  __shared__ float shared[32];
  int first = b.cap_start[g], end = b.cap_end[g], eights = C / 8;
#pragma unroll
  for (int i = 0; i < 8; i++) u[i] = 0;
  if (g == 0 || g >= b.dims->n_segments || first >= end) return 0;
  int shares = POOL_THREADS / eights, share = threadIdx.x / eights, eight = threadIdx.x % eights;
  if (share < shares) {
#pragma unroll 4
    for (int r = first + share; r < end; r += shares) {
      float x[8];
      load8(E + (int64_t)b.token[r] * C + eight * 8, x);
      add8(u, x);
    }
    store_sums(partial[threadIdx.x], u);
  }
  __syncthreads();
  float squares = 0, part = __fdividef(1, (float)(end - first));
  if (threadIdx.x < eights) {
    for (int i = 1; i < shares; i++) add8(u, partial[i * eights + threadIdx.x]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u[i] *= part;
      squares += u[i] * u[i];
    }
  }
  return rsqrtf(block_sum(squares, shared) / (float)C + 1e-6f);
}

static __global__ void __launch_bounds__(POOL_THREADS)
    pool_fwd_kernel(const __grid_constant__ Batch b, int C, const bf16 *E, bf16 *pooled) {
  await_previous();
  float u[8], scale = pool_caption(b, E, C, blockIdx.x, u);
  if (threadIdx.x >= C / 8) return;
#pragma unroll
  for (int i = 0; i < 8; i++) u[i] *= scale;
  store8(pooled + (int64_t)blockIdx.x * C + threadIdx.x * 8, u);
}

// With y = s u: du = s (dy - u s^2 mean(dy u)).
static __global__ void __launch_bounds__(POOL_THREADS)
    pool_bwd_kernel(const __grid_constant__ Batch b, int C, const bf16 *dpooled, const bf16 *E, bf16 *dmean) {
  await_previous();
  __shared__ float shared[32];
  float u[8], dy[8] = {}, dot = 0, s = pool_caption(b, E, C, blockIdx.x, u);
  bool mine = threadIdx.x < C / 8;
  int64_t at = (int64_t)blockIdx.x * C + threadIdx.x * 8;
  if (mine && s != 0) {
    load8(dpooled + at, dy);
#pragma unroll
    for (int i = 0; i < 8; i++) dot += dy[i] * u[i];
  }
  float along = s * s * block_sum(dot, shared) / (float)C;
#pragma unroll
  for (int i = 0; i < 8; i++) u[i] = s * (dy[i] - u[i] * along);
  if (mine) store8(dmean + at, u);
}

extern "C" void cuda_POOL_FWD(const KernelCall *c) {
  CUDA_LAUNCH(pool_fwd_kernel, c->dims->segments, POOL_THREADS, 0, call_stream(c), *c->batch, c->dims->C,
              (const bf16 *)c->in.POOL_FWD.E, (bf16 *)c->out.POOL_FWD.pooled);
}

extern "C" void cuda_POOL_BWD(const KernelCall *c) {
  CUDA_LAUNCH(pool_bwd_kernel, c->dims->segments, POOL_THREADS, 0, call_stream(c), *c->batch, c->dims->C,
              (const bf16 *)c->in.POOL_BWD.dpooled, (const bf16 *)c->in.POOL_BWD.E, (bf16 *)c->out.POOL_BWD.dmean);
}
