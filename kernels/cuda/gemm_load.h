// How operands come into shared memory on Hopper: load policies (GEMM_IN_PLACE, GEMM_GATHER_A, GEMM_GATHER_B), for any
// main loop whose blocks begin with a warpgroup that does nothing else.
//
// Operands whose rows are gathered come by cp.async, all others by the copy engine: boxes of one tensor map a side,
// whose rows are all groups' rows - a tile that ends a group multiplies rows of the next one, too, and does not store
// them.
//
// Stage: A [BM x 64] then B [BN x 64]. K-major operands are one block of BM (BN) rows of 128 bytes, MN-major ones are
// boxes of 64 rows (inner) of 128 bytes (64 of the tile's rows), both swizzled (wgmma_descriptor).
#ifndef TESSERA_GEMM_LOAD_H
#define TESSERA_GEMM_LOAD_H

#include <cuda.h>

#include "kernels/cuda/gemm_epilogue.h"
#include "kernels/cuda/wgmma.h"

enum {
  GEMM_BK = 64,     // of the inner dimension in a stage
  GEMM_GROUP = 128, // threads of a warpgroup
  GEMM_BOX_BYTES = 64 * GEMM_BK * 2
};
static_assert(GEMM_BK * 2 == 128, "a K-major row of a stage is one row of the swizzle");
static_assert(GEMM_BM == 8 * (GEMM_GROUP / 8), "gather_rows: a thread copies 8 rows of A");

typedef struct GemmMaps {
  CUtensorMap a[MODALITIES], b[MODALITIES];
  CUtensorMap read[MODALITIES]; // by the epilogue
} GemmMaps;
static_assert(alignof(GemmMaps) >= 64, "the copy engine reads maps aligned to 64 bytes");

// Position in the ring of stages: which one, and the parity of its barriers' phases.
template <int STAGES> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void step() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) // for other targets the kernels are empty

// A thread copies 16-byte chunk c of rows r, r + 16, .. of every box of 8 chunks a row.
static __device__ inline int copy_chunk() {
  return threadIdx.x & 7;
}
static __device__ inline int copy_row() {
  return threadIdx.x % GEMM_GROUP >> 3;
}

// Gathered rows of A, K-major: the sources of the thread's rows of a tile (NULL: a row that is not there).
static __device__ inline void gather_rows(const GemmWork &l, const GemmSide &s, const GemmTile &t,
                                          const bf16 *source[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = t.m + copy_row() + 16 * i;
    source[i] = row < t.m_end ? s.a + (int64_t)divide(s.a_index[row], &l.index_divisor) * s.K : NULL;
  }
}

// MN-major: of a stage's 64 rows a warp copies 16, 4 w + 16 i + (0 .. 3). Its lanes fetch the index entries of two
// stages at a time, lanes 0 .. 15 those of the first, while the two stages before are copied.
static __device__ inline int index_load(const GemmWork &l, const int32_t *index, int inner, int inner_end) {
  int lane = threadIdx.x & 31;
  int row =
      inner + (lane >> 4) * GEMM_BK + (lane >> 2 & 3) * 16 + (int)(threadIdx.x % GEMM_GROUP >> 5) * 4 + (lane & 3);
  return row < inner_end ? index[row] : -1;
}
// Copies a stage; `entry`: of its pair of stages, `second`: it is the second of them.
template <int BOXES>
static __device__ inline void copy_inner(const GemmWork &l, const bf16 *base, int entry, bool second, int first,
                                         int width, uint32_t to) {
  int lane = threadIdx.x & 31, column = first + copy_chunk() * 8;
  to += swizzled(copy_row(), copy_chunk());
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int own = __shfl_sync(0xffffffffu, entry, (second ? 16 : 0) + i * 4 + (lane >> 3));
    const bf16 *source = base + (int64_t)divide(own, &l.index_divisor) * width + column; // not read where it is no row
#pragma unroll
    for (int box = 0; box < BOXES; box++)
      copy16_async(to + box * GEMM_BOX_BYTES + i * 16 * 128, source + 64 * box, own >= 0 && column + 64 * box < width);
  }
}

