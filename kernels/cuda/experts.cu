// Experts of both modalities, over assignments sorted by expert: products through gemm.h, whose groups are the experts,
// which also take the activation forward and backward.
#include "kernels/cuda/experts.h"
#include "kernels/cuda/gemm.h"

#include <stdio.h>

enum { THREADS = 256 };

// ---- products ----

// With tiles that suit each modality, or of one kind (kernels.moe_gemm grouped).
enum Tiles { OWN_TILES, SAME_TILES };

// The op's product without its operands: the groups of a side are modality m's experts, its rows are slots.
static Gemm experts_gemm(OpKind kind, const Dims *d, const OpArgs *args, Tiles tiles) {
  Gemm g = {};
  g.same_tiles = tiles == SAME_TILES;
  // The others take what one of these two has made by the same route.
  g.settled = kind != OP_EXPERT_UP_FWD && kind != OP_EXPERT_DOWN_BWD;
  g.b_transposed = kind == OP_EXPERT_DOWN_BWD || kind == OP_EXPERT_UP_DGRAD;
  g.reads = kind == OP_EXPERT_DOWN_BWD;
  g.index_divisor = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    const int C = d->C, F = d->F[m];
    g.tiles[m] = (int16_t)args->experts.tiles[m];
    s->groups = d->E[m];
    s->rows = d->T * d->K[m];
    if (kind == OP_EXPERT_UP_FWD) s->N = 2 * F, s->K = C;
    if (kind == OP_EXPERT_DOWN_FWD) s->N = C, s->K = F;
    if (kind == OP_EXPERT_DOWN_BWD) s->N = F, s->K = C;
    if (kind == OP_EXPERT_UP_DGRAD) s->N = C, s->K = 2 * F;
    if (kind == OP_EXPERT_DOWN_WGRAD) s->M = C, s->N = F;
    if (kind == OP_EXPERT_UP_WGRAD) s->M = 2 * F, s->N = C;
  }
  return g;
}

// The slots of modality m's experts.
static GemmExtent experts_extent(const Dims *d, const Route *route, int m) {
  const int first = m == TEXT ? 0 : d->E[TEXT];
  return {route->begin + first, route->count + first, 0, 0, NULL};
}

static void up_fwd(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_UP_FWD.route);
  Gemm g = experts_gemm(OP_EXPERT_UP_FWD, d, c->args, tiles);
  g.leaves = c->leaves;
  GemmStoreSwiglu end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_UP_FWD.h; // h [T, C]
    s->a_index = route.source[m];
    s->b = (const bf16 *)c->in.EXPERT_UP_FWD.w1[m];                        // W1 [E, 2F, C]
    end[m].c = (bf16 *)c->out.EXPERT_UP_FWD.pre + slots_at(d, d->F, 2, m); // pre [slots, 2F]
    end[m].act = (bf16 *)c->out.EXPERT_UP_FWD.a + slots_at(d, d->F, 1, m); // a [slots, F]
  }
  gemm_rows(&g, end, call_stream(c));
}

static void down_fwd(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Route route = route_of(c, c->in.EXPERT_DOWN_FWD.route);
  Gemm g = experts_gemm(OP_EXPERT_DOWN_FWD, d, c->args, tiles);
  g.leaves = c->leaves;
  GemmStore end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_DOWN_FWD.a + slots_at(d, d->F, 1, m); // a [slots, F]
    s->b = (const bf16 *)c->in.EXPERT_DOWN_FWD.w2[m];                       // W2 [E, C, F]
    end[m].c = (bf16 *)c->out.EXPERT_DOWN_FWD.y + slots_at(d, C, 1, m);     // y [slots, C]
  }
  gemm_rows(&g, end, call_stream(c));
}

