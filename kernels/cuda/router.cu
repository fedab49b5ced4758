// Routers: logits, top-k, the sort of assignments by expert, the router losses and their gradient.
//
// Rows are worked on in tiles of one modality each. Four neighbouring threads share a row's experts: lane q of the four
// has experts q, q + 4, .. A tile's logits stand in shared memory with rows of logit_stride floats, an odd multiple of
// four, so that the eight rows of a warp lie in different banks.
#include "kernels/cuda/mma.h"

enum {
  THREADS = 256,
  TILE = 64, // rows; the bits of a mask
  QUAD = 4,  // threads a row
  EXPERTS_MOST = 256,
  CHOICES_MOST = 8,
  FILLER = MODALITIES, // the side of filler rows
  LOSS_BLOCKS = 64,    // fixed split of a modality's rows for sums over them
  GRAD_COLUMNS = 128,  // of h, dh and dWr in a block
  GRAD_GROUPS = 8,     // groups of eight experts that one launch of the gradient takes
  TOTAL_COLUMNS = 128, // of dWr in a block that adds partial sums
  TOTAL_SHARES = THREADS / (TOTAL_COLUMNS / 4)
};

// What kernels know of both routers.
typedef struct Sides {
  int T, C, kmax;
  int E[MODALITIES], K[MODALITIES];
  int64_t base[MODALITIES]; // of a side's view in the two-sided logits [T, E]
} Sides;

// Rows [first, first + rows) of one side; the ordinal-th tile of it. `before`: tiles of other sides in front of them.
typedef struct RowTile {
  int side, first, rows, ordinal, before;
} RowTile;

static Sides sides_of(const Dims *d) {
  const int one[MODALITIES] = {1, 1};
  Sides s = {d->T, d->C, dims_kmax(d), {d->E[TEXT], d->E[IMAGE]}, {d->K[TEXT], d->K[IMAGE]}, {0, 0}};
  for (int m = 0; m < MODALITIES; m++) s.base[m] = two_sided_base(d->T, one, d->E, m);
  return s;
}

static int most_experts(const Dims *d) {
  return d->E[TEXT] > d->E[IMAGE] ? d->E[TEXT] : d->E[IMAGE];
}

// No pack has more tiles: each of the three sides may end in a ragged one.
static int tiles_most(int T, int tile_rows) {
  return T / tile_rows + 3;
}

static __device__ inline int side_rows(const BatchDims *n, int side) {
  return side == TEXT ? n->n_text : n->n_image;
}

// Tile `index` of a pack: text tiles, image tiles, filler tiles; rows <= 0 past the last.
static __device__ inline RowTile row_tile(const BatchDims *n, int T, int tile_rows, int index) {
  int text = n->n_text, used = text + n->n_image;
  int text_tiles = ceil_div(text, tile_rows), image_tiles = ceil_div(used - text, tile_rows);
  RowTile t = {TEXT, 0, 0, index, 0};
  int begin = 0, end = text;
  if (index >= text_tiles + image_tiles) {
    t.side = FILLER;
    t.before = text_tiles + image_tiles;
    begin = used;
    end = T;
  } else if (index >= text_tiles) {
    t.side = IMAGE;
    t.before = text_tiles;
    begin = text;
    end = used;
  }
  t.ordinal = index - t.before;
  t.first = begin + t.ordinal * tile_rows;
  t.rows = end - t.first < tile_rows ? end - t.first : tile_rows;
  return t;
}

static __host__ __device__ inline int logit_stride(int E) {
  return ((E + 3) / 4 | 1) * 4;
}

static __device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
static __device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// The tile's logits [rows, E] from global to shared memory.
static __device__ void load_logits(const Sides &s, RowTile t, const float *logits, float *tile) {
  int E = s.E[t.side], stride = logit_stride(E);
  const float *from = logits + s.base[t.side] + (int64_t)t.first * E;
  for (int i = threadIdx.x; i < t.rows * E; i += THREADS) tile[i / E * stride + i % E] = from[i];
}

// row [E] = softmax(row), by the four threads of a quad; returns log sum exp.
static __device__ inline float softmax_quad(float *row, int E, int q) {
  float top = -INFINITY, sum = 0;
  for (int e = q; e < E; e += QUAD) top = fmaxf(top, row[e]);
  top = quad_max(top);
  for (int e = q; e < E; e += QUAD) {
    float p = expf(row[e] - top);
    row[e] = p;
    sum += p;
  }
  sum = quad_sum(sum);
  float share = 1 / sum;
  for (int e = q; e < E; e += QUAD) row[e] *= share;
  return top + logf(sum);
}

// ---- forward ----

