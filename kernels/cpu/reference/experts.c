// The experts, token by token and choice by choice; and the shared expert.
#include "kernels/cpu/reference/rows.h"

// Choice j of row r: expert e of modality m, row `at` of that modality's view in the per-assignment buffers.
typedef struct Slot {
  int m;
  int64_t e, at;
} Slot;

static Slot slot_of(const KernelCall *c, const Route *route, int64_t r, int64_t j) {
  Slot s = {.m = row_modality(c, r), .at = route->slot[r * dims_kmax(c->dims) + j]};
  s.e = slot_expert(c, route, s.m, s.at);
  return s;
}

// First element of a slot's row in a buffer of `scale * width[m]` elements a slot.
static int64_t slot_at(const KernelCall *c, Slot s, int scale, const int width[MODALITIES]) {
  const int scaled[MODALITIES] = {scale * width[TEXT], scale * width[IMAGE]};
  return two_sided_base(c->dims->T, c->dims->K, scaled, s.m) + s.at * scaled[s.m];
}

// Matrix of expert e, of a parameter [E, rows, columns] of its modality.
static const double *expert_matrix(const void *const W[MODALITIES], Slot s, int64_t rows, int64_t columns) {
  return (const double *)W[s.m] + s.e * rows * columns;
}

#define EACH_CHOICE(c, r, j)                                                                                           \
  for (int64_t r = 0; r < used_rows(c); r++)                                                                           \
    for (int64_t j = 0; j < (c)->dims->K[row_modality(c, r)]; j++)

void reference_EXPERT_UP_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_UP_FWD.route);
  const int64_t C = d->C;
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *h = (const double *)c->in.EXPERT_UP_FWD.h + r * C;           // [C]
    const double *W1 = expert_matrix(c->in.EXPERT_UP_FWD.w1, s, 2 * F, C);     // [2F, C]: gate, up, gate, up, ...
    double *pre = (double *)c->out.EXPERT_UP_FWD.pre + slot_at(c, s, 2, d->F); // [2F]
    double *a = (double *)c->out.EXPERT_UP_FWD.a + slot_at(c, s, 1, d->F);     // [F]
    for (int64_t k = 0; k < 2 * F; k++) {
      pre[k] = 0;
      for (int64_t i = 0; i < C; i++) pre[k] += h[i] * W1[k * C + i];
    }
    for (int64_t f = 0; f < F; f++) a[f] = silu(pre[2 * f]) * pre[2 * f + 1];
  }
}

void reference_EXPERT_DOWN_FWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_DOWN_FWD.route);
  const int64_t C = d->C;
  const int width[MODALITIES] = {d->C, d->C};
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *a = (const double *)c->in.EXPERT_DOWN_FWD.a + slot_at(c, s, 1, d->F); // [F]
    const double *W2 = expert_matrix(c->in.EXPERT_DOWN_FWD.w2, s, C, F);                // [C, F]
    double *y = (double *)c->out.EXPERT_DOWN_FWD.y + slot_at(c, s, 1, width);           // [C]
    for (int64_t i = 0; i < C; i++) {
      y[i] = 0;
      for (int64_t f = 0; f < F; f++) y[i] += a[f] * W2[i * F + f];
    }
  }
}

void reference_EXPERT_COMBINE(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_COMBINE.route);
  const int64_t C = d->C, kmax = dims_kmax(d);
  const int width[MODALITIES] = {d->C, d->C};
  const double *weights = c->in.EXPERT_COMBINE.weights; // [T, Kmax]
  const double *add = c->in.EXPERT_COMBINE.add;         // [T, C]
  double *out = c->out.EXPERT_COMBINE.out;              // [T, C]
  for (int64_t i = 0; i < d->T * C; i++) out[i] = add && i < used_rows(c) * C ? add[i] : 0;
  EACH_CHOICE(c, r, j) {
    const double *y = (const double *)c->in.EXPERT_COMBINE.y + slot_at(c, slot_of(c, &route, r, j), 1, width); // [C]
    for (int64_t i = 0; i < C; i++) out[r * C + i] += (weights ? weights[r * kmax + j] : 1) * y[i];
  }
}

