// The two ends of the flow: noised patches, and the velocity loss of the predicted ones.
#include "base/philox.h"
#include "kernels/cuda/sums.h"

enum { THREADS = 256, WARPS = THREADS / 32 };
enum { LOSS_THREADS = 512, LOSS_WARPS = LOSS_THREADS / 32 };
enum { LOADS = 3 }; // of 8 elements each that a lane has in flight: a row of 16 x 16 patches

static_assert(LOSS_WARPS <= 32, "a warp adds the warps' sums");

// Eight pixels as bytes, and what they stand for. A byte in the second place of the float 2^15 counts ones there, so
// that v - 127.5 is exact, and v / 127.5 - 1 is rounded like one product.
static __device__ inline uint2 load_pixels(const uint8_t *p) {
  return *reinterpret_cast<const uint2 *>(p);
}
static __device__ inline void pixel_values(uint2 pixels, float x[8]) {
  const uint32_t w[2] = {pixels.x, pixels.y};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint32_t bits = __byte_perm(w[i / 4], 0x47000000u, 0x7604 | i % 4 << 4);
    x[i] = (__uint_as_float(bits) - (32768 + 127.5f)) * (1 / 127.5f);
  }
}

// ---- NOISE ----

static __device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
static __device__ inline float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// philox_uniform, made of the bits of a float in [1, 2): the same number.
static __device__ inline float uniform_of(uint32_t v) {
  return __uint_as_float(0x3f800000u | v >> 9) - (1 - 0x1p-24f);
}

// philox_normal2 with approximate functions, whose error (about 2^-21, 6e-4 next to 0) is below what bf16 resolves of
// noised pixels. The exact ones would take longer than the memory. fabsf: the error of a logarithm near 0 may have
// either sign.
static __device__ inline void normal2_approx(uint32_t a, uint32_t b, float *n0, float *n1) {
  float radius = sqrt_approx(fabsf(1.3862943611198906f * log2_approx(uniform_of(a)))), sine, cosine;
  __sincosf(6.2831853071795864769f * uniform_of(b), &sine, &cosine);
  *n0 = radius * cosine;
  *n1 = radius * sine;
}

// A warp a row. P is a multiple of 8, so eight elements are two blocks of the stream of normals. What a row needs is
// read at once, also where it will turn out to be text (segment 0), rather than one after the other.
static __global__ void __launch_bounds__(THREADS)
    noise_kernel(const __grid_constant__ Batch b, int T, int P, uint32_t stream, bf16 *z) {
  await_previous();
  int lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32;
  if (r >= T) return;
  int g = b.segment[r], text = b.dims->n_text;
  uint64_t seed = (uint64_t)b.dims->seed_hi << 32 | b.dims->seed_lo, document = b.seg_doc[g];
  uint32_t its_stream = stream | (uint32_t)b.seg_ordinal[g] << 8;
  float t = b.seg_time[g];
  int kind = b.seg_kind[g], token = r - b.seg_start[g];
  bool noised = g && kind == SEGMENT_NOISED;
  for (int begin = lane * 8; begin < P; begin += LOADS * 256) {
    uint2 pixels[LOADS] = {};
#pragma unroll
    for (int k = 0; k < LOADS; k++)
      if (g && begin + k * 256 < P) pixels[k] = load_pixels(b.patch + (int64_t)(r - text) * P + begin + k * 256);
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      int e = begin + k * 256;
      if (e >= P) break;
      float x[8] = {};
      if (g) pixel_values(pixels[k], x);
      if (noised) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Philox4 bits = philox4(seed, document, its_stream, (uint32_t)(((int64_t)token * P + e) / 4 + half));
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            float *to = x + half * 4 + i, eps[2];
            normal2_approx(bits.v[i], bits.v[i + 1], &eps[0], &eps[1]);
            to[0] = t * to[0] + (1 - t) * eps[0];
            to[1] = t * to[1] + (1 - t) * eps[1];
          }
        }
      }
      store8(z + (int64_t)r * P + e, x);
    }
  }
}

extern "C" void cuda_NOISE(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(noise_kernel, ceil_div(d->T, WARPS), THREADS, 0, call_stream(c), *c->batch, d->T, d->P,
              c->args->noise.stream, (bf16 *)c->out.NOISE.z);
}

// ---- FLOW_LOSS ----

typedef struct FlowLoss {
  int T, P, segments;
  float t_floor;
  const bf16 *xhat; // [T, P]
  bf16 *dxhat;      // [T, P] or NULL
  float *row_error; // [T], of noised rows
  float *seg_error; // [segments]
  Metrics *metrics;
} FlowLoss;

static __device__ inline float time_left(float t, float t_floor) {
  return fmaxf(1 - t, t_floor);
}

