// The experts as most training code computes them, to compare the grouped product with: rows are copied into the order
// of the experts, each expert is a product of the library (cuBLASLt), and the activation is a kernel of its own.
//
// The library wants the number of an expert's rows from the host, which therefore waits for the route: once a layer in
// the forward pass (EXPERT_UP_FWD) and once in the backward pass (EXPERT_DOWN_BWD).
#include "kernels/cuda/experts.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/sums.h"

extern "C" {
#include "base/base.h"
}

#include <array>
#include <cublasLt.h>
#include <map>

enum { THREADS = 256, WARPS = THREADS / 32 };
enum { MOST_GROUPS = MODALITIES * CUDA_MOST_EXPERTS };
enum { WORKSPACE = 32 << 20 };              // bytes the library may use in a product
enum { ALIGNMENT = 16, SCRATCH_PAD = 256 }; // bytes: of the operands, and of the workspace

// ---- products ----

// D [m, n] = op(A) op(B), column-major as the library has it, every matrix without gaps: a row-major [rows, width]
// tensor is a [width, rows] matrix.
typedef struct Product {
  int transpose_a, transpose_b; // A is stored [k, m], B is stored [n, k]
  int m, n, k;
  int weights; // a weight gradient: fp32 D, k is the number of rows; else bf16 D, n is
} Product;

// In the library's terms.
typedef struct Description {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, d;
} Description;

typedef std::array<int, 6> ProductKey; // a Product's fields

// What this process knows of the library and of the last route.
static struct {
  cublasLtHandle_t handle; // made by the first product
  std::map<ProductKey, cublasLtMatmulAlgo_t> algorithm;
  int32_t *extents;   // pinned: begin [E_0 + E_1], count [E_0 + E_1] of the route below
  const void *route;  // where they were read
  unsigned may_reuse; // the ops that may still take them from here: bits 1 << (kind - OP_EXPERT_UP_FWD)
} loop;

static void library_check(cublasStatus_t status, const char *what, int line) {
  if (status != CUBLAS_STATUS_SUCCESS) panic("%s:%d: %s: %s", __FILE__, line, what, cublasLtGetStatusString(status));
}
#define LIBRARY_CHECK(call) library_check((call), #call, __LINE__)

// The same for what the library may refuse because of the shape.
static void product_check(cublasStatus_t status, const char *what, const Product *p) {
  if (status != CUBLAS_STATUS_SUCCESS)
    panic("--moe-gemm loop: %s of an expert's %s, [%d, %d] = [%d, %d] x [%d, %d]: %s", what,
          p->weights ? "weight gradient" : "rows", p->n, p->m, p->n, p->k, p->k, p->m, cublasLtGetStatusString(status));
}

static void layout_init(cublasLtMatrixLayoutOpaque_t *layout, cudaDataType_t type, int rows, int columns) {
  LIBRARY_CHECK(cublasLtMatrixLayoutInit(layout, type, (uint64_t)rows, (uint64_t)columns, rows));
}