// tile [TILE, E] = logits of the tile's rows. Four groups of 16 rows by two halves of C; a warp walks its half of C
// a few steps at a time. Where in C the pairs of an mma lie does not matter as long as both operands agree, so a thread
// takes 8 neighbours of a row in one 16-byte load and feeds two products with them; nothing passes shared memory.
template <int COLUMNS> // groups of eight experts at a time
static __device__ void tile_logits(const Sides &s, RowTile t, const bf16 *h, const bf16 *wr, float *tile) {
  enum { STEP = 32, STEPS = COLUMNS > 2 ? 2 : 4 }; // loads in flight against registers for sums
  int E = s.E[t.side], C = s.C, stride = logit_stride(E);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, q = lane % 4;
  int row = warp % 4 * 16 + group, half = warp / 4, half_width = ceil_div(C, 2 * STEP) * STEP;
  int begin = half * half_width, end = half ? C : half_width < C ? half_width : C;
  // Rows past the end repeat the last one; nobody reads what comes of them.
  const bf16 *a0 = h + (int64_t)(t.first + (row < t.rows ? row : t.rows - 1)) * C;
  const bf16 *a1 = h + (int64_t)(t.first + (row + 8 < t.rows ? row + 8 : t.rows - 1)) * C;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int e0 = 0; e0 < E; e0 += COLUMNS * 8) {
    float acc[COLUMNS][4] = {};
    for (int c0 = begin; c0 < end; c0 += STEP * STEPS) {
      uint4 x0[STEPS], x1[STEPS];
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        int c = c0 + i * STEP + q * 8;
        x0[i] = c < end ? __ldg((const uint4 *)(a0 + c)) : zero;
        x1[i] = c < end ? __ldg((const uint4 *)(a1 + c)) : zero;
      }
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        int c = c0 + i * STEP + q * 8;
        const uint32_t low[4] = {x0[i].x, x1[i].x, x0[i].y, x1[i].y}, high[4] = {x0[i].z, x1[i].z, x0[i].w, x1[i].w};
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          int e = e0 + j * 8 + group;
          uint4 w = c < end && e < E ? __ldg((const uint4 *)(wr + (int64_t)e * C + c)) : zero;
          const uint32_t w_low[2] = {w.x, w.y}, w_high[2] = {w.z, w.w};
          mma_add(acc[j], low, w_low);
          mma_add(acc[j], high, w_high);
        }
      }
    }
    for (int turn = 1; turn >= 0; turn--) { // the second half of C leaves its sums for the first to add to
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int e = e0 + j * 8 + q * 2 + i % 2;
          float *to = tile + (row + i / 2 * 8) * stride + e;
          if (half == turn && e < E) *to = acc[j][i] + (turn ? 0 : *to);
        }
      }
      __syncthreads();
    }
  }
}

// Logits, choices and weights of a tile. slot[row, j] = expert | rank << 16, the rank of the row among the tile's rows
// that chose the expert; counts [tiles, stride of experts]: how many did.
template <int COLUMNS>
static __global__ void __launch_bounds__(THREADS, 2)
    choose_kernel(const BatchDims *n, const __grid_constant__ Sides s, const bf16 *h, const bf16 *wr0, const bf16 *wr1,
                  float *logits, float *weights, int32_t *slots, uint8_t *counts, int counts_stride) {
  extern __shared__ float tile[];                     // [TILE, logit_stride]
  __shared__ unsigned long long takers[EXPERTS_MOST]; // bit r: row r of the tile chose the expert
  RowTile t = row_tile(n, s.T, TILE, blockIdx.x);
  if (t.rows <= 0) return;
  int m = t.side == FILLER ? IMAGE : t.side, E = s.E[m], K = s.K[m], stride = logit_stride(E);
  float *to = logits + s.base[m] + (int64_t)t.first * E; // [rows, E]
  if (t.side == FILLER) {
    for (int i = threadIdx.x; i < t.rows * E; i += THREADS) to[i] = 0;
    for (int i = threadIdx.x; i < t.rows * s.kmax; i += THREADS) {
      weights[(int64_t)t.first * s.kmax + i] = 0;
      slots[(int64_t)t.first * s.kmax + i] = -1;
    }
    return;
  }
  for (int e = threadIdx.x; e < EXPERTS_MOST; e += THREADS) takers[e] = 0;
  tile_logits<COLUMNS>(s, t, h, m == TEXT ? wr0 : wr1, tile);
  for (int i = threadIdx.x; i < t.rows * E; i += THREADS) to[i] = tile[i / E * stride + i % E];

  // Each turn takes the best expert not yet taken, ties to the lower index. A NaN is neither more nor less than
  // anything and wins by its index; the choices stay valid and distinct.
  int row = threadIdx.x / QUAD, q = threadIdx.x % QUAD;
  const float *x = tile + row * stride; // rows past t.rows hold the last row again
  int chosen[CHOICES_MOST];
  float value[CHOICES_MOST];
  unsigned long long taken = 0; // bit i: expert q + 4i
#pragma unroll
  for (int j = 0; j < CHOICES_MOST; j++) {
    chosen[j] = -1;
    value[j] = 0;
    if (j >= K) continue;
    int best = -1;
    float most = 0;
    for (int e = q; e < E; e += QUAD) {
      if (taken >> (e / QUAD) & 1) continue;
      if (best < 0 || x[e] > most) {
        best = e;
        most = x[e];
      }
    }
#pragma unroll
    for (int d = 1; d < QUAD; d *= 2) {
      int other = __shfl_xor_sync(0xffffffffu, best, d);
      float other_most = __shfl_xor_sync(0xffffffffu, most, d);
      bool wins = best < 0 || other_most > most || (!(most > other_most) && other < best);
      if (other >= 0 && wins) {
        best = other;
        most = other_most;
      }
    }
    if (best % QUAD == q) taken |= 1ull << (best / QUAD);
    chosen[j] = best;
    value[j] = most;
  }

  float sum = 0;
  if (K == 1) {
    for (int e = q; e < E; e += QUAD) sum += expf(x[e] - value[0]);
    sum = quad_sum(sum);
  } else {
#pragma unroll
    for (int j = 0; j < CHOICES_MOST; j++) sum += j < K ? expf(value[j] - value[0]) : 0;
  }
  int64_t at = (int64_t)(t.first + row) * s.kmax;
  if (row < t.rows) {
#pragma unroll
    for (int j = 0; j < CHOICES_MOST; j++) {
      if (j >= s.kmax || j % QUAD != q) continue;
      weights[at + j] = j < K ? expf(value[j] - value[0]) / sum : 0;
      if (j < K) atomicOr(&takers[chosen[j]], 1ull << row);
    }
  }
  __syncthreads();
  if (row < t.rows) {
#pragma unroll
    for (int j = 0; j < CHOICES_MOST; j++) {
      if (j >= s.kmax || j % QUAD != q) continue;
      slots[at + j] = j < K ? chosen[j] | __popcll(takers[chosen[j]] & ((1ull << row) - 1)) << 16 : -1;
    }
  }
  for (int e = threadIdx.x; e < counts_stride; e += THREADS)
    counts[(int64_t)blockIdx.x * counts_stride + e] = e < E ? __popcll(takers[e]) : 0;
}

