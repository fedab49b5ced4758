// Gate + residual + LayerNorm + per-segment scale and shift (+ SiLU), forward and backward. Its formula as
// plain loops: reference/adaln.c.
#include "kernels/cpu/combine.h"

// One row's operands: the modulation columns of its segment; NULL gate without a branch.
typedef struct Site {
  const real *mod;            // [SEG, M]
  int64_t C, M;               // row lengths
  int gate, shift, scale;     // first columns
  int silu_from, silu_before; // rows whose output goes through silu
} Site;

static Site site_of(const KernelCall *c, const real *mod) {
  const BatchDims *b = c->batch->dims;
  Site s = {.mod = mod,
            .C = c->dims->C,
            .M = c->dims->M,
            .gate = c->args->adaln.gate,
            .shift = c->args->adaln.shift,
            .scale = c->args->adaln.scale};
  if (c->args->adaln.silu_image) {
    s.silu_from = b->n_text;
    s.silu_before = b->n_text + b->n_image;
  }
  return s;
}

static int row_has_silu(const Site *s, int64_t r) {
  return r >= s->silu_from && r < s->silu_before;
}

void cpu_ADALN_FWD(const KernelCall *c) {
  const real *x = c->in.ADALN_FWD.x, *branch = c->in.ADALN_FWD.branch; // [T, C]
  real *xnew = c->out.ADALN_FWD.xnew, *h = c->out.ADALN_FWD.h;         // [T, C]
  real *mean = c->out.ADALN_FWD.mean, *rstd = c->out.ADALN_FWD.rstd;   // [T]
  Site s = site_of(c, c->in.ADALN_FWD.mod);
  int64_t T = c->dims->T, C = s.C, used = c->batch->dims->n_text + c->batch->dims->n_image;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < T; r++) {
    real *to = h + r * C;
    if (r >= used) {
      if (branch) memset(xnew + r * C, 0, (size_t)C * sizeof *xnew);
      memset(to, 0, (size_t)C * sizeof *to);
      mean[r] = rstd[r] = 0;
      continue;
    }
    const real *mod = s.mod + c->batch->segment[r] * s.M, *gate = mod + s.gate;
    const real *shift = mod + s.shift, *scale = mod + s.scale, *row = x + r * C;
    real sum = 0, squares = 0;
    if (branch) {
      real *next = xnew + r * C;
      const real *b = branch + r * C;
#pragma omp simd
      for (int64_t i = 0; i < C; i++) next[i] = row[i] + gate[i] * b[i];
      row = next;
    }
    // One loop for both cases: h from xnew alone must have the same bits.
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < C; i++) sum += row[i];
    real m = sum / (real)C;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < C; i++) squares += (row[i] - m) * (row[i] - m);
    real inv = 1 / (real)sqrt((double)(squares / (real)C) + 1e-6);
#pragma omp simd
    for (int64_t i = 0; i < C; i++) to[i] = (1 + scale[i]) * ((row[i] - m) * inv) + shift[i];
    if (row_has_silu(&s, r)) {
#pragma omp simd
      for (int64_t i = 0; i < C; i++) to[i] *= real_sigmoid(to[i]);
    }
    mean[r] = m;
    rstd[r] = inv;
  }
}

// Operands of the backward pass. The normalised row and the gradient at the modulated one are rebuilt wherever they are
// needed: once for dx, once for the sums over a segment.
typedef struct Backward {
  Site site;
  const Combine *combine;              // what dh is the sum of, where it is no operand
  int add_branch;                      // x is the stream before the branch was added: xnew = x + gate * branch
  const real *dh, *dxnew, *x, *branch; // [T, C]
  const real *mean, *rstd;             // [T]
  real *dx, *dbranch, *dmod;           // [T, C] twice, [SEG, M]
} Backward;

// n <= BLOCK columns from `first` of row r: xhat, and dn = dh, through silu where the row has it.
enum { BLOCK = 64 };
static inline void rebuild(const Backward *b, const real *mod, int64_t r, int64_t first, int n, real *xhat, real *dn) {
  const Site *s = &b->site;
  int64_t at = r * s->C + first;
  const real *x = b->x + at, *dh = b->dh ? b->dh + at : NULL, *gate = mod + s->gate + first;
  real sum[BLOCK];
  if (b->combine) {
    combine_part(b->combine, r, first, n, sum);
    dh = sum;
  }
  real mean = b->mean[r], rstd = b->rstd[r];
  if (b->add_branch) {
    const real *branch = b->branch + at;
    for (int i = 0; i < n; i++) xhat[i] = (x[i] + gate[i] * branch[i] - mean) * rstd;
  } else {
    for (int i = 0; i < n; i++) xhat[i] = (x[i] - mean) * rstd;
  }
  if (!row_has_silu(s, r)) {
    for (int i = 0; i < n; i++) dn[i] = dh[i];
    return;
  }
  const real *shift = mod + s->shift + first, *scale = mod + s->scale + first;
  for (int i = 0; i < n; i++) {
    real v = (1 + scale[i]) * xhat[i] + shift[i], sigmoid = real_sigmoid(v);
    dn[i] = dh[i] * sigmoid * (1 + v * (1 - sigmoid));
  }
}

