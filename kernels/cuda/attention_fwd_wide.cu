// The forward attention on Hopper for head_dim 128.
//
// A block is three warpgroups and takes units until none is left: two sets of 64 queries of one document that share a
// kv head. They are the same queries of two heads where a kv head has an even number of those, or else neighbours. The
// first warpgroup copies, the other two have a set each. Their tensor cores multiply the next tile's scores while they
// take the softmax of this one.
#include "kernels/cuda/attention_copy.h"
#include "kernels/cuda/attention_fwd.h"
#include "kernels/cuda/attention_wgmma.h"

enum {
  D = 128,
  GROUP = 128,
  FLASH_THREADS = 3 * GROUP,
  FLASH_KEYS = 128, // of a tile
  FLASH_SETS = 2,
  FLASH_ROWS = 64, // queries of a set
  FLASH_UNITS = 4,
  FLASH_STAGES = 2,
  COPY_WARPS = GROUP / 32,
  CONSUMER_WARPS = 2 * GROUP / 32
};

typedef struct FlashCall {
  ForwardCall c;
  int *taken; // units that blocks have taken
} FlashCall;

// For the copy engine: what a warp copies of a set of queries, and of a tile of keys or values.
typedef struct FlashMaps {
  CUtensorMap q, k, v;
  bool there;
} FlashMaps;

// What a block takes.
typedef struct Unit {
  int start, kv_head;                         // its keys begin at `start`; start < 0: there are no more
  int first[FLASH_SETS], head[FLASH_SETS];    // the set's queries begin at `first`,
  int count[FLASH_SETS], key_end[FLASH_SETS]; // as many are there; the keys that some of them see end there
  int keys_end;                               // the larger one
} Unit;

struct FlashShared {
  bf16 q[FLASH_STAGES][FLASH_SETS][FLASH_ROWS * D];
  bf16 k[FLASH_STAGES][FLASH_KEYS * D], v[FLASH_STAGES][FLASH_KEYS * D];
  int32_t kv_end[FLASH_STAGES][FLASH_SETS][FLASH_ROWS], row[FLASH_STAGES][FLASH_SETS][FLASH_ROWS]; // of the queries
  int32_t q_end[FLASH_STAGES][FLASH_KEYS]; // of the keys; zeros past the last
  int32_t early_end[FLASH_STAGES];         // the least of them
  Unit unit[FLASH_UNITS];
  uint64_t unit_full[FLASH_UNITS], q_full[FLASH_STAGES], q_empty[FLASH_STAGES];
  uint64_t k_full[FLASH_STAGES], k_empty[FLASH_STAGES], v_full[FLASH_STAGES], v_empty[FLASH_STAGES];
};
static_assert(sizeof(FlashShared) <= CUDA_HOPPER_SHARED, "one block fits on a multiprocessor");

static_assert(FLASH_SETS * FLASH_ROWS == BATCH_TILE, "sets of neighbours are a tile of the list");

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- the warps that copy ----

// Takes the next unit; a warp.
static __device__ inline void take_unit(const FlashCall &p, Unit *u) {
  const Batch &b = p.c.b;
  const int H = p.c.shape.H, G = p.c.shape.G, pairs = H / G % 2 == 0, sets = pairs ? H / 2 : H;
  const int parts = pairs ? BATCH_TILE / FLASH_ROWS : 1; // of a tile of the list
  int lane = threadIdx.x & 31, number = 0, begin;
  Span span;
  do {
    if (lane == 0) number = atomicAdd(p.taken, 1);
    number = __shfl_sync(0xffffffffu, number, 0);
    if (number >= b.dims->n_tiles * parts * sets) {
      if (lane == 0) u->start = -1;
      __syncwarp();
      return;
    }
    span = batch_tile(b, number / sets / parts);
    begin = span.first + number / sets % parts * FLASH_ROWS;
  } while (begin >= span.end); // the tile has one part
  const int start = b.doc_start[begin];
  if (lane < FLASH_SETS) {
    int first = begin + (pairs ? 0 : lane * FLASH_ROWS), head = pairs ? number % sets * 2 + lane : number % sets;
    int count = max(0, min(FLASH_ROWS, span.end - first));
    int end = count ? b.kv_end[first + count - 1] : start, other = __shfl_xor_sync(0x3, end, 1);
    u->first[lane] = first;
    u->head[lane] = head;
    u->count[lane] = count;
    u->key_end[lane] = end;
    if (lane == 0) {
      u->start = start;
      u->kv_head = head / (H / G);
      u->keys_end = max(end, other);
    }
  }
  __syncwarp();
}

