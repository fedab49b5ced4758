#include "tests/gpu/cuda_bench.h"
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>

enum { COPIES = 6, LAUNCHES = 12, SAMPLES = 5 };
static const double sample_seconds = 6e-3; // long calls are launched fewer times, but twice at least

// Measured once, and said before the first op.
static DeviceRates device_rates(void) {
  static DeviceRates r;
  if (r.flops > 0) return r;
  r = backend_cuda.rates();
  if (!(r.bytes > 0)) panic("the device has no memory free to measure it");
  printf("floors: bytes at %.2f TB/s (a copy of 256 MB); FLOPs at %.0f TFLOP/s (%s); L2 %.0f MB\n", r.bytes / 1e12,
         r.flops / 1e12,
         r.flops_measured ? "cuBLASLt, best of 2048^3 to 8192^3" : "four fifths of the data sheet: no cuBLASLt",
         (double)backend_cuda.cache_bytes() / 1e6);
  return r;
}

static double linear_flops(const CudaCase *c, const OpArgs *a) {
  const BatchDims *b = c->ops.batch.dims;
  const int *in = a->linear.in_dim, *out = a->linear.out_dim;
  double text = b->n_text, image = b->n_image;
  switch (a->linear.extent) {
  case EXT_ROWS:
    return 2 * (text + image) * in[0] * out[0];
  case EXT_SPLIT:
    return 2 * text * in[0] * out[0] + 2 * image * in[1] * out[1];
  case EXT_IMAGE:
    return 2 * image * in[0] * out[0];
  case EXT_SEGMENTS:
    break;
  }
  return 2.0 * (b->n_segments - 1) * in[0] * out[0];
}

// Of the matrix products at this pack's extents; 0 for ops that only move bytes.
static double call_flops(const CudaCase *c, OpKind kind, const OpArgs *a) {
  const Dims *d = &c->ops.dims;
  const BatchDims *b = c->ops.batch.dims;
  double C = d->C, text = b->n_text, image = b->n_image;
  double expert = 2 * C * (text * d->K[TEXT] * d->F[TEXT] + image * d->K[IMAGE] * d->F[IMAGE]);
  double shared = 2 * C * (text * d->S[TEXT] + image * d->S[IMAGE]);
  double router = 2 * C * (text * d->E[TEXT] + image * d->E[IMAGE]);
  switch (kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    return linear_flops(c, a);
  case OP_ATTENTION_FWD:
    return 4 * (double)batch_pairs(&c->ops.batch) * d->H * d->D;
  case OP_ATTENTION_BWD:
  case OP_ATTENTION_ROPE_BWD:
    return 10 * (double)batch_pairs(&c->ops.batch) * d->H * d->D;
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_UP_DGRAD:
  case OP_EXPERT_UP_WGRAD:
    return 2 * expert;
  case OP_EXPERT_DOWN_FWD:
  case OP_EXPERT_DOWN_BWD:
  case OP_EXPERT_DOWN_WGRAD:
    return expert;
  case OP_SHARED_UP_FWD:
    return 2 * shared;
  case OP_SHARED_DOWN_BWD:
    return shared;
  case OP_ROUTER_FWD:
    return router;
  case OP_ROUTER_BWD:
    return 2 * router;
  case OP_MOD_FWD:
    return 2.0 * (b->n_segments - 1) * d->Z * d->M;
  case OP_HEAD_CE:
    return 6.0 * b->n_target * C * d->V;
  case OP_HEAD_LOGITS:
    return 2.0 * b->n_target * C * d->V;
  default:
    return 0;
  }
}

// Each operand once; one that accumulates is read and written.
static double call_bytes(const CudaCase *c, OpKind kind, const Value *in, const Value *out) {
  double bytes = 0;
  for (int i = 0; i < OP_MAX_IN; i++)
    if (in[i].data) bytes += (double)in[i].used * (double)backend_cuda.dtype_bytes[in[i].dtype];
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (out[i].data && !out[i].anything)
      bytes += (out[i].fresh ? 1 : 2) * (double)out[i].used * (double)backend_cuda.dtype_bytes[out[i].dtype];
  if (kind == OP_NOISE) bytes += (double)c->ops.batch.dims->n_image * c->ops.dims.P; // pixels
  if (kind == OP_FLOW_LOSS) bytes += (double)in[0].used;                             // one for each element
  return bytes;
}

// What is timed is not the backend's own way: a twin with kernels in place of one, or a part of an op.
static bool other_way(const CudaCase *c, OpKind kind) {
  return c->backend->fn[kind] != backend_cuda.fn[kind];
}

// What the kernels of such a way read and write: those of kernels/cuda/adaln_unfused.cu, in [rows, C] tensors (nothing
// with silu is timed), and the pass of HEAD_CE over its logits.
static double other_bytes(const CudaCase *c, OpKind kind, const OpArgs *a, const Value *in) {
  const BatchDims *b = c->ops.batch.dims;
  bool branch = in[kind == OP_ADALN_FWD ? IN_AT(ADALN_FWD, branch) : IN_AT(ADALN_BWD, branch)].data != NULL;
  double tensors;
  switch (kind) {
  case OP_ADALN_FWD: // residual; norm, modulate
    tensors = 3 * branch + 2 + 2;
    break;
  case OP_ADALN_BWD: // residual; normalise, modulation, norm; add; gate
    tensors =
        3 * (branch && !a->adaln.x_is_new) + 2 + 3 + 3 + 3 * (in[IN_AT(ADALN_BWD, dxnew)].data != NULL) + 3 * branch;
    break;
  case OP_HEAD_CE: // logits in fp32, their gradient in bf16
    return (4.0 + 2.0) * b->n_target * c->ops.dims.V;
  default:
    panic("%s has no other way that is timed", op_info[kind].name);
  }
  return tensors * (b->n_text + b->n_image) * c->ops.dims.C * 2;
}

