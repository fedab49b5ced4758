// Whole-slab ops: copies, and what happens to parameters once a step.
//
// The update ops walk all parameters with few launches: up to BATCH_SPANS of them travel in a kernel's arguments, cut
// into chunks of CHUNK elements of which each block takes one; a chunk finds its parameter by binary search.
#include "kernels/bits.h"
#include "kernels/cuda/sums.h"
#include "kernels/exact.h"
#include "kernels/master.h"
#include "kernels/moments.h"

enum { BATCH_SPANS = 128, CHUNK = 16384, THREADS = 256 };

static_assert(CHUNK % (8 * THREADS) == 0, "a chunk is a whole number of the block's accesses");

// ---- copies ----

// cudaMemcpyDefault tells host from device by the address, so the transfer lanes use this op as it is.
extern "C" void cuda_COPY(const KernelCall *c) {
  CUDA_CHECK(
      cudaMemcpyAsync(c->out.COPY.dst, c->in.COPY.src, (size_t)c->args->span.count, cudaMemcpyDefault, call_stream(c)));
}

extern "C" void cuda_ZERO(const KernelCall *c) {
  CUDA_CHECK(cudaMemsetAsync(c->out.ZERO.dst, 0, (size_t)c->args->span.count, call_stream(c)));
}

static __global__ void __launch_bounds__(THREADS) add_kernel(int64_t count, const float *src, float *dst) {
  await_previous();
  int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x, step = (int64_t)gridDim.x * THREADS;
#pragma unroll 2
  for (int64_t i = first; i < count / 4; i += step) {
    float4 a = __ldcs((const float4 *)src + i), b = __ldcs((const float4 *)dst + i);
    __stcs((float4 *)dst + i, add4(a, b));
  }
  for (int64_t i = count / 4 * 4 + first; i < count; i += step) dst[i] += src[i];
}

extern "C" void cuda_ADD(const KernelCall *c) {
  int64_t count = c->args->span.count;
  if (count == 0) return;
  if (!c->args->accumulate) {
    CUDA_CHECK(cudaMemcpyAsync(c->out.ADD.dst, c->in.ADD.src, (size_t)count * sizeof(float), cudaMemcpyDefault,
                               call_stream(c)));
    return;
  }
  CUDA_LAUNCH(add_kernel, grid_striding(ceil_div64(ceil_div64(count, 4), THREADS)), THREADS, 0, call_stream(c), count,
              (const float *)c->in.ADD.src, (float *)c->out.ADD.dst);
}

