// The text head: logits and cross-entropy of the rows with a target, gathered through target_row, a chunk at a time, so
// that logits never exist whole. How many chunks hold anything is known on the device only: the products of the others
// find no rows.
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/sums.h"

enum { THREADS = 512, WARPS = THREADS / 32 };

static_assert(WARPS <= 32 && (WARPS & (WARPS - 1)) == 0, "a warp joins the warps' sums in a tree");

// ---- products, without their operands ----

// logits [rows, V] = h Wout^T, in fp32.
static Gemm logits_gemm(const Dims *d, int rows) {
  Gemm g = {};
  g.side[0].groups = 1;
  g.side[0].rows = rows;
  g.side[0].N = d->V;
  g.side[0].K = d->C;
  return g;
}

// dh [rows, C] = ce_scale dlogits Wout.
static Gemm input_gemm(const Dims *d, int rows) {
  Gemm g = {};
  g.b_transposed = 1;
  g.side[0].groups = 1;
  g.side[0].rows = rows;
  g.side[0].N = d->C;
  g.side[0].K = d->V;
  return g;
}

// dWout [V, C] (+)= ce_scale dlogits^T h.
static Gemm weight_gemm(const Dims *d, int rows) {
  Gemm g = {};
  g.side[0].groups = 1;
  g.side[0].rows = rows;
  g.side[0].M = d->V;
  g.side[0].N = d->C;
  return g;
}

// ---- scratch of HEAD_CE ----

typedef struct HeadScratch {
  int32_t *count; // [chunks] rows of each
  bf16 *dlogits;  // [chunk, V] softmax - onehot. ce_scale comes in at the end of the products: rounded with it, every
                  //   target's -1 would be off by the same up to 0.4%
  bf16 *dh;       // [chunk, C] of the gathered rows
  char *gemm;     // of whichever product runs
} HeadScratch;

// Lays it out from `base` (NULL to measure); returns its bytes.
static size_t head_bind(HeadScratch *s, const Dims *d, int chunk, void *base) {
  const Gemm logits = logits_gemm(d, chunk), input = input_gemm(d, chunk), weight = weight_gemm(d, chunk);
  size_t gemm = gemm_rows_scratch(&logits), used = 0;
  if (gemm_rows_scratch(&input) > gemm) gemm = gemm_rows_scratch(&input);
  if (gemm_weights_scratch(&weight) > gemm) gemm = gemm_weights_scratch(&weight);
  char *at = (char *)base;
#define HEAD_TAKE(field, type, n)                                                                                      \
  do {                                                                                                                 \
    s->field = (type *)(void *)(base ? at + used : NULL);                                                              \
    used += ((size_t)(n) * sizeof(type) + 255) / 256 * 256;                                                            \
  } while (0)
  HEAD_TAKE(count, int32_t, ceil_div(d->T, chunk));
  HEAD_TAKE(dlogits, bf16, (int64_t)chunk * d->V);
  HEAD_TAKE(dh, bf16, (int64_t)chunk * d->C);
  HEAD_TAKE(gemm, char, gemm);
#undef HEAD_TAKE
  return used;
}

size_t head_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  if (kind == OP_HEAD_CE) {
    HeadScratch s;
    return head_bind(&s, dims, args->head.chunk, NULL);
  }
  const Gemm g = logits_gemm(dims, dims->T);
  return gemm_rows_scratch(&g);
}

// ---- kernels ----

// count [chunks], nll [T] = 0, and zeros in the rows of dh [T, C] (or NULL) without a target. A warp takes a row.
static __global__ void __launch_bounds__(THREADS)
    head_begin(Batch b, int T, int C, int chunk, int32_t *count, float *nll, bf16 *dh) {
  await_previous();
  const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + threadIdx.x / 32, step = gridDim.x * WARPS;
  for (int r = first; r < T; r += step) {
    if (lane == 0) nll[r] = 0;
    if (lane == 0 && r % chunk == 0) {
      const int left = b.dims->n_target - r;
      count[r / chunk] = left < 0 ? 0 : left < chunk ? left : chunk;
    }
    if (!dh || b.target[r] >= 0) continue;
    uint4 *row = reinterpret_cast<uint4 *>(dh + (int64_t)r * C);
    for (int i = lane; i < C / 8; i += 32) row[i] = make_uint4(0, 0, 0, 0);
  }
}

