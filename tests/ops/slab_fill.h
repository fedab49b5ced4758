// Slabs filled as a whole: on the host from the parameter table, an engine's from the host.
#ifndef TESSERA_TESTS_SLAB_FILL_H
#define TESSERA_TESTS_SLAB_FILL_H

#include "model/params.h"
#include "trainer/slab.h"

#include <string.h>

typedef struct HostSlab {
  char *at;
  size_t element_bytes;
} HostSlab;

static inline void host_slab_put(void *arg, int64_t offset, int64_t count, const void *values) {
  const HostSlab *slab = arg;
  memcpy(slab->at + (size_t)offset * slab->element_bytes, values, (size_t)count * slab->element_bytes);
}

// params_stream's values into a slab on the host.
static inline void params_fill(const ParamTable *t, ParamValues which, uint64_t seed, size_t element_bytes,
                               void *slab) {
  params_stream(t, which, seed, element_bytes, host_slab_put, &(HostSlab){slab, element_bytes});
}

// A whole slab of DT_REAL elements, the weights as their masters, onto the engine's device.
static inline void slab_upload(Engine *e, Space space, const void *from) {
  Error err;
  int64_t n = e->model.params.total, piece = min_i64(n, PARAMS_PIECE); // the writer has memory for several
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  SlabWriter *w = slab_writer_open(e, piece, &err);
  if (!w) panic("%s", err.text);
  for (int64_t at = 0; at < n; at += piece)
    slab_writer_put(w, space, at, min_i64(n - at, piece), (const char *)from + (size_t)at * element);
  slab_writer_close(w);
}
#endif
