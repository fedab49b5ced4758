// The forward attention on Hopper for head_dim 64.
//
// A block is two warpgroups with a set of 64 rows each of one kv head. Tiles of 64 keys stream past, of which four have
// room in shared memory; of a set's last one 32 keys are left out if they can be. The tensor cores multiply the next
// tile's scores while a warpgroup takes the softmax of this one; two blocks share a multiprocessor.
#include "kernels/cuda/attention_fwd.h"
#include "kernels/cuda/attention_wgmma.h"

enum {
  D = 64,
  GROUP = 128, // threads of a warpgroup
  SETS = 2,
  ROWS = 64, // of a set
  THREADS = SETS * GROUP,
  KEYS = 64, // of a tile
  STAGES = 4
};

struct FlashShared {
  bf16 q[SETS][ROWS * D];
  bf16 k[STAGES][KEYS * D], v[STAGES][KEYS * D];
  int32_t q_end[STAGES][KEYS]; // of the keys; zeros past the last
};
static_assert(2 * sizeof(FlashShared) <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");
static_assert(BATCH_TILE % (SETS * ROWS) == 0, "a tile of the list, in a head, is whole blocks");

// A warpgroup's rows, of which key_end is their own.
typedef struct Set {
  RowBlock rows;
  int last, least_end; // their last position; all of them see keys to there, but for what ends_before tells
} Set;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A set's rows; a warpgroup.
static __device__ inline void load_rows(bf16 *tile, const ForwardCall &c, const RowBlock &rows) {
  typedef RowChunk<D, ROWS, GROUP> Chunk;
#pragma unroll
  for (int i = 0; i < Chunk::turns; i++) {
    Chunk chunk(c.shape, rows.kv_head, rows.first, rows.count, i);
    copy16_async(shared_address(tile) + chunk.to, c.q + chunk.element(c.shape, chunk.row.position), chunk.in);
  }
}

// Tile i of keys and values, if there is one, into its place; a group.
static __device__ inline void load_tile(FlashShared *s, const ForwardCall &c, const RowBlock &block, int i) {
  const int key = block.key + i * KEYS, valid = block.key_end - key, stride = c.shape.G * D;
  if (valid > 0) {
    const int64_t at = ((int64_t)key * c.shape.G + block.kv_head) * D;
    tile_load<D, KEYS, THREADS>(s->k[i % STAGES], c.k + at, stride, valid);
    tile_load<D, KEYS, THREADS>(s->v[i % STAGES], c.v + at, stride, valid);
    line_load<KEYS>(s->q_end[i % STAGES], c.b.q_end + key, valid);
  }
  copy_commit();
}

// The tile of the second last group is there for the tensor cores, and no warp still reads two before it.
static __device__ inline void tile_arrive() {
  copy_wait<1>();
  fence_async_proxy();
  __syncthreads();
}

// Scores of the first 8 n keys of tile i -> p.
template <int n>
static __device__ inline void take_softmax(float (&score)[n][4], RowPair *r, float keep[2], const FlashShared *s,
                                           const Set &set, int i, float scale2) {
  int key = set.rows.key + i * KEYS;
  wgmma_keep(score);
  bool intervals = ends_before(s->q_end[i % STAGES], set.rows.key_end - key, set.last);
  if (intervals || set.least_end < key + 8 * n)
    hide_keys(score, -INFINITY, r->position, r->kv_end, s->q_end[i % STAGES], intervals, key);
  raise_scores(score, r, keep, scale2);
}

// The first 8 n keys of tile i > 0, and the values of the tile before it.
template <int n>
static __device__ inline void take_tile(FlashShared *s, const Set &set, float (&o)[D / 8][4],
                                        uint32_t (&pairs)[KEYS / 8][2], RowPair *r, int i, float scale2) {
  float score[n][4], keep[2];
  start_scores<D, ROWS>(score, s->q[threadIdx.x / GROUP], s->k[i % STAGES]);
  start_sum<D>(o, pairs, s->v[(i - 1) % STAGES]);
  wgmma_wait<1>();
  take_softmax(score, r, keep, s, set, i, scale2);
  wgmma_wait<0>();
  wgmma_keep(o);
  pack_rows((uint32_t(&)[n][2])pairs, score);
#pragma unroll
  for (int j = 0; j < D / 8; j++) o[j][0] *= keep[0], o[j][1] *= keep[0], o[j][2] *= keep[1], o[j][3] *= keep[1];
}

// The values of a set's last tile, of which 32 keys are seen if `tail`.
static __device__ inline void take_last_values(float (&o)[D / 8][4], uint32_t (&pairs)[KEYS / 8][2], const bf16 *v,
                                               bool tail) {
  if (tail)
    start_sum<D>(o, (uint32_t(&)[KEYS / 16][2]) pairs, v);
  else
    start_sum<D>(o, pairs, v);
  wgmma_wait<0>();
  wgmma_keep(o);
}

static __device__ inline void take_unit(FlashShared *s, const ForwardCall &c, const RowBlock &block) {
  const int heads = c.shape.heads, group = threadIdx.x / GROUP;
  const float scale2 = c.shape.scale * LOG2E;
  Set set = {block, 0, 0};
  set.rows.first += group * ROWS;
  set.rows.count = min((int)ROWS, block.count - group * ROWS);
  set.rows.key_end = block.key; // none
  load_rows(s->q[group], c, set.rows);
  load_tile(s, c, block, 0);
  load_tile(s, c, block, 1);
  if (set.rows.count > 0) {
    set.last = (set.rows.first + set.rows.count - 1) / heads;
    set.least_end = c.b.kv_end[set.rows.first / heads];
    set.rows.key_end = c.b.kv_end[set.last];
  }
  RowPair r;
  RowPlace to[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int row = threadIdx.x % GROUP / 32 * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
    r.top[h] = -INFINITY, r.sum[h] = 0, r.position[h] = 0, r.kv_end[h] = 0, to[h] = {-1, 0};
    if (row >= set.rows.count) continue;
    KvRow at = kv_row(c.shape, block.kv_head, set.rows.first + row);
    r.position[h] = at.position, r.kv_end[h] = c.b.kv_end[at.position];
    to[h] = {at.head, c.b.row[at.position]};
  }
  const int tiles = ceil_div(block.key_end - block.key, KEYS), own = ceil_div(set.rows.key_end - block.key, KEYS);
  const bool tail = own > 1 && set.rows.key_end - block.key - (own - 1) * KEYS <= KEYS / 2;
  float o[D / 8][4];
  uint32_t pairs[KEYS / 8][2];
  fragments_zero(o);
  tile_arrive();
  load_tile(s, c, block, 2);
  if (own > 0) {
    float score[KEYS / 8][4], keep[2];
    start_scores<D, ROWS>(score, s->q[group], s->k[0]);
    wgmma_wait<0>();
    take_softmax(score, &r, keep, s, set, 0, scale2);
    pack_rows(pairs, score);
  }
#pragma unroll 1
  for (int i = 1; i < tiles; i++) {
    tile_arrive();
    load_tile(s, c, block, i + 2);
    if (i + 1 < own || (i + 1 == own && !tail))
      take_tile<KEYS / 8>(s, set, o, pairs, &r, i, scale2);
    else if (i < own)
      take_tile<KEYS / 16>(s, set, o, pairs, &r, i, scale2);
    else if (i == own) // the other set sees more
      take_last_values(o, pairs, s->v[(i - 1) % STAGES], tail);
  }
  if (own == tiles) take_last_values(o, pairs, s->v[(tiles - 1) % STAGES], tail);
  write_row_pair<D>(o, r, c, to);
  __syncthreads(); // before the next unit's copies
}
#endif

static __global__ void __launch_bounds__(THREADS, 2) attention_forward_sm90(ForwardCall c) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  await_previous();
  extern __shared__ __align__(1024) char shared[];
  FlashShared *s = (FlashShared *)shared;
  write_filler<D>(c, blockIdx.x * THREADS + threadIdx.x, gridDim.x * THREADS);
  for (int unit = blockIdx.x; unit < tile_units<SETS * ROWS>(c.b, c.shape.H); unit += gridDim.x) {
    RowBlock block = row_block<SETS * ROWS>(c.b, c.shape, unit);
    if (block.count > 0) take_unit(s, c, block);
  }
#endif
}

bool attention_fwd_sm90_usable(void) {
  static const bool usable = built_for_sm90((const void *)attention_forward_sm90);
  return usable;
}

void attention_fwd_sm90(const ForwardCall *c, cudaStream_t stream) {
  CUDA_ALLOW_SHARED(attention_forward_sm90, sizeof(FlashShared));
  CUDA_LAUNCH(attention_forward_sm90, tile_blocks(c->shape.T, SETS * ROWS, c->shape.H), THREADS, sizeof(FlashShared),
              stream, *c);
}