static __device__ inline void load_floats(const float *p, float x[8]) {
  float4 a = __ldcs((const float4 *)p), b = __ldcs((const float4 *)p + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

static __global__ void __launch_bounds__(THREADS) cast_kernel(int64_t count, const float *src, bf16 *dst) {
  await_previous();
  int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x, step = (int64_t)gridDim.x * THREADS;
#pragma unroll 2
  for (int64_t i = first; i < count / 8; i += step) {
    float x[8];
    load_floats(src + i * 8, x);
    store8(dst + i * 8, x);
  }
  for (int64_t i = count / 8 * 8 + first; i < count; i += step) dst[i] = __float2bfloat16_rn(src[i]);
}

extern "C" void cuda_CAST(const KernelCall *c) {
  int64_t count = c->args->span.count;
  if (count == 0) return;
  CUDA_LAUNCH(cast_kernel, grid_striding(ceil_div64(ceil_div64(count, 8), THREADS)), THREADS, 0, call_stream(c), count,
              (const float *)c->in.CAST.src, (bf16 *)c->out.CAST.dst);
}

// ---- parameters by chunks ----

// Parameters of one launch. Chunks are numbered through; those of span p are first_chunk[p] .. first_chunk[p + 1] - 1.
typedef struct SpanBatch {
  ParamSpan span[BATCH_SPANS];
  int32_t first_chunk[BATCH_SPANS + 1];
  int32_t n;
} SpanBatch;
static_assert(sizeof(SpanBatch) <= 4000, "kernels take 4 KiB of arguments on every card");

// Elements [begin, end) of the slabs, all of parameter `param` of the batch.
typedef struct Chunk {
  int64_t begin, end;
  int param;
} Chunk;

// Chunks start on 16 bytes wherever the parameter does: at its first element rounded down to eight.
static __host__ __device__ inline int64_t span_start(ParamSpan span) {
  return span.offset / 8 * 8;
}

static int span_chunks(ParamSpan span) {
  return span.count ? (int)ceil_div64(span.offset + span.count - span_start(span), CHUNK) : 0;
}

// The parameters from `first` on, as many as fit.
static SpanBatch batch_of(const OpArgs *args, int first) {
  SpanBatch batch = {};
  int n = args->params.n - first;
  batch.n = n < BATCH_SPANS ? n : BATCH_SPANS;
  for (int p = 0; p < batch.n; p++) {
    batch.span[p] = params_span(args, first + p);
    batch.first_chunk[p + 1] = batch.first_chunk[p] + span_chunks(batch.span[p]);
  }
  return batch;
}

static __device__ inline Chunk chunk_of(const SpanBatch &batch, int chunk) {
  int low = 0, high = batch.n - 1; // the last span whose first chunk is not beyond
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (batch.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  ParamSpan span = batch.span[low];
  int64_t start = span_start(span) + (int64_t)(chunk - batch.first_chunk[low]) * CHUNK, end = span.offset + span.count;
  Chunk c = {start > span.offset ? start : span.offset, start + CHUNK < end ? start + CHUNK : end, low};
  return c;
}

// The part of a chunk that 16-byte accesses cover, [begin, end); fewer than eight elements lie before and behind it,
// and none in a table whose parameters start and end on multiples of eight, as the model's do.
typedef struct Eights {
  int64_t begin, end;
} Eights;

static __device__ inline Eights chunk_eights(Chunk c) {
  Eights e = {(c.begin + 7) / 8 * 8, c.end / 8 * 8};
  if (e.begin > e.end) e.begin = e.end = c.end; // none: the chunk lies between two multiples
  return e;
}

// The element outside of the eights that this thread has to see to, or -1.
static __device__ inline int64_t chunk_single(Chunk c, Eights e) {
  int64_t at = c.begin + threadIdx.x;
  if (at < e.begin) return at;
  at += e.end - e.begin;
  return at < c.end ? at : -1;
}

// ---- GRAD_SQUARES ----

// What a thread reads of a chunk at a time, and how often.
enum { SQUARE_LOADS = CHUNK / (4 * THREADS) };
static_assert(SQUARE_LOADS == 16 && EXACT_LEAF == 16 * 4, "a thread is left with one leaf");

// The square of a float is exact as a double.
static __device__ inline double squares4(float4 g) {
  double x = g.x, y = g.y, z = g.z, w = g.w;
  return (x * x + y * y) + (z * z + w * w);
}

// Four elements from `at` on, zeros from `end` on.
static __device__ inline float4 load_four(const float *x, int64_t at, int64_t end) {
  return make_float4(at < end ? x[at] : 0, at + 1 < end ? x[at + 1] : 0, at + 2 < end ? x[at + 2] : 0,
                     at + 3 < end ? x[at + 3] : 0);
}

// Of 2 HALF leaves that threads share, one of a pair of threads keeps half and the other the other half; in the end
// each has a whole one, added up as a tree of the CPU's shape.
template <int HALF> static __device__ inline void halve_leaves(double (&quad)[SQUARE_LOADS]) {
  bool upper = threadIdx.x & HALF;
#pragma unroll
  for (int k = 0; k < HALF; k++) {
    double keep = upper ? quad[k + HALF] : quad[k], give = upper ? quad[k] : quad[k + HALF];
    quad[k] = keep + __shfl_xor_sync(~0u, give, HALF);
  }
  if constexpr (HALF > 1) halve_leaves<HALF / 2>(quad);
}

// sums[word, chunk] = the exact sum of a chunk's leaves. Sixteen neighbouring threads read a leaf, a quad each, sixteen
// times.
static __global__ void __launch_bounds__(THREADS)
    square_kernel(const float *grads, const __grid_constant__ SpanBatch batch, uint32_t *sums) {
  await_previous();
  __shared__ uint32_t words[EXACT_WORDS]; // a chunk's leaves are too few for a word to overflow
  static_assert(CHUNK / EXACT_LEAF <= 1 << (32 - EXACT_BITS), "a word of a chunk");
  int param = chunk_of(batch, blockIdx.x).param;
  ParamSpan span = batch.span[param];
  // From the parameter's first element on, where chunks may begin a few before.
  int64_t begin = span.offset + (int64_t)(blockIdx.x - batch.first_chunk[param]) * CHUNK,
          end = span.offset + span.count;
  const float *mine = grads + begin + threadIdx.x * 4;
  double quad[SQUARE_LOADS];
  if (threadIdx.x < EXACT_WORDS) words[threadIdx.x] = 0;
  __syncthreads();
  if (begin + CHUNK <= end && begin % 4 == 0) {
#pragma unroll
    for (int k = 0; k < SQUARE_LOADS; k++) {
      quad[k] = squares4(__ldcs((const float4 *)(mine + k * (4 * THREADS))));
    }
  } else {
#pragma unroll
    for (int k = 0; k < SQUARE_LOADS; k++) {
      quad[k] = squares4(load_four(grads, begin + threadIdx.x * 4 + k * (4 * THREADS), end));
    }
  }
  halve_leaves<SQUARE_LOADS / 2>(quad);
  ExactParts parts = exact_parts(quad[0]);
#pragma unroll
  for (int i = 0; i < EXACT_PARTS; i++)
    if (parts.word[i]) atomicAdd(&words[parts.first + i], parts.word[i]);
  __syncthreads();
  if (threadIdx.x < EXACT_WORDS) sums[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] = words[threadIdx.x];
}

// Block (p, word): squares[p, word] = sum over the chunks of parameter p, of which the launch has `chunks`.
static __global__ void __launch_bounds__(THREADS)
    square_total_kernel(const __grid_constant__ SpanBatch batch, int chunks, const uint32_t *sums, double *squares) {
  await_previous();
  __shared__ double shared[THREADS / 32];
  int p = blockIdx.x, end = batch.first_chunk[p + 1];
  const uint32_t *word = sums + (int64_t)blockIdx.y * chunks;
  double sum = 0;
  for (int i = batch.first_chunk[p] + threadIdx.x; i < end; i += THREADS) sum += word[i];
  sum = block_sum_double<THREADS>(sum, shared);
  if (threadIdx.x == 0) squares[p * EXACT_WORDS + blockIdx.y] = sum;
}

size_t update_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)dims;
  if (kind != OP_GRAD_SQUARES) return 0;
  int64_t chunks = 0;
  for (int p = 0; p < args->params.n; p++) chunks += span_chunks(params_span(args, p));
  return (size_t)chunks * EXACT_WORDS * sizeof(uint32_t);
}

extern "C" void cuda_GRAD_SQUARES(const KernelCall *c) {
  const float *grads = (const float *)c->in.GRAD_SQUARES.grads;
  double *squares = (double *)c->out.GRAD_SQUARES.squares; // [n, EXACT_WORDS]
  uint32_t *sums = (uint32_t *)c->scratch;                 // [EXACT_WORDS, chunks] of each batch
  for (int p = 0; p < c->args->params.n; p += BATCH_SPANS) {
    SpanBatch batch = batch_of(c->args, p);
    int chunks = batch.first_chunk[batch.n];
    if (chunks) CUDA_LAUNCH(square_kernel, chunks, THREADS, 0, call_stream(c), grads, batch, sums);
    CUDA_LAUNCH(square_total_kernel, dim3(batch.n, EXACT_WORDS), THREADS, 0, call_stream(c), batch, chunks, sums,
                squares + (int64_t)p * EXACT_WORDS);
    sums += (int64_t)chunks * EXACT_WORDS;
  }
}

// ---- GRAD_DECIDE ----

static __global__ void __launch_bounds__(THREADS) status_kernel(int n, const double *squares, const Metrics *metrics,
                                                                const StepScalars *scalars, UpdateStatus *status) {
  await_previous();
  __shared__ double words[EXACT_WORDS];
  __shared__ int first_bad;
  if (threadIdx.x == 0) first_bad = n;
  __syncthreads();
  for (int p = threadIdx.x; p < n; p += THREADS)
    if (squares[p * EXACT_WORDS + EXACT_BAD] > 0) atomicMin(&first_bad, p);
  for (int w = threadIdx.x / 32; w < EXACT_WORDS; w += THREADS / 32) {
    double sum = 0;
    for (int p = threadIdx.x % 32; p < n; p += 32) sum += squares[p * EXACT_WORDS + w];
    sum = warp_sum_double(sum);
    if (threadIdx.x % 32 == 0) words[w] = sum;
  }
  __syncthreads();
  if (threadIdx.x) return;
  // The loss first: where it is not finite, all the gradients behind it are not either.
  double loss = metrics_losses(metrics), norm = sqrt(exact_value(words));
  int bad = !isfinite(loss) ? n : first_bad < n ? first_bad : -1;
  status->norm = norm;
  status->scale = scalars->clip > 0 && norm > scalars->clip ? scalars->clip / norm : 1;
  status->skip = bad >= 0 || (scalars->norm_limit > 0 && norm > scalars->norm_limit);
  status->bad = bad;
}

extern "C" void cuda_GRAD_DECIDE(const KernelCall *c) {
  CUDA_LAUNCH(status_kernel, 1, THREADS, 0, call_stream(c), c->args->params.n,
              (const double *)c->in.GRAD_DECIDE.squares, (const Metrics *)c->in.GRAD_DECIDE.metrics,
              (const StepScalars *)c->in.GRAD_DECIDE.scalars, (UpdateStatus *)c->out.GRAD_DECIDE.status);
}

// ---- GRAD_HASH ----

// hash[p] += the mixed bits of a chunk of parameter p. Integer sums have no order, so the atomics leave no trace.
static __global__ void __launch_bounds__(THREADS)
    hash_kernel(const float *grads, const __grid_constant__ SpanBatch batch, unsigned long long *hash) {
  await_previous();
  __shared__ unsigned long long shared[THREADS / 32];
  Chunk c = chunk_of(batch, blockIdx.x);
  Eights e = chunk_eights(c);
  const uint32_t *bits = (const uint32_t *)grads;
  int64_t base = batch.span[c.param].offset;
  unsigned long long sum = 0;
#pragma unroll 4
  for (int64_t at = e.begin + threadIdx.x * 4; at < e.end; at += THREADS * 4) {
    uint4 g = __ldcs((const uint4 *)(bits + at));
    sum += bits_mix(g.x, at - base) + bits_mix(g.y, at + 1 - base) + bits_mix(g.z, at + 2 - base) +
           bits_mix(g.w, at + 3 - base);
  }
  int64_t single = chunk_single(c, e);
  if (single >= 0) sum += bits_mix(bits[single], single - base);
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < THREADS / 32; i++) sum += shared[i];
  atomicAdd(&hash[c.param], sum);
}