static void describe(const Product *p, Description *d) {
  const cublasOperation_t a = p->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                          b = p->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  LIBRARY_CHECK(cublasLtMatmulDescInit(&d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  LIBRARY_CHECK(cublasLtMatmulDescSetAttribute(&d->product, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a));
  LIBRARY_CHECK(cublasLtMatmulDescSetAttribute(&d->product, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b));
  layout_init(&d->a, CUDA_R_16BF, p->transpose_a ? p->k : p->m, p->transpose_a ? p->m : p->k);
  layout_init(&d->b, CUDA_R_16BF, p->transpose_b ? p->n : p->k, p->transpose_b ? p->k : p->n);
  layout_init(&d->d, p->weights ? CUDA_R_32F : CUDA_R_16BF, p->m, p->n);
}

// What the library's heuristic finds best, asked once a shape. A long inner dimension may be split only where the parts
// lie in the workspace as fp32 and a separate kernel adds them, so that the same inputs give the same bits.
static const cublasLtMatmulAlgo_t *algorithm_of(const Product *p) {
  const ProductKey key = {p->transpose_a, p->transpose_b, p->m, p->n, p->k, p->weights};
  const auto known = loop.algorithm.find(key);
  if (known != loop.algorithm.end()) return &known->second;
  const uint32_t alignment = ALIGNMENT, reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; // or none
  const uint64_t workspace = WORKSPACE;
  cublasLtMatmulPreferenceOpaque_t wish;
  LIBRARY_CHECK(cublasLtMatmulPreferenceInit(&wish));
#define WISH(name, value)                                                                                              \
  LIBRARY_CHECK(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_##name, &(value), sizeof(value)))
  WISH(MAX_WORKSPACE_BYTES, workspace);
  WISH(REDUCTION_SCHEME_MASK, reduction);
  WISH(MIN_ALIGNMENT_A_BYTES, alignment);
  WISH(MIN_ALIGNMENT_B_BYTES, alignment);
  WISH(MIN_ALIGNMENT_C_BYTES, alignment);
  WISH(MIN_ALIGNMENT_D_BYTES, alignment);
#undef WISH
  Description d;
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  describe(p, &d);
  cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(loop.handle, &d.product, &d.a, &d.b, &d.d, &d.d, &wish, 1, &best, &found);
  if (status == CUBLAS_STATUS_SUCCESS) status = found ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
  product_check(status, "cublasLtMatmulAlgoGetHeuristic", p);
  return &loop.algorithm.emplace(key, best.algo).first->second;
}

// The number of rows that an algorithm is chosen for: steps of a quarter to an eighth, so that few are needed. The
// choice depends on the shape alone, never on what was computed before.
static int rows_rounded(int rows) {
  int step = 16;
  while (step < rows / 8) step *= 2;
  return ceil_div(rows, step) * step;
}

static cublasStatus_t product_run(const Product *p, const Product *chosen_for, const bf16 *a, const bf16 *b, float beta,
                                  void *out, void *workspace, cudaStream_t stream) {
  const float alpha = 1;
  Description d;
  describe(p, &d);
  return cublasLtMatmul(loop.handle, &d.product, &alpha, a, &d.a, b, &d.b, &beta, out, &d.d, out, &d.d,
                        algorithm_of(chosen_for), workspace, WORKSPACE, stream);
}

// D = op(A) op(B), or D += with `add`.
static void product(const Product *p, const bf16 *a, const bf16 *b, int add, void *out, void *workspace,
                    cudaStream_t stream) {
  if (!loop.handle) LIBRARY_CHECK(cublasLtCreate(&loop.handle));
  Product rounded = *p;
  if (p->weights)
    rounded.k = rows_rounded(p->k);
  else
    rounded.n = rows_rounded(p->n);
  const float beta = add ? 1 : 0;
  cublasStatus_t status = product_run(p, &rounded, a, b, beta, out, workspace, stream);
  // What is best for more rows need not take fewer.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
    status = product_run(p, p, a, b, beta, out, workspace, stream);
  product_check(status, "cublasLtMatmul", p);
}

// ---- slots, as the host knows them ----

typedef struct Slots {
  const Dims *dims;
  Route route;                              // on the device
  const int32_t *begin, *count;             // [E_0 + E_1] on the host
  int first[MODALITIES], total[MODALITIES]; // slots [first, first + total) of a modality's view are used
} Slots;

static unsigned op_bit(OpKind kind) {
  return 1u << (kind - OP_EXPERT_UP_FWD);
}

// The ops that follow `kind` in its layer and pass, with the same route.
static unsigned followers(OpKind kind) {
  if (kind == OP_EXPERT_UP_FWD) return op_bit(OP_EXPERT_DOWN_FWD);
  if (kind != OP_EXPERT_DOWN_BWD) return 0;
  return op_bit(OP_EXPERT_DOWN_WGRAD) | op_bit(OP_EXPERT_UP_DGRAD) | op_bit(OP_EXPERT_UP_WGRAD);
}

// Waits for the extents of a route, unless an op that this one follows has read them. Each follower takes
// them once: an address says little about what lies there later.
static Slots slots_of(const KernelCall *c, OpKind kind, const void *route) {
  const Dims *d = c->dims;
  const int groups = d->E[TEXT] + d->E[IMAGE];
  Slots s = {};
  s.dims = d;
  s.route = route_of(c, route);
  if (loop.route == s.route.begin && loop.may_reuse & op_bit(kind)) {
    loop.may_reuse &= ~op_bit(kind);
  } else {
    if (!loop.extents) CUDA_CHECK(cudaMallocHost((void **)&loop.extents, 2 * MOST_GROUPS * sizeof *loop.extents));
    CUDA_CHECK(cudaMemcpyAsync(loop.extents, s.route.begin, 2 * groups * sizeof *loop.extents, cudaMemcpyDeviceToHost,
                               call_stream(c))); // `count` lies behind `begin`
    CUDA_CHECK(cudaStreamSynchronize(call_stream(c)));
    loop.route = s.route.begin;
    loop.may_reuse = followers(kind);
  }
  s.begin = loop.extents;
  s.count = loop.extents + groups;
  s.first[TEXT] = s.begin[0];
  s.first[IMAGE] = s.begin[d->E[TEXT]];
  for (int g = 0; g < groups; g++) s.total[g >= d->E[TEXT]] += s.count[g];
  return s;
}

// Group g's modality and its number among that modality's experts.
static int group_side(const Dims *d, int g) {
  return g < d->E[TEXT] ? TEXT : IMAGE;
}
static int group_expert(const Dims *d, int g) {
  return g < d->E[TEXT] ? g : g - d->E[TEXT];
}

// Blocks of a kernel whose warps take `rows` rows.
static int grid_of(int64_t rows) {
  return grid_striding(ceil_div64(rows, WARPS));
}

// out [slots, N_m] = x [slots, K_m] times each expert's matrix [K, N], or [N, K] with `transposed`.
static void slots_product(const KernelCall *c, const Slots *s, int transposed, const int N[MODALITIES], int n_scale,
                          const int K[MODALITIES], int k_scale, const void *x, const void *const *W, void *out,
                          void *workspace) {
  const Dims *d = s->dims;
  for (int g = 0; g < d->E[TEXT] + d->E[IMAGE]; g++) {
    const int m = group_side(d, g), n = n_scale * N[m], k = k_scale * K[m];
    const int64_t begin = s->begin[g];
    if (s->count[g] == 0) continue;
    const Product p = {.transpose_a = transposed, .transpose_b = 0, .m = n, .n = s->count[g], .k = k, .weights = 0};
    product(&p, (const bf16 *)W[m] + (int64_t)group_expert(d, g) * n * k,
            (const bf16 *)x + slots_at(d, K, k_scale, m) + begin * k, 0,
            (bf16 *)out + slots_at(d, N, n_scale, m) + begin * n, workspace, call_stream(c));
  }
}

// dW [E, P_m, Q_m] (+)= sum over an expert's slots of x [slots, P_m]^T y [slots, Q_m].
static void slots_weights(const KernelCall *c, const Slots *s, const int P[MODALITIES], int p_scale, const void *x,
                          const int Q[MODALITIES], int q_scale, const void *y, void *const *dW, void *workspace) {
  const Dims *d = s->dims;
  const int add = c->args->accumulate;
  for (int g = 0; g < d->E[TEXT] + d->E[IMAGE]; g++) {
    const int m = group_side(d, g), rows = p_scale * P[m], columns = q_scale * Q[m];
    const int64_t begin = s->begin[g], size = (int64_t)rows * columns;
    float *dw = (float *)dW[m] + group_expert(d, g) * size;
    if (s->count[g]) {
      const Product p = {.transpose_a = 0, .transpose_b = 1, .m = columns, .n = rows, .k = s->count[g], .weights = 1};
      product(&p, (const bf16 *)y + slots_at(d, Q, q_scale, m) + begin * columns,
              (const bf16 *)x + slots_at(d, P, p_scale, m) + begin * rows, add, dw, workspace, call_stream(c));
    } else if (!add) {
      CUDA_CHECK(cudaMemsetAsync(dw, 0, (size_t)size * sizeof *dw, call_stream(c)));
    }
  }
}

// ---- rows in the order of the experts ----

typedef struct Permute {
  const bf16 *x;        // [T, C]
  const int32_t *slot;  // [T, Kmax]
  bf16 *to[MODALITIES]; // [slots, C] views
  int C, kmax, K[MODALITIES];
} Permute;

// A warp reads a row once and writes it to all of its slots.
static __global__ void __launch_bounds__(THREADS) permute_rows(Permute p, const BatchDims *dims) {
  await_previous();
  enum { PIECES = 4 }; // of 8 elements a lane, in flight together
  const int n_text = dims->n_text, used = n_text + dims->n_image, lane = threadIdx.x % 32;
  for (int64_t r = blockIdx.x * WARPS + threadIdx.x / 32; r < used; r += gridDim.x * WARPS) {
    const int k = r < n_text ? p.K[TEXT] : p.K[IMAGE];
    const int slot = lane < k ? p.slot[r * p.kmax + lane] : 0;
    bf16 *to = r < n_text ? p.to[TEXT] : p.to[IMAGE];
    for (int first = 0; first < p.C; first += PIECES * 256) {
      const int column = first + lane * 8;
      uint4 piece[PIECES];
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        if (column + i * 256 < p.C) piece[i] = *reinterpret_cast<const uint4 *>(p.x + r * p.C + column + i * 256);
      for (int j = 0; j < k; j++) {
        bf16 *row = to + (int64_t)__shfl_sync(0xffffffffu, slot, j) * p.C + column;
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          if (column + i * 256 < p.C) *reinterpret_cast<uint4 *>(row + i * 256) = piece[i];
      }
    }
  }
}

// Scratch: the permuted rows of an op that takes rows of [T, C], then the library's workspace.
static size_t permuted_bytes(OpKind kind, const Dims *d) {
  const int C[MODALITIES] = {d->C, d->C};
  if (kind == OP_EXPERT_DOWN_FWD || kind == OP_EXPERT_UP_DGRAD) return 0;
  return (size_t)ceil_div64(two_sided_size(d->T, d->K, C) * (int64_t)sizeof(bf16), SCRATCH_PAD) * SCRATCH_PAD;
}

size_t expert_loop_scratch(OpKind kind, const Dims *dims, const OpArgs *args) {
  (void)args;
  return permuted_bytes(kind, dims) + WORKSPACE;
}

static void *workspace_of(const KernelCall *c, OpKind kind) {
  return (char *)c->scratch + permuted_bytes(kind, c->dims);
}

// [slots, C], two-sided: the rows of x [T, C] that the slots came from, in scratch.
static const bf16 *rows_permuted(const KernelCall *c, const Slots *s, const void *x) {
  const Dims *d = s->dims;
  const int C[MODALITIES] = {d->C, d->C};
  bf16 *to = (bf16 *)c->scratch;
  Permute p = {};
  p.x = (const bf16 *)x;
  p.slot = s->route.slot;
  p.C = d->C;
  p.kmax = dims_kmax(d);
  for (int m = 0; m < MODALITIES; m++) {
    p.to[m] = to + slots_at(d, C, 1, m);
    p.K[m] = d->K[m];
  }
  CUDA_LAUNCH(permute_rows, grid_of(d->T), THREADS, 0, call_stream(c), p, c->batch->dims);
  return to;
}

// ---- the activation ----

typedef struct Activation {
  const bf16 *pre[MODALITIES]; // first used slot, pairs (gate 2f, up 2f + 1)
  bf16 *a[MODALITIES];         // likewise
  int64_t pieces[MODALITIES];  // of four activations
} Activation;

static __global__ void __launch_bounds__(THREADS) activate_slots(Activation p) {
  await_previous();
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < p.pieces[TEXT] + p.pieces[IMAGE]; i += step) {
    const bool image = i >= p.pieces[TEXT];
    const int64_t at = 4 * (image ? i - p.pieces[TEXT] : i);
    float x[8], y[4];
    load8((image ? p.pre[IMAGE] : p.pre[TEXT]) + 2 * at, x);
#pragma unroll
    for (int f = 0; f < 4; f++) y[f] = swiglu(x[2 * f], x[2 * f + 1]);
    store4((image ? p.a[IMAGE] : p.a[TEXT]) + at, y);
  }
}

static void slots_activate(const KernelCall *c, const Slots *s, const void *pre, void *a) {
  const Dims *d = s->dims;
  Activation p = {};
  for (int m = 0; m < MODALITIES; m++) {
    const int64_t first = (int64_t)s->first[m] * d->F[m];
    p.pre[m] = (const bf16 *)pre + slots_at(d, d->F, 2, m) + 2 * first;
    p.a[m] = (bf16 *)a + slots_at(d, d->F, 1, m) + first;
    p.pieces[m] = (int64_t)s->total[m] * d->F[m] / 4;
  }
  const int64_t pieces = p.pieces[TEXT] + p.pieces[IMAGE];
  if (pieces) CUDA_LAUNCH(activate_slots, grid_of(ceil_div64(pieces, 32)), THREADS, 0, call_stream(c), p);
}

typedef struct ActivationGrad {
  const bf16 *pre[MODALITIES]; // [slots, 2F] views
  bf16 *dpre[MODALITIES];      // [slots, 2F]
  bf16 *da[MODALITIES];        // [slots, F]: dA, and in its place w a
  const int32_t *source[MODALITIES];
  const float *weights; // [T, Kmax]
  float *dweights;      // [T, Kmax]
  int F[MODALITIES], first[MODALITIES], total[MODALITIES];
} ActivationGrad;

// A warp takes a slot, whose weight it needs and whose dot product it forms.
static __global__ void __launch_bounds__(THREADS) activate_slots_backward(ActivationGrad p) {
  await_previous();
  enum { PIECES = 2 }; // of four activations a lane, in flight together
  const int lane = threadIdx.x % 32;
  for (int64_t i = blockIdx.x * WARPS + threadIdx.x / 32; i < (int64_t)p.total[TEXT] + p.total[IMAGE];
       i += gridDim.x * WARPS) {
    const bool image = i >= p.total[TEXT];
    const int64_t s = image ? i - p.total[TEXT] + p.first[IMAGE] : i + p.first[TEXT];
    const int F = image ? p.F[IMAGE] : p.F[TEXT];
    const bf16 *pre = (image ? p.pre[IMAGE] : p.pre[TEXT]) + s * 2 * F;
    bf16 *dpre = (image ? p.dpre[IMAGE] : p.dpre[TEXT]) + s * 2 * F;
    bf16 *da = (image ? p.da[IMAGE] : p.da[TEXT]) + s * F;
    const int32_t assignment = (image ? p.source[IMAGE] : p.source[TEXT])[s];
    const float w = p.weights[assignment];
    float dot = 0;
    for (int first = lane * 4; first < F; first += PIECES * 128) {
      float x[PIECES][8], d[PIECES][4], dx[8], wa[4];
#pragma unroll
      for (int n = 0; n < PIECES; n++) {
        if (first + n * 128 >= F) break;
        load8(pre + 2 * (first + n * 128), x[n]);
        load4(da + first + n * 128, d[n]);
      }
#pragma unroll
      for (int n = 0; n < PIECES; n++) {
        if (first + n * 128 >= F) break;
        dot += swiglu_backward4(x[n], d[n], w, dx, wa);
        store8(dpre + 2 * (first + n * 128), dx);
        store4(da + first + n * 128, wa);
      }
    }
    dot = warp_sum(dot);
    if (lane == 0) p.dweights[assignment] = dot;
  }
}

// ---- the ops ----

extern "C" void cuda_EXPERT_UP_FWD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_UP_FWD, c->in.EXPERT_UP_FWD.route);
  const bf16 *h = rows_permuted(c, &s, c->in.EXPERT_UP_FWD.h); // [slots, C]
  slots_product(c, &s, 1, d->F, 2, C, 1, h, c->in.EXPERT_UP_FWD.w1, c->out.EXPERT_UP_FWD.pre,
                workspace_of(c, OP_EXPERT_UP_FWD)); // W1 [E, 2F, C]
  slots_activate(c, &s, c->out.EXPERT_UP_FWD.pre, c->out.EXPERT_UP_FWD.a);
}

