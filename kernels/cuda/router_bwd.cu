// The routers' gradient.
//
// The products with dlogits go through the tensor cores in bf16, yet keep about 16 bits of it: a logit gradient is
// split into high + low, both bf16. dlogits is stored [T][group of eight experts][high 8, low 8], so that one k = 16
// step of an mma covers (high, low) of eight experts, against the same eight rows of Wr twice.
#include "kernels/cuda/router.h"

enum {
  THREADS = ROUTER_THREADS,
  GRAD_COLUMNS = 128,  // of h, dh and dWr in a block
  GRAD_GROUPS = 8,     // groups of eight experts that one launch takes
  TOTAL_COLUMNS = 128, // of dWr in a block that adds partial sums
  TOTAL_SHARES = THREADS / (TOTAL_COLUMNS / 4)
};

static_assert(THREADS / 32 == TILE / 16 * (GRAD_COLUMNS / 64), "dh: a warp has 16 rows and 64 columns");
static_assert(THREADS / 32 * 16 == GRAD_COLUMNS, "dWr: a warp has 16 columns");
static_assert(TOTAL_SHARES * (TOTAL_COLUMNS / 4) == THREADS, "dWr's total: a thread has four columns of a share");

typedef struct LogitScales {
  double balance, z; // args.router
} LogitScales;

// The tile's logits [rows, E] from global to shared memory.
static __device__ inline void load_logits(const Sides &s, RowTile t, const float *logits, float *tile) {
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
  await_previous();
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
  int row = threadIdx.x / QUAD, q = threadIdx.x % QUAD;
  int64_t at = (int64_t)(t.first + (row < t.rows ? row : 0)) * s.kmax;
  float mean_load = 0, dot = 0;
  for (int j = 0; j < K; j++) dot += weights[at + j] * dweights[at + j];
  __syncthreads();

  float *p = tile + row * stride, lse = softmax_quad(p, E, q);
  for (int e = q; e < E; e += QUAD) mean_load += fraction[e] * p[e];
  mean_load = quad_sum(mean_load);
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
static_assert(sizeof(GradShared<2>) * 3 <= CUDA_HOPPER_SHARED,
              "three blocks of up to 16 experts share a multiprocessor");
static_assert(sizeof(GradShared<GRAD_GROUPS>) * 2 <= CUDA_HOPPER_SHARED, "two blocks share a multiprocessor");
static_assert(sizeof(GradStage<GRAD_GROUPS>) % 16 == 0, "stages and Wr's fragments are accessed 16 bytes at a time");

// dh = add + dlogits Wr and a partial dWr, for GRAD_COLUMNS columns of one block of rows: h, add and dh are each passed
// once. Block (x, y): columns 128 x .. of row block y. Experts from 8 first_group on, at most 8 GROUPS of them.
//
// dh [64, 128] of a tile: a warp has 16 rows and 64 columns. Column n of the j-th product in 32 columns stands for
// column 8 (n / 2) + 2 j + n % 2: then a thread's numbers are eight neighbours, one 16-byte access of add and of dh.
// dWr^T [128, E]: a warp has 16 columns of h and all experts, and keeps its sums over the tiles in registers.
template <int GROUPS>
static __global__ void __launch_bounds__(THREADS, GROUPS == 2 ? 3 : 2)
    gradient_kernel(const BatchDims *n, const __grid_constant__ Sides s, int block_rows, int first_group,
                    const bf16 *dlogits, int groups_stride, const bf16 *h, const bf16 *wr0, const bf16 *wr1,
                    const bf16 *add, bf16 *dh, float *partial) {
  await_previous();
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
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles) stage_tile(i + 1);
    // dh starts as add: rows `row` and row + 8, columns `column` .. + 7 and 32 further.
    int64_t at = (int64_t)(t.first + i * TILE + row) * C + column;
    const bool inside[2] = {i * TILE + row < t.rows, i * TILE + row + 8 < t.rows};
    uint4 add8[2][2]; // [32 columns][row]
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        bool there = add && inside[k] && column + half * 32 < C;
        add8[half][k] = there ? *(const uint4 *)(add + at + k * 8 * C + half * 32) : make_uint4(0, 0, 0, 0);
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
        if (inside[k] && column + half * 32 < C) store8(dh + at + k * 8 * C + half * 32, x);
      }
    }

