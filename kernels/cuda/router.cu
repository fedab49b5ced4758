// Routers: logits, top-k, the sort of assignments by expert, and the router losses.
#include "kernels/cuda/router.h"

enum { THREADS = ROUTER_THREADS, LOSS_SUMS = 2 * MODALITIES };
static_assert(THREADS / 32 == TILE / 16 * 2, "tile_logits: a warp has 16 rows and half of C");
static_assert(THREADS % LOSS_SUMS == 0, "as many threads for each of the losses' sums");

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
                  float *logits, float *weights, int32_t *slots, uint8_t *counts, int counts_stride, int even) {
  await_previous();
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
  int chosen[CUDA_MOST_CHOSEN];
  float value[CUDA_MOST_CHOSEN];
  unsigned long long taken = 0; // bit i: expert q + 4i
#pragma unroll
  for (int j = 0; j < CUDA_MOST_CHOSEN; j++) {
    chosen[j] = -1;
    value[j] = 0;
    if (j >= K) continue;
    if (even) { // in turn
      chosen[j] = ((t.ordinal * TILE + row) * K + j) % E;
      value[j] = x[chosen[j]];
      continue;
    }
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
    for (int j = 0; j < CUDA_MOST_CHOSEN; j++) sum += j < K ? expf(value[j] - value[0]) : 0;
  }
  int64_t at = (int64_t)(t.first + row) * s.kmax;
  if (row < t.rows) {
#pragma unroll
    for (int j = 0; j < CUDA_MOST_CHOSEN; j++) {
      if (j >= s.kmax || j % QUAD != q) continue;
      weights[at + j] = j < K ? expf(value[j] - value[0]) / sum : 0;
      if (j < K) atomicOr(&takers[chosen[j]], 1ull << row);
    }
  }
  __syncthreads();
  if (row < t.rows) {
#pragma unroll
    for (int j = 0; j < CUDA_MOST_CHOSEN; j++) {
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
  static_assert((int)EXPERTS_MOST == THREADS, "a thread an expert");
  static_assert(TILE < 256, "a tile counts an expert's rows in a byte");
  enum { SHARES = 64 };
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
  await_previous();
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

template <int COLUMNS> static void choose_launch(const KernelCall *c, const Route *route) {
  const Dims *d = c->dims;
  CUDA_ALLOW_SHARED(choose_kernel<COLUMNS>, tile_bytes(d));
  CUDA_LAUNCH((choose_kernel<COLUMNS>), tiles_most(d->T, TILE), THREADS, tile_bytes(d), call_stream(c), c->batch->dims,
              sides_of(d), (const bf16 *)c->in.ROUTER_FWD.h, (const bf16 *)c->in.ROUTER_FWD.wr[TEXT],
              (const bf16 *)c->in.ROUTER_FWD.wr[IMAGE], (float *)c->out.ROUTER_FWD.logits,
              (float *)c->out.ROUTER_FWD.weights, route->slot, (uint8_t *)c->scratch, counts_stride_of(d),
              c->args->router.even);
}

extern "C" void cuda_ROUTER_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  int tiles = tiles_most(d->T, TILE);
  Route route;
  route_bind(&route, d, (int32_t *)c->out.ROUTER_FWD.route);
  if (most_experts(d) <= 16)
    choose_launch<2>(c, &route);
  else
    choose_launch<8>(c, &route);
  CUDA_LAUNCH(place_kernel, tiles + MODALITIES, THREADS, 0, call_stream(c), c->batch->dims, sides_of(d),
              (const uint8_t *)c->scratch, counts_stride_of(d), tiles, route);
}

// ---- losses ----
//
// With f_e known, a modality's balance loss is a sum over rows: E sum_r (sum_e f_e p_re) / rows. So a row gives two
// numbers, that and lse^2; each block adds those of its TILE rows.

// partial [blocks][text balance, text z, image balance, image z], before any scale.
static __global__ void __launch_bounds__(THREADS)
    loss_rows_kernel(const BatchDims *n, const __grid_constant__ Sides s, const float *logits, const int32_t *counts,
                     double *partial) {
  await_previous();
  enum { WARPS = THREADS / 32 };
  __shared__ float fraction[MODALITIES * EXPERTS_MOST]; // of the modality's assignments, by group
  __shared__ double sums[WARPS][LOSS_SUMS];
  int text = n->n_text, used = text + n->n_image;
  for (int g = threadIdx.x; g < s.E[TEXT] + s.E[IMAGE]; g += THREADS) {
    int m = g < s.E[TEXT] ? TEXT : IMAGE;
    fraction[g] = __fdividef((float)counts[g], (float)side_rows(n, m) * (float)s.K[m]);
  }
  __syncthreads();
  int row = blockIdx.x * TILE + threadIdx.x / QUAD, q = threadIdx.x % QUAD, m = row < text ? TEXT : IMAGE;
  int E = row < used ? s.E[m] : 0; // the quads of filler rows go along with the warp's shuffles
  const float *x = logits + s.base[m] + (int64_t)row * s.E[m], *f = fraction + (m == TEXT ? 0 : s.E[TEXT]);
  float top = -INFINITY, sum = 0, load = 0;
  for (int e = q; e < E; e += QUAD) top = fmaxf(top, x[e]);
  top = quad_max(top);
  for (int e = q; e < E; e += QUAD) {
    float p = expf(x[e] - top);
    sum += p;
    load += f[e] * p;
  }
  sum = quad_sum(sum);
  load = quad_sum(load);
  double lse = (double)(top + logf(sum)), value[2] = {(double)__fdividef(load, sum), lse * lse};
#pragma unroll
  for (int k = 0; k < LOSS_SUMS; k++) {
    double v = warp_sum_double(E && q == 0 && k / 2 == m ? value[k % 2] : 0);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][k] = v;
  }
  __syncthreads();
  if (threadIdx.x >= LOSS_SUMS) return;
  double total = 0;
  for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
  partial[blockIdx.x * LOSS_SUMS + threadIdx.x] = total;
}

static __global__ void __launch_bounds__(THREADS)
    loss_total_kernel(const BatchDims *n, const __grid_constant__ Sides s, int blocks, const double *partial,
                      const int32_t *counts, double balance, double z, double *load, Metrics *metrics) {
  await_previous();
  enum { SHARES = THREADS / LOSS_SUMS };
  __shared__ double sums[SHARES][LOSS_SUMS];
  int k = threadIdx.x % LOSS_SUMS;
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x / LOSS_SUMS; i < blocks; i += SHARES) sum += partial[i * LOSS_SUMS + k];
  sums[threadIdx.x / LOSS_SUMS][k] = sum;
  for (int g = threadIdx.x; g < s.E[TEXT] + s.E[IMAGE]; g += THREADS) load[g] += counts[g];
  __syncthreads();
  if (threadIdx.x) return;
  double total[2] = {0, 0}; // balance, z
  for (int m = 0; m < MODALITIES; m++) {
    int rows = side_rows(n, m);
    if (rows == 0) continue;
    double side[2] = {0, 0}, scale = n->router_scale / (double)rows;
    for (int i = 0; i < SHARES; i++) {
      side[0] += sums[i][2 * m];
      side[1] += sums[i][2 * m + 1];
    }
    total[0] += scale * balance * s.E[m] * side[0];
    total[1] += scale * z * side[1];
  }
  metrics->balance += total[0];
  metrics->z += total[1];
}

