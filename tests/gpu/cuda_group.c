// Collectives of the CUDA backend, in any number of processes: against sums in host memory, the same bits twice, on
// every rank, and from a captured graph; nothing written beside the values.
//
//   [mpirun -np N] cuda_group nccl|host    exit code 1 when one is wrong, 2 where it cannot run
//
// Processes that share a GPU go through the host; of NCCL one has to do on a machine with one GPU.
#include "base/base.h"
#include "base/hash.h"
#include "base/philox.h"
#include "base/ranks.h"
#include "kernels/backends.h"
#include "model/config/load.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 }; // elements beside the values that must stay as they are

typedef struct Case {
  const Backend *b;
  OpKind kind;
  Dtype type;
  int64_t count;
  KernelFn fn;
  int by_host;
  char *device;             // [GUARD + count + GUARD]
  char *given, *want, *got; // likewise, on the host
  size_t bytes;             // of each
} Case;

static size_t element(const Case *c) {
  return c->b->dtype_bytes[c->type];
}

static void element_set(const Case *c, char *at, int64_t i, float x) {
  if (c->type == DT_F64)
    ((double *)at)[i] = (double)x / 3;
  else
    floats_to(&x, element(c), 1, at + (size_t)i * element(c));
}

static double element_get(const Case *c, const char *at, int64_t i) {
  return c->type == DT_F64 ? ((const double *)at)[i] : (double)((const float *)at)[i];
}

// What this rank has, and what it must have after the op: sums in fp64. Where what is there is of no use, want is
// given.
static void fill(Case *c) {
  int64_t n = c->count + 2 * GUARD, each = c->count / ranks_size(), own = ranks_rank() * each;
  for (int64_t i = 0; i < n; i += 4) {
    float x[4];
    philox_normal4(7, (uint64_t)i, 1, (uint32_t)ranks_rank(), x);
    for (int k = 0; k < 4 && i + k < n; k++) element_set(c, c->given, i + k, x[k]);
  }
  char *all = xmalloc(c->bytes * (size_t)ranks_size());
  ranks_gather(c->given, c->bytes, all);
  memcpy(c->want, c->given, c->bytes);
  for (int64_t i = 0; i < c->count; i++) {
    int64_t at = i + GUARD;
    size_t offset = (size_t)at * element(c);
    if (c->kind == OP_ALL_GATHER) {
      memcpy(c->want + offset, all + (size_t)(i / each) * c->bytes + offset, element(c));
      continue;
    }
    if (c->kind == OP_REDUCE_SCATTER && (i < own || i >= own + each)) continue;
    double sum = 0;
    for (int r = 0; r < ranks_size(); r++) sum += element_get(c, all + (size_t)r * c->bytes, at);
    if (c->type == DT_F64)
      ((double *)c->want)[at] = sum;
    else
      ((float *)c->want)[at] = (float)sum;
  }
  free(all);
}

// Runs the op on the comm lane, `by_graph` as a graph; the result goes to c->got.
static void run(Case *c, int by_graph) {
  const Queues *q = c->b->queues;
  OpArgs args = {.group = {.count = c->count, .is_f64 = c->type == DT_F64}};
  KernelCall call = {.args = &args, .stream = q->stream(LANE_COMM)};
  call.out.at[0] = c->device + GUARD * element(c);
  c->b->upload(c->device, c->given, c->bytes);
  if (by_graph) q->capture_begin();
  q->record(LANE_COMPUTE, EVENT_REPLAY);
  q->wait(LANE_COMM, EVENT_REPLAY);
  c->fn(&call);
  q->record(LANE_COMM, EVENT_REPLAY + 1);
  q->wait(LANE_COMPUTE, EVENT_REPLAY + 1);
  void *graph = by_graph ? q->capture_end() : NULL;
  if (graph) q->graph_launch(graph);
  c->b->download(c->got, c->device, c->bytes);
  if (graph) q->graph_free(graph);
}

// The worst error of a sum by the size of its summands. Guards and what is gathered must be exact.
static double worst(const Case *c) {
  int64_t n = c->count + 2 * GUARD, each = c->count / ranks_size(), own = GUARD + ranks_rank() * each;
  double most = 0;
  for (int64_t i = 0; i < n; i++) {
    int is_guard = i < GUARD || i >= GUARD + c->count;
    int is_unused = c->kind == OP_REDUCE_SCATTER && !is_guard && (i < own || i >= own + each);
    size_t at = (size_t)i * element(c);
    if (is_unused || memcmp(c->got + at, c->want + at, element(c)) == 0) continue;
    if (is_guard || c->kind == OP_ALL_GATHER) return INFINITY;
    most = fmax(most, fabs(element_get(c, c->got, i) - element_get(c, c->want, i)));
  }
  return most;
}

