// The shared expert's activation. As plain loops: reference/experts.c.
#include "kernels/cpu/swiglu.h"

// Rows of both modalities in two-sided buffers of widths 2 S_m and S_m.
typedef struct Sides {
  int pre_width[MODALITIES], width[MODALITIES];
  int64_t pre_base[MODALITIES], base[MODALITIES];
  int64_t n_text, used;
} Sides;

static Sides sides_of(const KernelCall *c) {
  const Dims *d = c->dims;
  const int one[MODALITIES] = {1, 1};
  Sides s = {.n_text = c->batch->dims->n_text, .used = c->batch->dims->n_text + c->batch->dims->n_image};
  for (int m = 0; m < MODALITIES; m++) {
    s.width[m] = d->S[m];
    s.pre_width[m] = 2 * d->S[m];
  }
  for (int m = 0; m < MODALITIES; m++) {
    s.base[m] = two_sided_base(d->T, one, s.width, m);
    s.pre_base[m] = two_sided_base(d->T, one, s.pre_width, m);
  }
  return s;
}

void cpu_SWIGLU_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Sides s = sides_of(c);
  const real *pre = c->in.SWIGLU_FWD.pre; // [T, 2S]
  real *a = c->out.SWIGLU_FWD.a;          // [T, S]
#pragma omp parallel for
  for (int64_t r = 0; r < s.used; r++) {
    int m = r < s.n_text ? TEXT : IMAGE;
    swiglu_row(pre + s.pre_base[m] + r * s.pre_width[m], s.width[m], a + s.base[m] + r * s.width[m]);
  }
  // Filler rows are the last of the image view.
  int64_t filler = d->T - s.used, S = s.width[IMAGE];
  memset(a + s.base[IMAGE] + s.used * S, 0, (size_t)(filler * S) * sizeof *a);
}

void cpu_SWIGLU_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Sides s = sides_of(c);
  const real *da = c->in.SWIGLU_BWD.da;   // [T, S]
  const real *pre = c->in.SWIGLU_BWD.pre; // [T, 2S]
  real *dpre = c->out.SWIGLU_BWD.dpre;    // [T, 2S]
  real *a = c->out.SWIGLU_BWD.a;          // [T, S]
#pragma omp parallel for
  for (int64_t r = 0; r < s.used; r++) {
    int m = r < s.n_text ? TEXT : IMAGE;
    int64_t at = s.base[m] + r * s.width[m], pre_at = s.pre_base[m] + r * s.pre_width[m];
    swiglu_row_backward(pre + pre_at, da + at, 1, s.width[m], dpre + pre_at, a + at);
  }
  int64_t filler = d->T - s.used, S = s.width[IMAGE];
  memset(a + s.base[IMAGE] + s.used * S, 0, (size_t)(filler * S) * sizeof *a);
  memset(dpre + s.pre_base[IMAGE] + s.used * 2 * S, 0, (size_t)(filler * 2 * S) * sizeof *dpre);
}