extern "C" void cuda_GRAD_HASH(const KernelCall *c) {
  unsigned long long *hash = (unsigned long long *)c->out.GRAD_HASH.hash; // [n]
  int n = c->args->params.n;
  CUDA_CHECK(cudaMemsetAsync(hash, 0, (size_t)n * sizeof *hash, call_stream(c)));
  for (int p = 0; p < n; p += BATCH_SPANS) {
    SpanBatch batch = batch_of(c->args, p);
    int chunks = batch.first_chunk[batch.n];
    if (chunks)
      CUDA_LAUNCH(hash_kernel, chunks, THREADS, 0, call_stream(c), (const float *)c->in.GRAD_HASH.grads, batch,
                  hash + p);
  }
}

// ---- ADAMW ----

typedef struct AdamConstants {
  float beta1, beta2, fresh1, fresh2; // fresh: 1 - beta
  float step, unbias2, eps, scale;
  float rate;     // of the average
  int64_t number; // of the step
} AdamConstants;

static __device__ inline AdamConstants adam_constants(const StepScalars *s, const UpdateStatus *status) {
  AdamConstants k = {(float)s->beta1,           (float)s->beta2,       (float)(1 - s->beta1), (float)(1 - s->beta2),
                     (float)(s->lr / s->bias1), (float)(1 / s->bias2), (float)s->eps,         (float)status->scale,
                     (float)(1 - s->ema_decay), (int64_t)s->step};
  return k;
}

