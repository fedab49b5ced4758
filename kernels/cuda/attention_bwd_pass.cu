// The backward attention on Hopper: a pass over tiles of keys (attention_pass.h).
//
// Rows are those of a document and kv head: row r is of the document's position r / heads, and of head r % heads of
// those that share the kv head. So only a document's last tile of rows is less than full.
//
// A block is three warpgroups and takes units until none is left. Of the first, two warps copy, each half of every
// tile, and a thread of each of the others adds what comes out for dq to memory. The other two hold 64 keys each:
// scores transposed, so that p and ds are A fragments for dv and dk where they stand; ds goes through shared memory,
// and each of the two multiplies half of dq.
#include "kernels/cuda/attention_copy.h"
#include "kernels/cuda/attention_pass.h"
#include "kernels/cuda/attention_wgmma.h"

enum {
  D = 128,
  GROUP = 128, // threads of a warpgroup
  PASS_THREADS = 3 * GROUP,
  PASS_ROWS = 64, // of a tile
  PASS_UNITS = 8, // more than copies may be ahead of an adder, see below
  PASS_STAGES = 2,
  PASS_ADDERS = 2, // threads that add to dq in turns, each from a tile of its own
  CONSUMER_WARPS = 2 * GROUP / 32
};

// For the copy engine: boxes of 32 rows of q and dO, of 64 keys and values.
typedef struct PassMaps {
  CUtensorMap q, dout, k, v;
  bool row_boxes; // 32 rows are whole positions: q's and dout's are there
  bool key_boxes; // k's and v's
} PassMaps;

// What a block takes: a tile of keys against the tiles of rows that see some of them.
typedef struct Unit {
  int key, start, end; // keys [key, min(key + PASS_KEYS, end)) of a document [start, end); key < 0: there are no more
  int kv_head, rows;   // of the document
  int first, behind;   // tiles of rows lie in [first, behind), the last one is taken first
  int late_start[2], early_end[2]; // rows in [late_start, early_end) see all of a half's keys
} Unit;

struct PassShared {
  bf16 k[PASS_KEYS * D], v[PASS_KEYS * D];
  bf16 q[PASS_STAGES][PASS_ROWS * D], dout[PASS_STAGES][PASS_ROWS * D];
  bf16 ds[2][PASS_KEYS * PASS_ROWS]; // transposed: keys by the rows of a tile
  float dq[PASS_ADDERS][PASS_ROWS * D];
  float lse2[PASS_STAGES][PASS_ROWS], delta[PASS_STAGES][PASS_ROWS];
  int32_t q_start[PASS_KEYS], q_end[PASS_KEYS]; // zeros past the last key: an empty interval
  Unit unit[PASS_UNITS];
  uint64_t unit_full[PASS_UNITS], k_full, v_full, keys_empty;
  uint64_t q_full[PASS_STAGES], q_empty[PASS_STAGES], dout_full[PASS_STAGES], dout_empty[PASS_STAGES];
  uint64_t dq_full[PASS_ADDERS], dq_empty[PASS_ADDERS];
};
// An adder reads its unit until its part of dq has been added, and says dq_empty before that. From then on three more
// steps may be multiplied, which may be three units, and a unit is taken when the one two before it has been: so the
// copies may be five units ahead of what an adder reads, and six places are what they need.
static_assert(PASS_UNITS >= 6, "adders have read their unit before its place is taken again");
static_assert(sizeof(PassShared) <= CUDA_HOPPER_SHARED, "one block fits on a multiprocessor");
static_assert(offsetof(PassShared, ds) % 1024 == 0, "tiles begin on a block of the swizzle");

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- the warps that copy ----

