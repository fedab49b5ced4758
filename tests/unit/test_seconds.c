// Costs in seconds: classes of ops, what was measured and what follows from it, the model, and the file.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/bits.h"
#include "model/config/load.h"
#include "model/program/expected.h"
#include "model/program/policy.h"
#include "model/program/seconds_file.h"
#include "model/transformer.h"
#include "model/update.h"
#include "tests/unit/temp_folder.h"

static const Extents sketchy = {.text = 100, .image = 150, .segments = 4, .targets = 90, .pairs = 20000};

// A backend of which only sizes and rates matter.
static Backend sized_backend(void) {
  Backend b = {.name = "sized", .head_chunk = 64};
  const size_t bytes[DT_COUNT] = {
      [DT_ACT] = 2, [DT_REAL] = 4, [DT_I32] = 4, [DT_U8] = 1, [DT_F64] = 8, [DT_MOMENT] = 4};
  memcpy(b.dtype_bytes, bytes, sizeof bytes);
  b.assumed = (DeviceRates){.bytes = 1e12, .flops = 1e14};
  b.assumed_link = (LinkRates){.d2h = 5e10, .h2d = 4e10, .both_d2h = 3e10, .both_h2d = 2e10, .latency = 1e-5};
  b.assumed_group = (GroupRates){.reduce = 1e9, .gather = 2e9, .latency = 1e-3, .drag = .125};
  return b;
}

static void no_kernel(const KernelCall *call) {
  (void)call;
}

// Three layers' training program of a small model under one policy.
static void record(Config *c, Backend *b, Model *model, MemoryPolicy memory, PolicyTable *policy, ModelProgram *m) {
  Error err;
  assert_int_equal(config_load(c, NULL, (const char *[]){"model.layers=3", "model.text.shared_dim=64"}, 2, &err), 0);
  *b = sized_backend();
  *model = (Model){.config = c, .backend = b, .params = params_build(c)};
  *policy = policy_table_new(c->model.layers, memory);
  *m = transformer_record(model, MODE_TRAIN_FIRST, 256, 5, policy);
}

static void discard(Model *model, PolicyTable *policy, ModelProgram *m) {
  program_free(m->program);
  policy_table_free(policy);
  params_free(&model->params);
}

// Ops at the same place of different layers are one class, and ops of a class are of one kind and have equal operands.
static void test_classes(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_RECOMPUTE, &policy, &m);
  const Program *p = m.program;
  int forward = 0, equal = 0;
  for (int i = 0; i < p->n_ops; i++)
    for (int k = 0; k < i; k++) {
      const Op *x = &p->ops[i], *y = &p->ops[k];
      if (op_class(p, x) != op_class(p, y)) continue;
      equal++;
      assert_int_equal(x->kind, y->kind);
      assert_int_equal(x->acc, y->acc);
      for (int o = 0; o < OP_MAX_OUT; o++) {
        assert_int_equal(x->out[o] == NO_TENSOR, y->out[o] == NO_TENSOR);
        if (x->out[o] != NO_TENSOR) assert_int_equal(p->tensors[x->out[o]].count, p->tensors[y->out[o]].count);
      }
      if (x->kind == OP_ATTENTION_BWD) forward++;
    }
  assert_int_equal(forward, 3); // each of three layers with each other
  assert_true(equal > 100);
  Op changed = p->ops[0];
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].kind == OP_LINEAR_FWD) changed = p->ops[i];
  uint64_t was = op_class(p, &changed);
  changed.args.linear.extent = changed.args.linear.extent == EXT_ROWS ? EXT_SPLIT : EXT_ROWS;
  assert_true(op_class(p, &changed) != was);
  discard(&model, &policy, &m);
}

// A class's time is the mean of its ops, whatever their order; the same program measured again replaces it; what was
// not measured follows the model, scaled by what was measured of its kind.
static void test_noted(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_KEEP, &policy, &m);
  Program *p = m.program;
  Costs costs = costs_new(&b, &sketchy);
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds), sum = 0;
  for (int i = 0; i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    assert_int_equal(costs_have(&costs, p, op), 0);
    assert_true(op_seconds(&costs, p, op) == op_model_seconds(&costs, p, op));
    // Twice the model, and layers apart by something that the mean takes away again.
    seconds[i] = 2 * op_model_seconds(&costs, p, op) + (op->layer == 0 ? 1e-7 : op->layer == 1 ? -1e-7 : 0);
    sum += seconds[i];
  }
  for (int round = 0; round < 2; round++) {
    costs_note(&costs, p, seconds);
    assert_true(fabs(program_seconds(&costs, p) / sum - 1) < 1e-9);
    for (int i = 0; i < p->n_ops; i++) assert_int_equal(costs_have(&costs, p, &p->ops[i]), 1);
  }
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].kind == OP_LINEAR_FWD && p->ops[i].layer >= 0)
      assert_true(fabs(op_seconds(&costs, p, &p->ops[i]) / (2 * op_model_seconds(&costs, p, &p->ops[i])) - 1) < 1e-6);
  Op other = p->ops[0];
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].kind == OP_LINEAR_FWD) other = p->ops[i];
  other.args.linear.in_dim[TEXT] += 8; // of a class that no program has
  assert_int_equal(costs_have(&costs, p, &other), 0);
  assert_true(fabs(op_seconds(&costs, p, &other) / (2 * op_model_seconds(&costs, p, &other)) - 1) < 1e-6);
  costs_free(&costs);
  assert_int_equal(costs.n_classes, 0);
  free(seconds);
  discard(&model, &policy, &m);
}

