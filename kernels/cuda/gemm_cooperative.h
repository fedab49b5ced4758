// The main loop of grouped products on Hopper (tile kind): the copy engine feeds shared memory, two warpgroups multiply
// halves of one tile.
//
// A block is three warpgroups. The first fills stages of shared memory (64 of the inner dimension of both operands) as
// they become free (gemm_load.h); the other two each multiply 64 of the tile's 128 rows. The first walks the tiles, and
// the first stage of one says which it is: the next tile has been found, and its first stages arrive, while the last
// tile is stored. Where the inner dimension is the rows (GEMM_TN), what lies behind a group's last row is zeroed in
// shared memory before it is multiplied.
#ifndef TESSERA_GEMM_COOPERATIVE_H
#define TESSERA_GEMM_COOPERATIVE_H

#include "kernels/cuda/gemm_load.h"

// Tiles of 128 x BN, or of 128 x 128 on one side; the ring of stages takes 192 KiB either way.
template <int BN_> struct Cooperative {
  static constexpr int BN = BN_, THREADS = 3 * GEMM_GROUP, STAGES = BN == 256 ? 4 : 6;
  static constexpr int A_BYTES = GEMM_BM * GEMM_BK * 2, B_BYTES = BN * GEMM_BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
  static_assert(BN == 128 || BN == 256, "wgmma_bf16 takes 128 or 256 columns");
  static_assert(GEMM_BM == 2 * 64, "two warpgroups multiply 64 rows each");
  static_assert(STAGE_BYTES % 1024 == 0, "stages are swizzled in blocks of 1024 bytes");
  static_assert(STAGES >= 2, "a stage is filled while another is read");
  static_assert(GEMM_READS * GEMM_READ_BYTES <= STAGE_BYTES, "what an epilogue reads fits in a stage");

  // Behind the stages in shared memory.
  typedef struct Control {
    GemmTiles tiles;
    uint64_t full[STAGES];                                                 // the stage has been filled
    uint64_t empty[STAGES];                                                // the stage has been read
    GemmTile tile[STAGES];                                                 // that begins in the stage
    int drawn[2];                                                          // among those that produce
    __align__(16) unsigned char staged[2 * GEMM_GROUP / 32][STAGED_BYTES]; // by consumer warp
  } Control;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + (int)sizeof(Control);
  static_assert(SHARED_BYTES <= CUDA_HOPPER_SHARED, "one block fits on a multiprocessor");

  template <int KIND, int LOAD, bool DRAWN, class End>
  static __device__ void run(const GemmLaunch<End> &l, const GemmMaps &maps);
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) // for other targets the kernels are empty

// Zeroes the inner rows [valid, 64) of every box of a stage. Both warpgroups take part.
template <class Tile> static __device__ inline void zero_tail(unsigned char *stage, int valid) {
  for (int chunk = valid * 8 + (threadIdx.x - GEMM_GROUP); chunk < GEMM_BOX_BYTES / 16; chunk += 2 * GEMM_GROUP)
#pragma unroll
    for (int box = 0; box < Tile::STAGE_BYTES / GEMM_BOX_BYTES; box++)
      *(uint4 *)(stage + box * GEMM_BOX_BYTES + chunk * 16) = make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  named_barrier_sync(1, 2 * GEMM_GROUP);
}