// start[e] = first slot of expert e of a modality; with the assignments of its tiles before `ordinal` added, where the
// tile's own begin: place[e]. total[e] = assignments of all its tiles.
static __device__ void expert_starts(int E, int first_slot, int first_tile, int tiles, int ordinal,
                                     const uint8_t *counts, int counts_stride, int *start, int *place, int *total) {
  enum { SHARES = 32 };
  __shared__ int share_total[THREADS * 4], share_before[THREADS * 4];                       // [share][4 words]
  int words = ceil_div(E, 4), shares = THREADS / words < SHARES ? THREADS / words : SHARES; // four experts a word
  int word = threadIdx.x % words, share = threadIdx.x / words;
  if (share < shares) {
    int sum[4] = {}, before[4] = {};
#pragma unroll 4
    for (int i = share; i < tiles; i += shares) {
      uint32_t four = *(const uint32_t *)(counts + (int64_t)(first_tile + i) * counts_stride + word * 4);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int count = four >> (8 * k) & 255;
        sum[k] += count;
        before[k] += i < ordinal ? count : 0;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      share_total[threadIdx.x * 4 + k] = sum[k];
      share_before[threadIdx.x * 4 + k] = before[k];
    }
  }
  __syncthreads();
  int e = threadIdx.x, sum = 0, before = 0; // EXPERTS_MOST threads
  for (int i = 0; e < E && i < shares; i++) {
    sum += share_total[i * words * 4 + e];
    before += share_before[i * words * 4 + e];
  }
  total[e] = sum;
  __syncthreads();
  // Exclusive sums over the experts: each lane of the first warp has eight neighbours.
  if (threadIdx.x < 32) {
    enum { EIGHT = EXPERTS_MOST / 32 };
    int lane = threadIdx.x, mine = 0;
    for (int i = 0; i < EIGHT; i++) mine += total[lane * EIGHT + i];
    int at = mine;
    for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(0xffffffffu, at, d);
      if (lane >= d) at += other;
    }
    at += first_slot - mine;
    for (int i = 0; i < EIGHT; i++) {
      start[lane * EIGHT + i] = at;
      at += total[lane * EIGHT + i];
    }
  }
  __syncthreads();
  place[e] = start[e] + before;
  __syncthreads();
}

