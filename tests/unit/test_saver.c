// A run's state to checkpoints and back: copied to memory and written beside training, or streamed, from host memory, a
// device, or a device that keeps its weights in two parts, the files have the same bytes; and what is damaged or
// foreign is told apart.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "model/config/load.h"
#include "tests/unit/queued_cpu.h"
#include "tests/unit/temp_folder.h"
#include "trainer/saver.h"
#include "trainer/slab.h"
#include "tests/ops/slab_fill.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const Space spaces[] = {SPACE_WEIGHTS, SPACE_EMA, SPACE_ADAM_M, SPACE_ADAM_V};
enum { SPACES = sizeof spaces / sizeof *spaces, KINDS = 7 };
static const char *const files[] = {"model.safetensors", "optimizer-0x1.safetensors", "ema.safetensors", "config.json",
                                    "state.json"};
enum { FILES = sizeof files / sizeof *files };

// The plain CPU, one behind queues, and one behind queues that keeps a weight as bf16 and a remainder, as a GPU does,
// with its state on the device or on the host; from 4 on those but the second again, with moments in bf16.
static Backend backend_of(int kind) {
  Backend b = kind && kind != 4 ? backend_queued_cpu : backend_cpu;
  if (b.queues && kind >= 2) backend_store_bf16(&b);
  return b;
}

static void config_open(Config *c, int kind, const char *copy, const char *layers) {
  const char *const sets[] = {"model.dim=32",
                              "model.heads=2",
                              "model.kv_heads=1",
                              "model.head_dim=16",
                              "model.cond_dim=32",
                              "model.vocab=300",
                              "train.ema=0.9",
                              "data.micro_batch_tokens=256",
                              "checkpoint.every=10",
                              kind < 4 ? "train.moments=fp32" : "train.moments=bf16",
                              kind == 3 || kind == 6 ? "memory.state=gradients" : "memory.state=device",
                              copy,
                              layers};
  Error err;
  if (config_load(c, NULL, (const char **)sets, sizeof sets / sizeof *sets, &err) != 0) fail_msg("%s", err.text);
}

static void engine_open(Engine *e, const Config *c, const Backend *b) {
  Error err;
  if (engine_record(e, c, b, 1, &err) != 0 || engine_allocate(e, &err) != 0) fail_msg("%s", err.text);
  if (engine_stage_open(e, 4096 + 64, &err) != 0) fail_msg("%s", err.text); // many pieces of these small slabs
}

// What a slab shall hold: numbers of all sizes, of moments such as bf16 has, padding 0.
static float *values_of(const Engine *e, Space space) {
  float *x = xcalloc((size_t)e->model.params.total, sizeof *x);
  for (int p = 0; p < e->model.params.n; p++) {
    const Param *w = &e->model.params.of[p];
    for (int64_t i = 0; i < w->count; i++) {
      uint32_t bits = philox4(3, (uint64_t)space, (uint32_t)p, (uint32_t)i).v[0];
      if (space == SPACE_ADAM_M || space == SPACE_ADAM_V) bits &= 0xffff0000u;
      memcpy(&x[w->offset + i], &bits, sizeof bits);
      if (!(x[w->offset + i] == x[w->offset + i])) x[w->offset + i] = 1;
    }
  }
  return x;
}

// Fills the slabs, where there is a compute lane by copies from given[] that lie in it still when this returns: the
// first slab's are the last.
static void fill(Engine *e, float *given[SPACES]) {
  const Backend *b = e->model.backend;
  for (int s = 0; s < SPACES; s++) {
    given[s] = values_of(e, spaces[s]);
    if (!b->queues || engine_converts(e, spaces[s]) || e->bases.host[spaces[s]]) slab_upload(e, spaces[s], given[s]);
  }
  for (int s = SPACES - 1; b->queues && s >= 0; s--) {
    if (engine_converts(e, spaces[s]) || e->bases.host[spaces[s]]) continue;
    OpArgs args = {.span = {.count = e->bytes[spaces[s]]}};
    b->fn[OP_COPY](&(KernelCall){.in.COPY = {given[s]},
                                 .out.COPY = {engine_slab(e, spaces[s])},
                                 .args = &args,
                                 .stream = b->queues->stream(LANE_COMPUTE)});
  }
}

