// Experts of both modalities (as plain loops: reference/experts.c), over assignments sorted by expert. Rows are
// gathered from (or scattered to) their token a block at a time, on the stack, and go through one product while they
// are hot.
#include "kernels/cpu/combine.h"
#include "kernels/cpu/swiglu.h"

enum {
  BLOCK_ROWS = 128,  // slots of one expert that a task takes
  BLOCK_DEPTH = 512, // columns of a gathered block
  GRAD_ROWS = 512,   // the same for weight gradients, which sum over slots
  GRAD_COLUMNS = 128
};

// Slots [begin, begin + rows) of expert e of modality m.
typedef struct SlotBlock {
  int m;
  int64_t e, begin, rows;
} SlotBlock;

// How the per-assignment buffers are laid out.
typedef struct Slots {
  Route route;
  const Dims *dims;
  int64_t kmax;
} Slots;

static Slots slots_of(const KernelCall *c, const void *route) {
  Slots s = {.dims = c->dims, .kmax = dims_kmax(c->dims)};
  route_bind(&s.route, c->dims, (int32_t *)(uintptr_t)route);
  return s;
}

// Where modality m's view of a per-assignment buffer begins: scale * width[m] elements a slot.
static int64_t slots_base(const Slots *s, const int width[MODALITIES], int scale, int m) {
  const int scaled[MODALITIES] = {scale * width[0], scale * width[1]};
  return two_sided_base(s->dims->T, s->dims->K, scaled, m);
}

static int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static int64_t blocks_total(const Slots *s) {
  int64_t total = 0;
  for (int g = 0; g < s->dims->E[TEXT] + s->dims->E[IMAGE]; g++) total += ceil_div(s->route.count[g], BLOCK_ROWS);
  return total;
}

// Block number i of all experts; an expert's blocks are of nearly equal size.
static SlotBlock block_at(const Slots *s, int64_t i) {
  int g = 0;
  int64_t blocks;
  while (i >= (blocks = ceil_div(s->route.count[g], BLOCK_ROWS))) {
    i -= blocks;
    g++;
  }
  int64_t count = s->route.count[g], first = count * i / blocks;
  int m = g < s->dims->E[TEXT] ? TEXT : IMAGE;
  return (SlotBlock){.m = m,
                     .e = m == TEXT ? g : g - s->dims->E[TEXT],
                     .begin = s->route.begin[g] + first,
                     .rows = count * (i + 1) / blocks - first};
}

// out [rows, width] = columns [c0, c0 + width) of the rows of x [T, C] that the slots came from.
static void gather(const Slots *s, int m, int64_t begin, int64_t rows, const real *x, int64_t c0, int64_t width,
                   real *out) {
  for (int64_t i = 0; i < rows; i++) {
    int64_t r = s->route.source[m][begin + i] / s->kmax;
    memcpy(out + i * width, x + r * s->dims->C + c0, (size_t)width * sizeof *out);
  }
}

// out [rows, N] = gathered rows of x [T, C] times W [C, N], or its transpose [N, C].
static void gathered_product(const Slots *s, const SlotBlock *b, const real *x, const real *W, int transposed,
                             int64_t N, real *out) {
  int64_t C = s->dims->C;
  real block[BLOCK_ROWS * BLOCK_DEPTH];
  for (int64_t c0 = 0; c0 < C; c0 += BLOCK_DEPTH) {
    int64_t depth = C - c0 < BLOCK_DEPTH ? C - c0 : BLOCK_DEPTH;
    gather(s, b->m, b->begin, b->rows, x, c0, depth, block);
    gemm_serial(0, transposed, b->rows, N, depth, 1, block, depth, transposed ? W + c0 : W + c0 * N, transposed ? C : N,
                c0 > 0 ? 1 : 0, out, N);
  }
}

void cpu_EXPERT_UP_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const real *h = c->in.EXPERT_UP_FWD.h; // [T, C]
  const Slots s = slots_of(c, c->in.EXPERT_UP_FWD.route);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < blocks_total(&s); i++) {
    SlotBlock b = block_at(&s, i);
    int64_t F = d->F[b.m];
    const real *w1 = (const real *)c->in.EXPERT_UP_FWD.w1[b.m] + b.e * 2 * F * d->C;               // [2F, C]
    real *pre = (real *)c->out.EXPERT_UP_FWD.pre + slots_base(&s, d->F, 2, b.m) + b.begin * 2 * F; // [rows, 2F]
    real *a = (real *)c->out.EXPERT_UP_FWD.a + slots_base(&s, d->F, 1, b.m) + b.begin * F;         // [rows, F]
    gathered_product(&s, &b, h, w1, 1, 2 * F, pre);
    for (int64_t r = 0; r < b.rows; r++) swiglu_row(pre + r * 2 * F, F, a + r * F);
  }
}

