// The sum over a token's experts by itself. With the next AdaLN in the same kernel: combine_adaln.cu.
#include "kernels/cuda/combine.h"

#include <limits.h>

enum { THREADS = 256, WARPS = THREADS / 32 };

typedef struct CombineRows {
  Combine s;
  bf16 *out; // [T, C]
  int T, C;
} CombineRows;

// A warp takes a row. Slots ascend with the expert, so that the order of the experts is the order of the slots: lane j
// holds assignment j and counts the smaller ones. N is Kmax, rounded up to a power of two: the loads of all experts are
// in flight together.
template <int N> static __global__ void __launch_bounds__(THREADS) combine_rows(CombineRows p, const BatchDims *dims) {
  await_previous();
  const int n_text = dims->n_text, used = n_text + dims->n_image;
  const int lane = threadIdx.x % 32;
  for (int64_t r = blockIdx.x * WARPS + threadIdx.x / 32; r < p.T; r += gridDim.x * WARPS) {
    const int k = r >= used ? 0 : combine_experts(p.s, r, n_text);
    const int mine = lane < k ? p.s.slot[r * p.s.kmax + lane] : INT_MAX;
    const float weight = lane < k && p.s.weights ? p.s.weights[r * p.s.kmax + lane] : 1;
    int rank = 0;
#pragma unroll
    for (int j = 0; j < N; j++) rank += __shfl_sync(0xffffffffu, mine, j) < mine;
    const bf16 *from[N];
    float w[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int source = __ffs(__ballot_sync(0xffffffffu, rank == n && lane < k)) - 1; // -1, any lane, where n >= k
      const int slot = __shfl_sync(0xffffffffu, mine, source & 31);
      w[n] = __shfl_sync(0xffffffffu, weight, source & 31);
      from[n] = combine_slots(p.s, r, n_text) + (n < k ? (int64_t)slot * p.C : 0);
    }
    for (int column = lane * 8; column < p.C; column += 256) {
      float sum[8] = {0}, x[8];
      uint4 piece[N];
#pragma unroll
      for (int n = 0; n < N; n++)
        piece[n] = n < k ? *reinterpret_cast<const uint4 *>(from[n] + column) : make_uint4(0, 0, 0, 0);
      if (p.s.add && k) load8(p.s.add + r * p.C + column, sum);
#pragma unroll
      for (int n = 0; n < N; n++) {
        unpack8(piece[n], x);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = n < k ? fmaf(w[n], x[i], sum[i]) : sum[i];
      }
      store8(p.out + r * p.C + column, sum);
    }
  }
}

extern "C" void cuda_EXPERT_COMBINE(const KernelCall *c) {
  const Dims *d = c->dims;
  const auto &in = c->in.EXPERT_COMBINE;
  const CombineRows p = {combine_of(c, in.y, in.route, in.weights, in.add), (bf16 *)c->out.EXPERT_COMBINE.out, d->T,
                         d->C};
  const int grid = grid_striding(ceil_div(d->T, WARPS));
  const BatchDims *dims = c->batch->dims;
  if (p.s.kmax == 1)
    CUDA_LAUNCH(combine_rows<1>, grid, THREADS, 0, call_stream(c), p, dims);
  else if (p.s.kmax == 2)
    CUDA_LAUNCH(combine_rows<2>, grid, THREADS, 0, call_stream(c), p, dims);
  else if (p.s.kmax <= 4)
    CUDA_LAUNCH(combine_rows<4>, grid, THREADS, 0, call_stream(c), p, dims);
  else
    CUDA_LAUNCH(combine_rows<CUDA_MOST_CHOSEN>, grid, THREADS, 0, call_stream(c), p, dims);
}