// Times of ops one by one, brought to what the program took as a whole.
static void test_gap(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_KEEP, &policy, &m);
  Program *p = m.program;
  const double gap = 3e-6;
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds), total = 0;
  for (int i = 0; i < p->n_ops; i++) {
    double alone = 5e-6 + 1e-7 * (i % 50);
    total += alone;
    seconds[i] = alone + gap;
  }
  double found = seconds_gap(p, seconds, total);
  assert_true(fabs(found - gap) < 1e-12);
  assert_true(seconds_gap(p, seconds, 2 * total) == 0);
  double most = seconds_gap(p, seconds, 0); // it cannot be reached
  seconds_close(p, seconds, found);
  for (int i = 0; i < p->n_ops; i++) assert_true(fabs(seconds[i] - (5e-6 + 1e-7 * (i % 50))) < 1e-12);
  seconds_close(p, seconds, most);
  for (int i = 0; i < p->n_ops; i++) assert_true(fabs(seconds[i] - (5e-6 + 1e-7 * (i % 50)) / 2) < 1e-12);
  free(seconds);
  discard(&model, &policy, &m);
}

static void test_copies(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_OFFLOAD, &policy, &m);
  Costs costs = costs_new(&b, &sketchy);
  assert_true(fabs(copy_seconds(&costs, LANE_D2H, 5e10, 0) - 1.00001) < 1e-9);
  assert_true(fabs(copy_seconds(&costs, LANE_H2D, 4e10, 0) - 1.00001) < 1e-9);
  assert_true(fabs(copy_seconds(&costs, LANE_D2H, 3e10, 1) - 1.00001) < 1e-9);
  assert_true(fabs(copy_seconds(&costs, LANE_H2D, 2e10, 1) - 1.00001) < 1e-9);
  int copies = 0;
  double compute = 0;
  for (int i = 0; i < m.program->n_ops; i++) {
    const Op *op = &m.program->ops[i];
    if (op->lane == LANE_COMPUTE) {
      compute += op_seconds(&costs, m.program, op);
      continue;
    }
    copies++;
    assert_true(op_seconds(&costs, m.program, op) ==
                copy_seconds(&costs, op->lane, (double)m.program->tensors[op->in[0]].bytes, 0));
  }
  assert_true(copies > 6);
  assert_true(program_seconds(&costs, m.program) == compute);
  discard(&model, &policy, &m);
}

// Of the model: twice the rate is half the time but for the launch, and more rows take longer.
static void test_model(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_KEEP, &policy, &m);
  Costs costs = costs_new(&b, &sketchy), faster = costs, fuller = costs;
  faster.rates.bytes *= 2;
  faster.rates.flops *= 2;
  fuller.extents.text *= 1.5;
  for (int i = 0; i < m.program->n_ops; i++) {
    const Op *op = &m.program->ops[i];
    double x = op_model_seconds(&costs, m.program, op), y = op_model_seconds(&faster, m.program, op);
    assert_true(isfinite(x) && x > 0);
    assert_true(fabs((x - y) - (y - (2 * y - x))) < 1e-15 && y < x + 1e-15);
    assert_true(op_model_seconds(&fuller, m.program, op) >= x);
  }
  discard(&model, &policy, &m);
}

// The fused backward pass of attention and QK-norm is bound by its products first, then by memory.
static void test_fused_attention(void **state) {
  (void)state;
  Config c;
  Backend b;
  Model model;
  PolicyTable policy;
  ModelProgram m;
  record(&c, &b, &model, MEMORY_KEEP, &policy, &m);
  program_free(m.program);
  b.fn[OP_ATTENTION_ROPE_BWD] = no_kernel;
  m = transformer_record(&model, MODE_TRAIN_FIRST, 256, 5, &policy);
  Costs costs = costs_new(&b, &sketchy), moves = costs, multiplies = costs;
  moves.rates.bytes *= 2;
  multiplies.rates.flops *= 2;
  int found = 0;
  for (int i = 0; i < m.program->n_ops; i++) {
    const Op *op = &m.program->ops[i];
    assert_true(op->kind != OP_ATTENTION_BWD && op->kind != OP_QKNORM_ROPE_BWD);
    if (op->kind != OP_ATTENTION_ROPE_BWD) continue;
    double x = op_model_seconds(&costs, m.program, op), launch = 4e-6;
    double moved_faster = op_model_seconds(&moves, m.program, op),
           multiplied_faster = op_model_seconds(&multiplies, m.program, op);
    assert_true(moved_faster < x && multiplied_faster < x &&
                fabs(moved_faster + multiplied_faster - 2 * launch - 1.5 * (x - launch)) < 1e-12);
    found++;
  }
  assert_int_equal(found, 3);
  discard(&model, &policy, &m);
}

