// What becomes of a grouped product: one struct an epilogue (gemm.h), for all kernels. A new one is a struct there, one
// here and its rows in GEMM_PRODUCTS (gemm_tiles.h).
//
//   rows<BN>   stores a warp's 16 rows x BN columns from row `warp_row` of a warpgroup's sums; staged: STAGED_BYTES of
//              its own in shared memory (Hopper)
//   quad       stores a row's 32 columns from `column`, of which lane q of a quad of lanes has x[j], 8 j + 2 q and the
//              next; rows behind the tile's last take part (other cards)
//   pair       stores columns col, col + 1 (col even) of a row from their products, summed over the parts of the inner
//              dimension and scaled by scale() (where it was cut)
//
// Where an epilogue READS a tensor with rows like C's, the producers bring it through the ring of stages behind the
// tile's last (Hopper): for each 64 columns of C, GEMM_READS boxes of 128 rows. Instead of rows<BN> it then has
//
//   begin        before the tile is multiplied; what it returns is handed to
//   columns<BN>  stores columns [64 block, 64 block + 64) of a warp's 16 rows, with the boxes
#ifndef TESSERA_GEMM_EPILOGUE_H
#define TESSERA_GEMM_EPILOGUE_H

#include "kernels/cuda/gemm_staging.h"
#include "kernels/cuda/mma.h"

#include <type_traits>

template <class End> struct GemmEpilogue;

// quad() of an epilogue that takes pairs of columns by themselves.
template <class End>
static __device__ inline void quad_pairs(const GemmLaunch<End> &l, const GemmTile &t, int row, int column,
                                         const float2 (&x)[4]) {
  const GemmSide &s = l.work.g.side[t.side];
  const End &end = l.end[t.side];
  float scale = t.partial ? 1 : GemmEpilogue<End>::scale(end);
  if (row >= t.m_end) return;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int col = column + j * 8 + (threadIdx.x & 3) * 2;
    if (col >= s.N) continue;
    if (End::SPLITS && t.partial)
      *(float2 *)(gemm_part_sums<GEMM_NT>(l.work, t) + (int64_t)row * s.N + col) = x[j];
    else
      GemmEpilogue<End>::pair(s, end, row, col, scale * x[j].x, scale * x[j].y);
  }
}

// ---- c = scale A B + bias + add ----

template <> struct GemmEpilogue<GemmStore> {
  static constexpr bool READS = false;

  static __device__ inline float scale(const GemmStore &end) {
    return end.scale ? *end.scale : 1;
  }

  template <int BN>
  static __device__ inline void rows(const GemmLaunch<GemmStore> &l, const GemmTile &t, int warp_row,
                                     float (&acc)[BN / 2], unsigned char *staged) {
    const GemmSide &s = l.work.g.side[t.side];
    const GemmStore &end = l.end[t.side];
    if (t.partial) {
      store_floats<BN>(s, t, warp_row, gemm_part_sums<GEMM_NT>(l.work, t), false, acc, (float *)staged);
      return;
    }
    if (end.scale) {
      float by = *end.scale;
#pragma unroll
      for (int i = 0; i < BN / 2; i++) acc[i] *= by;
    }
    if (end.bias) add_rows<BN>(s, t, end.bias, true, warp_row, acc);
    if (end.add) add_rows<BN>(s, t, end.add, false, warp_row, acc);
    store_rounded<BN>(s, t, warp_row, end.c, NULL, acc, (bf16 *)staged);
  }

  static __device__ inline void pair(const GemmSide &s, const GemmStore &end, int64_t row, int col, float x, float y) {
    int64_t at = row * s.N + col;
    if (end.bias) {
      float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(end.bias + col));
      x += b.x, y += b.y;
    }
    if (end.add) {
      float2 b = __bfloat1622float2(*(const __nv_bfloat162 *)(end.add + at));
      x += b.x, y += b.y;
    }
    *(__nv_bfloat162 *)(end.c + at) = __floats2bfloat162_rn(x, y);
  }

  static __device__ inline void quad(const GemmLaunch<GemmStore> &l, const GemmTile &t, int row, int column,
                                     const float2 (&x)[4]) {
    quad_pairs(l, t, row, column, x);
  }
};

// ---- c = A B in fp32 ----

template <> struct GemmEpilogue<GemmStoreFloat> {
  static constexpr bool READS = false;

  static __device__ inline float scale(const GemmStoreFloat &) {
    return 1;
  }

  template <int BN>
  static __device__ inline void rows(const GemmLaunch<GemmStoreFloat> &l, const GemmTile &t, int warp_row,
                                     float (&acc)[BN / 2], unsigned char *staged) {
    float *out = t.partial ? gemm_part_sums<GEMM_NT>(l.work, t) : l.end[t.side].c;
    store_floats<BN>(l.work.g.side[t.side], t, warp_row, out, false, acc, (float *)staged);
  }

  static __device__ inline void pair(const GemmSide &s, const GemmStoreFloat &end, int64_t row, int col, float x,
                                     float y) {
    *(float2 *)(end.c + row * s.N + col) = make_float2(x, y);
  }

  static __device__ inline void quad(const GemmLaunch<GemmStoreFloat> &l, const GemmTile &t, int row, int column,
                                     const float2 (&x)[4]) {
    quad_pairs(l, t, row, column, x);
  }
};

