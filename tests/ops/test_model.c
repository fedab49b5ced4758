// The whole model: gradients against central differences (double build), and the proofs of the program: ordering,
// random legal replays, random memory policies, exact memory, no allocation in a step.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/base.h"
#include "data/packer.h"
#include "kernels/cpu/cpu.h"
#include "model/program/cost.h"
#include "model/program/policy.h"
#include "model/program/replay.h"
#include "tests/ops/model_case.h"
#include "tests/unit/count_malloc.h"
#include "tests/unit/order_check.h"

#include <malloc.h>
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VARIANTS = 5 };

static size_t slab_bytes(const ModelCase *c) {
  return (size_t)c->model.params.total * sizeof(real);
}

// Gradients are written per parameter: the padding between them keeps the poison, so it is compared as zeros.
static real *copy_grads(const ModelCase *c) {
  real *g = xcalloc((size_t)c->model.params.total, sizeof *g);
  const real *src = model_case_slab(c, SPACE_GRADS);
  for (int i = 0; i < c->model.params.n; i++) {
    const Param *p = &c->model.params.of[i];
    memcpy(g + p->offset, src + p->offset, (size_t)p->count * sizeof *g);
  }
  return g;
}

static void assert_same_grads(const ModelCase *c, const real *want, const char *what) {
  real *got = copy_grads(c);
  for (int i = 0; i < c->model.params.n; i++) {
    const Param *p = &c->model.params.of[i];
    if (memcmp(got + p->offset, want + p->offset, (size_t)p->count * sizeof *got) != 0)
      fail_msg("%s: gradient of %s differs", what, p->name);
  }
  free(got);
}

static real *keep_gradients(ModelCase *c, double *loss) {
  ModelProgram m = model_case_record(c, MODE_TRAIN_FIRST, NULL, 0);
  model_case_reset(c);
  program_replay(m.program, NULL);
  program_free(m.program);
  if (loss) *loss = model_case_loss(c);
  return copy_grads(c);
}

static PolicyTable random_policy(ModelCase *c) {
  PolicyTable t = policy_table_new(c->config.model.layers, MEMORY_KEEP);
  for (int i = 0; i < t.layers * SAVED_COUNT; i++) {
    Policy p = (Policy)case_int(&c->ops, 0, 2);
    t.of[i] = (uint8_t)(policy_allowed((Saved)(i % SAVED_COUNT), p) ? p : POLICY_KEEP);
  }
  return t;
}

// A backend without the ops that are made of two, under any policy, gives the same bits.
static void test_separate_ops_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 150 + (uint64_t)v, v);
    real *want = keep_gradients(&c, NULL);
    Backend separate = backend_cpu;
    separate.fn[OP_COMBINE_ADALN_FWD] = separate.fn[OP_COMBINE_ADALN_BWD] = separate.fn[OP_ATTENTION_ROPE_BWD] = NULL;
    c.model.backend = &separate;
    for (int i = 0; i < 5; i++) {
      PolicyTable t = i ? random_policy(&c) : policy_table_new(c.config.model.layers, MEMORY_KEEP);
      ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
      model_case_reset(&c);
      program_replay(m.program, NULL);
      assert_same_grads(&c, want, "separate ops");
      program_free(m.program);
      policy_table_free(&t);
    }
    free(want);
    model_case_free(&c);
  }
}

static void test_every_gradient_is_reached(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 100 + (uint64_t)v, v);
    real *g = keep_gradients(&c, NULL);
    for (int i = 0; i < c.model.params.n; i++) {
      const Param *p = &c.model.params.of[i];
      double norm = norm_of(g + p->offset, p->count);
      if (!(norm > 0) || !isfinite(norm)) fail_msg("variant %d: gradient of %s has norm %g", v, p->name, norm);
    }
    free(g);
    model_case_free(&c);
  }
}

