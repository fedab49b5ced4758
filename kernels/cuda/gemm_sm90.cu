// Grouped products on Hopper: the copy engine feeds shared memory, warpgroup products read it.
//
// A block is three warpgroups. The first fills stages of shared memory (64 of the inner dimension of both operands) as
// they become free; the other two each multiply 64 of the tile's 128 rows. Both walk the same tiles, so the first
// stages of the next tile arrive while the last tile is stored. Operands whose rows are gathered come by cp.async, all
// others by the copy engine: boxes of one tensor map a side, whose rows are all groups' rows - a tile that ends a group
// multiplies rows of the next one, too, and does not store them. Where the inner dimension is the rows (GEMM_TN), what
// lies behind a group's last row is zeroed in shared memory before it is multiplied.
//
// Stage: A [128 x 64] then B [BN x 64]. K-major operands are one block of 128 (BN) rows of 128 bytes, MN-major ones are
// boxes of 64 rows (inner) of 128 bytes (64 of the tile's rows), both swizzled (wgmma_descriptor).
#include <cuda.h>

#include "kernels/cuda/gemm_tiles.h"
#include "kernels/cuda/wgmma.h"

enum {
  BK = 64,
  GROUP = 128, // threads of a warpgroup
  THREADS = 3 * GROUP,
  BOX_BYTES = 64 * BK * 2,
  A_BYTES = GEMM_BM * BK * 2,
  MAX_STAGES = 6,
  STAGED_ROWS = 8, // of a warp's sums, on their way to memory: 64 columns in fp32 or 128 in bf16
  FLOATS_PITCH = 64 + 8,
  ROUNDED_PITCH = 128 + 8,
  STAGED_BYTES = STAGED_ROWS * FLOATS_PITCH * 4
};

// 192 KiB of stages either way.
static constexpr __host__ __device__ int stage_bytes(int bn) {
  return A_BYTES + bn * BK * 2;
}
static constexpr __host__ __device__ int stage_count(int bn) {
  return bn == 256 ? 4 : 6;
}

// Behind the stages in shared memory.
typedef struct Control {
  GemmTiles tiles;
  uint64_t full[MAX_STAGES];                                        // the stage has been filled
  uint64_t empty[MAX_STAGES];                                       // the stage has been read
  __align__(16) unsigned char staged[2 * GROUP / 32][STAGED_BYTES]; // by consumer warp
} Control;

typedef struct Maps {
  CUtensorMap a[MODALITIES], b[MODALITIES];
} Maps;

// Position in the ring of stages: which one, and the parity of its barriers' phases.
template <int STAGES> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void step() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) // for other targets the kernels are empty

// ---- the producer ----

// A thread copies 16-byte chunk c of rows r, r + 16, .. of every box of 8 chunks a row.
static __device__ inline int copy_chunk() {
  return threadIdx.x & 7;
}
static __device__ inline int copy_row() {
  return threadIdx.x % GROUP >> 3;
}
static __device__ inline uint32_t swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Gathered rows of A, K-major: the sources of the thread's rows of a tile (NULL: a row that is not there).
static __device__ inline void gather_rows(const GemmLaunch &l, const GemmSide &s, const GemmTile &t,
                                          const bf16 *source[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = t.m + copy_row() + 16 * i;
    source[i] = row < t.m_end ? s.a + (int64_t)gemm_divide(l, s.a_index[row]) * s.K : NULL;
  }
}