extern "C" void cuda_EXPERT_DOWN_FWD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_DOWN_FWD, c->in.EXPERT_DOWN_FWD.route);
  slots_product(c, &s, 1, C, 1, d->F, 1, c->in.EXPERT_DOWN_FWD.a, c->in.EXPERT_DOWN_FWD.w2, c->out.EXPERT_DOWN_FWD.y,
                workspace_of(c, OP_EXPERT_DOWN_FWD)); // W2 [E, C, F]
}

// dA takes the place of sa until the activation's kernel has read it.
extern "C" void cuda_EXPERT_DOWN_BWD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_DOWN_BWD, c->in.EXPERT_DOWN_BWD.route);
  const bf16 *dout = rows_permuted(c, &s, c->in.EXPERT_DOWN_BWD.dout); // [slots, C]
  slots_product(c, &s, 0, d->F, 1, C, 1, dout, c->in.EXPERT_DOWN_BWD.w2, c->out.EXPERT_DOWN_BWD.sa,
                workspace_of(c, OP_EXPERT_DOWN_BWD)); // W2 [E, C, F]
  ActivationGrad p = {};
  for (int m = 0; m < MODALITIES; m++) {
    p.pre[m] = (const bf16 *)c->in.EXPERT_DOWN_BWD.pre + slots_at(d, d->F, 2, m);
    p.dpre[m] = (bf16 *)c->out.EXPERT_DOWN_BWD.dpre + slots_at(d, d->F, 2, m);
    p.da[m] = (bf16 *)c->out.EXPERT_DOWN_BWD.sa + slots_at(d, d->F, 1, m);
    p.source[m] = s.route.source[m];
    p.F[m] = d->F[m];
    p.first[m] = s.first[m];
    p.total[m] = s.total[m];
  }
  p.weights = (const float *)c->in.EXPERT_DOWN_BWD.weights;
  p.dweights = (float *)c->out.EXPERT_DOWN_BWD.dweights;
  CUDA_CHECK(cudaMemsetAsync(p.dweights, 0, (size_t)d->T * dims_kmax(d) * sizeof *p.dweights, call_stream(c)));
  const int64_t slots = (int64_t)s.total[TEXT] + s.total[IMAGE];
  if (slots) CUDA_LAUNCH(activate_slots_backward, grid_of(slots), THREADS, 0, call_stream(c), p);
}

