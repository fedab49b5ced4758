// Ops of the process group: sums in the order of ranks, so that they do not depend on who adds them, and are those of
// one process that adds the same gradients one by one.
#include "kernels/cpu/cpu.h"

#include "base/ranks.h"

// Elements of a rank's share that are summed at a time: bounds the memory that travels through.
enum { SHARE = 1 << 16 };

// sum[0..n) = part[0] + part[1] + ..., of parts that lie n elements apart.
static void add_reals(const void *parts, int n_parts, int64_t n, void *sum) {
  const real *part = parts;
  real *out = sum;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    real s = part[i];
    for (int r = 1; r < n_parts; r++) s += part[r * n + i];
    out[i] = s;
  }
}

static void add_doubles(const void *parts, int n_parts, int64_t n, void *sum) {
  const double *part = parts;
  double *out = sum;
  for (int64_t i = 0; i < n; i++) {
    double s = part[i];
    for (int r = 1; r < n_parts; r++) s += part[r * n + i];
    out[i] = s;
  }
}

static void (*adder(const KernelCall *c, size_t *element))(const void *, int, int64_t, void *) {
  *element = c->args->group.is_f64 ? sizeof(double) : sizeof(real);
  return c->args->group.is_f64 ? add_doubles : add_reals;
}

// Each rank sums a share of the elements and gives the others what it found.
void cpu_ALL_REDUCE(const KernelCall *c) {
  size_t element;
  void (*add)(const void *, int, int64_t, void *) = adder(c, &element);
  int64_t count = c->args->group.count, size = ranks_size();
  char *values = c->out.ALL_REDUCE.values;
  if (size == 1) return;
  int64_t each = (count + size - 1) / size, share = each < SHARE ? each : SHARE, whole = share * size;
  Scratch scratch = scratch_take((int64_t)element * 2 * whole);
  char *mine = scratch_own(&scratch), *theirs = mine + (size_t)whole * element;
  for (int64_t at = 0; at < count; at += whole) {
    int64_t n = count - at < whole ? count - at : whole;
    memcpy(mine, values + (size_t)at * element, (size_t)n * element);
    memset(mine + (size_t)n * element, 0, (size_t)(whole - n) * element); // the last shares may be short
    ranks_exchange(mine, theirs, (size_t)share * element);
    add(theirs, (int)size, share, mine + (size_t)(ranks_rank() * share) * element);
    ranks_share(mine, (size_t)share * element);
    memcpy(values + (size_t)at * element, mine, (size_t)n * element);
  }
}

void cpu_REDUCE_SCATTER(const KernelCall *c) {
  size_t element;
  void (*add)(const void *, int, int64_t, void *) = adder(c, &element);
  int64_t size = ranks_size(), each = c->args->group.count / size, most = each < SHARE ? each : SHARE;
  char *values = c->out.REDUCE_SCATTER.values;
  if (size == 1) return;
  Scratch scratch = scratch_take((int64_t)element * 2 * most * size);
  char *mine = scratch_own(&scratch), *theirs = mine + (size_t)(most * size) * element;
  for (int64_t at = 0; at < each; at += most) {
    int64_t n = each - at < most ? each - at : most;
    size_t bytes = (size_t)n * element;
    for (int64_t r = 0; r < size; r++)
      memcpy(mine + (size_t)r * bytes, values + (size_t)(r * each + at) * element, bytes);
    ranks_exchange(mine, theirs, bytes);
    add(theirs, (int)size, n, values + (size_t)(ranks_rank() * each + at) * element);
  }
}

void cpu_ALL_GATHER(const KernelCall *c) {
  ranks_share(c->out.ALL_GATHER.values, (size_t)(c->args->group.count / ranks_size()) * sizeof(real));
}