// Updates m and v; returns the new w.
static __device__ inline float adam_update(const AdamConstants &k, float shrink, float grad, float *m, float *v,
                                           float w) {
  float g = k.scale * grad;
  *m = k.beta1 * *m + k.fresh1 * g;
  *v = k.beta2 * *v + k.fresh2 * g * g;
  return w - (k.step * *m / (sqrtf(*v * k.unbias2) + k.eps) + shrink * w);
}

// Eight weights from 16 bytes of bf16 and 16 bytes of remainders, and back.
static __device__ inline void join8(uint4 weight, uint4 remainder, float w[8]) {
  const uint32_t a[4] = {weight.x, weight.y, weight.z, weight.w},
                 b[4] = {remainder.x, remainder.y, remainder.z, remainder.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    w[2 * i] = master_join((uint16_t)a[i], (uint16_t)b[i]);
    w[2 * i + 1] = master_join((uint16_t)(a[i] >> 16), (uint16_t)(b[i] >> 16));
  }
}

static __device__ inline void split8(const float w[8], uint4 *weight, uint4 *remainder) {
  uint32_t a[4], b[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint16_t weight0, remainder0, weight1, remainder1;
    master_split(w[2 * i], &weight0, &remainder0);
    master_split(w[2 * i + 1], &weight1, &remainder1);
    a[i] = weight0 | (uint32_t)weight1 << 16;
    b[i] = remainder0 | (uint32_t)remainder1 << 16;
  }
  *weight = make_uint4(a[0], a[1], a[2], a[3]);
  *remainder = make_uint4(b[0], b[1], b[2], b[3]);
}

