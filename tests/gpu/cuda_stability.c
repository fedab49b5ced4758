// AdaLN's numerical stability. The fused kernels keep a row in registers from the residual to the modulated output; the
// unfused ones round it to bf16 after each part. Both are compared with float64 on rows that are hard on a LayerNorm;
// the reference starts from the rounded sum of x and gated branch, as the contract has it.
#include "tests/gpu/cuda_families.h"

#include "base/base.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct RowKind {
  const char *name;
  double mean, std;
  int outliers; // elements of 1e4
} RowKind;

// Near 1 and near 1e3 the numbers of bf16 are 1/128 and 4 apart: most elements of such rows are equal.
static const RowKind row_kinds[] = {{"normal", 0, 1, 0},
                                    {"mean 1e3", 1e3, 10, 0},
                                    {"mean 1, variance 1e-6", 1, 1e-3, 0},
                                    {"variance 1e-6", 0, 1e-3, 0},
                                    {"outliers of 1e4", 0, 1, 4}};
enum { ROW_KINDS = sizeof row_kinds / sizeof *row_kinds };

// What is compared, in the reference's order: by row, then by segment.
enum { H, DX, DBRANCH, BY_ROW, DSHIFT = BY_ROW, DSCALE, DGATE, QUANTITIES };
static const char *const quantity_name[QUANTITIES] = {"h", "dx", "dbranch", "dshift", "dscale", "dgate"};
enum { FUSED, UNFUSED, WAYS };

typedef struct Site {
  const Dims *dims;
  const Batch *batch;
  OpArgs args;
  Value x, branch, mod, dh, dxnew; // x, branch, dh, dxnew [T, C], mod [SEG, M]
  int rows;
} Site;

typedef struct Outputs {
  Value forward[OP_MAX_OUT];  // xnew, h [T, C], mean, rstd [T]
  Value backward[OP_MAX_OUT]; // dx, dbranch [T, C], dmod [SEG, M]
} Outputs;

// Error over the root mean square of the row it is in.
typedef struct Stability {
  double squares, largest;
  int64_t count;
} Stability;

static const RowKind *kind_of(int row) {
  return &row_kinds[row % ROW_KINDS];
}

static void make_rows(CudaCase *c, Site *s) {
  int C = s->dims->C;
  real *x = s->x.data, *branch = s->branch.data;
  for (int r = 0; r < s->rows; r++) {
    const RowKind *kind = kind_of(r);
    for (int i = 0; i < C; i++) {
      x[(int64_t)r * C + i] = bf16_round((float)(kind->mean + kind->std * case_normal(&c->ops)));
      branch[(int64_t)r * C + i] = bf16_round((float)(0.5 * kind->std * case_normal(&c->ops)));
    }
    for (int i = 0; i < kind->outliers; i++) x[(int64_t)r * C + case_int(&c->ops, 0, C - 1)] = bf16_round(1e4F);
  }
}

static bool run_way(CudaCase *c, const Site *s, int way, Outputs *o) {
  const Dims *d = s->dims;
  Backend backend = backend_cuda;
  if (way == UNFUSED) kernels_choose(&backend, "unfused");
  const Backend *before = c->backend;
  const Value rows = value_out(c, DT_ACT, d->T, d->C), stat = value_out(c, DT_REAL, d->T, 1);
  c->backend = &backend;
  cuda_case_variant(c, "%s", way == UNFUSED ? "unfused" : "fused");
  bool ran = cuda_case_run(c, OP_ADALN_FWD, s->args, VALUES_IN(s->x, s->branch, s->mod),
                           VALUES_OUT(rows, rows, stat, stat), o->forward);
  ran = ran && cuda_case_run(c, OP_ADALN_BWD, s->args,
                             VALUES_IN(s->dh, s->dxnew, s->x, s->branch, s->mod, o->forward[2], o->forward[3]),
                             VALUES_OUT(rows, rows, value_out(c, DT_ACT, d->segments, d->M)), o->backward);
  c->backend = before;
  return ran;
}

// One row in float64: h, dx, dbranch [C]; dshift, dscale, dgate [C] are added to.
static void reference_row(const Site *s, int64_t row, const real *xnew, double *const out[QUANTITIES]) {
  int64_t C = s->dims->C, at = row * C;
  const real *mod = (const real *)s->mod.data + s->batch->segment[row] * (int64_t)s->dims->M;
  const real *shift = mod + s->args.adaln.shift, *scale = mod + s->args.adaln.scale, *gate = mod + s->args.adaln.gate;
  const real *dh = s->dh.data, *dxnew = s->dxnew.data, *branch = s->branch.data;
  double mean = 0, variance = 0, sum = 0, dot = 0;
  for (int64_t i = 0; i < C; i++) mean += (double)xnew[at + i] / (double)C;
  for (int64_t i = 0; i < C; i++) variance += pow((double)xnew[at + i] - mean, 2) / (double)C;
  double rstd = 1 / sqrt(variance + 1e-6);
  for (int64_t i = 0; i < C; i++) {
    double xhat = ((double)xnew[at + i] - mean) * rstd, dxhat = (double)dh[at + i] * (1 + (double)scale[i]);
    out[H][i] = (1 + (double)scale[i]) * xhat + (double)shift[i];
    out[DSHIFT][i] += (double)dh[at + i];
    out[DSCALE][i] += (double)dh[at + i] * xhat;
    sum += dxhat / (double)C;
    dot += dxhat * xhat / (double)C;
  }
  for (int64_t i = 0; i < C; i++) {
    double xhat = ((double)xnew[at + i] - mean) * rstd, dxhat = (double)dh[at + i] * (1 + (double)scale[i]);
    out[DX][i] = (double)dxnew[at + i] + rstd * (dxhat - sum - xhat * dot);
    out[DBRANCH][i] = (double)gate[i] * out[DX][i];
    out[DGATE][i] += out[DX][i] * (double)branch[at + i];
  }
}

