// The CUDA backend: its table of kernels, memory, queues and graphs of one GPU.
#include "kernels/cuda/adaln.h"
#include "kernels/cuda/collectives.h"
#include "kernels/cuda/experts.h"
#include "kernels/cuda/nccl.h"
#include "kernels/cuda/pinned.h"
#include "kernels/cuda/rates.h"
#include "kernels/master.h"

extern "C" {
#include "base/base.h"
#include "base/ranks.h"
#include "model/config/config.h"
}

#include <algorithm>
#include <nvtx3/nvToolsExt.h>
#include <unistd.h>
#include <vector>

// The one GPU of this process. Set by cuda_open.
static struct {
  int device;  // its number
  int sharing; // processes of the group that have it
  bool joined;
  bool graphs;                  // some were launched since the compute lane was last waited for
  bool waits;                   // kernels of this build wait for the one before themselves (await_previous)
  bool early;                   // and may begin before it has ended
  bool kernel_last[LANE_COUNT]; // what the lane was given last is a kernel
  cudaStream_t stream[LANE_COUNT];
  std::vector<cudaEvent_t> event; // made when first named
  int sm_count;
  size_t free_at_open; // bytes, when the context was there and nothing else
  double sheet_flops;  // Backend.sheet_flops
  char name[256];
} gpu;

void cuda_check(cudaError_t status, const char *what, const char *file, int line) {
  if (status != cudaSuccess)
    panic("%s:%d: %s: %s (%s)", file, line, what, cudaGetErrorString(status), cudaGetErrorName(status));
}

// Only behind a kernel, which tells when it has begun and which the next one waits for itself; never behind an event of
// another lane or a graph. Copies and clears the runtime waits for whatever is asked.
bool cuda_begins_early(cudaStream_t stream) {
  for (int l = 0; l < LANE_COUNT; l++) {
    if (gpu.stream[l] != stream) continue;
    const bool follows = gpu.kernel_last[l];
    gpu.kernel_last[l] = true;
    return follows && gpu.early;
  }
  return false;
}

int cuda_sm_count(void) {
  return gpu.sm_count ? gpu.sm_count : 132;
}

void cuda_allow_shared(const void *kernel, const char *name, size_t bytes) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status == cudaSuccess) return;
  int most = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device));
  panic("%s needs %zu bytes of shared memory a block, this GPU has %d: %s", name, bytes, most,
        cudaGetErrorString(status));
}

// ---- the device ----

// By the data sheet, dense: FLOPs a clock and multiprocessor at the clock that the sheet counts with, which is the
// highest one but on Hopper: an H100 or H200 with its 132 multiprocessors has 989 TFLOP/s there, at 1.83 GHz, and may
// run faster.
static double sheet_flops(const cudaDeviceProp *prop) {
  int khz = 1830000;
  double flops = 4096;
  if (prop->major != 9) {
    CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, gpu.device));
    flops = prop->major > 9 ? 4096 : prop->minor ? 1024 : 2048; // 8.0 is the data centre's chip of its generation
  }
  return flops * prop->multiProcessorCount * khz * 1e3;
}

static double cuda_sheet_flops(void) {
  return gpu.sheet_flops;
}

static const char *cuda_kernels(void) {
  return gpu.name;
}

// What the kernels ask of a model.
static int cuda_accepts(const Config *c, Error *err) {
  const char *hint = "change it, or train with --device cpu";
  const struct {
    const char *key;
    int width;
  } widths[] = {{"model.dim", c->model.dim},
                {"model.cond_dim", c->model.cond_dim},
                {"model.vocab", c->model.vocab},
                {"3 model.patch^2", 3 * c->model.patch * c->model.patch},
                {"model.patch_bottleneck", c->model.patch_bottleneck},
                {"model.text.expert_dim", c->model.moe[TEXT].expert_dim},
                {"model.image.expert_dim", c->model.moe[IMAGE].expert_dim},
                {"model.text.shared_dim", c->model.moe[TEXT].shared_dim},
                {"model.image.shared_dim", c->model.moe[IMAGE].shared_dim}};
  int D = c->model.head_dim;
  for (const auto &w : widths)
    if (w.width % CUDA_WIDTHS)
      return error_set(err, hint, "%s is %d: the cuda backend needs a multiple of %d", w.key, w.width, CUDA_WIDTHS);
  if (D != 32 && D != 64 && D != 128)
    return error_set(err, hint, "model.head_dim is %d: the cuda backend needs 32, 64 or 128", D);
  if (c->model.dim > CUDA_MOST_DIM)
    return error_set(err, hint, "model.dim is %d: the cuda backend goes to %d", c->model.dim, CUDA_MOST_DIM);
  for (int m = 0; m < MODALITIES; m++)
    if (c->model.moe[m].experts > CUDA_MOST_EXPERTS || c->model.moe[m].top_k > CUDA_MOST_CHOSEN)
      return error_set(err, hint, "model.%s has %d experts, top_k %d: the cuda backend goes to %d and %d",
                       m == TEXT ? "text" : "image", c->model.moe[m].experts, c->model.moe[m].top_k, CUDA_MOST_EXPERTS,
                       CUDA_MOST_CHOSEN);
  return 0;
}