// Block of a tile: its assignments' slots. The last two blocks: begin and count of a modality's experts.
static __global__ void __launch_bounds__(THREADS)
    place_kernel(const BatchDims *n, const __grid_constant__ Sides s, const uint8_t *counts, int counts_stride,
                 int tiles_limit, const __grid_constant__ Route route) {
  __shared__ int start[EXPERTS_MOST], place[EXPERTS_MOST], total[EXPERTS_MOST];
  int index = blockIdx.x, text_tiles = ceil_div(n->n_text, TILE);
  RowTile t = row_tile(n, s.T, TILE, index);
  int side = index >= tiles_limit ? index - tiles_limit : t.side;
  if (index < tiles_limit && t.rows <= 0) return;
  if (side != FILLER) {
    int first_slot = side == TEXT ? 0 : n->n_text * s.K[IMAGE];
    expert_starts(s.E[side], first_slot, side == TEXT ? 0 : text_tiles, ceil_div(side_rows(n, side), TILE), t.ordinal,
                  counts, counts_stride, start, place, total);
  }
  if (index >= tiles_limit) {
    for (int e = threadIdx.x; e < s.E[side]; e += THREADS) {
      int g = (side == TEXT ? 0 : s.E[TEXT]) + e;
      route.begin[g] = start[e];
      route.count[g] = total[e];
    }
    return;
  }
  for (int m = 0; m < MODALITIES; m++) { // slots of the other modality that these rows would have
    int64_t at = (int64_t)t.first * s.K[m];
    for (int i = threadIdx.x; side != m && i < t.rows * s.K[m]; i += THREADS) route.source[m][at + i] = -1;
  }
  if (side == FILLER) return;
  int K = s.K[side];
  for (int i = threadIdx.x; i < t.rows * K; i += THREADS) {
    int at = (t.first + i / K) * s.kmax + i % K, choice = route.slot[at];
    int to = place[choice & 0xffff] + (choice >> 16);
    route.slot[at] = to;
    route.source[side][to] = at;
  }
}

static int counts_stride_of(const Dims *d) {
  return (most_experts(d) + 3) / 4 * 4;
}

// A larger tile than 48 KiB only with more than 180 experts.
static size_t tile_bytes(const Dims *d) {
  return (size_t)TILE * (size_t)logit_stride(most_experts(d)) * sizeof(float);
}

template <int COLUMNS> static void choose_launch(const KernelCall *c, const Route *route) {
  const Dims *d = c->dims;
  CUDA_ALLOW_SHARED(choose_kernel<COLUMNS>, tile_bytes(d));
  CUDA_LAUNCH((choose_kernel<COLUMNS>), tiles_most(d->T, TILE), THREADS, tile_bytes(d), call_stream(c), c->batch->dims,
              sides_of(d), (const bf16 *)c->in[0], (const bf16 *)c->in[1], (const bf16 *)c->in[2], (float *)c->out[0],
              (float *)c->out[1], route->slot, (uint8_t *)c->scratch, counts_stride_of(d));
}

extern "C" void cuda_ROUTER_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  int tiles = tiles_most(d->T, TILE);
  Route route;
  route_bind(&route, d, (int32_t *)c->out[2]);
  if (most_experts(d) <= 16)
    choose_launch<2>(c, &route);
  else
    choose_launch<8>(c, &route);
  CUDA_LAUNCH(place_kernel, tiles + MODALITIES, THREADS, 0, call_stream(c), c->batch->dims, sides_of(d),
              (const uint8_t *)c->scratch, counts_stride_of(d), tiles, route);
}

// ---- losses ----

// Block (i, m): partial [m][i][E probabilities summed, lse^2 summed] of modality m's tiles i, i + LOSS_BLOCKS, ..
static __global__ void __launch_bounds__(THREADS)
    loss_partial_kernel(const BatchDims *n, const __grid_constant__ Sides s, const float *logits, double *partial) {
  extern __shared__ float tile[]; // [TILE, logit_stride]
  __shared__ double shared[THREADS];
  int m = blockIdx.y, E = s.E[m], stride = logit_stride(E), row = threadIdx.x / QUAD, q = threadIdx.x % QUAD;
  int tiles = ceil_div(side_rows(n, m), TILE), before = m == TEXT ? 0 : ceil_div(n->n_text, TILE);
  int column = threadIdx.x % E, share = threadIdx.x / E, shares = THREADS / E; // threads by which columns are summed
  double probability = 0, squares = 0;
  for (int i = blockIdx.x; i < tiles; i += LOSS_BLOCKS) {
    RowTile t = row_tile(n, s.T, TILE, before + i);
    load_logits(s, t, logits, tile);
    __syncthreads();
    float lse = softmax_quad(tile + row * stride, E, q); // of rows past t.rows: unused
    if (q == 0 && row < t.rows) squares += (double)lse * (double)lse;
    __syncthreads();
    for (int r = share; share < shares && r < t.rows; r += shares) probability += (double)tile[r * stride + column];
    __syncthreads();
  }
  double *to = partial + ((int64_t)m * LOSS_BLOCKS + blockIdx.x) * (EXPERTS_MOST + 1);
  shared[threadIdx.x] = probability;
  __syncthreads();
  if (threadIdx.x < E) {
    double sum = 0;
    for (int i = 0; i < shares; i++) sum += shared[i * E + threadIdx.x];
    to[threadIdx.x] = sum;
  }
  __syncthreads();
  squares = warp_sum_double(squares);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int i = 0; i < THREADS / 32; i++) sum += shared[i];
    to[E] = sum;
  }
}

