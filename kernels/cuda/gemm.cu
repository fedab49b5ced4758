// Grouped products: the entry points, how inner dimensions are cut, and kernels for any card from sm_80 on (mma.sync
// fed by cp.async). Hopper has its own: gemm_sm90.cu.
#include "kernels/cuda/gemm_tiles.h"
#include "kernels/cuda/mma.h"

// ---- the portable kernel ----

enum {
  BN = 128,
  BK = 32,
  STAGES = 4,
  THREADS = 256,                // 2 x 4 warps, each 64 x 32 of the tile
  OPERAND_BYTES = 128 * BK * 2, // an operand's part of a stage
  SHARED_BYTES = STAGES * 2 * OPERAND_BYTES
};

// An operand's tile in shared memory: 128 rows (of C or columns of C) x BK of the inner dimension, in chunks of 8
// elements. Inner-contiguous (K-major): rows of 4 chunks. Otherwise BK rows of 16 chunks. Both are swizzled so that the
// 8 rows that ldmatrix reads at once lie in different banks.
template <bool INNER> static __device__ inline uint32_t tile_offset(int row, int chunk) {
  return INNER ? row * 64 + ((chunk ^ (row >> 1 & 3)) << 4) : row * 256 + ((chunk ^ (row & 7)) << 4);
}

// Where an operand of a tile comes from. Rows of its matrix are `inner` (INNER false) or tile rows (INNER true).
typedef struct Operand {
  const bf16 *base;
  const int32_t *index; // of rows of the matrix, or NULL
  int divisor;
  int width;      // elements a row
  int first, end; // the tile's rows or columns of C: 128 from `first`, nothing from `end` on
} Operand;

// Issues the copies of one stage: inner dimension [inner, inner + BK), zeros from inner_end on.
template <bool INNER>
static __device__ inline void operand_load(const Operand &o, int inner, int inner_end, uint32_t shared) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = INNER ? (threadIdx.x >> 2) + 64 * i : (threadIdx.x >> 4) + 16 * i;
    int chunk = INNER ? threadIdx.x & 3 : threadIdx.x & 15;
    int matrix_row = INNER ? o.first + row : inner + row, column = (INNER ? inner : o.first) + chunk * 8;
    bool in = INNER ? matrix_row < o.end && column < inner_end : matrix_row < inner_end && column < o.end;
    int64_t source = in ? gemm_row_source(o.index, matrix_row, o.divisor) : 0;
    copy16_async(shared + tile_offset<INNER>(row, chunk), o.base + (in ? source * o.width + column : 0), in);
  }
}

template <int KIND> static __device__ Operand operand_a(const GemmLaunch &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  Operand o = {s.a, s.a_index, l.g.index_divisor, KIND == GEMM_TN ? s.M : s.K, t.m, t.m_end};
  return o;
}
template <int KIND> static __device__ Operand operand_b(const GemmLaunch &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  Operand o = {s.b, KIND == GEMM_TN ? s.b_index : NULL, l.g.index_divisor, KIND == GEMM_NT ? s.K : s.N, t.n, s.N};
  if (KIND != GEMM_TN) o.base += (int64_t)t.group * s.N * s.K;
  return o;
}

// The four 8x8 matrices of an operand's 16 x 16 block (tile rows from `row`, inner from `k`): tile rows +0, +8 by
// matrix & 1 and inner +0, +8 by matrix >> 1 for A; the other way round for B, where a pair makes one 16 x 8 fragment.
template <bool INNER, bool IS_B>
static __device__ inline void fragment_load(uint32_t tile, int row, int k, uint32_t f[4]) {
  int lane = threadIdx.x & 31, matrix = lane >> 3, r = lane & 7;
  int up = IS_B ? matrix >> 1 : matrix & 1, right = IS_B ? matrix & 1 : matrix >> 1;
  if (INNER)
    load_matrix(f, tile + tile_offset<true>(row + up * 8 + r, (k >> 3) + right));
  else
    load_matrix_transposed(f, tile + tile_offset<false>(k + right * 8 + r, (row >> 3) + up));
}

// A warp's columns are GEMM_DOT_COLUMNS.
static __device__ void tile_store_backward(const GemmSide &s, const GemmTile &t, float acc[4][4][4]) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = t.n + (warp >> 1) * 32;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = t.m + (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
      bool in = row < t.m_end;
      float w = in ? s.swiglu.weight[s.a_index[row]] : 0, dot = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int col = first + j * 8 + (lane & 3) * 2;
        if (!in || col >= s.N) continue;
        dot += gemm_store_backward(s, row, col, w, gemm_pre_load(s, row, col), acc[i][j][half * 2],
                                   acc[i][j][half * 2 + 1]);
      }
      gemm_store_dot(s, row, first, in && first < s.N, dot);
    }
}