static RunState state_of(void) {
  return (RunState){.step = 7,
                    .optimizer = {.applied = 6, .skipped = 1},
                    .loader = xstrdup("{\"draw\":\"12\"}"),
                    .tokenizer = xstrdup("00ff")};
}

static void state_free(RunState *s) {
  free(s->loader);
  free(s->tokenizer);
}

// Saves to folder/name/ckpt-7 and spoils every slab as soon as training may go on.
static void save(const char *name, int kind, const char *copy, uint64_t seed, QueuedFault fault) {
  Config *c = xcalloc(1, sizeof *c);
  Engine e;
  Error err;
  float *given[SPACES] = {NULL};
  RunState state = state_of();
  char *run = xasprintf("%s/%s", folder, name);
  Backend backend = backend_of(kind);
  config_open(c, kind, copy, "model.layers=2");
  assert_int_equal(mkdir(run, 0700), 0);
  queued_cpu_start(seed, FAULT_NONE);
  queued_cpu_hold_back((Lane)(seed % (LANE_COUNT + 1)));
  engine_open(&e, c, &backend);
  Saver *s = saver_open(&e, run, &err);
  if (!s) fail_msg("%s", err.text);
  fill(&e, given);
  queued_cpu_fault(fault);
  saver_begin(s, &state, time_now());
  queued_cpu_fault(FAULT_NONE);
  queued_cpu_drain();
  float *other = xcalloc((size_t)e.model.params.total, sizeof *other);
  for (int k = 0; k < SPACES; k++) slab_upload(&e, spaces[k], other);
  if (saver_result(s, 1, &err) != 0) fail_msg("%s", err.text);
  saver_close(s);
  engine_free(&e);
  for (int k = 0; k < SPACES; k++) free(given[k]);
  free(other);
  free(run);
  free(c);
  state_free(&state);
}

// All but state.json, which names the backend, or that too.
static int same_files(const char *a, const char *b, int state) {
  Error err;
  int same = 1;
  for (int f = 0; f < FILES - !state; f++) {
    char *x = xasprintf("%s/%s/ckpt-7/%s", folder, a, files[f]), *y = xasprintf("%s/%s/ckpt-7/%s", folder, b, files[f]);
    size_t n, m;
    char *p = file_read(x, 1 << 30, &n, &err), *q = file_read(y, 1 << 30, &m, &err);
    assert_true(p && q);
    same &= n == m && memcmp(p, q, n) == 0;
    free(p);
    free(q);
    free(x);
    free(y);
  }
  return same;
}

static void load(const char *name, int kind) {
  Config *c = xcalloc(1, sizeof *c);
  Engine e;
  Error err;
  Backend backend = backend_of(kind);
  config_open(c, kind, "checkpoint.copy=auto", "model.layers=2");
  queued_cpu_start(5, FAULT_NONE);
  engine_open(&e, c, &backend);
  char *dir = xasprintf("%s/%s/ckpt-7", folder, name);
  Checkpoint *checkpoint = checkpoint_open(dir, &err);
  assert_non_null(checkpoint);
  RunState state = {.tokenizer = xstrdup("00ff")};
  if (state_load(&e, &state, checkpoint, 0, &err) != 0) fail_msg("%s", err.text);
  assert_int_equal(state.step, 7);
  assert_int_equal(state.optimizer.applied, 6);
  assert_string_equal(state.loader, "{\"draw\":\"12\"}");
  float *found = xmalloc((size_t)e.model.params.total * sizeof *found);
  for (int s = 0; s < SPACES; s++) {
    float *x = values_of(&e, spaces[s]);
    engine_slab_read(&e, spaces[s], found);
    if (memcmp(found, x, (size_t)e.model.params.total * sizeof *x) != 0)
      fail_msg("%s, backend %d: %s", name, kind, space_info[spaces[s]].label);
    free(x);
  }
  free(found);
  checkpoint_close(checkpoint);
  state_free(&state);
  engine_free(&e);
  free(dir);
  free(c);
}