// Takes the next unit, a tile of the list for a kv head; a warp.
static __device__ inline void take_unit(const PassCall &p, Unit *u) {
  const Batch &b = p.c.b;
  const int G = p.c.shape.G, heads = p.c.shape.heads;
  int lane = threadIdx.x & 31, number = 0;
  if (lane == 0) number = atomicAdd(p.s.taken, 1);
  number = __shfl_sync(0xffffffffu, number, 0);
  Span span = {-1, 0};
  if (number < tile_units<PASS_KEYS>(b, G)) span = batch_key_tile(b, number / G);
  if (lane == 0) u->key = span.first;
  __syncwarp();
  if (span.first < 0) return;
  const int start = b.doc_start[span.first];
  int last = 0; // query that sees one of the keys, and one more
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int late_start = 0, early_end = INT_MAX;
#pragma unroll
    for (int i = lane; i < PASS_KEYS / 2; i += 32) {
      int key = span.first + half * PASS_KEYS / 2 + i;
      bool in = key < span.end;
      int sees_from = in ? b.q_start[key] : 0, sees_to = in ? b.q_end[key] : 0;
      late_start = max(late_start, sees_from), early_end = min(early_end, sees_to), last = max(last, sees_to);
    }
    late_start = __reduce_max_sync(0xffffffffu, late_start), early_end = __reduce_min_sync(0xffffffffu, early_end);
    if (lane == 0) {
      u->late_start[half] = (late_start - start) * heads;
      u->early_end[half] = (early_end - start) * heads;
    }
  }
  last = __reduce_max_sync(0xffffffffu, last);
  if (lane == 0) {
    u->start = start;
    u->end = span.end;
    u->kv_head = number % G;
    u->rows = (span.end - start) * heads;
    u->first = (b.q_start[span.first] - start) * heads / PASS_ROWS * PASS_ROWS;
    u->behind = ceil_div((last - start) * heads, PASS_ROWS) * PASS_ROWS;
  }
  __syncwarp();
}

// A warp's half of a tile of keys or values, of which `keys` are there; map: NULL where there is none.
static __device__ inline void copy_keys(const bf16 *tile, const CUtensorMap *map, uint32_t full, const bf16 *from,
                                        int key, int keys, int kv_head, int G, int half) {
  if (map && keys >= (half + 1) * PASS_KEYS / 2)
    box_part<D, PASS_KEYS, 2>(tile, map, full, kv_head, key + half * PASS_KEYS / 2);
  else
    copy_half<D, PASS_KEYS>(tile, from + ((int64_t)key * G + kv_head) * D, G * D, keys, half);
}

// What there is to do, queries and dO, keys and values: two warps, each half of every tile. The copy engine copies what
// is whole. Row by row come the end of a document, with zeros behind it, dO where text meets an image, and all of q and
// dO where 32 rows are not whole positions.
static __device__ inline void copy_tiles(PassShared *s, const PassCall &p, const PassMaps &maps) {
  const BackwardCall &c = p.c;
  const int H = c.shape.H, G = c.shape.G;
  uint32_t step = 0; // tiles of rows so far
  for (uint32_t units = 0;; units++) {
    const Unit *u = &s->unit[units % PASS_UNITS];
    const uint32_t full = shared_address(&s->unit_full[units % PASS_UNITS]);
    if (threadIdx.x < 32) {
      take_unit(p, &s->unit[units % PASS_UNITS]);
      if (threadIdx.x == 0) barrier_arrive(full);
    } else
      barrier_wait(full, units / PASS_UNITS & 1);
    if (u->key < 0) return;
    const int half = (int)recompute(threadIdx.x / 32);
    const int64_t line = pass_line(c.shape, u->kv_head, u->start);
    for (int row = u->behind - PASS_ROWS; row >= u->first; row -= PASS_ROWS, step++) {
      const int at = step & 1, valid = u->rows - row, head = u->kv_head * c.shape.heads;
      const uint32_t q_full = shared_address(&s->q_full[at]), dout_full = shared_address(&s->dout_full[at]);
      KvRow own = kv_row(c.shape, u->kv_head, min(row + half * 32 + (int)recompute(threadIdx.x & 31), u->rows - 1));
      own.position += u->start;
      const int dout_row = c.b.row[own.position], first_row = __shfl_sync(0xffffffffu, dout_row, 0);
      const int first_position = __shfl_sync(0xffffffffu, own.position, 0);
      const bool whole = maps.row_boxes && valid >= (half + 1) * 32;
      const bool in_order = __all_sync(0xffffffffu, dout_row - first_row == own.position - first_position);
      barrier_wait(shared_address(&s->dout_empty[at]), ~(step >> 1) & 1);
      if (whole && in_order)
        box_part<D, PASS_ROWS, 2>(s->dout[at], &maps.dout, dout_full, head, first_row);
      else
        gather_half<D>(s->dout[at], c.dout, dout_row * H + own.head, D, valid, half);
      if (half == 0) copy_line<PASS_ROWS>(s->delta[at], p.s.delta + line + row, valid);
      barrier_arrive_after_copies(dout_full);
      barrier_wait(shared_address(&s->q_empty[at]), ~(step >> 1) & 1);
      if (whole)
        box_part<D, PASS_ROWS, 2>(s->q[at], &maps.q, q_full, head, first_position);
      else
        gather_half<D>(s->q[at], c.q, own.position * H + own.head, D, valid, half);
      if (half == 1) copy_line<PASS_ROWS>(s->lse2[at], p.s.lse2 + line + row, valid);
      barrier_arrive_after_copies(q_full);
      if (row < u->behind - PASS_ROWS) continue;
      // Keys and values behind the first rows, whose place is free before.
      const int key = u->key, keys = u->end - key;
      const uint32_t k_full = shared_address(&s->k_full), v_full = shared_address(&s->v_full);
      barrier_wait(shared_address(&s->keys_empty), ~units & 1);
      copy_keys(s->k, maps.key_boxes ? &maps.k : NULL, k_full, c.k, key, keys, u->kv_head, G, half);
      copy_line<PASS_KEYS>(half ? s->q_end : s->q_start, (half ? c.b.q_end : c.b.q_start) + key, keys);
      barrier_arrive_after_copies(k_full);
      copy_keys(s->v, maps.key_boxes ? &maps.v : NULL, v_full, c.v, key, keys, u->kv_head, G, half);
      barrier_arrive_after_copies(v_full);
    }
  }
}