// Any kernel, for what the build has code for.
__global__ void build_probe(void) {}

static int cuda_open(Error *err) {
  if (gpu.sm_count) return 0;
  static const char use_cpu[] = "--device cpu trains on the processor";
  int driver = 0, runtime = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return error_set(err, use_cpu, "--device cuda: there is no NVIDIA driver on this machine");
  if (driver / 1000 < runtime / 1000) {
    error_set(err, "update the driver, or build with the CUDA toolkit that belongs to it",
              "--device cuda: the NVIDIA driver is for CUDA %d.%d, this build needs CUDA %d.%d", driver / 1000,
              driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    return -2;
  }
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess || devices == 0)
    return error_set(err, use_cpu, "--device cuda: no GPU is visible: %s",
                     status == cudaSuccess ? "the driver lists none" : cudaGetErrorString(status));
  // Where a launcher shows each process a GPU of its own, there is one.
  gpu.device = ranks_local() % devices;
  status = cudaSetDevice(gpu.device);
  if (status != cudaSuccess) { // another process has it, or its memory, to itself
    error_set(err, use_cpu, "--device cuda: the GPU cannot be used: %s", cudaGetErrorString(status));
    return -2;
  }
  cudaDeviceProp prop;
  cudaFuncAttributes loaded;
  CUDA_CHECK(cudaGetDeviceProperties(&prop, gpu.device));
  if (cudaFuncGetAttributes(&loaded, (const void *)build_probe) != cudaSuccess) {
    error_set(err, "make CUDA_ARCH=... builds for others; --device cpu trains on the processor",
              "--device cuda: this build has no code for %s (compute capability %d.%d)", prop.name, prop.major,
              prop.minor);
    return -2;
  }
  // The few blocks of a collective or an update go before the many of kernels, or they would only begin when those end.
  int lowest, highest;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  for (int l = 0; l < LANE_COUNT; l++)
    CUDA_CHECK(cudaStreamCreateWithPriority(&gpu.stream[l], cudaStreamNonBlocking,
                                            l == LANE_COMM || l == LANE_UPDATE ? highest : lowest));
  size_t total;
  CUDA_CHECK(cudaMemGetInfo(&gpu.free_at_open, &total));
  gpu.sm_count = prop.multiProcessorCount;
  gpu.waits = loaded.ptxVersion >= 90;
  gpu.sheet_flops = sheet_flops(&prop);
  snprintf(gpu.name, sizeof gpu.name, "%s", prop.name);
  log_info("%s, %d multiprocessors, %.1f GB", prop.name, prop.multiProcessorCount, (double)prop.totalGlobalMem / 1e9);
  return 0;
}

// Whether processes have a GPU each. -1 with *err where some share one.
static int device_alone(Error *err) {
  if (gpu.sharing == 1) return 0;
  return error_set(err,
                   "start as many processes on a host as it has GPUs, or let them go through the host's memory: "
                   "--set parallel.collectives=host, which is slow",
                   "%d processes have the GPU %s, number %d of this host's, to themselves", gpu.sharing, gpu.name,
                   gpu.device);
}

static int cuda_join(const Config *c, Error *err) {
  if (gpu.joined) return 0;
  const bool by_host = c->parallel.collectives != 0; // the other of the key's two words
  cudaDeviceProp prop;
  CUDA_CHECK(cudaGetDeviceProperties(&prop, gpu.device));
  std::vector<cudaUUID_t> all(ranks_size());
  ranks_gather(&prop.uuid, sizeof prop.uuid, all.data());
  gpu.sharing = 0;
  for (const cudaUUID_t &uuid : all) gpu.sharing += memcmp(&uuid, &prop.uuid, sizeof uuid) == 0;
  if (!by_host && (ranks_worst(device_alone(err), err) != 0 || nccl_open(err) != 0)) return -1;
  if (by_host) log_info("GPUs are connected through the host's memory: slow, and steps have no graphs where they meet");
  gpu.joined = true;
  return 0;
}