static void stability_add(Stability *s, const real *got, const double *want, int64_t n) {
  double square = 0;
  for (int64_t i = 0; i < n; i++) square += want[i] * want[i] / (double)n;
  for (int64_t i = 0; i < n; i++) {
    double error = fabs((double)got[i] - want[i]) / sqrt(square);
    s->squares += error * error;
    s->largest = error <= s->largest ? s->largest : error; // NaN too
  }
  s->count += n;
}

static double stability_rms(const Stability *s) {
  return sqrt(s->squares / (double)s->count);
}

static void print_and_judge(CudaCase *c, int quantity, const char *rows, const Stability s[WAYS]) {
  double rms[WAYS] = {stability_rms(&s[FUSED]), stability_rms(&s[UNFUSED])};
  printf("  %-8s %-22s fused %.2e, at most %.2e; unfused %.2e, at most %.2e\n", quantity_name[quantity], rows,
         rms[FUSED], s[FUSED].largest, rms[UNFUSED], s[UNFUSED].largest);
  if (rms[FUSED] <= 1.05 * rms[UNFUSED] && s[FUSED].largest <= 1.05 * s[UNFUSED].largest) return;
  cuda_case_fail(c, quantity == H ? OP_ADALN_FWD : OP_ADALN_BWD,
                 "%s, %s: rms and largest error %.3g, %.3g of the fused kernels, %.3g, %.3g of the unfused ones",
                 quantity_name[quantity], rows, rms[FUSED], s[FUSED].largest, rms[UNFUSED], s[UNFUSED].largest);
}

static void compare_ways(CudaCase *c, const Site *s, const Outputs o[WAYS]) {
  const int64_t C = s->dims->C, M = s->dims->M;
  const int columns[QUANTITIES] = {
      [DSHIFT] = s->args.adaln.shift, [DSCALE] = s->args.adaln.scale, [DGATE] = s->args.adaln.gate};
  Stability rows[BY_ROW][ROW_KINDS][WAYS] = {0}, sums[QUANTITIES][WAYS] = {0};
  double *memory = xcalloc((size_t)(QUANTITIES * C), sizeof *memory), *want[QUANTITIES];
  for (int q = 0; q < QUANTITIES; q++) want[q] = memory + q * C;
  for (int g = 0; g < s->batch->dims->n_segments; g++) {
    memset(memory, 0, (size_t)(QUANTITIES * C) * sizeof *memory);
    for (int r = s->batch->seg_start[g]; r < s->batch->seg_start[g] + s->batch->seg_len[g]; r++) {
      reference_row(s, r, o[FUSED].forward[0].data, want);
      for (int way = 0; way < WAYS; way++) {
        const Value *got[BY_ROW] = {&o[way].forward[1], &o[way].backward[0], &o[way].backward[1]};
        for (int q = 0; q < BY_ROW; q++)
          stability_add(&rows[q][r % ROW_KINDS][way], (const real *)got[q]->data + r * C, want[q], C);
      }
    }
    for (int way = 0; way < WAYS && s->batch->seg_len[g]; way++)
      for (int q = BY_ROW; q < QUANTITIES; q++)
        stability_add(&sums[q][way], (const real *)o[way].backward[2].data + g * M + columns[q], want[q], C);
  }
  free(memory);
  printf("AdaLN against float64, rms and largest error over the rms of the row:\n");
  for (int q = 0; q < BY_ROW; q++)
    for (int k = 0; k < ROW_KINDS; k++) print_and_judge(c, q, row_kinds[k].name, rows[q][k]);
  for (int q = BY_ROW; q < QUANTITIES; q++) print_and_judge(c, q, "sums over a segment", sums[q]);
}

void run_adaln_stability(CudaCase *c, const CudaShape *shape) {
  static const CudaShape own = {"stability",
                                PACK_TRAINING,
                                ROUTE_ANY,
                                {.T = 1024,
                                 .segments = 8,
                                 .C = 2048,
                                 .H = 1,
                                 .G = 1,
                                 .D = 32,
                                 .P = 48,
                                 .V = 512,
                                 .Z = 64,
                                 .L = 1,
                                 .E = {1, 1},
                                 .K = {1, 1},
                                 .F = {8, 8}}};
  if (shape != &cuda_shapes[0]) return;
  op_case_free(&c->ops);
  cuda_shape_open(c, &own, 1);
  const Dims *d = &c->ops.dims;
  Site s = {.dims = d,
            .batch = &c->ops.batch,
            .args = {.adaln = {.gate = 2 * d->C, .shift = 3 * d->C, .scale = 4 * d->C}},
            .x = value_random(c, DT_ACT, d->T, d->C, 1),
            .branch = value_random(c, DT_ACT, d->T, d->C, 1),
            .mod = value_random(c, DT_ACT, d->segments, d->M, 0.5),
            .dh = value_random(c, DT_ACT, d->T, d->C, 1),
            .dxnew = value_random(c, DT_ACT, d->T, d->C, 1),
            .rows = c->ops.batch.dims->n_text + c->ops.batch.dims->n_image};
  Outputs o[WAYS];
  make_rows(c, &s);
  for (int way = 0; way < WAYS; way++)
    if (!run_way(c, &s, way, &o[way])) return;
  cuda_case_variant(c, "both");
  if (memcmp(o[FUSED].forward[0].data, o[UNFUSED].forward[0].data, (size_t)s.rows * (size_t)d->C * sizeof(real)) != 0)
    cuda_case_fail(c, OP_ADALN_FWD, "xnew has other bits unfused");
  compare_ways(c, &s, o);
}
