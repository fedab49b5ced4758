// Packs on their way from the loader to a device with queues, which fetches them late: the gradients are those of the
// CPU, no pack's memory is decoded into before the device has the pack, and there is as much of it as --plan says.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/text_out.h"
#include "kernels/cpu/cpu.h"
#include "model/config/load.h"
#include "tests/ops/slab_fill.h"
#include "tests/unit/data_case.h"
#include "tests/unit/queued_cpu.h"
#include "trainer/feed.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEPS = 2, MICRO = 6 };

// The memory of packs, counted.
static int64_t blocks, block_bytes;

static void *counted_alloc(size_t bytes) {
  blocks++;
  block_bytes += (int64_t)bytes;
  return pack_alloc(bytes);
}

// What has become an empty pack is not what the device was to fetch.
static void cleared_release(void *block) {
  explicit_bzero(block, (size_t)(block_bytes / blocks)); // a compiler may leave a memset before free out
  free(block);
}

static Config tiny_config(void) {
  static const char *const sets[] = {"model.dim=16",          "model.layers=1",
                                     "model.heads=2",         "model.kv_heads=1",
                                     "model.head_dim=8",      "model.cond_dim=16",
                                     "model.patch=4",         "model.vocab=300",
                                     "model.text.experts=2",  "model.text.expert_dim=16",
                                     "model.image.experts=2", "model.image.expert_dim=16",
                                     "data.image_size=16",    "data.micro_batch_tokens=256",
                                     "data.max_images=32",    "data.threads=2",
                                     "train.micro_batches=6", "train.ema=0"};
  Config c;
  Error err;
  if (config_load(&c, NULL, sets, sizeof sets / sizeof *sets, &err) != 0) fail_msg("%s", err.text);
  assert_int_equal(c.train.micro_batches, MICRO);
  return c;
}

// Bytes that --plan says the packs take.
static int64_t planned_bytes(const Engine *e) {
  TextOut out;
  FILE *f = text_begin(&out);
  engine_print_plan(e, f);
  char *plan = text_end(&out), *row = strstr(plan, "packs decoded ahead");
  assert_non_null(row);
  long long bytes = strtoll(row + strlen("packs decoded ahead"), NULL, 10);
  free(plan);
  return bytes;
}

static void open_engine(Engine *e, const Config *c, const Backend *backend) {
  Error err;
  if (engine_record(e, c, backend, 1, &err) != 0 || engine_allocate(e, &err) != 0) fail_msg("%s", err.text);
  void *weights = xcalloc((size_t)e->model.params.total, backend->dtype_bytes[DT_REAL]);
  params_fill(&e->model.params, PARAMS_RANDOM, 7, backend->dtype_bytes[DT_REAL], weights);
  slab_upload(e, SPACE_WEIGHTS, weights);
  free(weights);
}

// Copies the gradients out of their slab, in which nobody writes what lies between two parameters.
static void read_grads(const Engine *e, real *to) {
  const ParamTable *params = &e->model.params;
  real *slab = xmalloc((size_t)params->total * sizeof *slab);
  engine_slab_read(e, SPACE_GRADS, slab);
  for (int i = 0; i < params->n; i++) {
    const Param *p = &params->of[i];
    memcpy(to + p->offset, slab + p->offset, (size_t)p->count * sizeof *to);
  }
  free(slab);
}

// The gradients of every step [STEPS, *n]; malloc'd.
static real *run(Data *data, const Config *c, const Backend *backend, size_t *n) {
  Engine e;
  Error err;
  open_engine(&e, c, backend);
  LoaderConfig config = data_config(data);
  config.stream.shape = dims_batch_shape(&e.first.program->dims);
  config.packs_per_step = MICRO;
  config.threads = c->data.threads;
  config.host_alloc = counted_alloc;
  config.host_release = cleared_release;
  blocks = block_bytes = 0;
  Feed feed;
  if (feed_open(&feed, &e, config, NULL, &err) != 0) fail_msg("%s", err.text);
  int64_t allocated = blocks;
  assert_int_equal(block_bytes, planned_bytes(&e));
  *n = (size_t)e.model.params.total;
  real *grads = xcalloc(STEPS * *n, sizeof *grads);
  for (int step = 0; step < STEPS; step++) {
    for (int k = 0; k < MICRO; k++) {
      Pack *pack;
      if (feed_next(&feed, &pack, &err) < 0) fail_msg("%s", err.text);
      assert_int_equal(pack->number, step * MICRO + k);
      engine_run(&e, engine_micro_step(&e, k), pack->block, NULL);
      usleep(300); // in which the loader fills what it was given back
    }
    if (step == STEPS - 1) feed_close(&feed); // while the device is busy
    read_grads(&e, grads + (size_t)step * *n);
  }
  assert_int_equal(blocks, allocated);
  feed_close(&feed); // nothing to do
  engine_free(&e);
  return grads;
}

static void test_late_device(void **state) {
  Config c = tiny_config();
  size_t n;
  real *want = run(*state, &c, &backend_cpu, &n);
  assert_memory_not_equal(want, want + n, n * sizeof *want);
  for (int i = 0; i < 30; i++) {
    queued_cpu_start((uint64_t)i, FAULT_NONE);
    queued_cpu_hold_back((Lane)(i % (LANE_COUNT + 1))); // each lane may be the one that is late
    real *got = run(*state, &c, &backend_queued_cpu, &n);
    if (memcmp(got, want, STEPS * n * sizeof *want) != 0) fail_msg("order %d: other gradients", i);
    free(got);
  }
  free(want);
}

// Memory that is not there is an error.
static void *no_memory(size_t bytes) {
  return blocks++ < 3 ? pack_alloc(bytes) : NULL;
}

static void test_no_memory(void **state) {
  LoaderConfig config = data_config(*state);
  Error err;
  blocks = 0;
  config.host_alloc = no_memory;
  assert_null(loader_open(&config, NULL, &err));
  assert_non_null(strstr(err.text, "out of host memory for"));
  config = data_config(*state);
  config.held = 0;
  assert_null(loader_open(&config, NULL, &err));
}

int main(void) {
  omp_set_num_threads(1); // of a model this small, and the loader has threads of its own
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_late_device), cmocka_unit_test(test_no_memory)};
  return cmocka_run_group_tests(tests, data_make, data_remove);
}