extern "C" void cuda_EXPERT_DOWN_WGRAD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_DOWN_WGRAD, c->in.EXPERT_DOWN_WGRAD.route);
  const bf16 *dout = rows_permuted(c, &s, c->in.EXPERT_DOWN_WGRAD.dout); // [slots, C]
  slots_weights(c, &s, C, 1, dout, d->F, 1, c->in.EXPERT_DOWN_WGRAD.sa, c->out.EXPERT_DOWN_WGRAD.dw2,
                workspace_of(c, OP_EXPERT_DOWN_WGRAD)); // [E, C, F]
}

extern "C" void cuda_EXPERT_UP_DGRAD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_UP_DGRAD, c->in.EXPERT_UP_DGRAD.route);
  slots_product(c, &s, 0, C, 1, d->F, 2, c->in.EXPERT_UP_DGRAD.dpre, c->in.EXPERT_UP_DGRAD.w1,
                c->out.EXPERT_UP_DGRAD.dslot, workspace_of(c, OP_EXPERT_UP_DGRAD)); // W1 [E, 2F, C]
}

extern "C" void cuda_EXPERT_UP_WGRAD_loop(const KernelCall *c) {
  const Dims *d = c->dims;
  const int C[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, OP_EXPERT_UP_WGRAD, c->in.EXPERT_UP_WGRAD.route);
  const bf16 *h = rows_permuted(c, &s, c->in.EXPERT_UP_WGRAD.h); // [slots, C]
  slots_weights(c, &s, d->F, 2, c->in.EXPERT_UP_WGRAD.dpre, C, 1, h, c->out.EXPERT_UP_WGRAD.dw1,
                workspace_of(c, OP_EXPERT_UP_WGRAD)); // [E, 2F, C]
}
