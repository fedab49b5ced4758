#include "trainer/slab_writer.h"

#include "base/base.h"
#include "kernels/master.h"

#include <stdlib.h>
#include <string.h>

enum { COPY_BLOCK = 1 << 16 }; // bytes that a thread copies at a time

struct SlabWriter {
  Engine *e;
  size_t slot_bytes;
  char *slot[SLAB_SLOTS]; // pinned; without queues there are none
  int next;
};

SlabWriter *slab_writer_open(Engine *e, int64_t piece, Error *err) {
  const Backend *b = e->model.backend;
  SlabWriter *w = xcalloc(1, sizeof *w);
  *w = (SlabWriter){.e = e, .slot_bytes = (size_t)piece * b->dtype_bytes[DT_REAL]};
  if (!b->queues) return w;
  for (int k = 0; k < SLAB_SLOTS; k++) {
    w->slot[k] = b->host_alloc(w->slot_bytes);
    if (w->slot[k]) continue;
    slab_writer_close(w);
    error_set(err, "close what else uses this machine's memory", "out of pinned host memory for %d pieces of %.0f MB",
              SLAB_SLOTS, (double)piece * (double)b->dtype_bytes[DT_REAL] / 1e6);
    return NULL;
  }
  b->queues->record(LANE_COMPUTE, EVENT_SLAB_FREE);
  b->queues->wait(LANE_H2D, EVENT_SLAB_FREE);
  return w;
}

static void copy_to_device(const Backend *b, void *to, const void *from, size_t bytes) {
  OpArgs args = {.span = {.count = (int64_t)bytes}};
  b->fn[OP_COPY](&(KernelCall){.in = {from}, .out = {to}, .args = &args, .stream = b->queues->stream(LANE_H2D)});
}

static void copy_in_blocks(char *to, const char *from, size_t bytes) {
#pragma omp parallel for schedule(static) if (bytes > COPY_BLOCK)
  for (size_t at = 0; at < bytes; at += COPY_BLOCK)
    memcpy(to + at, from + at, bytes - at < COPY_BLOCK ? bytes - at : COPY_BLOCK);
}

// Weights [n] and behind them their rests [n].
static void split(uint16_t *to, const float *masters, int64_t n) {
#pragma omp parallel for schedule(static) if (n > COPY_BLOCK)
  for (int64_t i = 0; i < n; i++) master_split(masters[i], &to[i], &to[n + i]);
}

void slab_writer_put(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values) {
  const Backend *b = w->e->model.backend;
  const Bases *bases = &w->e->bases;
  size_t element = b->dtype_bytes[DT_REAL], half = sizeof(uint16_t), n = (size_t)count;
  char *to = bases->of[space], *rest = bases->of[SPACE_REST];
  if (n * element > w->slot_bytes) panic("slab writer: a piece of %zu elements", n);
  if (!b->queues) {
    b->upload(to + (size_t)first * element, values, n * element);
    return;
  }
  int event = EVENT_SLAB_SENT + w->next;
  char *slot = w->slot[w->next];
  w->next = (w->next + 1) % SLAB_SLOTS;
  b->queues->finish(event);
  if (space == SPACE_WEIGHTS && b->master_rest) {
    split((uint16_t *)slot, values, count);
    copy_to_device(b, to + (size_t)first * half, slot, n * half);
    if (rest) copy_to_device(b, rest + (size_t)first * half, slot + n * half, n * half);
  } else {
    copy_in_blocks(slot, values, n * element);
    copy_to_device(b, to + (size_t)first * element, slot, n * element);
  }
  b->queues->record(LANE_H2D, event);
}

void slab_writer_close(SlabWriter *w) {
  if (!w) return;
  const Backend *b = w->e->model.backend;
  for (int k = 0; k < SLAB_SLOTS; k++) {
    if (!w->slot[k]) continue;
    b->queues->finish(EVENT_SLAB_SENT + k);
    b->host_release(w->slot[k]);
  }
  free(w);
}