// MN-major: of a stage's 64 rows a warp copies 16, 4 w + 16 i + (0 .. 3). Its lanes fetch the index entries of two
// stages at a time, lanes 0 .. 15 those of the first, while the two stages before are copied.
static __device__ inline int index_load(const GemmLaunch &l, const int32_t *index, int inner, int inner_end) {
  int lane = threadIdx.x & 31;
  int row = inner + (lane >> 4) * BK + (lane >> 2 & 3) * 16 + (int)(threadIdx.x % GROUP >> 5) * 4 + (lane & 3);
  return row < inner_end ? index[row] : -1;
}
// Copies a stage; `entry`: of its pair of stages, `second`: it is the second of them.
template <int BOXES>
static __device__ inline void copy_inner(const GemmLaunch &l, const bf16 *base, int entry, bool second, int first,
                                         int width, uint32_t to) {
  int lane = threadIdx.x & 31, column = first + copy_chunk() * 8;
  to += swizzled(copy_row(), copy_chunk());
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int own = __shfl_sync(0xffffffffu, entry, (second ? 16 : 0) + i * 4 + (lane >> 3));
    const bf16 *source = base + (int64_t)gemm_divide(l, own) * width + column; // not read where it is no row
#pragma unroll
    for (int box = 0; box < BOXES; box++)
      copy16_async(to + box * BOX_BYTES + i * 16 * 128, source + 64 * box, own >= 0 && column + 64 * box < width);
  }
}

// The copy engine's part of a stage; one thread.
template <int KIND, int BN>
static __device__ inline void copy_boxes(const Maps &maps, const GemmTile &t, int inner, uint32_t stage, uint32_t full,
                                         bool a, bool b) {
  barrier_arrive_expect(full, (a ? A_BYTES : 0) + (b ? BN * BK * 2 : 0));
  const CUtensorMap *map_a = &maps.a[t.side], *map_b = &maps.b[t.side];
  if (a && KIND != GEMM_TN) tma_load_2d(stage, map_a, full, inner, t.m);
  if (a && KIND == GEMM_TN) {
#pragma unroll
    for (int i = 0; i < GEMM_BM / 64; i++) tma_load_2d(stage + i * BOX_BYTES, map_a, full, t.m + 64 * i, inner);
  }
  stage += A_BYTES;
  if (b && KIND == GEMM_NT) tma_load_3d(stage, map_b, full, inner, t.n, t.group);
  if (b && KIND != GEMM_NT) {
#pragma unroll
    for (int i = 0; i < BN / 64; i++) {
      if (KIND == GEMM_NN)
        tma_load_3d(stage + i * BOX_BYTES, map_b, full, t.n + 64 * i, inner, t.group);
      else
        tma_load_2d(stage + i * BOX_BYTES, map_b, full, t.n + 64 * i, inner);
    }
  }
}

// Brings what the SwiGLU backward of the tile will read into L2; a row by each thread.
template <int BN> static __device__ inline void prefetch_pre(const GemmSide &s, const GemmTile &t) {
  int row = t.m + (int)(threadIdx.x % GROUP);
  if (row >= t.m_end) return;
  const bf16 *pre = s.swiglu.pre + ((int64_t)row * s.N + t.n) * 2;
#pragma unroll
  for (int i = 0; i < BN * 2; i += 64) // 128 bytes
    if (2 * t.n + i < 2 * s.N) prefetch_l2(pre + i);
}

