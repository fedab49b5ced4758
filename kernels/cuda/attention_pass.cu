// Before and after the backward attention's pass (attention_pass.h).
#include "kernels/cuda/attention_pass.h"

enum { D = 128, PREPARE_THREADS = 256 };

size_t pass_bind(PassScratch *s, const Dims *d, void *base) {
  char *at = (char *)base;
  size_t used = 0, lines = (size_t)d->H * d->T;
#define PASS_TAKE(field, type, count)                                                                                  \
  do {                                                                                                                 \
    s->field = (type *)(base ? at + used : NULL);                                                                      \
    used += ((count) * sizeof(type) + 127) / 128 * 128;                                                                \
  } while (0)
  PASS_TAKE(dq, float, lines * d->D);
  PASS_TAKE(lse2, float, lines);
  PASS_TAKE(delta, float, lines);
  PASS_TAKE(turn, uint32_t, lines);
  PASS_TAKE(taken, int, 1);
#undef PASS_TAKE
  return used;
}

// As many threads as a row of one head has chunks find its delta.
static __global__ void __launch_bounds__(PREPARE_THREADS) attention_prepare(PassCall p) {
  await_previous();
  const BackwardCall &c = p.c;
  const int H = c.shape.H, T = c.shape.T, chunks = D / 8;
  int64_t thread = (int64_t)blockIdx.x * PREPARE_THREADS + threadIdx.x, item = thread / chunks;
  if (thread < (int64_t)H * T) {
    p.s.lse2[pass_row(c.shape, (int)(thread / T), (int)(thread % T), 0).line] = c.lse[thread] * LOG2E;
    p.s.turn[thread] = 0;
  }
  if (thread == 0) *p.s.taken = 0;
  int position = (int)(item / H), head = (int)(item % H);
  float sum = 0;
  if (position < batch_used(c.b)) {
    int64_t at = ((int64_t)c.b.row[position] * H + head) * D + thread % chunks * 8;
    float x[8], y[8];
    load8(c.o + at, x);
    load8(c.dout + at, y);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * y[i];
  }
#pragma unroll
  for (int d = chunks / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (thread % chunks == 0 && position < T) p.s.delta[pass_row(c.shape, head, position, 0).line] = sum;
}

// A thread has 8 columns.
static __global__ void __launch_bounds__(PREPARE_THREADS) attention_finish(PassCall p) {
  await_previous();
  const BackwardCall &c = p.c;
  const int H = c.shape.H, G = c.shape.G, T = c.shape.T, chunks = D / 8;
  int64_t thread = (int64_t)blockIdx.x * PREPARE_THREADS + threadIdx.x, item = thread / chunks;
  int position = (int)(item / H), head = (int)(item % H), chunk = (int)(thread % chunks);
  bool filler = position >= batch_used(c.b);
  float4 x = make_float4(0, 0, 0, 0), y = x;
  if (!filler) {
    const PassRow own = pass_row(c.shape, head, position, position - c.b.doc_start[position]);
    const float4 *row = (const float4 *)(p.s.dq + own.line * D);
    int at = chunk / 4 * 8 + chunk % 4;
    x = row[dq_place(at, own.local)];
    y = row[dq_place(at + 4, own.local)];
  }
  float scale = c.shape.scale;
  uint4 out = quad_transpose(pack2(x.x * scale, x.y * scale), pack2(x.z * scale, x.w * scale),
                             pack2(y.x * scale, y.y * scale), pack2(y.z * scale, y.w * scale));
  if (position >= T) return;
  *(uint4 *)(c.dq + item * D + chunk * 8) = out;
  if (filler && head < G) {
    int64_t to = ((int64_t)position * G + head) * D + chunk * 8;
    *(uint4 *)(c.dk + to) = *(uint4 *)(c.dv + to) = make_uint4(0, 0, 0, 0);
  }
}

static int chunk_blocks(const PassCall *p) {
  return (int)ceil_div64((int64_t)p->c.shape.T * p->c.shape.H * (D / 8), PREPARE_THREADS);
}

void attention_pass_prepare(const PassCall *p, cudaStream_t stream) {
  CUDA_LAUNCH(attention_prepare, chunk_blocks(p), PREPARE_THREADS, 0, stream, *p);
}

void attention_pass_finish(const PassCall *p, cudaStream_t stream) {
  CUDA_LAUNCH(attention_finish, chunk_blocks(p), PREPARE_THREADS, 0, stream, *p);
}