// ---- the threads that add to dq ----

// Until `turn` units have had their turn; what the turn says.
static __device__ inline uint32_t await_turn(const uint32_t *at, uint32_t turn) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
  } while ((seen & ~TURN_WRITTEN) != turn);
  return seen;
}
static __device__ inline void pass_turn(uint32_t *at, uint32_t add) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(add) : "memory");
}

// Those that come to lie in dq[own].
static __device__ inline void add_gradients(PassShared *s, const PassCall &p, uint32_t own) {
  Place<PASS_UNITS> slot;
  uint32_t step = 0;
  for (;; slot.step()) {
    barrier_wait(shared_address(&s->unit_full[slot.at]), slot.parity);
    const Unit &u = s->unit[slot.at];
    if (u.key < 0) return;
    const int64_t line = pass_line(p.c.shape, u.kv_head, u.start);
    uint32_t *const turns = p.s.turn + line, turn = (u.key - u.start) / PASS_KEYS;
    if (own == 0) // rows that see no key: their turns are passed on first, for later units begin with the last rows
      for (int row = (u.rows - 1) / PASS_ROWS * PASS_ROWS; row >= u.behind; row -= PASS_ROWS) {
        await_turn(turns + row, turn);
        pass_turn(turns + row, 1);
      }
    for (int row = u.behind - PASS_ROWS; row >= u.first; row -= PASS_ROWS, step++) {
      if (step % PASS_ADDERS != own) continue;
      uint32_t bytes = (uint32_t)(min((int)PASS_ROWS, u.rows - row) * D * sizeof(float));
      uint32_t seen = await_turn(turns + row, turn);
      fence_async_proxy_everywhere(); // what other units have added, before what this one adds
      barrier_wait(shared_address(&s->dq_full[own]), step / PASS_ADDERS & 1);
      if (seen & TURN_WRITTEN)
        bulk_add(p.s.dq + (line + row) * D, shared_address(s->dq[own]), bytes);
      else
        bulk_store(p.s.dq + (line + row) * D, shared_address(s->dq[own]), bytes);
      bulk_commit();
      bulk_wait_read();
      barrier_arrive(shared_address(&s->dq_empty[own]));
      bulk_wait();
      pass_turn(turns + row, seen & TURN_WRITTEN ? 1 : 1 + TURN_WRITTEN);
    }
  }
}

// ---- the warpgroups that multiply ----

// score^T [16, 8 n] -> p^T = exp2(score^T scale2 - lse2), 0 where a row, of those from `row` on, does not see a key.
// q_start, q_end: of the warp's keys, in a document that begins at `start`; that by its address, for it is read from
// shared memory only where a tile is seen in part.
template <int n>
static __device__ inline void key_probability(float (&p)[n][4], const float *lse2, float scale2, bool partly,
                                              const int32_t *q_start, const int32_t *q_end, const int &start, int heads,
                                              int row) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < n; j++) {
    float2 shift = *(const float2 *)(lse2 + 8 * j + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      p[j][2 * h] = exp2_fast(p[j][2 * h] * scale2 - shift.x);
      p[j][2 * h + 1] = exp2_fast(p[j][2 * h + 1] * scale2 - shift.y);
    }
  }
  if (!partly) return;
  int g = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int from = (q_start[g + 8 * h] - start) * heads - row - 2 * t;
    int to = (q_end[g + 8 * h] - start) * heads - row - 2 * t;
#pragma unroll
    for (int j = 0; j < n; j++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (8 * j + i < from || 8 * j + i >= to) p[j][2 * h + i] = 0;
  }
}

