// What copies between the open device and pinned memory of this machine carry, measured: what a plan hides transfers
// by.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/pinned.h"
#include "kernels/cuda/rates.h"

#include <algorithm>
#include <vector>

enum { LARGE = 128 << 20, SMALL = 1 << 20 }; // bytes of a copy: of the size of activations, and one that latency rules
enum { COPIES = 6, SMALL_COPIES = 64, DIRECTIONS = 2 };

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
    char *to = d->kind == cudaMemcpyDeviceToHost ? d->host : d->device;
    char *from = d->kind == cudaMemcpyDeviceToHost ? d->device : d->host;
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, d->kind, d->stream));
  }
}

// Seconds of the median copy.
static double copies_end(const Direction *d, int copies) {
  std::vector<float> ms(copies);
  CUDA_CHECK(cudaEventSynchronize(d->event[copies]));
  for (int i = 0; i < copies; i++) CUDA_CHECK(cudaEventElapsedTime(&ms[i], d->event[i], d->event[i + 1]));
  std::nth_element(ms.begin(), ms.begin() + copies / 2, ms.end());
  return ms[copies / 2] * 1e-3;
}

static double alone(Direction *d) {
  copies_start(d, COPIES, LARGE);
  return LARGE / copies_end(d, COPIES);
}

// What a copy takes besides its bytes, among others on the same stream.
static double latency(Direction *d, double rate) {
  copies_start(d, SMALL_COPIES, SMALL);
  return std::max(0.0, copies_end(d, SMALL_COPIES) - SMALL / rate);
}

LinkRates link_measure(cudaStream_t d2h, cudaStream_t h2d) {
  LinkRates r = {};
  void *device = NULL;
  char *host = (char *)pinned_alloc(DIRECTIONS * (size_t)LARGE);
  if (!host) return r;
  if (cudaMalloc(&device, DIRECTIONS * (size_t)LARGE) != cudaSuccess) {
    cudaGetLastError();
    pinned_release(host);
    return r;
  }
  Direction down = {cudaMemcpyDeviceToHost, (char *)device, host, d2h, {}};
  Direction up = {cudaMemcpyHostToDevice, (char *)device + LARGE, host + LARGE, h2d, {}};
  for (Direction *d : {&down, &up})
    for (int i = 0; i <= SMALL_COPIES; i++) {
      d->event.push_back(NULL);
      CUDA_CHECK(cudaEventCreate(&d->event[i]));
    }
  r.d2h = alone(&down);
  r.h2d = alone(&up);
  // The second one is given more, so that the first has company to its end; what it has left then is left out.
  copies_start(&down, COPIES, LARGE);
  copies_start(&up, 2 * COPIES, LARGE);
  r.both_d2h = LARGE / copies_end(&down, COPIES);
  r.both_h2d = LARGE / copies_end(&up, COPIES);
  CUDA_CHECK(cudaStreamSynchronize(h2d));
  r.latency = std::max(latency(&down, r.d2h), latency(&up, r.h2d));
  for (Direction *d : {&down, &up})
    for (cudaEvent_t e : d->event) CUDA_CHECK(cudaEventDestroy(e));
  CUDA_CHECK(cudaFree(device));
  pinned_release(host);
  return r;
}