// Without GATHER one thread runs this, with it the whole warpgroup.
template <int KIND, int BN, bool GATHER>
static __device__ void produce(const GemmLaunch &l, const Maps &maps, Control *control, uint32_t stages) {
  Ring<stage_count(BN)> ring;
  int total = control->tiles.first[gemm_groups(l)];
  for (int round = 0; round * (int)gridDim.x < total; round++) {
    int number = gemm_tile_number(round);
    if (number >= total) break; // only the last round can be short
    GemmTile t = gemm_tile_at<KIND>(l, &control->tiles, number, BN, BK);
    const GemmSide &s = l.g.side[t.side];
    bool gather_a = GATHER && s.a_index, gather_b = GATHER && KIND == GEMM_TN && s.b_index, second = false;
    const bf16 *rows[8];
    int a = -1, b = -1, next_a = -1, next_b = -1; // index entries of this pair of stages and of the next
    if (GATHER && KIND != GEMM_TN && gather_a) gather_rows(l, s, t, rows);
    // Not before the consumers have begun with the tile, if it is longer than the ring: until then they store the
    // last one.
    const int begun = t.inner + min(stage_count(BN), ceil_div(t.inner_end - t.inner, BK) - 1) * BK;
    if (GATHER && KIND == GEMM_TN && gather_a) next_a = index_load(l, s.a_index, t.inner, t.inner_end);
    if (GATHER && KIND == GEMM_TN && gather_b) next_b = index_load(l, s.b_index, t.inner, t.inner_end);
    for (int inner = t.inner; inner < t.inner_end; inner += BK, ring.step(), second = !second) {
      uint32_t stage = stages + ring.stage * stage_bytes(BN), full = shared_address(&control->full[ring.stage]);
      if (GATHER && KIND == GEMM_TN && !second) {
        a = next_a, b = next_b;
        if (gather_a) next_a = index_load(l, s.a_index, inner + 2 * BK, t.inner_end);
        if (gather_b) next_b = index_load(l, s.b_index, inner + 2 * BK, t.inner_end);
      }
      barrier_wait(shared_address(&control->empty[ring.stage]), ring.parity ^ 1);
      if (GATHER && KIND == GEMM_NN && s.swiglu.pre && inner == begun) prefetch_pre<BN>(s, t);
      if (threadIdx.x == 0) copy_boxes<KIND, BN>(maps, t, inner, stage, full, !gather_a, !gather_b);
      if (!GATHER) continue;
      if (KIND != GEMM_TN && gather_a) {
        int column = inner + copy_chunk() * 8;
        uint32_t to = stage + swizzled(copy_row(), copy_chunk());
#pragma unroll
        for (int i = 0; i < 8; i++) copy16_async(to + i * 16 * 128, rows[i] + column, rows[i] && column < t.inner_end);
      }
      if (KIND == GEMM_TN && gather_a) copy_inner<GEMM_BM / 64>(l, s.a, a, second, t.m, s.M, stage);
      if (KIND == GEMM_TN && gather_b) copy_inner<BN / 64>(l, s.b, b, second, t.n, s.N, stage + A_BYTES);
      barrier_arrive_after_copies(full);
    }
  }
}

// ---- the consumers ----

// Zeroes the inner rows [valid, 64) of every box of a stage. Both warpgroups take part.
template <int BN> static __device__ inline void zero_tail(unsigned char *stage, int valid) {
  for (int chunk = valid * 8 + (threadIdx.x - GROUP); chunk < BOX_BYTES / 16; chunk += 2 * GROUP)
#pragma unroll
    for (int box = 0; box < stage_bytes(BN) / BOX_BYTES; box++)
      *(uint4 *)(stage + box * BOX_BYTES + chunk * 16) = make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  named_barrier_sync(1, 2 * GROUP);
}

// Products lie in the accumulators as the instruction leaves them: of each 8 columns lane q of a quad of lanes has 2 q
// and the next, of row (lane / 4) and of that 8 further down. Memory is accessed 16 bytes a lane: what is added is
// exchanged within quads, what is stored goes through shared memory, so that 16 lanes have one row and whole lines go
// out.

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
                                       float (&acc)[BN / 2]) {
  int first_row = t.m + ((int)threadIdx.x - GROUP) / 32 * 16 + ((threadIdx.x & 31) >> 2);
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
  enum { ACROSS = BN / WIDTH, COUNT = 2 * ACROSS, PASSES = STAGED_ROWS / 2 };
  int row, column;           // the lane's, of the first step and pass
  int warp_row, tile_column; // where the warp begins
  int rows_end, columns_end;
  __device__ StoreSteps(const GemmSide &s, const GemmTile &t) {
    int lane = threadIdx.x & 31;
    warp_row = t.m + ((int)threadIdx.x - GROUP) / 32 * 16;
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

// fp32, and the SwiGLU of its pairs.
template <int KIND, int BN>
static __device__ inline void store_floats(const GemmLaunch &l, const GemmTile &t, float (&acc)[BN / 2],
                                           float *staged) {
  const GemmSide &s = l.g.side[t.side];
  using Steps = StoreSteps<BN, 64>;
  const Steps steps(s, t);
  const bool add = KIND == GEMM_TN && l.g.accumulate && !t.partial;
  const bool act = KIND != GEMM_TN && !t.partial && s.act;
  float *out = (float *)gemm_tile_out<KIND>(l, t);
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
      if (act) *(uint32_t *)(s.act + at / 2) = pack2(swiglu(x.x, x.y), swiglu(x.z, x.w));
    }
  }
}