// A maximum and the sum of exponentials relative to it; {-inf, 0} of nothing.
typedef struct LogSum {
  float top, sum;
} LogSum;
static __device__ inline LogSum log_sum_join(LogSum a, LogSum b) {
  LogSum j = {fmaxf(a.top, b.top), 0};
  if (a.sum != 0) j.sum += a.sum * __expf(a.top - j.top); // of nothing: -inf - -inf would be NaN
  if (b.sum != 0) j.sum += b.sum * __expf(b.top - j.top);
  return j;
}

// Over the block, of 2^n warps; every thread gets the result. The tree is fixed.
static __device__ LogSum block_log_sum(LogSum s) {
  __shared__ LogSum warp[WARPS];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int d = 16; d; d >>= 1) {
    const LogSum other = {__shfl_xor_sync(0xffffffffu, s.top, d), __shfl_xor_sync(0xffffffffu, s.sum, d)};
    s = log_sum_join(s, other);
  }
  __syncthreads(); // the last use of warp[] is over
  if (lane == 0) warp[threadIdx.x / 32] = s;
  __syncthreads();
  s = warp[lane & (warps - 1)];
  for (int d = warps / 2; d; d >>= 1) {
    const LogSum other = {__shfl_xor_sync(0xffffffffu, s.top, d), __shfl_xor_sync(0xffffffffu, s.sum, d)};
    s = log_sum_join(s, other);
  }
  return s;
}

// What a thread holds of a row of logits from `z` on: eight of every 8 blockDim columns;
// -inf past the end of the row, which is `left` columns away.
enum { CE_VECTORS = 4, CE_SPAN = 8 * CE_VECTORS };
static __device__ inline void load_logits(const float *z, int left, float x[CE_VECTORS][8]) {
#pragma unroll
  for (int k = 0; k < CE_VECTORS; k++) {
    const int v = (k * (int)blockDim.x + (int)threadIdx.x) * 8;
    const float4 nothing = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    const float4 *from = reinterpret_cast<const float4 *>(z + v);
    const float4 lo = v < left ? from[0] : nothing, hi = v < left ? from[1] : nothing;
    x[k][0] = lo.x, x[k][1] = lo.y, x[k][2] = lo.z, x[k][3] = lo.w;
    x[k][4] = hi.x, x[k][5] = hi.y, x[k][6] = hi.z, x[k][7] = hi.w;
  }
}

static __device__ inline LogSum log_sum_add(LogSum s, const float x[CE_VECTORS][8]) {
  float top = s.top, sum = 0;
#pragma unroll
  for (int i = 0; i < CE_SPAN; i++) top = fmaxf(top, x[i / 8][i % 8]);
  const float pivot = top == -INFINITY ? 0 : top; // of nothing: -inf - -inf would be NaN
#pragma unroll
  for (int i = 0; i < CE_SPAN; i++) sum += __expf(x[i / 8][i % 8] - pivot);
  return {top, sum + (s.sum != 0 ? s.sum * __expf(s.top - pivot) : 0)};
}