// A warp's part of a tile: rows [0, valid) of the head-th of `heads` heads, from position `first` on. The copy engine
// copies what is whole; the end of a document comes by the warp, and zeros behind it.
template <int rows>
static __device__ inline void copy_part(const bf16 *tile, const CUtensorMap *map, bool boxes, uint32_t full,
                                        const bf16 *from, int first, int head, int heads, int valid) {
  const int part = rows / COPY_WARPS, before = (int)recompute(threadIdx.x / 32) * part;
  if (boxes && valid >= before + part)
    box_part<D, rows, COPY_WARPS>(tile, map, full, head, first + before);
  else
    copy_rows<D, rows, COPY_WARPS>(tile, from + ((int64_t)first * heads + head) * D, heads * D, valid);
}

// What there is to do: queries, keys and values; four warps.
static __device__ inline void copy_tiles(FlashShared *s, const FlashCall &p, const FlashMaps &maps) {
  const ForwardCall &c = p.c;
  const int H = c.shape.H, G = c.shape.G;
  Place<FLASH_UNITS> slot;
  Place<FLASH_STAGES> place, stage;
  for (;; slot.step(), place.step()) {
    const Unit &u = s->unit[slot.at];
    if (threadIdx.x < 32) {
      take_unit(p, &s->unit[slot.at]);
      if (threadIdx.x == 0) barrier_arrive(shared_address(&s->unit_full[slot.at]));
    }
    barrier_wait(shared_address(&s->unit_full[slot.at]), slot.parity);
    if (u.start < 0) return;
    barrier_wait(shared_address(&s->q_empty[place.at]), place.parity ^ 1);
#pragma unroll 1
    for (int set = 0; set < FLASH_SETS; set++) {
      int first = u.first[set], count = u.count[set];
      copy_part<FLASH_ROWS>(s->q[place.at][set], &maps.q, maps.there, shared_address(&s->q_full[place.at]), c.q, first,
                            u.head[set], H, count);
      line_load<FLASH_ROWS>(s->kv_end[place.at][set], c.b.kv_end + first, count);
      line_load<FLASH_ROWS>(s->row[place.at][set], c.b.row + first, count);
    }
    barrier_arrive_after_copies(shared_address(&s->q_full[place.at]));
    for (int key = u.start; key < u.keys_end; key += FLASH_KEYS, stage.step()) {
      int end = u.keys_end, early_end = INT_MAX, lane = (int)recompute(threadIdx.x & 31);
      if (threadIdx.x < 32) {
        for (int i = key + lane; i < min(key + FLASH_KEYS, end); i += 32) early_end = min(early_end, c.b.q_end[i]);
      }
      barrier_wait(shared_address(&s->k_empty[stage.at]), stage.parity ^ 1);
      copy_part<FLASH_KEYS>(s->k[stage.at], &maps.k, maps.there, shared_address(&s->k_full[stage.at]), c.k, key,
                            u.kv_head, G, end - key);
      line_load<FLASH_KEYS>(s->q_end[stage.at], c.b.q_end + key, end - key);
      barrier_arrive_after_copies(shared_address(&s->k_full[stage.at]));
      if (threadIdx.x < 32) {
        early_end = __reduce_min_sync(0xffffffffu, early_end);
        if (lane == 0) {
          s->early_end[stage.at] = early_end;
          barrier_arrive(shared_address(&s->k_full[stage.at]));
        }
      }
      barrier_wait(shared_address(&s->v_empty[stage.at]), stage.parity ^ 1);
      copy_part<FLASH_KEYS>(s->v[stage.at], &maps.v, maps.there, shared_address(&s->v_full[stage.at]), c.v, key,
                            u.kv_head, G, end - key);
      barrier_arrive_after_copies(shared_address(&s->v_full[stage.at]));
    }
  }
}