#pragma unroll 2
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
  await_previous();
  __shared__ float4 sums[TOTAL_SHARES][TOTAL_COLUMNS / 4];
  int m = blockIdx.z, e = first_expert + blockIdx.y, four = threadIdx.x % (TOTAL_COLUMNS / 4);
  int share = threadIdx.x / (TOTAL_COLUMNS / 4), column = blockIdx.x * TOTAL_COLUMNS + four * 4;
  if (e >= s.E[m]) return;
  int blocks = ceil_div(side_rows(n, m), block_rows), before = m == TEXT ? 0 : ceil_div(n->n_text, block_rows);
  const float *from = partial + ((int64_t)before * experts + blockIdx.y) * s.C + column;
  float4 sum = slots_sum(from, (int64_t)experts * s.C, share, column < s.C ? blocks : 0, TOTAL_SHARES);
  sums[share][four] = sum;
  __syncthreads();
  if (share || column >= s.C) return;
  float4 *to = (float4 *)((m == TEXT ? dwr0 : dwr1) + (int64_t)e * s.C + column);
  if (accumulate) sum = add4(sum, *to);
#pragma unroll
  for (int i = 1; i < TOTAL_SHARES; i++) sum = add4(sum, sums[i][four]);
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
  bf16 *dh = (bf16 *)c->out.ROUTER_BWD.dh;
  const bf16 *dlogits = (const bf16 *)c->scratch;
  float *partial = (float *)((char *)c->scratch + dlogits_bytes(d)); // [row blocks, 8 GROUPS, C]
  CUDA_ALLOW_SHARED(gradient_kernel<GROUPS>, sizeof(GradShared<GROUPS>));
  CUDA_LAUNCH((gradient_kernel<GROUPS>), dim3(ceil_div(d->C, GRAD_COLUMNS), blocks), THREADS,
              sizeof(GradShared<GROUPS>), call_stream(c), c->batch->dims, sides_of(d), rows, first_group, dlogits,
              expert_groups(d), (const bf16 *)c->in.ROUTER_BWD.h, (const bf16 *)c->in.ROUTER_BWD.wr[TEXT],
              (const bf16 *)c->in.ROUTER_BWD.wr[IMAGE], first_group ? dh : (const bf16 *)c->in.ROUTER_BWD.add, dh,
              partial);
  CUDA_LAUNCH(weight_total_kernel, dim3(ceil_div(d->C, TOTAL_COLUMNS), GROUPS * 8, MODALITIES), THREADS, 0,
              call_stream(c), c->batch->dims, sides_of(d), rows, first_group * 8, GROUPS * 8, c->args->accumulate,
              partial, (float *)c->out.ROUTER_BWD.dwr[TEXT], (float *)c->out.ROUTER_BWD.dwr[IMAGE]);
}

extern "C" void cuda_ROUTER_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Route route;
  route_bind(&route, d, (int32_t *)c->in.ROUTER_BWD.route);
  LogitScales scales = {c->args->router.balance, c->args->router.z};
  CUDA_ALLOW_SHARED(logit_gradient_kernel, tile_bytes(d));
  CUDA_LAUNCH(logit_gradient_kernel, tiles_most(d->T, TILE), THREADS, tile_bytes(d), call_stream(c), c->batch->dims,
              sides_of(d), scales, (const float *)c->in.ROUTER_BWD.dweights, (const float *)c->in.ROUTER_BWD.logits,
              (const float *)c->in.ROUTER_BWD.weights, route, (bf16 *)c->scratch, expert_groups(d));
  if (expert_groups(d) <= 2) {
    gradient_launch<2>(c, 0);
    return;
  }
  // More than 64 experts: each launch adds to the dh of the one before, rounded to bf16 in between.
  for (int group = 0; group < expert_groups(d); group += GRAD_GROUPS) gradient_launch<GRAD_GROUPS>(c, group);
}

size_t router_bwd_scratch(const Dims *d) {
  int experts = expert_groups(d) <= 2 ? 16 : GRAD_GROUPS * 8;
  return (size_t)dlogits_bytes(d) +
         (size_t)tiles_most(d->T, gradient_block_rows(d)) * (size_t)experts * (size_t)d->C * sizeof(float);
}