// The slabs of what an update reads and writes, by element; remainders and emas may be NULL.
typedef struct AdamSlabs {
  const float *grads;
  void *ms, *vs; // fp32 or bf16
  float *emas;
  uint16_t *weights, *remainders;
  int64_t begin; // number of the first element
} AdamSlabs;

// Eight elements on their way, as they are stored.
typedef struct Eight {
  uint4 grad[2], m[2], v[2], ema[2], weight, remainder;
} Eight;

// Eight elements of `size` bytes, and back.
template <int size> static __device__ inline void load_raw(const void *p, int64_t at, uint4 x[2]) {
  const uint4 *from = (const uint4 *)((const char *)p + at * size);
  x[0] = __ldcs(from);
  if (size == 4) x[1] = __ldcs(from + 1);
}
template <int size> static __device__ inline void store_raw(void *p, int64_t at, const uint4 x[2]) {
  uint4 *to = (uint4 *)((char *)p + at * size);
  __stcs(to, x[0]);
  if (size == 4) __stcs(to + 1, x[1]);
}

static __device__ inline void floats_of(const uint4 x[2], float f[8]) {
  const uint32_t bits[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = __uint_as_float(bits[i]);
}
static __device__ inline void floats_to_raw(const float f[8], uint4 x[2]) {
  x[0] = make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  x[1] = make_uint4(__float_as_uint(f[4]), __float_as_uint(f[5]), __float_as_uint(f[6]), __float_as_uint(f[7]));
}

template <class Moment> static __device__ inline void eight_load(const AdamSlabs &s, int64_t at, Eight *x) {
  x->weight = __ldcs((const uint4 *)(s.weights + at));
  x->remainder = s.remainders ? __ldcs((const uint4 *)(s.remainders + at)) : make_uint4(0, 0, 0, 0);
  load_raw<sizeof(float)>(s.grads, at, x->grad);
  load_raw<sizeof(Moment)>(s.ms, at, x->m);
  load_raw<sizeof(Moment)>(s.vs, at, x->v);
  if (s.emas) load_raw<sizeof(float)>(s.emas, at, x->ema);
}

// Moments of eight elements, the first of which is number `element`, a multiple of four; the lower half of a word
// rounds m, the upper v.
static __device__ inline void moments_round(int64_t step, int64_t element, const float m[8], const float v[8],
                                            Eight *x) {
  uint32_t to_m[4], to_v[4];
#pragma unroll
  for (int quad = 0; quad < 2; quad++) {
    const Philox4 chances = moment_chances(step, element / 4 + quad);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float *mi = m + 4 * quad + i, *vi = v + 4 * quad + i;
      to_m[2 * quad + i / 2] = moment_round(mi[0], chances.v[i]) | (uint32_t)moment_round(mi[1], chances.v[i + 1])
                                                                       << 16;
      to_v[2 * quad + i / 2] =
          moment_round(vi[0], chances.v[i] >> 16) | (uint32_t)moment_round(vi[1], chances.v[i + 1] >> 16) << 16;
    }
  }
  x->m[0] = make_uint4(to_m[0], to_m[1], to_m[2], to_m[3]);
  x->v[0] = make_uint4(to_v[0], to_v[1], to_v[2], to_v[3]);
}