// bf16, and the SwiGLU of its pairs.
template <int BN>
static __device__ inline void store_rounded(const GemmSide &s, const GemmTile &t, float (&acc)[BN / 2], bf16 *staged) {
  using Steps = StoreSteps<BN, 128>;
  const Steps steps(s, t);
#pragma unroll
  for (int step = 0; step < Steps::COUNT; step++) {
    if (steps.empty(step)) continue;
    stage_rounded<BN>(staged, step, acc);
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) {
      const uint4 v = staged_rounded(staged, i);
      const bool in = steps.in(step, i);
      const int64_t at = steps.at(step, i, s.N);
      if (in) *(uint4 *)((bf16 *)s.c + at) = v;
      if (!s.act) continue;
      float x[8], a[4];
      unpack8(v, x);
#pragma unroll
      for (int b = 0; b < 4; b++) a[b] = swiglu(x[2 * b], x[2 * b + 1]);
      if (in) store4(s.act + at / 2, a);
    }
  }
}

// Sums dot[i], pass i's, over the 8 lanes that hold GEMM_DOT_COLUMNS columns of a row, and stores the 8 rows together.
template <typename Steps>
static __device__ inline void store_dots(const GemmSide &s, const Steps &steps, int step,
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
    s.swiglu.dot[(int64_t)block * s.rows + row] = sum;
}

// The SwiGLU backward of dA.
template <int BN>
static __device__ inline void store_backward(const GemmSide &s, const GemmTile &t, float (&acc)[BN / 2],
                                             float *staged) {
  using Steps = StoreSteps<BN, 64>;
  const Steps steps(s, t);
  const int lane = threadIdx.x & 31;
  auto load_pre = [&](int step, uint4 pre[Steps::PASSES]) {
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++)
      pre[i] = steps.in(step, i) ? *(const uint4 *)(s.swiglu.pre + 2 * steps.at(step, i, s.N)) : make_uint4(0, 0, 0, 0);
  };
  uint4 next[Steps::PASSES]; // loaded while the step before is stored
  load_pre(0, next);
  const float weight = s.swiglu.weight[s.a_index[min(steps.warp_row + lane % 16, t.m_end - 1)]]; // of that row
#pragma unroll
  for (int step = 0; step < Steps::COUNT; step++) {
    uint4 pre[Steps::PASSES];
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) pre[i] = next[i];
    if (step + 1 < Steps::COUNT) load_pre(step + 1, next);
    if (steps.empty(step)) continue;
    stage_floats<BN>(staged, step, acc);
    float dot[Steps::PASSES];
#pragma unroll
    for (int i = 0; i < Steps::PASSES; i++) {
      const float4 v = staged_floats(staged, i);
      const float w = __shfl_sync(0xffffffffu, weight, steps.row_of(step, i) - steps.warp_row);
      const float da[4] = {v.x, v.y, v.z, v.w};
      float x[8], dx[8], a[4];
      unpack8(pre[i], x);
      const float part = swiglu_backward4(x, da, w, dx, a);
      const bool in = steps.in(step, i);
      dot[i] = in ? part : 0;
      const int64_t at = steps.at(step, i, s.N);
      if (in) store8(s.swiglu.dpre + 2 * at, dx);
      if (in) store4(s.swiglu.sa + at, a);
    }
    store_dots(s, steps, step, dot);
  }
}

