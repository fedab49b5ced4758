// What tests/ops/bench.sh needs to know about products.
//
//   bench_gemm          rates of plain OpenBLAS: every core multiplies on its own, single-threaded
//   bench_gemm DUMP     the products of one micro-step: "OP GFLOP" for each kind of op that is a product, for the mean
//                       of the packs of a folder that ./train CONFIG --dump wrote
//
// FLOPs are counted at the rows the packs really have, where op_cost() counts at capacity.
#include "model/config/load.h"
#include "model/files/safetensors.h"
#include "trainer/engine.h"

#include <cblas.h>
#include <omp.h>
#include <stdlib.h>

typedef struct Counts {
  double text, image, segments, targets; // rows; image segments
} Counts;

// ---- FLOPs ----

static double linear_flops(const OpArgs *a, const Counts *n) {
  double text = 2.0 * a->linear.in_dim[0] * a->linear.out_dim[0];
  double image = 2.0 * a->linear.in_dim[1] * a->linear.out_dim[1];
  switch (a->linear.extent) {
  case EXT_ROWS:
    return (n->text + n->image) * text;
  case EXT_IMAGE:
    return n->image * text;
  case EXT_SEGMENTS:
    return n->segments * text;
  case EXT_SPLIT:
    return n->text * text + n->image * image;
  }
  return 0;
}

// 0 for ops that are no product. Routers are none: four columns beside a softmax and a sort.
static double product_flops(const Op *op, const Dims *d, const Counts *n) {
  double experts = 2.0 * d->C * (n->text * d->K[TEXT] * d->F[TEXT] + n->image * d->K[IMAGE] * d->F[IMAGE]);
  switch (op->kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    return linear_flops(&op->args, n);
  case OP_EXPERT_UP_FWD:
  case OP_EXPERT_UP_DGRAD:
  case OP_EXPERT_UP_WGRAD:
    return 2 * experts;
  case OP_EXPERT_DOWN_FWD:
  case OP_EXPERT_DOWN_BWD:
  case OP_EXPERT_DOWN_WGRAD:
    return experts;
  case OP_HEAD_CE: // logits and both gradients
    return 6 * n->targets * d->C * d->V;
  case OP_MOD_FWD:
    return 2 * n->segments * d->Z * d->M;
  default:
    return 0;
  }
}

static int counts_read(const char *dump, int packs, Counts *mean, Error *err) {
  *mean = (Counts){0};
  for (int k = 0; k < packs; k++) {
    char *path = xasprintf("%s/micro_%d.safetensors", dump, k);
    SafeFile *f = safetensors_open(path, err);
    const SafeTensor *dims = f ? safetensors_get(f, "dims", SAFE_I32, 1, (const int64_t[]){5}, err) : NULL;
    free(path);
    if (!dims) {
      safetensors_close(f);
      return -1;
    }
    const int32_t *n = dims->data; // text, image, segments (0 is the text's), targets, ids
    mean->text += (double)n[0] / packs;
    mean->image += (double)n[1] / packs;
    mean->segments += (double)(n[2] - 1) / packs;
    mean->targets += (double)n[3] / packs;
    safetensors_close(f);
  }
  return 0;
}

static int print_products(const char *dump, Error *err) {
  Config config;
  Engine e;
  Counts n;
  char *path = xasprintf("%s/config.json", dump);
  int bad = config_load(&config, path, NULL, 0, err) || counts_read(dump, config.train.micro_batches, &n, err) ||
            engine_record(&e, &config, &backend_cpu, 1, err);
  free(path);
  if (bad) return -1;
  const Program *p = e.first.program;
  double flops[OP_COUNT] = {0};
  for (int i = 0; i < p->n_ops; i++) flops[p->ops[i].kind] += product_flops(&p->ops[i], &p->dims, &n);
  for (int k = 0; k < OP_COUNT; k++)
    if (flops[k] > 0) printf("%s %.9f\n", op_info[k].name, flops[k] / 1e9);
  engine_free(&e);
  return 0;
}

// ---- rates ----

// C [M, N] = A [M, K] B [N, K]^T in every thread at once, on matrices of its own.
static void print_rate(int M, int N, int K) {
  enum { SAMPLES = 15 };
  const double sample_flops = 2e9; // of a thread: some 20 ms
  int threads = omp_get_max_threads(), repeats = (int)(sample_flops / (2.0 * M * N * K)) + 1;
  size_t a = (size_t)M * (size_t)K, b = (size_t)N * (size_t)K, c = (size_t)M * (size_t)N, all = a + b + c;
  float *memory = xmalloc((size_t)threads * all * sizeof *memory);
  for (size_t i = 0; i < (size_t)threads * all; i++) memory[i] = (float)(i % 7) - 3;
  double rate[SAMPLES];
  for (int s = -1; s < SAMPLES; s++) { // the first one warms up
    double start = time_now();
#pragma omp parallel
    {
      float *A = memory + (size_t)omp_get_thread_num() * all, *B = A + a, *C = B + b;
      for (int r = 0; r < repeats; r++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, M, N, K, 1, A, K, B, K, 0, C, N);
    }
    if (s >= 0) rate[s] = 2e-9 * M * N * K * repeats * threads / (time_now() - start);
  }
  double median = median_f64(rate, SAMPLES); // sorts them
  printf("%dx%dx%d median %.1f best %.1f\n", M, N, K, median, rate[SAMPLES - 1]);
  free(memory);
}

int main(int argc, char **argv) {
  Error err;
  if (argc > 2) {
    fprintf(stderr, "usage: bench_gemm [DUMP]\n");
    return 2;
  }
  if (argc == 2) {
    if (print_products(argv[1], &err) != 0) fatal(&err);
    return 0;
  }
  openblas_set_num_threads(1);
  print_rate(256, 384, 128);
  print_rate(1024, 1024, 1024);
  return 0;
}