bool cuda_is_joined(void) {
  return gpu.joined;
}

int cuda_sm_count_beside(void) {
  return cuda_sm_count() - (gpu.joined ? std::min<int>(COLLECTIVE_BLOCKS, cuda_sm_count() / 2) : 0);
}

static void cuda_leave(void) {
  nccl_close();
  gpu.joined = false;
}

// Of the processes that share the GPU: what is free now, less room for the driver's own needs (graphs, module code).
// Without a GPU, a plan is for one that has all it asks for.
static int64_t cuda_memory(void) {
  size_t free_bytes, total;
  if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
    cudaGetLastError();
    return INT64_MAX;
  }
  const size_t own = (size_t)512 << 20;
  return free_bytes > own ? (int64_t)(free_bytes - own) / std::max(gpu.sharing, 1) : 0;
}

static int64_t cuda_in_use(void) {
  size_t free_bytes, total;
  CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
  return (int64_t)gpu.free_at_open - (int64_t)free_bytes;
}

static cudaEvent_t event_at(int number) {
  while ((int)gpu.event.size() <= number) {
    cudaEvent_t e;
    CUDA_CHECK(cudaEventCreate(&e));
    gpu.event.push_back(e);
  }
  return gpu.event[number];
}

static int64_t cuda_cache_bytes(void) {
  int bytes = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, gpu.device));
  return bytes;
}

static DeviceRates cuda_rates(void) {
  return rates_measure(gpu.sheet_flops, gpu.stream[LANE_COMPUTE]);
}

bool cuda_was_allocated(cudaError_t status) {
  if (status == cudaSuccess) return true;
  cudaGetLastError();
  CUDA_CHECK(cudaDeviceSynchronize());
  return false;
}

// Not cleared: compute-sanitizer's initcheck shall see what is read before it was written.
static void *cuda_alloc(size_t bytes) {
  void *p = NULL;
  return cuda_was_allocated(cudaMalloc(&p, bytes)) ? p : NULL;
}

static void cuda_release(void *p) {
  CUDA_CHECK(cudaFree(p));
}

// A thread that was just started has the first GPU until it says otherwise.
void cuda_use_device(void) {
  CUDA_CHECK(cudaSetDevice(gpu.device));
}

// Waits until `query` says that something has happened. A process alone leaves that to the driver; among several it
// looks after the others meanwhile.
template <class Query> static void await(Query query) {
  const useconds_t nap = 20;
  cudaError_t status;
  while ((status = query()) == cudaErrorNotReady) {
    nccl_check();
    usleep(nap);
  }
  CUDA_CHECK(status);
}

static void stream_finish(cudaStream_t stream) {
  if (gpu.joined) await([=] { return cudaStreamQuery(stream); });
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

void cuda_await_graphs(void) {
  if (gpu.graphs) stream_finish(gpu.stream[LANE_COMPUTE]);
  gpu.graphs = false;
}

static void cuda_upload(void *device, const void *host, size_t bytes) {
  cuda_use_device();
  CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, gpu.stream[LANE_COMPUTE]));
  // Pageable memory has been read when the call returns; pinned memory has not.
  stream_finish(gpu.stream[LANE_COMPUTE]);
}

static void cuda_download(void *host, const void *device, size_t bytes) {
  cuda_use_device();
  CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, gpu.stream[LANE_COMPUTE]));
  stream_finish(gpu.stream[LANE_COMPUTE]);
}

static void cuda_clear(void *device, size_t bytes) {
  CUDA_CHECK(cudaMemsetAsync(device, 0, bytes, gpu.stream[LANE_COMPUTE]));
}

static LinkRates cuda_link(void) {
  const LinkRates none = {};
  if (!gpu.sm_count) return none;
  return link_measure(gpu.stream[LANE_D2H], gpu.stream[LANE_H2D]);
}

// ---- queues ----

static void *queue_stream(Lane lane) {
  return gpu.stream[lane];
}

static void queue_record(Lane lane, int event) {
  CUDA_CHECK(cudaEventRecord(event_at(event), gpu.stream[lane]));
}