// ---- the warpgroups that multiply ----

enum { SCORES = FLASH_KEYS / 8 };

static __device__ inline void multiply(FlashShared *s, const FlashCall &p) {
  const ForwardCall &c = p.c;
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0) - 1; // its set
  const bool speaks = (threadIdx.x & 31) == 0;
  const float scale2 = c.shape.scale * LOG2E;
  Place<FLASH_STAGES> stage;
  for (uint32_t units = 0;; units++) {
    const Unit *u = &s->unit[units % FLASH_UNITS];
    barrier_wait(shared_address(&s->unit_full[units % FLASH_UNITS]), units / FLASH_UNITS & 1);
    if (u->start < 0) return;
    const int lane_row = threadIdx.x % GROUP / 32 * 16 + ((threadIdx.x & 31) >> 2), place = units & 1;
    const bf16 *q = s->q[place][own];
    barrier_wait(shared_address(&s->q_full[place]), units >> 1 & 1);
    int left = ceil_div(u->key_end[own] - u->start, FLASH_KEYS); // tiles
    const int others = ceil_div(u->keys_end - u->start, FLASH_KEYS) - left;
    float o[D / 8][4];
    RowPair r;
    fragments_zero(o);
    const int least_end = s->kv_end[place][own][0], first = u->first[own], count = u->count[own];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      r.top[h] = -INFINITY, r.sum[h] = 0;
      r.position[h] = first + lane_row + 8 * h, r.kv_end[h] = s->kv_end[place][own][lane_row + 8 * h];
    }
    if (left > 0) {
      int key = u->start;
      float score[SCORES][4], keep[2];
      uint32_t pairs[SCORES][2];
      barrier_wait(shared_address(&s->k_full[stage.at]), stage.parity);
      fence_async_proxy();
      start_scores<D, FLASH_ROWS>(score, q, s->k[stage.at]);
      wgmma_wait<0>();
      wgmma_keep(score);
      bool intervals = s->early_end[stage.at] < first + count;
      if (intervals || least_end < key + FLASH_KEYS)
        hide_keys(score, -INFINITY, r.position, r.kv_end, s->q_end[stage.at], intervals, key);
      if (speaks) barrier_arrive(shared_address(&s->k_empty[stage.at]));
      raise_scores(score, &r, keep, scale2);
      pack_rows(pairs, score);
      for (; left > 1; left--) {
        Place<FLASH_STAGES> last = stage;
        stage.step();
        key += FLASH_KEYS;
        barrier_wait(shared_address(&s->k_full[stage.at]), stage.parity);
        barrier_wait(shared_address(&s->v_full[last.at]), last.parity);
        fence_async_proxy();
        start_scores<D, FLASH_ROWS>(score, q, s->k[stage.at]);
        start_sum<D>(o, pairs, s->v[last.at]);
        wgmma_wait<1>();
        wgmma_keep(score);
        intervals = s->early_end[stage.at] < first + count;
        if (intervals || least_end < key + FLASH_KEYS)
          hide_keys(score, -INFINITY, r.position, r.kv_end, s->q_end[stage.at], intervals, key);
        if (speaks) barrier_arrive(shared_address(&s->k_empty[stage.at]));
        raise_scores(score, &r, keep, scale2);
        wgmma_wait<0>();
        wgmma_keep(o);
        if (speaks) barrier_arrive(shared_address(&s->v_empty[last.at]));
        pack_rows(pairs, score);
#pragma unroll
        for (int i = 0; i < D / 8; i++) o[i][0] *= keep[0], o[i][1] *= keep[0], o[i][2] *= keep[1], o[i][3] *= keep[1];
      }
      barrier_wait(shared_address(&s->v_full[stage.at]), stage.parity);
      fence_async_proxy();
      start_sum<D>(o, pairs, s->v[stage.at]);
      wgmma_wait<0>();
      wgmma_keep(o);
      if (speaks) barrier_arrive(shared_address(&s->v_empty[stage.at]));
      stage.step();
    }
    for (int i = 0; i < others; i++, stage.step()) { // tiles that the other set alone sees
      barrier_wait(shared_address(&s->k_full[stage.at]), stage.parity);
      if (speaks) barrier_arrive(shared_address(&s->k_empty[stage.at]));
      barrier_wait(shared_address(&s->v_full[stage.at]), stage.parity);
      if (speaks) barrier_arrive(shared_address(&s->v_empty[stage.at]));
    }
    RowPlace to[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int at = lane_row + 8 * h;
      to[h] = {at < count ? u->head[own] : -1, s->row[place][own][at]};
    }
    write_row_pair<D>(o, r, c, to);
    __syncwarp();
    if (speaks) barrier_arrive(shared_address(&s->q_empty[place]));
  }
}
#endif