// AdamW's FLOPs are 14 a parameter, and 3 more where it updates the average.
static void test_update_flops(void **state) {
  (void)state;
  Config c;
  Error err;
  Backend b = sized_backend();
  assert_int_equal(config_load(&c, NULL, NULL, 0, &err), 0);
  Model model = {.config = &c, .backend = &b, .params = params_build(&c)};
  int64_t count = 0;
  for (int p = 0; p < model.params.n; p++) count += model.params.spans[p].count;
  for (int ema = 0; ema < 2; ema++) {
    Program *p = update_record(&model, ema);
    double sum = 0, flops, bytes;
    for (int i = 0; i < p->n_ops; i++) {
      if (p->ops[i].kind != OP_ADAMW) continue;
      op_cost(p, &p->ops[i], &sketchy, &flops, &bytes);
      sum += flops;
    }
    assert_true(sum == (ema ? 17.0 : 14.0) * (double)count);
    program_free(p);
  }
  params_free(&model.params);
}

// What a pack of base is expected to hold, against the mean of eight packs of its benchmark data (captions of 32 to 96
// words): 51.25 images, 3,264 text rows, 263 pairs a row.
static void test_expected(void **state) {
  (void)state;
  Config c;
  Error err;
  assert_int_equal(config_load(&c, "configs/base.json", NULL, 0, &err), 0);
  Extents x = extents_expected(&c, c.data.micro_batch_tokens);
  double rows = x.text + x.image;
  assert_true(fabs(rows - c.data.micro_batch_tokens) < 1 && fabs(x.image - 256 * x.segments) < 1);
  assert_true(fabs(x.segments - 51.25) < 1 && fabs(x.text - 3264) < 100);
  assert_true(x.targets < x.text && x.targets > .9 * x.text);
  assert_true(fabs(x.pairs / rows - 263) < 10);
  Extents half = extents_expected(&c, c.data.micro_batch_tokens / 2);
  assert_true(fabs(half.pairs - x.pairs / 2) < 1e-6 * x.pairs);
  c.data.sources = 1;
  c.data.source[0] = (SourceConfig){.type = "text", .weight = 1};
  x = extents_expected(&c, c.data.micro_batch_tokens);
  assert_true(x.image == 0 && x.segments == 0 && fabs(x.text - c.data.micro_batch_tokens) < 1);
}

// ---- the file ----

static Costs some_costs(const Backend *b) {
  Costs c = costs_new(b, &sketchy);
  for (int i = 0; i < 9; i++)
    costs_put(&c, &(ClassSeconds){.of = bits_mix(7, i),
                                  .kind = (OpKind)(i % 3),
                                  .seconds = 1e-3 / (i + 1),
                                  .model = 1e-3 / (i + 2),
                                  .measured = i + 1});
  return c;
}

static void assert_costs_equal(const Costs *a, const Costs *b) {
  assert_int_equal(a->n_classes, b->n_classes);
  assert_int_equal(a->processes, b->processes);
  assert_int_equal(a->multiprocessors, b->multiprocessors);
  assert_memory_equal(&a->link, &b->link, sizeof a->link);
  assert_true(a->group.reduce == b->group.reduce && a->group.gather == b->group.gather);
  assert_true(a->group.latency == b->group.latency && a->group.drag == b->group.drag);
  assert_memory_equal(&a->extents, &b->extents, sizeof a->extents);
  assert_memory_equal(a->scale, b->scale, sizeof a->scale);
  assert_true(a->rates.bytes == b->rates.bytes && a->rates.flops == b->rates.flops);
  for (int i = 0; i < a->n_classes; i++) {
    const ClassSeconds *x = &a->classes[i], *y = &b->classes[i];
    assert_true(x->of == y->of && x->kind == y->kind && x->measured == y->measured);
    assert_true(x->seconds == y->seconds && x->model == y->model);
  }
}

