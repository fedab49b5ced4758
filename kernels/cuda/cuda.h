// What the CUDA kernels share: types, launches that are checked, 16-byte accesses. Sums: sums.h.
//
// Activations and weights are bf16, everything else fp32; arithmetic is fp32. Nothing here uses float atomics: the same
// inputs give the same bits.
#ifndef TESSERA_CUDA_H
#define TESSERA_CUDA_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>

extern "C" {
#include "kernels/kernels.h"
}

typedef __nv_bfloat16 bf16;

// What the kernels are made for; cuda_accepts refuses other models. head_dim is 32, 64 or 128.
enum {
  CUDA_WIDTHS = 8,         // C, F, S, Z, P, V, H D and G D are multiples of it, so that every row begins on 16 bytes
  CUDA_MOST_DIM = 4096,    // C
  CUDA_MOST_EXPERTS = 256, // of a modality
  CUDA_MOST_CHOSEN = 8     // experts of a token
};
static_assert(CUDA_WIDTHS * sizeof(bf16) == 16, "rows are accessed 16 bytes at a time");

// Shared memory of a block, in bytes: of every card without asking, and of Hopper at most.
enum { CUDA_STATIC_SHARED = 48 << 10, CUDA_HOPPER_SHARED = 227 << 10 };

// Ends the process, naming the call, when it failed: nothing after it could be trusted.
void cuda_check(cudaError_t status, const char *what, const char *file, int line);
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

// Whether there was enough memory: the caller says better what did not fit. Any call may also return the error of a
// kernel before it, which ends the process here.
bool cuda_was_allocated(cudaError_t status);

// kernel<<<grid, block, shared, stream>>>(...), with the launch checked. `kernel` needs parentheses if it has commas.
// On Hopper its blocks may be there before the kernel that the stream was given last has ended (kernels.pdl): every
// kernel begins with await_previous().
#define CUDA_LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
  cuda_check(cuda_launch(kernel, grid, block, shared, stream, __VA_ARGS__), #kernel, __FILE__, __LINE__)

// Whether the kernel that the stream is given next may begin early; it counts as given.
bool cuda_begins_early(cudaStream_t stream);

// Keeps a template from being deduced by an argument: what is given becomes the kernel's parameter.
template <class T> struct Converted { typedef T type; };
template <class... P>
static inline cudaError_t cuda_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                                      typename Converted<P>::type... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = cuda_begins_early(stream) ? 1 : 0;
  void *pointers[] = {&arguments...};
  return cudaLaunchKernelExC(&config, (const void *)kernel, pointers);
}

// The first statement of a kernel, or the first after what touches no memory of the device: until the kernel that its
// stream was given before has ended and all that it wrote is there. scripts/nvcc_strict.sh refuses a kernel that has it
// too late or not.
//
// `admits`: the next kernel's blocks come as soon as this one's leave room, to wait here themselves; else when this
// one's have all ended. Blocks that end at very different times do not admit any: the multiprocessors that are free
// first would get all blocks of a kernel that has as many as fill the card, and it would take up to twice as long.
static __device__ inline void await_previous(bool admits = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (admits) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A kernel that wants more than 48 KiB of dynamic shared memory says so before each launch (cheap, legal in a capture).
// Ends the process where a multiprocessor has less.
void cuda_allow_shared(const void *kernel, const char *name, size_t bytes);
#define CUDA_ALLOW_SHARED(kernel, bytes) cuda_allow_shared((const void *)(kernel), #kernel, (bytes))

static inline cudaStream_t call_stream(const KernelCall *c) {
  return (cudaStream_t)c->stream;
}

// Called first by what threads of any kind call, before they use the GPU.
void cuda_use_device(void);

// Waits for graphs that were launched, if there are any under way.
void cuda_await_graphs(void);

// Whether collectives may have some of the multiprocessors.
bool cuda_is_joined(void);
enum { COLLECTIVE_BLOCKS = 24 }; // of them, at most: as many as NCCL takes by itself between two H200

// Multiprocessors of the GPU; before it is opened, as for a plan, those of an H100.
int cuda_sm_count(void);
// Those that collectives leave: all where there are none. For a kernel whose blocks are there all at once, and that
// would take twice as long with a few of them left for later.
int cuda_sm_count_beside(void);

// The grid of a kernel whose blocks walk through `blocks` blocks' worth of work in strides: that many, but no more than
// keep the multiprocessors busy.
static inline int grid_striding(int64_t blocks) {
  int64_t most = 8 * (int64_t)cuda_sm_count();
  return (int)(blocks < most ? blocks : most);
}

static __host__ __device__ inline int64_t ceil_div64(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static __host__ __device__ inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// ---- 8 bf16 in 16 bytes ----

static __device__ inline void unpack8(uint4 v, float x[8]) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(w[i] << 16);
    x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
static __device__ inline uint32_t pack2(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&v);
}
static __device__ inline uint4 pack8(const float x[8]) {
  return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}
// p must be aligned to 16 bytes.
static __device__ inline void load8(const bf16 *p, float x[8]) {
  unpack8(*reinterpret_cast<const uint4 *>(p), x);
}
static __device__ inline void store8(bf16 *p, const float x[8]) {
  *reinterpret_cast<uint4 *>(p) = pack8(x);
}

// The kernels; operands and formulas: kernels.h.
#define OP_DECLARE(name, ...) extern "C" void cuda_##name(const KernelCall *call);
OP_LIST(OP_DECLARE)
#undef OP_DECLARE

// Scratch that the ops of each family need (KernelWay.scratch), in bytes, 0 for none. Other ops need none.
size_t linear_scratch(OpKind kind, const Dims *dims, const OpArgs *args);        // LINEAR_*
size_t expert_scratch(OpKind kind, const Dims *dims, const OpArgs *args);        // EXPERT_*
size_t head_scratch(OpKind kind, const Dims *dims, const OpArgs *args);          // HEAD_*
size_t adaln_scratch(OpKind kind, const Dims *dims, const OpArgs *args);         // ADALN_*, COMBINE_ADALN_*
size_t rope_scratch(OpKind kind, const Dims *dims, const OpArgs *args);          // QKNORM_ROPE_*, ATTENTION_ROPE_BWD
size_t attention_fwd_scratch(OpKind kind, const Dims *dims, const OpArgs *args); // ATTENTION_FWD
size_t attention_bwd_scratch(OpKind kind, const Dims *dims, const OpArgs *args); // ATTENTION_BWD
size_t router_scratch(OpKind kind, const Dims *dims, const OpArgs *args);        // ROUTER_*
size_t flow_scratch(OpKind kind, const Dims *dims, const OpArgs *args);          // NOISE, FLOW_LOSS
size_t update_scratch(OpKind kind, const Dims *dims, const OpArgs *args);        // GRAD_*, ADAMW, EMA
#endif
