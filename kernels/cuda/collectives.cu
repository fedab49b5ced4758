// Ops of the process group: by NCCL from GPU to GPU, or through the memory of the host (parallel.collectives), for
// processes that share a GPU and where there is no NCCL.
#include "kernels/cuda/collectives.h"
#include "kernels/cuda/nccl.h"
#include "kernels/cuda/pinned.h"

extern "C" {
#include "base/base.h"
#include "base/ranks.h"
#include "kernels/group.h"
}

// ---- NCCL ----

static NcclType sums_type(const KernelCall *c) {
  return c->args->group.is_f64 ? NCCL_DOUBLE : NCCL_FLOAT;
}

extern "C" void cuda_ALL_REDUCE(const KernelCall *c) {
  nccl_all_reduce(c->out.ALL_REDUCE.values, c->args->group.count, sums_type(c), call_stream(c));
}

extern "C" void cuda_REDUCE_SCATTER(const KernelCall *c) {
  nccl_reduce_scatter(c->out.REDUCE_SCATTER.values, c->args->group.count, sums_type(c), call_stream(c));
}

extern "C" void cuda_ALL_GATHER(const KernelCall *c) {
  nccl_all_gather(c->out.ALL_GATHER.values, c->args->group.count, NCCL_BF16, call_stream(c));
}

// ---- through the host ----

enum { ROOM = 32 << 20 }; // bytes of pinned memory that tensors pass through

static void copy_and_wait(void *to, const void *from, size_t bytes, void *stream) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream));
  CUDA_CHECK(cudaStreamSynchronize((cudaStream_t)stream));
}

// What the stream was given before is waited for; what it is given after comes after.
static void pass(const KernelCall *c, void *values, size_t element, void (*collective)(const GroupTensor *)) {
  static char *room; // of the process, until it ends
  if (!room && !(room = (char *)pinned_alloc(ROOM))) panic("out of pinned host memory for collectives");
  const int64_t share = ROOM / (int64_t)group_room(element, 1);
  const GroupTensor t = {values, c->args->group.count, element, share, room, copy_and_wait, c->stream};
  collective(&t);
}

static size_t sums_element(const KernelCall *c) {
  return c->args->group.is_f64 ? sizeof(double) : sizeof(float);
}

extern "C" void cuda_ALL_REDUCE_host(const KernelCall *c) {
  pass(c, c->out.ALL_REDUCE.values, sums_element(c), group_all_reduce);
}

extern "C" void cuda_REDUCE_SCATTER_host(const KernelCall *c) {
  pass(c, c->out.REDUCE_SCATTER.values, sums_element(c), group_reduce_scatter);
}

extern "C" void cuda_ALL_GATHER_host(const KernelCall *c) {
  pass(c, c->out.ALL_GATHER.values, sizeof(bf16), group_all_gather);
}