template <int KIND, int BN, bool GATHER>
static __device__ inline void store_tile(const GemmLaunch &l, const GemmTile &t, float (&acc)[BN / 2],
                                         unsigned char *staged) {
  const GemmSide &s = l.g.side[t.side];
  if (KIND == GEMM_NN && GATHER && s.swiglu.pre) {
    store_backward<BN>(s, t, acc, (float *)staged);
    return;
  }
  if (!t.partial && l.g.scale) {
    float scale = gemm_scale(l);
#pragma unroll
    for (int i = 0; i < BN / 2; i++) acc[i] *= scale;
  }
  if (KIND != GEMM_TN && !t.partial && s.bias) add_rows<BN>(s, t, s.bias, true, acc);
  if (KIND != GEMM_TN && !t.partial && s.add) add_rows<BN>(s, t, s.add, false, acc);
  if (KIND == GEMM_TN || t.partial || l.g.c_float)
    store_floats<KIND, BN>(l, t, acc, (float *)staged);
  else
    store_rounded<BN>(s, t, acc, (bf16 *)staged);
}

template <int KIND, int BN, bool GATHER>
static __device__ void consume(const GemmLaunch &l, Control *control, unsigned char *memory) {
  constexpr int STAGES = stage_count(BN);
  constexpr bool A_MN = KIND == GEMM_TN, B_MN = KIND != GEMM_NT;
  int half = threadIdx.x / GROUP - 1; // rows [64 half, 64 half + 64) of the tile: for A, either way, box `half`
  bool speaks = (threadIdx.x & 31) == 0;
  Ring<STAGES> ring;
  int total = control->tiles.first[gemm_groups(l)];
  for (int round = 0; round * (int)gridDim.x < total; round++) {
    int number = gemm_tile_number(round);
    if (number >= total) break;
    GemmTile t = gemm_tile_at<KIND>(l, &control->tiles, number, BN, BK);
    bool idle = t.m + 64 * half >= t.m_end; // nothing to multiply: the other warpgroup has the tensor cores to itself
    float acc[BN / 2];
#pragma unroll
    for (int i = 0; i < BN / 2; i++) acc[i] = 0;
    int last = -1; // the stage that products under way may still read
    for (int inner = t.inner; inner < t.inner_end; inner += BK, ring.step()) {
      unsigned char *stage = memory + ring.stage * stage_bytes(BN);
      barrier_wait(shared_address(&control->full[ring.stage]), ring.parity);
      if (GATHER) fence_async_proxy(); // cp.async writes as ordinary stores do
      if (KIND == GEMM_TN && t.inner_end - inner < BK) zero_tail<BN>(stage, t.inner_end - inner);
      if (idle) {
        if (speaks) barrier_arrive(shared_address(&control->empty[ring.stage]));
        continue;
      }
      uint64_t a = wgmma_descriptor(shared_address(stage) + half * BOX_BYTES, BOX_BYTES);
      uint64_t b = wgmma_descriptor(shared_address(stage) + A_BYTES, BOX_BYTES);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BK / 16; k++)
        wgmma_bf16<A_MN, B_MN>(acc, a + k * ((A_MN ? 2048 : 32) >> 4), b + k * ((B_MN ? 2048 : 32) >> 4));
      wgmma_commit();
      wgmma_wait<1>();
      if (speaks && last >= 0) barrier_arrive(shared_address(&control->empty[last]));
      last = ring.stage;
    }
    wgmma_wait<0>();
    wgmma_keep(acc);
    if (speaks && last >= 0) barrier_arrive(shared_address(&control->empty[last]));
    if (!idle) store_tile<KIND, BN, GATHER>(l, t, acc, control->staged[threadIdx.x / 32 - GROUP / 32]);
  }
}

#endif

template <int KIND, int BN, bool GATHER>
static __global__ void __launch_bounds__(THREADS, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmLaunch l, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  Control *control = (Control *)(memory + stage_count(BN) * stage_bytes(BN));
  if (threadIdx.x == 0) {
    for (int i = 0; i < stage_count(BN); i++) {
      barrier_init(shared_address(&control->full[i]), 1 + (GATHER ? GROUP : 0));
      barrier_init(shared_address(&control->empty[i]), 2 * GROUP / 32);
    }
    barrier_init_fence();
  }
  gemm_tiles_build<KIND>(l, BN, &control->tiles); // ends with a __syncthreads()
  if (threadIdx.x < GROUP) {
    registers_give<GATHER ? 56 : 40>();
    if (GATHER || threadIdx.x == 0) produce<KIND, BN, GATHER>(l, maps, control, shared_address(memory));
  } else {
    registers_take<GATHER ? 224 : 232>();
    consume<KIND, BN, GATHER>(l, control, memory);
  }
#endif
}

