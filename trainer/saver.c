#include "trainer/saver.h"

#include "base/machine.h"
#include "base/thread.h"
#include "model/placement.h"
#include "trainer/slab.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 // Linux 5.14
#endif

static const size_t PAGE = 4096, FIND_AT_ONCE = 16 << 20;
static const int64_t STAGE = 32 << 20; // of a slab at a time on its way from a device

// A file of tensors and where those without data in host memory come from.
typedef struct SavedFile {
  Saver *saver;
  const StateFile *layout;
  SafeSource source;
  void *scratch; // [SAFE_CHUNK] for weights that are converted on their way from the device
} SavedFile;

struct Saver {
  Engine *engine;
  const char *run;
  char *copy; // [copy_bytes] of the host, NULL: there is none
  size_t copy_bytes;
  char *at[SPACE_COUNT]; // slabs as they are stored, in the copy or where they are; NULL: not in host memory
  StateLayout layout;
  SavedFile file[STATE_FILES];
  pthread_mutex_t device; // held while something is read from it
  pthread_t thread;       // first finds the copy's memory, then writes
  bool started;           // the thread, which has not been joined
  atomic_bool leave;      // it shall find no more memory
  atomic_bool written;    // it has written
  bool pending;           // a save whose result nobody has taken yet
  // That save.
  int64_t step;
  char *state, *config;
  double stood, seconds; // training stood still, written
  int rc;
  Error err;
};

static size_t page_round(size_t bytes) {
  return (bytes + PAGE - 1) / PAGE * PAGE;
}

// ---- the copy's memory ----

// The system gives memory when it is first touched, which for many gigabytes takes longer than to fill it.
static void *find_memory(void *argument) {
  Saver *s = argument;
  for (size_t at = 0; at < s->copy_bytes && !s->leave; at += FIND_AT_ONCE) {
    size_t left = s->copy_bytes - at;
    double began = time_now();
    if (madvise(s->copy + at, left < FIND_AT_ONCE ? left : FIND_AT_ONCE, MADV_POPULATE_WRITE) != 0) break;
    usleep((useconds_t)(1e6 * (time_now() - began))); // the loader wants memory, too
  }
  return NULL;
}

static void join_thread(Saver *s) {
  if (s->started) pthread_join(s->thread, NULL);
  s->started = false;
}