void cpu_EXPERT_DOWN_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const real *dout = c->in.EXPERT_DOWN_BWD.dout;       // [T, C]
  const real *weights = c->in.EXPERT_DOWN_BWD.weights; // [T, Kmax]
  real *dweights = c->out.EXPERT_DOWN_BWD.dweights;    // [T, Kmax]
  const Slots s = slots_of(c, c->in.EXPERT_DOWN_BWD.route);
  memset(dweights, 0, (size_t)(d->T * s.kmax) * sizeof *dweights);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < blocks_total(&s); i++) {
    SlotBlock b = block_at(&s, i);
    int64_t F = d->F[b.m], at = slots_base(&s, d->F, 1, b.m) + b.begin * F;
    int64_t pre_at = slots_base(&s, d->F, 2, b.m) + b.begin * 2 * F;
    const real *pre = (const real *)c->in.EXPERT_DOWN_BWD.pre + pre_at;            // [rows, 2F]
    const real *w2 = (const real *)c->in.EXPERT_DOWN_BWD.w2[b.m] + b.e * d->C * F; // [C, F]
    real *dpre = (real *)c->out.EXPERT_DOWN_BWD.dpre + pre_at;                     // [rows, 2F]
    real *sa = (real *)c->out.EXPERT_DOWN_BWD.sa + at;                             // [rows, F]: first dA, then w a
    gathered_product(&s, &b, dout, w2, 0, F, sa);
    for (int64_t r = 0; r < b.rows; r++) {
      int64_t assignment = s.route.source[b.m][b.begin + r];
      dweights[assignment] =
          swiglu_row_backward(pre + r * 2 * F, sa + r * F, weights[assignment], F, dpre + r * 2 * F, sa + r * F);
    }
  }
}

// out [slots, N_m] = x [slots, K_m] times each expert's matrix, [K, N] or transposed [N, K].
static void slots_product(const KernelCall *c, const Slots *s, int transposed, const int N[MODALITIES], int n_scale,
                          const int K[MODALITIES], int k_scale, const real *x, const void *const *W, real *out) {
  const Dims *d = c->dims;
  int groups = d->E[TEXT] + d->E[IMAGE];
  const Scratch scratch = scratch_take(groups * (int64_t)sizeof(GemmItem));
  GemmItem *items = scratch_own(&scratch);
  for (int g = 0; g < groups; g++) {
    int m = g < d->E[TEXT] ? TEXT : IMAGE;
    int64_t e = m == TEXT ? g : g - d->E[TEXT], n = n_scale * N[m], k = k_scale * K[m], begin = s->route.begin[g];
    items[g] = (GemmItem){.M = s->route.count[g],
                          .N = n,
                          .K = k,
                          .lda = k,
                          .ldb = transposed ? k : n,
                          .ldc = n,
                          .A = x + slots_base(s, K, k_scale, m) + begin * k,
                          .B = (const real *)W[m] + e * n * k,
                          .C = out + slots_base(s, N, n_scale, m) + begin * n};
  }
  gemm_batch(0, transposed, 0, items, groups);
}

void cpu_EXPERT_DOWN_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const int width[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, c->in.EXPERT_DOWN_FWD.route);
  slots_product(c, &s, 1, width, 1, d->F, 1, c->in.EXPERT_DOWN_FWD.a, c->in.EXPERT_DOWN_FWD.w2,
                c->out.EXPERT_DOWN_FWD.y); // W2 [C, F]
}

void cpu_EXPERT_UP_DGRAD(const KernelCall *c) {
  const Dims *d = c->dims;
  const int width[MODALITIES] = {d->C, d->C};
  const Slots s = slots_of(c, c->in.EXPERT_UP_DGRAD.route);
  slots_product(c, &s, 0, width, 1, d->F, 2, c->in.EXPERT_UP_DGRAD.dpre, c->in.EXPERT_UP_DGRAD.w1,
                c->out.EXPERT_UP_DGRAD.dslot); // W1 [2F, C]
}

Combine combine_of(const KernelCall *c) {
  const Dims *d = c->dims;
  const Slots s = slots_of(c, c->in.EXPERT_COMBINE.route);
  const int width[MODALITIES] = {d->C, d->C};
  const real *y = c->in.EXPERT_COMBINE.y;
  return (Combine){.y = {y + slots_base(&s, width, 1, TEXT), y + slots_base(&s, width, 1, IMAGE)},
                   .weights = c->in.EXPERT_COMBINE.weights,
                   .add = c->in.EXPERT_COMBINE.add,
                   .slot = s.route.slot,
                   .C = d->C,
                   .kmax = s.kmax,
                   .K = {d->K[TEXT], d->K[IMAGE]},
                   .n_text = c->batch->dims->n_text};
}

