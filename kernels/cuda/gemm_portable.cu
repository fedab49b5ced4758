// Grouped products on any card from sm_80 on: mma.sync fed by cp.async.
#include "kernels/cuda/gemm_epilogue.h"

enum {
  BN = GEMM_PORTABLE_BN,
  BK = 32,
  STAGES = 4,
  THREADS = 256,                // 2 x 4 warps, each 64 x 32 of the tile
  OPERAND_BYTES = 128 * BK * 2, // an operand's part of a stage
  SHARED_BYTES = STAGES * 2 * OPERAND_BYTES
};

static_assert(GEMM_BM == 128 && BN == 128, "operand_load copies 128 rows of either operand");
static_assert(128 * (BK / 8) == 2 * THREADS, "operand_load: a thread copies two chunks of a stage");
static_assert(THREADS / 32 * 64 * 32 == GEMM_BM * BN, "2 x 4 warps cover the tile");

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
  int width;            // elements a row
  int first, end;       // the tile's rows or columns of C: 128 from `first`, nothing from `end` on
} Operand;

// Issues the copies of one stage: inner dimension [inner, inner + BK), zeros from inner_end on.
template <bool INNER>
static __device__ inline void operand_load(const GemmWork &l, const Operand &o, int inner, int inner_end,
                                           uint32_t shared) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = INNER ? (threadIdx.x >> 2) + 64 * i : (threadIdx.x >> 4) + 16 * i;
    int chunk = INNER ? threadIdx.x & 3 : threadIdx.x & 15;
    int matrix_row = INNER ? o.first + row : inner + row, column = (INNER ? inner : o.first) + chunk * 8;
    bool in = INNER ? matrix_row < o.end && column < inner_end : matrix_row < inner_end && column < o.end;
    int64_t source = !in ? 0 : o.index ? divide(o.index[matrix_row], &l.index_divisor) : matrix_row;
    copy16_async(shared + tile_offset<INNER>(row, chunk), o.base + (in ? source * o.width + column : 0), in);
  }
}

template <int KIND> static __device__ Operand operand_a(const GemmWork &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  Operand o = {s.a, s.a_index, KIND == GEMM_TN ? s.M : s.K, t.m, t.m_end};
  return o;
}
template <int KIND> static __device__ Operand operand_b(const GemmWork &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  Operand o = {s.b, KIND == GEMM_TN ? s.b_index : NULL, KIND == GEMM_NT ? s.K : s.N, t.n, s.N};
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

// A warp has 64 rows and 32 columns of the tile; a quad of lanes has a row of them.
template <class End>
static __device__ void tile_store(const GemmLaunch<End> &l, const GemmTile &t, const float (&acc)[4][4][4]) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = t.n + (warp >> 1) * 32;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = t.m + (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
      float2 x[4]; // columns + 8 j, of which the lane has two
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
      GemmEpilogue<End>::quad(l, t, row, column, x);
    }
}

template <int KIND, class End>
static __global__ void __launch_bounds__(THREADS, 2) gemm_kernel(const __grid_constant__ GemmLaunch<End> launch) {
  await_previous();
  const GemmWork &l = launch.work;
  constexpr bool A_INNER = KIND != GEMM_TN, B_INNER = KIND == GEMM_NT;
  extern __shared__ __align__(1024) unsigned char stages[]; // [STAGES][A, B]
  __shared__ GemmTiles tiles;
  uint32_t shared = shared_address(stages);
  int warp = threadIdx.x >> 5;
  gemm_tiles_load<KIND>(l, &tiles);
  if (KIND != GEMM_TN) gemm_fill(l.g, blockIdx.x * THREADS + threadIdx.x, gridDim.x * THREADS);
  const int total = gemm_tiles_total(&l.shape, &tiles);
  for (int round = 0; round * (int)gridDim.x < total; round++) {
    int number = gemm_tile_number(round, blockIdx.x, gridDim.x);
    if (number >= total) break; // only the last round can be short
    GemmTile t = gemm_tile_at(KIND, &l.shape, &tiles, number, BK);
    Operand a = operand_a<KIND>(l, t), b = operand_b<KIND>(l, t);
    int steps = ceil_div(t.inner_end - t.inner, BK);
    float acc[4][4][4] = {}; // [16-row block][8-column block][fragment]
    for (int i = 0; i < STAGES - 1; i++) {
      uint32_t stage = shared + i * 2 * OPERAND_BYTES;
      if (i < steps) {
        operand_load<A_INNER>(l, a, t.inner + i * BK, t.inner_end, stage);
        operand_load<B_INNER>(l, b, t.inner + i * BK, t.inner_end, stage + OPERAND_BYTES);
      }
      copy_commit(); // an empty group where there is no step, so that the count of groups still tells
    }
    for (int i = 0; i < steps; i++) {
      copy_wait<STAGES - 2>();
      __syncthreads(); // stage i has arrived for all; all are done with the stage that is filled next
      int next = i + STAGES - 1;
      if (next < steps) {
        uint32_t stage = shared + next % STAGES * 2 * OPERAND_BYTES;
        operand_load<A_INNER>(l, a, t.inner + next * BK, t.inner_end, stage);
        operand_load<B_INNER>(l, b, t.inner + next * BK, t.inner_end, stage + OPERAND_BYTES);
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
    tile_store(launch, t, acc);
  }
}

template <class End> void gemm_portable(const GemmLaunch<End> *l, int kind, cudaStream_t stream) {
#define LAUNCH(KIND, LOAD, END)                                                                                        \
  if constexpr (std::is_same<End, END>::value) {                                                                       \
    if (kind == KIND) {                                                                                                \
      auto kernel = gemm_kernel<KIND, END>;                                                                            \
      CUDA_ALLOW_SHARED(kernel, SHARED_BYTES);                                                                         \
      CUDA_LAUNCH(kernel, 2 * cuda_sm_count(), THREADS, SHARED_BYTES, stream, *l);                                     \
      return;                                                                                                          \
    }                                                                                                                  \
  }
  GEMM_PRODUCTS(LAUNCH)
#undef LAUNCH
  panic("grouped product: kind %d is not built with this epilogue", kind);
}
template void gemm_portable(const GemmLaunch<GemmStore> *, int, cudaStream_t);
template void gemm_portable(const GemmLaunch<GemmStoreFloat> *, int, cudaStream_t);
template void gemm_portable(const GemmLaunch<GemmStoreSwiglu> *, int, cudaStream_t);
template void gemm_portable(const GemmLaunch<GemmSwigluBackward> *, int, cudaStream_t);
template void gemm_portable(const GemmLaunch<GemmSharedBackward> *, int, cudaStream_t);
template void gemm_portable(const GemmLaunch<GemmStoreWeights> *, int, cudaStream_t);
