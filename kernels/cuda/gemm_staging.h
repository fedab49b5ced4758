// From a warpgroup's sums to memory and back, 16 bytes a lane: what the epilogues are made of on Hopper.
//
// Products lie in the accumulators as the instruction leaves them: of each 8 columns lane q of a quad of lanes has 2 q
// and the next, of row (lane / 4) and of that 8 further down. Memory is accessed 16 bytes a lane: what is added is
// exchanged within quads, what is stored goes through shared memory, so that 16 lanes have one row and whole lines go
// out.
#ifndef TESSERA_GEMM_STAGING_H
#define TESSERA_GEMM_STAGING_H

#include "kernels/cuda/activation.h"
#include "kernels/cuda/gemm_tiles.h"

// Shared memory of a warp for its sums on their way: STAGED_ROWS rows of 64 columns in fp32 or 128 in bf16.
enum { STAGED_ROWS = 8, FLOATS_PITCH = 64 + 8, ROUNDED_PITCH = 128 + 8, STAGED_BYTES = STAGED_ROWS * FLOATS_PITCH * 4 };
static_assert(STAGED_ROWS * ROUNDED_PITCH * 2 <= STAGED_BYTES, "rounded sums fit where those in fp32 do");
static_assert(FLOATS_PITCH * 4 % 16 == 0 && ROUNDED_PITCH * 2 % 16 == 0, "staged rows are read 16 bytes a lane");

// What an epilogue reads comes in boxes of 128 rows of 64 columns, swizzled.
enum { GEMM_READS = 2, GEMM_READ_BYTES = GEMM_BM * 64 * 2 };
static __device__ inline uint32_t swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Lane q holds p[b] = M[q][b]; afterwards p[b] = M[b][q].
static __device__ inline void transpose_quad(uint32_t p[4]) {
#pragma unroll
  for (int d = 1; d <= 2; d <<= 1) {
    bool upper = threadIdx.x & d;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      if (b & d) continue;
      uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? p[b] : p[b + d], d);
      if (upper)
        p[b] = other;
      else
        p[b + d] = other;
    }
  }
}

// Adds rows of `from` [., N] (bias: a single row) to the sums.
template <int BN>
static __device__ inline void add_rows(const GemmSide &s, const GemmTile &t, const bf16 *from, bool single,
                                       int warp_row, float (&acc)[BN / 2]) {
  int first_row = warp_row + ((threadIdx.x & 31) >> 2);
  // Of the thread's sums; behind the tile's last row, that row again.
  const int64_t rows[2] = {min(first_row, t.m_end - 1), min(first_row + 8, t.m_end - 1)};
  int column = t.n + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bf16 *row = from + (single ? 0 : rows[half] * s.N);
    enum { BATCH = 4 }; // loads under way together
#pragma unroll
    for (int first = 0; first < BN / 32; first += BATCH) {
      uint4 v[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; j++) v[j] = *(const uint4 *)(row + min(column + 32 * (first + j), s.N - 8));
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        uint32_t p[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        transpose_quad(p);
#pragma unroll
        for (int b = 0; b < 4; b++) {
          float *sum = acc + 4 * (4 * (first + j) + b) + 2 * half;
          sum[0] += __uint_as_float(p[b] << 16);
          sum[1] += __uint_as_float(p[b] & 0xffff0000u);
        }
      }
    }
  }
}

// ---- sums on their way to memory ----

// A warp's 16 rows x BN columns go in steps of STAGED_ROWS rows and WIDTH columns, row after row. Afterwards lane
// (16 r + c) has 16 bytes, c of 16, of rows r, r + 2, r + 4 and r + 6.
template <int BN, int WIDTH> struct StoreSteps {
  static_assert(BN % WIDTH == 0, "a warp's columns go in whole steps");
  enum { ACROSS = BN / WIDTH, COUNT = 2 * ACROSS, PASSES = STAGED_ROWS / 2 };
  int row, column;           // the lane's, of the first step and pass
  int warp_row, tile_column; // where the warp begins
  int rows_end, columns_end;
  __device__ StoreSteps(const GemmSide &s, const GemmTile &t, int first_row) {
    int lane = threadIdx.x & 31;
    warp_row = first_row;
    tile_column = t.n;
    row = warp_row + lane / 16;
    column = t.n + lane % 16 * (WIDTH / 16);
    rows_end = t.m_end, columns_end = s.N;
  }
  __device__ int row_of(int step, int pass) const {
    return row + step / ACROSS * STAGED_ROWS + 2 * pass;
  }
  __device__ int column_of(int step) const {
    return column + step % ACROSS * WIDTH;
  }
  __device__ bool in(int step, int pass) const {
    return row_of(step, pass) < rows_end && column_of(step) < columns_end;
  }
  // Where that is in a tensor of N columns.
  __device__ int64_t at(int step, int pass, int N) const {
    return (int64_t)row_of(step, pass) * N + column_of(step);
  }
  // Nothing of the step is the tile's; the same for all lanes.
  __device__ bool empty(int step) const {
    return warp_row + step / ACROSS * STAGED_ROWS >= rows_end || tile_column + step % ACROSS * WIDTH >= columns_end;
  }
};

