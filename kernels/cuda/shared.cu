// The shared experts' products with the activation in their epilogues. Filler rows, which no product writes, are zeroed
// by a small kernel before.
#include "kernels/cuda/gemm.h"

enum { THREADS = 256 };

// The product of an op without its operands: a side's rows are the modality's.
static Gemm shared_gemm(OpKind kind, const Dims *d, const BatchDims *dims) {
  Gemm g = {};
  g.b_transposed = kind == OP_SHARED_DOWN_BWD;
  for (int m = 0; m < MODALITIES; m++) {
    GemmSide *s = &g.side[m];
    s->groups = 1;
    s->rows = d->T;
    s->N = (kind == OP_SHARED_UP_FWD ? 2 : 1) * d->S[m];
    s->K = d->C;
    s->extent = m == TEXT ? GemmExtent{NULL, &dims->n_text, 0, 0} : GemmExtent{&dims->n_text, &dims->n_image, 0, 0};
  }
  return g;
}

// First element of modality m's view in a two-sided buffer of widths scale * S.
static int64_t shared_at(const Dims *d, int scale, int m) {
  const int one[MODALITIES] = {1, 1}, width[MODALITIES] = {scale * d->S[TEXT], scale * d->S[IMAGE]};
  return two_sided_base(d->T, one, width, m);
}

// Zeros in the filler rows, the last ones, of two views [T, 2S] and [T, S] of the image side.
static __global__ void __launch_bounds__(THREADS) filler_zero(bf16 *pre, bf16 *a, int T, int S, const BatchDims *dims) {
  await_previous();
  const int64_t used = dims->n_text + dims->n_image, pieces = (T - used) * S / 8, step = (int64_t)gridDim.x * THREADS;
  uint4 *to_pre = reinterpret_cast<uint4 *>(pre + used * 2 * S), *to_a = reinterpret_cast<uint4 *>(a + used * S);
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < 3 * pieces; i += step)
    *(i < 2 * pieces ? to_pre + i : to_a + i - 2 * pieces) = make_uint4(0, 0, 0, 0);
}

static void fill(const KernelCall *c, void *pre, void *a) {
  const Dims *d = c->dims;
  CUDA_LAUNCH(filler_zero, cuda_sm_count(), THREADS, 0, call_stream(c), (bf16 *)pre + shared_at(d, 2, IMAGE),
              (bf16 *)a + shared_at(d, 1, IMAGE), d->T, d->S[IMAGE], c->batch->dims);
}

extern "C" void cuda_SHARED_UP_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Gemm g = shared_gemm(OP_SHARED_UP_FWD, d, c->batch->dims);
  g.leaves = c->leaves;
  GemmStoreSwiglu end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    g.side[m].a = (const bf16 *)c->in.SHARED_UP_FWD.h;                // h [T, C]
    g.side[m].b = (const bf16 *)c->in.SHARED_UP_FWD.w1[m];            // W1 [2S, C]
    end[m].c = (bf16 *)c->out.SHARED_UP_FWD.pre + shared_at(d, 2, m); // pre [T, 2S]
    end[m].act = (bf16 *)c->out.SHARED_UP_FWD.a + shared_at(d, 1, m); // a [T, S]
  }
  fill(c, c->out.SHARED_UP_FWD.pre, c->out.SHARED_UP_FWD.a);
  gemm_rows(&g, end, call_stream(c));
}

extern "C" void cuda_SHARED_DOWN_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  Gemm g = shared_gemm(OP_SHARED_DOWN_BWD, d, c->batch->dims);
  GemmSharedBackward end[MODALITIES] = {};
  for (int m = 0; m < MODALITIES; m++) {
    g.side[m].a = (const bf16 *)c->in.SHARED_DOWN_BWD.dout;                    // dout [T, C]
    g.side[m].b = (const bf16 *)c->in.SHARED_DOWN_BWD.w2[m];                   // W2 [C, S]
    end[m].pre = (const bf16 *)c->in.SHARED_DOWN_BWD.pre + shared_at(d, 2, m); // pre [T, 2S]
    end[m].dpre = (bf16 *)c->out.SHARED_DOWN_BWD.dpre + shared_at(d, 2, m);    // [T, 2S]
    end[m].sa = (bf16 *)c->out.SHARED_DOWN_BWD.a + shared_at(d, 1, m);         // [T, S]
  }
  fill(c, c->out.SHARED_DOWN_BWD.dpre, c->out.SHARED_DOWN_BWD.a);
  gemm_rows(&g, end, call_stream(c));
}