// The copy engine's part of a stage; one thread.
template <int KIND, class Tile>
static __device__ inline void copy_boxes(const GemmMaps &maps, const GemmTile &t, int inner, uint32_t stage,
                                         uint32_t full, bool a, bool b) {
  barrier_arrive_expect(full, (a ? Tile::A_BYTES : 0) + (b ? t.bn * GEMM_BK * 2 : 0));
  const CUtensorMap *map_a = &maps.a[t.side], *map_b = &maps.b[t.side];
  if (a && KIND != GEMM_TN) tma_load_2d(stage, map_a, full, inner, t.m);
  if (a && KIND == GEMM_TN) {
#pragma unroll
    for (int i = 0; i < GEMM_BM / 64; i++) tma_load_2d(stage + i * GEMM_BOX_BYTES, map_a, full, t.m + 64 * i, inner);
  }
  stage += Tile::A_BYTES;
  if (b && KIND == GEMM_NT) {
#pragma unroll
    for (int n = 0; n < Tile::BN; n += GEMM_LEAST_BN)
      if (n < t.bn) tma_load_3d(stage + n * GEMM_BK * 2, map_b, full, inner, t.n + n, t.group);
  }
  if (b && KIND != GEMM_NT) {
#pragma unroll
    for (int i = 0; i < Tile::BN / 64; i++) {
      if (64 * i >= t.bn) break;
      if (KIND == GEMM_NN)
        tma_load_3d(stage + i * GEMM_BOX_BYTES, map_b, full, t.n + 64 * i, inner, t.group);
      else
        tma_load_2d(stage + i * GEMM_BOX_BYTES, map_b, full, t.n + 64 * i, inner);
    }
  }
}

// Stages that an epilogue reads of a tile.
template <class End> static __device__ inline int gemm_read_stages(const GemmSide &s, const GemmTile &t) {
  return GemmEpilogue<End>::READS ? ceil_div(min(t.bn, s.N - t.n), 64) : 0;
}

// ---- which block takes which tile ----

// Blocks draw tile numbers: one that begins late, since another kernel or a collective has its multiprocessor, finds
// less to do or nothing, where it would hold up the product with a share of its own. What a tile holds does not depend
// on who makes it. Only gathered weight gradients of a process alone are walked in strides: their tiles are of one
// length nearly, and the whole warpgroup that gathers would wait for each number, 5 to 7% of base's.
template <int KIND, int LOAD> static constexpr bool gemm_always_drawn = KIND != GEMM_TN || LOAD == GEMM_IN_PLACE;

// Of the launch that runs: a process has one queue of products, so that there is one at a time.
static __device__ struct {
  uint32_t next; // number that is drawn next
  uint32_t done; // blocks that draw no more; the last one makes both 0 again
} gemm_drawn;

// A number for all that produce; one thread speaks to the others through `shared`, in turn.
template <bool GATHER> static __device__ inline int gemm_draw(int number, int *shared, int turn) {
  if (!GATHER) return number;
  if (threadIdx.x == 0) shared[turn] = number;
  named_barrier_sync(2, GEMM_GROUP);
  return shared[turn];
}

static __device__ inline void gemm_draw_end(void) {
  if (threadIdx.x || atomicAdd(&gemm_drawn.done, 1) + 1 < gridDim.x) return;
  gemm_drawn.next = 0;
  gemm_drawn.done = 0;
}

