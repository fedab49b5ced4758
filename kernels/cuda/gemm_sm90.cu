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
#include "kernels/cuda/ptx.h"

enum {
  BK = 64,
  GROUP = 128, // threads of a warpgroup
  THREADS = 3 * GROUP,
  BOX_BYTES = 64 * BK * 2,
  A_BYTES = GEMM_BM * BK * 2,
  MAX_STAGES = 6
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
  uint64_t full[MAX_STAGES];  // the stage has been filled
  uint64_t empty[MAX_STAGES]; // the stage has been read
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
static __device__ inline void gather_rows(const GemmSide &s, const GemmTile &t, int divisor, const bf16 *source[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = t.m + copy_row() + 16 * i;
    source[i] = row < t.m_end ? s.a + (int64_t)(s.a_index[row] / divisor) * s.K : NULL;
  }
}

// MN-major: the index entries of the thread's rows of a stage, inner dimension from `inner`; -1: not there. They are
// loaded a stage ahead of their use.
static __device__ inline void index_load(const int32_t *index, int inner, int inner_end, int entry[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = inner + copy_row() + 16 * i;
    entry[i] = row < inner_end ? index[row] : -1;
  }
}
template <int BOXES>
static __device__ inline void copy_inner(const bf16 *base, const int entry[4], int divisor, int first, int width,
                                         uint32_t to) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int column = first + copy_chunk() * 8;
    const bf16 *source = base + (entry[i] < 0 ? 0 : (int64_t)(entry[i] / divisor) * width + column);
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      bool valid = entry[i] >= 0 && column + 64 * box < width;
      copy16_async(to + box * BOX_BYTES + swizzled(copy_row() + 16 * i, copy_chunk()), valid ? source + 64 * box : base,
                   valid);
    }
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

