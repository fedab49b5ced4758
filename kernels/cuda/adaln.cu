// Gate + residual + LayerNorm + per-segment scale and shift (+ SiLU) over packed rows, one kernel each way.
//
// Both kernels are bound by memory: forward moves 8 bytes an element (x, branch in; xnew, h out), backward 12 (dh,
// dxnew, x, branch in; dx, dbranch out) and the sums over segments. Everything between load and store stays in
// registers.
#include "kernels/cuda/adaln_rows.h"

// ---- forward ----

template <class L, bool BRANCH>
static __global__ void __launch_bounds__(L::THREADS, L::BLOCKS) adaln_forward(const AdalnForward f, const bf16 *from) {
  await_previous();
  const AdalnRow row = adaln_row_of<L>(f);
  if (row.r >= f.T) return;

  // All loads are issued at once: what leads to other loads first, then the row, wherever it leads. Filler is told
  // apart while it is on its way.
  int segment = __ldg(f.segment + row.r), n_text = __ldg(&f.dims->n_text), n_image = __ldg(&f.dims->n_image);
  uint4 x[L::VEC], branch[L::VEC], gate[L::VEC], shift[L::VEC], scale[L::VEC];
  adaln_row_load<L>(x, f.x, row);
  if (BRANCH) adaln_row_load<L>(branch, from, row);
  if (row.r >= n_text + n_image) {
    adaln_row_filler<L>(f, row);
    return;
  }
  const bf16 *mod = f.mod + segment * f.M;
  if (BRANCH) adaln_mod_load<L>(gate, mod + f.gate, row);
  adaln_mod_load<L>(shift, mod + f.shift, row);
  adaln_mod_load<L>(scale, mod + f.scale, row);

  float sum = 0;
#pragma unroll
  for (int v = 0; v < L::VEC; v++)
    sum = BRANCH ? adaln_row_residual<L>(f, row, v, x[v], gate[v], branch[v], sum) : adaln_add8(sum, x[v]);
  adaln_row_norm<L>(f, row, x, sum, shift, scale, n_text);
}

extern "C" void cuda_ADALN_FWD(const KernelCall *c) {
  const AdalnForward f = adaln_forward_of(c);
  const bf16 *branch = (const bf16 *)c->in.ADALN_FWD.branch; // [T, C] or NULL
  adaln_layout(f.C, [&](auto layout) {
    using L = decltype(layout);
    int grid = ceil_div(f.T, L::ROWS);
    if (branch)
      CUDA_LAUNCH((adaln_forward<L, true>), grid, L::THREADS, 0, call_stream(c), f, branch);
    else
      CUDA_LAUNCH((adaln_forward<L, false>), grid, L::THREADS, 0, call_stream(c), f, branch);
  });
}

// ---- backward ----

// dh as an operand.
typedef struct GivenGradient {
  const bf16 *dh; // [T, C]

  typedef uint4 Ahead;
  __device__ inline void load(Ahead *ahead, int r, int, int C, int column, bool there) const {
    *ahead = load_once(dh + (int64_t)r * C + column, there);
  }
  __device__ inline uint4 value(const Ahead &ahead, int, int, int, int, bool) const {
    return ahead;
  }
} GivenGradient;

extern "C" void cuda_ADALN_BWD(const KernelCall *c) {
  const AdalnBackward b = adaln_backward_of(c);
  const GivenGradient dh = {(const bf16 *)c->in.ADALN_BWD.dh};
  AdalnRuns runs = adaln_runs_beside(b.C); // of the layer's own gradients, which have just become complete
  int threads = 32 * runs.warps * runs.groups, silu = c->args->adaln.silu_image;
  cudaStream_t stream = call_stream(c);
  if (b.branch && silu)
    CUDA_LAUNCH((adaln_backward<GivenGradient, true, true>), runs.blocks, threads, 0, stream, b, dh);
  else if (b.branch)
    CUDA_LAUNCH((adaln_backward<GivenGradient, true, false>), runs.blocks, threads, 0, stream, b, dh);
  else if (silu)
    CUDA_LAUNCH((adaln_backward<GivenGradient, false, true>), runs.blocks, threads, 0, stream, b, dh);
  else
    CUDA_LAUNCH((adaln_backward<GivenGradient, false, false>), runs.blocks, threads, 0, stream, b, dh);
  adaln_backward_sums(c, &b, runs.blocks);
}