static void queue_wait(Lane lane, int event) {
  gpu.kernel_last[lane] = false;
  CUDA_CHECK(cudaStreamWaitEvent(gpu.stream[lane], event_at(event), 0));
}

static void queue_finish(int event) {
  if (gpu.joined) await([=] { return cudaEventQuery(event_at(event)); });
  CUDA_CHECK(cudaEventSynchronize(event_at(event)));
}

static double queue_seconds(int from, int to) {
  float ms = 0;
  cudaError_t status = cudaEventElapsedTime(&ms, event_at(from), event_at(to));
  if (status == cudaErrorNotReady) {
    cudaGetLastError(); // no error, but it would look like one to the next launch
    queue_finish(to);
    status = cudaEventElapsedTime(&ms, event_at(from), event_at(to));
  }
  CUDA_CHECK(status);
  return (double)ms / 1e3;
}

static void queue_range(const char *name) {
  if (name)
    nvtxRangePushA(name);
  else
    nvtxRangePop();
}

static void queue_overlap(int on) {
  gpu.early = on && gpu.waits;
}

static void queue_capture_begin(void) {
  gpu.kernel_last[LANE_COMPUTE] = false;
  CUDA_CHECK(cudaStreamBeginCapture(gpu.stream[LANE_COMPUTE], cudaStreamCaptureModeThreadLocal));
}

static void *queue_capture_end(void) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_CHECK(cudaStreamEndCapture(gpu.stream[LANE_COMPUTE], &graph));
  CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CUDA_CHECK(cudaGraphDestroy(graph));
  return exec;
}

static void queue_graph_launch(void *graph) {
  gpu.graphs = true;
  gpu.kernel_last[LANE_COMPUTE] = false;
  CUDA_CHECK(cudaGraphLaunch((cudaGraphExec_t)graph, gpu.stream[LANE_COMPUTE]));
}

static void queue_graph_free(void *graph) {
  CUDA_CHECK(cudaStreamSynchronize(gpu.stream[LANE_COMPUTE]));
  CUDA_CHECK(cudaGraphExecDestroy((cudaGraphExec_t)graph));
}

// ---- ways of computing an op ----

