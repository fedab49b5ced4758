// The optimizer's state on the host: what passes through the arena is ordered against all that touches it, whatever is
// not is caught, and no legal order changes a bit.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "kernels/exact.h"
#include "model/placement.h"
#include "model/program/policy.h"
#include "model/update.h"
#include "tests/ops/model_case.h"
#include "tests/unit/order_check.h"

#include <stdlib.h>
#include <string.h>

enum { PART = 2048 }; // elements that travel at once
static const Space results[] = {SPACE_WEIGHTS, SPACE_ADAM_M, SPACE_ADAM_V, SPACE_EMA};
enum { RESULTS = sizeof results / sizeof *results };

// Slabs of random numbers, as they are before an update.
typedef struct World {
  ModelCase c;
  void *begin[RESULTS];
  real *gradients; // in the slabs' order
  size_t slab;
  StepScalars scalars;
} World;

static void *fresh(ModelCase *c, Space space, size_t bytes) {
  free(c->bases.of[space]);
  c->bytes[space] = (bytes + 255) / 256 * 256;
  return c->bases.of[space] = aligned_alloc(256, c->bytes[space]);
}

static void world_open(World *w, int variant) {
  memset(w, 0, sizeof *w);
  ModelCase *c = &w->c;
  model_case_init(c, 900 + (uint64_t)variant, variant);
  int64_t n = c->model.params.total;
  w->slab = (size_t)n * sizeof(real);
  w->scalars = (StepScalars){.lr = .01,
                             .beta1 = .9,
                             .beta2 = .95,
                             .eps = 1e-8,
                             .weight_decay = .1,
                             .clip = 1,
                             .bias1 = .1,
                             .bias2 = .05,
                             .ema_decay = .9};
  w->gradients = xmalloc(w->slab);
  for (int64_t i = 0; i < n; i++) {
    Philox4 r = philox4(5, (uint64_t)i, 0, 0);
    w->gradients[i] = (real)((double)r.v[0] / 4294967296. - .5);
    for (int s = 0; s < RESULTS; s++) model_case_slab(c, results[s])[i] = (real)((double)r.v[s] / 4294967296.);
  }
  for (int s = 0; s < RESULTS; s++) w->begin[s] = memcpy(xmalloc(w->slab), c->bases.of[results[s]], w->slab);
  memset(c->bases.of[SPACE_METRICS], 0, c->bytes[SPACE_METRICS]);
  memcpy(c->bases.of[SPACE_SCALARS], &w->scalars, sizeof w->scalars);
  fresh(c, SPACE_HOST_GRADS, w->slab);
  fresh(c, SPACE_PARAM_SUMS, (size_t)param_sums_offset(&c->model.params, PARAM_SUMS));
}

static void world_close(World *w) {
  for (int s = 0; s < RESULTS; s++) free(w->begin[s]);
  free(w->gradients);
  model_case_free(&w->c);
}

// Everything as before the update; gradients and their squares where the state says.
static void world_reset(World *w) {
  ModelCase *c = &w->c;
  const ParamTable *t = &c->model.params;
  double *squares = c->bases.of[SPACE_PARAM_SUMS];
  for (int s = 0; s < RESULTS; s++) memcpy(c->bases.of[results[s]], w->begin[s], w->slab);
  memset(c->bases.of[SPACE_GRADS], 0xFF, c->bytes[SPACE_GRADS]);
  memset(c->bases.of[SPACE_HOST_GRADS], 0xFF, w->slab);
  memset(squares, 0xFF, c->bytes[SPACE_PARAM_SUMS]);
  for (const ParamBucket *b = t->bucket; b < t->bucket + t->buckets; b++) {
    int away = bucket_leaves(&c->model, b);
    real *to = model_case_slab(c, away ? SPACE_HOST_GRADS : SPACE_GRADS);
    memcpy(to + (away ? b->begin : gradients_begin(&c->model, b)), w->gradients + b->begin,
           (size_t)(b->end - b->begin) * sizeof *to);
    if (!away) continue; // as the last micro-step leaves them
    OpArgs a = {.params = {t->spans + b->first, b->n, b->begin, b->end}};
    op_run(&c->ops, OP_GRAD_SQUARES, a, OP_IN(w->gradients + b->begin), OP_OUT(squares + b->first * EXACT_WORDS));
  }
}