template <int KIND> static __device__ void tile_store(const GemmLaunch &l, const GemmTile &t, float acc[4][4][4]) {
  const GemmSide &s = l.g.side[t.side];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  bool partial = l.parts[t.side] > 1, add = KIND == GEMM_TN && l.g.accumulate && !partial;
  float *out = (float *)gemm_tile_out<KIND>(l, t);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = t.m + (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
      if (row >= t.m_end) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int col = t.n + (warp >> 1) * 32 + j * 8 + (lane & 3) * 2;
        float x = acc[i][j][half * 2], y = acc[i][j][half * 2 + 1];
        if (col >= s.N) continue;
        if (KIND != GEMM_TN && !partial) {
          gemm_store_pair(l, s, row, col, x, y);
          continue;
        }
        float2 *to = (float2 *)(out + (int64_t)row * s.N + col);
        if (add) x += to->x, y += to->y;
        *to = make_float2(x, y);
      }
    }
}

template <int KIND>
static __global__ void __launch_bounds__(THREADS, 2) gemm_kernel(const __grid_constant__ GemmLaunch l) {
  constexpr bool A_INNER = KIND != GEMM_TN, B_INNER = KIND == GEMM_NT;
  extern __shared__ __align__(1024) unsigned char stages[]; // [STAGES][A, B]
  __shared__ GemmTiles tiles;
  uint32_t shared = shared_address(stages);
  int warp = threadIdx.x >> 5;
  gemm_tiles_build<KIND>(l, BN, &tiles);
  for (int number = blockIdx.x; number < gemm_tiles_total(&tiles); number += gridDim.x) {
    GemmTile t = gemm_tile_at<KIND>(l, &tiles, number, BN, BK);
    Operand a = operand_a<KIND>(l, t), b = operand_b<KIND>(l, t);
    int steps = ceil_div(t.inner_end - t.inner, BK);
    float acc[4][4][4] = {}; // [16-row block][8-column block][fragment]
    for (int i = 0; i < STAGES - 1; i++) {
      uint32_t stage = shared + i * 2 * OPERAND_BYTES;
      if (i < steps) {
        operand_load<A_INNER>(a, t.inner + i * BK, t.inner_end, stage);
        operand_load<B_INNER>(b, t.inner + i * BK, t.inner_end, stage + OPERAND_BYTES);
      }
      copy_commit(); // an empty group where there is no step, so that the count of groups still tells
    }
    for (int i = 0; i < steps; i++) {
      copy_wait<STAGES - 2>();
      __syncthreads(); // stage i has arrived for all; all are done with the stage that is filled next
      int next = i + STAGES - 1;
      if (next < steps) {
        uint32_t stage = shared + next % STAGES * 2 * OPERAND_BYTES;
        operand_load<A_INNER>(a, t.inner + next * BK, t.inner_end, stage);
        operand_load<B_INNER>(b, t.inner + next * BK, t.inner_end, stage + OPERAND_BYTES);
      }
      copy_commit();
      uint32_t stage = shared + i % STAGES * 2 * OPERAND_BYTES;
#pragma unroll
      for (int k = 0; k < BK; k += 16) {
        uint32_t fa[4][4], fb[2][4];
#pragma unroll
        for (int m = 0; m < 4; m++) fragment_load<A_INNER, false>(stage, (warp & 1) * 64 + m * 16, k, fa[m]);
#pragma unroll
        for (int n = 0; n < 2; n++)
          fragment_load<B_INNER, true>(stage + OPERAND_BYTES, (warp >> 1) * 32 + n * 16, k, fb[n]);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
          for (int n = 0; n < 4; n++) mma_add(acc[m][n], fa[m], fb[n >> 1] + (n & 1) * 2);
      }
    }
    __syncthreads(); // before the next tile's first stages
    if (KIND == GEMM_NN && l.g.side[t.side].swiglu.pre)
      tile_store_backward(l.g.side[t.side], t, acc);
    else
      tile_store<KIND>(l, t, acc);
  }
}

// ---- parts of an inner dimension ----

// gemm_rows: C of the rows of the side's one group = the sum of the parts, finished.
static __global__ void finish_rows_kernel(const __grid_constant__ GemmLaunch l, int side) {
  const GemmSide &s = l.g.side[side];
  int begin = s.extent.begin_fixed + (s.extent.begin ? s.extent.begin[0] : 0);
  int count = s.extent.count_fixed + (s.extent.count ? s.extent.count[0] : 0);
  int64_t pairs = (int64_t)max(count, 0) * (s.N / 2), stride = (int64_t)s.rows * s.N; // of parts
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < pairs; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t row = begin + i / (s.N / 2);
    int col = (int)(i % (s.N / 2)) * 2;
    const float *from = l.partial[side] + row * s.N + col;
    float2 sum = *(const float2 *)from;
    for (int p = 1; p < l.parts[side]; p++) {
      float2 v = *(const float2 *)(from + p * stride);
      sum.x += v.x, sum.y += v.y;
    }
    gemm_store_pair(l, s, row, col, sum.x, sum.y);
  }
}