template <class Moment>
static __device__ inline void eight_update(const AdamConstants &k, float shrink, const AdamSlabs &s, int64_t at,
                                           Eight *x) {
  float g[8], m[8], v[8], w[8], ema[8];
  join8(x->weight, x->remainder, w); // without remainders: the weights as they are
  floats_of(x->grad, g);
  if (sizeof(Moment) == sizeof(float)) {
    floats_of(x->m, m);
    floats_of(x->v, v);
  } else {
    unpack8(x->m[0], m);
    unpack8(x->v[0], v);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) w[i] = adam_update(k, shrink, g[i], &m[i], &v[i], w[i]);
  if (sizeof(Moment) == sizeof(float)) {
    floats_to_raw(m, x->m);
    floats_to_raw(v, x->v);
  } else {
    moments_round(k.number, s.begin + at, m, v, x);
  }
  store_raw<sizeof(Moment)>(s.ms, at, x->m);
  store_raw<sizeof(Moment)>(s.vs, at, x->v);
  if (s.remainders) {
    split8(w, &x->weight, &x->remainder);
    __stcs((uint4 *)(s.remainders + at), x->remainder);
  } else {
    x->weight = pack8(w);
    unpack8(x->weight, w); // what the average is of
  }
  __stcs((uint4 *)(s.weights + at), x->weight);
  if (!s.emas) return;
  floats_of(x->ema, ema);
#pragma unroll
  for (int i = 0; i < 8; i++) ema[i] += k.rate * (w[i] - ema[i]);
  floats_to_raw(ema, x->ema);
  store_raw<sizeof(float)>(s.emas, at, x->ema);
}

