#include "tests/gpu/cuda_case.h"
#include "base/base.h"
#include "tests/gpu/cuda_bench.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { ALIGN = 256, GUARD = 256, DEVICE_SECONDS = 30 };
enum { POISON_NAN = 0xFF, POISON_LARGE = 0x7F }; // bf16 and fp32: NaN, and 3.4e38
static const uint32_t nothing = 0xFFFFFFFFu;     // the bits of a host number that was never written: case_poison

_Static_assert(sizeof(real) == sizeof(float), "the CUDA tests compare with the CPU backend in float");

static uint32_t bits_of(real x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static real from_bits(uint32_t bits) {
  real x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static bool is_nothing(real x) {
  return bits_of(x) == nothing;
}

float bf16_round(float x) {
  return from_bits((uint32_t)bf16_from_float(x) << 16);
}

void value_round(Value v) {
  real *x = v.data;
  if (v.dtype != DT_ACT || !x) return;
#pragma omp parallel for
  for (int64_t i = 0; i < v.count; i++)
    if (!is_nothing(x[i])) x[i] = bf16_round(x[i]);
}

// ---- names ----

void cuda_case_shape(CudaCase *c, const char *shape) {
  snprintf(c->what, sizeof c->what, "%s", shape);
  c->shape_length = strlen(c->what);
}

void cuda_case_variant(CudaCase *c, const char *fmt, ...) {
  char *at = c->what + c->shape_length;
  size_t left = sizeof c->what - c->shape_length;
  int n = snprintf(at, left, "%s", c->shape_length ? ", " : "");
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(at + n, left - (size_t)n, fmt, ap);
  va_end(ap);
}

bool cuda_case_wants(const CudaCase *c, bool typical) {
  return typical || !c->bench;
}

void cuda_case_close(CudaCase *c) {
  if (c->slab) backend_cuda.release(c->slab);
  c->slab = NULL;
  c->slab_bytes = 0;
}

void cuda_case_fail(CudaCase *c, OpKind kind, const char *fmt, ...) {
  OpReport *r = &c->report->of[kind];
  if (r->failures++) return;
  int n = snprintf(r->failure, sizeof r->failure, "%s: ", c->what);
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(r->failure + n, sizeof r->failure - (size_t)n, fmt, ap);
  va_end(ap);
}

// ---- operands ----

static const size_t host_bytes[DT_COUNT] = {
    [DT_ACT] = sizeof(real), [DT_REAL] = sizeof(real), [DT_I32] = 4, [DT_U8] = 1, [DT_F64] = 8};

static Value value_new(CudaCase *c, Dtype type, int64_t count) {
  return (Value){.data = case_bytes(&c->ops, (size_t)count * host_bytes[type], 0xFF),
                 .dtype = type,
                 .count = count,
                 .held = count,
                 .used = count,
                 .tolerance = type == DT_ACT ? c->act_tolerance : REAL_TOLERANCE};
}

// Element i of a stream of nearly normal numbers: the sum of the four parts of a hashed word. Any thread can make it.
static real random_at(uint64_t seed, int64_t i) {
  uint64_t z = seed + (uint64_t)i * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  int32_t sum = (int32_t)(z & 0xFFFF) + (int32_t)(z >> 16 & 0xFFFF) + (int32_t)(z >> 32 & 0xFFFF) + (int32_t)(z >> 48);
  return (real)(sum - 131070) * (real)(1.7320508 / 65536);
}

static void fill_random(CudaCase *c, Value v, int64_t at, int64_t count, double std) {
  uint64_t seed = case_bits(&c->ops);
  real *x = (real *)v.data + at;
#pragma omp parallel for
  for (int64_t i = 0; i < count; i++) {
    real y = (real)std * random_at(seed, i);
    x[i] = v.dtype == DT_ACT ? bf16_round(y) : y;
  }
}

Value value_random(CudaCase *c, Dtype type, int64_t rows, int64_t width, double std) {
  Value v = value_new(c, type, rows * width);
  v.rows[0] = (Rows){.count = rows, .width = width};
  fill_random(c, v, 0, v.count, std);
  return v;
}

Value value_weight(CudaCase *c, int64_t rows, int64_t width, int fan_in) {
  return value_random(c, DT_ACT, rows, width, 1 / sqrt(fan_in > 0 ? fan_in : 1));
}

Value value_out(CudaCase *c, Dtype type, int64_t rows, int64_t width) {
  Value v = value_new(c, type, rows * width);
  v.rows[0] = (Rows){.count = rows, .width = width};
  v.fresh = true;
  return v;
}

Value value_sum(CudaCase *c, int64_t rows, int64_t width, int accumulate) {
  return accumulate ? value_random(c, DT_REAL, rows, width, 1) : value_out(c, DT_REAL, rows, width);
}

Value value_sided(CudaCase *c, Dtype type, const int each[MODALITIES], const int width[MODALITIES], double std,
                  bool fillers) {
  const BatchDims *b = c->ops.batch.dims;
  int T = c->ops.dims.T, used = b->n_text + b->n_image;
  Value v = value_new(c, type, two_sided_size(T, each, width));
  int64_t base = two_sided_base(T, each, width, IMAGE), before = (int64_t)b->n_text * each[1];
  v.rows[TEXT] = (Rows){.count = (int64_t)b->n_text * each[0], .width = width[0]};
  v.rows[IMAGE] = (Rows){.at = base + before * width[1], .count = (int64_t)T * each[1] - before, .width = width[1]};
  v.used = v.rows[TEXT].count * width[0] + (int64_t)b->n_image * each[1] * width[1];
  v.fresh = std == 0;
  if (v.fresh) return v;
  int64_t rows = fillers ? v.rows[IMAGE].count : (int64_t)(used - b->n_text) * each[1];
  fill_random(c, v, 0, v.rows[TEXT].count * width[0], std);
  fill_random(c, v, v.rows[IMAGE].at, rows * width[1], std);
  return v;
}

Value value_repeated(CudaCase *c, Dtype type, int64_t count, double std) {
  const int64_t period = (1 << 24) - 3; // no multiple of a row: equal rows do not meet
  Value v = value_new(c, type, std > 0 ? min_i64(count, period) : 1);
  if (std > 0) fill_random(c, v, 0, v.count, std);
  v.count = v.used = count;
  v.fresh = std == 0;
  return v;
}

Value value_bytes(CudaCase *c, const void *data, size_t bytes) {
  Value v = value_new(c, DT_U8, (int64_t)bytes);
  memcpy(v.data, data, bytes);
  return v;
}

Value value_metrics(CudaCase *c) {
  Value v = value_new(c, DT_F64, metrics_size(&c->ops.dims));
  for (int64_t i = 0; i < v.count; i++) ((double *)v.data)[i] = case_uniform(&c->ops);
  return v;
}

Value value_copy(CudaCase *c, Value v) {
  Value copy = v;
  copy.data = memcpy(value_new(c, v.dtype, v.count).data, v.data, (size_t)v.count * host_bytes[v.dtype]);
  return copy;
}

// ---- a call on the device ----

static size_t device_bytes(const Value *v) {
  return (size_t)v->count * backend_cuda.dtype_bytes[v->dtype];
}

static Region region_take(size_t *used, size_t bytes) {
  Region r = {.at = *used, .bytes = bytes};
  *used = (r.at + bytes + ALIGN - 1) / ALIGN * ALIGN + GUARD;
  return r;
}

static size_t region_end(Region r) { // of its guard
  return (r.at + r.bytes + ALIGN - 1) / ALIGN * ALIGN + GUARD;
}

void device_call_plan(DeviceCall *d, const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in,
                      const Value *out) {
  *d = (DeviceCall){.kind = kind, .args = *args, .in = in, .out = out};
  for (int i = 0; i < OP_MAX_IN; i++)
    if (in[i].data) d->in_at[i] = region_take(&d->bytes, device_bytes(&in[i]));
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (out[i].data) d->out_at[i] = region_take(&d->bytes, device_bytes(&out[i]));
  d->pack = region_take(&d->bytes, batch_bind(&(Batch){0}, dims_batch_shape(&c->ops.dims), NULL));
  d->scratch = region_take(&d->bytes, kernel_scratch(c->backend, kind, &c->ops.dims, &d->args));
}

void operand_image(const Value *v, char *image) {
  const real *x = v->data;
  if (v->fresh) return;
  if (v->dtype != DT_ACT && v->dtype != DT_REAL) {
    memcpy(image, v->data, device_bytes(v));
    return;
  }
#pragma omp parallel for
  for (int64_t i = 0; i < v->held; i++) {
    if (is_nothing(x[i])) continue;
    if (v->dtype == DT_ACT)
      ((uint16_t *)(void *)image)[i] = bf16_from_float(x[i]);
    else
      ((real *)(void *)image)[i] = x[i];
  }
}

void device_call_image(const DeviceCall *d, const CudaCase *c, int poison, char *image) {
  memset(image, poison, d->bytes);
  for (int i = 0; i < OP_MAX_IN; i++)
    if (d->in[i].data) operand_image(&d->in[i], image + d->in_at[i].at);
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (d->out[i].data) operand_image(&d->out[i], image + d->out_at[i].at);
  memcpy(image + d->pack.at, c->ops.batch.dims, d->pack.bytes);
}

void device_call_bind(DeviceCall *d, const CudaCase *c, char *base) {
  batch_bind(&d->batch, dims_batch_shape(&c->ops.dims), base + d->pack.at);
  d->call = (KernelCall){
      .batch = &d->batch, .dims = &c->ops.dims, .args = &d->args, .stream = backend_cuda.queues->stream(LANE_COMPUTE)};
  if (d->scratch.bytes) d->call.scratch = base + d->scratch.at;
  for (int i = 0; i < OP_MAX_IN; i++)
    if (d->in[i].data) d->call.in.at[i] = base + d->in_at[i].at;
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (d->out[i].data) d->call.out.at[i] = base + d->out_at[i].at;
}

// Everything but outputs and scratch must be what it was. Returns NULL, or what was changed.
static const char *changed_part(const DeviceCall *d, const char *before, const char *after) {
  const OpInfo *info = &op_info[d->kind];
  for (int i = 0; i < OP_MAX_IN; i++) {
    Region r = d->in_at[i];
    if (d->in[i].data && memcmp(before + r.at, after + r.at, region_end(r) - r.at) != 0) return info->in[i].name;
  }
  for (int i = 0; i < OP_MAX_OUT; i++) {
    Region r = d->out_at[i];
    size_t end = r.at + r.bytes;
    if (d->out[i].data && memcmp(before + end, after + end, region_end(r) - end) != 0) return info->out[i].name;
  }
  if (memcmp(before + d->pack.at, after + d->pack.at, region_end(d->pack) - d->pack.at) != 0) return "the pack";
  size_t end = d->scratch.at + d->scratch.bytes;
  if (memcmp(before + end, after + end, region_end(d->scratch) - end) != 0) return "the scratch memory's end";
  return NULL;
}

// The first element of an output that differs between the two runs, other than by never having been written; -1: none.
static int64_t first_difference(const Value *v, const char *a, const char *b) {
  const size_t size = backend_cuda.dtype_bytes[v->dtype];
  char unwritten[2][8];
  memset(unwritten[0], POISON_NAN, 8);
  memset(unwritten[1], POISON_LARGE, 8);
  for (int64_t i = 0; i < v->count; i++, a += size, b += size) {
    if (memcmp(a, b, size) == 0) continue;
    if (memcmp(a, unwritten[0], size) != 0 || memcmp(b, unwritten[1], size) != 0) return i;
  }
  return -1;
}

// An output as it came back.
static Value value_back(CudaCase *c, const Value *v, const char *image) {
  Value got = value_new(c, v->dtype, v->count);
  if (v->dtype != DT_ACT) {
    memcpy(got.data, image, device_bytes(v));
    return got;
  }
  real *x = got.data;
#pragma omp parallel for
  for (int64_t i = 0; i < v->count; i++) x[i] = from_bits((uint32_t)((const uint16_t *)(const void *)image)[i] << 16);
  return got;
}

static void slab_reserve(CudaCase *c, size_t bytes) {
  if (bytes <= c->slab_bytes) return;
  cuda_case_close(c);
  c->slab = backend_cuda.alloc(bytes);
  if (!c->slab) panic("%s: the device has no %zu MB for one call", c->what, bytes >> 20);
  c->slab_bytes = bytes;
}

bool cuda_case_run(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, Value *got) {
  return c->wanted[kind] && cuda_case_part(c, kind, args, in, out, got);
}

bool cuda_case_part(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, Value *got) {
  static const int poison[2] = {POISON_NAN, POISON_LARGE};
  Report *report = c->report;
  if (report->crashed[kind]) return false;
  double start = time_now();
  DeviceCall d;
  device_call_plan(&d, c, kind, &args, in, out);
  report->running = kind; // should the process die from here on, this call is why
  memcpy(report->what, c->what, sizeof report->what);
  alarm(DEVICE_SECONDS);
  slab_reserve(c, d.bytes);
  device_call_bind(&d, c, c->slab);
  char *before = xmalloc(d.bytes), *after[2] = {xmalloc(d.bytes), xmalloc(d.bytes)};
  for (int run = 0; run < 2; run++) {
    if (run) d.call.takes = 3, d.call.leaves = 40; // beside another lane
    device_call_image(&d, c, poison[run], before);
    backend_cuda.upload(c->slab, before, d.bytes);
    c->backend->fn[kind](&d.call);
    backend_cuda.download(after[run], c->slab, d.bytes);
    const char *changed = changed_part(&d, before, after[run]);
    if (changed) cuda_case_fail(c, kind, "run %d: wrote to %s or behind it", run + 1, changed);
  }
  alarm(0);
  report->running = OP_COUNT;
  report->of[kind].cases++;
  for (int i = 0; i < OP_MAX_OUT; i++) {
    got[i] = none;
    if (!out[i].data) continue;
    got[i] = value_back(c, &out[i], after[0] + d.out_at[i].at);
    if (out[i].anything) continue;
    int64_t at = first_difference(&out[i], after[0] + d.out_at[i].at, after[1] + d.out_at[i].at);
    if (at >= 0)
      cuda_case_fail(c, kind, "%s: element %lld differs between two runs of the same call", op_info[kind].out[i].name,
                     (long long)at);
  }
  free(before);
  free(after[0]);
  free(after[1]);
  report->of[kind].seconds += time_now() - start;
  return true;
}

// ---- comparison ----

// What a row's elements sum to, and its first element that is wrong in kind: written where nothing should be or not
// where something should, not finite, not zero where all of the row is.
typedef struct RowError {
  double difference, got, want; // sums of squares
  int64_t wrong;                // -1: none
} RowError;

static RowError row_error(const real *got, const real *want, Rows rows, int64_t row, Dtype type, bool exact_zero) {
  RowError e = {.wrong = -1};
  const uint32_t untouched = type == DT_ACT ? nothing & 0xFFFF0000u : nothing;
  const int64_t first = rows.at + row * rows.width;
  bool zero = true;
  for (int64_t i = first; i < first + rows.width; i++) zero = zero && want[i] == 0;
  for (int64_t i = first; i < first + rows.width; i++) {
    double g = (double)got[i], w = (double)want[i];
    bool right = true;
    if (is_nothing(want[i]))
      right = bits_of(got[i]) == untouched;
    else if (!isfinite(w))
      right = isnan(w) ? isnan(g) : g == w;
    else if (!isfinite(g) || (zero && exact_zero && g != 0))
      right = false;
    else {
      e.difference += (g - w) * (g - w);
      e.got += g * g;
      e.want += w * w;
    }
    if (!right && e.wrong < 0) e.wrong = i;
  }
  return e;
}

static int64_t worst_element(const real *got, const real *want, Rows rows, int64_t row) {
  int64_t first = rows.at + row * rows.width, worst = first;
  for (int64_t i = first; i < first + rows.width; i++)
    if (fabs((double)got[i] - (double)want[i]) > fabs((double)got[worst] - (double)want[worst])) worst = i;
  return worst;
}

// Rows of one side: relative norm and worst row, both recorded.
static void judge_rows(CudaCase *c, OpKind kind, int out, const char *name, const Value *got, const Value *want,
                       Rows rows) {
  const real *g = got->data, *w = want->data;
  if (rows.count == 0 || rows.width == 0) return;
  RowError *error = xmalloc((size_t)rows.count * sizeof *error);
#pragma omp parallel for
  for (int64_t r = 0; r < rows.count; r++) error[r] = row_error(g, w, rows, r, want->dtype, r >= want->zero_from);
  RowError sum = {.wrong = -1};
  int64_t filled = 0;
  for (int64_t r = 0; r < rows.count; r++) {
    if (sum.wrong < 0) sum.wrong = error[r].wrong;
    sum.difference += error[r].difference;
    sum.got += error[r].got;
    sum.want += error[r].want;
    filled += error[r].want > 0;
  }
  double scale = sum.got > sum.want ? sum.got : sum.want;
  double relative = scale > 0 ? sqrt(sum.difference / scale) : 0;
  double mean = filled ? sum.want / (double)filled : scale, row = 0;
  int64_t worst = 0;
  for (int64_t r = 0; r < rows.count && mean > 0; r++) {
    double part = sqrt(error[r].difference / fmax(mean, error[r].want));
    if (part <= row) continue;
    row = part;
    worst = r;
  }
  OpReport *report = &c->report->of[kind];
  report->error[out] = fmax(report->error[out], relative);
  report->row = fmax(report->row, row);
  if (sum.wrong >= 0 || relative > want->tolerance || row > ROW_TOLERANCE) {
    int64_t at = sum.wrong >= 0 ? sum.wrong : worst_element(g, w, rows, worst), inside = at - rows.at;
    cuda_case_fail(c, kind,
                   "%s: row %lld of %lld, column %lld: expected %.6g%s, got %.6g; relative %.2g, worst row %.2g", name,
                   (long long)(inside / rows.width), (long long)rows.count, (long long)(inside % rows.width),
                   (double)w[at], is_nothing(w[at]) ? " (left alone)" : "", (double)g[at], relative, row);
  }
  free(error);
}

static void judge_doubles(CudaCase *c, OpKind kind, int out, const char *name, const Value *got, const Value *want) {
  const double *g = got->data, *w = want->data;
  for (int64_t i = 0; i < want->count; i++) {
    double error = isfinite(w[i]) ? fabs(g[i] - w[i]) / fmax(fabs(w[i]), 1e-30) : isfinite(g[i]) ? INFINITY : 0;
    c->report->of[kind].error[out] = fmax(c->report->of[kind].error[out], error);
    if (!(error <= want->tolerance))
      cuda_case_fail(c, kind, "%s: number %lld: expected %.9g, got %.9g", name, (long long)i, w[i], g[i]);
  }
}

// The only operand of DT_I32. Where a slot comes from is defined for used slots only.
static void judge_route(CudaCase *c, OpKind kind, const char *name, const Value *got, const Value *want) {
  const Dims *d = &c->ops.dims;
  const BatchDims *b = c->ops.batch.dims;
  Route route;
  route_bind(&route, d, want->data);
  const int32_t *g = got->data, *w = want->data;
  int64_t everywhere = route.source[TEXT] - w;
  for (int64_t i = 0; i < want->count; i++) {
    int64_t text = i - everywhere, image = text - (int64_t)d->T * d->K[TEXT];
    bool used = i < everywhere || text < (int64_t)b->n_text * d->K[TEXT] ||
                (image >= (int64_t)b->n_text * d->K[IMAGE] && image < (int64_t)(b->n_text + b->n_image) * d->K[IMAGE]);
    if (!used || g[i] == w[i]) continue;
    int64_t begin = 0, groups = d->E[TEXT] + d->E[IMAGE];
    const char *part = i < groups ? "begin" : i < 2 * groups ? "count" : i < everywhere ? "slot" : "source";
    if (i >= groups) begin = i < 2 * groups ? groups : i < everywhere ? 2 * groups : everywhere;
    cuda_case_fail(c, kind, "%s: %s[%lld]: expected %d, got %d", name, part, (long long)(i - begin), w[i], g[i]);
    return;
  }
}

static void judge_bytes(CudaCase *c, OpKind kind, const char *name, const Value *got, const Value *want) {
  const uint8_t *g = got->data, *w = want->data;
  for (int64_t i = 0; i < want->count; i++) {
    if (g[i] == w[i]) continue;
    cuda_case_fail(c, kind, "%s: byte %lld: expected %d, got %d", name, (long long)i, w[i], g[i]);
    return;
  }
}

void cuda_case_judge(CudaCase *c, OpKind kind, int out, const char *name, const Value *got, const Value *want) {
  switch (want->dtype) {
  case DT_ACT:
  case DT_REAL:
    for (int m = 0; m < MODALITIES; m++) judge_rows(c, kind, out, name, got, want, want->rows[m]);
    return;
  case DT_F64:
    judge_doubles(c, kind, out, name, got, want);
    return;
  case DT_I32:
    judge_route(c, kind, name, got, want);
    return;
  default:
    judge_bytes(c, kind, name, got, want);
  }
}

// ---- both backends ----

static void cpu_call(OpKind kind, const KernelCall *call, const Value *out) {
  backend_cpu.fn[kind](call);
  for (int i = 0; i < OP_MAX_OUT; i++) value_round(out[i]);
}

// xnew [T, C] of an ADALN_BWD that has it to rebuild, rounded; to be freed.
static real *adaln_sum(const KernelCall *backward) {
  const Dims *d = backward->dims;
  int64_t TC = (int64_t)d->T * d->C;
  real *xnew = xmalloc((size_t)(2 * TC + 2 * d->T) * sizeof *xnew), *h = xnew + TC, *mean = h + TC;
  KernelCall forward = {.in.ADALN_FWD = {.x = backward->in.ADALN_BWD.x,
                                         .branch = backward->in.ADALN_BWD.branch,
                                         .mod = backward->in.ADALN_BWD.mod},
                        .out.ADALN_FWD = {.xnew = xnew, .h = h, .mean = mean, .rstd = mean + d->T},
                        .batch = backward->batch,
                        .dims = d,
                        .args = backward->args};
  backend_cpu.fn[OP_ADALN_FWD](&forward);
  value_round((Value){.data = xnew, .dtype = DT_ACT, .count = TC});
  return xnew;
}

// COMBINE_ADALN_*: the two ops with the sum between them, [T, C], rounded.
static void cpu_combine(const KernelCall *call, OpInputs in, real *sum) {
  KernelCall combine = *call;
  combine.in = in;
  combine.out = (OpOutputs){.EXPERT_COMBINE = {.out = sum}};
  const Value rounded = {.data = sum, .dtype = DT_ACT, .count = (int64_t)call->dims->T * call->dims->C};
  cpu_call(OP_EXPERT_COMBINE, &combine, (Value[OP_MAX_OUT]){rounded});
}

static void cpu_combine_adaln_forward(const KernelCall *call, const Value *out) {
  const size_t bytes = (size_t)call->dims->T * (size_t)call->dims->C * sizeof(real);
  real *b2 = xmalloc(bytes);
  KernelCall site = *call;
  cpu_combine(call,
              (OpInputs){.EXPERT_COMBINE = {.y = call->in.COMBINE_ADALN_FWD.y,
                                            .route = call->in.COMBINE_ADALN_FWD.route,
                                            .weights = call->in.COMBINE_ADALN_FWD.weights,
                                            .add = call->in.COMBINE_ADALN_FWD.add}},
              b2);
  if (call->out.COMBINE_ADALN_FWD.b2) memcpy(call->out.COMBINE_ADALN_FWD.b2, b2, bytes);
  site.in =
      (OpInputs){.ADALN_FWD = {.x = call->in.COMBINE_ADALN_FWD.x, .branch = b2, .mod = call->in.COMBINE_ADALN_FWD.mod}};
  site.out = (OpOutputs){.ADALN_FWD = {.xnew = call->out.COMBINE_ADALN_FWD.xnew,
                                       .h = call->out.COMBINE_ADALN_FWD.h,
                                       .mean = call->out.COMBINE_ADALN_FWD.mean,
                                       .rstd = call->out.COMBINE_ADALN_FWD.rstd}};
  Value outs[OP_MAX_OUT] = {0};
  memcpy(outs, out + OUT_AT(COMBINE_ADALN_FWD, xnew), 4 * sizeof *outs);
  cpu_call_rounded(OP_ADALN_FWD, &site, outs);
  free(b2);
}

static void cpu_combine_adaln_backward(const KernelCall *call, const Value *out) {
  real *dh = xmalloc((size_t)call->dims->T * (size_t)call->dims->C * sizeof *dh);
  KernelCall site = *call;
  cpu_combine(call,
              (OpInputs){.EXPERT_COMBINE = {.y = call->in.COMBINE_ADALN_BWD.dslot,
                                            .route = call->in.COMBINE_ADALN_BWD.route,
                                            .add = call->in.COMBINE_ADALN_BWD.add}},
              dh);
  site.in = (OpInputs){.ADALN_BWD = {.dh = dh,
                                     .dxnew = call->in.COMBINE_ADALN_BWD.dxnew,
                                     .x = call->in.COMBINE_ADALN_BWD.x,
                                     .branch = call->in.COMBINE_ADALN_BWD.branch,
                                     .mod = call->in.COMBINE_ADALN_BWD.mod,
                                     .mean = call->in.COMBINE_ADALN_BWD.mean,
                                     .rstd = call->in.COMBINE_ADALN_BWD.rstd}};
  site.out = (OpOutputs){.ADALN_BWD = {.dx = call->out.COMBINE_ADALN_BWD.dx,
                                       .dbranch = call->out.COMBINE_ADALN_BWD.dbranch,
                                       .dmod = call->out.COMBINE_ADALN_BWD.dmod}};
  cpu_call_rounded(OP_ADALN_BWD, &site, out);
  free(dh);
}

void cpu_call_rounded(OpKind kind, const KernelCall *call, const Value *out) {
  if (kind == OP_COMBINE_ADALN_FWD) {
    cpu_combine_adaln_forward(call, out);
    return;
  }
  if (kind == OP_COMBINE_ADALN_BWD) {
    cpu_combine_adaln_backward(call, out);
    return;
  }
  KernelCall c = *call;
  OpArgs args = *call->args;
  real *xnew = NULL;
  if (kind == OP_ADALN_BWD && c.in.ADALN_BWD.branch && !args.adaln.x_is_new) {
    c.in.ADALN_BWD.x = xnew = adaln_sum(call);
    args.adaln.x_is_new = 1;
    c.args = &args;
  }
  cpu_call(kind, &c, out);
  free(xnew);
  if (kind == OP_ADALN_FWD && c.in.ADALN_FWD.branch) {
    c.in.ADALN_FWD.x = c.out.ADALN_FWD.xnew;
    c.in.ADALN_FWD.branch = c.out.ADALN_FWD.xnew = NULL;
    cpu_call(kind, &c, out);
  }
  if (kind == OP_EXPERT_UP_FWD || kind == OP_SHARED_UP_FWD) { // a's views lie at half the distances of pre's
    const Value *activation = &out[OUT_AT(EXPERT_UP_FWD, a)];
    const real *pre = c.out.EXPERT_UP_FWD.pre; // outputs are the same of both
    real *a = c.out.EXPERT_UP_FWD.a;
    for (int64_t i = 0; i < activation->count; i++)
      if (!isnan(pre[2 * i])) a[i] = pre[2 * i] * real_sigmoid(pre[2 * i]) * pre[2 * i + 1];
    value_round(*activation);
  }
}

void cuda_case_cpu(const CudaCase *c, OpKind kind, OpArgs args, const Value *in, Value *out) {
  KernelCall call = {.batch = &c->ops.batch, .dims = &c->ops.dims, .args = &args};
  for (int i = 0; i < OP_MAX_IN; i++) call.in.at[i] = in[i].data;
  for (int i = 0; i < OP_MAX_OUT; i++) call.out.at[i] = out[i].data;
  cpu_call_rounded(kind, &call, out);
  for (int i = 0; i < OP_MAX_OUT; i++) out[i].fresh = false;
}

void cuda_case_expect(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, const Value *want) {
  Value got[OP_MAX_OUT];
  if (c->bench) {
    if (c->wanted[kind]) cuda_bench_call(c, kind, &args, in, out);
    return;
  }
  if (!cuda_case_run(c, kind, args, in, out, got)) return;
  for (int i = 0; i < OP_MAX_OUT; i++)
    if (want[i].data && !want[i].anything) cuda_case_judge(c, kind, i, op_info[kind].out[i].name, &got[i], &want[i]);
}

void cuda_case_call(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out) {
  Value want[OP_MAX_OUT] = {0};
  if (!c->wanted[kind] || c->report->crashed[kind]) return;
  for (int i = 0; i < OP_MAX_OUT && !c->bench; i++)
    if (out[i].data) want[i] = value_copy(c, out[i]);
  double start = time_now();
  if (!c->bench) cuda_case_cpu(c, kind, args, in, want);
  c->report->of[kind].seconds += time_now() - start;
  cuda_case_expect(c, kind, args, in, out, want);
}