// Pitches keep 8 rows of 4 lanes, as they are written, in different banks.
template <int BN> static __device__ inline void stage_floats(float *staged, int step, const float (&acc)[BN / 2]) {
  int lane = threadIdx.x & 31, half = step / (BN / 64), block = step % (BN / 64) * 8; // blocks of 8 columns
  float *to = staged + lane / 4 * FLOATS_PITCH + lane % 4 * 2;
  __syncwarp(); // what was there has been read
#pragma unroll
  for (int b = 0; b < 8; b++) {
    const float *sum = acc + 4 * (block + b) + 2 * half;
    *(float2 *)(to + 8 * b) = make_float2(sum[0], sum[1]);
  }
  __syncwarp();
}
static __device__ inline float4 staged_floats(const float *staged, int pass) {
  int lane = threadIdx.x & 31;
  return *(const float4 *)(staged + (lane / 16 + 2 * pass) * FLOATS_PITCH + lane % 16 * 4);
}

template <int BN> static __device__ inline void stage_rounded(bf16 *staged, int step, const float (&acc)[BN / 2]) {
  int lane = threadIdx.x & 31, half = step / (BN / 128), block = step % (BN / 128) * 16;
  bf16 *to = staged + lane / 4 * ROUNDED_PITCH + lane % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int b = 0; b < 16; b++) {
    const float *sum = acc + 4 * (block + b) + 2 * half;
    *(uint32_t *)(to + 8 * b) = pack2(sum[0], sum[1]);
  }
  __syncwarp();
}
static __device__ inline uint4 staged_rounded(const bf16 *staged, int pass) {
  int lane = threadIdx.x & 31;
  return *(const uint4 *)(staged + (lane / 16 + 2 * pass) * ROUNDED_PITCH + lane % 16 * 8);
}

// Stores the sums to out [., N] in fp32, or adds them to it.
template <int BN>
static __device__ inline void store_floats(const GemmSide &s, const GemmTile &t, int warp_row, float *out, bool add,
                                           float (&acc)[BN / 2], float *staged) {
  using Steps = StoreSteps<BN, 64>;
  const Steps steps(s, t, warp_row);
  auto load_old = [&](int step, float4 old[Steps::PASSES]) {
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++)
      old[i] = add && steps.in(step, i) ? *(const float4 *)(out + steps.at(step, i, s.N)) : make_float4(0, 0, 0, 0);
  };
  float4 next[Steps::PASSES]; // loaded while the step before is stored
  load_old(0, next);
#pragma unroll
  for (int step = 0; step < Steps::COUNT; step++) {
    float4 old[Steps::PASSES];
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) old[i] = next[i];
    if (step + 1 < Steps::COUNT) load_old(step + 1, next);
    if (steps.empty(step)) continue;
    stage_floats<BN>(staged, step, acc);
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) {
      const float4 x = staged_floats(staged, i);
      if (!steps.in(step, i)) continue;
      const int64_t at = steps.at(step, i, s.N);
      *(float4 *)(out + at) = make_float4(x.x + old[i].x, x.y + old[i].y, x.z + old[i].z, x.w + old[i].w);
    }
  }
}

// Stores the sums to c [., N], rounded, and the SwiGLU of their pairs to act [., N/2] (or NULL).
template <int BN>
static __device__ inline void store_rounded(const GemmSide &s, const GemmTile &t, int warp_row, bf16 *c, bf16 *act,
                                            float (&acc)[BN / 2], bf16 *staged) {
  using Steps = StoreSteps<BN, 128>;
  const Steps steps(s, t, warp_row);
#pragma unroll
  for (int step = 0; step < Steps::COUNT; step++) {
    if (steps.empty(step)) continue;
    stage_rounded<BN>(staged, step, acc);
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) {
      const uint4 v = staged_rounded(staged, i);
      const bool in = steps.in(step, i);
      const int64_t at = steps.at(step, i, s.N);
      if (in) *(uint4 *)(c + at) = v;
      if (!act) continue;
      float x[8], a[4];
      unpack8(v, x);
#pragma unroll
      for (int b = 0; b < 4; b++) a[b] = swiglu(x[2 * b], x[2 * b + 1]);
      if (in) store4(act + at / 2, a);
    }
  }
}
#endif