// Double build: a few elements of every parameter against central differences of the loss.
static void test_central_differences(void **state) {
  (void)state;
  if (!CASE_DOUBLE) skip();
  const double h = 1e-6;
  int threads = omp_get_max_threads();
  omp_set_num_threads(1); // bits do not depend on it, and thousands of passes this small wait for each other's threads
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 200 + (uint64_t)v, v);
    real *g = keep_gradients(&c, NULL);
    ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, NULL, 0);
    real *w = model_case_slab(&c, SPACE_WEIGHTS);
    for (int i = 0; i < c.model.params.n; i++) {
      const Param *p = &c.model.params.of[i];
      double diff = 0, size = 0;
      for (int k = 0; k < 3; k++) {
        // The largest gradient first, so that the comparison means something, then random ones.
        int64_t at = p->offset + case_int(&c.ops, 0, (int)p->count - 1), best = p->offset;
        for (int64_t j = p->offset; k == 0 && j < p->offset + p->count; j++)
          if (fabs((double)g[j]) > fabs((double)g[best])) best = j;
        if (k == 0) at = best;
        real kept = w[at];
        double side[2];
        for (int s = 0; s < 2; s++) {
          w[at] = kept + (real)(s ? -h : h);
          model_case_reset(&c);
          program_replay(m.program, NULL);
          side[s] = model_case_loss(&c);
        }
        w[at] = kept;
        double want = (side[0] - side[1]) / (2 * h);
        diff += (want - (double)g[at]) * (want - (double)g[at]);
        size += want * want;
      }
      if (sqrt(diff) > 1e-5 * sqrt(size) + 1e-9)
        fail_msg("variant %d: %s: off by %g of %g", v, p->name, sqrt(diff), sqrt(size));
    }
    program_free(m.program);
    free(g);
    model_case_free(&c);
  }
  omp_set_num_threads(threads);
}

static void test_random_policies_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 300 + (uint64_t)v, v);
    double want_loss;
    real *want = keep_gradients(&c, &want_loss);
    for (int i = 0; i < 50; i++) {
      PolicyTable t = random_policy(&c);
      ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
      Error err;
      if (order_check(m.program, &err) != 0) fail_msg("policy %d: %s", i, err.text);
      model_case_reset(&c);
      program_replay(m.program, NULL);
      assert_same_grads(&c, want, "random policy");
      assert_true(model_case_loss(&c) == want_loss);
      program_free(m.program);
      policy_table_free(&t);
    }
    free(want);
    model_case_free(&c);
  }
}

static void test_random_orders_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 400 + (uint64_t)v, v);
    real *want = keep_gradients(&c, NULL);
    for (int i = 0; i < 12; i++) {
      PolicyTable t = i == 0 ? policy_table_new(c.config.model.layers, MEMORY_OFFLOAD) : random_policy(&c);
      ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
      for (int k = 0; k < 4; k++) {
        model_case_reset(&c);
        program_replay_random(m.program, case_bits(&c.ops));
        assert_same_grads(&c, want, "random order");
      }
      program_free(m.program);
      policy_table_free(&t);
    }
    free(want);
    model_case_free(&c);
  }
}

// Bytes an op reads or writes in the arena, at most.
static void test_arena_peak_is_exact(void **state) {
  (void)state;
  const MemoryPolicy policies[] = {MEMORY_KEEP, MEMORY_RECOMPUTE, MEMORY_OFFLOAD};
  int64_t peak[3];
  for (int i = 0; i < 3; i++) {
    ModelCase c;
    model_case_init(&c, 500, 1);
    PolicyTable t = policy_table_new(c.config.model.layers, policies[i]);
    ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
    int64_t most = 0;
    for (int k = 0; k < m.program->n_tensors; k++) {
      const Tensor *x = &m.program->tensors[k];
      if (x->space == SPACE_ARENA && x->first >= 0) most = max_i64(most, x->offset + x->bytes);
    }
    peak[i] = m.program->arena_bytes;
    assert_true(most <= peak[i] && most > peak[i] - 256);
    assert_true(m.program->live_bytes <= peak[i]);
    // Nothing beyond the peak is touched: the bytes behind it keep a pattern.
    size_t guard = 4096;
    char *arena = aligned_alloc(256, ((size_t)peak[i] + guard + 255) / 256 * 256);
    memset(arena + peak[i], 0x5A, guard);
    Bases b = c.bases;
    b.of[SPACE_ARENA] = arena;
    program_bind(m.program, &b);
    model_case_reset(&c);
    program_replay(m.program, NULL);
    for (size_t k = 0; k < guard; k++) assert_int_equal(arena[peak[i] + (int64_t)k], 0x5A);
    free(arena);
    program_free(m.program);
    policy_table_free(&t);
    model_case_free(&c);
  }
  assert_true(peak[1] < peak[0]);
  assert_true(peak[2] < peak[0]);
}

