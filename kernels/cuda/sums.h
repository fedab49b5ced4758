// Sums in a fixed order, so that the same inputs give the same bits: nothing here or anywhere else uses float atomics.
//
// What many blocks contribute to (gradients of biases, norms, modulation, routers) is summed in two passes. In the
// first every block leaves its sums in a slot of scratch memory; in the second few threads own each column, add its
// slots in order, each over a share of them, and then the shares. Which slots there are depends on the pack, on fixed
// numbers and, for AdaLN, on the card's multiprocessors, never on who was first.
#ifndef TESSERA_SUMS_H
#define TESSERA_SUMS_H

#include "kernels/cuda/cuda.h"

// ---- over a warp or a block; every lane (thread) gets the result ----

static __device__ inline float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
static __device__ inline double warp_sum_double(double v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
// Over a block of whole warps, at most 32 of them. `shared` holds 32 floats and may be used again after a
// __syncthreads().
static __device__ inline float block_sum(float v, float *shared) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  v = warp_sum(v);
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  v = lane < warps ? shared[lane] : 0;
  return warp_sum(v);
}

// Over a block of THREADS; only thread 0 gets the result. `shared` holds THREADS / 32.
template <int THREADS> static __device__ double block_sum_double(double v, double *shared) {
  v = warp_sum_double(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x) return 0;
  double sum = 0;
  for (int i = 0; i < THREADS / 32; i++) sum += shared[i];
  return sum;
}

// ---- columns, four or eight a thread ----

static __device__ inline float4 add4(const float4 &a, const float4 &b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// `to` must be aligned to 16 bytes.
static __device__ inline void store_sums(float *to, const float sum[8]) {
  float4 *at = reinterpret_cast<float4 *>(to);
  at[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  at[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

// The four columns at from + i stride for i = begin, begin + step, .. < end, added in that order.
static __device__ inline float4 slots_sum(const float *from, int64_t stride, int begin, int end, int step) {
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8 // loads in flight
  for (int i = begin; i < end; i += step) sum = add4(sum, *reinterpret_cast<const float4 *>(from + i * stride));
  return sum;
}

// One column's SLOTS slots, in order.
template <int SLOTS> static __device__ inline float slots_sum(const float *from, int64_t stride) {
  float sum = 0;
#pragma unroll 16 // loads in flight
  for (int i = 0; i < SLOTS; i++) sum += from[i * stride];
  return sum;
}

// ---- a block of THREADS whose threads share the rows of EIGHTS eights of columns: thread i has eight i % EIGHTS ----

// Floats from one thread row's sums in shared memory to the next: 4 more than they are, so that neighbouring threads'
// lie in other banks.
static __host__ __device__ constexpr int shares_stride(int eights) {
  return eights * 8 + 4;
}
static __host__ __device__ constexpr int shares_floats(int threads, int eights) {
  return threads / eights * shares_stride(eights);
}

// out[column] (+)= the sums of all threads that have the eight of `column`, in the order of the threads. The block has
// columns 0 .. `columns` - 1 of `out`, 8 EIGHTS of them at most. `shared`: shares_floats(THREADS, EIGHTS), aligned to
// 16 bytes.
template <int THREADS, int EIGHTS>
static __device__ inline void add_shares(const float sum[8], float *shared, int columns, int accumulate, float *out) {
  static_assert(THREADS % EIGHTS == 0 && EIGHTS * 8 <= THREADS, "every eight has as many threads, every column one");
  __syncthreads();
  store_sums(shared + threadIdx.x / EIGHTS * shares_stride(EIGHTS) + threadIdx.x % EIGHTS * 8, sum);
  __syncthreads();
  int column = threadIdx.x;
  if (column >= EIGHTS * 8 || column >= columns) return;
  float total = accumulate ? out[column] : 0;
  for (int i = 0; i < THREADS / EIGHTS; i++) total += shared[i * shares_stride(EIGHTS) + column];
  out[column] = total;
}
#endif