static __global__ void __launch_bounds__(THREADS)
    loss_total_kernel(const BatchDims *n, const __grid_constant__ Sides s, const double *partial, const int32_t *counts,
                      double balance, double z, double *load, Metrics *metrics) {
  __shared__ double shared[2][THREADS / 32];
  int groups = s.E[TEXT] + s.E[IMAGE];
  for (int g = threadIdx.x; g < groups; g += THREADS) load[g] += counts[g];
  for (int m = 0; m < MODALITIES; m++) {
    int E = s.E[m];
    int rows = side_rows(n, m);
    if (rows == 0) continue;
    double by_row = 1 / (double)rows, sum[2] = {0, 0}; // balance, z
    double by_assignment = by_row / s.K[m];
    for (int e = threadIdx.x / 32; e <= E; e += THREADS / 32) { // a warp a column
      const double *from = partial + (int64_t)m * LOSS_BLOCKS * (EXPERTS_MOST + 1) + e;
      double column = 0;
#pragma unroll
      for (int i = 0; i < LOSS_BLOCKS; i += 32) column += from[(i + threadIdx.x % 32) * (EXPERTS_MOST + 1)];
      column = warp_sum_double(column);
      if (e < E)
        sum[0] += counts[(m == TEXT ? 0 : s.E[TEXT]) + e] * by_assignment * (column * by_row);
      else
        sum[1] += column * by_row;
    }
    __syncthreads();
    for (int k = 0; threadIdx.x % 32 == 0 && k < 2; k++) shared[k][threadIdx.x / 32] = sum[k];
    __syncthreads();
    if (threadIdx.x) continue;
    double total[2] = {0, 0}, scale = n->router_scale;
    for (int k = 0; k < 2; k++)
      for (int i = 0; i < THREADS / 32; i++) total[k] += shared[k][i];
    metrics->balance += scale * balance * E * total[0];
    metrics->z += scale * z * total[1];
  }
}

extern "C" void cuda_ROUTER_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  const float *logits = (const float *)c->in[0];
  Route route;
  route_bind(&route, d, (int32_t *)c->in[1]);
  Metrics *metrics = (Metrics *)c->out[0];
  double *load = (double *)(metrics + 1) + (int64_t)c->args->router.layer * (d->E[TEXT] + d->E[IMAGE]);
  double *partial = (double *)c->scratch; // [MODALITIES][LOSS_BLOCKS][EXPERTS_MOST + 1]
  CUDA_ALLOW_SHARED(loss_partial_kernel, tile_bytes(d));
  CUDA_LAUNCH(loss_partial_kernel, dim3(LOSS_BLOCKS, MODALITIES), THREADS, tile_bytes(d), call_stream(c),
              c->batch->dims, sides_of(d), logits, partial);
  CUDA_LAUNCH(loss_total_kernel, 1, THREADS, 0, call_stream(c), c->batch->dims, sides_of(d), partial, route.count,
              c->args->router.balance, c->args->router.z, load, metrics);
}

// ---- backward ----
//
// The products with dlogits go through the tensor cores in bf16, yet keep about 16 bits of it: a logit gradient is
// split into high + low, both bf16. dlogits is stored [T][group of eight experts][high 8, low 8], so that one k = 16
// step of an mma covers (high, low) of eight experts, against the same eight rows of Wr twice.

typedef struct LogitScales {
  double balance, z; // args.router
} LogitScales;