static void test_file(void **state) {
  (void)state;
  Error err;
  Backend b = sized_backend();
  b.multiprocessors = 132;
  const CostsKey key = {"a device \"2\"", "0123456789abcdef", "T 256", "1"};
  const CostsKey other[] = {{"another", key.build, key.sizes, key.processes},
                            {key.device, "1", key.sizes, key.processes},
                            {key.device, key.build, "", key.processes},
                            {key.device, key.build, key.sizes, "2"}};
  char *path = xasprintf("%s/costs.json", folder), *nowhere = xasprintf("%s/none/costs.json", folder);
  Costs written = some_costs(&b), read = costs_new(&b, &(Extents){0}), before = read;
  assert_int_equal(costs_load(&read, &key, path), 0);
  assert_int_equal(costs_save(&written, &key, nowhere, &err), -1);
  assert_int_equal(costs_save(&written, &key, path, &err), 0);
  for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
    assert_int_equal(costs_load(&read, &other[i], path), 0);
    assert_costs_equal(&read, &before);
  }
  const CostsKey any = {NULL, key.build, key.sizes, key.processes};
  for (int i = 0; i < 2; i++) {
    costs_free(&read);
    read = costs_new(&b, &(Extents){0});
    assert_int_equal(costs_load(&read, i ? &any : &key, path), 1);
    assert_costs_equal(&read, &written);
  }
  assert_int_equal(costs_save(&read, &key, path, &err), 0); // in place of the old one
  assert_int_equal(costs_load(&read, &key, path), 1);
  assert_costs_equal(&read, &written);
  // Cut short, or with any byte lost: never other costs than those written.
  size_t bytes;
  char *text = file_read(path, 1 << 20, &bytes, &err);
  for (size_t n = 0; n < bytes - 1; n += 131) {
    assert_int_equal(file_write(path, text, n, &err), 0);
    assert_int_equal(costs_load(&read, &key, path), 0);
    assert_costs_equal(&read, &written);
  }
  const char *const wrong[][2] = {{"\"seconds\": 0.001,", "\"seconds\": -0.001,"},
                                  {"\"d2h\": ", "\"d2x\": "},
                                  {"\"COPY\"", "\"COPPY\""},
                                  {"\"measured\": 1}", "\"measured\": 0}"},
                                  {"\"classes\": [", "\"clases\": ["},
                                  {"\"text\": 100", "\"text\": \"\""}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    char *at = strstr(text, wrong[i][0]);
    assert_non_null(at);
    char *changed = xasprintf("%.*s%s%s", (int)(at - text), text, wrong[i][1], at + strlen(wrong[i][0]));
    assert_int_equal(file_write(path, changed, strlen(changed), &err), 0);
    assert_int_equal(costs_load(&read, &key, path), 0);
    assert_costs_equal(&read, &written);
    free(changed);
  }
  costs_free(&read);
  costs_free(&written);
  free(text);
  free(nowhere);
  free(path);
}

// A collective takes what a process sends at the group's rates, and alone nothing. Weights of the buckets that are read
// at once come together in the update.
static void test_collectives(void **state) {
  (void)state;
  Config c;
  Error err;
  Backend b = sized_backend();
  assert_int_equal(config_load(&c, NULL, (const char *[]){"model.layers=3"}, 1, &err), 0);
  c.processes = 4;
  Model model = {.config = &c, .backend = &b, .params = params_build(&c)};
  ModelProgram m = transformer_record(&model, MODE_TRAIN_ONLY, 256, 5, NULL);
  Costs costs = costs_new(&b, &sketchy);
  int found[OP_COUNT] = {0};
  for (int i = 0; i < m.program->n_ops; i++) {
    const Op *op = &m.program->ops[i];
    if (op->lane != LANE_COMM) continue;
    costs.processes = 1;
    assert_true(op_seconds(&costs, m.program, op) == 0);
    costs.processes = 4;
    double a_byte = op->kind == OP_ALL_REDUCE ? 1.5e-9 : op->kind == OP_ALL_GATHER ? .5e-9 : 1e-9;
    double sent = .75 * (double)m.program->tensors[op->out[0]].bytes;
    assert_true(fabs(op_seconds(&costs, m.program, op) - 1e-3 - sent * a_byte) < 1e-12);
    found[op->kind]++;
  }
  int buckets = model.params.buckets;
  assert_true(found[OP_ALL_GATHER] == buckets - 3 && found[OP_REDUCE_SCATTER] == buckets && found[OP_ALL_REDUCE] == 1);
  costs_free(&costs);
  program_free(m.program);
  params_free(&model.params);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_collectives),     cmocka_unit_test(test_classes),
      cmocka_unit_test(test_noted),           cmocka_unit_test(test_gap),
      cmocka_unit_test(test_copies),          cmocka_unit_test(test_model),
      cmocka_unit_test(test_fused_attention), cmocka_unit_test(test_update_flops),
      cmocka_unit_test(test_expected),        cmocka_unit_test_setup(test_file, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