static __global__ void __launch_bounds__(FLASH_THREADS, 1)
    attention_forward_wide(FlashCall p, const __grid_constant__ FlashMaps maps) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  FlashShared *s = (FlashShared *)shared;
  if (threadIdx.x == 0) {
    for (int i = 0; i < FLASH_UNITS; i++) barrier_init(shared_address(&s->unit_full[i]), 1);
    for (int i = 0; i < FLASH_STAGES; i++) {
      barrier_init(shared_address(&s->q_full[i]), GROUP);
      barrier_init(shared_address(&s->q_empty[i]), CONSUMER_WARPS);
      barrier_init(shared_address(&s->k_full[i]), GROUP + 1);
      barrier_init(shared_address(&s->k_empty[i]), CONSUMER_WARPS);
      barrier_init(shared_address(&s->v_full[i]), GROUP);
      barrier_init(shared_address(&s->v_empty[i]), CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  await_previous();
  __syncthreads();
  if (threadIdx.x < GROUP) {
    registers_give<56>();
    copy_tiles(s, p, maps);
  } else {
    registers_take<224>();
    write_filler<D>(p.c, blockIdx.x * 2 * GROUP + threadIdx.x - GROUP, gridDim.x * 2 * GROUP);
    multiply(s, p);
  }
#endif
}

// ---- the host side ----

static FlashMaps maps_encode(const ForwardCall *c) {
  const AttentionShape *a = &c->shape;
  FlashMaps maps = {};
  maps.there = tensor_map_usable();
  if (!maps.there) return maps;
  tensor_map_encode(&maps.q, "attention", c->q, D, a->H, a->T, 1, FLASH_ROWS / COPY_WARPS);
  tensor_map_encode(&maps.k, "attention", c->k, D, a->G, a->T, 1, FLASH_KEYS / COPY_WARPS);
  tensor_map_encode(&maps.v, "attention", c->v, D, a->G, a->T, 1, FLASH_KEYS / COPY_WARPS);
  return maps;
}

void attention_fwd_wide(const ForwardCall *c, void *scratch, cudaStream_t stream) {
  FlashCall p = {.c = *c, .taken = (int *)scratch};
  CUDA_CHECK(cudaMemsetAsync(p.taken, 0, sizeof *p.taken, stream));
  CUDA_ALLOW_SHARED(attention_forward_wide, sizeof(FlashShared));
  CUDA_LAUNCH(attention_forward_wide, cuda_sm_count(), FLASH_THREADS, sizeof(FlashShared), stream, p, maps_encode(c));
}