// A block takes a row of logits [V]: nll of its row, and dlogits [V] (or NULL) = softmax - onehot. The row stays in
// registers between the two; one that is too long for them is read twice.
static __global__ void __launch_bounds__(THREADS, 2)
    cross_entropy(Batch b, const int32_t *index, const int32_t *count, int V, const float *logits, float *nll,
                  bf16 *dlogits) {
  await_previous();
  const int rows = *count, span = CE_SPAN * blockDim.x;
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const int row = index[i], target = b.target[row];
    const float *z = logits + (int64_t)i * V;
    const float hit = z[target];
    LogSum own = {-INFINITY, 0};
    float x[CE_VECTORS][8];
    for (int first = 0; first < V; first += span) {
      load_logits(z + first, V - first, x);
      own = log_sum_add(own, x);
    }
    const LogSum all = block_log_sum(own);
    if (threadIdx.x == 0) nll[row] = logf(all.sum) + all.top - hit;
    if (!dlogits) continue;
    const float share = 1 / all.sum;
    for (int first = 0; first < V; first += span) {
      if (V > span) load_logits(z + first, V - first, x);
#pragma unroll
      for (int k = 0; k < CE_VECTORS; k++) {
        const int v = first + (k * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (v >= V) break;
#pragma unroll
        for (int j = 0; j < 8; j++) x[k][j] = share * __expf(x[k][j] - all.top) - (v + j == target);
        store8(dlogits + (int64_t)i * V + v, x[k]);
      }
    }
  }
}

// dh[index[i]] = gathered[i], rows of C. A warp takes a row.
static __global__ void __launch_bounds__(THREADS)
    rows_scatter(const int32_t *index, const int32_t *count, int C, const bf16 *__restrict__ gathered,
                 bf16 *__restrict__ dh) {
  await_previous();
  const int lane = threadIdx.x % 32, rows = *count;
  for (int i = blockIdx.x * WARPS + threadIdx.x / 32; i < rows; i += gridDim.x * WARPS) {
    const bf16 *from = gathered + (int64_t)i * C;
    bf16 *to = dh + (int64_t)index[i] * C;
#pragma unroll 4
    for (int column = lane * 8; column < C; column += 256)
      *reinterpret_cast<uint4 *>(to + column) = *reinterpret_cast<const uint4 *>(from + column);
  }
}

// Adds the sums of nll by kind of target, in fp64, by one block in fixed order.
static __global__ void __launch_bounds__(THREADS) head_end(Batch b, const float *nll, Metrics *metrics) {
  await_previous();
  __shared__ double shared[WARPS][4];
  const int n = b.dims->n_target, lane = threadIdx.x % 32;
  double sum[4] = {0}; // nll by kind, targets by kind
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const int row = b.target_row[i];
    const bool caption = b.target_kind[row] == TARGET_CAPTION;
    const double value = nll[row];
    sum[TARGET_TEXT] += caption ? 0 : value;
    sum[TARGET_CAPTION] += caption ? value : 0;
    sum[2 + TARGET_TEXT] += !caption;
    sum[2 + TARGET_CAPTION] += caption;
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    sum[k] = warp_sum_double(sum[k]);
    if (lane == 0) shared[threadIdx.x / 32][k] = sum[k];
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  double total = 0;
  for (int w = 0; w < WARPS; w++) total += shared[w][threadIdx.x];
  double *to = threadIdx.x < 2 ? metrics->nll : metrics->targets;
  to[threadIdx.x % 2] += total;
}

// ---- ops ----

// logits [*count, V] of the rows h[index].
static void logits_product(const KernelCall *c, Gemm g, const void *h, const void *wout, const int32_t *count,
                           const int32_t *index, float *logits) {
  g.side[0].extent.count = count;
  g.side[0].a = (const bf16 *)h; // [T, C]
  g.side[0].a_index = index;
  g.side[0].b = (const bf16 *)wout; // [V, C]
  const GemmStoreFloat end[MODALITIES] = {{logits}};
  gemm_rows(&g, end, call_stream(c));
}

// nll of the rows index[0 .. *count), and dlogits or NULL.
static void rows_pass(const KernelCall *c, const int32_t *count, const int32_t *index, bf16 *dlogits) {
  const int V = c->dims->V;
  int threads = 128; // as many as hold a row, and no more: other rows' blocks load while one reduces
  while (threads < THREADS && threads * CE_SPAN < V) threads *= 2;
  const int grid = cuda_sm_count() * (2 * THREADS / threads);
  CUDA_LAUNCH(cross_entropy, grid, threads, 0, call_stream(c), *c->batch, index, count, V,
              (const float *)c->out.HEAD_CE.work, (float *)c->out.HEAD_CE.nll, dlogits);
}