static void test_separate_allocations_same_bits(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 600, 1);
  real *want = keep_gradients(&c, NULL);
  PolicyTable t = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
  ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 1);
  model_case_reset(&c);
  program_replay(m.program, NULL);
  assert_same_grads(&c, want, "separate allocations");
  program_free(m.program);
  policy_table_free(&t);
  free(want);
  model_case_free(&c);
}

// A wait taken out, and a life cut short, must both be caught.
static void test_planted_faults_are_caught(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 700, 0);
  PolicyTable t = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
  ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
  Program *p = m.program;
  Error err;
  int waits = 0, caught = 0;
  assert_int_equal(order_check(p, &err), 0);
  for (int i = 0; i < p->n_ops; i++) {
    if (!p->ops[i].n_waits) continue;
    Op kept = p->ops[i];
    p->ops[i].n_waits--;
    waits++;
    caught += order_check(p, &err) != 0;
    p->ops[i] = kept;
  }
  assert_true(waits > 0);
  assert_int_equal(caught, waits);

  // Two tensors whose lives meet are laid on each other, as a free too early would, in the arena and in the host slab:
  // every such fault is seen.
  const Space spaces[] = {SPACE_ARENA, SPACE_HOST};
  for (int s = 0; s < 2; s++) {
    int planted = 0, stride = s ? 1 : 7;
    caught = 0;
    for (int a = 0; a < p->n_tensors && planted < 60; a++) {
      for (int b = a + 1; b < p->n_tensors; b += stride) {
        Tensor *x = &p->tensors[a], *y = &p->tensors[b];
        if (x->space != spaces[s] || y->space != spaces[s] || x->first < 0 || y->first < 0) continue;
        // y begins strictly inside x's life, so x is read after y was written.
        if (!(y->first > x->first && y->first < x->last)) continue;
        int64_t kept = y->offset;
        y->offset = x->offset;
        planted++;
        caught += order_check(p, &err) != 0;
        y->offset = kept;
        break;
      }
    }
    assert_true(planted >= (s ? 8 : 20));
    assert_int_equal(caught, planted);
  }
  program_free(p);
  policy_table_free(&t);
  model_case_free(&c);
}

// The first op of this kind.
static int op_find(const Program *p, OpKind kind) {
  int i = 0;
  while (i < p->n_ops && p->ops[i].kind != kind) i++;
  return i;
}

// Whatever the backward pass of a layer asks for is saved under its name, so that a policy can say what happens to it:
// with everything recomputed nothing of a layer outlives its forward pass but x.
static void test_everything_asked_for_is_saved(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 1200 + (uint64_t)v, v);
    PolicyTable t = policy_table_new(c.config.model.layers, MEMORY_RECOMPUTE);
    ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
    const Program *p = m.program;
    int middle = op_find(p, OP_HEAD_CE), site = middle; // of the heads
    while (p->ops[site].kind != OP_COMBINE_ADALN_FWD) site--;
    int shared = c.ops.dims.S[TEXT] || c.ops.dims.S[IMAGE], seen[SAVED_COUNT] = {0};
    for (int k = 0; k < p->n_tensors; k++) {
      const Tensor *x = &p->tensors[k];
      if (x->saved >= 0 && x->producer < middle) seen[x->saved]++;
      if (x->space != SPACE_ARENA || x->layer < 0 || x->first < 0 || x->first >= site || x->last <= middle) continue;
      if (x->saved != SAVED_X && !x->is_output)
        fail_msg("variant %d: %s of layer %d lives from op %d to %d, past the loss at %d", v, x->name, x->layer,
                 x->first, x->last, middle);
    }
    for (int s = 0; s < SAVED_COUNT; s++) {
      if (s == SAVED_SHARED_PRE && !shared) continue;
      if (seen[s] < c.config.model.layers) fail_msg("variant %d: %s is saved %d times", v, saved_name[s], seen[s]);
    }
    program_free(m.program);
    policy_table_free(&t);
    model_case_free(&c);
  }
}

