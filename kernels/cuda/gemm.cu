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
  int width;            // elements a row
  int first, end;       // the tile's rows or columns of C: 128 from `first`, nothing from `end` on
} Operand;

// Issues the copies of one stage: inner dimension [inner, inner + BK), zeros from inner_end on.
template <bool INNER>
static __device__ inline void operand_load(const GemmLaunch &l, const Operand &o, int inner, int inner_end,
                                           uint32_t shared) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int row = INNER ? (threadIdx.x >> 2) + 64 * i : (threadIdx.x >> 4) + 16 * i;
    int chunk = INNER ? threadIdx.x & 3 : threadIdx.x & 15;
    int matrix_row = INNER ? o.first + row : inner + row, column = (INNER ? inner : o.first) + chunk * 8;
    bool in = INNER ? matrix_row < o.end && column < inner_end : matrix_row < inner_end && column < o.end;
    int64_t source = !in ? 0 : o.index ? gemm_divide(l, o.index[matrix_row]) : matrix_row;
    copy16_async(shared + tile_offset<INNER>(row, chunk), o.base + (in ? source * o.width + column : 0), in);
  }
}

template <int KIND> static __device__ Operand operand_a(const GemmLaunch &l, const GemmTile &t) {
  const GemmSide &s = l.g.side[t.side];
  Operand o = {s.a, s.a_index, KIND == GEMM_TN ? s.M : s.K, t.m, t.m_end};
  return o;
}
template <int KIND> static __device__ Operand operand_b(const GemmLaunch &l, const GemmTile &t) {
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

// ---- the end of a tile: bias, add, rounding, SwiGLU either way ----

// Columns col, col + 1 (col even) of a row of C from their products.
static __device__ inline void gemm_store_pair(const GemmLaunch &l, const GemmSide &s, int64_t row, int col, float x,
                                              float y) {
  int64_t at = row * s.N + col;
  if (s.bias) {
    float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(s.bias + col));
    x += b.x, y += b.y;
  }
  if (s.add) {
    float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(s.add + at));
    x += b.x, y += b.y;
  }
  if (l.g.c_float) {
    *(float2 *)((float *)s.c + at) = make_float2(x, y);
  } else {
    __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    *(__nv_bfloat162 *)((bf16 *)s.c + at) = rounded;
    x = __low2float(rounded), y = __high2float(rounded);
  }
  if (s.act) s.act[at / 2] = __float2bfloat16_rn(swiglu(x, y));
}

// The (gate, up) pairs of columns col, col + 1 (col even) of a row.
static __device__ inline uint2 gemm_pre_load(const GemmSide &s, int64_t row, int col) {
  return *(const uint2 *)(s.swiglu.pre + (row * s.N + col) * 2);
}

// Stores dpre and sa of those columns from x, y = dA; returns <dA, a>.
static __device__ inline float gemm_store_backward(const GemmSide &s, int64_t row, int col, float w, uint2 pre, float x,
                                                   float y) {
  int64_t at = row * s.N + col;
  SwigluGrad g = swiglu_backward(__uint_as_float(pre.x << 16), __uint_as_float(pre.x & 0xffff0000u), x);
  SwigluGrad h = swiglu_backward(__uint_as_float(pre.y << 16), __uint_as_float(pre.y & 0xffff0000u), y);
  *(uint2 *)(s.swiglu.dpre + 2 * at) = make_uint2(pack2(w * g.dgate, w * g.dup), pack2(w * h.dgate, w * h.dup));
  *(uint32_t *)(s.swiglu.sa + at) = pack2(w * g.a, w * h.a);
  return x * g.a + y * h.a;
}

