#include "kernels/kernels.h"

#include <string.h>

const OpInfo op_info[OP_COUNT] = {
#define OPERAND(name, extent, ...) {#name, OF_##extent, __VA_ARGS__ + 0},
#define PAIR(name, extent, ...) {#name "_0", OF_##extent, __VA_ARGS__ + 0}, {#name "_1", OF_##extent, __VA_ARGS__ + 0},
#define COUNT(operands, name) (int)(sizeof((operands *)0)->name / sizeof(void *))
#define OP_ROW(name, pack, flops, in, out)                                                                             \
  {#name, READS_##pack, COUNT(OpInputs, name), COUNT(OpOutputs, name), {in}, {out}},
    OP_TABLE(OP_ROW, OPERAND, PAIR, OPERAND, PAIR)
#undef OPERAND
#undef PAIR
#undef COUNT
#undef OP_ROW
};

_Static_assert(sizeof(OpInputs) == OP_MAX_IN * sizeof(void *), "OP_MAX_IN is too small for a row of the table");
_Static_assert(sizeof(OpOutputs) == OP_MAX_OUT * sizeof(void *), "OP_MAX_OUT is too small for a row of the table");

int kernels_choose(Backend *b, const char *word) {
  int n = 0;
  for (const KernelWay *w = b->ways; w < b->ways + b->n_ways; w++) {
    if (strcmp(w->word, word) != 0) continue;
    b->fn[w->op] = w->fn;
    b->scratch[w->op] = w->scratch;
    b->host_waits[w->op] = w->host_waits;
    n++;
  }
  return n;
}

size_t kernel_scratch(const Backend *b, OpKind kind, const Dims *dims, const OpArgs *args) {
  return b->scratch[kind] ? b->scratch[kind](kind, dims, args) : 0;
}

static float bf16_to_float(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

uint16_t bf16_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40); // quiet: rounding could turn it into an infinity
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void floats_from(const void *elements, size_t element, int64_t n, float *out) {
  const uint16_t *half = elements;
  const double *wide = elements;
  if (element == sizeof *out) {
    memcpy(out, elements, (size_t)n * sizeof *out);
    return;
  }
  for (int64_t i = 0; i < n; i++) out[i] = element == sizeof *half ? bf16_to_float(half[i]) : (float)wide[i];
}

void floats_to(const float *x, size_t element, int64_t n, void *elements) {
  uint16_t *half = elements;
  double *wide = elements;
  if (element == sizeof *x)
    memcpy(elements, x, (size_t)n * sizeof *x);
  else if (element == sizeof *half)
    for (int64_t i = 0; i < n; i++) half[i] = bf16_from_float(x[i]);
  else
    for (int64_t i = 0; i < n; i++) wide[i] = (double)x[i];
}

void queue_copy(const Backend *b, Lane lane, void *to, const void *from, size_t bytes) {
  OpArgs args = {.span = {.count = (int64_t)bytes}};
  b->fn[OP_COPY](&(KernelCall){.in.COPY = {from}, .out.COPY = {to}, .args = &args, .stream = b->queues->stream(lane)});
}
