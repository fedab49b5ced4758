#include "kernels/group.h"

#include "base/base.h"
#include "base/ranks.h"

#include <string.h>

size_t group_room(size_t element, int64_t share) {
  return 2 * (size_t)share * (size_t)ranks_size() * element;
}

// sum[0..n) = part[0] + part[1] + ..., of parts that lie n elements apart.
static void add_floats(const float *part, int parts, int64_t n, float *sum) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    float s = part[i];
    for (int r = 1; r < parts; r++) s += part[r * n + i];
    sum[i] = s;
  }
}

static void add_doubles(const double *part, int parts, int64_t n, double *sum) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    double s = part[i];
    for (int r = 1; r < parts; r++) s += part[r * n + i];
    sum[i] = s;
  }
}

// Gives every rank its part of `mine` [size][n] and adds what it got of its own, to `sum` [n]. theirs: [size][n].
static void add_parts(const GroupTensor *t, const char *mine, char *theirs, int64_t n, void *sum) {
  ranks_exchange(mine, theirs, (size_t)n * t->element);
  if (t->element == sizeof(double))
    add_doubles((const double *)theirs, ranks_size(), n, sum);
  else
    add_floats((const float *)theirs, ranks_size(), n, sum);
}

static char *at(const GroupTensor *t, int64_t element) {
  return (char *)t->values + (size_t)element * t->element;
}

// Each rank sums a share of the elements and gives the others what it found.
void group_all_reduce(const GroupTensor *t) {
  int64_t size = ranks_size(), whole = t->share * size;
  char *mine = t->room, *theirs = mine + (size_t)whole * t->element;
  for (int64_t begin = 0; begin < t->count; begin += whole) {
    int64_t n = min_i64(whole, t->count - begin), share = (n + size - 1) / size;
    size_t bytes = (size_t)n * t->element, share_bytes = (size_t)share * t->element;
    t->copy(mine, at(t, begin), bytes, t->stream);
    memset(mine + bytes, 0, share_bytes * (size_t)size - bytes); // the last shares may be short
    add_parts(t, mine, theirs, share, mine + (size_t)ranks_rank() * share_bytes);
    ranks_share(mine, share_bytes);
    t->copy(at(t, begin), mine, bytes, t->stream);
  }
}

void group_reduce_scatter(const GroupTensor *t) {
  int64_t size = ranks_size(), each = t->count / size;
  char *mine = t->room, *theirs = mine + (size_t)(t->share * size) * t->element;
  for (int64_t begin = 0; begin < each; begin += t->share) {
    int64_t n = min_i64(t->share, each - begin);
    size_t bytes = (size_t)n * t->element;
    for (int64_t r = 0; r < size; r++) t->copy(mine + (size_t)r * bytes, at(t, r * each + begin), bytes, t->stream);
    add_parts(t, mine, theirs, n, mine);
    t->copy(at(t, ranks_rank() * each + begin), mine, bytes, t->stream);
  }
}

void group_all_gather(const GroupTensor *t) {
  int64_t size = ranks_size(), each = t->count / size, rank = ranks_rank();
  for (int64_t begin = 0; begin < each; begin += t->share) {
    int64_t n = min_i64(t->share, each - begin);
    size_t bytes = (size_t)n * t->element;
    t->copy(t->room + (size_t)rank * bytes, at(t, rank * each + begin), bytes, t->stream);
    ranks_share(t->room, bytes);
    for (int64_t r = 0; r < size; r++)
      if (r != rank) t->copy(at(t, r * each + begin), t->room + (size_t)r * bytes, bytes, t->stream);
  }
}