// Multiplies and stores a warpgroup's half of a tile of BN columns.
template <int KIND, int LOAD, class Tile, int BN, class End>
static __device__ __forceinline__ void multiply(const GemmLaunch<End> &launch, const GemmTile &t,
                                                typename Tile::Control *control, unsigned char *memory,
                                                Ring<Tile::STAGES> &ring) {
  constexpr bool A_MN = KIND == GEMM_TN, B_MN = KIND != GEMM_NT;
  // Rows [64 half, 64 half + 64) of the tile: for A, either way, box `half`.
  const int half = threadIdx.x / GEMM_GROUP - 1;
  const bool speaks = (threadIdx.x & 31) == 0;
  // Nothing to multiply: the other warpgroup has the tensor cores to itself.
  const bool idle = t.m + 64 * half >= t.m_end || t.n >= launch.work.g.side[t.side].N;
  const int warp = threadIdx.x / 32 - GEMM_GROUP / 32, warp_row = t.m + warp * 16; // of the consumers
  unsigned char *const staged = control->staged[warp];
  float begun = 0;
  if constexpr (GemmEpilogue<End>::READS)
    if (!idle) begun = GemmEpilogue<End>::begin(launch, t, warp_row);
  float acc[BN / 2];
#pragma unroll
  for (int i = 0; i < BN / 2; i++) acc[i] = 0;
  int last = -1; // the stage that products under way may still read
  for (int inner = t.inner; inner < t.inner_end; inner += GEMM_BK, ring.step()) {
    unsigned char *stage = memory + ring.stage * Tile::STAGE_BYTES;
    barrier_wait(shared_address(&control->full[ring.stage]), ring.parity);
    if (LOAD != GEMM_IN_PLACE) fence_async_proxy(); // cp.async writes as ordinary stores do
    if (KIND == GEMM_TN && t.inner_end - inner < GEMM_BK) zero_tail<Tile>(stage, t.inner_end - inner);
    if (idle) {
      if (speaks) barrier_arrive(shared_address(&control->empty[ring.stage]));
      continue;
    }
    uint64_t a = wgmma_descriptor(shared_address(stage) + half * GEMM_BOX_BYTES, GEMM_BOX_BYTES);
    uint64_t b = wgmma_descriptor(shared_address(stage) + Tile::A_BYTES, GEMM_BOX_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < GEMM_BK / 16; k++)
      wgmma_bf16<A_MN, B_MN>(acc, a + k * ((A_MN ? 2048 : 32) >> 4), b + k * ((B_MN ? 2048 : 32) >> 4));
    wgmma_commit();
    wgmma_wait<1>();
    if (speaks && last >= 0) barrier_arrive(shared_address(&control->empty[last]));
    last = ring.stage;
  }
  wgmma_wait<0>();
  wgmma_keep(acc);
  if (speaks && last >= 0) barrier_arrive(shared_address(&control->empty[last]));
  if constexpr (!GemmEpilogue<End>::READS) {
    if (!idle) GemmEpilogue<End>::template rows<BN>(launch, t, warp_row, acc, staged);
  } else {
    const int blocks = gemm_read_stages<End>(launch.work.g.side[t.side], t);
#pragma unroll
    for (int i = 0; i < BN / 64; i++) {
      if (i >= blocks) break;
      const unsigned char *read = memory + ring.stage * Tile::STAGE_BYTES;
      barrier_wait(shared_address(&control->full[ring.stage]), ring.parity);
      if (!idle) GemmEpilogue<End>::template columns<BN>(launch, t, warp_row, i, begun, read, acc, staged);
      __syncwarp(); // all lanes have read
      if (speaks) barrier_arrive(shared_address(&control->empty[ring.stage]));
      ring.step();
    }
  }
}

template <int KIND, int LOAD, class Tile, class End>
static __device__ void consume(const GemmLaunch<End> &launch, typename Tile::Control *control, unsigned char *memory) {
  Ring<Tile::STAGES> ring;
  for (;;) {
    barrier_wait(shared_address(&control->full[ring.stage]), ring.parity);
    const GemmTile t = control->tile[ring.stage];
    if (t.group < 0) break;
    __syncwarp();                 // all have read the tile, before one says for them that the stage has been read
    if (t.inner >= t.inner_end) { // no products: its stage held the tile alone
      if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&control->empty[ring.stage]));
      ring.step();
    }
    if (Tile::BN > GEMM_LEAST_BN && t.bn == GEMM_LEAST_BN)
      multiply<KIND, LOAD, Tile, GEMM_LEAST_BN>(launch, t, control, memory, ring);
    else
      multiply<KIND, LOAD, Tile, Tile::BN>(launch, t, control, memory, ring);
  }
}

template <int BN_>
template <int KIND, int LOAD, bool DRAWN, class End>
__device__ inline void Cooperative<BN_>::run(const GemmLaunch<End> &l, const GemmMaps &maps) {
  typedef Cooperative<BN_> Tile;
  constexpr bool GATHER = LOAD != GEMM_IN_PLACE;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto control = (typename Tile::Control *)(memory + Tile::STAGES * Tile::STAGE_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::STAGES; i++) {
      barrier_init(shared_address(&control->full[i]), 1 + (GATHER ? GEMM_GROUP : 0));
      barrier_init(shared_address(&control->empty[i]), 2 * GEMM_GROUP / 32);
    }
    barrier_init_fence();
  }
  if (!l.work.g.settled) await_previous(false);
  gemm_tiles_load<KIND>(l.work, &control->tiles); // ends with a __syncthreads()
  if (l.work.g.settled) await_previous(false);
  if (threadIdx.x < GEMM_GROUP) {
    registers_give<GATHER ? 56 : 40>();
    if (GATHER || threadIdx.x == 0) produce<KIND, LOAD, DRAWN, Tile>(l, maps, control, shared_address(memory));
  } else {
    registers_take<GATHER ? 224 : 232>();
    if (KIND != GEMM_TN) // while the first stages are on their way
      gemm_fill(l.work.g, blockIdx.x * 2 * GEMM_GROUP + threadIdx.x - GEMM_GROUP, gridDim.x * 2 * GEMM_GROUP);
    consume<KIND, LOAD, Tile>(l, control, memory);
  }
}
#endif
#endif