static void input_gradient(const KernelCall *c, const HeadScratch *scratch, const int32_t *count) {
  Gemm g = input_gemm(c->dims, c->args->head.chunk);
  g.scratch = scratch->gemm;
  g.side[0].extent.count = count;
  g.side[0].a = scratch->dlogits;
  g.side[0].b = (const bf16 *)c->in.HEAD_CE.wout; // Wout [V, C]
  const GemmStore end[MODALITIES] = {{scratch->dh, NULL, NULL, &c->batch->dims->ce_scale}};
  gemm_rows(&g, end, call_stream(c));
}

static void weight_gradient(const KernelCall *c, const HeadScratch *scratch, const int32_t *count, const int32_t *index,
                            int accumulate) {
  Gemm g = weight_gemm(c->dims, c->args->head.chunk);
  g.scratch = scratch->gemm;
  g.side[0].extent.count = count;
  g.side[0].a = scratch->dlogits;
  g.side[0].b = (const bf16 *)c->in.HEAD_CE.h; // h [T, C]
  g.side[0].b_index = index;
  const GemmStoreWeights end[MODALITIES] = {{(float *)c->out.HEAD_CE.dwout, &c->batch->dims->ce_scale, accumulate}};
  gemm_weights(&g, end, call_stream(c));
}

extern "C" void cuda_HEAD_CE(const KernelCall *c) {
  const Dims *d = c->dims;
  const Batch b = *c->batch;
  float *nll = (float *)c->out.HEAD_CE.nll;                          // [T]
  bf16 *dh = (bf16 *)c->out.HEAD_CE.dh;                              // [T, C] or NULL
  void *dwout = c->out.HEAD_CE.dwout;                                // [V, C] or NULL
  float *logits = (float *)c->out.HEAD_CE.work;                      // [chunk, V]
  const int chunk = c->args->head.chunk, grid = 4 * cuda_sm_count(); // four blocks of 512 threads fill a processor
  cudaStream_t stream = call_stream(c);
  HeadScratch s;
  head_bind(&s, d, chunk, c->scratch);
  Gemm forward = logits_gemm(d, chunk);
  forward.scratch = s.gemm;
  CUDA_LAUNCH(head_begin, grid, THREADS, 0, stream, b, d->T, d->C, chunk, s.count, nll, dh);
  for (int at = 0; at < d->T; at += chunk) {
    const int32_t *count = s.count + at / chunk, *index = b.target_row + at;
    logits_product(c, forward, c->in.HEAD_CE.h, c->in.HEAD_CE.wout, count, index, logits);
    rows_pass(c, count, index, dh || dwout ? s.dlogits : NULL);
    if (dh) {
      input_gradient(c, &s, count);
      CUDA_LAUNCH(rows_scatter, grid, THREADS, 0, stream, index, count, d->C, s.dh, dh);
    }
    if (dwout) weight_gradient(c, &s, count, index, at > 0 || c->args->accumulate);
  }
  CUDA_LAUNCH(head_end, 1, THREADS, 0, stream, b, nll, (Metrics *)c->out.HEAD_CE.metrics);
}

// The pass over logits that `work` holds already, by itself: what the benchmark times. All targets are in one chunk.
extern "C" void cuda_HEAD_CE_rows(const KernelCall *c) {
  HeadScratch s;
  head_bind(&s, c->dims, c->args->head.chunk, c->scratch);
  rows_pass(c, &c->batch->dims->n_target, c->batch->target_row, s.dlogits);
}

extern "C" void cuda_HEAD_LOGITS(const KernelCall *c) {
  Gemm g = logits_gemm(c->dims, c->dims->T);
  g.scratch = c->scratch;
  logits_product(c, g, c->in.HEAD_LOGITS.h, c->in.HEAD_LOGITS.wout, &c->batch->dims->n_target, c->batch->target_row,
                 (float *)c->out.HEAD_LOGITS.logits);
}
