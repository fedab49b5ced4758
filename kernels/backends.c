#include "kernels/backends.h"

#include "base/ranks.h"

#include <string.h>

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

// Connects the devices of the processes that train as one.
static int group_join(const Backend *b, const Config *c, Error *err) {
  if (c->processes == 1) return 0;
  if (ranks_agree(b == &backend_cpu, "another device", "--device cpu or --device cuda names it", err) != 0) return -1;
  return b->join ? b->join(c, err) : 0;
}

const Backend *backend_for_run(const Config *c, Error *err) {
  const Backend *b = backend_find(c, 1, err);
  return b && group_join(b, c, err) == 0 ? b : NULL;
}

void backend_leave(void) {
#ifdef TESSERA_CUDA
  backend_cuda.leave();
#endif
}

// A plan is one for the machine it is made on; where the device that is asked for is missing, by its assumed rates.
const Backend *backend_for_plan(const Config *c, Error *err) {
  const Backend *b = backend_find(c, 1, err);
  return b || c->run.device != DEVICE_CUDA ? b : backend_find(c, 0, err);
}

int backend_join_for_plan(const Backend *b, const Config *c) {
  Error err;
  int64_t open = b->kernels()[0] != 0;
  if (c->processes == 1) return 0;
  ranks_sum_i64(&open, 1);
  if (open < ranks_size()) return 0;
  if (group_join(b, c, &err) == 0) return 1;
  log_info("collectives are not measured: %s", err.text);
  return 0;
}

const Backend *backend_of_host(void) {
  return &backend_cpu;
}

// ---- ways of computing ops ----

static int ways_count(const Backend *b, const char *word) {
  int n = 0;
  for (int i = 0; i < b->n_ways; i++) n += strcmp(b->ways[i].word, word) == 0;
  return n;
}

void backend_choose(Backend *b, const Config *c) {
  ConfigWay way[CONFIG_WAYS];
  int n = config_ways(c, way);
  for (int i = 0; i < n; i++)
    if (!way[i].is_own) kernels_choose(b, way[i].word);
  if (c->train.moments == MOMENTS_BF16) b->dtype_bytes[DT_MOMENT] = 2;
}

int backend_check_ways(const Backend *b, const Config *c, Error *err) {
  ConfigWay way[CONFIG_WAYS];
  int n = config_ways(c, way);
  for (int i = 0; i < n; i++) {
    if (!way[i].is_own && !ways_count(b, way[i].word))
      log_info("%s %s changes nothing on the %s", way[i].key, way[i].word, b->name);
    for (int k = 0; k < b->n_ways; k++) {
      const KernelWay *row = &b->ways[k];
      const char *missing =
          !way[i].is_own && strcmp(row->word, way[i].word) == 0 && row->missing ? row->missing() : NULL;
      if (missing)
        return error_set(err, "install it, or leave the key as it is by default", "%s %s needs %s", way[i].key,
                         way[i].word, missing);
    }
  }
  return 0;
}