// The FLOPs a run reports (6 for every parameter that a token multiplies with, attention without its recomputation) are
// those of the program's products, priced one by one.
static void test_flops_are_those_of_the_ops(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 1300 + (uint64_t)v, v);
    ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, NULL, 0);
    const Dims *d = &c.ops.dims;
    const Extents x = {.text = 31, .image = 44, .segments = 6, .targets = 31, .pairs = 1234};
    double sum = 0;
    for (int i = 0; i < m.program->n_ops; i++) {
      const Op *op = &m.program->ops[i];
      int linear = op->kind == OP_LINEAR_FWD || op->kind == OP_LINEAR_DGRAD || op->kind == OP_LINEAR_WGRAD;
      int attention = op->kind == OP_ATTENTION_FWD || op->kind == OP_ATTENTION_ROPE_BWD;
      int other = op->kind == OP_ROUTER_FWD || op->kind == OP_ROUTER_BWD || op->kind == OP_HEAD_CE ||
                  op->kind == OP_EXPERT_UP_FWD || op->kind == OP_EXPERT_UP_DGRAD || op->kind == OP_EXPERT_UP_WGRAD ||
                  op->kind == OP_EXPERT_DOWN_FWD || op->kind == OP_EXPERT_DOWN_BWD ||
                  op->kind == OP_EXPERT_DOWN_WGRAD || op->kind == OP_SHARED_UP_FWD || op->kind == OP_SHARED_DOWN_BWD;
      double flops, bytes;
      if (linear && op->args.linear.extent == EXT_SEGMENTS) continue; // the condition is not a token's
      if (!linear && !attention && !other) continue;
      op_cost(m.program, op, &x, &flops, &bytes);
      if (op->kind == OP_ATTENTION_ROPE_BWD) flops -= 20 * (x.text + x.image) * (d->H + d->G) * d->D; // QK-norm's
      sum += attention ? flops * 12 / 14 : flops;
    }
    // Pixels need no gradient: the first product behind them has none.
    int first = c.config.model.patch_bottleneck ? c.config.model.patch_bottleneck : d->C;
    sum += 2.0 * d->P * first * x.image;
    double want = transformer_flops(&c.config, x.text, x.image, x.pairs);
    if (fabs(sum / want - 1) > 1e-12) fail_msg("variant %d: the ops take %.0f FLOPs, %.0f are reported", v, sum, want);
    program_free(m.program);
    model_case_free(&c);
  }
}

static void test_thread_count_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < VARIANTS; v++) {
    ModelCase c;
    model_case_init(&c, 800 + (uint64_t)v, v);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    real *want = keep_gradients(&c, NULL);
    for (int n = 2; n <= 5; n++) {
      omp_set_num_threads(n);
      real *got = keep_gradients(&c, NULL);
      assert_memory_equal(got, want, slab_bytes(&c));
      free(got);
    }
    omp_set_num_threads(threads);
    free(want);
    model_case_free(&c);
  }
}

// k micro-batches: the sum of what each gives alone, to the bit, since each is formed from zero and then added.
static void test_accumulation_is_the_sum(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 900, 1);
  ModelProgram first = model_case_record(&c, MODE_TRAIN_FIRST, NULL, 0);
  ModelProgram later = model_case_record(&c, MODE_TRAIN_MIDDLE, NULL, 0);
  Bases b = c.bases;
  program_bind(first.program, &b);
  program_bind(later.program, &b);
  real *alone[2];
  size_t bytes = batch_bind(&(Batch){0}, dims_batch_shape(&c.ops.dims), NULL);
  char *packs[2];
  for (int i = 0; i < 2; i++) {
    op_case_pack(&c.ops, PACK_MIXED);
    packs[i] = memcpy(xmalloc(bytes), c.ops.batch.dims, bytes);
    model_case_reset(&c);
    program_replay(first.program, NULL);
    alone[i] = copy_grads(&c);
  }
  model_case_reset(&c);
  memset(c.bases.of[SPACE_MICRO_GRADS], 0, slab_bytes(&c));
  memset(c.bases.of[SPACE_GRADS], 0, slab_bytes(&c));
  for (int i = 0; i < 2; i++) {
    memcpy(c.bases.of[SPACE_STAGING], packs[i], bytes);
    program_replay(i ? later.program : first.program, NULL);
  }
  for (int64_t i = 0; i < c.model.params.total; i++) alone[0][i] += alone[1][i];
  assert_same_grads(&c, alone[0], "accumulation");
  for (int i = 0; i < 2; i++) {
    free(packs[i]);
    free(alone[i]);
  }
  program_free(first.program);
  program_free(later.program);
  model_case_free(&c);
}