// First expert whose slots end behind `slot`: ends [E] never decrease.
static __device__ inline int expert_of(const int *ends, int E, int slot) {
  int low = 0, high = E - 1;
  while (low < high) {
    int middle = (low + high) / 2;
    if (slot < ends[middle])
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

static __global__ void __launch_bounds__(THREADS)
    logit_gradient_kernel(const BatchDims *n, const __grid_constant__ Sides s, LogitScales scales,
                          const float *dweights, const float *logits, const float *weights,
                          const __grid_constant__ Route route, bf16 *dlogits, int groups) {
  extern __shared__ float tile[];          // [TILE, logit_stride]
  __shared__ float fraction[EXPERTS_MOST]; // of the assignments, by expert
  __shared__ int ends[EXPERTS_MOST];       // of the experts' slots
  RowTile t = row_tile(n, s.T, TILE, blockIdx.x);
  if (t.rows <= 0 || t.side == FILLER) return;
  int m = t.side, E = s.E[m], K = s.K[m], stride = logit_stride(E), rows = side_rows(n, m);
  double by_row = (double)n->router_scale / rows;
  float balance = (float)(scales.balance * E * by_row), z = (float)(scales.z * by_row);
  for (int e = threadIdx.x; e < E; e += THREADS) {
    int g = (m == TEXT ? 0 : s.E[TEXT]) + e;
    fraction[e] = (float)route.count[g] / ((float)rows * (float)K);
    ends[e] = route.begin[g] + route.count[g];
  }
  load_logits(s, t, logits, tile);
  __syncthreads();

  int row = threadIdx.x / QUAD, q = threadIdx.x % QUAD;
  float *p = tile + row * stride;
  float lse = softmax_quad(p, E, q), mean_load = 0, dot = 0;
  for (int e = q; e < E; e += QUAD) mean_load += fraction[e] * p[e];
  mean_load = quad_sum(mean_load);
  int64_t at = (int64_t)(t.first + (row < t.rows ? row : 0)) * s.kmax;
  for (int j = 0; j < K; j++) dot += weights[at + j] * dweights[at + j];
  // A single choice is weighted by its full-softmax probability, which every logit moves.
  float spread = K == 1 ? dot : 0;
  for (int e = q; e < E; e += QUAD) p[e] *= balance * (fraction[e] - mean_load) + z * 2 * lse - spread;
  __syncwarp();
  for (int j = q; row < t.rows && j < K; j += QUAD) // distinct experts: no two threads meet
    p[expert_of(ends, E, route.slot[at + j])] += K == 1 ? dot : weights[at + j] * (dweights[at + j] - dot);
  __syncthreads();

  for (int i = threadIdx.x; i < t.rows * groups; i += THREADS) {
    int r = i / groups, group = i % groups;
    float x[8], low[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      x[k] = group * 8 + k < E ? tile[r * stride + group * 8 + k] : 0;
      low[k] = x[k] - __bfloat162float(__float2bfloat16_rn(x[k]));
    }
    bf16 *to = dlogits + ((int64_t)(t.first + r) * groups + group) * 16;
    store8(to, x);
    store8(to + 8, low);
  }
}

// Shared memory of the gradient kernel: two stages of h and dlogits tiles, and fragments of Wr.
template <int GROUPS> struct GradStage {
  bf16 h[TILE * GRAD_COLUMNS];            // [TILE, GRAD_COLUMNS]; 16-byte unit u of row r stands at u ^ r % 8
  bf16 dlogits[TILE * (GROUPS * 16 + 8)]; // [TILE][GROUPS][high 8, low 8], 16 bytes more a row against bank conflicts
};
template <int GROUPS> struct GradShared {
  GradStage<GROUPS> stage[2];
  uint4 wr[GROUPS * 4 * 32]; // [group][32 columns][lane] pairs of experts at four columns
};

// dh = add + dlogits Wr and a partial dWr, for GRAD_COLUMNS columns of one block of rows: h, add and dh are each passed
// once. Block (x, y): columns 128 x .. of row block y. Experts from 8 first_group on, at most 8 GROUPS of them.
//
// dh [64, 128] of a tile: a warp has 16 rows and 64 columns. Column n of the j-th product in 32 columns stands for
// column 8 (n / 2) + 2 j + n % 2: then a thread's numbers are eight neighbours, one 16-byte access of add and of dh.
// dWr^T [128, E]: a warp has 16 columns of h and all experts, and keeps its sums over the tiles in registers.
template <int GROUPS>
static __global__ void __launch_bounds__(THREADS, 2)
    gradient_kernel(const BatchDims *n, const __grid_constant__ Sides s, int block_rows, int first_group,
                    const bf16 *dlogits, int groups_stride, const bf16 *h, const bf16 *wr0, const bf16 *wr1,
                    const bf16 *add, bf16 *dh, float *partial) {
  extern __shared__ uint4 memory[];
  GradShared<GROUPS> *shared = (GradShared<GROUPS> *)memory;
  RowTile t = row_tile(n, s.T, block_rows, blockIdx.y);
  if (t.rows <= 0) return;
  int C = s.C, c0 = blockIdx.x * GRAD_COLUMNS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int g = lane / 4, q = lane % 4;
  if (t.side == FILLER) {
    for (int i = threadIdx.x; i < t.rows * (GRAD_COLUMNS / 8); i += THREADS) {
      int column = c0 + i % (GRAD_COLUMNS / 8) * 8;
      if (column < C)
        *(uint4 *)(dh + (int64_t)(t.first + i / (GRAD_COLUMNS / 8)) * C + column) = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  int E = s.E[t.side], groups = ceil_div(E, 8) - first_group;
  groups = groups < GROUPS ? groups : GROUPS;
  if (groups <= 0) return;
  const bf16 *wr = t.side == TEXT ? wr0 : wr1;
  for (int i = threadIdx.x; i < groups * 4 * 32; i += THREADS) {
    int l = i % 32, e = (first_group + i / 128) * 8 + l % 4 * 2;
    uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int column = c0 + i / 32 % 4 * 32 + l / 8 * 8 + 2 * j + l / 4 % 2;
      float a = e < E && column < C ? __bfloat162float(wr[(int64_t)e * C + column]) : 0;
      float b = e + 1 < E && column < C ? __bfloat162float(wr[(int64_t)(e + 1) * C + column]) : 0;
      pair[j] = pack2(a, b);
    }
    shared->wr[i] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }

  // Starts the copies of tile `i` into its stage; rows past the end and columns past C become zeros.
  auto stage_tile = [&](int i) {
    GradStage<GROUPS> *to = &shared->stage[i % 2];
    int row0 = i * TILE;
    for (int k = threadIdx.x; k < TILE * (GRAD_COLUMNS / 8); k += THREADS) {
      int r = k / (GRAD_COLUMNS / 8), u = k % (GRAD_COLUMNS / 8);
      bool valid = row0 + r < t.rows && c0 + u * 8 < C;
      const bf16 *from = valid ? h + (int64_t)(t.first + row0 + r) * C + c0 + u * 8 : h;
      copy16_async(shared_address(to->h + r * GRAD_COLUMNS + (u ^ r % 8) * 8), from, valid);
    }
    for (int k = threadIdx.x; k < TILE * groups * 2; k += THREADS) {
      int r = k / (groups * 2), u = k % (groups * 2);
      bool valid = row0 + r < t.rows;
      const bf16 *from =
          valid ? dlogits + ((int64_t)(t.first + row0 + r) * groups_stride + first_group) * 16 + u * 8 : dlogits;
      copy16_async(shared_address(to->dlogits + r * (GROUPS * 16 + 8) + u * 8), from, valid);
    }
    copy_commit();
  };

  float weight_sum[GROUPS][4] = {}; // dWr^T: columns c0 + 16 warp + g (+ 8), experts 2q, 2q + 1 of each group
  int tiles = ceil_div(t.rows, TILE), row = warp % 4 * 16 + g, column = c0 + warp / 4 * 64 + q * 8;
  int matrix = lane / 8, line = lane % 8; // which row of which 8 x 8 matrix this lane points ldmatrix to
  stage_tile(0);
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles) stage_tile(i + 1);
    // dh starts as add: rows `row` and row + 8, columns `column` .. + 7 and 32 further.
    int64_t at[2] = {(int64_t)(t.first + i * TILE + row) * C, (int64_t)(t.first + i * TILE + row + 8) * C};
    const bool inside[2] = {i * TILE + row < t.rows, i * TILE + row + 8 < t.rows};
    uint4 add8[2][2]; // [32 columns][row]
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        bool there = add && inside[k] && column + half * 32 < C;
        add8[half][k] = there ? *(const uint4 *)(add + at[k] + column + half * 32) : make_uint4(0, 0, 0, 0);
      }
    }
    if (i + 1 < tiles)
      copy_wait<1>();
    else
      copy_wait<0>();
    __syncthreads();
    float acc[2][4][4]; // [32 columns][product][element]
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float x[8];
        unpack8(add8[half][k], x);
#pragma unroll
        for (int j = 0; j < 8; j++) acc[half][j / 2][k * 2 + j % 2] = x[j];
      }
    }
    const GradStage<GROUPS> *stage = &shared->stage[i % 2];

    const bf16 *dl = stage->dlogits + (warp % 4 * 16 + matrix % 2 * 8 + line) * (GROUPS * 16 + 8) + matrix / 2 * 8;
    for (int group = 0; group < groups; group++) {
      uint32_t a[4]; // (rows, high), (rows + 8, high), (rows, low), (rows + 8, low)
      load_matrix(a, shared_address(dl + group * 16));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 w = shared->wr[(group * 4 + warp / 4 * 2 + half) * 32 + lane];
        const uint32_t b[4][2] = {{w.x, w.x}, {w.y, w.y}, {w.z, w.z}, {w.w, w.w}};
#pragma unroll
        for (int j = 0; j < 4; j++) mma_add(acc[half][j], a, b[j]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = acc[half][j / 2][k * 2 + j % 2];
        if (inside[k] && column + half * 32 < C) store8(dh + at[k] + column + half * 32, x);
      }
    }