// ---- the host side ----

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time so that the program also starts where there is no driver; NULL if it has
// none.
static EncodeTiled encoder(void) {
  void *f = NULL;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess)
    return NULL;
  return found == cudaDriverEntryPointSuccess ? (EncodeTiled)f : NULL;
}

// A bf16 tensor [z, y, x] read in boxes [1, box_y, 64]; z = 0: [y, x].
static void map_encode(EncodeTiled encode, CUtensorMap *map, const bf16 *base, int x, int y, int z, int box_y) {
  const cuuint64_t dims[3] = {(cuuint64_t)x, (cuuint64_t)y, (cuuint64_t)z};
  const cuuint64_t strides[2] = {(cuuint64_t)x * 2, (cuuint64_t)x * 2 * y};
  const cuuint32_t box[3] = {64, (cuuint32_t)box_y, 1}, step[3] = {1, 1, 1};
  CUresult status = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, z ? 3 : 2, (void *)base, dims, strides, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    panic("grouped product: no tensor map of bf16 [%d, %d, %d] at %p in boxes [%d, 64] (CUresult %d)", z ? z : 1, y, x,
          (const void *)base, box_y, (int)status);
}

static Maps maps_encode(const GemmLaunch *l, int kind, int bn) {
  static const EncodeTiled encode = encoder();
  Maps maps = {};
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &l->g.side[m];
    if (s->groups == 0 || s->rows == 0) continue;
    int wide = kind == GEMM_TN ? s->M : s->K;
    if (!s->a_index) map_encode(encode, &maps.a[m], s->a, wide, s->rows, 0, kind == GEMM_TN ? 64 : 128);
    if (kind == GEMM_NT) map_encode(encode, &maps.b[m], s->b, s->K, s->N, s->groups, bn);
    if (kind == GEMM_NN) map_encode(encode, &maps.b[m], s->b, s->N, s->K, s->groups, BK);
    if (kind == GEMM_TN && !s->b_index) map_encode(encode, &maps.b[m], s->b, s->N, s->rows, 0, BK);
  }
  return maps;
}

template <int KIND, int BN, bool GATHER> static void launch(const GemmLaunch *l, cudaStream_t stream) {
  const int shared = stage_count(BN) * stage_bytes(BN) + (int)sizeof(Control);
  auto kernel = gemm_sm90_kernel<KIND, BN, GATHER>;
  CUDA_ALLOW_SHARED(kernel, shared);
  CUDA_LAUNCH(kernel, cuda_sm_count(), THREADS, shared, stream, *l, maps_encode(l, KIND, BN));
}

template <int KIND, int BN> static void launch_gathering(const GemmLaunch *l, cudaStream_t stream) {
  bool gather = false;
  for (int m = 0; m < MODALITIES; m++)
    gather |= l->g.side[m].groups > 0 && (l->g.side[m].a_index || (KIND == GEMM_TN && l->g.side[m].b_index));
  if (gather)
    launch<KIND, BN, true>(l, stream);
  else
    launch<KIND, BN, false>(l, stream);
}

template <int KIND> static void launch_width(const GemmLaunch *l, cudaStream_t stream) {
  if (l->bn == 256)
    launch_gathering<KIND, 256>(l, stream);
  else
    launch_gathering<KIND, 128>(l, stream);
}

bool gemm_sm90_usable(void) {
  static const bool usable = built_for_sm90((const void *)gemm_sm90_kernel<GEMM_NT, 256, false>) && encoder();
  return usable;
}

void gemm_sm90(const GemmLaunch *l, int kind, cudaStream_t stream) {
  if (kind == GEMM_NT) launch_width<GEMM_NT>(l, stream);
  if (kind == GEMM_NN) launch_width<GEMM_NN>(l, stream);
  if (kind == GEMM_TN) launch_width<GEMM_TN>(l, stream);
}