static void device_copy(char *to, const char *from, size_t bytes) {
  const OpArgs args = {.span = {.count = (int64_t)bytes}};
  const KernelCall c = {.in.COPY = {.src = from},
                        .out.COPY = {.dst = to},
                        .args = &args,
                        .stream = backend_cuda.queues->stream(LANE_COMPUTE)};
  backend_cuda.fn[OP_COPY](&c);
}

// What the host holds of an operand, and again behind it until all of its region is full.
static void operand_upload(const Value *v, char *to, size_t bytes) {
  const size_t held = (size_t)v->held * backend_cuda.dtype_bytes[v->dtype];
  if (!v->data || v->fresh) return;
  char *image = xcalloc(held, 1);
  operand_image(v, image);
  backend_cuda.upload(to, image, held);
  free(image);
  for (size_t full = held; full < bytes; full *= 2)
    device_copy(to + full, to, full < bytes - full ? full : bytes - full);
}

// Seconds of one call, whose operands lie in memory that others have not just used.
static double call_seconds(KernelFn fn, const KernelCall *call) {
  const Queues *q = backend_cuda.queues;
  q->record(LANE_COMPUTE, 0);
  fn(call);
  q->record(LANE_COMPUTE, 1);
  return q->seconds(0, 1);
}

TimedCall timed_call_new(const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in, const Value *out) {
  const Queues *q = backend_cuda.queues;
  const KernelFn fn = c->backend->fn[kind];
  DeviceCall copy[COPIES];
  TimedCall t;
  device_call_plan(&copy[0], c, kind, args, in, out);
  size_t bytes = copy[0].bytes;
  int copies = (int)min_i64(COPIES, 4 * backend_cuda.cache_bytes() / (int64_t)bytes + 1); // four times what L2 holds
  t.memory = backend_cuda.alloc(bytes * (size_t)copies);
  if (!t.memory) panic("%s: the device has no %zu MB to time it", op_info[kind].name, bytes * (size_t)copies >> 20);
  backend_cuda.clear(t.memory, bytes);
  for (int i = 0; i < OP_MAX_IN; i++) operand_upload(&in[i], t.memory + copy[0].in_at[i].at, copy[0].in_at[i].bytes);
  for (int i = 0; i < OP_MAX_OUT; i++)
    operand_upload(&out[i], t.memory + copy[0].out_at[i].at, copy[0].out_at[i].bytes);
  backend_cuda.upload(t.memory + copy[0].pack.at, c->ops.batch.dims, copy[0].pack.bytes);
  for (int i = 0; i < copies; i++) {
    if (i) copy[i] = copy[0];
    device_call_bind(&copy[i], c, t.memory + (size_t)i * bytes);
    if (i) device_copy(t.memory + (size_t)i * bytes, t.memory, bytes);
  }
  call_seconds(fn, &copy[0].call); // loads the module, outside of the capture
  t.launches = (int)fmin(LAUNCHES, fmax(2, sample_seconds / call_seconds(fn, &copy[0].call)));
  q->capture_begin();
  for (int i = 0; i < t.launches; i++) fn(&copy[i % copies].call);
  t.graph = q->capture_end();
  return t;
}

double timed_call_seconds(const TimedCall *t) {
  const Queues *q = backend_cuda.queues;
  double sample[SAMPLES];
  q->graph_launch(t->graph);
  for (int s = 0; s < SAMPLES; s++) {
    q->record(LANE_COMPUTE, 0);
    q->graph_launch(t->graph);
    q->record(LANE_COMPUTE, 1);
    sample[s] = q->seconds(0, 1) / t->launches;
  }
  return median_f64(sample, SAMPLES);
}

void timed_call_free(TimedCall *t) {
  backend_cuda.queues->graph_free(t->graph);
  backend_cuda.release(t->memory);
}

void cuda_bench_call(const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in, const Value *out) {
  DeviceRates rates = device_rates(); // before an op fills the device
  TimedCall t = timed_call_new(c, kind, args, in, out);
  bool other = other_way(c, kind);
  double seconds = timed_call_seconds(&t), flops = other ? 0 : call_flops(c, kind, args);
  double moved = other ? other_bytes(c, kind, args, in) : call_bytes(c, kind, in, out);
  double floor = fmax(moved / rates.bytes, flops / rates.flops);
  printf("%-18s %-44.44s %9.4f ms %8.0f GB/s %7.1f TFLOP/s %5.1f%% of %s\n", op_info[kind].name, c->what, seconds * 1e3,
         moved / seconds / 1e9, flops / seconds / 1e12, 100 * floor / seconds,
         other ? "its kernels' bytes" : "the floor");
  fflush(stdout);
  timed_call_free(&t);
}