// What of the result is of use, and the same on every rank where `everywhere`.
static uint64_t hash_of(const Case *c, int everywhere) {
  int64_t each = c->count / ranks_size(), first = c->kind == OP_REDUCE_SCATTER ? ranks_rank() * each : 0;
  int64_t n = c->kind == OP_REDUCE_SCATTER ? each : c->count;
  if (everywhere && c->kind == OP_REDUCE_SCATTER) return 0;
  return hash64(c->got + (size_t)(GUARD + first) * element(c), (size_t)n * element(c), 0);
}

static int64_t check_case(Case *c) {
  Error err;
  // Sums of a few numbers of order one.
  double limit = (c->type == DT_F64 ? 1e-15 : 1e-6) * ranks_size();
  c->bytes = (size_t)(c->count + 2 * GUARD) * element(c);
  c->given = xmalloc(c->bytes), c->want = xmalloc(c->bytes), c->got = xmalloc(c->bytes);
  c->device = c->b->alloc(c->bytes);
  if (!c->device) panic("out of device memory");
  fill(c);
  run(c, 0);
  double error = worst(c);
  uint64_t hash = hash_of(c, 0);
  int bad = !(error <= limit);
  bad |= ranks_agree(hash_of(c, 1), "other bits", NULL, &err) != 0;
  run(c, 0);
  bad |= hash_of(c, 0) != hash;
  if (!c->by_host) { // the host's cannot be captured
    run(c, 1);
    bad |= !(worst(c) <= limit) || hash_of(c, 0) != hash;
  }
  int64_t failed = bad;
  ranks_sum_i64(&failed, 1);
  if (ranks_rank() == 0)
    printf("%-14s %-4s %9lld elements: off by %.1e at most (may be %.1e)  %s\n", op_info[c->kind].name,
           c->type == DT_F64    ? "f64"
           : c->type == DT_REAL ? "f32"
                                : "bf16",
           (long long)c->count, error, limit, failed ? "FAIL" : "pass");
  free(c->given), free(c->want), free(c->got);
  c->b->release(c->device);
  return failed != 0;
}

int main(int argc, char **argv) {
  static const struct {
    OpKind kind;
    Dtype type;
  } ops[] = {{OP_ALL_REDUCE, DT_REAL}, {OP_ALL_REDUCE, DT_F64}, {OP_REDUCE_SCATTER, DT_REAL}, {OP_ALL_GATHER, DT_ACT}};
  // The largest passes through the host in pieces, the last of them short.
  const int64_t counts[] = {1, 1000, 7 * 1024 * 1024 + 64};
  Config config;
  Error err;
  if (argc != 2) {
    fprintf(stderr, "usage: [mpirun -np N] cuda_group nccl|host\n");
    return 2;
  }
  char *way = xasprintf("parallel.collectives=%s", argv[1]);
  const char *const sets[] = {"run.device=cuda", way};
  if (ranks_open(&err) != 0 || config_load(&config, NULL, sets, 2, &err) != 0) fatal(&err);
  const Backend *found = backend_for_run(&config, &err);
  // One process alone is connected to itself.
  if (!found || (config.processes == 1 && found->join(&config, &err) != 0)) fatal(&err);
  Backend b = *found;
  backend_choose(&b, &config);
  int64_t failed = 0, n = 0;
  for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++, n++) {
      // All but an all-reduce divide them evenly.
      int64_t count = ops[i].kind == OP_ALL_REDUCE ? counts[k] : counts[k] * ranks_size();
      Case c = {.b = &b,
                .kind = ops[i].kind,
                .type = ops[i].type,
                .count = count,
                .fn = b.fn[ops[i].kind],
                .by_host = b.host_waits[ops[i].kind]};
      failed += check_case(&c);
    }
  if (ranks_rank() == 0)
    printf("%lld of %lld wrong, by %s, %d processes\n", (long long)failed, (long long)n, argv[1], ranks_size());
  free(way);
  ranks_wait();
  backend_leave();
  ranks_close();
  return failed != 0;
}