// Without GATHER one thread runs this, with it the whole warpgroup.
template <int KIND, int BN, bool GATHER>
static __device__ void produce(const GemmLaunch &l, const Maps &maps, Control *control, uint32_t stages) {
  Ring<stage_count(BN)> ring;
  for (int number = blockIdx.x; number < gemm_tiles_total(&control->tiles); number += gridDim.x) {
    GemmTile t = gemm_tile_at<KIND>(l, &control->tiles, number, BN, BK);
    const GemmSide &s = l.g.side[t.side];
    bool gather_a = GATHER && s.a_index, gather_b = GATHER && KIND == GEMM_TN && s.b_index;
    const bf16 *rows[8];
    int entry_a[4], entry_b[4];
    if (GATHER && KIND != GEMM_TN && gather_a) gather_rows(s, t, l.g.index_divisor, rows);
    if (GATHER && KIND == GEMM_TN && gather_a) index_load(s.a_index, t.inner, t.inner_end, entry_a);
    if (GATHER && KIND == GEMM_TN && gather_b) index_load(s.b_index, t.inner, t.inner_end, entry_b);
    for (int inner = t.inner; inner < t.inner_end; inner += BK, ring.step()) {
      uint32_t stage = stages + ring.stage * stage_bytes(BN), full = shared_address(&control->full[ring.stage]);
      barrier_wait(shared_address(&control->empty[ring.stage]), ring.parity ^ 1);
      if (threadIdx.x == 0) copy_boxes<KIND, BN>(maps, t, inner, stage, full, !gather_a, !gather_b);
      if (!GATHER) continue;
      if (KIND != GEMM_TN && gather_a) {
        int column = inner + copy_chunk() * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          bool valid = rows[i] && column < t.inner_end;
          copy16_async(stage + swizzled(copy_row() + 16 * i, copy_chunk()), valid ? rows[i] + column : s.a, valid);
        }
      }
      if (KIND == GEMM_TN && gather_a) {
        copy_inner<GEMM_BM / 64>(s.a, entry_a, l.g.index_divisor, t.m, s.M, stage);
        index_load(s.a_index, inner + BK, t.inner_end, entry_a);
      }
      if (KIND == GEMM_TN && gather_b) {
        copy_inner<BN / 64>(s.b, entry_b, l.g.index_divisor, t.n, s.N, stage + A_BYTES);
        index_load(s.b_index, inner + BK, t.inner_end, entry_b);
      }
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

// Lane q of each four holds p[b] = M[q][b]; afterwards p[b] = M[b][q].
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

// Stores the warp's 16 rows of sums. Those of a quad of lanes are 2 columns of 8 each; fp32 goes out as it is, 32 bytes
// a row and quad, bf16 is exchanged first, so that a lane has 8 columns.
template <int KIND, int BN>
static __device__ inline void store_sums(const GemmLaunch &l, const GemmTile &t, float (&acc)[BN / 2]) {
  const GemmSide &s = l.g.side[t.side];
  bool partial = l.parts[t.side] > 1;
  int quad = threadIdx.x & 3;
  int row = t.m + ((int)threadIdx.x - GROUP) / 32 * 16 + ((threadIdx.x & 31) >> 2), col = t.n + quad * 2;
  const bool in[2] = {row < t.m_end, row + 8 < t.m_end};
  if (KIND != GEMM_TN && !partial && s.bias) {
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
      if (col + 8 * j >= s.N) continue;
      float2 v = __bfloat1622float2(*(const __nv_bfloat162 *)(s.bias + col + 8 * j));
      acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.x, acc[4 * j + 3] += v.y;
    }
  }
  if (KIND != GEMM_TN && !partial && s.add) {
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (!in[half] || col + 8 * j >= s.N) continue;
        const bf16 *from = s.add + (int64_t)(row + 8 * half) * s.N + col + 8 * j;
        float2 v = __bfloat1622float2(*(const __nv_bfloat162 *)from);
        acc[4 * j + 2 * half] += v.x, acc[4 * j + 2 * half + 1] += v.y;
      }
  }
  if (KIND == GEMM_TN || partial || l.g.c_float) {
    bool add = KIND == GEMM_TN && l.g.accumulate && !partial, act = KIND != GEMM_TN && !partial && s.act;
    float *out = (float *)gemm_tile_out<KIND>(l, t) + (int64_t)row * s.N + col;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float2 *to = (float2 *)(out + (int64_t)half * 8 * s.N); // 8 columns on: 4 of them
      float2 old[BN / 8];                                     // all under way before the first is needed
#pragma unroll
      for (int j = 0; j < BN / 8; j++) old[j] = add && in[half] && col + 8 * j < s.N ? to[4 * j] : make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < BN / 8; j++) {
        if (!in[half] || col + 8 * j >= s.N) continue;
        float x = acc[4 * j + 2 * half], y = acc[4 * j + 2 * half + 1];
        if (act) s.act[((int64_t)(row + 8 * half) * s.N + col + 8 * j) / 2] = __float2bfloat16_rn(swiglu(x, y));
        to[4 * j] = make_float2(x + old[j].x, y + old[j].y);
      }
    }
    return;
  }
  col = t.n + quad * 8; // of 32 columns
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int j = 0; j < BN / 8; j += 4) {
      uint32_t p[4];
#pragma unroll
      for (int b = 0; b < 4; b++) p[b] = pack2(acc[4 * (j + b) + 2 * half], acc[4 * (j + b) + 2 * half + 1]);
      transpose_quad(p);
      if (!in[half] || col + 8 * j >= s.N) continue;
      int64_t at = (int64_t)(row + 8 * half) * s.N + col + 8 * j;
      *(uint4 *)((bf16 *)s.c + at) = make_uint4(p[0], p[1], p[2], p[3]);
      if (s.act) {
        float x[8];
        unpack8(make_uint4(p[0], p[1], p[2], p[3]), x);
        *(uint2 *)(s.act + at / 2) =
            make_uint2(pack2(swiglu(x[0], x[1]), swiglu(x[2], x[3])), pack2(swiglu(x[4], x[5]), swiglu(x[6], x[7])));
      }
    }
}