// ---- c = A B, and the SwiGLU of its pairs ----

template <> struct GemmEpilogue<GemmStoreSwiglu> {
  static constexpr bool READS = false;

  static __device__ inline float scale(const GemmStoreSwiglu &) {
    return 1;
  }

  template <int BN>
  static __device__ inline void rows(const GemmLaunch<GemmStoreSwiglu> &l, const GemmTile &t, int warp_row,
                                     float (&acc)[BN / 2], unsigned char *staged) {
    const GemmStoreSwiglu &end = l.end[t.side];
    store_rounded<BN>(l.work.g.side[t.side], t, warp_row, end.c, end.act, acc, (bf16 *)staged);
  }

  static __device__ inline void pair(const GemmSide &s, const GemmStoreSwiglu &end, int64_t row, int col, float x,
                                     float y) {
    int64_t at = row * s.N + col;
    __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    *(__nv_bfloat162 *)(end.c + at) = rounded;
    end.act[at / 2] = __float2bfloat16_rn(swiglu(__low2float(rounded), __high2float(rounded)));
  }

  static __device__ inline void quad(const GemmLaunch<GemmStoreSwiglu> &l, const GemmTile &t, int row, int column,
                                     const float2 (&x)[4]) {
    quad_pairs(l, t, row, column, x);
  }
};

// ---- the SwiGLU backward of dA = A B ----

// Sums dot[i], pass i's, over the 8 lanes that hold GEMM_DOT_COLUMNS columns of a row, and stores the 8 rows together.
template <class Steps>
static __device__ inline void store_dots(const GemmSide &s, float *to, const Steps &steps, int step,
                                         const float dot[Steps::PASSES]) {
  const int lane = threadIdx.x & 31, pass = lane >> 1 & 3; // of the sum that the lane ends up with
  const bool upper = lane & 4, odd = lane & 2;
  float even_pass = upper ? dot[2] : dot[0], odd_pass = upper ? dot[3] : dot[1];
  even_pass += __shfl_xor_sync(0xffffffffu, upper ? dot[0] : dot[2], 4);
  odd_pass += __shfl_xor_sync(0xffffffffu, upper ? dot[1] : dot[3], 4);
  float sum = odd ? odd_pass : even_pass;
  sum += __shfl_xor_sync(0xffffffffu, odd ? even_pass : odd_pass, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  const int row = steps.row_of(step, pass), block = steps.column_of(step) / GEMM_DOT_COLUMNS;
  if (lane % 2 == 0 && row < steps.rows_end && block * GEMM_DOT_COLUMNS < steps.columns_end)
    to[(int64_t)block * s.rows + row] = sum;
}

// Of GemmSwigluBackward and, without weights and dot products, of GemmSharedBackward.
template <class End> struct SwigluBackwardEpilogue {
  static constexpr bool WEIGHTED = std::is_same<End, GemmSwigluBackward>::value;
  static constexpr bool READS = true;

  // Of row `lane % 16` of a warp's, whose weight it returns.
  static __device__ inline float begin(const GemmLaunch<End> &l, const GemmTile &t, int warp_row) {
    const int row = min(warp_row + (int)(threadIdx.x & 15), t.m_end - 1);
    if constexpr (WEIGHTED)
      return l.end[t.side].weight[l.work.g.side[t.side].a_index[row]];
    else
      return 1;
  }

  // Two boxes of 64 columns of pre are those of 64 columns of dA.
  template <int BN>
  static __device__ inline void columns(const GemmLaunch<End> &l, const GemmTile &t, int warp_row, int block,
                                        float weight, const unsigned char *pre, float (&acc)[BN / 2],
                                        unsigned char *staged) {
    using Steps = StoreSteps<BN, 64>;
    const GemmSide &s = l.work.g.side[t.side];
    const End &end = l.end[t.side];
    float *sums = (float *)staged;
    const Steps steps(s, t, warp_row);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int step = half * Steps::ACROSS + block;
      if (steps.empty(step)) continue;
      stage_floats<BN>(sums, step, acc);
      float dot[Steps::PASSES];
#pragma unroll
      for (int i = 0; i < Steps::PASSES; i++) {
        const float4 v = staged_floats(sums, i);
        const int row = steps.row_of(step, i);
        const float w = __shfl_sync(0xffffffffu, weight, row - warp_row);
        const float da[4] = {v.x, v.y, v.z, v.w};
        float x[8], dx[8], a[4];
        unpack8(*(const uint4 *)(pre + (lane >> 3 & 1) * GEMM_READ_BYTES + swizzled(row - t.m, lane & 7)), x);
        const float part = swiglu_backward4(x, da, w, dx, a);
        const bool in = steps.in(step, i);
        dot[i] = in ? part : 0;
        const int64_t at = steps.at(step, i, s.N);
        if (in) store8(end.dpre + 2 * at, dx);
        if (in) store4(end.sa + at, a);
      }
      if constexpr (WEIGHTED) store_dots(s, end.dot, steps, step, dot);
    }
  }

  // The dot products are summed over the quad.
  static __device__ inline void quad(const GemmLaunch<End> &l, const GemmTile &t, int row, int column,
                                     const float2 (&x)[4]) {
    static_assert(GEMM_DOT_COLUMNS == 32, "a quad's columns are those of a dot product");
    const GemmSide &s = l.work.g.side[t.side];
    const End &end = l.end[t.side];
    bool in = row < t.m_end;
    float w = 1, dot = 0;
    if constexpr (WEIGHTED) w = in ? end.weight[s.a_index[row]] : 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int col = column + j * 8 + (threadIdx.x & 3) * 2;
      if (!in || col >= s.N) continue;
      int64_t at = (int64_t)row * s.N + col;
      uint2 pre = *(const uint2 *)(end.pre + 2 * at);
      SwigluGrad g = swiglu_backward(__uint_as_float(pre.x << 16), __uint_as_float(pre.x & 0xffff0000u), x[j].x);
      SwigluGrad h = swiglu_backward(__uint_as_float(pre.y << 16), __uint_as_float(pre.y & 0xffff0000u), x[j].y);
      *(uint2 *)(end.dpre + 2 * at) = make_uint2(pack2(w * g.dgate, w * g.dup), pack2(w * h.dgate, w * h.dup));
      *(uint32_t *)(end.sa + at) = pack2(w * g.a, w * h.a);
      dot += x[j].x * g.a + x[j].y * h.a;
    }
    if constexpr (WEIGHTED) {
      dot += __shfl_xor_sync(0xffffffffu, dot, 1);
      dot += __shfl_xor_sync(0xffffffffu, dot, 2);
      if (in && column < s.N && (threadIdx.x & 3) == 0)
        end.dot[(int64_t)(column / GEMM_DOT_COLUMNS) * s.rows + row] = dot;
    }
  }
};
template <> struct GemmEpilogue<GemmSwigluBackward> : SwigluBackwardEpilogue<GemmSwigluBackward> {};
template <> struct GemmEpilogue<GemmSharedBackward> : SwigluBackwardEpilogue<GemmSharedBackward> {};

