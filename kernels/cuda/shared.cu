// The shared experts' products with the activation in their epilogues.
#include "kernels/cuda/gemm.h"

// First element of modality m's view in a two-sided buffer of widths scale * S.
static int64_t shared_at(const Dims *d, int scale, int m) {
  const int one[MODALITIES] = {1, 1}, width[MODALITIES] = {scale * d->S[TEXT], scale * d->S[IMAGE]};
  return two_sided_base(d->T, one, width, m);
}

// The product of an op without its operands: a side's rows are the modality's. The last rows of pre [T, 2S] and a [T,
// S] are filler, and zeros.
static Gemm shared_gemm(OpKind kind, const Dims *d, const BatchDims *dims, void *pre, void *a) {
  Gemm g = {};
  g.settled = 1;
  g.reads = kind == OP_SHARED_DOWN_BWD;
  g.dims = dims;
  g.fill_rows = d->T;
  g.fill[0] = {GEMM_FILLER_ROWS, 2 * d->S[IMAGE], (bf16 *)pre + shared_at(d, 2, IMAGE), NULL};
  g.fill[1] = {GEMM_FILLER_ROWS, d->S[IMAGE], (bf16 *)a + shared_at(d, 1, IMAGE), NULL};
  g.b_transposed = kind == OP_SHARED_DOWN_BWD;
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->groups = 1;
    s->rows = d->T;
    s->N = (kind == OP_SHARED_UP_FWD ? 2 : 1) * d->S[m];
    s->K = d->C;
    if (m == IMAGE) s->extent.begin = &dims->n_text;
    s->extent.count = m == TEXT ? &dims->n_text : &dims->n_image;
  }
  return g;
}

extern "C" void cuda_SHARED_UP_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Gemm g = shared_gemm(OP_SHARED_UP_FWD, d, c->batch->dims, c->out.SHARED_UP_FWD.pre, c->out.SHARED_UP_FWD.a);
  g.leaves = c->leaves;
  GemmStoreSwiglu end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    g.side[m].a = (const bf16 *)c->in.SHARED_UP_FWD.h;                // h [T, C]
    g.side[m].b = (const bf16 *)c->in.SHARED_UP_FWD.w1[m];            // W1 [2S, C]
    end[m].c = (bf16 *)c->out.SHARED_UP_FWD.pre + shared_at(d, 2, m); // pre [T, 2S]
    end[m].act = (bf16 *)c->out.SHARED_UP_FWD.a + shared_at(d, 1, m); // a [T, S]
  }
  gemm_rows(&g, end, call_stream(c));
}

extern "C" void cuda_SHARED_DOWN_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Gemm g = shared_gemm(OP_SHARED_DOWN_BWD, d, c->batch->dims, c->out.SHARED_DOWN_BWD.dpre, c->out.SHARED_DOWN_BWD.a);
  GemmSharedBackward end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    g.side[m].a = (const bf16 *)c->in.SHARED_DOWN_BWD.dout;                    // dout [T, C]
    g.side[m].b = (const bf16 *)c->in.SHARED_DOWN_BWD.w2[m];                   // W2 [C, S]
    end[m].pre = (const bf16 *)c->in.SHARED_DOWN_BWD.pre + shared_at(d, 2, m); // pre [T, 2S]
    end[m].dpre = (bf16 *)c->out.SHARED_DOWN_BWD.dpre + shared_at(d, 2, m);    // [T, 2S]
    end[m].sa = (bf16 *)c->out.SHARED_DOWN_BWD.a + shared_at(d, 1, m);         // [T, S]
  }
  gemm_rows(&g, end, call_stream(c));
}
