// Gate + residual + LayerNorm + the segment's scale and shift (+ SiLU), forward and backward.
#include "kernels/cpu/reference/rows.h"

#include <stdlib.h>

typedef struct Site {
  const double *x, *branch; // [T, C]
  const double *mod;        // [SEG, M]
  int add_branch;           // xnew = x + gate branch; else x is xnew already
} Site;

// The modulation of row r, from the column on.
static const double *mod_at(const KernelCall *c, const Site *s, int64_t r, int column) {
  return s->mod + (int64_t)c->batch->segment[r] * c->dims->M + column;
}

static double xnew_at(const KernelCall *c, const Site *s, int64_t r, int64_t i) {
  int64_t at = r * c->dims->C + i;
  return s->add_branch ? s->x[at] + mod_at(c, s, r, c->args->adaln.gate)[i] * s->branch[at] : s->x[at];
}

static int has_silu(const KernelCall *c, int64_t r) {
  return c->args->adaln.silu_image && row_modality(c, r) == IMAGE;
}

static void forward(const KernelCall *c, const Site *s, double *xnew, double *h, double *mean, double *rstd) {
  const int64_t C = c->dims->C;
  for (int64_t r = 0; r < c->dims->T; r++) {
    mean[r] = rstd[r] = 0;
    for (int64_t i = 0; i < C; i++) {
      h[r * C + i] = 0;
      if (xnew) xnew[r * C + i] = 0;
    }
  }
  for (int64_t r = 0; r < used_rows(c); r++) {
    const double *shift = mod_at(c, s, r, c->args->adaln.shift), *scale = mod_at(c, s, r, c->args->adaln.scale);
    double variance = 0;
    for (int64_t i = 0; i < C; i++) mean[r] += xnew_at(c, s, r, i) / (double)C;
    for (int64_t i = 0; i < C; i++) variance += pow(xnew_at(c, s, r, i) - mean[r], 2) / (double)C;
    rstd[r] = 1 / sqrt(variance + 1e-6);
    for (int64_t i = 0; i < C; i++) {
      double v = xnew_at(c, s, r, i), n = (1 + scale[i]) * (v - mean[r]) * rstd[r] + shift[i];
      if (xnew) xnew[r * C + i] = v;
      h[r * C + i] = has_silu(c, r) ? silu(n) : n;
    }
  }
}

// dh, dxnew [T, C]: the latter may be NULL.
static void backward(const KernelCall *c, const Site *s, const double *dh, const double *dxnew, const double *mean,
                     const double *rstd, double *dx, double *dbranch, double *dmod) {
  const int64_t C = c->dims->C, M = c->dims->M;
  const int column_shift = c->args->adaln.shift, column_scale = c->args->adaln.scale, column_gate = c->args->adaln.gate;
  memset(dx, 0, (size_t)(c->dims->T * C) * sizeof *dx);
  if (dbranch) memset(dbranch, 0, (size_t)(c->dims->T * C) * sizeof *dbranch);
  for (int64_t g = 0; g < c->batch->dims->n_segments; g++) {
    for (int64_t i = 0; i < C; i++) {
      dmod[g * M + column_shift + i] = dmod[g * M + column_scale + i] = 0;
      if (s->branch) dmod[g * M + column_gate + i] = 0;
    }
  }
  for (int64_t r = 0; r < used_rows(c); r++) {
    const double *shift = mod_at(c, s, r, column_shift), *scale = mod_at(c, s, r, column_scale);
    const double *gate = mod_at(c, s, r, column_gate);
    double *to = dmod + (int64_t)c->batch->segment[r] * M;
    double mean_d = 0, mean_dx = 0; // of dxhat, and of dxhat xhat
    for (int64_t i = 0; i < C; i++) {
      double xhat = (xnew_at(c, s, r, i) - mean[r]) * rstd[r], n = (1 + scale[i]) * xhat + shift[i];
      double dn = dh[r * C + i] * (has_silu(c, r) ? silu_slope(n) : 1), dxhat = dn * (1 + scale[i]);
      to[column_shift + i] += dn;
      to[column_scale + i] += dn * xhat;
      mean_d += dxhat / (double)C;
      mean_dx += dxhat * xhat / (double)C;
      dx[r * C + i] = dxhat;
    }
    for (int64_t i = 0; i < C; i++) {
      double xhat = (xnew_at(c, s, r, i) - mean[r]) * rstd[r];
      double d = (dxnew ? dxnew[r * C + i] : 0) + rstd[r] * (dx[r * C + i] - mean_d - xhat * mean_dx);
      dx[r * C + i] = d;
      if (!s->branch) continue;
      dbranch[r * C + i] = gate[i] * d;
      to[column_gate + i] += d * s->branch[r * C + i];
    }
  }
}