// Stores a warp's 16 rows from `row` on of ds^T to the tile.
template <int n> static __device__ inline void store_pairs(bf16 *tile, const uint32_t (&ds)[n][2], int row) {
  int lane = threadIdx.x & 31;
  uint32_t at = shared_address(tile) + (row + (lane & 7) + (lane & 8)) * 128, chunk = lane >> 4 ^ (lane & 7);
#pragma unroll
  for (int j = 0; j < n; j += 2)
    store_matrix(at + (j >> 3) * PASS_KEYS * 128 + ((chunk ^ (j & 7)) << 4), ds[j][0], ds[j][1], ds[j + 1][0],
                 ds[j + 1][1]);
}

// Stores a warpgroup's half of the columns of dq [PASS_ROWS, D] to a tile in the order of dq_place.
static __device__ inline void store_dq(float *tile, const float (&dq)[8][4], int group) {
  int thread = (int)recompute(threadIdx.x), lane = thread & 31;
  int row = thread % GROUP / 32 * 16 + (lane >> 2);
  float4 *to = (float4 *)tile + row * (D / 4) + group * 16 + (lane & 3);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int m = 0; m < 4; m++)
      to[8 * h * (D / 4) + dq_place(4 * m, row)] =
          make_float4(dq[2 * m][2 * h], dq[2 * m][2 * h + 1], dq[2 * m + 1][2 * h], dq[2 * m + 1][2 * h + 1]);
}

// Writes a thread's rows of dk or dv, [T, G, D]: `row` of the keys and row + 8, scaled.
static __device__ inline void write_rows(bf16 *to, const float (&x)[D / 8][4], float scale, int row, int end, int G,
                                         int kv_head) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    bf16 *at = to + ((int64_t)(row + 8 * h) * G + kv_head) * D + (threadIdx.x & 3) * 8;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack2(x[n + i][2 * h] * scale, x[n + i][2 * h + 1] * scale);
      uint4 out = quad_transpose(w[0], w[1], w[2], w[3]);
      if (row + 8 * h < end) *(uint4 *)(at + 8 * n) = out;
    }
  }
}

static __device__ inline void multiply(PassShared *s, const PassCall &p) {
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0) - 1; // which of the two
  const bool speaks = (threadIdx.x & 31) == 0;
  uint32_t step = 0; // tiles of rows so far
  for (uint32_t units = 0;; units++) {
    const Unit *u = &s->unit[units % PASS_UNITS];
    barrier_wait(shared_address(&s->unit_full[units % PASS_UNITS]), units / PASS_UNITS & 1);
    if (u->key < 0) return;
    barrier_wait(shared_address(&s->k_full), units & 1);
    barrier_wait(shared_address(&s->v_full), units & 1);
    float dk[D / 8][4], dv[D / 8][4];
    fragments_zero(dk);
    fragments_zero(dv);
    const int first = u->first;
    for (int row = u->behind - PASS_ROWS; row >= first; row -= PASS_ROWS, step++) {
      float score[PASS_ROWS / 8][4], dp[PASS_ROWS / 8][4], dq[8][4];
      uint32_t pairs[PASS_ROWS / 8][2], ds[PASS_ROWS / 8][2];
      const int first_key = own * 64 + (threadIdx.x % GROUP) / 32 * 16; // the warp's
      const bf16 *keys = s->k + own * 64 * 64, *values = s->v + own * 64 * 64;
      barrier_wait(shared_address(&s->q_full[step & 1]), step >> 1 & 1);
      fence_async_proxy();
      start_scores<D, PASS_KEYS>(score, keys, s->q[step & 1]);
      barrier_wait(shared_address(&s->dout_full[step & 1]), step >> 1 & 1);
      fence_async_proxy();
      start_scores<D, PASS_KEYS>(dp, values, s->dout[step & 1]);
      wgmma_wait<1>();
      wgmma_keep(score);
      key_probability(score, s->lse2[step & 1], p.c.shape.scale * LOG2E,
                      u->late_start[own] > row || u->early_end[own] < row + PASS_ROWS, s->q_start + first_key,
                      s->q_end + first_key, u->start, p.c.shape.heads, row);
      pack_rows(pairs, score);
      start_sum<D>(dv, pairs, s->dout[step & 1]);
      wgmma_wait<1>(); // dp is there; dv is under way
      wgmma_keep(dp);
      key_gradient(ds, pairs, dp, s->delta[step & 1]);
      store_pairs(s->ds[step & 1], ds, first_key);
      fence_async_proxy();
      named_barrier_sync(1, 2 * GROUP);
      wgmma_wait<0>(); // dv: its operands' registers are wanted
      if (speaks) barrier_arrive(shared_address(&s->dout_empty[step & 1]));
      // Of dq each warpgroup has half of the columns.
      start_product<PASS_KEYS>(dq, s->ds[step & 1], s->k + own * PASS_KEYS * 64);
      start_sum<D>(dk, ds, s->q[step & 1]);
      wgmma_wait<1>(); // dk is under way
      wgmma_keep(dq);
      barrier_wait(shared_address(&s->dq_empty[step % PASS_ADDERS]), ~(step / PASS_ADDERS) & 1);
      store_dq(s->dq[step % PASS_ADDERS], dq, own);
      fence_async_proxy();
      __syncwarp();
      if (speaks) barrier_arrive(shared_address(&s->dq_full[step % PASS_ADDERS]));
      wgmma_wait<0>();
      wgmma_keep(dk);
      wgmma_keep(dv);
      if (speaks) barrier_arrive(shared_address(&s->q_empty[step & 1]));
    }
    if (speaks) barrier_arrive(shared_address(&s->keys_empty));
    int key = u->key + (threadIdx.x - GROUP) / 32 * 16 + ((threadIdx.x & 31) >> 2);
    write_rows(p.c.dk, dk, p.c.shape.scale, key, u->end, p.c.shape.G, u->kv_head);
    write_rows(p.c.dv, dv, 1, key, u->end, p.c.shape.G, u->kv_head);
  }
}
#endif