// Fills the stages of all tiles. In place one thread runs this, gathering the whole warpgroup. A tile's first stage
// hands it over to the consumers, who would find it while nothing is multiplied; behind the last tile comes a stage
// with a tile of no group.
template <int KIND, int LOAD, bool DRAWN, class Tile, class End>
static __device__ void produce(const GemmLaunch<End> &launch, const GemmMaps &maps, typename Tile::Control *control,
                               uint32_t stages) {
  constexpr bool GATHER = LOAD != GEMM_IN_PLACE, gather_a = LOAD == GEMM_GATHER_A, gather_b = LOAD == GEMM_GATHER_B;
  static_assert(KIND == GEMM_TN || !gather_b, "only weight gradients gather rows of B");
  const GemmWork &l = launch.work;
  Ring<Tile::STAGES> ring;
  const int total = gemm_tiles_total(&l.shape, &control->tiles);
  int drawn = DRAWN && threadIdx.x == 0 ? (int)atomicAdd(&gemm_drawn.next, 1) : 0;
  // Numbers are drawn once the last copies of a tile are under way: the later, the more evenly all blocks end.
  for (int round = 0;; round++, drawn = DRAWN && threadIdx.x == 0 ? (int)atomicAdd(&gemm_drawn.next, 1) : 0) {
    const int number =
        DRAWN ? gemm_draw<GATHER>(drawn, control->drawn, round & 1) : gemm_tile_number(round, blockIdx.x, gridDim.x);
    const bool is_last = number >= total;
    GemmTile t = {};
    t.group = -1;
    if (!is_last) t = gemm_tile_at(KIND, &l.shape, &control->tiles, number, GEMM_BK);
    if (t.inner >= t.inner_end) { // no products
      barrier_wait(shared_address(&control->empty[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x == 0) control->tile[ring.stage] = t;
      if (threadIdx.x == 0) barrier_arrive(shared_address(&control->full[ring.stage]));
      if (GATHER) barrier_arrive(shared_address(&control->full[ring.stage]));
      if (is_last) break;
      ring.step();
      continue;
    }
    const GemmSide &s = l.g.side[t.side];
    bool second = false;
    const bf16 *rows[8];
    int a = -1, b = -1, next_a = -1, next_b = -1; // index entries of this pair of stages and of the next
    if (KIND != GEMM_TN && gather_a) gather_rows(l, s, t, rows);
    if (KIND == GEMM_TN && gather_a) next_a = index_load(l, s.a_index, t.inner, t.inner_end);
    if (gather_b) next_b = index_load(l, s.b_index, t.inner, t.inner_end);
    for (int inner = t.inner; inner < t.inner_end; inner += GEMM_BK, ring.step(), second = !second) {
      uint32_t stage = stages + ring.stage * Tile::STAGE_BYTES, full = shared_address(&control->full[ring.stage]);
      if (GATHER && KIND == GEMM_TN && !second) {
        a = next_a, b = next_b;
        if (gather_a) next_a = index_load(l, s.a_index, inner + 2 * GEMM_BK, t.inner_end);
        if (gather_b) next_b = index_load(l, s.b_index, inner + 2 * GEMM_BK, t.inner_end);
      }
      barrier_wait(shared_address(&control->empty[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x == 0 && inner == t.inner) control->tile[ring.stage] = t;
      if (threadIdx.x == 0) copy_boxes<KIND, Tile>(maps, t, inner, stage, full, !gather_a, !gather_b);
      if (!GATHER) continue;
      if (KIND != GEMM_TN && gather_a) {
        int column = inner + copy_chunk() * 8;
        uint32_t to = stage + swizzled(copy_row(), copy_chunk());
#pragma unroll
        for (int i = 0; i < 8; i++) copy16_async(to + i * 16 * 128, rows[i] + column, rows[i] && column < t.inner_end);
      }
      if (KIND == GEMM_TN && gather_a) copy_inner<GEMM_BM / 64>(l, s.a, a, second, t.m, s.M, stage);
      if (gather_b) copy_inner<Tile::BN / 64>(l, s.b, b, second, t.n, s.N, stage + Tile::A_BYTES);
      barrier_arrive_after_copies(full);
    }
    for (int i = 0; i < gemm_read_stages<End>(s, t); i++, ring.step()) {
      const uint32_t stage = stages + ring.stage * Tile::STAGE_BYTES, full = shared_address(&control->full[ring.stage]);
      barrier_wait(shared_address(&control->empty[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x == 0) {
        barrier_arrive_expect(full, GEMM_READS * GEMM_READ_BYTES);
#pragma unroll
        for (int j = 0; j < GEMM_READS; j++)
          tma_load_2d(stage + j * GEMM_READ_BYTES, &maps.read[t.side], full, (t.n + 64 * i) * GEMM_READS + 64 * j, t.m);
      }
      if (GATHER) barrier_arrive_after_copies(full); // as for the others
    }
  }
  if (DRAWN) gemm_draw_end();
}
#endif
#endif
