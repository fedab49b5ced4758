// Grouped products on Hopper: the kernel, a main loop (gemm_cooperative.h) x load policy (gemm_load.h) x epilogue
// (gemm_epilogue.h), and its launch. A new main loop is a struct like Cooperative, its row in tile_kinds (gemm_plan.cu)
// and its line in launch_planned.
#include "kernels/cuda/gemm_cooperative.h"
#include "kernels/cuda/tensor_map.h"

template <int KIND, int LOAD, bool DRAWN, class Tile, class End>
static __global__ void __launch_bounds__(Tile::THREADS, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmLaunch<End> l, const __grid_constant__ GemmMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Tile::template run<KIND, LOAD, DRAWN>(l, maps);
#endif
}

// ---- the host side ----

// A bf16 tensor [z, y, x] read in boxes [1, box_y, 64]; z = 0: [y, x].
static void map_encode(CUtensorMap *map, const bf16 *base, int x, int y, int z, int box_y) {
  tensor_map_encode(map, "grouped product", base, x, y, z, box_y, 1);
}

template <class End> static GemmMaps maps_encode(const GemmLaunch<End> *launch, int kind) {
  const GemmWork *l = &launch->work;
  GemmMaps maps = {};
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &l->g.side[m];
    if (s->groups == 0 || s->rows == 0) continue;
    int wide = kind == GEMM_TN ? s->M : s->K;
    if (!s->a_index) map_encode(&maps.a[m], s->a, wide, s->rows, 0, kind == GEMM_TN ? GEMM_BK : (int)GEMM_BM);
    if constexpr (GemmEpilogue<End>::READS)
      map_encode(&maps.read[m], launch->end[m].pre, GEMM_READS * s->N, s->rows, 0, GEMM_BM);
    if (kind == GEMM_NT) map_encode(&maps.b[m], s->b, s->K, s->N, s->groups, GEMM_LEAST_BN);
    if (kind == GEMM_NN) map_encode(&maps.b[m], s->b, s->N, s->K, s->groups, GEMM_BK);
    if (kind == GEMM_TN && !s->b_index) map_encode(&maps.b[m], s->b, s->N, s->rows, 0, GEMM_BK);
  }
  return maps;
}

template <int KIND, int LOAD, bool DRAWN, class Tile, class End>
static void launch_kernel(const GemmLaunch<End> *l, cudaStream_t stream) {
  auto kernel = gemm_sm90_kernel<KIND, LOAD, DRAWN, Tile, End>;
  CUDA_ALLOW_SHARED(kernel, Tile::SHARED_BYTES);
  CUDA_LAUNCH(kernel, l->work.shape.blocks, Tile::THREADS, Tile::SHARED_BYTES, stream, *l, maps_encode(l, KIND));
}

template <int KIND, int LOAD, class Tile, class End> static void launch(const GemmLaunch<End> *l, cudaStream_t stream) {
  if (gemm_always_drawn<KIND, LOAD> || cuda_is_joined())
    launch_kernel<KIND, LOAD, true, Tile>(l, stream);
  else
    launch_kernel<KIND, LOAD, gemm_always_drawn<KIND, LOAD>, Tile>(l, stream);
}

// The plan's tile kind: of two, the wider one's kernel makes both.
template <int KIND, int LOAD, class End> static void launch_planned(const GemmLaunch<End> *l, cudaStream_t stream) {
  const GemmShape *s = &l->work.shape;
  if ((s->groups[TEXT] && s->bn[TEXT] == 256) || (s->groups[IMAGE] && s->bn[IMAGE] == 256))
    launch<KIND, LOAD, Cooperative<256>>(l, stream);
  else
    launch<KIND, LOAD, Cooperative<128>>(l, stream);
}

bool gemm_sm90_usable(void) {
  static const bool usable =
      built_for_sm90((const void *)gemm_sm90_kernel<GEMM_NT, GEMM_IN_PLACE, false, Cooperative<256>, GemmStore>) &&
      tensor_map_usable();
  return usable;
}

template <class End> void gemm_sm90(const GemmLaunch<End> *l, int kind, int load, cudaStream_t stream) {
#define LAUNCH(KIND, LOAD, END)                                                                                        \
  if constexpr (std::is_same<End, END>::value)                                                                         \
    if (kind == KIND && load == LOAD) return launch_planned<KIND, LOAD>(l, stream);
  GEMM_PRODUCTS(LAUNCH)
#undef LAUNCH
  panic("grouped product: kind %d with load policy %d is not built with this epilogue", kind, load);
}
template void gemm_sm90(const GemmLaunch<GemmStore> *, int, int, cudaStream_t);
template void gemm_sm90(const GemmLaunch<GemmStoreFloat> *, int, int, cudaStream_t);
template void gemm_sm90(const GemmLaunch<GemmStoreSwiglu> *, int, int, cudaStream_t);
template void gemm_sm90(const GemmLaunch<GemmSwigluBackward> *, int, int, cudaStream_t);
template void gemm_sm90(const GemmLaunch<GemmSharedBackward> *, int, int, cudaStream_t);
template void gemm_sm90(const GemmLaunch<GemmStoreWeights> *, int, int, cudaStream_t);