extern "C" void cuda_ROUTER_LOSS(const KernelCall *c) {
  const Dims *d = c->dims;
  Route route;
  route_bind(&route, d, (int32_t *)c->in.ROUTER_LOSS.route);
  Metrics *metrics = (Metrics *)c->out.ROUTER_LOSS.metrics;
  double *load = (double *)(metrics + 1) + (int64_t)c->args->router.layer * (d->E[TEXT] + d->E[IMAGE]);
  double *partial = (double *)c->scratch; // [blocks][LOSS_SUMS]
  int blocks = ceil_div(d->T, TILE);
  CUDA_LAUNCH(loss_rows_kernel, blocks, THREADS, 0, call_stream(c), c->batch->dims, sides_of(d),
              (const float *)c->in.ROUTER_LOSS.logits, route.count, partial);
  CUDA_LAUNCH(loss_total_kernel, 1, THREADS, 0, call_stream(c), c->batch->dims, sides_of(d), blocks, partial,
              route.count, c->args->router.balance, c->args->router.z, load, metrics);
}

size_t router_scratch(OpKind kind, const Dims *d, const OpArgs *args) {
  (void)args;
  if (kind == OP_ROUTER_FWD) return (size_t)tiles_most(d->T, TILE) * (size_t)counts_stride_of(d);
  if (kind == OP_ROUTER_LOSS) return (size_t)ceil_div(d->T, TILE) * LOSS_SUMS * sizeof(double);
  return kind == OP_ROUTER_BWD ? router_bwd_scratch(d) : 0;
}