template <class Moment>
static __device__ inline void adam_one(const AdamConstants &k, float shrink, const AdamSlabs &s, int64_t at) {
  float w = master_join(s.weights[at], s.remainders ? s.remainders[at] : 0);
  if constexpr (sizeof(Moment) == sizeof(float)) {
    w = adam_update(k, shrink, s.grads[at], (float *)s.ms + at, (float *)s.vs + at, w);
  } else {
    uint16_t *to_m = (uint16_t *)s.ms + at, *to_v = (uint16_t *)s.vs + at;
    float m = moment_float(*to_m), v = moment_float(*to_v);
    w = adam_update(k, shrink, s.grads[at], &m, &v, w);
    uint32_t chance = moment_chances(k.number, (s.begin + at) / 4).v[(s.begin + at) % 4];
    *to_m = moment_round(m, chance);
    *to_v = moment_round(v, chance >> 16);
  }
  if (s.remainders) {
    master_split(w, &s.weights[at], &s.remainders[at]);
  } else {
    s.weights[at] = __bfloat16_as_ushort(__float2bfloat16_rn(w));
    w = master_join(s.weights[at], 0);
  }
  if (s.emas) s.emas[at] += k.rate * (w - s.emas[at]);
}

// A block has a multiprocessor to itself and as many bytes under way as keep its share of the memory's pace: so the
// kernel goes as fast with a few blocks beside others' kernels as these can go, and alone with one on each.
enum { ADAM_THREADS = 512, ADAM_EIGHTS = 2 };
static_assert(CHUNK % (ADAM_THREADS * ADAM_EIGHTS * 8) == 0, "a chunk is a whole number of the block's accesses");

template <class Moment>
static __global__ void __launch_bounds__(ADAM_THREADS, 1)
    adamw_kernel(const UpdateStatus *status, const StepScalars *scalars, const __grid_constant__ SpanBatch batch,
                 const AdamSlabs s) {
  await_previous();
  if (status->skip) return;
  const AdamConstants k = adam_constants(scalars, status);
  const float decay = (float)(scalars->lr * scalars->weight_decay);
  for (int i = blockIdx.x; i < batch.first_chunk[batch.n]; i += gridDim.x) {
    Chunk c = chunk_of(batch, i);
    float shrink = batch.span[c.param].decay ? decay : 0;
    Eights e = chunk_eights(c);
    for (int64_t at = e.begin + threadIdx.x * 8; at < e.end; at += ADAM_EIGHTS * ADAM_THREADS * 8) {
      Eight x[ADAM_EIGHTS];
#pragma unroll
      for (int j = 0; j < ADAM_EIGHTS; j++)
        if (at + j * ADAM_THREADS * 8 < e.end) eight_load<Moment>(s, at + j * ADAM_THREADS * 8, &x[j]);
#pragma unroll
      for (int j = 0; j < ADAM_EIGHTS; j++)
        if (at + j * ADAM_THREADS * 8 < e.end) eight_update<Moment>(k, shrink, s, at + j * ADAM_THREADS * 8, &x[j]);
    }
    int64_t single = chunk_single(c, e);
    if (single >= 0) adam_one<Moment>(k, shrink, s, single);
  }
}

template <class Moment> static void adamw(const KernelCall *c) {
  const AdamSlabs s = {(const float *)c->in.ADAMW.grads,
                       c->out.ADAMW.m,
                       c->out.ADAMW.v,
                       (float *)c->out.ADAMW.ema,
                       (uint16_t *)c->out.ADAMW.weights,
                       (uint16_t *)c->out.ADAMW.remainder,
                       c->args->params.begin};
  const int n = c->args->params.n, most = c->takes ? c->takes : cuda_sm_count();
  for (int p = 0; p < n; p += BATCH_SPANS) {
    SpanBatch batch = batch_of(c->args, p);
    int chunks = batch.first_chunk[batch.n];
    if (chunks)
      CUDA_LAUNCH(adamw_kernel<Moment>, chunks < most ? chunks : most, ADAM_THREADS, 0, call_stream(c),
                  (const UpdateStatus *)c->in.ADAMW.status, (const StepScalars *)c->in.ADAMW.scalars, batch, s);
  }
}

extern "C" void cuda_ADAMW(const KernelCall *c) {
  if (!c->args->params.bf16_moments) return adamw<float>(c);
  if (c->args->params.begin % 8) panic("ADAMW: elements from %lld on", (long long)c->args->params.begin);
  adamw<bf16>(c);
}
