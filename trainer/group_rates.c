#include "trainer/group_rates.h"

#include "base/ranks.h"

#include <math.h>
#include <stdlib.h>

enum { SAMPLES = 3, IN_A_ROW = 4, SMALL = 64 };       // SMALL: elements of a process
enum { LEAST_BYTES = 1 << 20, MOST_BYTES = 1 << 28 }; // of a large tensor
static const double long_enough = 1e-3; // seconds of a large collective, beside which its latency is little

typedef struct Tensor {
  const Backend *backend;
  void *values;
} Tensor;

// Gives it as many bytes, of zeros. 0 where a process has no memory for that.
static int tensor_fit(Tensor *t, int64_t bytes) {
  const Backend *b = t->backend;
  if (t->values) b->release(t->values);
  t->values = b->alloc((size_t)bytes);
  if (ranks_any(!t->values)) return 0;
  b->clear(t->values, (size_t)bytes);
  if (b->queues) b->queues->record(LANE_COMPUTE, EVENT_TIMED);
  if (b->queues) b->queues->wait(LANE_COMM, EVENT_TIMED);
  return 1;
}

// ---- seconds ----

// Seconds of a collective in a row of them: the first has no part in it, since it also waits for those who come late.
static double row_seconds(const Backend *b, OpKind kind, const KernelCall *call) {
  b->fn[kind](call);
  double begin = b->queues ? 0 : time_now();
  if (b->queues) b->queues->record(LANE_COMM, EVENT_TIMED);
  for (int i = 0; i < IN_A_ROW; i++) b->fn[kind](call);
  if (!b->queues) return (time_now() - begin) / IN_A_ROW;
  b->queues->record(LANE_COMM, EVENT_TIMED + 1);
  b->queues->finish(EVENT_TIMED + 1);
  return b->queues->seconds(EVENT_TIMED, EVENT_TIMED + 1) / IN_A_ROW;
}

// The median, and its mean over the processes, which all of them have.
static double collective_seconds(const Tensor *t, OpKind kind, int64_t count) {
  const Backend *b = t->backend;
  OpArgs args = {.group = {.count = count}};
  KernelCall call = {.args = &args, .out.at = {t->values}};
  double samples[SAMPLES];
  if (b->queues) call.stream = b->queues->stream(LANE_COMM);
  for (int i = 0; i < SAMPLES; i++) samples[i] = row_seconds(b, kind, &call);
  double median = median_f64(samples, SAMPLES);
  ranks_sum_f64(&median, 1);
  return median / ranks_size();
}

// ---- rates ----

// Elements of `bytes`, a multiple of what they are shared out by.
static int64_t count_of(const Backend *b, Dtype type, int64_t bytes) {
  int64_t unit = (int64_t)SMALL * ranks_size();
  return bytes / (int64_t)b->dtype_bytes[type] / unit * unit;
}

// Bytes a second that a process sends in a collective of so many elements.
static double rate(const Tensor *t, OpKind kind, Dtype type, int64_t bytes, double latency) {
  int64_t count = count_of(t->backend, type, bytes);
  double seconds = collective_seconds(t, kind, count);
  double sent = (double)count * (double)t->backend->dtype_bytes[type] * (ranks_size() - 1) / ranks_size();
  return sent / fmax(seconds - latency, seconds / 2);
}

static GroupRates measure(Tensor *t) {
  GroupRates none = {0}, r = {.drag = t->backend->assumed_group.drag, .measured = 1};
  int64_t bytes = LEAST_BYTES, small = (int64_t)SMALL * ranks_size();
  if (!tensor_fit(t, bytes)) return none;
  r.latency = (collective_seconds(t, OP_REDUCE_SCATTER, small) + collective_seconds(t, OP_ALL_GATHER, small)) / 2;
  while (bytes < MOST_BYTES &&
         collective_seconds(t, OP_REDUCE_SCATTER, count_of(t->backend, DT_REAL, bytes)) < long_enough) {
    bytes *= 4;
    if (!tensor_fit(t, bytes)) return none;
  }
  r.reduce = rate(t, OP_REDUCE_SCATTER, DT_REAL, bytes, r.latency);
  r.gather = rate(t, OP_ALL_GATHER, DT_ACT, bytes, r.latency);
  return r;
}

GroupRates group_rates_measure(const Backend *b) {
  Tensor t = {.backend = b};
  GroupRates r = measure(&t);
  if (t.values) b->release(t.values);
  return r;
}
