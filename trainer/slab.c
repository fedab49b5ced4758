#include "trainer/slab.h"

#include "base/base.h"
#include "kernels/backends.h"
#include "kernels/master.h"

#include <stdlib.h>

// ---- whole slabs ----

int engine_joins(const Engine *e, Space space) {
  return space == SPACE_WEIGHTS && e->model.backend->master_rest;
}

void engine_slab_read_part(const Engine *e, Space space, int64_t first, int64_t count, void *out, void *scratch) {
  const Backend *b = e->model.backend;
  size_t element = b->dtype_bytes[DT_REAL], half = sizeof(uint16_t), n = (size_t)count;
  const char *from = e->bases.of[space], *rest = e->bases.of[SPACE_REST];
  if (!engine_joins(e, space)) {
    b->download(out, from + (size_t)first * element, n * element);
    return;
  }
  uint16_t *weight = scratch, *lower = weight + n;
  b->download(weight, from + (size_t)first * half, n * half);
  if (rest) b->download(lower, rest + (size_t)first * half, n * half);
  masters_join(weight, rest ? lower : NULL, count, out);
}

void engine_slab_read(const Engine *e, Space space, void *out) {
  int64_t n = e->model.params.total;
  void *scratch = engine_joins(e, space) ? xmalloc((size_t)n * sizeof(float)) : NULL;
  engine_slab_read_part(e, space, 0, n, out, scratch);
  free(scratch);
}

void engine_slab_write(Engine *e, Space space, const void *from) {
  const Backend *b = e->model.backend;
  int64_t n = e->model.params.total;
  if (space != SPACE_WEIGHTS || !b->master_rest) {
    b->upload(e->bases.of[space], from, (size_t)n * b->dtype_bytes[DT_REAL]);
    return;
  }
  uint16_t *weight = xmalloc((size_t)n * sizeof *weight), *rest = xmalloc((size_t)n * sizeof *rest);
  const float *master = from;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) master_split(master[i], &weight[i], &rest[i]);
  b->upload(e->bases.of[SPACE_WEIGHTS], weight, (size_t)n * sizeof *weight);
  if (e->bases.of[SPACE_REST]) b->upload(e->bases.of[SPACE_REST], rest, (size_t)n * sizeof *rest);
  free(weight);
  free(rest);
}

int engine_stage_open(Engine *e, int64_t bytes, Error *err) {
  const Backend *b = e->model.backend;
  if (!b->queues || e->pinned.stage_bytes) return 0;
  for (int k = 0; k < 2; k++)
    if (!(e->pinned.stage[k] = b->host_alloc((size_t)bytes)))
      return error_set(err, "close what else uses this machine's memory", "out of pinned host memory for checkpoints");
  e->pinned.stage_bytes = bytes;
  return 0;
}

static void host_copy(void *to, const void *from, size_t bytes) {
  OpArgs args = {.span = {.count = (int64_t)bytes}};
  backend_of_host()->fn[OP_COPY](&(KernelCall){.in = {from}, .out = {to}, .args = &args});
}

// While one piece travels to the host, the one before is copied to its place: memory of this size cannot be pinned
// within a run's first steps, and the processors keep up with the link.
void engine_slab_copy(Engine *e, Space space, void *out) {
  const Backend *b = e->model.backend;
  const Queues *q = b->queues;
  const char *from = e->bases.of[space];
  int64_t bytes = e->bytes[space], piece = e->pinned.stage_bytes;
  if (!q) {
    host_copy(out, from, (size_t)bytes);
    return;
  }
  q->record(LANE_COMPUTE, EVENT_SLAB_FREE);
  q->wait(LANE_D2H, EVENT_SLAB_FREE);
  for (int64_t at = 0, i = 0; at - piece < bytes; at += piece, i++) {
    int64_t before = at - piece; // where the piece before begins
    if (at < bytes) {
      queue_copy(b, LANE_D2H, e->pinned.stage[i % 2], from + at, (size_t)min_i64(bytes - at, piece));
      q->record(LANE_D2H, EVENT_STAGED + (int)(i % 2));
    }
    if (i == 0) continue;
    q->finish(EVENT_STAGED + (int)((i - 1) % 2));
    host_copy((char *)out + before, e->pinned.stage[(i - 1) % 2], (size_t)min_i64(bytes - before, piece));
  }
}

// ---- piece by piece ----

enum { SPLIT_MANY = 1 << 16 }; // weights that are worth several threads

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

// Weights [n] and behind them their rests [n].
static void split(uint16_t *to, const float *masters, int64_t n) {
#pragma omp parallel for schedule(static) if (n > SPLIT_MANY)
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
    queue_copy(b, LANE_H2D, to + (size_t)first * half, slot, n * half);
    if (rest) queue_copy(b, LANE_H2D, rest + (size_t)first * half, slot + n * half, n * half);
  } else {
    host_copy(slot, values, n * element);
    queue_copy(b, LANE_H2D, to + (size_t)first * element, slot, n * element);
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
