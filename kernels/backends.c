#include "kernels/backends.h"

static const Backend *host_opened(Error *err) {
  return backend_cpu.open(err) == 0 ? &backend_cpu : NULL;
}

// The device's backend: 0 with *b set, -1 with *err where there is no such device, -2 where it cannot be used.
static int device_find(const Config *c, int needs_device, const Backend **b, Error *err) {
#ifdef TESSERA_CUDA
  int missing = needs_device ? backend_cuda.open(err) : 0;
  *b = &backend_cuda;
  if (missing) return missing;
  return backend_cuda.accepts(c, err) == 0 ? 0 : -2;
#else
  (void)c, (void)needs_device, (void)b;
  error_set(err, "build it where nvcc (the CUDA toolkit) is installed, or use --device cpu",
            "--device cuda: this build has no CUDA backend");
  return -1;
#endif
}

static const Backend *backend_find(const Config *c, int needs_device, Error *err) {
  const Backend *b;
  if (c->run.device == DEVICE_CPU) return host_opened(err);
  int missing = device_find(c, needs_device, &b, err);
  if (!missing) return b;
  if (c->run.device == DEVICE_CUDA) return NULL;
  if (missing == -2) log_info("on the CPU, since %s", err->text);
  return host_opened(err);
}

const Backend *backend_for_run(const Config *c, Error *err) {
  return backend_find(c, 1, err);
}

// A plan with "auto" is one for the machine it is made on.
const Backend *backend_for_plan(const Config *c, Error *err) {
  return backend_find(c, c->run.device != DEVICE_CUDA, err);
}

const Backend *backend_of_host(void) {
  return &backend_cpu;
}