// A random captioned document of one of four kinds.
static void random_document(ModelCase *c, Document *d, uint64_t draw, uint8_t *pixels) {
  OpCase *o = &c->ops;
  int32_t ids[8];
  int n = case_int(o, 1, 8), V = c->config.model.vocab;
  for (int i = 0; i < n; i++) ids[i] = case_int(o, 0, 255);
  ImageGrid grid = {2, 2};
  for (int i = 0; i < 4 * c->ops.dims.P; i++) pixels[i] = (uint8_t)case_bits(o);
  switch (draw % 4) {
  case 0:
    document_caption_to_image(d, draw, V, ids, n, grid, 0.4f);
    break;
  case 1:
    document_image_to_caption(d, draw, V, ids, n, grid);
    break;
  case 2:
    document_text(d, draw, V, ids, n, true);
    break;
  default:
    document_caption_to_image(d, draw, V, NULL, 0, grid, 0.8f);
  }
  for (int i = 0; i < d->parts; i++) d->part[i].patch = d->part[i].kind == PART_IMAGE ? pixels : NULL;
}

// k micro-batches equal one big batch within rounding, router terms off (their means are per micro-batch): the same
// documents in three packs, and in one of three times the slots.
static void test_micro_batches_equal_one_batch(void **state) {
  (void)state;
  enum { PACKS = 3, EACH = 4, DOCS = PACKS * EACH };
  ModelCase c;
  model_case_init(&c, 950, 1);
  c.config.router.balance = c.config.router.z = 0;
  Document docs[DOCS] = {0};
  const Document *list[DOCS];
  uint8_t *pixels = xmalloc((size_t)(DOCS * 4 * c.ops.dims.P));
  int64_t targets = 0, noised = 0;
  for (int i = 0; i < DOCS; i++) {
    random_document(&c, &docs[i], (uint64_t)i, pixels + i * 4 * c.ops.dims.P);
    DocumentSize size = document_size(&docs[i], c.config.model.vocab);
    targets += size.targets;
    noised += size.noised;
    list[i] = &docs[i];
  }
  int slots = c.ops.dims.T, segments = c.ops.dims.segments;
  real *grads[2];
  for (int big = 0; big < 2; big++) {
    int packs = big ? 1 : PACKS, each = DOCS / packs;
    c.ops.dims = dims_from_config(&c.config, big ? PACKS * slots : slots, big ? PACKS * segments : segments);
    op_case_pack(&c.ops, PACK_EMPTY); // makes the block
    model_case_fit_pack(&c);
    ModelProgram first = model_case_record(&c, MODE_TRAIN_FIRST, NULL, 0);
    ModelProgram later = model_case_record(&c, MODE_TRAIN_MIDDLE, NULL, 0);
    program_bind(first.program, &c.bases);
    program_bind(later.program, &c.bases);
    for (int k = 0; k < packs; k++) {
      Error err;
      BatchShape shape = dims_batch_shape(&c.ops.dims);
      if (pack_layout(list + k * each, each, shape, &c.ops.batch, &err) != 0) fail_msg("%s", err.text);
      pack_scale(&c.ops.batch, shape, 1, targets, noised, packs, 7);
      memcpy(c.bases.of[SPACE_STAGING], c.ops.batch.dims, batch_bind(&(Batch){0}, shape, NULL));
      program_replay(k ? later.program : first.program, NULL);
    }
    grads[big] = copy_grads(&c);
    program_free(first.program);
    program_free(later.program);
  }
  double limit = CASE_DOUBLE ? 1e-12 : 1e-5;
  for (int i = 0; i < c.model.params.n; i++) {
    const Param *p = &c.model.params.of[i];
    double *want = case_double(&c.ops, grads[1] + p->offset, p->count);
    double error = relative_error(grads[0] + p->offset, want, p->count);
    if (!(error <= limit)) fail_msg("%s: micro-batches differ from one batch by %g", p->name, error);
  }
  for (int i = 0; i < DOCS; i++) document_free(&docs[i]);
  free(pixels);
  free(grads[0]);
  free(grads[1]);
  model_case_free(&c);
}

