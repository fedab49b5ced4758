// What of NCCL is used, declared by hand: a build needs no nccl.h, and one binary runs where there is no library too.
#include "kernels/cuda/nccl.h"

extern "C" {
#include "base/base.h"
#include "base/ranks.h"
}

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct ncclComm *Communicator;
typedef struct UniqueId {
  char internal[128];
} UniqueId;
enum { OK = 0, SYSTEM_ERROR = 2, REMOTE_ERROR = 6, IN_PROGRESS = 7 }; // ncclResult_t
enum { SUM = 0 };                                                     // ncclRedOp_t
enum { CAPTURED_SINCE = 20906 };                                      // its collectives go into graphs from 2.9.6 on

static struct {
  int (*GetVersion)(int *version);
  int (*GetUniqueId)(UniqueId *id);
  int (*CommInitRank)(Communicator *comm, int size, UniqueId id, int rank);
  int (*CommDestroy)(Communicator comm);
  int (*CommAbort)(Communicator comm);
  int (*CommGetAsyncError)(Communicator comm, int *result);
  const char *(*GetErrorString)(int result);
  int (*AllReduce)(const void *from, void *to, size_t count, int type, int op, Communicator comm, cudaStream_t stream);
  int (*ReduceScatter)(const void *from, void *to, size_t count, int type, int op, Communicator comm,
                       cudaStream_t stream);
  int (*AllGather)(const void *from, void *to, size_t count, int type, Communicator comm, cudaStream_t stream);
} nccl;
static Communicator group; // NULL: not connected

static int library_open(Error *err) {
  static const char name[] = "libnccl.so.2";
  static const char hint[] = "install it (libnccl2 of NVIDIA's packages), or put the folder of one into "
                             "LD_LIBRARY_PATH, as PyTorch's site-packages/nvidia/nccl/lib; without it "
                             "--set parallel.collectives=host goes through the host's memory, slowly";
  static const struct {
    const char *name;
    void *at;
  } symbols[] = {{"ncclGetVersion", &nccl.GetVersion},         {"ncclGetUniqueId", &nccl.GetUniqueId},
                 {"ncclCommInitRank", &nccl.CommInitRank},     {"ncclCommDestroy", &nccl.CommDestroy},
                 {"ncclCommAbort", &nccl.CommAbort},           {"ncclCommGetAsyncError", &nccl.CommGetAsyncError},
                 {"ncclGetErrorString", &nccl.GetErrorString}, {"ncclAllReduce", &nccl.AllReduce},
                 {"ncclReduceScatter", &nccl.ReduceScatter},   {"ncclAllGather", &nccl.AllGather}};
  // What orders graphs and other launches at the same time costs 5% of a step (base on two H200); cuda_await_graphs
  // sees to it that there are none.
  setenv("NCCL_GRAPH_MIXING_SUPPORT", "0", 0);
  char blocks[16];
  snprintf(blocks, sizeof blocks, "%d", COLLECTIVE_BLOCKS);
  setenv("NCCL_MAX_CTAS", blocks, 0); // no more than kernels reckon with
  void *library = dlopen(name, RTLD_NOW);
  if (!library)
    return error_set(err, hint, "several processes on GPUs need NCCL, and there is no %s in the library path: %s", name,
                     dlerror());
  for (const auto &symbol : symbols) {
    void *found = dlsym(library, symbol.name);
    if (!found) return error_set(err, hint, "this %s has no %s", name, symbol.name);
    *(void **)symbol.at = found;
  }
  return 0;
}

static void check(int result, const char *what) {
  if (result != OK && result != IN_PROGRESS) panic("NCCL: %s: %s", what, nccl.GetErrorString(result));
}
#define NCCL_CHECK(call) check(nccl.call, #call)