static void bind(World *w, Program *p) {
  ModelCase *c = &w->c;
  if (c->bytes[SPACE_ARENA] < (size_t)p->arena_bytes) fresh(c, SPACE_ARENA, (size_t)p->arena_bytes);
  Bases b = c->bases;
  program_bind(p, &b);
}

// Elements of the last n buckets.
static int64_t last_buckets(const Model *m, int n) {
  return n ? m->params.total - m->params.bucket[m->params.buckets - n].begin : 0;
}

static void test_random_orders_same_bits(void **state) {
  (void)state;
  for (int v = 0; v < 3; v++) {
    World w;
    world_open(&w, v);
    void *want[RESULTS], *want_hashes = NULL;
    for (int i = 0; i < 7; i++) {
      MemoryState s = i ? (MemoryState)(STATE_EMA + (i - 1) / 2) : STATE_DEVICE;
      w.c.model.state = s;
      // Of what is named last: with gradients whole buckets, else any piece of one.
      w.c.model.kept = i && i % 2 == 0 ? last_buckets(&w.c.model, 2 + v) + (s < STATE_GRADIENTS ? 192 : 0) : 0;
      w.c.model.update_part = s == STATE_DEVICE ? UPDATE_PART : PART;
      Program *p = update_record(&w.c.model, 1);
      const int travel[] = {[STATE_EMA] = 1, [STATE_MOMENTS] = 3, [STATE_GRADIENTS] = 4};
      if (s == STATE_DEVICE)
        assert_int_equal(p->arena_bytes, 0);
      else // three parts are in flight
        assert_in_range(p->live_bytes, 1, 3 * travel[s] * PART * (int)sizeof(real));
      assert_true(p->arena_bytes <= p->live_bytes * 4 / 3);
      bind(&w, p);
      for (uint64_t seed = 0; seed < 12; seed++) {
        world_reset(&w);
        program_replay_random(p, seed);
        for (int k = 0; k < RESULTS && s == STATE_DEVICE && seed == 0; k++)
          want[k] = memcpy(xmalloc(w.slab), w.c.bases.of[results[k]], w.slab);
        for (int k = 0; k < RESULTS; k++)
          if (memcmp(w.c.bases.of[results[k]], want[k], w.slab) != 0)
            fail_msg("variant %d, state %d, order %d: other %s", v, i, (int)seed, space_info[results[k]].label);
      }
      program_free(p);
      Program *h = hash_record(&w.c.model);
      const uint64_t *hashes = (const uint64_t *)w.c.bases.of[SPACE_PARAM_SUMS] +
                               param_sums_offset(&w.c.model.params, SUMS_OF_BITS) / (int64_t)sizeof(uint64_t);
      size_t bytes = (size_t)w.c.model.params.n * sizeof *hashes;
      bind(&w, h);
      world_reset(&w);
      program_replay_random(h, (uint64_t)i);
      if (i == 0) want_hashes = memcpy(xmalloc(bytes), hashes, bytes);
      assert_memory_equal(hashes, want_hashes, bytes);
      program_free(h);
    }
    free(want_hashes);
    for (int k = 0; k < RESULTS; k++) {
      assert_true(memcmp(want[k], w.begin[k], w.slab) != 0);
      free(want[k]);
    }
    world_close(&w);
  }
}

// Any two ops that touch the same bytes, of whatever space, are ordered; without any one of the waits some are not.
static void check_order(Program *p, int *waits) {
  Error err;
  if (order_check(p, &err) != 0) fail_msg("%s", err.text);
  for (int i = 0; i < p->n_ops; i++) {
    Op kept = p->ops[i];
    for (int k = 0; k < kept.n_waits; k++) {
      p->ops[i].waits[k] = kept.waits[--p->ops[i].n_waits];
      if (order_check(p, &err) == 0) fail_msg("program %s: nobody misses wait %d of op %d", p->name, k, i);
      p->ops[i] = kept;
      (*waits)++;
    }
  }
  program_free(p);
}

static void test_every_wait_is_needed(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 910, 3); // four layers
  c.model.update_part = PART;
  for (MemoryState s = STATE_EMA; s <= STATE_GRADIENTS; s++) {
    int waits = 0;
    c.model.state = s;
    c.model.kept = s == STATE_MOMENTS ? last_buckets(&c.model, 3) - 64 : 0;
    for (int k = 0; k < 2; k++) {
      check_order(update_record(&c.model, k), &waits);
      check_order(ema_record(&c.model, k), &waits);
    }
    check_order(hash_record(&c.model), &waits);
    for (Mode m = MODE_TRAIN_MIDDLE; m <= MODE_TRAIN_ONLY; m++) {
      PolicyTable t = policy_table_new(c.config.model.layers, MEMORY_OFFLOAD);
      check_order(transformer_record(&c.model, m, c.ops.dims.T, c.ops.dims.segments, &t).program, &waits);
      policy_table_free(&t);
    }
    assert_true(waits > 20);
  }
  model_case_free(&c);
}