// A warp a row: dxhat, and of a noised row the sum of squared errors. Segment 0 stands for no image; what it has in the
// tables is read like any other's, so that nothing waits.
static __global__ void __launch_bounds__(LOSS_THREADS, 3)
    flow_rows_kernel(const __grid_constant__ Batch b, const __grid_constant__ FlowLoss f) {
  await_previous();
  int lane = threadIdx.x % 32, r = blockIdx.x * LOSS_WARPS + threadIdx.x / 32;
  if (r >= f.T) return;
  int g = b.segment[r], text = b.dims->n_text, kind = b.seg_kind[g];
  float left = time_left(b.seg_time[g], f.t_floor), slope = __fdividef(2 * b.dims->flow_scale, left * left), sum = 0;
  bool noised = g && kind == SEGMENT_NOISED;
  if (!noised && !f.dxhat) return;
  for (int begin = lane * 8; begin < f.P; begin += LOADS * 256) {
    uint4 predicted[LOADS];
    uint2 pixels[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      int e = begin + k * 256;
      if (!noised || e >= f.P) break;
      predicted[k] = *reinterpret_cast<const uint4 *>(f.xhat + (int64_t)r * f.P + e);
      pixels[k] = load_pixels(b.patch + (int64_t)(r - text) * f.P + e);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      int e = begin + k * 256;
      if (e >= f.P) break;
      float d[8] = {}, x[8];
      if (noised) {
        unpack8(predicted[k], d);
        pixel_values(pixels[k], x);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          d[i] -= x[i];
          sum += d[i] * d[i];
          d[i] *= slope;
        }
      }
      if (f.dxhat) store8(f.dxhat + (int64_t)r * f.P + e, d);
    }
  }
  if (!noised) return;
  sum = warp_sum(sum);
  if (lane == 0) f.row_error[r] = sum;
}

// One block: seg_error, and the sums over segments into metrics. A warp has every LOSS_WARPS-th segment, 32 of them at
// a time: a lane keeps one's numbers, all lanes add its rows.
static __global__ void __launch_bounds__(LOSS_THREADS)
    flow_total_kernel(const __grid_constant__ Batch b, const __grid_constant__ FlowLoss f) {
  await_previous();
  __shared__ double flow_of[LOSS_WARPS], elements_of[LOSS_WARPS];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double flow = 0, elements = 0;
  for (int first = warp; first < f.segments; first += 32 * LOSS_WARPS) {
    int g = first + lane * LOSS_WARPS, start = 0, rows = 0;
    float left = 1;
    double error = 0;
    bool noised = g >= 1 && g < b.dims->n_segments && b.seg_kind[g] == SEGMENT_NOISED;
    if (noised) {
      start = b.seg_start[g];
      rows = b.seg_len[g];
      left = time_left(b.seg_time[g], f.t_floor);
    }
    for (unsigned todo = __ballot_sync(0xffffffffu, noised); todo; todo &= todo - 1) {
      int whose = __ffs(todo) - 1, n = __shfl_sync(0xffffffffu, rows, whose);
      const float *row = f.row_error + __shfl_sync(0xffffffffu, start, whose);
      double sum = 0;
#pragma unroll 8
      for (int i = lane; i < n; i += 32) sum += (double)row[i];
      sum = warp_sum_double(sum);
      if (lane == whose) error = sum;
    }
    if (g >= f.segments) continue;
    double n = (double)rows * f.P;
    f.seg_error[g] = noised ? (float)(error / n) : 0;
    flow += error / ((double)left * (double)left);
    elements += n;
  }
  flow = warp_sum_double(flow);
  elements = warp_sum_double(elements);
  if (lane == 0) {
    flow_of[warp] = flow;
    elements_of[warp] = elements;
  }
  __syncthreads();
  if (warp) return;
  flow = warp_sum_double(lane < LOSS_WARPS ? flow_of[lane] : 0);
  elements = warp_sum_double(lane < LOSS_WARPS ? elements_of[lane] : 0);
  if (lane) return;
  f.metrics->flow += flow;
  f.metrics->flow_elems += elements;
}

extern "C" void cuda_FLOW_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  FlowLoss f = {};
  f.T = d->T;
  f.P = d->P;
  f.segments = d->segments;
  f.t_floor = (float)c->args->flow.t_floor;
  f.xhat = (const bf16 *)c->in.FLOW_LOSS.xhat;
  f.dxhat = (bf16 *)c->out.FLOW_LOSS.dxhat;
  f.row_error = (float *)c->scratch;
  f.seg_error = (float *)c->out.FLOW_LOSS.seg_error;
  f.metrics = (Metrics *)c->out.FLOW_LOSS.metrics;
  CUDA_LAUNCH(flow_rows_kernel, ceil_div(d->T, LOSS_WARPS), LOSS_THREADS, 0, call_stream(c), *c->batch, f);
  CUDA_LAUNCH(flow_total_kernel, 1, LOSS_THREADS, 0, call_stream(c), *c->batch, f);
}

size_t flow_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return kind == OP_FLOW_LOSS ? (size_t)dims->T * sizeof(float) : 0;
}