// gemm_weights: dW (+)= the sum of the parts, 4 elements at a time.
static __global__ void finish_weights_kernel(const __grid_constant__ GemmLaunch l, int side) {
  const GemmSide &s = l.g.side[side];
  int64_t n = (int64_t)s.groups * s.M * s.N / 4;
  const float4 *from = (const float4 *)l.partial[side];
  float4 *dw = (float4 *)s.c;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    float4 sum = from[i];
    for (int p = 1; p < l.parts[side]; p++) {
      float4 v = from[p * n + i];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    if (l.g.accumulate) {
      float4 v = dw[i];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    dw[i] = sum;
  }
}

// Into how many parts a side's inner dimension is cut: the number that is fastest by a model of the card. Tiles of 128
// x 256 at 5.5 TFLOP/s a multiprocessor run in waves; parts cost a pass over their sums, written and read at 3 TB/s,
// and a launch. 132 multiprocessors, not the card's own number: the result then does not depend on the card.
static int side_parts(const GemmSide *s, int kind) {
  enum { SMS = 132, MIN_INNER = 512 };
  int64_t rows = gemm_tile_rows(s, kind), groups = kind == GEMM_TN ? s->groups : 1;
  int64_t tiles = ceil_div64(rows, GEMM_BM) * ceil_div(s->N, 256) * groups;
  int64_t inner = kind == GEMM_TN ? s->rows / s->groups : s->K;
  if (kind != GEMM_TN && s->groups > 1) return 1; // finish_rows_kernel takes one extent
  int best = 1;
  double least = 0;
  for (int parts = 1; parts <= GEMM_MAX_PARTS && (parts == 1 || inner / parts >= MIN_INNER); parts++) {
    double us = (double)ceil_div64(tiles * parts, SMS) * inner / parts * (2.0 * 128 * 256 / 5.5e6);
    if (parts > 1) us += 4 + (double)rows * groups * s->N * 4 * (2 * parts + 1) / 3e6;
    if (parts == 1 || us < least) least = us, best = parts;
  }
  return best;
}

static size_t part_bytes(const GemmSide *s, int kind, int parts) {
  if (parts < 2) return 0;
  return (size_t)parts * gemm_tile_rows(s, kind) * s->N * sizeof(float) * (kind == GEMM_TN ? s->groups : 1);
}

static int side_empty(const GemmSide *s, int kind) {
  return s->groups == 0 || gemm_tile_rows(s, kind) == 0 || s->N == 0 || (kind != GEMM_TN && s->K == 0);
}

static size_t scratch_bytes(const Gemm *g, int kind) {
  size_t bytes = 0;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (!side_empty(s, kind)) bytes += part_bytes(s, kind, side_parts(s, kind));
  }
  return bytes;
}

// ---- entry points ----

static void gemm_portable(const GemmLaunch *l, int kind, cudaStream_t stream) {
  const dim3 grid(2 * cuda_sm_count());
#define GEMM_PORTABLE(KIND)                                                                                            \
  do {                                                                                                                 \
    CUDA_ALLOW_SHARED(gemm_kernel<KIND>, SHARED_BYTES);                                                                \
    CUDA_LAUNCH(gemm_kernel<KIND>, grid, THREADS, SHARED_BYTES, stream, *l);                                           \
  } while (0)
  if (kind == GEMM_NT) GEMM_PORTABLE(GEMM_NT);
  if (kind == GEMM_NN) GEMM_PORTABLE(GEMM_NN);
  if (kind == GEMM_TN) GEMM_PORTABLE(GEMM_TN);
#undef GEMM_PORTABLE
}

static void gemm_launch(const Gemm *g, int kind, cudaStream_t stream) {
  GemmLaunch l = {};
  l.g = *g;
  if (l.g.index_divisor == 0) l.g.index_divisor = 1;
  int work = 0;
  char *scratch = (char *)g->scratch;
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &l.g.side[m];
    if (side_empty(s, kind)) s->groups = 0;
    if (s->groups == 0) continue;
    work = 1;
    l.parts[m] = scratch && !s->swiglu.pre ? side_parts(s, kind) : 1;
    l.partial[m] = (float *)scratch;
    if (scratch) scratch += part_bytes(s, kind, l.parts[m]);
  }
  if (!work) return;
  if (gemm_sm90_usable())
    gemm_sm90(&l, kind, stream);
  else
    gemm_portable(&l, kind, stream);
  const dim3 grid(4 * cuda_sm_count());
  for (int m = 0; m < MODALITIES; m++) {
    if (l.g.side[m].groups == 0 || l.parts[m] < 2) continue;
    if (kind == GEMM_TN)
      CUDA_LAUNCH(finish_weights_kernel, grid, 256, 0, stream, l, m);
    else
      CUDA_LAUNCH(finish_rows_kernel, grid, 256, 0, stream, l, m);
  }
}

void gemm_rows(const Gemm *g, cudaStream_t stream) {
  gemm_launch(g, g->b_transposed ? GEMM_NN : GEMM_NT, stream);
}
void gemm_weights(const Gemm *g, cudaStream_t stream) {
  gemm_launch(g, GEMM_TN, stream);
}
size_t gemm_rows_scratch(const Gemm *g) {
  return scratch_bytes(g, g->b_transposed ? GEMM_NN : GEMM_NT);
}
size_t gemm_weights_scratch(const Gemm *g) {
  return scratch_bytes(g, GEMM_TN);
}