// Updates that open a step: those that the first ops wait for have the device to themselves, those of later layers make
// do with a share of it, which the products of the forward pass leave, and nothing else.
static void test_update_beside_forward(void **state) {
  (void)state;
  enum { SHARE = 5 };
  World w;
  world_open(&w, 3); // four layers
  const int L = w.c.config.model.layers;
  w.c.model.state = STATE_DEVICE;
  w.c.config.kernels.update_share = 28;
  for (int i = 0; i < 4; i++) {
    int one_queue = i / 2, waits = 0, alone = 0, beside = 0;
    w.c.model.opening = i % 2 ? OPEN_UPDATE_EMA : OPEN_UPDATE;
    PolicyTable t = policy_table_new(L, MEMORY_KEEP);
    Program *p = transformer_record(&w.c.model, MODE_TRAIN_ONLY, w.c.ops.dims.T, w.c.ops.dims.segments, &t).program;
    assert_int_equal(p->update_share, i % 2 ? 36 : 28); // as the bytes of an element
    p->one_queue = one_queue;
    p->update_share = SHARE;
    bind(&w, p);
    for (int k = 0; k < p->n_ops; k++) {
      const Op *op = &p->ops[k];
      if (op->kind == OP_ADAMW) *(op->call.takes ? &beside : &alone) += 1;
      if (op->kind == OP_EXPERT_UP_FWD) assert_int_equal(op->call.leaves, one_queue ? 0 : SHARE);
      if (op->kind == OP_EXPERT_UP_DGRAD || op->kind == OP_LINEAR_WGRAD) assert_int_equal(op->call.leaves, 0);
      assert_true(op->lane == LANE_UPDATE ? !op->call.leaves : !op->call.takes);
      assert_true(op->call.takes == 0 || op->call.takes == SHARE);
    }
    assert_int_equal(beside, one_queue ? 0 : L); // of layers 1 .. L - 1, and the heads
    assert_int_equal(alone + beside, w.c.model.params.buckets);
    check_order(p, &waits);
    assert_true(waits >= L + 2);
    policy_table_free(&t);
  }
  world_close(&w);
}

// What the next step reads at once is updated before all else, so that it comes together beside the rest.
static void check_first_updates(const Program *p, const ParamTable *t) {
  int rest = 0, opening = 0;
  for (int i = 0; i < p->n_ops; i++) {
    if (p->ops[i].kind != OP_ADAMW) continue;
    int opens = bucket_opens(t, bucket_of(t, (int)(p->ops[i].args.params.spans - t->spans)));
    assert_true(!opens || !rest);
    rest += !opens;
    opening += opens;
  }
  assert_true(rest > 0 && opening > 0);
}

// The same of what several processes do, whatever each of them has of the state.
static void test_every_wait_of_a_group(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 911, 3);
  Config *config = &c.config;
  config->processes = 3;
  config->train.micro_batches = 2;
  c.model.state = STATE_DEVICE;
  for (config->parallel.zero = 0; config->parallel.zero < 3; config->parallel.zero++) {
    int waits = 0;
    params_free(&c.model.params);
    c.model.params = params_build(config);
    for (c.model.shard = 0; c.model.shard < config_shards(config); c.model.shard += 2) {
      for (int k = 0; k < 2; k++) {
        Program *update = update_record(&c.model, k);
        if (config->parallel.zero) check_first_updates(update, &c.model.params);
        check_order(update, &waits);
        check_order(ema_record(&c.model, k), &waits);
      }
      check_order(gather_record(&c.model), &waits);
      check_order(decision_record(&c.model), &waits);
      check_order(apply_record(&c.model, 1), &waits);
      for (int i = 0; i < 6; i++) {
        Mode mode = (Mode)(i < 4 ? i : MODE_TRAIN_ONLY);
        c.model.opening = i < 4 ? OPEN_WEIGHTS : i == 4 ? OPEN_UPDATE : OPEN_UPDATE_EMA;
        PolicyTable t = policy_table_new(config->model.layers, MEMORY_OFFLOAD);
        check_order(transformer_record(&c.model, mode, c.ops.dims.T, c.ops.dims.segments, &t).program, &waits);
        policy_table_free(&t);
      }
    }
    assert_true(waits > 20);
  }
  config->processes = 1; // the case's own
  model_case_free(&c);
}