void reference_EXPERT_DOWN_BWD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_DOWN_BWD.route);
  const int64_t C = d->C, kmax = dims_kmax(d);
  const double *weights = c->in.EXPERT_DOWN_BWD.weights; // [T, Kmax]
  double *dweights = c->out.EXPERT_DOWN_BWD.dweights;    // [T, Kmax]
  memset(dweights, 0, (size_t)(d->T * kmax) * sizeof *dweights);
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *dout = (const double *)c->in.EXPERT_DOWN_BWD.dout + r * C;                // [C]
    const double *pre = (const double *)c->in.EXPERT_DOWN_BWD.pre + slot_at(c, s, 2, d->F); // [2F]
    const double *W2 = expert_matrix(c->in.EXPERT_DOWN_BWD.w2, s, C, F);                    // [C, F]
    double *dpre = (double *)c->out.EXPERT_DOWN_BWD.dpre + slot_at(c, s, 2, d->F);          // [2F]
    double *sa = (double *)c->out.EXPERT_DOWN_BWD.sa + slot_at(c, s, 1, d->F);              // [F]
    const double w = weights[r * kmax + j];
    for (int64_t f = 0; f < F; f++) {
      double gate = pre[2 * f], up = pre[2 * f + 1], a = silu(gate) * up, dA = 0;
      for (int64_t i = 0; i < C; i++) dA += dout[i] * W2[i * F + f];
      dweights[r * kmax + j] += dA * a;
      sa[f] = w * a;
      dpre[2 * f] = w * dA * up * silu_slope(gate);
      dpre[2 * f + 1] = w * dA * silu(gate);
    }
  }
}

// dW [E, rows, columns] of both modalities = 0, unless accumulating.
static void clear_gradients(const KernelCall *c, void *const dW[MODALITIES], int scale) {
  for (int m = 0; m < MODALITIES && !c->args->accumulate; m++)
    memset(dW[m], 0, (size_t)c->dims->E[m] * (size_t)(scale * c->dims->F[m] * c->dims->C) * sizeof(double));
}

void reference_EXPERT_DOWN_WGRAD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_DOWN_WGRAD.route);
  const int64_t C = d->C;
  clear_gradients(c, c->out.EXPERT_DOWN_WGRAD.dw2, 1);
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *dout = (const double *)c->in.EXPERT_DOWN_WGRAD.dout + r * C;              // [C]
    const double *sa = (const double *)c->in.EXPERT_DOWN_WGRAD.sa + slot_at(c, s, 1, d->F); // [F]
    double *dW2 = (double *)c->out.EXPERT_DOWN_WGRAD.dw2[s.m] + s.e * C * F;                // [C, F]
    for (int64_t i = 0; i < C; i++)
      for (int64_t f = 0; f < F; f++) dW2[i * F + f] += dout[i] * sa[f];
  }
}

void reference_EXPERT_UP_DGRAD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_UP_DGRAD.route);
  const int64_t C = d->C;
  const int width[MODALITIES] = {d->C, d->C};
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *dpre = (const double *)c->in.EXPERT_UP_DGRAD.dpre + slot_at(c, s, 2, d->F); // [2F]
    const double *W1 = expert_matrix(c->in.EXPERT_UP_DGRAD.w1, s, 2 * F, C);                  // [2F, C]
    double *dslot = (double *)c->out.EXPERT_UP_DGRAD.dslot + slot_at(c, s, 1, width);         // [C]
    for (int64_t i = 0; i < C; i++) {
      dslot[i] = 0;
      for (int64_t k = 0; k < 2 * F; k++) dslot[i] += dpre[k] * W1[k * C + i];
    }
  }
}

