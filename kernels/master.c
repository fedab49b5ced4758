#include "kernels/master.h"

enum { SPLIT_MANY = 1 << 16 }; // weights that are worth several threads

void masters_join(const void *weights, const void *remainders, int64_t n, void *masters) {
  const uint16_t *weight = weights, *remainder = remainders;
  float *master = masters;
  if (remainder)
    for (int64_t i = 0; i < n; i++) master[i] = master_join(weight[i], remainder[i]);
  else
    for (int64_t i = 0; i < n; i++) master[i] = master_join(weight[i], 0);
}

void masters_split(const void *masters, int64_t n, void *weights, void *remainders) {
  uint16_t *weight = weights, *remainder = remainders;
  const float *master = masters;
#pragma omp parallel for schedule(static) if (n > SPLIT_MANY)
  for (int64_t i = 0; i < n; i++) master_split(master[i], &weight[i], &remainder[i]);
}