static void up_dgrad(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Route route = route_of(c, c->in.EXPERT_UP_DGRAD.route);
  Gemm g = experts_gemm(OP_EXPERT_UP_DGRAD, d, c->args, tiles);
  GemmStore end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_UP_DGRAD.dpre + slots_at(d, d->F, 2, m); // dpre [slots, 2F]
    s->b = (const bf16 *)c->in.EXPERT_UP_DGRAD.w1[m];                          // W1 [E, 2F, C]
    end[m].c = (bf16 *)c->out.EXPERT_UP_DGRAD.dslot + slots_at(d, C, 1, m);    // dslot [slots, C]
  }
  gemm_rows(&g, end, call_stream(c));
}

static void down_wgrad(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_DOWN_WGRAD.route);
  Gemm g = experts_gemm(OP_EXPERT_DOWN_WGRAD, d, c->args, tiles);
  g.scratch = c->scratch;
  GemmStoreWeights end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_DOWN_WGRAD.dout; // dout [T, C]
    s->a_index = route.source[m];
    s->b = (const bf16 *)c->in.EXPERT_DOWN_WGRAD.sa + slots_at(d, d->F, 1, m); // sa [slots, F]
    end[m].accumulate = c->args->accumulate;
    end[m].dw = (float *)c->out.EXPERT_DOWN_WGRAD.dw2[m]; // dW2 [E, C, F]
  }
  gemm_weights(&g, end, call_stream(c));
}

static void up_wgrad(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_UP_WGRAD.route);
  Gemm g = experts_gemm(OP_EXPERT_UP_WGRAD, d, c->args, tiles);
  g.scratch = c->scratch;
  GemmStoreWeights end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_UP_WGRAD.dpre + slots_at(d, d->F, 2, m); // dpre [slots, 2F]
    s->b = (const bf16 *)c->in.EXPERT_UP_WGRAD.h;                              // h [T, C]
    s->b_index = route.source[m];
    end[m].accumulate = c->args->accumulate;
    end[m].dw = (float *)c->out.EXPERT_UP_WGRAD.dw1[m]; // dW1 [E, 2F, C]
  }
  gemm_weights(&g, end, call_stream(c));
}

// ---- backward of the weighted activation ----

// <dA, a> of the slots, by blocks of columns: what the product leaves behind.
typedef struct Dots {
  const float *dot[MODALITIES]; // [blocks, T K]
  int blocks[MODALITIES];
  const int32_t *source[MODALITIES];
  float *dweights; // [T, Kmax]
  int T, kmax, K[MODALITIES];
} Dots;

// dweights: a thread sums a slot's blocks in order, or zeroes an assignment that nobody has.
static __global__ void __launch_bounds__(THREADS) dots_sum(Dots p, const BatchDims *dims) {
  await_previous();
  const int64_t n_text = dims->n_text, used = n_text + dims->n_image;
  const int64_t text = n_text * p.K[TEXT], slots = text + (used - n_text) * p.K[IMAGE];
  const int64_t first = blockIdx.x * (int64_t)THREADS + threadIdx.x, step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = first; i < slots; i += step) {
    const bool image = i >= text;
    const int64_t s = image ? i - text + n_text * p.K[IMAGE] : i;
    const int64_t stride = (int64_t)p.T * (image ? p.K[IMAGE] : p.K[TEXT]);
    const float *dot = image ? p.dot[IMAGE] : p.dot[TEXT];
    const int blocks = image ? p.blocks[IMAGE] : p.blocks[TEXT];
    float sum = 0;
#pragma unroll 8
    for (int b = 0; b < blocks; b++) sum += dot[b * stride + s];
    p.dweights[(image ? p.source[IMAGE] : p.source[TEXT])[s]] = sum;
  }
  for (int64_t i = first; i < (int64_t)p.T * p.kmax; i += step) {
    const int64_t r = i / p.kmax, j = i % p.kmax;
    if (r >= used || j >= (r < n_text ? p.K[TEXT] : p.K[IMAGE])) p.dweights[i] = 0;
  }
}

// Floats of modality m's dots.
static size_t dots_size(const Dims *d, int m) {
  return (size_t)ceil_div(d->F[m], GEMM_DOT_COLUMNS) * d->T * d->K[m];
}

