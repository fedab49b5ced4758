// The two ends of the flow: noised patches, and the velocity loss of the predicted ones.
#include "base/philox.h"
#include "kernels/cuda/cuda.h"

enum { THREADS = 256, WARPS = THREADS / 32, TOTAL_THREADS = 512 };

// v / 127.5 - 1, the quotient correctly rounded as by a division: its remainder is exact, and corrects it.
static __device__ inline float pixel_value(uint32_t v) {
  const float inverse = 1 / 127.5f;
  float x = (float)v, quotient = x * inverse;
  return __fmaf_rn(__fmaf_rn(-quotient, 127.5f, x), inverse, quotient) - 1;
}

// Eight pixels in 8 bytes.
static __device__ inline void load_pixels(const uint8_t *p, float x[8]) {
  uint2 v = *(const uint2 *)p;
  const uint32_t w[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = pixel_value(w[i / 4] >> (8 * (i % 4)) & 255);
}

// ---- NOISE ----

// A warp a row. P is a multiple of 8, so eight elements are two blocks of the stream of normals.
static __global__ void __launch_bounds__(THREADS)
    noise_kernel(const __grid_constant__ Batch b, int T, int P, uint32_t stream, bf16 *z) {
  int lane = threadIdx.x % 32, text = b.dims->n_text, used = text + b.dims->n_image;
  uint64_t seed = (uint64_t)b.dims->seed_hi << 32 | b.dims->seed_lo;
  for (int r = blockIdx.x * WARPS + threadIdx.x / 32; r < T; r += gridDim.x * WARPS) {
    bool image = r >= text && r < used;
    int g = image ? b.segment[r] : 0;
    bool noised = image && b.seg_kind[g] == SEGMENT_NOISED;
    float t = noised ? b.seg_time[g] : 1;
    uint64_t document = noised ? b.seg_doc[g] : 0;
    uint32_t its_stream = stream | (noised ? (uint32_t)b.seg_ordinal[g] << 8 : 0);
    int64_t first = noised ? (int64_t)(r - b.seg_start[g]) * P : 0; // number of the row's first normal
    for (int e = lane * 8; e < P; e += 32 * 8) {
      float x[8] = {};
      if (image) load_pixels(b.patch + (int64_t)(r - text) * P + e, x);
#pragma unroll
      for (int half = 0; noised && half < 2; half++) {
        float eps[4];
        philox_normal4(seed, document, its_stream, (uint32_t)((first + e) / 4 + half), eps);
#pragma unroll
        for (int i = 0; i < 4; i++) x[half * 4 + i] = t * x[half * 4 + i] + (1 - t) * eps[i];
      }
      store8(z + (int64_t)r * P + e, x);
    }
  }
}

extern "C" void cuda_NOISE(const KernelCall *c) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(noise_kernel, ceil_div(d->T, WARPS), THREADS, 0, call_stream(c), *c->batch, d->T, d->P,
              c->args->noise.stream, (bf16 *)c->out[0]);
}

// ---- FLOW_LOSS ----

static __device__ inline float time_left(const Batch &b, int g, float t_floor) {
  return fmaxf(1 - b.seg_time[g], t_floor);
}

// A warp a row: dxhat, and of noised rows the sum of squared errors.
static __global__ void __launch_bounds__(THREADS)
    flow_rows_kernel(const __grid_constant__ Batch b, int T, int P, float t_floor, const bf16 *xhat, bf16 *dxhat,
                     float *row_error) {
  int lane = threadIdx.x % 32, text = b.dims->n_text, used = text + b.dims->n_image;
  for (int r = blockIdx.x * WARPS + threadIdx.x / 32; r < T; r += gridDim.x * WARPS) {
    int g = r >= text && r < used ? b.segment[r] : 0;
    bool noised = g && b.seg_kind[g] == SEGMENT_NOISED;
    float left = noised ? time_left(b, g, t_floor) : 1, sum = 0;
    float slope = __fdividef(2 * b.dims->flow_scale, left * left);
#pragma unroll 2
    for (int e = lane * 8; e < P; e += 32 * 8) {
      int64_t at = (int64_t)r * P + e;
      float d[8] = {}, x[8];
      if (noised) {
        load8(xhat + at, d);
        load_pixels(b.patch + (int64_t)(r - text) * P + e, x);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          d[i] -= x[i];
          sum += d[i] * d[i];
          d[i] *= slope;
        }
      }
      if (dxhat) store8(dxhat + at, d);
    }
    sum = warp_sum(sum);
    if (noised && lane == 0) row_error[r] = sum;
  }
}

// One block, a warp a segment at a time: seg_error, and the sums over segments into metrics.
static __global__ void __launch_bounds__(TOTAL_THREADS)
    flow_total_kernel(const __grid_constant__ Batch b, int segments, int P, float t_floor, const float *row_error,
                      float *seg_error, Metrics *metrics) {
  __shared__ double flow_of[TOTAL_THREADS / 32], elements_of[TOTAL_THREADS / 32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double flow = 0, elements = 0;
  for (int g = warp; g < segments; g += TOTAL_THREADS / 32) {
    bool noised = g >= 1 && g < b.dims->n_segments && b.seg_kind[g] == SEGMENT_NOISED;
    double sum = 0;
    if (noised) {
      int start = b.seg_start[g], rows = b.seg_len[g];
      double n = (double)rows * P, left = (double)time_left(b, g, t_floor);
#pragma unroll 4
      for (int i = lane; i < rows; i += 32) sum += (double)row_error[start + i];
      sum = warp_sum_double(sum);
      flow += sum / (left * left);
      elements += n;
      sum /= n;
    }
    if (lane == 0) seg_error[g] = (float)sum;
  }
  if (lane == 0) {
    flow_of[warp] = flow;
    elements_of[warp] = elements;
  }
  __syncthreads();
  if (warp) return;
  flow = warp_sum_double(lane < TOTAL_THREADS / 32 ? flow_of[lane] : 0);
  elements = warp_sum_double(lane < TOTAL_THREADS / 32 ? elements_of[lane] : 0);
  if (lane) return;
  metrics->flow += flow;
  metrics->flow_elems += elements;
}

extern "C" void cuda_FLOW_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  float *row_error = (float *)c->scratch; // [T]
  CUDA_LAUNCH(flow_rows_kernel, ceil_div(d->T, WARPS), THREADS, 0, call_stream(c), *c->batch, d->T, d->P,
              (float)c->args->flow.t_floor, (const bf16 *)c->in[0], (bf16 *)c->out[0], row_error);
  CUDA_LAUNCH(flow_total_kernel, 1, TOTAL_THREADS, 0, call_stream(c), *c->batch, d->segments, d->P,
              (float)c->args->flow.t_floor, row_error, (float *)c->out[1], (Metrics *)c->out[2]);
}

size_t flow_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return kind == OP_FLOW_LOSS ? (size_t)dims->T * sizeof(float) : 0;
}