// ---- dw (+)= scale A^T B ----

template <> struct GemmEpilogue<GemmStoreWeights> {
  static constexpr bool READS = false;

  static __device__ inline float scale(const GemmStoreWeights &end) {
    return end.scale ? *end.scale : 1;
  }
  static __device__ inline float *out(const GemmLaunch<GemmStoreWeights> &l, const GemmTile &t) {
    const GemmSide &s = l.work.g.side[t.side];
    if (t.partial) return gemm_part_sums<GEMM_TN>(l.work, t);
    return l.end[t.side].dw + (int64_t)t.group * s.M * s.N;
  }

  template <int BN>
  static __device__ inline void rows(const GemmLaunch<GemmStoreWeights> &l, const GemmTile &t, int warp_row,
                                     float (&acc)[BN / 2], unsigned char *staged) {
    const GemmStoreWeights &end = l.end[t.side];
    if (!t.partial && end.scale) {
      float by = *end.scale;
#pragma unroll
      for (int i = 0; i < BN / 2; i++) acc[i] *= by;
    }
    store_floats<BN>(l.work.g.side[t.side], t, warp_row, out(l, t), end.accumulate && !t.partial, acc, (float *)staged);
  }

  static __device__ inline void quad(const GemmLaunch<GemmStoreWeights> &l, const GemmTile &t, int row, int column,
                                     const float2 (&x)[4]) {
    const GemmSide &s = l.work.g.side[t.side];
    const GemmStoreWeights &end = l.end[t.side];
    float by = t.partial ? 1 : scale(end), *to_row = out(l, t) + (int64_t)row * s.N;
    if (row >= t.m_end) return;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int col = column + j * 8 + (threadIdx.x & 3) * 2;
      if (col >= s.N) continue;
      float2 *to = (float2 *)(to_row + col), v = make_float2(by * x[j].x, by * x[j].y);
      if (end.accumulate && !t.partial) v.x += to->x, v.y += to->y;
      *to = v;
    }
  }
};
#endif
