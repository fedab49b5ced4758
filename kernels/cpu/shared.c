// The shared expert's products with its activation in between. As plain loops: reference/experts.c.
#include "kernels/cpu/swiglu.h"

// The rows of both modalities in two-sided buffers of widths S_m and 2 S_m, and of one width C.
typedef struct Sides {
  int64_t first[MODALITIES], rows[MODALITIES]; // used ones
  int64_t base[MODALITIES], pre_base[MODALITIES];
  int64_t filler; // rows
} Sides;

static Sides sides_of(const KernelCall *c) {
  const Dims *d = c->dims;
  const BatchDims *b = c->batch->dims;
  const int one[MODALITIES] = {1, 1}, twice[MODALITIES] = {2 * d->S[TEXT], 2 * d->S[IMAGE]};
  Sides s = {.first = {0, b->n_text}, .rows = {b->n_text, b->n_image}, .filler = d->T - b->n_text - b->n_image};
  for (int m = 0; m < MODALITIES; m++) {
    s.base[m] = two_sided_base(d->T, one, d->S, m) + s.first[m] * d->S[m];
    s.pre_base[m] = two_sided_base(d->T, one, twice, m) + s.first[m] * twice[m];
  }
  return s;
}

// Filler rows are the last of the image view.
static void fill(const KernelCall *c, const Sides *s, real *pre, real *a) {
  int64_t S = c->dims->S[IMAGE], after = s->rows[IMAGE];
  memset(pre + s->pre_base[IMAGE] + after * 2 * S, 0, (size_t)(s->filler * 2 * S) * sizeof *pre);
  memset(a + s->base[IMAGE] + after * S, 0, (size_t)(s->filler * S) * sizeof *a);
}

void cpu_SHARED_UP_FWD(const KernelCall *c) {
  const int64_t C = c->dims->C;
  const Sides s = sides_of(c);
  const real *h = c->in.SHARED_UP_FWD.h;                             // [T, C]
  real *pre = c->out.SHARED_UP_FWD.pre, *a = c->out.SHARED_UP_FWD.a; // [T, 2S], [T, S]
  GemmItem items[MODALITIES] = {0};
  for (int m = 0; m < MODALITIES; m++)
    items[m] = (GemmItem){.M = s.rows[m],
                          .N = 2 * c->dims->S[m],
                          .K = C,
                          .A = h + s.first[m] * C,
                          .lda = C,
                          .B = c->in.SHARED_UP_FWD.w1[m], // [2S, C]
                          .ldb = C,
                          .C = pre + s.pre_base[m],
                          .ldc = 2 * c->dims->S[m]};
  gemm_batch(0, 1, 0, items, MODALITIES);
#pragma omp parallel for
  for (int64_t r = 0; r < s.rows[TEXT] + s.rows[IMAGE]; r++) {
    int m = r < s.rows[TEXT] ? TEXT : IMAGE;
    int64_t S = c->dims->S[m], i = r - s.first[m];
    swiglu_row(pre + s.pre_base[m] + i * 2 * S, S, a + s.base[m] + i * S);
  }
  fill(c, &s, pre, a);
}

void cpu_SHARED_DOWN_BWD(const KernelCall *c) {
  const int64_t C = c->dims->C;
  const Sides s = sides_of(c);
  const real *dout = c->in.SHARED_DOWN_BWD.dout, *pre = c->in.SHARED_DOWN_BWD.pre; // [T, C], [T, 2S]
  real *dpre = c->out.SHARED_DOWN_BWD.dpre;                                        // [T, 2S]
  real *a = c->out.SHARED_DOWN_BWD.a;                                              // [T, S]: first dA, then a
  GemmItem items[MODALITIES] = {0};
  for (int m = 0; m < MODALITIES; m++)
    items[m] = (GemmItem){.M = s.rows[m],
                          .N = c->dims->S[m],
                          .K = C,
                          .A = dout + s.first[m] * C,
                          .lda = C,
                          .B = c->in.SHARED_DOWN_BWD.w2[m], // [C, S]
                          .ldb = c->dims->S[m],
                          .C = a + s.base[m],
                          .ldc = c->dims->S[m]};
  gemm_batch(0, 0, 0, items, MODALITIES);
#pragma omp parallel for
  for (int64_t r = 0; r < s.rows[TEXT] + s.rows[IMAGE]; r++) {
    int m = r < s.rows[TEXT] ? TEXT : IMAGE;
    int64_t S = c->dims->S[m], i = r - s.first[m];
    real *row = a + s.base[m] + i * S;
    swiglu_row_backward(pre + s.pre_base[m] + i * 2 * S, row, 1, S, dpre + s.pre_base[m] + i * 2 * S, row);
  }
  fill(c, &s, dpre, a);
}
