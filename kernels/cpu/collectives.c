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

// Each rank sums a share of the elements and gives the others what it found.
void cpu_ALL_REDUCE(const KernelCall *c) {
  void (*add)(const void *, int, int64_t, void *) = c->args->group.is_f64 ? add_doubles : add_reals;
  size_t element = c->args->group.is_f64 ? sizeof(double) : sizeof(real);
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