static __global__ void __launch_bounds__(PASS_THREADS, 1)
    attention_backward_pass(PassCall p, const __grid_constant__ PassMaps maps) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  PassShared *s = (PassShared *)shared;
  if (threadIdx.x == 0) {
    for (int i = 0; i < PASS_UNITS; i++) barrier_init(shared_address(&s->unit_full[i]), 1);
    for (int i = 0; i < PASS_STAGES; i++) {
      barrier_init(shared_address(&s->q_full[i]), 64);
      barrier_init(shared_address(&s->q_empty[i]), CONSUMER_WARPS);
      barrier_init(shared_address(&s->dout_full[i]), 64);
      barrier_init(shared_address(&s->dout_empty[i]), CONSUMER_WARPS);
    }
    barrier_init(shared_address(&s->k_full), 64);
    barrier_init(shared_address(&s->v_full), 64);
    barrier_init(shared_address(&s->keys_empty), CONSUMER_WARPS);
    for (int i = 0; i < PASS_ADDERS; i++) {
      barrier_init(shared_address(&s->dq_full[i]), CONSUMER_WARPS);
      barrier_init(shared_address(&s->dq_empty[i]), 1);
    }
    barrier_init_fence();
  }
  await_previous();
  __syncthreads();
  if (threadIdx.x < GROUP) {
    registers_give<56>();
    if (threadIdx.x < 64) copy_tiles(s, p, maps);
    const int adder = threadIdx.x / 32 - 2;
    if (adder >= 0 && threadIdx.x % 32 == 0) add_gradients(s, p, adder);
  } else {
    registers_take<224>();
    multiply(s, p);
  }
#endif
}

// ---- the host side ----

size_t attention_bwd_pass_scratch(const Dims *d) {
  PassScratch s;
  return pass_bind(&s, d, NULL);
}

static PassMaps maps_encode(const BackwardCall *c) {
  const int T = c->shape.T, H = c->shape.H, G = c->shape.G, heads = c->shape.heads;
  PassMaps maps = {};
  maps.key_boxes = tensor_map_usable();
  maps.row_boxes = maps.key_boxes && 32 % heads == 0;
  if (maps.row_boxes) {
    tensor_map_encode(&maps.q, "attention", c->q, D, H, T, heads, 32 / heads);
    tensor_map_encode(&maps.dout, "attention", c->dout, D, H, T, heads, 32 / heads);
  }
  if (maps.key_boxes) {
    tensor_map_encode(&maps.k, "attention", c->k, D, G, T, 1, PASS_KEYS / 2);
    tensor_map_encode(&maps.v, "attention", c->v, D, G, T, 1, PASS_KEYS / 2);
  }
  return maps;
}

const float *attention_bwd_pass(const BackwardCall *c, const Dims *d, void *scratch, bool finish, cudaStream_t stream) {
  PassCall p = {.c = *c, .s = {}};
  pass_bind(&p.s, d, scratch);
  attention_pass_prepare(&p, stream);
  CUDA_ALLOW_SHARED(attention_backward_pass, sizeof(PassShared));
  CUDA_LAUNCH(attention_backward_pass, cuda_sm_count(), PASS_THREADS, sizeof(PassShared), stream, p, maps_encode(c));
  if (finish) attention_pass_finish(&p, stream);
  return p.s.dq;
}