void combine_part(const Combine *c, int64_t r, int64_t first, int64_t n, real *out) {
  const int m = r < c->n_text ? TEXT : IMAGE;
  const int32_t *slot = c->slot + r * c->kmax;
  if (c->add)
    memcpy(out, c->add + r * c->C + first, (size_t)n * sizeof *out);
  else
    memset(out, 0, (size_t)n * sizeof *out);
  int32_t last = -1; // slots ascend with the expert
  for (int k = 0; k < c->K[m]; k++) {
    int next = -1;
    for (int j = 0; j < c->K[m]; j++)
      if (slot[j] > last && (next < 0 || slot[j] < slot[next])) next = j;
    last = slot[next];
    real w = c->weights ? c->weights[r * c->kmax + next] : 1;
    const real *from = c->y[m] + (int64_t)last * c->C + first;
    for (int64_t i = 0; i < n; i++) out[i] += w * from[i];
  }
}

void cpu_EXPERT_COMBINE(const KernelCall *c) {
  real *out = c->out.EXPERT_COMBINE.out; // [T, C]
  const Combine combine = combine_of(c);
  int64_t T = c->dims->T, C = c->dims->C, used = c->batch->dims->n_text + c->batch->dims->n_image;
#pragma omp parallel for
  for (int64_t r = 0; r < used; r++) combine_part(&combine, r, 0, C, out + r * C);
  memset(out + used * C, 0, (size_t)((T - used) * C) * sizeof *out);
}

// Weight gradients of all experts: (+)= sum over an expert's slots of x[row]^T other[slot] (`rows_of_x`: [C, N]), or of
// other[slot]^T x[row] ([N, C]); x [T, C], other [slots, N = scale * F_m]. A task forms the part that GRAD_COLUMNS
// columns of x (fewer where C is small, for balance) give for one expert.
static void weight_gradients(const KernelCall *c, const Slots *s, const real *x, const real *other, int scale,
                             int rows_of_x, void *const *dW) {
  const Dims *d = c->dims;
  int64_t C = d->C, half = ceil_div(C, 32) * 16, columns = half < GRAD_COLUMNS ? half : GRAD_COLUMNS;
  int64_t blocks = ceil_div(C, columns);
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < blocks * (d->E[TEXT] + d->E[IMAGE]); task++) {
    int64_t g = task / blocks, c0 = task % blocks * columns, width = C - c0 < columns ? C - c0 : columns;
    int m = g < d->E[TEXT] ? TEXT : IMAGE;
    int64_t e = m == TEXT ? g : g - d->E[TEXT], N = scale * d->F[m], count = s->route.count[g];
    real *dw = (real *)dW[m] + e * C * N + (rows_of_x ? c0 * N : c0);
    real block[GRAD_ROWS * GRAD_COLUMNS], keep = c->args->accumulate ? 1 : 0; // [rows, width]
    for (int64_t i = 0; i < count || i == 0; i += GRAD_ROWS) {                // once for no slots too: zeros
      int64_t rows = count - i < GRAD_ROWS ? count - i : GRAD_ROWS, begin = s->route.begin[g] + i;
      const real *slots = other + slots_base(s, d->F, scale, m) + begin * N; // [rows, N]
      gather(s, m, begin, rows, x, c0, width, block);
      if (rows_of_x)
        gemm_serial(1, 0, width, N, rows, 1, block, width, slots, N, keep, dw, N);
      else
        gemm_serial(1, 0, N, width, rows, 1, slots, N, block, width, keep, dw, C);
      keep = 1;
    }
  }
}

void cpu_EXPERT_DOWN_WGRAD(const KernelCall *c) {
  const Slots s = slots_of(c, c->in.EXPERT_DOWN_WGRAD.route);
  weight_gradients(c, &s, c->in.EXPERT_DOWN_WGRAD.dout, c->in.EXPERT_DOWN_WGRAD.sa, 1, 1,
                   c->out.EXPERT_DOWN_WGRAD.dw2); // [C, F]
}

void cpu_EXPERT_UP_WGRAD(const KernelCall *c) {
  const Slots s = slots_of(c, c->in.EXPERT_UP_WGRAD.route);
  weight_gradients(c, &s, c->in.EXPERT_UP_WGRAD.h, c->in.EXPERT_UP_WGRAD.dpre, 2, 0,
                   c->out.EXPERT_UP_WGRAD.dw1); // [2F, C]
}