static size_t product_scratch(OpKind kind, const Dims *dims, const OpArgs *args, Tiles tiles) {
  if (kind == OP_EXPERT_DOWN_BWD) return (dots_size(dims, TEXT) + dots_size(dims, IMAGE)) * sizeof(float);
  if (kind != OP_EXPERT_DOWN_WGRAD && kind != OP_EXPERT_UP_WGRAD) return 0;
  const Gemm g = experts_gemm(kind, dims, args, tiles);
  return gemm_weights_scratch(&g);
}

size_t expert_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  return product_scratch(kind, dims, args, OWN_TILES);
}

size_t expert_grouped_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  return product_scratch(kind, dims, args, SAME_TILES);
}

static void down_bwd(const KernelCall *c, Tiles tiles) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_DOWN_BWD.route);
  float *dot = (float *)c->scratch;
  Gemm g = experts_gemm(OP_EXPERT_DOWN_BWD, d, c->args, tiles);
  Dots p = {};
  GemmSwigluBackward end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    const int64_t at = slots_at(d, d->F, 1, m), pre_at = slots_at(d, d->F, 2, m);
    GemmSide *s = &g.side[m];
    s->extent = experts_extent(d, &route, m);
    s->a = (const bf16 *)c->in.EXPERT_DOWN_BWD.dout; // dout [T, C]
    s->a_index = route.source[m];
    s->b = (const bf16 *)c->in.EXPERT_DOWN_BWD.w2[m];              // W2 [E, C, F]
    end[m].pre = (const bf16 *)c->in.EXPERT_DOWN_BWD.pre + pre_at; // [slots, 2F]
    end[m].weight = (const float *)c->in.EXPERT_DOWN_BWD.weights;  // [T, Kmax]
    end[m].dpre = (bf16 *)c->out.EXPERT_DOWN_BWD.dpre + pre_at;    // [slots, 2F]
    end[m].sa = (bf16 *)c->out.EXPERT_DOWN_BWD.sa + at;            // [slots, F]
    end[m].dot = dot;
    p.dot[m] = dot;
    p.blocks[m] = ceil_div(d->F[m], GEMM_DOT_COLUMNS);
    p.source[m] = route.source[m];
    p.K[m] = d->K[m];
    dot += dots_size(d, m);
  }
  p.dweights = (float *)c->out.EXPERT_DOWN_BWD.dweights;
  p.T = d->T;
  p.kmax = dims_kmax(d);
  gemm_rows(&g, end, call_stream(c));
  CUDA_LAUNCH(dots_sum, 2 * cuda_sm_count(), THREADS, 0, call_stream(c), p, c->batch->dims);
}

// ---- the ops ----

#define EXPERT_OP(name, run)                                                                                           \
  extern "C" void cuda_EXPERT_##name(const KernelCall *c) {                                                            \
    run(c, OWN_TILES);                                                                                                 \
  }                                                                                                                    \
  extern "C" void cuda_EXPERT_##name##_grouped(const KernelCall *c) {                                                  \
    run(c, SAME_TILES);                                                                                                \
  }
EXPERT_OP(UP_FWD, up_fwd)
EXPERT_OP(DOWN_FWD, down_fwd)
EXPERT_OP(DOWN_BWD, down_bwd)
EXPERT_OP(DOWN_WGRAD, down_wgrad)
EXPERT_OP(UP_DGRAD, up_dgrad)
EXPERT_OP(UP_WGRAD, up_wgrad)

void expert_note(const Backend *b, OpKind kind, const Dims *dims, const OpArgs *args, char *note, size_t size) {
  const bool own = b->scratch[kind] == expert_scratch;
  int columns[MODALITIES];
  if (!own && b->scratch[kind] != expert_grouped_scratch) return;
  const Gemm g = experts_gemm(kind, dims, args, own ? OWN_TILES : SAME_TILES);
  if (kind == OP_EXPERT_DOWN_WGRAD || kind == OP_EXPERT_UP_WGRAD)
    gemm_weights_tiles(&g, columns);
  else
    gemm_rows_tiles(&g, columns);
  snprintf(note, size, "tiles of %d columns (text), %d (image)", columns[TEXT], columns[IMAGE]);
}