#define OWN(op, scratch)                                                                                               \
  { OP_##op, NULL, cuda_##op, scratch, 0, NULL }
#define UNFUSED(op)                                                                                                    \
  { OP_##op, "unfused", cuda_##op##_unfused, adaln_unfused_scratch, 0, NULL }
#define GROUPED(op)                                                                                                    \
  { OP_##op, "grouped", cuda_##op##_grouped, expert_grouped_scratch, 0, NULL }
#define LOOP(op)                                                                                                       \
  { OP_##op, "loop", cuda_##op##_loop, expert_loop_scratch, 1, cublas_lt_missing }

// Those of ops that need scratch memory; all others' stand in the op table alone.
static const KernelWay own_ways[] = {
    OWN(LINEAR_FWD, linear_scratch),
    OWN(LINEAR_DGRAD, linear_scratch),
    OWN(LINEAR_WGRAD, linear_scratch),
    OWN(EXPERT_UP_FWD, expert_scratch),
    OWN(EXPERT_DOWN_FWD, expert_scratch),
    OWN(EXPERT_DOWN_BWD, expert_scratch),
    OWN(EXPERT_DOWN_WGRAD, expert_scratch),
    OWN(EXPERT_UP_DGRAD, expert_scratch),
    OWN(EXPERT_UP_WGRAD, expert_scratch),
    OWN(HEAD_CE, head_scratch),
    OWN(HEAD_LOGITS, head_scratch),
    OWN(ADALN_FWD, adaln_scratch),
    OWN(ADALN_BWD, adaln_scratch),
    OWN(COMBINE_ADALN_FWD, adaln_scratch),
    OWN(COMBINE_ADALN_BWD, adaln_scratch),
    OWN(QKNORM_ROPE_FWD, rope_scratch),
    OWN(QKNORM_ROPE_BWD, rope_scratch),
    OWN(ATTENTION_FWD, attention_fwd_scratch),
    OWN(ATTENTION_BWD, attention_bwd_scratch),
    OWN(ATTENTION_ROPE_BWD, rope_scratch),
    OWN(ROUTER_FWD, router_scratch),
    OWN(ROUTER_LOSS, router_scratch),
    OWN(ROUTER_BWD, router_scratch),
    OWN(NOISE, flow_scratch),
    OWN(FLOW_LOSS, flow_scratch),
    OWN(GRAD_SQUARES, update_scratch),
};

#define THROUGH_HOST(op)                                                                                               \
  { OP_##op, "host", cuda_##op##_host, NULL, 1, NULL }

static const KernelWay other_ways[] = {
    // parallel.collectives: copies to the host, messages there, and back.
    THROUGH_HOST(ALL_REDUCE),
    THROUGH_HOST(REDUCE_SCATTER),
    THROUGH_HOST(ALL_GATHER),
    // kernels.adaln: residual, norm, modulation, activation and mask as kernels of their own.
    UNFUSED(ADALN_FWD),
    UNFUSED(ADALN_BWD),
    {OP_COMBINE_ADALN_FWD, "unfused", NULL, NULL, 0, NULL},
    {OP_COMBINE_ADALN_BWD, "unfused", NULL, NULL, 0, NULL},
    // kernels.moe_gemm: tiles of one kind for both modalities; or a library product for every expert, whose extents the
    // host waits for.
    GROUPED(EXPERT_UP_FWD),
    GROUPED(EXPERT_DOWN_FWD),
    GROUPED(EXPERT_DOWN_BWD),
    GROUPED(EXPERT_DOWN_WGRAD),
    GROUPED(EXPERT_UP_DGRAD),
    GROUPED(EXPERT_UP_WGRAD),
    LOOP(EXPERT_UP_FWD),
    LOOP(EXPERT_DOWN_FWD),
    LOOP(EXPERT_DOWN_BWD),
    LOOP(EXPERT_DOWN_WGRAD),
    LOOP(EXPERT_UP_DGRAD),
    LOOP(EXPERT_UP_WGRAD),
};

// ---- the table ----

static Backend backend_make(void) {
  static const Queues queues = {queue_stream,       queue_record,     queue_wait,          queue_finish,
                                queue_seconds,      queue_range,      queue_capture_begin, queue_capture_end,
                                queue_graph_launch, queue_graph_free, queue_overlap};
  Backend b = {};
  b.name = "cuda";
  b.dtype_bytes[DT_ACT] = 2;
  b.dtype_bytes[DT_REAL] = 4;
  b.dtype_bytes[DT_I32] = 4;
  b.dtype_bytes[DT_U8] = 1;
  b.dtype_bytes[DT_F64] = 8;
  b.dtype_bytes[DT_MOMENT] = 4;
  b.head_chunk = 4096;
  b.remainder_bytes = sizeof(uint16_t);
  b.weights_read = masters_join;
  b.weights_write = masters_split;
#define OP_ROW(name, ...) b.fn[OP_##name] = cuda_##name;
  OP_LIST(OP_ROW)
#undef OP_ROW
  for (const KernelWay &way : own_ways) b.scratch[way.op] = way.scratch;
  b.ways = other_ways;
  b.n_ways = sizeof other_ways / sizeof *other_ways;
  b.note = expert_note;
  b.queues = &queues;
  b.accepts = cuda_accepts;
  b.open = cuda_open;
  b.join = cuda_join;
  b.leave = cuda_leave;
  b.kernels = cuda_kernels;
  b.sheet_flops = cuda_sheet_flops;
  b.rates = cuda_rates;
  b.link = cuda_link;
  b.in_use = cuda_in_use;
  // An H200's, in a socket of fifth-generation PCI Express.
  b.assumed = {4.2e12, 710e12, 0};
  b.multiprocessors = 132;
  b.assumed_link = {55.3e9, 55.3e9, 48.9e9, 48.9e9, 10e-6};
  // NCCL between two that NVLink connects, on some of 132 multiprocessors.
  b.assumed_group = {252e9, 269e9, 25e-6, COLLECTIVE_BLOCKS / 132.0, 0};
  b.cache_bytes = cuda_cache_bytes;
  b.memory = cuda_memory;
  b.alloc_unit = 2 << 20;
  b.host_bytes_mapped = 4096 / 8; // a page by each entry, even where the host has them in huge ones
  b.alloc = cuda_alloc;
  b.release = cuda_release;
  b.host_alloc = pinned_alloc;
  b.host_release = pinned_release;
  b.upload = cuda_upload;
  b.download = cuda_download;
  b.clear = cuda_clear;
  return b;
}

extern "C" const Backend backend_cuda = backend_make();
