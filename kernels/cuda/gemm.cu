// Grouped products: the entry points, and what adds the parts of inner dimensions that were cut.
#include "kernels/cuda/gemm_epilogue.h"
#include "kernels/cuda/gemm_plan.h"
#include "kernels/cuda/sums.h"

// ---- parts of an inner dimension ----

// The sums of all parts of two (gemm_weights: four) neighbouring elements of a group, `stride` elements apart.
template <typename V> static __device__ inline V parts_sum(const float *from, int64_t stride, int parts);
template <> __device__ inline float2 parts_sum(const float *from, int64_t stride, int parts) {
  float2 sum = *(const float2 *)from;
  for (int p = 1; p < parts; p++) {
    float2 v = *(const float2 *)(from + p * stride);
    sum.x += v.x, sum.y += v.y;
  }
  return sum;
}
template <> __device__ inline float4 parts_sum(const float *from, int64_t stride, int parts) {
  float4 sum = *(const float4 *)from;
  for (int p = 1; p < parts; p++) {
    float4 v = *(const float4 *)(from + p * stride);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

// What every group of several parts is to become: the parts' sums, finished.
template <int KIND, class End>
static __global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ GemmLaunch<End> launch) {
  await_previous();
  __shared__ GemmTiles t;
  const GemmWork &l = launch.work;
  gemm_counts_load(l, &t);
  gemm_parts_build(KIND, &l.shape, &t);
  int64_t first = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
  float scale = GemmEpilogue<End>::scale(launch.end[0]); // both sides' is one
  for (int g = 0; g < gemm_groups(&l.shape); g++) {
    int parts = t.parts[g], m = gemm_group_side(&l.shape, g);
    if (parts < 2) continue;
    const GemmSide &s = l.g.side[m];
    const End &end = launch.end[m];
    const float *from = l.partial + (g > 0 ? t.partial[g - 1] : 0);
    int64_t stride = gemm_part_size(KIND, &l.shape, m); // from part to part
    if constexpr (KIND == GEMM_TN) {
      int e = g - (m == IMAGE ? l.shape.groups[TEXT] : 0);
      float4 *dw = (float4 *)(end.dw + e * stride);
      for (int64_t i = first; i < stride / 4; i += step) {
        float4 sum = parts_sum<float4>(from + 4 * i, stride, parts);
        float4 old = end.accumulate ? dw[i] : make_float4(0, 0, 0, 0);
        dw[i] = make_float4(old.x + scale * sum.x, old.y + scale * sum.y, old.z + scale * sum.z, old.w + scale * sum.w);
      }
    } else {
      for (int64_t i = first; i < (int64_t)t.count[g] * (s.N / 2); i += step) {
        int64_t row = t.begin[g] + i / (s.N / 2);
        int col = (int)(i % (s.N / 2)) * 2;
        float2 sum = parts_sum<float2>(from + row * s.N + col, stride, parts);
        GemmEpilogue<End>::pair(s, end, row, col, scale * sum.x, scale * sum.y);
      }
    }
  }
}

// The fills of a product without terms.
static __global__ void __launch_bounds__(256) fill_kernel(const __grid_constant__ Gemm g) {
  await_previous();
  gemm_fill(g, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

// ---- entry points ----

static GemmWork work_make(const Gemm *g, int kind, bool splits) {
  GemmWork l = {};
  l.g = *g;
  const GemmPlan p = gemm_plan(g, kind);
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &l.g.side[m];
    if (gemm_side_empty(s, kind)) s->groups = 0;
    l.shape.groups[m] = s->groups;
    l.shape.rows[m] = s->rows;
    l.shape.M[m] = s->M, l.shape.N[m] = s->N, l.shape.K[m] = s->K;
    l.shape.bn[m] = p.bn[m];
    l.shape.parts[m] = g->scratch && splits ? p.parts[m] : 1;
  }
  l.partial = (float *)g->scratch;
  l.index_divisor = divisor_of(g->index_divisor > 0 ? (uint32_t)g->index_divisor : 1);
  return l;
}

// Which operand the sides gather.
static int load_of(const GemmWork *l) {
  int load = -1;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &l->g.side[m];
    if (s->groups == 0) continue;
    int own = s->a_index ? GEMM_GATHER_A : s->b_index ? GEMM_GATHER_B : GEMM_IN_PLACE;
    if ((s->a_index && s->b_index) || (load >= 0 && own != load))
      panic("grouped product: the sides gather different operands, or one of them both");
    load = own;
  }
  return load;
}

// Whether the sides' products are added to what is there.
template <class End> static int adds_of(const End *, const GemmShape *) {
  return 0;
}
static int adds_of(const GemmStoreWeights *end, const GemmShape *s) {
  const int adds = end[s->groups[TEXT] ? TEXT : IMAGE].accumulate;
  if (s->groups[IMAGE] && !end[IMAGE].accumulate != !adds)
    panic("grouped product: one side's gradient is added to, the other's is not");
  return adds;
}

template <class End> static void gemm_launch(const Gemm *g, const End *end, int kind, cudaStream_t stream) {
  if (!g->reads != !GemmEpilogue<End>::READS)
    panic("grouped product: it is planned for an epilogue that %s beside the product, unlike its own",
          g->reads ? "reads a tensor" : "reads nothing");
  GemmLaunch<End> l = {work_make(g, kind, End::SPLITS), {end[TEXT], end[IMAGE]}};
  GemmWork *work = &l.work;
  if (gemm_groups(&work->shape) == 0) {
    if (g->fill[0].part != GEMM_NO_ROWS) CUDA_LAUNCH(fill_kernel, 2 * cuda_sm_count(), 256, 0, stream, *g);
    return;
  }
  work->shape.adds = adds_of(end, &work->shape);
  if (gemm_sm90_usable()) {
    const int all = cuda_sm_count(); // of a slice of a GPU another lane gets half at most
    work->shape.blocks = all - (2 * g->leaves < all ? g->leaves : all / 2);
    gemm_sm90(&l, kind, load_of(work), stream);
  } else {
    work->shape.bn[TEXT] = work->shape.bn[IMAGE] = GEMM_PORTABLE_BN;
    gemm_portable(&l, kind, stream);
  }
  bool whole = true;
  for (int m = 0; m < MODALITIES; m++) whole &= work->shape.groups[m] == 0 || work->shape.parts[m] == 1;
  if (whole) return;
  if constexpr (End::SPLITS) {
    constexpr int KIND = std::is_same<End, GemmStoreWeights>::value ? GEMM_TN : GEMM_NT; // rows are counted alike
    CUDA_LAUNCH((finish_kernel<KIND, End>), 4 * cuda_sm_count(), 256, 0, stream, l);
  }
}

static int rows_kind(const Gemm *g) {
  return g->b_transposed ? GEMM_NN : GEMM_NT;
}

void gemm_rows(const Gemm *g, const GemmStore end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, rows_kind(g), stream);
}
void gemm_rows(const Gemm *g, const GemmStoreFloat end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, rows_kind(g), stream);
}
void gemm_rows(const Gemm *g, const GemmStoreSwiglu end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, rows_kind(g), stream);
}
void gemm_rows(const Gemm *g, const GemmSwigluBackward end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, rows_kind(g), stream);
}
void gemm_rows(const Gemm *g, const GemmSharedBackward end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, rows_kind(g), stream);
}
void gemm_weights(const Gemm *g, const GemmStoreWeights end[MODALITIES], cudaStream_t stream) {
  gemm_launch(g, end, GEMM_TN, stream);
}
static void tiles_of(const Gemm *g, int kind, int columns[MODALITIES]) {
  const GemmPlan p = gemm_plan(g, kind);
  for (int m = 0; m < MODALITIES; m++) {
    columns[m] = gemm_sm90_usable() ? p.bn[m] : (int)GEMM_PORTABLE_BN;
    if (gemm_side_empty(&g->side[m], kind)) columns[m] = 0;
  }
}
void gemm_rows_tiles(const Gemm *g, int columns[MODALITIES]) {
  tiles_of(g, rows_kind(g), columns);
}
void gemm_weights_tiles(const Gemm *g, int columns[MODALITIES]) {
  tiles_of(g, GEMM_TN, columns);
}
size_t gemm_rows_scratch(const Gemm *g) {
  return gemm_plan(g, rows_kind(g)).scratch;
}
size_t gemm_weights_scratch(const Gemm *g) {
  return gemm_plan(g, GEMM_TN).scratch;
}
