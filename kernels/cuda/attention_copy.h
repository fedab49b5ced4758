// How the attention kernels for Hopper fill shared memory: warps copy tiles (attention.h) that others multiply.
#ifndef TESSERA_ATTENTION_COPY_H
#define TESSERA_ATTENTION_COPY_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.h"

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
#endif
