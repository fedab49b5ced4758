#include "trainer/slab.h"

#include "base/base.h"
#include "base/ranks.h"
#include "kernels/backends.h"
#include "kernels/moments.h"
#include "model/placement.h"

#include <stdlib.h>
#include <string.h>

// ---- whole slabs ----

static int is_moment(Space space) {
  return space == SPACE_ADAM_M || space == SPACE_ADAM_V;
}

int engine_converts(const Engine *e, Space space) {
  const Backend *b = e->model.backend;
  return (space == SPACE_WEIGHTS && b->weights_read) ||
         (is_moment(space) && b->dtype_bytes[DT_MOMENT] != b->dtype_bytes[DT_REAL]);
}

SafeTensor slab_tensor(const Engine *e, int i, const char *name) {
  const Param *w = &e->model.params.of[i];
  SafeDtype dtype = e->model.backend->dtype_bytes[DT_REAL] == sizeof(double) ? SAFE_F64 : SAFE_F32;
  return (SafeTensor){name, dtype, w->rank, {w->shape[0], w->shape[1], w->shape[2]}, NULL};
}

// Elements [first, first + count) of the weights or their remainders as they are stored; NULL: there are none.
static char *stored(const Engine *e, Space space, int64_t first) {
  size_t element = space_element(e->model.backend, space);
  return e->bases.of[space] ? (char *)e->bases.of[space] + (size_t)first * element : NULL;
}

static void host_copy(void *to, const void *from, size_t bytes) {
  OpArgs args = {.span = {.count = (int64_t)bytes}};
  backend_of_host()->fn[OP_COPY](&(KernelCall){.in.COPY.src = from, .out.COPY.dst = to, .args = &args});
}

void slab_moments_read(const Engine *e, const void *stored, int64_t count, void *out) {
  const uint16_t *from = stored;
  double *wide = out;
  if (e->model.backend->dtype_bytes[DT_REAL] == sizeof *wide)
    for (int64_t i = 0; i < count; i++) wide[i] = (double)moment_float(from[i]);
  else
    floats_from(stored, sizeof *from, count, out);
}

// Moments [count] of DT_REAL as they are stored: those that were stored so before stay as they are. malloc'd.
static uint16_t *moments_narrow(const Engine *e, const void *values, int64_t count) {
  const double *wide = values;
  const float *narrow = values;
  int is_wide = e->model.backend->dtype_bytes[DT_REAL] == sizeof *wide;
  uint16_t *to = xmalloc((size_t)count * sizeof *to);
  for (int64_t i = 0; i < count; i++) to[i] = bf16_from_float(is_wide ? (float)wide[i] : narrow[i]);
  return to;
}

// Elements of a slab, the first of which may lie on the host.
static int64_t count_on_host(const Engine *e, Space space) {
  if (engine_on_host(e, space)) return INT64_MAX;
  int64_t bytes = e->bases.host_bytes[space];
  return bytes ? bytes / (int64_t)space_element(e->model.backend, space) : 0;
}

// As they are stored.
static void read_stored(const Engine *e, Space space, int64_t first, int64_t count, void *out) {
  size_t element = space_element(e->model.backend, space);
  int64_t on_host = max_i64(0, min_i64(count, count_on_host(e, space) - first));
  char *others = (char *)out + (size_t)on_host * element;
  if (on_host) {
    engine_await(e);
    host_copy(out, bases_at(&e->bases, space, first * (int64_t)element), (size_t)on_host * element);
  }
  if (on_host < count)
    e->model.backend->download(others, bases_at(&e->bases, space, (first + on_host) * (int64_t)element),
                               (size_t)(count - on_host) * element);
}

// Elements of the gradients, which may lie in two places (model/placement.h).
static void read_gradients(const Engine *e, int64_t first, int64_t count, char *out) {
  const ParamTable *t = &e->model.params;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  for (const ParamBucket *b = t->bucket; b < t->bucket + t->buckets; b++) {
    int64_t begin = max_i64(first, b->begin), end = min_i64(first + count, b->end);
    if (begin >= end) continue;
    int away = bucket_leaves(&e->model, b);
    int64_t at = away ? begin : gradients_begin(&e->model, b) + begin - b->begin;
    read_stored(e, away ? SPACE_HOST_GRADS : SPACE_GRADS, at, end - begin, out + (size_t)(begin - first) * element);
  }
}

