// How the attention kernels for Hopper fill shared memory: warps copy tiles (attention.h) that others multiply,
// themselves or by the copy engine.
#ifndef TESSERA_ATTENTION_COPY_H
#define TESSERA_ATTENTION_COPY_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/tensor_map.h"

// Place in a ring, and the parity of its barriers' phases.
template <int places> struct Place {
  int at = 0;
  uint32_t parity = 0;
  __device__ void step() {
    if (++at == places) at = 0, parity ^= 1;
  }
};

// Each of a block's first `warps` warps starts copying its part of the rows [0, valid) of `from` (stride elements
// apart) to a tile; the tile's other rows become zeros and are not read.
template <int D, int rows, int warps>
static __device__ inline void copy_rows(const bf16 *tile, const bf16 *from, int stride, int valid) {
  const int chunks = D / 8, step = 32 / chunks;
  int lane = (int)recompute(threadIdx.x & 31), chunk = lane % chunks;
  int row = threadIdx.x / 32 * (rows / warps) + lane / chunks;
  uint32_t to = shared_address(tile) + (chunk >> 3) * rows * 128 + row * 128;
  from += row * stride + chunk * 8;
#pragma unroll 4
  for (int last = row + rows / warps; row < last; row += step, to += step * 128, from += step * stride)
    copy16_async(to + (((chunk ^ row) & 7) << 4), from, row < valid);
}

// Where a lane copies to: chunk `chunk` of rows row, row + step, .. behind row `first` (a multiple of 8) of a tile;
// within 8 rows their places differ by the swizzle.
template <int D, int rows> struct CopyLane {
  static constexpr int chunks = D / 8, step = 32 / chunks, turns = 8 / step;
  int row, chunk;
  uint32_t to[turns];
  __device__ CopyLane(const bf16 *tile, int first) {
    int lane = (int)recompute(threadIdx.x & 31);
    row = lane / chunks, chunk = lane % chunks;
    uint32_t at = shared_address(tile) + (chunk >> 3) * rows * 128 + (first + row) * 128;
#pragma unroll
    for (int i = 0; i < turns; i++) to[i] = at + i * step * 128 + (((chunk ^ (row + i * step)) & 7) << 4);
  }
};

// A warp starts copying half `half` of the rows [0, valid) of `from` (stride elements apart) to a tile; the half's
// other rows become zeros and are not read.
template <int D, int rows>
static __device__ inline void copy_half(const bf16 *tile, const bf16 *from, int stride, int valid, int half) {
  typedef CopyLane<D, rows> Lane;
  const int first = half * (rows / 2);
  const Lane lane(tile, first);
  const char *at = (const char *)(from + ((first + lane.row) * stride + lane.chunk * 8));
  valid -= first + lane.row;
#pragma unroll 4
  for (int i = 0; i < rows / 2 / Lane::step; i++, at += Lane::step * stride * 2)
    copy16_async(lane.to[i % Lane::turns] + i / Lane::turns * 1024, at, i * Lane::step < valid);
}

// The same for rows of `from` that lanes hold, of a tile of 64: lane i has row i of the half.
template <int D>
static __device__ inline void gather_half(const bf16 *tile, const bf16 *from, int index, int stride, int valid,
                                          int half) {
  typedef CopyLane<D, 64> Lane;
  const Lane lane(tile, half * 32);
  const char *at = (const char *)(from + lane.chunk * 8);
  valid -= half * 32 + lane.row;
#pragma unroll 8
  for (int i = 0; i < 32 / Lane::step; i++) {
    int own = __shfl_sync(0xffffffffu, index, lane.row + i * Lane::step);
    copy16_async(lane.to[i % Lane::turns] + i / Lane::turns * 1024, at + (int64_t)own * (stride * 2),
                 i * Lane::step < valid);
  }
}

// Each of a block's first `warps` warps lets the copy engine copy its part of a tile: boxes of rows / warps rows and 64
// columns of a map, from (y, z) on. The warp's first thread has yet to arrive in the barrier's
// phase.
template <int D, int rows, int warps>
static __device__ inline void box_part(const bf16 *tile, const CUtensorMap *map, uint32_t barrier, int y, int z) {
  if ((threadIdx.x & 31) != 0) return;
  const int part = rows / warps;
  barrier_expect(barrier, part * D * (int)sizeof(bf16));
#pragma unroll
  for (int block = 0; block < D / 64; block++)
    tma_load_3d(shared_address(tile) + (block * rows + threadIdx.x / 32 * part) * 128, map, barrier, 64 * block, y, z);
}

// A warp starts copying entries [0, valid) of an array; zeros after them.
template <int rows> static __device__ inline void copy_line(const void *line, const void *from, int valid) {
  int lane = (int)recompute(threadIdx.x & 31);
#pragma unroll
  for (int i = lane; i < rows; i += 32) {
    bool in = i < valid;
    copy4_async(shared_address(line) + 4 * i, (const int32_t *)from + (in ? i : 0), in);
  }
}
#endif