// Begins a collective of each kind, and so the connections that NCCL makes when they are first needed: it takes their
// memory now, before the rest is planned, rather than in the first step.
static void connect_all(void) {
  const int64_t count = 1 << 22; // a small one has other connections
  void *values;
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_CHECK(cudaMalloc(&values, (size_t)count * ranks_size() * sizeof(float)));
  CUDA_CHECK(cudaMemsetAsync(values, 0, (size_t)count * ranks_size() * sizeof(float), stream));
  nccl_all_reduce(values, 1 << 10, NCCL_DOUBLE, stream);
  nccl_all_reduce(values, count * ranks_size(), NCCL_FLOAT, stream);
  nccl_reduce_scatter(values, count * ranks_size(), NCCL_FLOAT, stream);
  nccl_all_gather(values, count * ranks_size(), NCCL_BF16, stream);
  while (cudaStreamQuery(stream) == cudaErrorNotReady) nccl_check();
  CUDA_CHECK(cudaStreamSynchronize(stream));
  CUDA_CHECK(cudaFree(values));
  CUDA_CHECK(cudaStreamDestroy(stream));
}

int nccl_open(Error *err) {
  int version = 0;
  UniqueId id = {};
  if (ranks_worst(library_open(err), err) != 0) return -1;
  NCCL_CHECK(GetVersion(&version));
  if (version < CAPTURED_SINCE)
    return error_set(err, "install a newer one", "NCCL %d.%d is too old: 2.9.6 is needed", version / 1000,
                     version % 1000 / 100);
  if (ranks_rank() == 0) NCCL_CHECK(GetUniqueId(&id));
  ranks_broadcast(&id, sizeof id);
  const double began = time_now();
  NCCL_CHECK(CommInitRank(&group, ranks_size(), id, ranks_rank()));
  connect_all();
  log_info("NCCL %d.%d.%d connects %d GPUs (in %.1f s)", version / 10000, version % 10000 / 100, version % 100,
           ranks_size(), time_now() - began);
  return 0;
}

void nccl_close(void) {
  if (group) NCCL_CHECK(CommDestroy(group));
  group = NULL;
}

void nccl_check(void) {
  int result = OK;
  if (!group) return;
  NCCL_CHECK(CommGetAsyncError(group, &result));
  if (result == OK || result == IN_PROGRESS) return;
  // Where another process is gone it has said why, and the launcher is about to end this one.
  if (result == REMOTE_ERROR || result == SYSTEM_ERROR) sleep(5);
  nccl.CommAbort(group);
  panic("NCCL: the processes' GPUs are cut off from each other: %s", nccl.GetErrorString(result));
}

// The communicator for a collective on this stream: in a capture, or when no graph is under way.
static Communicator connected(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  if (!group) panic("a collective before the GPUs of the group are connected");
  CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status == cudaStreamCaptureStatusNone) cuda_await_graphs();
  return group;
}

void nccl_all_reduce(void *values, int64_t count, NcclType type, cudaStream_t stream) {
  NCCL_CHECK(AllReduce(values, values, (size_t)count, type, SUM, connected(stream), stream));
}

// The r-th of N shares, which is rank r's; where NCCL finds it there it works in place.
static char *own_share(void *values, int64_t each, NcclType type) {
  const size_t bytes = type == NCCL_DOUBLE ? sizeof(double) : type == NCCL_FLOAT ? sizeof(float) : sizeof(bf16);
  return (char *)values + (size_t)(each * ranks_rank()) * bytes;
}

void nccl_reduce_scatter(void *values, int64_t count, NcclType type, cudaStream_t stream) {
  const int64_t each = count / ranks_size();
  NCCL_CHECK(ReduceScatter(values, own_share(values, each, type), (size_t)each, type, SUM, connected(stream), stream));
}

void nccl_all_gather(void *values, int64_t count, NcclType type, cudaStream_t stream) {
  const int64_t each = count / ranks_size();
  NCCL_CHECK(AllGather(own_share(values, each, type), values, (size_t)each, type, connected(stream), stream));
}