#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
      uint32_t a[4]; // h^T: (16 columns, 16 rows)
      int r = k + matrix / 2 * 8 + line;
      load_matrix_transposed(a, shared_address(stage->h + r * GRAD_COLUMNS + ((warp * 2 + matrix % 2) ^ r % 8) * 8));
      const bf16 *b0 = stage->dlogits + (k + matrix % 2 * 8 + line) * (GROUPS * 16 + 8) + matrix / 2 * 8;
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        if (group >= groups) continue;
        uint32_t b[4]; // (rows, high), (rows + 8, high), (rows, low), (rows + 8, low) of eight experts
        load_matrix_transposed(b, shared_address(b0 + group * 16));
        mma_add(weight_sum[group], a, b);
        mma_add(weight_sum[group], a, b + 2);
      }
    }
    __syncthreads(); // before the stage is filled again
  }

  float *to = partial + (int64_t)blockIdx.y * GROUPS * 8 * C; // [experts of the launch, C]
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int e = group * 8 + q * 2 + j % 2, to_column = c0 + warp * 16 + g + j / 2 * 8;
      if (group < groups && to_column < C) to[(int64_t)e * C + to_column] = weight_sum[group][j];
    }
  }
}

// dWr (+)= the partial sums of a modality's row blocks. Block (x, e, m): TOTAL_COLUMNS columns of expert e of the
// launch, four a thread; TOTAL_SHARES threads share the row blocks of each four, and their sums are added in that
// order.
static __global__ void __launch_bounds__(THREADS)
    weight_total_kernel(const BatchDims *n, const __grid_constant__ Sides s, int block_rows, int first_expert,
                        int experts, int accumulate, const float *partial, float *dwr0, float *dwr1) {
  __shared__ float4 sums[TOTAL_SHARES][TOTAL_COLUMNS / 4];
  int m = blockIdx.z, e = first_expert + blockIdx.y, four = threadIdx.x % (TOTAL_COLUMNS / 4);
  int share = threadIdx.x / (TOTAL_COLUMNS / 4), column = blockIdx.x * TOTAL_COLUMNS + four * 4;
  if (e >= s.E[m]) return;
  int blocks = ceil_div(side_rows(n, m), block_rows), before = m == TEXT ? 0 : ceil_div(n->n_text, block_rows);
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int i = share; i < blocks; i += TOTAL_SHARES) {
    if (column >= s.C) continue;
    float4 x = *(const float4 *)(partial + ((int64_t)(before + i) * experts + blockIdx.y) * s.C + column);
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  sums[share][four] = sum;
  __syncthreads();
  if (share || column >= s.C) return;
  float4 *to = (float4 *)((m == TEXT ? dwr0 : dwr1) + (int64_t)e * s.C + column);
  if (accumulate) sum = make_float4(sum.x + to->x, sum.y + to->y, sum.z + to->z, sum.w + to->w);
#pragma unroll
  for (int i = 1; i < TOTAL_SHARES; i++) {
    float4 x = sums[i][four];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  *to = sum;
}

static int expert_groups(const Dims *d) {
  return ceil_div(most_experts(d), 8);
}

// Rows that share one partial dWr: as many as leave enough blocks, and as keep the partials small beside h.
static int gradient_block_rows(const Dims *d) {
  int rows = 512, least = most_experts(d) <= 16 ? 128 : most_experts(d) <= 32 ? 256 : 512;
  while (rows > least && ceil_div(d->C, GRAD_COLUMNS) * ceil_div(d->T, rows) < 768) rows /= 2;
  return rows;
}

static int64_t dlogits_bytes(const Dims *d) {
  return ((int64_t)d->T * expert_groups(d) * 16 * (int64_t)sizeof(bf16) + 255) / 256 * 256;
}

template <int GROUPS> static void gradient_launch(const KernelCall *c, int first_group) {
  const Dims *d = c->dims;
  int rows = gradient_block_rows(d), blocks = tiles_most(d->T, rows);
  bf16 *dh = (bf16 *)c->out[0];
  const bf16 *dlogits = (const bf16 *)c->scratch;
  float *partial = (float *)((char *)c->scratch + dlogits_bytes(d)); // [row blocks, 8 GROUPS, C]
  CUDA_ALLOW_SHARED(gradient_kernel<GROUPS>, sizeof(GradShared<GROUPS>));
  CUDA_LAUNCH((gradient_kernel<GROUPS>), dim3(ceil_div(d->C, GRAD_COLUMNS), blocks), THREADS,
              sizeof(GradShared<GROUPS>), call_stream(c), c->batch->dims, sides_of(d), rows, first_group, dlogits,
              expert_groups(d), (const bf16 *)c->in[4], (const bf16 *)c->in[5], (const bf16 *)c->in[6],
              first_group ? dh : (const bf16 *)c->in[7], dh, partial);
  CUDA_LAUNCH(weight_total_kernel, dim3(ceil_div(d->C, TOTAL_COLUMNS), GROUPS * 8, MODALITIES), THREADS, 0,
              call_stream(c), c->batch->dims, sides_of(d), rows, first_group * 8, GROUPS * 8,
              c->args->router.accumulate, partial, (float *)c->out[1], (float *)c->out[2]);
}

extern "C" void cuda_ROUTER_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Route route;
  route_bind(&route, d, (int32_t *)c->in[3]);
  LogitScales scales = {c->args->router.balance, c->args->router.z};
  CUDA_ALLOW_SHARED(logit_gradient_kernel, tile_bytes(d));
  CUDA_LAUNCH(logit_gradient_kernel, tiles_most(d->T, TILE), THREADS, tile_bytes(d), call_stream(c), c->batch->dims,
              sides_of(d), scales, (const float *)c->in[0], (const float *)c->in[1], (const float *)c->in[2], route,
              (bf16 *)c->scratch, expert_groups(d));
  if (expert_groups(d) <= 2) {
    gradient_launch<2>(c, 0);
    return;
  }
  // More than 64 experts: each launch adds to the dh of the one before, rounded to bf16 in between.
  for (int group = 0; group < expert_groups(d); group += GRAD_GROUPS) gradient_launch<GRAD_GROUPS>(c, group);
}

size_t router_scratch(OpKind kind, const Dims *d, const OpArgs *args) {
  (void)args;
  if (kind == OP_ROUTER_FWD) return (size_t)tiles_most(d->T, TILE) * (size_t)counts_stride_of(d);
  if (kind == OP_ROUTER_LOSS) return (size_t)MODALITIES * LOSS_BLOCKS * (EXPERTS_MOST + 1) * sizeof(double);
  if (kind != OP_ROUTER_BWD) return 0;
  int experts = expert_groups(d) <= 2 ? 16 : GRAD_GROUPS * 8;
  return (size_t)dlogits_bytes(d) +
         (size_t)tiles_most(d->T, gradient_block_rows(d)) * (size_t)experts * (size_t)d->C * sizeof(float);
}