static void every_way_has_the_same_bytes(void **state) {
  (void)state;
  static const char *const copies[] = {"checkpoint.copy=always", "checkpoint.copy=never", "checkpoint.copy=auto"};
  save("plain", 0, copies[1], 0, FAULT_NONE);
  for (int kind = 0; kind < KINDS; kind++)
    for (int k = 0; k < 3; k++) {
      char *name = xasprintf("%d-%d", kind, k);
      save(name, kind, copies[k], (uint64_t)(10 * kind + k), FAULT_NONE);
      if (!same_files("plain", name, kind == 0)) fail_msg("backend %d, %s", kind, copies[k]);
      load(name, (kind + k) % KINDS);
      free(name);
    }
  for (uint64_t seed = 100; seed < 110; seed++) { // lanes in other orders
    char *name = xasprintf("%d", (int)seed);
    save(name, 1, copies[0], seed, FAULT_NONE);
    if (!same_files("plain", name, 0)) fail_msg("seed %s", name);
    free(name);
  }
  // A copy that does not wait for what it copies would be noticed.
  save("careless", 1, copies[0], 3, FAULT_FINISH);
  assert_false(same_files("plain", "careless", 0));
}

static void flip(const char *path, long at) {
  FILE *f = fopen(path, "r+b");
  assert_non_null(f);
  fseek(f, at, at < 0 ? SEEK_END : SEEK_SET);
  int byte = fgetc(f);
  fseek(f, -1, SEEK_CUR);
  fputc(byte ^ 1, f);
  fclose(f);
}

// Damage is damage wherever it is, also where it looks like another model; the state is as it was.
static void damage_is_not_another_model(void **state) {
  (void)state;
  Config *c = xcalloc(1, sizeof *c), *deeper = xcalloc(1, sizeof *deeper);
  Engine e, other;
  Error err;
  save("run", 0, "checkpoint.copy=never", 0, FAULT_NONE);
  config_open(c, 0, "checkpoint.copy=never", "model.layers=2");
  config_open(deeper, 0, "checkpoint.copy=never", "model.layers=3");
  engine_open(&e, c, &backend_cpu);
  engine_open(&other, deeper, &backend_cpu);
  RunState run = {.step = 3, .tokenizer = xstrdup("00ff")}, stranger = {.tokenizer = xstrdup("00fe")};
  char *dir = xasprintf("%s/run/ckpt-7", folder);
  for (int f = 0; f < 3; f++)
    for (int where = 0; where < 2; where++) {
      char *path = xasprintf("%s/%s", dir, files[f]), *text, *name;
      long at = -5;
      if (where == 0) { // a letter of a tensor's name: as if it were another's
        text = file_read(path, 1 << 30, NULL, &err);
        name = memmem(text, 65536, "embed.weight\"", 13);
        assert_non_null(name);
        at = name - text;
        free(text);
      }
      flip(path, at);
      Checkpoint *checkpoint = checkpoint_open(dir, &err);
      assert_non_null(checkpoint);
      assert_int_equal(state_load(&e, &run, checkpoint, 0, &err), STATE_DAMAGED);
      assert_non_null(strstr(err.text, files[f]));
      assert_true(run.step == 3 && !run.loader);
      checkpoint_close(checkpoint);
      flip(path, at);
      free(path);
    }
  Checkpoint *checkpoint = checkpoint_open(dir, &err);
  assert_int_equal(state_load(&other, &run, checkpoint, 0, &err), -1);
  assert_non_null(strstr(err.hint, "another model"));
  assert_int_equal(state_load(&e, &stranger, checkpoint, 0, &err), -1);
  assert_non_null(strstr(err.text, "another tokenizer"));
  assert_int_equal(state_load(&e, &run, checkpoint, 0, &err), 0);
  assert_int_equal(run.step, 7);
  checkpoint_close(checkpoint);
  engine_free(&e);
  engine_free(&other);
  state_free(&run);
  state_free(&stranger);
  free(dir);
  free(c);
  free(deeper);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(every_way_has_the_same_bytes, empty_folder),
      cmocka_unit_test_setup(damage_is_not_another_model, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
