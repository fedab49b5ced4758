// What the reference ops share: whose rows are whose, where an assignment went, elementary functions.
#ifndef TESSERA_REFERENCE_ROWS_H
#define TESSERA_REFERENCE_ROWS_H

#include "kernels/cpu/reference/reference.h"

#include <math.h>
#include <string.h>

// Rows [0, n_text) are text, [n_text, used) image, [used, T) filler.
static inline int used_rows(const KernelCall *c) {
  return c->batch->dims->n_text + c->batch->dims->n_image;
}
static inline int row_modality(const KernelCall *c, int64_t r) {
  return r < c->batch->dims->n_text ? TEXT : IMAGE;
}

// Where the router has sent the assignments.
static inline Route route_of(const KernelCall *c, const void *route) {
  Route bound;
  route_bind(&bound, c->dims, (int32_t *)(uintptr_t)route);
  return bound;
}
// The expert of modality m that has the slot.
static inline int64_t slot_expert(const KernelCall *c, const Route *route, int m, int64_t slot) {
  const int32_t *begin = route->begin + (m == IMAGE ? c->dims->E[TEXT] : 0);
  const int32_t *count = route->count + (m == IMAGE ? c->dims->E[TEXT] : 0);
  int64_t e = 0;
  while (slot >= begin[e] + count[e]) e++;
  return e;
}

static inline double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}
static inline double silu(double x) {
  return x * sigmoid(x);
}
static inline double silu_slope(double x) {
  return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
}
#endif