// dx and dbranch of row r. The first sweep leaves dxhat = dn (1 + scale) in dx and forms the two means of the LayerNorm
// backward; the second finishes.
static void backward_row(const Backward *b, const int32_t *segment, int64_t r) {
  const Site *s = &b->site;
  int64_t C = s->C;
  const real *mod = s->mod + segment[r] * s->M, *gate = mod + s->gate, *scale = mod + s->scale;
  real *dx = b->dx + r * C, rstd = b->rstd[r], mean = b->mean[r];
  real xhat[BLOCK], dn[BLOCK], sum = 0, dot = 0;
  for (int64_t first = 0; first < C; first += BLOCK) {
    int n = C - first < BLOCK ? (int)(C - first) : BLOCK;
    rebuild(b, mod, r, first, n, xhat, dn);
#pragma omp simd reduction(+ : sum, dot)
    for (int i = 0; i < n; i++) {
      real d = dn[i] * (1 + scale[first + i]);
      dx[first + i] = d;
      sum += d;
      dot += d * xhat[i];
    }
  }
  const real *x = b->x + r * C, *up = b->dxnew ? b->dxnew + r * C : NULL;
  real m1 = sum / (real)C, m2 = dot / (real)C;
  if (b->branch) {
    const real *branch = b->branch + r * C;
    real *dbranch = b->dbranch + r * C;
    for (int64_t i = 0; i < C; i++) {
      real xnew = b->add_branch ? x[i] + gate[i] * branch[i] : x[i];
      real d = rstd * (dx[i] - m1 - (xnew - mean) * rstd * m2) + (up ? up[i] : 0);
      dx[i] = d;
      dbranch[i] = gate[i] * d;
    }
  } else {
    for (int64_t i = 0; i < C; i++) dx[i] = rstd * (dx[i] - m1 - (x[i] - mean) * rstd * m2) + (up ? up[i] : 0);
  }
}

// dmod of one segment, n <= BLOCK columns from `first`: sums over its rows, which are contiguous. Runs of CHUNK rows
// are summed in `real`, the runs in fp64.
static void backward_segment(const Backward *b, const Batch *batch, int64_t g, int64_t first, int n) {
  enum { CHUNK = 64 };
  const Site *s = &b->site;
  const real *mod = s->mod + g * s->M;
  int64_t begin = batch->seg_start[g], end = begin + batch->seg_len[g];
  double shift[BLOCK] = {0}, scale[BLOCK] = {0}, gate[BLOCK] = {0};
  for (int64_t at = begin; at < end; at += CHUNK) {
    real run_shift[BLOCK] = {0}, run_scale[BLOCK] = {0}, run_gate[BLOCK] = {0}, xhat[BLOCK], dn[BLOCK];
    for (int64_t r = at; r < at + CHUNK && r < end; r++) {
      rebuild(b, mod, r, first, n, xhat, dn);
      for (int i = 0; i < n; i++) {
        run_shift[i] += dn[i];
        run_scale[i] += dn[i] * xhat[i];
      }
      if (!b->branch) continue;
      const real *dx = b->dx + r * s->C + first, *branch = b->branch + r * s->C + first;
      for (int i = 0; i < n; i++) run_gate[i] += dx[i] * branch[i];
    }
    for (int i = 0; i < n; i++) {
      shift[i] += (double)run_shift[i];
      scale[i] += (double)run_scale[i];
      gate[i] += (double)run_gate[i];
    }
  }
  real *to = b->dmod + g * s->M + first;
  for (int i = 0; i < n; i++) {
    to[s->shift + i] = (real)shift[i];
    to[s->scale + i] = (real)scale[i];
    if (b->branch) to[s->gate + i] = (real)gate[i];
  }
}