void reference_ADALN_FWD(const KernelCall *c) {
  const Site s = {.x = c->in.ADALN_FWD.x,
                  .branch = c->in.ADALN_FWD.branch,
                  .mod = c->in.ADALN_FWD.mod,
                  .add_branch = c->in.ADALN_FWD.branch != NULL};
  forward(c, &s, c->out.ADALN_FWD.xnew, c->out.ADALN_FWD.h, c->out.ADALN_FWD.mean, c->out.ADALN_FWD.rstd);
}

void reference_ADALN_BWD(const KernelCall *c) {
  const Site s = {.x = c->in.ADALN_BWD.x,
                  .branch = c->in.ADALN_BWD.branch,
                  .mod = c->in.ADALN_BWD.mod,
                  .add_branch = c->in.ADALN_BWD.branch && !c->args->adaln.x_is_new};
  backward(c, &s, c->in.ADALN_BWD.dh, c->in.ADALN_BWD.dxnew, c->in.ADALN_BWD.mean, c->in.ADALN_BWD.rstd,
           c->out.ADALN_BWD.dx, c->out.ADALN_BWD.dbranch, c->out.ADALN_BWD.dmod);
}

// [T, C], to be freed.
static double *combine(const KernelCall *c, const void *y, const void *route, const void *weights, const void *add) {
  double *sum = xcalloc((size_t)(c->dims->T * c->dims->C), sizeof *sum);
  KernelCall call = *c;
  call.in.EXPERT_COMBINE.y = y;
  call.in.EXPERT_COMBINE.route = route;
  call.in.EXPERT_COMBINE.weights = weights;
  call.in.EXPERT_COMBINE.add = add;
  call.out.EXPERT_COMBINE.out = sum;
  reference_EXPERT_COMBINE(&call);
  return sum;
}

void reference_COMBINE_ADALN_FWD(const KernelCall *c) {
  double *b2 = combine(c, c->in.COMBINE_ADALN_FWD.y, c->in.COMBINE_ADALN_FWD.route, c->in.COMBINE_ADALN_FWD.weights,
                       c->in.COMBINE_ADALN_FWD.add);
  const Site s = {.x = c->in.COMBINE_ADALN_FWD.x, .branch = b2, .mod = c->in.COMBINE_ADALN_FWD.mod, .add_branch = 1};
  forward(c, &s, c->out.COMBINE_ADALN_FWD.xnew, c->out.COMBINE_ADALN_FWD.h, c->out.COMBINE_ADALN_FWD.mean,
          c->out.COMBINE_ADALN_FWD.rstd);
  if (c->out.COMBINE_ADALN_FWD.b2)
    memcpy(c->out.COMBINE_ADALN_FWD.b2, b2, (size_t)(c->dims->T * c->dims->C) * sizeof *b2);
  free(b2);
}

void reference_COMBINE_ADALN_BWD(const KernelCall *c) {
  double *dh =
      combine(c, c->in.COMBINE_ADALN_BWD.dslot, c->in.COMBINE_ADALN_BWD.route, NULL, c->in.COMBINE_ADALN_BWD.add);
  const Site s = {.x = c->in.COMBINE_ADALN_BWD.x,
                  .branch = c->in.COMBINE_ADALN_BWD.branch,
                  .mod = c->in.COMBINE_ADALN_BWD.mod,
                  .add_branch = 1};
  backward(c, &s, dh, c->in.COMBINE_ADALN_BWD.dxnew, c->in.COMBINE_ADALN_BWD.mean, c->in.COMBINE_ADALN_BWD.rstd,
           c->out.COMBINE_ADALN_BWD.dx, c->out.COMBINE_ADALN_BWD.dbranch, c->out.COMBINE_ADALN_BWD.dmod);
  free(dh);
}
