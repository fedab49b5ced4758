// What copies between the open device and pinned memory of this machine carry, measured: what a plan hides transfers
// by.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/pinned.h"
#include "kernels/cuda/rates.h"

#include <algorithm>
#include <vector>

enum { LARGE = 64 << 20, SMALL = 1 << 20 }; // bytes of a copy: of the size of activations, and one that latency rules
// Large copies each have their own part of the host's memory, a gigabyte in all: from one to the next their rate
// differs by up to 4%, and so does that of the same copies a little later.
enum { COPIES = 8, SMALL_COPIES = 64, DIRECTIONS = 2 };
// Rates are medians of so many times, a third of a second in all: what else the host does takes a fifth of both
// directions' rate for moments (39 to 52 GB/s from one run to the next, when it was measured once).
enum { ROUNDS = 5 };

// Copies in one direction: where from, where to, on which stream; an event before each and one after the last.
typedef struct Direction {
  cudaMemcpyKind kind;
  char *device, *host;
  cudaStream_t stream;
  std::vector<cudaEvent_t> event;
} Direction;

static void copies_start(Direction *d, int copies, size_t bytes) {
  for (int i = 0; i <= copies; i++) {
    CUDA_CHECK(cudaEventRecord(d->event[i], d->stream));
    if (i == copies) break;
    char *host = d->host + i % COPIES * bytes;
    char *to = d->kind == cudaMemcpyDeviceToHost ? host : d->device;
    char *from = d->kind == cudaMemcpyDeviceToHost ? d->device : host;
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, d->kind, d->stream));
  }
}

// Seconds of a copy: the mean, for some are slower, and a step waits for those too.
static double copies_end(const Direction *d, int copies) {
  float ms = 0;
  CUDA_CHECK(cudaEventSynchronize(d->event[copies]));
  CUDA_CHECK(cudaEventElapsedTime(&ms, d->event[0], d->event[copies]));
  return ms * 1e-3 / copies;
}

static double alone(Direction *d) {
  double rate[ROUNDS];
  for (double &r : rate) {
    copies_start(d, COPIES, LARGE);
    r = LARGE / copies_end(d, COPIES);
  }
  return median_f64(rate, ROUNDS);
}

// The second one is given more, so that the first has company to its end; what it has left then is left out.
static void together(Direction *first, Direction *second, double *first_rate, double *second_rate) {
  double rate[DIRECTIONS][ROUNDS];
  for (int i = 0; i < ROUNDS; i++) {
    copies_start(first, 2 * COPIES, LARGE);
    copies_start(second, 4 * COPIES, LARGE);
    rate[0][i] = LARGE / copies_end(first, 2 * COPIES);
    rate[1][i] = LARGE / copies_end(second, 2 * COPIES);
    CUDA_CHECK(cudaStreamSynchronize(second->stream));
  }
  *first_rate = median_f64(rate[0], ROUNDS);
  *second_rate = median_f64(rate[1], ROUNDS);
}

// What a copy takes besides its bytes, among others on the same stream.
static double latency(Direction *d, double rate) {
  copies_start(d, SMALL_COPIES, SMALL);
  return std::max(0.0, copies_end(d, SMALL_COPIES) - SMALL / rate);
}

LinkRates link_measure(cudaStream_t d2h, cudaStream_t h2d) {
  LinkRates r = {};
  void *device = NULL;
  char *host = (char *)pinned_alloc(DIRECTIONS * COPIES * (size_t)LARGE);
  if (!host) return r;
  if (cudaMalloc(&device, DIRECTIONS * (size_t)LARGE) != cudaSuccess) {
    cudaGetLastError();
    pinned_release(host);
    return r;
  }
  Direction down = {cudaMemcpyDeviceToHost, (char *)device, host, d2h, {}};
  Direction up = {cudaMemcpyHostToDevice, (char *)device + LARGE, host + COPIES * (size_t)LARGE, h2d, {}};
  for (Direction *d : {&down, &up})
    for (int i = 0; i <= SMALL_COPIES; i++) {
      d->event.push_back(NULL);
      CUDA_CHECK(cudaEventCreate(&d->event[i]));
    }
  r.d2h = alone(&down);
  r.h2d = alone(&up);
  together(&down, &up, &r.both_d2h, &r.both_h2d);
  r.latency = std::max(latency(&down, r.d2h), latency(&up, r.h2d));
  for (Direction *d : {&down, &up})
    for (cudaEvent_t e : d->event) CUDA_CHECK(cudaEventDestroy(e));
  CUDA_CHECK(cudaFree(device));
  pinned_release(host);
  return r;
}