// Takes memory for all slabs and says where each goes. 0, or -1 with *err when there is not enough.
static int take_copy(Saver *s, Error *err) {
  const Engine *e = s->engine;
  size_t need = 0;
  for (int i = 0; i < SPACE_COUNT; i++)
    if (space_has((Space)i, SPACE_SAVED)) need += page_round((size_t)engine_whole_bytes(e, (Space)i));
  int64_t room = machine_memory_left("");
  // An eighth is left for the data, its decoding and everybody else.
  void *p = (int64_t)need < room / 8 * 7 ? mmap(NULL, need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                                         : MAP_FAILED;
  if (p == MAP_FAILED)
    return error_set(err,
                     config_shards(e->config) > 1
                         ? "without parallel.zero they are written without, which holds up training"
                         : "checkpoint.copy=never writes them without, which holds up training",
                     "a copy of the state for checkpoints needs %.3f GB of host memory, and there are %.3f",
                     (double)need / 1e9, (double)room / 1e9);
  madvise(p, need, MADV_HUGEPAGE);
  s->copy = p;
  s->copy_bytes = need;
  char *at = s->copy;
  for (int i = 0; i < SPACE_COUNT; i++) {
    size_t bytes = (size_t)engine_whole_bytes(e, (Space)i);
    if (!bytes || !space_has((Space)i, SPACE_SAVED)) continue;
    s->at[i] = at;
    at += page_round(bytes);
  }
  return 0;
}

// ---- what is written ----

// Bytes [at, at + n) of a tensor that no host memory has as it is written.
static void fill(void *context, int i, size_t at, size_t n, void *out) {
  SavedFile *f = context;
  Saver *s = f->saver;
  const Engine *e = s->engine;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  int params = s->layout.params;
  Space space = f->layout->space[i / params];
  int64_t first = e->model.params.of[i % params].offset + (int64_t)(at / element), count = (int64_t)(n / element);
  if (s->at[space]) {
    const Backend *b = e->model.backend;
    b->weights_read(s->at[SPACE_WEIGHTS] + (size_t)first * b->dtype_bytes[DT_ACT],
                    s->at[SPACE_REMAINDER] + first * b->remainder_bytes, count, out);
    return;
  }
  pthread_mutex_lock(&s->device);
  engine_slab_read_part(e, space, first, count, out, f->scratch);
  pthread_mutex_unlock(&s->device);
}

// Memory that the device reaches at full speed, where the data comes from there; aligned in any case.
static void *buffer_new(const Saver *s) {
  return s->copy ? xmalloc(SAFE_CHUNK) : s->engine->model.backend->host_alloc(SAFE_CHUNK);
}

static void buffer_free(const Saver *s, void *p) {
  if (!p) return;
  if (s->copy)
    free(p);
  else
    s->engine->model.backend->host_release(p);
}

// Tells every tensor where its data is: in host memory as it is written, or through a buffer.
static int open_files(Saver *s, Error *err) {
  const Engine *e = s->engine;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  s->layout = state_layout(e);
  for (int i = 0; i < s->layout.n; i++) {
    const StateFile *l = &s->layout.file[i];
    SavedFile *f = &s->file[i];
    *f = (SavedFile){.saver = s, .layout = l, .source = {.fill = fill, .context = f}};
    int converts = engine_converts(e, l->space[0]), direct = s->at[l->space[0]] && !converts;
    for (int k = 0; direct && k < l->n; k++)
      l->tensor[k].data =
          s->at[l->space[k / s->layout.params]] + (size_t)e->model.params.of[k % s->layout.params].offset * element;
    if (!direct) f->source.buffer = buffer_new(s);
    if (converts && !s->copy) f->scratch = buffer_new(s);
    if ((!direct && !f->source.buffer) || (converts && !s->copy && !f->scratch))
      return error_set(err, "close what else uses this machine's memory", "out of pinned host memory for checkpoints");
  }
  return 0;
}

static double written_gb(const Saver *s) {
  double bytes = 0;
  for (int f = 0; f < s->layout.n; f++)
    for (int i = 0; i < s->layout.file[f].n; i++) bytes += (double)safe_bytes(&s->layout.file[f].tensor[i]);
  return bytes / 1e9;
}

static void *write_checkpoint(void *argument) {
  Saver *s = argument;
  const Config *c = s->engine->config;
  double began = time_now();
  SafeTensor text = {
      .name = "text", .dtype = SAFE_U8, .rank = 1, .shape = {(int64_t)strlen(s->config)}, .data = s->config};
  CheckpointFile files[STATE_FILES + 1];
  int n = s->layout.n;
  for (int i = 0; i < n; i++)
    files[i] = (CheckpointFile){s->layout.file[i].name, s->layout.file[i].tensor, s->layout.file[i].n,
                                s->file[i].source.buffer ? &s->file[i].source : NULL};
  files[n] = (CheckpointFile){.name = "config.json", .tensors = &text, .n = 1};
  CheckpointKeep keep = {c->checkpoint.keep_last, c->checkpoint.keep_every};
  s->rc = checkpoint_save(s->run, s->step, files, n + 1, s->state, keep, &s->err);
  s->seconds = time_now() - began;
  s->written = true;
  return NULL;
}

// Puts the shares of all processes together at `to`, where they are wanted.
static void gather_shares(Engine *e, char *const *to) {
  for (int i = 0; i < SPACE_COUNT; i++)
    if (space_is_shared(&e->model, (Space)i) && engine_slab_bytes(e, (Space)i))
      engine_slab_gather(e, (Space)i, to ? to[i] : NULL);
}

void saver_help(Engine *e) {
  gather_shares(e, NULL);
}

// ---- the saver ----

Saver *saver_open(Engine *e, const char *run, Error *err) {
  Saver *s = xcalloc(1, sizeof *s);
  s->engine = e;
  s->run = run;
  pthread_mutex_init(&s->device, NULL);
  // Shares come together in the copy.
  SaveCopy copy = config_shards(e->config) > 1 ? COPY_ALWAYS : config_save_copy(e->config);
  int bad = copy != COPY_NEVER && (engine_stage_open(e, STAGE, err) != 0 || take_copy(s, err) != 0);
  if (bad && copy == COPY_AUTO) {
    log_info("%s: saves will hold up training", err->text);
    bad = 0;
  }
  for (int i = 0; !s->copy && i < SPACE_COUNT; i++) { // host memory, as it is
    if (!space_has((Space)i, SPACE_SAVED)) continue;
    if (!e->model.backend->queues) s->at[i] = engine_slab(e, (Space)i);
    if (e->bases.host_bytes[i] && !e->bytes[i]) s->at[i] = e->bases.host[i];
  }
  if (bad || open_files(s, err) != 0) {
    saver_close(s);
    return NULL;
  }
  return s;
}

void saver_warm(Saver *s) {
  if (!s->copy || s->started || s->leave) return;
  s->started = thread_start(&s->thread, find_memory, s) == 0;
}

void saver_begin(Saver *s, const RunState *state, double began) {
  s->leave = true;
  join_thread(s);
  free(s->state);
  free(s->config);
  s->step = state->step;
  s->state = state_json(s->engine, state);
  s->config = state_config(s->engine);
  s->pending = true;
  s->written = false;
  for (int i = 0; s->copy && i < SPACE_COUNT; i++)
    if (s->at[i] && !space_is_shared(&s->engine->model, (Space)i)) engine_slab_copy(s->engine, (Space)i, s->at[i]);
  gather_shares(s->engine, s->at);
  s->started = s->copy && thread_start(&s->thread, write_checkpoint, s) == 0;
  if (!s->started) {
    engine_await(s->engine);
    write_checkpoint(s);
  }
  s->stood = time_now() - began;
}

int saver_result(Saver *s, int wait, Error *err) {
  if (!s->pending || (!wait && !s->written)) return 0;
  join_thread(s);
  s->pending = false;
  if (s->rc != 0) {
    *err = s->err;
    return -1;
  }
  double gb = written_gb(s);
  log_info("checkpoint of step %lld: training stood still %.1f ms, %.3f GB on the disk after %.2f s (%.2f GB/s)",
           (long long)s->step, 1e3 * s->stood, gb, s->seconds, gb / s->seconds);
  return 0;
}

void saver_close(Saver *s) {
  if (!s) return;
  Error err;
  if (saver_result(s, 1, &err) != 0) log_warn("%s", err.text);
  s->leave = true;
  join_thread(s);
  for (int i = 0; i < s->layout.n; i++) {
    buffer_free(s, s->file[i].source.buffer);
    buffer_free(s, s->file[i].scratch);
  }
  state_layout_free(&s->layout);
  if (s->copy) munmap(s->copy, s->copy_bytes);
  pthread_mutex_destroy(&s->device);
  free(s->state);
  free(s->config);
  free(s);
}