void engine_slab_read_part(const Engine *e, Space space, int64_t first, int64_t count, void *out, void *scratch) {
  const Backend *b = e->model.backend;
  size_t n = (size_t)count;
  if (space == SPACE_GRADS) {
    read_gradients(e, first, count, out);
    return;
  }
  if (!engine_converts(e, space)) {
    read_stored(e, space, first, count, out);
    return;
  }
  if (is_moment(space)) {
    read_stored(e, space, first, count, scratch);
    slab_moments_read(e, scratch, count, out);
    return;
  }
  const char *remainder = stored(e, SPACE_REMAINDER, first);
  char *weights = scratch, *remainders = weights + n * b->dtype_bytes[DT_ACT];
  b->download(weights, stored(e, SPACE_WEIGHTS, first), n * b->dtype_bytes[DT_ACT]);
  if (remainder) b->download(remainders, remainder, n * (size_t)b->remainder_bytes);
  b->weights_read(weights, remainder ? remainders : NULL, count, out);
}

// What elements of the weights and their remainders take as they are stored.
static size_t stored_bytes(const Backend *b, int64_t count) {
  return (size_t)count * (b->dtype_bytes[DT_ACT] + (size_t)b->remainder_bytes);
}

void engine_slab_read(const Engine *e, Space space, void *out) {
  int64_t n = e->model.params.total;
  void *scratch = engine_converts(e, space) ? xmalloc(stored_bytes(e->model.backend, n)) : NULL;
  engine_slab_read_part(e, space, 0, n, out, scratch);
  free(scratch);
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

// While one piece travels to the host, the one before is copied to its place: memory of this size cannot be pinned
// within a run's first steps, and the processors keep up with the link.
void engine_slab_copy(Engine *e, Space space, void *out) {
  const Backend *b = e->model.backend;
  const Queues *q = b->queues;
  const char *from = e->bases.of[space];
  int64_t bytes = e->bytes[space], piece = e->pinned.stage_bytes, on_host = e->bases.host_bytes[space];
  if (!q) {
    host_copy(out, from, (size_t)bytes);
    return;
  }
  if (on_host) {
    engine_await(e);
    host_copy(out, e->bases.host[space], (size_t)on_host);
    out = (char *)out + on_host;
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

int slab_is_written(const Engine *e, Space space) {
  int n = e->config->processes, rank = n > 1 ? ranks_rank() : 0;
  if (!space_has(space, SPACE_SAVED) || !engine_slab_bytes(e, space)) return 0;
  if (space == SPACE_EMA) return rank == n - 1;
  if (space == SPACE_ADAM_M || space == SPACE_ADAM_V)
    return space_is_shared(&e->model, space) || rank == min_i64(1, n - 1);
  return rank == 0;
}

int slab_is_gathered(const Engine *e, Space space) {
  return (space == SPACE_EMA || space == SPACE_REMAINDER) && space_is_shared(&e->model, space) &&
         engine_slab_bytes(e, space);
}

int64_t slab_copy_bytes(const Engine *e, Space space) {
  int shares = slab_is_gathered(e, space) ? config_shards(e->config) : 1;
  return slab_is_written(e, space) ? engine_slab_bytes(e, space) * shares : 0;
}

void engine_slab_gather(Engine *e, Space space, void *out) {
  const ParamTable *t = &e->model.params;
  const size_t element = space_element(e->model.backend, space);
  int64_t most = 0;
  for (int b = 0; b < t->buckets; b++) most = max_i64(most, t->bucket[b].end - t->bucket[b].begin);
  char *whole = xmalloc((size_t)most * element);
  for (const ParamBucket *b = t->bucket; b < t->bucket + t->buckets; b++) {
    Shard shard = bucket_shard(&e->model, b);
    size_t bytes = (size_t)(shard.end - shard.begin) * element;
    const char *own = (const char *)e->bases.of[space] + (size_t)shard.at * element;
    e->model.backend->download(whole + (size_t)(shard.begin - b->begin) * element, own, bytes);
    ranks_share(whole, bytes);
    if (out) memcpy((char *)out + (size_t)b->begin * element, whole, (size_t)(b->end - b->begin) * element);
  }
  free(whole);
}

// ---- piece by piece ----

struct SlabWriter {
  Engine *e;
  size_t slot_bytes;
  char *slot[SLAB_SLOTS]; // pinned; without queues there are none
  int next;
};

// Of a piece in any form.
static size_t slot_bytes(const Backend *b, int64_t piece) {
  size_t real_bytes = (size_t)piece * b->dtype_bytes[DT_REAL], split = stored_bytes(b, piece);
  return real_bytes > split ? real_bytes : split;
}

SlabWriter *slab_writer_open(Engine *e, int64_t piece, Error *err) {
  const Backend *b = e->model.backend;
  SlabWriter *w = xcalloc(1, sizeof *w);
  *w = (SlabWriter){.e = e, .slot_bytes = slot_bytes(b, piece)};
  if (!b->queues) return w;
  for (int k = 0; k < SLAB_SLOTS; k++) {
    w->slot[k] = b->host_alloc(w->slot_bytes);
    if (w->slot[k]) continue;
    slab_writer_close(w);
    error_set(err, "close what else uses this machine's memory", "out of pinned host memory for %d pieces of %.0f MB",
              SLAB_SLOTS, (double)piece * (double)b->dtype_bytes[DT_REAL] / 1e6);
    return NULL;
  }
  engine_await(e);
  return w;
}

// Remainders of weights [first, first + count) from pinned memory; of those that are shared, this process's.
static void put_remainders(const Engine *e, int64_t first, int64_t count, const char *from) {
  const Model *m = &e->model;
  const size_t element = (size_t)m->backend->remainder_bytes;
  if (!e->bases.of[SPACE_REMAINDER]) return;
  if (!space_is_shared(m, SPACE_REMAINDER)) {
    queue_copy(m->backend, LANE_H2D, stored(e, SPACE_REMAINDER, first), from, (size_t)count * element);
    return;
  }
  for (const ParamBucket *b = m->params.bucket; b < m->params.bucket + m->params.buckets; b++) {
    Shard shard = bucket_shard(m, b);
    int64_t begin = max_i64(first, shard.begin), end = min_i64(first + count, shard.end);
    if (begin < end)
      queue_copy(m->backend, LANE_H2D, stored(e, SPACE_REMAINDER, shard.at + begin - shard.begin),
                 from + (size_t)(begin - first) * element, (size_t)(end - begin) * element);
  }
}

// Elements as they lie in this process's slab: weights as their masters, others as they are stored.
static void put_stored(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values) {
  const Engine *e = w->e;
  const Backend *b = e->model.backend;
  size_t element = space == SPACE_WEIGHTS ? b->dtype_bytes[DT_REAL] : space_element(b, space), n = (size_t)count;
  int64_t on_host = max_i64(0, min_i64(count, count_on_host(e, space) - first));
  if (on_host && on_host < count) {
    put_stored(w, space, first, on_host, values);
    put_stored(w, space, first + on_host, count - on_host, (const char *)values + (size_t)on_host * element);
    return;
  }
  char *to = bases_at(&e->bases, space, first * (int64_t)element);
  if (n * element > w->slot_bytes) panic("slab writer: a piece of %zu elements", n);
  if (!b->queues) {
    b->upload(to, values, n * element);
    return;
  }
  if (on_host) {
    host_copy(to, values, n * element);
    return;
  }
  int event = EVENT_SLAB_SENT + w->next;
  char *slot = w->slot[w->next];
  w->next = (w->next + 1) % SLAB_SLOTS;
  b->queues->finish(event);
  if (space == SPACE_WEIGHTS && engine_converts(e, space)) {
    size_t weight_bytes = n * b->dtype_bytes[DT_ACT];
    b->weights_write(values, count, slot, slot + weight_bytes);
    queue_copy(b, LANE_H2D, stored(e, SPACE_WEIGHTS, first), slot, weight_bytes);
    put_remainders(e, first, count, slot + weight_bytes);
  } else {
    host_copy(slot, values, n * element);
    queue_copy(b, LANE_H2D, to, slot, n * element);
  }
  b->queues->record(LANE_H2D, event);
}

static void put_values(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values) {
  uint16_t *narrow = is_moment(space) && engine_converts(w->e, space) ? moments_narrow(w->e, values, count) : NULL;
  put_stored(w, space, first, count, narrow ? narrow : values);
  free(narrow);
}

void slab_writer_put(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values) {
  const Model *m = &w->e->model;
  size_t element = m->backend->dtype_bytes[DT_REAL];
  if (!space_is_shared(m, space)) {
    put_values(w, space, first, count, values);
    return;
  }
  for (const ParamBucket *b = m->params.bucket; b < m->params.bucket + m->params.buckets; b++) {
    Shard shard = bucket_shard(m, b);
    int64_t begin = max_i64(first, shard.begin), end = min_i64(first + count, shard.end);
    if (begin < end)
      put_values(w, space, shard.at + begin - shard.begin, end - begin,
                 (const char *)values + (size_t)(begin - first) * element);
  }
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