// The SwiGLU backward of the warp's 16 rows of dA. Pairs of 64 columns are loaded together, to have enough under way.
template <int BN>
static __device__ inline void store_backward(const GemmSide &s, const GemmTile &t, float (&acc)[BN / 2]) {
  int row = t.m + ((int)threadIdx.x - GROUP) / 32 * 16 + ((threadIdx.x & 31) >> 2), col = t.n + (threadIdx.x & 3) * 2;
  const bool in[2] = {row < t.m_end, row + 8 < t.m_end};
  const float w[2] = {in[0] ? s.swiglu.weight[s.a_index[row]] : 0, in[1] ? s.swiglu.weight[s.a_index[row + 8]] : 0};
#pragma unroll
  for (int j = 0; j < BN / 8; j += 8) {
    uint2 pre[2][8];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int b = 0; b < 8; b++)
        if (in[half] && col + 8 * (j + b) < s.N) pre[half][b] = gemm_pre_load(s, row + 8 * half, col + 8 * (j + b));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float dot[2] = {0, 0}; // of GEMM_DOT_COLUMNS each
#pragma unroll
      for (int b = 0; b < 8; b++) {
        if (!in[half] || col + 8 * (j + b) >= s.N) continue;
        dot[b / 4] += gemm_store_backward(s, row + 8 * half, col + 8 * (j + b), w[half], pre[half][b],
                                          acc[4 * (j + b) + 2 * half], acc[4 * (j + b) + 2 * half + 1]);
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        int first = t.n + 8 * (j + 4 * k);
        gemm_store_dot(s, row + 8 * half, first, in[half] && first < s.N, dot[k]);
      }
    }
  }
}

template <int KIND, int BN, bool GATHER>
static __device__ void consume(const GemmLaunch &l, Control *control, unsigned char *memory) {
  constexpr int STAGES = stage_count(BN);
  constexpr bool A_MN = KIND == GEMM_TN, B_MN = KIND != GEMM_NT;
  int half = threadIdx.x / GROUP - 1; // rows [64 half, 64 half + 64) of the tile: for A, either way, box `half`
  bool speaks = (threadIdx.x & 31) == 0;
  Ring<STAGES> ring;
  for (int number = blockIdx.x; number < gemm_tiles_total(&control->tiles); number += gridDim.x) {
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
    if (idle) continue;
    if (KIND == GEMM_NN && GATHER && l.g.side[t.side].swiglu.pre)
      store_backward<BN>(l.g.side[t.side], t, acc);
    else
      store_sums<KIND, BN>(l, t, acc);
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
  if (status != CUDA_SUCCESS) CUDA_CHECK(cudaErrorInvalidValue);
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

// What a launch takes with tiles of this width: columns times waves. Narrow tiles feed the tensor cores less well.
static double launch_cost(const GemmLaunch *l, int kind, int bn) {
  int64_t tiles = 0;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &l->g.side[m];
    if (s->groups == 0) continue;
    int64_t rows = gemm_tile_rows(s, kind), down = ceil_div64(rows, GEMM_BM) * (kind == GEMM_TN ? s->groups : 1);
    tiles += down * ceil_div(s->N, bn) * l->parts[m];
  }
  return (double)ceil_div64(tiles, cuda_sm_count()) * bn * (bn == 128 ? 1.2 : 1.0);
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
  if (launch_cost(l, KIND, 256) <= launch_cost(l, KIND, 128))
    launch_gathering<KIND, 256>(l, stream);
  else
    launch_gathering<KIND, 128>(l, stream);
}

// Only code built for sm_90a has these kernels' bodies: other builds that run here were translated from older PTX.
static bool built_for_this(void) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, (const void *)gemm_sm90_kernel<GEMM_NT, 256, false>) != cudaSuccess)
    return false;
  return attributes.binaryVersion == 90 && attributes.ptxVersion >= 90 && encoder();
}

bool gemm_sm90_usable(void) {
  static const bool built = built_for_this();
  return built;
}

void gemm_sm90(const GemmLaunch *l, int kind, cudaStream_t stream) {
  if (kind == GEMM_NT) launch_width<GEMM_NT>(l, stream);
  if (kind == GEMM_NN) launch_width<GEMM_NN>(l, stream);
  if (kind == GEMM_TN) launch_width<GEMM_TN>(l, stream);
}