// Of a call of ADALN_BWD.
static Backward backward_of(const KernelCall *c) {
  Backward b = {
      .site = site_of(c, c->in.ADALN_BWD.mod),
      .dh = c->in.ADALN_BWD.dh,
      .dxnew = c->in.ADALN_BWD.dxnew,
      .x = c->in.ADALN_BWD.x,
      .branch = c->in.ADALN_BWD.branch,
      .mean = c->in.ADALN_BWD.mean,
      .rstd = c->in.ADALN_BWD.rstd,
      .dx = c->out.ADALN_BWD.dx,
      .dbranch = c->out.ADALN_BWD.dbranch,
      .dmod = c->out.ADALN_BWD.dmod,
  };
  b.add_branch = b.branch && !c->args->adaln.x_is_new;
  return b;
}

static void backward(const Backward *b, const KernelCall *c) {
  const BatchDims *dims = c->batch->dims;
  int64_t T = c->dims->T, C = c->dims->C, used = dims->n_text + dims->n_image;
  int64_t blocks = (C + BLOCK - 1) / BLOCK, items = dims->n_segments * blocks;
  memset(b->dx + used * C, 0, (size_t)((T - used) * C) * sizeof(real));
  if (b->branch) memset(b->dbranch + used * C, 0, (size_t)((T - used) * C) * sizeof(real));
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < used; r++) backward_row(b, c->batch->segment, r);
      // Text first: it is the longest segment.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) {
      int64_t first = i % blocks * BLOCK;
      backward_segment(b, c->batch, i / blocks, first, C - first < BLOCK ? (int)(C - first) : BLOCK);
    }
  }
}

void cpu_ADALN_BWD(const KernelCall *c) {
  Backward b = backward_of(c);
  backward(&b, c);
}

// ---- with the sum over the experts before it ----

void cpu_COMBINE_ADALN_FWD(const KernelCall *c) {
  void *b2 = c->out.COMBINE_ADALN_FWD.b2, *h = c->out.COMBINE_ADALN_FWD.h; // [T, C]
  // A row of the branch is done with when the same row of h is written.
  void *branch = b2 ? b2 : h;
  KernelCall combine = *c, site = *c;
  combine.in = (OpInputs){.EXPERT_COMBINE = {.y = c->in.COMBINE_ADALN_FWD.y,
                                             .route = c->in.COMBINE_ADALN_FWD.route,
                                             .weights = c->in.COMBINE_ADALN_FWD.weights,
                                             .add = c->in.COMBINE_ADALN_FWD.add}};
  combine.out.EXPERT_COMBINE.out = branch;
  cpu_EXPERT_COMBINE(&combine);
  site.in =
      (OpInputs){.ADALN_FWD = {.x = c->in.COMBINE_ADALN_FWD.x, .branch = branch, .mod = c->in.COMBINE_ADALN_FWD.mod}};
  site.out = (OpOutputs){.ADALN_FWD = {.xnew = c->out.COMBINE_ADALN_FWD.xnew,
                                       .h = h,
                                       .mean = c->out.COMBINE_ADALN_FWD.mean,
                                       .rstd = c->out.COMBINE_ADALN_FWD.rstd}};
  cpu_ADALN_FWD(&site);
}

void cpu_COMBINE_ADALN_BWD(const KernelCall *c) {
  KernelCall sum = *c, site = *c;
  sum.in = (OpInputs){.EXPERT_COMBINE = {.y = c->in.COMBINE_ADALN_BWD.dslot,
                                         .route = c->in.COMBINE_ADALN_BWD.route,
                                         .add = c->in.COMBINE_ADALN_BWD.add}};
  const Combine combine = combine_of(&sum);
  site.in = (OpInputs){.ADALN_BWD = {.dxnew = c->in.COMBINE_ADALN_BWD.dxnew,
                                     .x = c->in.COMBINE_ADALN_BWD.x,
                                     .branch = c->in.COMBINE_ADALN_BWD.branch,
                                     .mod = c->in.COMBINE_ADALN_BWD.mod,
                                     .mean = c->in.COMBINE_ADALN_BWD.mean,
                                     .rstd = c->in.COMBINE_ADALN_BWD.rstd}};
  site.out = (OpOutputs){.ADALN_BWD = {.dx = c->out.COMBINE_ADALN_BWD.dx,
                                       .dbranch = c->out.COMBINE_ADALN_BWD.dbranch,
                                       .dmod = c->out.COMBINE_ADALN_BWD.dmod}};
  Backward b = backward_of(&site);
  b.combine = &combine;
  backward(&b, c);
}