// ---- sums over segments ----

// As many warps as the row has 256 columns; short rows share a block of up to 8 warps.
static AdalnRuns runs_on(int sm_count, int C) {
  AdalnRuns r;
  r.warps = ceil_div(C, 256);
  // A group's columns in shared memory are ADALN_SHARED_COLUMNS / groups: a power of two of groups keeps them aligned.
  r.groups = r.warps == 1 ? 8 : r.warps == 2 ? 4 : r.warps <= 4 ? 2 : 1;
  // Two blocks of up to 8 warps fit on a multiprocessor; longer rows have it to themselves.
  r.blocks = sm_count * (r.warps > 8 ? 1 : 2);
  return r;
}

AdalnRuns adaln_runs(int C) {
  return runs_on(cuda_sm_count(), C);
}

AdalnRuns adaln_runs_beside(int C) {
  return runs_on(cuda_sm_count_beside(), C);
}

int64_t adaln_pieces_size(const Dims *dims) {
  return ((int64_t)adaln_runs(dims->C).blocks + dims->segments) * ADALN_SUMS * dims->C;
}

size_t adaln_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return kind == OP_ADALN_BWD || kind == OP_COMBINE_ADALN_BWD ? (size_t)adaln_pieces_size(dims) * sizeof(float) : 0;
}

// A block sums 4 SUM_COLUMNS columns of one segment, a thread 4 of them over a share of its pieces.
enum { SUM_COLUMNS = 64, SUM_PARTS = 4 };

static __global__ void __launch_bounds__(SUM_COLUMNS *SUM_PARTS)
    segment_sums(const AdalnSums s, const BatchDims *dims, const int32_t *seg_start, const int32_t *seg_len, int C,
                 int64_t M) {
  await_previous();
  __shared__ float4 shared[SUM_PARTS][SUM_COLUMNS];
  int part = threadIdx.y, g = blockIdx.x, first = 4 * (blockIdx.y * SUM_COLUMNS + threadIdx.x); // of [sums][C]
  int start = seg_start[g], len = seg_len[g], run_rows = adaln_run_rows(dims, s.runs);
  if (g >= dims->n_segments) return;
  bool there = first < s.sums * C;
  int run = len ? start / run_rows : 0, pieces = len ? (start + len - 1) / run_rows - run + 1 : 0;
  int begin = pieces * part / SUM_PARTS, end = pieces * (part + 1) / SUM_PARTS;
  const float *from = s.pieces + (int64_t)(run + g) * ADALN_SUMS * C + first;
  if (!there) end = begin;
  float4 sum = slots_sum(from, ADALN_SUMS * C, begin, end, 1);
  shared[part][threadIdx.x] = sum;
  __syncthreads();
  if (part || !there) return;
#pragma unroll
  for (int other = 1; other < SUM_PARTS; other++) sum = add4(sum, shared[other][threadIdx.x]);
  int k = first / C, column = (k == 0 ? s.columns[0] : k == 1 ? s.columns[1] : s.columns[2]) + first - k * C;
  *reinterpret_cast<uint2 *>(s.dmod + g * M + column) = make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
}

void adaln_segment_sums(const KernelCall *c, const AdalnSums *s) {
  const Dims *d = c->dims;
  dim3 grid((unsigned)d->segments, (unsigned)ceil_div(s->sums * d->C / 4, SUM_COLUMNS));
  CUDA_LAUNCH(segment_sums, grid, dim3(SUM_COLUMNS, SUM_PARTS), 0, call_stream(c), *s, c->batch->dims,
              c->batch->seg_start, c->batch->seg_len, d->C, d->M);
}