// Stores `dot`, summed over the quad of lanes that hold GEMM_DOT_COLUMNS columns of a row from `col`. All lanes take
// part; `in`: row and column are the tile's.
static __device__ inline void gemm_store_dot(const GemmSide &s, int64_t row, int col, bool in, float dot) {
  dot += __shfl_xor_sync(0xffffffffu, dot, 1);
  dot += __shfl_xor_sync(0xffffffffu, dot, 2);
  if (in && (threadIdx.x & 3) == 0) s.swiglu.dot[(int64_t)(col / GEMM_DOT_COLUMNS) * s.rows + row] = dot;
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
  bool add = KIND == GEMM_TN && l.g.accumulate && !t.partial;
  float *out = (float *)gemm_tile_out<KIND>(l, t), scale = t.partial ? 1 : gemm_scale(l);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = t.m + (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
      if (row >= t.m_end) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int col = t.n + (warp >> 1) * 32 + j * 8 + (lane & 3) * 2;
        float x = scale * acc[i][j][half * 2], y = scale * acc[i][j][half * 2 + 1];
        if (col >= s.N) continue;
        if (KIND != GEMM_TN && !t.partial) {
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
  int total = tiles.first[gemm_groups(l)];
  for (int round = 0; round * (int)gridDim.x < total; round++) {
    int number = gemm_tile_number(round);
    if (number >= total) break; // only the last round can be short
    GemmTile t = gemm_tile_at<KIND>(l, &tiles, number, BN, BK);
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
    if (KIND == GEMM_NN && l.g.side[t.side].swiglu.pre)
      tile_store_backward(l.g.side[t.side], t, acc);
    else
      tile_store<KIND>(l, t, acc);
  }
}

// ---- parts of an inner dimension ----

// The sums of all parts of two (gemm_weights: four) neighbouring elements of a group, `stride` elements apart.
template <typename V> static __device__ inline V parts_sum(const float *from, int64_t stride, int parts);
template <> __device__ inline float2 parts_sum(const float *from, int64_t stride, int parts) {
  float2 sum = *(const float2 *)from;
  for (int p = 1; p < parts; p++) {
    float2 v = *(const float2 *)(from + p * stride);
    sum.x += v.x, sum.y += v.y;
  }
  return sum;
}
template <> __device__ inline float4 parts_sum(const float *from, int64_t stride, int parts) {
  float4 sum = *(const float4 *)from;
  for (int p = 1; p < parts; p++) {
    float4 v = *(const float4 *)(from + p * stride);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

// C (dW) of every group of several parts: their sum, finished.
template <int KIND> static __global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ GemmLaunch l) {
  __shared__ GemmTiles t;
  gemm_tiles_build<KIND>(l, l.bn, &t);
  int64_t first = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
  float scale = gemm_scale(l);
  for (int g = 0; g < gemm_groups(l); g++) {
    int parts = t.parts[g];
    if (parts < 2) continue;
    const GemmSide &s = l.g.side[gemm_group_side(l, g)];
    const float *from = l.partial + (g > 0 ? t.partial[g - 1] : 0);
    int64_t stride = (int64_t)gemm_tile_rows(&s, KIND) * s.N; // from part to part
    if (KIND == GEMM_TN) {
      int e = g - (gemm_group_side(l, g) == IMAGE ? l.g.side[TEXT].groups : 0);
      float4 *dw = (float4 *)((float *)s.c + e * stride);
      for (int64_t i = first; i < stride / 4; i += step) {
        float4 sum = parts_sum<float4>(from + 4 * i, stride, parts);
        float4 old = l.g.accumulate ? dw[i] : make_float4(0, 0, 0, 0);
        dw[i] = make_float4(old.x + scale * sum.x, old.y + scale * sum.y, old.z + scale * sum.z, old.w + scale * sum.w);
      }
    } else {
      for (int64_t i = first; i < (int64_t)t.count[g] * (s.N / 2); i += step) {
        int64_t row = t.begin[g] + i / (s.N / 2);
        int col = (int)(i % (s.N / 2)) * 2;
        float2 sum = parts_sum<float2>(from + row * s.N + col, stride, parts);
        gemm_store_pair(l, s, row, col, scale * sum.x, scale * sum.y);
      }
    }
  }
}

// ---- the plan: how wide tiles are and into how many parts inner dimensions are cut ----

// The card that plans are made for: an H100, whatever the card. It is not asked of the device, since the plan decides
// the order of sums and a run shall go on to the same bits on another card. A plan follows from the ratio of the two
// rates alone, and only where parts are summed.
static const double planned_tile_rate = 5.4e6; // FLOPs a microsecond of one of GEMM_SHARES multiprocessors, wide tiles
static const double planned_memory_rate = 3e6; // bytes a microsecond
static const double narrow_tiles_cost = 1.25;  // times as long for the same FLOPs

static double tile_us(int bn, double inner) {
  return bn == 256 ? inner * (2.0 * 128 * 256 / planned_tile_rate) + 2
                   : inner * (narrow_tiles_cost * 2 * 128 * 128 / planned_tile_rate) + 1;
}

static bool side_empty(const GemmSide *s, int kind) {
  return s->groups == 0 || gemm_tile_rows(s, kind) == 0 || s->N == 0 || (kind != GEMM_TN && s->K == 0);
}

// The counts are on the device: groups are thought of as equal, both sides as full.
static int64_t side_tiles(const GemmSide *s, int kind, int bn) {
  int64_t down = kind == GEMM_TN ? (int64_t)s->groups * ceil_div(s->M, GEMM_BM)
                                 : ceil_div(s->rows, GEMM_BM) + (s->groups - 1) / 2; // the groups' last tiles
  return down * ceil_div(s->N, bn);
}
static int side_inner(const GemmSide *s, int kind) {
  return kind == GEMM_TN ? s->rows / s->groups : s->K;
}

// A side's parts where `parts` are best for sides of one group. Weight gradients are cut on the device, by the counts,
// unless none of them can ask for it: too few rows, or as many tiles as there are shares.
static int side_parts(const GemmSide *s, int kind, int bn, int parts) {
  if (kind != GEMM_TN) return s->groups == 1 ? parts : 1;
  bool whole = s->rows <= (2 * GEMM_SHORTEST_PART - 1) * GEMM_SHARE_DEPTH;
  whole |= s->groups == 1 && side_tiles(s, kind, bn) >= GEMM_SHARES;
  return whole ? 1 : 0;
}

// What a launch takes. One side: whole rounds of tiles. Two: they fill each other's gaps but for the longest tiles.
static double launch_us(const Gemm *g, int kind, int bn, int parts) {
  double work = 0, longest = 0, rounds = 0;
  int sides = 0;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (side_empty(s, kind)) continue;
    int own = s->groups == 1 ? parts : 1;
    double tile = tile_us(bn, (double)side_inner(s, kind) / own);
    int64_t tiles = side_tiles(s, kind, bn) * own;
    sides++;
    work += tiles * tile / GEMM_SHARES;
    rounds += ceil_div64(tiles, GEMM_SHARES) * tile;
    if (tile > longest) longest = tile;
    if (own == 1) continue;
    const double sums = (double)gemm_tile_rows(s, kind) * s->N * sizeof(float) * (2 * own + 1) / planned_memory_rate;
    work += 2 + sums;
    rounds += 4 + sums;
  }
  return sides > 1 ? work + longest / 2 : rounds;
}

typedef struct Plan {
  int bn, parts[MODALITIES];
  size_t scratch;
} Plan;

// Depends on the shapes alone.
static Plan plan_make(const Gemm *g, int kind) {
  enum { MIN_INNER = 512 }; // of a part
  int most = GEMM_MAX_PARTS, best = 1;
  Plan p = {256, {1, 1}, 0};
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (side_empty(s, kind) || s->groups > 1) continue;
    int longest = side_inner(s, kind) / MIN_INNER;
    if (longest < most) most = longest;
  }
  double least = launch_us(g, kind, p.bn, best);
  for (int bn = 128; bn <= 256; bn += 128)
    for (int parts = 1; parts == 1 || parts <= most; parts++) {
      double us = launch_us(g, kind, bn, parts);
      if (us < least) least = us, p.bn = bn, best = parts;
    }
  size_t sums = 0; // floats of parts of weight gradients, if all groups were cut as far as they may be
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (side_empty(s, kind)) continue;
    p.parts[m] = side_parts(s, kind, p.bn, best);
    if (p.parts[m] > 1) p.scratch += (size_t)best * gemm_tile_rows(s, kind) * s->N * sizeof(float);
    if (p.parts[m] == 0) sums += (size_t)(s->rows / GEMM_SHARE_DEPTH + s->groups) / GEMM_SHORTEST_PART * s->M * s->N;
  }
  const size_t most_sums = (size_t)GEMM_SHARE_UNITS * GEMM_BM * p.bn;
  p.scratch += (sums < most_sums ? sums : most_sums) * sizeof(float);
  return p;
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

static GemmLaunch launch_make(const Gemm *g, int kind) {
  GemmLaunch l = {};
  l.g = *g;
  Plan p = plan_make(g, kind);
  l.bn = p.bn;
  for (int m = 0; m < MODALITIES; m++) {
    if (side_empty(&l.g.side[m], kind)) l.g.side[m].groups = 0;
    l.parts[m] = g->scratch && !g->side[m].swiglu.pre ? p.parts[m] : 1;
  }
  l.partial = (float *)g->scratch;
  // With 2^shift >= divisor, 2^(31 + shift) / divisor rounded up fits in 32 bits and is exact for indices below 2^31.
  uint64_t divisor = g->index_divisor > 0 ? g->index_divisor : 1;
  while (1ull << l.divide_shift < divisor) l.divide_shift++;
  l.divide_shift += 31;
  l.divide_factor = (uint32_t)(((1ull << l.divide_shift) + divisor - 1) / divisor);
  return l;
}

static void gemm_launch(const Gemm *g, int kind, cudaStream_t stream) {
  GemmLaunch l = launch_make(g, kind);
  if (l.g.side[TEXT].groups + l.g.side[IMAGE].groups == 0) return;
  if (gemm_sm90_usable()) {
    gemm_sm90(&l, kind, stream);
  } else {
    l.bn = BN;
    gemm_portable(&l, kind, stream);
  }
  bool whole = true;
  for (int m = 0; m < MODALITIES; m++) whole &= l.g.side[m].groups == 0 || l.parts[m] == 1;
  if (whole) return;
  const dim3 grid(4 * cuda_sm_count());
  if (kind == GEMM_TN)
    CUDA_LAUNCH(finish_kernel<GEMM_TN>, grid, 256, 0, stream, l);
  else
    CUDA_LAUNCH(finish_kernel<GEMM_NT>, grid, 256, 0, stream, l);
}

void gemm_rows(const Gemm *g, cudaStream_t stream) {
  gemm_launch(g, g->b_transposed ? GEMM_NN : GEMM_NT, stream);
}
void gemm_weights(const Gemm *g, cudaStream_t stream) {
  gemm_launch(g, GEMM_TN, stream);
}
size_t gemm_rows_scratch(const Gemm *g) {
  return plan_make(g, g->b_transposed ? GEMM_NN : GEMM_NT).scratch;
}
size_t gemm_weights_scratch(const Gemm *g) {
  return plan_make(g, GEMM_TN).scratch;
}