// Changing any token after an image changes no bit of what is predicted for it. Every expert is chosen by every row
// here (variant 4): a changed choice would move other rows to other places of the experts' products, whose BLAS kernels
// round differently by place.
static void test_images_do_not_see_what_follows(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 1000, 4);
  ModelProgram m = model_case_record(&c, MODE_EVAL, NULL, 0);
  const Batch *b = &c.ops.batch;
  int64_t n = (int64_t)c.ops.dims.T * c.ops.dims.P;
  real *want = xmalloc((size_t)n * sizeof *want);
  int changed = 0;
  for (int row = -1; row < b->dims->n_text; row++) {
    int32_t kept = row < 0 ? 0 : b->token[row];
    int doc_start = row < 0 ? 0 : b->doc_start[b->seq[row]], images = 0;
    // Words only, and only where an image of the same document stands before; the id lists of the backward pass are not
    // read by a forward program.
    for (int g = 1; row >= 0 && g < b->dims->n_segments; g++) {
      int first = b->seq[b->seg_start[g]];
      images += first >= doc_start && first < b->seq[row] && b->doc_start[first] == doc_start;
    }
    if (row >= 0 && (!images || kept >= 256)) continue;
    if (row >= 0) b->token[row] = (kept + 7) % 256;
    model_case_reset(&c);
    program_replay(m.program, NULL);
    if (row >= 0) b->token[row] = kept;
    const real *xhat = program_address(m.program, m.xhat);
    if (row < 0) {
      memcpy(want, xhat, (size_t)n * sizeof *want);
      continue;
    }
    changed++;
    for (int g = 1; g < b->dims->n_segments; g++) {
      int first = b->seq[b->seg_start[g]];
      if (b->doc_start[first] != doc_start || first > b->seq[row]) continue;
      // A later image's pooled caption may hold the token; this one stands before it.
      int64_t at = (int64_t)b->seg_start[g] * c.ops.dims.P, len = (int64_t)b->seg_len[g] * c.ops.dims.P;
      if (memcmp(want + at, xhat + at, (size_t)len * sizeof *want) != 0)
        fail_msg("row %d changed segment %d before it", row, g);
    }
  }
  assert_true(changed > 3);
  free(want);
  program_free(m.program);
  model_case_free(&c);
}

static void test_step_allocates_nothing(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 1100, 1);
  PolicyTable t = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
  ModelProgram m = model_case_record(&c, MODE_TRAIN_FIRST, &t, 0);
  for (int i = 0; i < 3; i++) {
    model_case_reset(&c);
    program_replay(m.program, NULL);
  }
  model_case_reset(&c);
  struct mallinfo2 before = mallinfo2();
  int64_t count = allocations_counted(), of_blas = allocations_of_blas();
  for (int i = 0; i < 5; i++) program_replay(m.program, NULL);
  count = allocations_counted() - count;
  of_blas = allocations_of_blas() - of_blas;
  struct mallinfo2 after = mallinfo2();
  print_message("OpenBLAS's %s kernels allocate %lld times a replay, and free it\n", blas_kernels(),
                (long long)of_blas / 5);
  assert_int_equal(count, 0);
  assert_int_equal(after.uordblks, before.uordblks); // OpenBLAS's too
  program_free(m.program);
  policy_table_free(&t);
  model_case_free(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_gradient_is_reached),
      cmocka_unit_test(test_separate_ops_same_bits),
      cmocka_unit_test(test_central_differences),
      cmocka_unit_test(test_random_policies_same_bits),
      cmocka_unit_test(test_random_orders_same_bits),
      cmocka_unit_test(test_arena_peak_is_exact),
      cmocka_unit_test(test_separate_allocations_same_bits),
      cmocka_unit_test(test_planted_faults_are_caught),
      cmocka_unit_test(test_everything_asked_for_is_saved),
      cmocka_unit_test(test_flops_are_those_of_the_ops),
      cmocka_unit_test(test_thread_count_same_bits),
      cmocka_unit_test(test_accumulation_is_the_sum),
      cmocka_unit_test(test_micro_batches_equal_one_batch),
      cmocka_unit_test(test_images_do_not_see_what_follows),
      cmocka_unit_test(test_step_allocates_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
