// The shared expert's activation. Both directions move bytes and nothing else: 6 bytes an activation forward, 12
// backward. A modality's used rows, and the filler rows behind the image rows, are contiguous in its view, so that a
// thread needs no row to know where it is.
#include "kernels/cuda/activation.h"

enum { THREADS = 256 };

// The views of the two-sided buffers of widths 2 S_m (pre) and S_m (a).
typedef struct Views {
  int64_t pre[MODALITIES], a[MODALITIES]; // where they begin, in elements
  int width[MODALITIES], T;
} Views;

static Views views_of(const Dims *d) {
  const int one[MODALITIES] = {1, 1}, twice[MODALITIES] = {2 * d->S[TEXT], 2 * d->S[IMAGE]};
  Views v;
  for (int m = 0; m < MODALITIES; m++) {
    v.pre[m] = two_sided_base(d->T, one, twice, m);
    v.a[m] = two_sided_base(d->T, one, d->S, m);
    v.width[m] = d->S[m];
  }
  v.T = d->T;
  return v;
}

// Four activations: element `a` of the buffer of width S_m, made from the eight at `pre`.
typedef struct Piece {
  int64_t pre, a;
  bool filler;
} Piece;

// Piece number i: those of the text rows, then those of the image and filler rows. False past the last. (No indexing by
// modality: it would put the views into local memory.)
static __device__ bool piece_at(const Views &v, int64_t n_text, int64_t used, int64_t i, Piece *p) {
  const int64_t text = n_text * v.width[TEXT];
  const bool image = 4 * i >= text;
  const int64_t at = image ? 4 * i - text + n_text * v.width[IMAGE] : 4 * i; // from the beginning of the view
  p->pre = (image ? v.pre[IMAGE] : v.pre[TEXT]) + 2 * at;
  p->a = (image ? v.a[IMAGE] : v.a[TEXT]) + at;
  p->filler = image && at >= used * v.width[IMAGE];
  return !image || at < (int64_t)v.T * v.width[IMAGE];
}

static __global__ void __launch_bounds__(THREADS)
    swiglu_forward(Views v, const BatchDims *dims, const bf16 *__restrict__ pre, bf16 *__restrict__ a) {
  const int64_t n_text = dims->n_text, used = n_text + dims->n_image;
  Piece p;
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; piece_at(v, n_text, used, i, &p);
       i += gridDim.x * THREADS) {
    float x[8] = {0}, y[4]; // filler: 0 gives 0
    if (!p.filler) load8(pre + p.pre, x);
#pragma unroll
    for (int f = 0; f < 4; f++) y[f] = swiglu(x[2 * f], x[2 * f + 1]);
    store4(a + p.a, y);
  }
}

static __global__ void __launch_bounds__(THREADS)
    swiglu_backward_rows(Views v, const BatchDims *dims, const bf16 *__restrict__ da, const bf16 *__restrict__ pre,
                         bf16 *__restrict__ dpre, bf16 *__restrict__ a) {
  const int64_t n_text = dims->n_text, used = n_text + dims->n_image;
  Piece p;
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; piece_at(v, n_text, used, i, &p);
       i += gridDim.x * THREADS) {
    float x[8] = {0}, d[4] = {0}, dx[8], y[4];
    if (!p.filler) {
      load8(pre + p.pre, x);
      load4(da + p.a, d);
    }
    swiglu_backward4(x, d, 1, dx, y);
    store8(dpre + p.pre, dx);
    store4(a + p.a, y);
  }
}

// A wave of blocks at most: the pieces are counted on the device. Never 0, which no launch may have.
static int grid_of(const Dims *d) {
  const int one[MODALITIES] = {1, 1};
  return grid_striding(1 + two_sided_size(d->T, one, d->S) / (4 * THREADS));
}

extern "C" void cuda_SWIGLU_FWD(const KernelCall *c) {
  CUDA_LAUNCH(swiglu_forward, grid_of(c->dims), THREADS, 0, call_stream(c), views_of(c->dims), c->batch->dims,
              (const bf16 *)c->in.SWIGLU_FWD.pre, (bf16 *)c->out.SWIGLU_FWD.a);
}

extern "C" void cuda_SWIGLU_BWD(const KernelCall *c) {
  CUDA_LAUNCH(swiglu_backward_rows, grid_of(c->dims), THREADS, 0, call_stream(c), views_of(c->dims), c->batch->dims,
              (const bf16 *)c->in.SWIGLU_BWD.da, (const bf16 *)c->in.SWIGLU_BWD.pre, (bf16 *)c->out.SWIGLU_BWD.dpre,
              (bf16 *)c->out.SWIGLU_BWD.a);
}
