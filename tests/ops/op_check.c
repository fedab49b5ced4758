#include "tests/ops/op_check.h"

#include <omp.h>

int current_seed(const OpCase *c) {
  return (int)c->batch.dims->seed_lo;
}

void make_case(OpCase *c, int seed) {
  op_case_init(c, (uint64_t)seed);
  Dims *d = &c->dims;
  const int ratio[] = {1, 2, 4, 3}, head_dim[] = {32, 64, 2, 10, 18};
  d->D = head_dim[seed % 5];
  d->G = 1 + seed / 2 % 2;
  d->H = d->G * ratio[seed % 4];
  for (int m = 0; m < MODALITIES; m++) {
    d->K[m] = 1 + (seed + 2 * m) % 4;
    d->E[m] = d->K[m] + case_int(c, 0, 4);
    if (seed % 3 == 0) d->F[m] = 16;
    if (seed % 3 == 0) d->S[m] = 8;
  }
  op_case_pack(c, (PackKind)(seed % PACK_KINDS));
  c->batch.dims->seed_lo = (uint32_t)seed;
}

int used_rows(const OpCase *c) {
  return c->batch.dims->n_text + c->batch.dims->n_image;
}

int modality_of(const OpCase *c, int64_t row) {
  return row < c->batch.dims->n_text ? TEXT : IMAGE;
}

void run_same(OpCase *c, OpKind kind, OpArgs args, const void *const *in, void *const *out,
              const size_t bytes[OP_MAX_OUT]) {
  void *before[OP_MAX_OUT], *result[OP_MAX_OUT];
  for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) {
    before[k] = memcpy(case_bytes(c, bytes[k], 0), out[k], bytes[k]);
    result[k] = case_bytes(c, bytes[k], 0);
  }
  for (int run = 0; run < 3; run++) {
    omp_set_num_threads(run == 0 ? 3 : run);
    for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) memcpy(out[k], before[k], bytes[k]);
    op_run(c, kind, args, in, out);
    for (int k = 0; k < OP_MAX_OUT && bytes[k]; k++) {
      if (run == 0) memcpy(result[k], out[k], bytes[k]);
      if (!same_bits(result[k], out[k], bytes[k]))
        fail_msg("op %d output %d: other bits with %d threads (seed %d)", (int)kind, k, run, current_seed(c));
    }
  }
}

double accumulate_error(OpCase *c, const real *got, const real *prior, const real *plain, int64_t n) {
  double *want = case_zeros(c, n);
  for (int64_t i = 0; i < n; i++) want[i] = (double)prior[i] + (double)plain[i];
  return relative_error(got, want, n);
}

double dot(const real *seed, const double *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)seed[i] * x[i];
  return sum;
}