// Shares of all processes make up a bucket, and lie behind each other; where gradients are shared, those of a
// micro-step meet nothing but a layer's that is summed before.
static void test_shares(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 921, 3);
  Config *config = &c.config;
  config->parallel.zero = 2;
  for (config->processes = 2; config->processes < 6; config->processes++) {
    Model *m = &c.model;
    params_free(&m->params);
    m->params = params_build(config);
    const ParamTable *t = &m->params;
    int64_t at = 0;
    for (int i = 0; i < t->buckets; i++) {
      const ParamBucket *b = &t->bucket[i];
      int64_t end = b->begin, begin = gradients_begin(m, b);
      for (m->shard = 0; m->shard < config->processes; m->shard++) {
        Shard s = bucket_shard(m, b);
        assert_true(s.begin == end && s.at == at && (s.end - s.begin) % 64 == 0);
        end = s.end;
      }
      assert_int_equal(end, b->end);
      at += (b->end - b->begin) / config->processes;
      assert_true(begin >= 0 && begin + b->end - b->begin <= gradients_count(m));
      for (int k = 0; k < i; k++) {
        const ParamBucket *o = &t->bucket[k];
        int64_t other = gradients_begin(m, o);
        int in_turn = b->layer >= 0 && o->layer >= 0 && (b->layer - o->layer) % 2 == 0;
        assert_true(in_turn || begin + b->end - b->begin <= other || other + o->end - o->begin <= begin);
      }
    }
    m->shard = 0;
    assert_true(at * config->processes == t->total && gradients_count(m) < t->total);
  }
  config->processes = 1;
  model_case_free(&c);
}

// Gradients that stay, and slots for those that leave: nothing lies on anything else but layers in turn.
static void test_places(void **state) {
  (void)state;
  ModelCase c;
  model_case_init(&c, 920, 3);
  const ParamTable *t = &c.model.params;
  for (int round = 0; round < 8; round++) {
    MemoryState s = (MemoryState)(STATE_DEVICE + round / 2);
    c.model.state = s;
    const int buckets = round % 2 ? 3 : 0; // U, the heads and a layer
    c.model.kept = last_buckets(&c.model, buckets);
    int64_t count = gradients_count(&c.model);
    assert_true(s == STATE_GRADIENTS || count == t->total);
    for (int i = 0; i < t->buckets; i++) {
      const ParamBucket *a = &t->bucket[i];
      int64_t begin = gradients_begin(&c.model, a), end = begin + a->end - a->begin;
      int last = i >= t->buckets - buckets;
      assert_int_equal(bucket_leaves(&c.model, a), s == STATE_GRADIENTS && a->layer >= 0 && !last);
      assert_int_equal(a->end <= state_host_count(&c.model, SPACE_EMA), s > STATE_EMA || (s == STATE_EMA && !last));
      assert_int_equal(a->end <= state_host_count(&c.model, SPACE_ADAM_V),
                       s > STATE_MOMENTS || (s == STATE_MOMENTS && !last));
      assert_true(begin >= 0 && begin % 64 == 0 && end <= count);
      if (!bucket_leaves(&c.model, a) && s != STATE_GRADIENTS) assert_int_equal(begin, a->begin);
      const int slots = c.config.train.micro_batches > 1 ? GRADIENT_SLOTS : GRADIENT_SLOTS - 1;
      for (int k = 0; k < i; k++) {
        const ParamBucket *b = &t->bucket[k];
        int64_t at = gradients_begin(&c.model, b);
        int in_turn = bucket_leaves(&c.model, a) && bucket_leaves(&c.model, b) && (a->layer - b->layer) % slots == 0;
        assert_true(in_turn || end <= at || at + b->end - b->begin <= begin);
      }
    }
  }
  model_case_free(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_random_orders_same_bits), cmocka_unit_test(test_every_wait_is_needed),
      cmocka_unit_test(test_update_beside_forward),   cmocka_unit_test(test_places),
      cmocka_unit_test(test_every_wait_of_a_group),   cmocka_unit_test(test_shares)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