void reference_EXPERT_UP_WGRAD(const KernelCall *c) {
  const Dims *d = c->dims;
  const Route route = route_of(c, c->in.EXPERT_UP_WGRAD.route);
  const int64_t C = d->C;
  clear_gradients(c, c->out.EXPERT_UP_WGRAD.dw1, 2);
  EACH_CHOICE(c, r, j) {
    const Slot s = slot_of(c, &route, r, j);
    const int64_t F = d->F[s.m];
    const double *dpre = (const double *)c->in.EXPERT_UP_WGRAD.dpre + slot_at(c, s, 2, d->F); // [2F]
    const double *h = (const double *)c->in.EXPERT_UP_WGRAD.h + r * C;                        // [C]
    double *dW1 = (double *)c->out.EXPERT_UP_WGRAD.dw1[s.m] + s.e * 2 * F * C;                // [2F, C]
    for (int64_t k = 0; k < 2 * F; k++)
      for (int64_t i = 0; i < C; i++) dW1[k * C + i] += dpre[k] * h[i];
  }
}

// ---- the shared expert: a row a token, in two-sided buffers ----

static const int one[MODALITIES] = {1, 1};

// First element of row r in a buffer of `scale * S_m` elements a row. Filler rows lie in the image view.
static int64_t shared_at(const KernelCall *c, int64_t r, int scale) {
  const int *S = c->dims->S, width[MODALITIES] = {scale * S[TEXT], scale * S[IMAGE]}, m = row_modality(c, r);
  return two_sided_base(c->dims->T, one, width, m) + r * width[m];
}

void reference_SHARED_UP_FWD(const KernelCall *c) {
  const int64_t C = c->dims->C;
  for (int64_t r = 0; r < c->dims->T; r++) {
    const int m = row_modality(c, r), on = r < used_rows(c);
    const double *h = (const double *)c->in.SHARED_UP_FWD.h + r * C;       // [C]
    const double *W1 = c->in.SHARED_UP_FWD.w1[m];                          // [2S, C]: gate, up, gate, up, ...
    double *pre = (double *)c->out.SHARED_UP_FWD.pre + shared_at(c, r, 2); // [2S]
    double *a = (double *)c->out.SHARED_UP_FWD.a + shared_at(c, r, 1);     // [S]
    for (int64_t k = 0; k < 2 * c->dims->S[m]; k++) {
      pre[k] = 0;
      for (int64_t i = 0; on && i < C; i++) pre[k] += h[i] * W1[k * C + i];
    }
    for (int64_t f = 0; f < c->dims->S[m]; f++) a[f] = silu(pre[2 * f]) * pre[2 * f + 1];
  }
}

void reference_SHARED_DOWN_BWD(const KernelCall *c) {
  const int64_t C = c->dims->C;
  for (int64_t r = 0; r < c->dims->T; r++) {
    const int m = row_modality(c, r), on = r < used_rows(c);
    const int64_t S = c->dims->S[m];
    const double *dout = (const double *)c->in.SHARED_DOWN_BWD.dout + r * C;            // [C]
    const double *W2 = c->in.SHARED_DOWN_BWD.w2[m];                                     // [C, S]
    const double *pre = (const double *)c->in.SHARED_DOWN_BWD.pre + shared_at(c, r, 2); // [2S]
    double *dpre = (double *)c->out.SHARED_DOWN_BWD.dpre + shared_at(c, r, 2);          // [2S]
    double *a = (double *)c->out.SHARED_DOWN_BWD.a + shared_at(c, r, 1);                // [S]
    for (int64_t f = 0; f < S; f++) {
      double gate = pre[2 * f], up = pre[2 * f + 1], dA = 0;
      for (int64_t i = 0; on && i < C; i++) dA += dout[i] * W2[i * S + f];
      a[f] = on ? silu(gate) * up : 0;
      dpre[2 * f] = on ? dA * up * silu_slope(gate) : 0;
      dpre[2 * f + 1] = on ? dA * silu(gate) : 0;
    }
  }
}
