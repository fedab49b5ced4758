#include "trainer/saver.h"

#include "base/machine.h"
#include "base/ranks.h"
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

// What a process wrote.
typedef struct Written {
  int n;
  CheckpointEntry entry[STATE_FILES + 1];
} Written;

struct Saver {
  Engine *engine;
  const char *run;
  int rank, ranks;
  bool beside; // the copy has everything, so that training goes on while it is written
  char *copy;  // [copy_bytes] of the host, NULL: there is none
  size_t copy_bytes;
  bool copied[SPACE_COUNT]; // what is in it
  char *at[SPACE_COUNT];    // slabs as they are stored, in the copy or where they are; NULL: not in host memory
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
  double stood, began, seconds; // training stood still, writing began and took
  Written own;
  bool commits;         // this process makes it a checkpoint, and only that is left
  CheckpointEntry *all; // [n_all] of what all wrote
  int n_all;
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

// Whether a slab is copied even where files are written without: it is put together, or its other half is.
static bool needs_copy(const Engine *e, Space space) {
  return slab_is_gathered(e, space) || (space == SPACE_WEIGHTS && slab_is_gathered(e, SPACE_REMAINDER));
}

// Takes memory for what this process writes, or only for what needs a copy, and says where each slab goes. 0, or -1
// with *err when there is not enough.
static int take_copy(Saver *s, bool everything, Error *err) {
  const Engine *e = s->engine;
  size_t need = 0, bytes[SPACE_COUNT] = {0};
  for (int i = 0; i < SPACE_COUNT; i++) {
    if (everything || needs_copy(e, (Space)i)) bytes[i] = page_round((size_t)slab_copy_bytes(e, (Space)i));
    need += bytes[i];
  }
  s->beside = everything;
  if (!need) return 0;
  int64_t room = machine_memory_left("") / (s->ranks > 1 ? ranks_on_host() : 1);
  // An eighth is left for the data, its decoding and everybody else.
  void *p = (int64_t)need < room / 8 * 7 ? mmap(NULL, need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                                         : MAP_FAILED;
  if (p == MAP_FAILED) {
    s->beside = false;
    return error_set(err,
                     everything ? "checkpoint.copy=never writes them without, which holds up training"
                                : "parallel.zero=0 needs none",
                     "a copy of the %s for checkpoints needs %.3f GB of host memory, and there are %.3f",
                     everything ? "state" : "shared state", (double)need / 1e9, (double)room / 1e9);
  }
  madvise(p, need, MADV_HUGEPAGE);
  s->copy = p;
  s->copy_bytes = need;
  char *at = s->copy;
  for (int i = 0; i < SPACE_COUNT; i++) {
    s->copied[i] = bytes[i] > 0;
    if (bytes[i]) s->at[i] = at;
    at += bytes[i];
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
  const StatePiece *piece = &f->layout->piece[i];
  Space space = piece->space;
  int64_t first = piece->at + (int64_t)(at / element), count = (int64_t)(n / element);
  const Backend *b = e->model.backend;
  if (s->at[space] && space != SPACE_WEIGHTS) {
    slab_moments_read(e, s->at[space] + (size_t)first * space_element(b, space), count, out);
    return;
  }
  if (s->at[space]) {
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
  return s->beside ? xmalloc(SAFE_CHUNK) : s->engine->model.backend->host_alloc(SAFE_CHUNK);
}

static void buffer_free(const Saver *s, void *p) {
  if (!p) return;
  if (s->beside)
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
    Space space = l->n ? l->piece[0].space : SPACE_EMA;
    int converts = engine_converts(e, space), direct = s->at[space] && !converts;
    for (int k = 0; direct && k < l->n; k++)
      l->tensor[k].data = s->at[l->piece[k].space] + (size_t)l->piece[k].at * element;
    if (!direct) f->source.buffer = buffer_new(s);
    if (converts && !s->beside) f->scratch = buffer_new(s);
    if ((!direct && !f->source.buffer) || (converts && !s->beside && !f->scratch))
      return error_set(err, "close what else uses this machine's memory", "out of pinned host memory for checkpoints");
  }
  return 0;
}

static CheckpointKeep keep_of(const Saver *s) {
  return (CheckpointKeep){s->engine->config->checkpoint.keep_last, s->engine->config->checkpoint.keep_every};
}

// Makes what all have written a checkpoint, or nothing where that failed; on rank 0.
static void *commit(void *argument) {
  Saver *s = argument;
  if (s->rc == 0)
    s->rc = checkpoint_commit(s->run, s->step, s->all, s->n_all, s->state, keep_of(s), &s->err);
  else
    checkpoint_abandon(s->run, s->step);
  s->seconds = time_now() - s->began;
  s->written = true;
  return NULL;
}

// Writes this process's files, which is the whole checkpoint of one that is alone.
static void *write_checkpoint(void *argument) {
  Saver *s = argument;
  SafeTensor text = {
      .name = "text", .dtype = SAFE_U8, .rank = 1, .shape = {(int64_t)strlen(s->config)}, .data = s->config};
  CheckpointFile files[STATE_FILES + 1];
  int n = s->layout.n;
  for (int i = 0; i < n; i++)
    files[i] = (CheckpointFile){.name = s->layout.file[i].name,
                                .tensors = s->layout.file[i].tensor,
                                .n = s->layout.file[i].n,
                                .source = s->file[i].source.buffer ? &s->file[i].source : NULL};
  files[n++] = (CheckpointFile){.name = "config.json", .tensors = &text, .n = 1, .elsewhere = s->rank > 0};
  if (s->ranks == 1) s->rc = checkpoint_begin(s->run, s->step, &s->err);
  if (s->rc == 0) s->rc = checkpoint_write(s->run, s->step, files, n, s->own.entry, &s->own.n, &s->err);
  s->n_all = s->own.n;
  if (s->ranks == 1) return commit(s);
  s->written = true;
  return NULL;
}

// ---- the saver ----

Saver *saver_open(Engine *e, const char *run, Error *err) {
  Saver *s = xcalloc(1, sizeof *s);
  s->engine = e;
  s->run = run;
  s->ranks = e->config->processes;
  s->rank = s->ranks > 1 ? ranks_rank() : 0;
  pthread_mutex_init(&s->device, NULL);
  SaveCopy copy = config_save_copy(e->config);
  int bad = copy != COPY_NEVER && (engine_stage_open(e, STAGE, err) != 0 || take_copy(s, true, err) != 0);
  if (bad && copy == COPY_AUTO) {
    log_info("%s: saves will hold up training", err->text);
    bad = 0;
  }
  if (!bad && !s->beside) bad = take_copy(s, false, err) != 0 || (s->copy && engine_stage_open(e, STAGE, err) != 0);
  for (int i = 0; !s->beside && i < SPACE_COUNT; i++) { // host memory, as it is
    if (!space_has((Space)i, SPACE_SAVED) || s->at[i]) continue;
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

// Copies what this process writes, and gives its shares of the rest to who writes that.
static void copy_state(Saver *s) {
  Engine *e = s->engine;
  for (int i = 0; i < SPACE_COUNT; i++)
    if (slab_is_gathered(e, (Space)i))
      engine_slab_gather(e, (Space)i, s->copied[i] ? s->at[i] : NULL);
    else if (s->copied[i])
      engine_slab_copy(e, (Space)i, s->at[i]);
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
  s->began = time_now();
  s->own.n = s->rc = 0;
  s->commits = s->ranks == 1;
  s->all = s->own.entry;
  if (s->ranks > 1) {
    if (s->rank == 0) s->rc = checkpoint_begin(s->run, s->step, &s->err);
    int begun = s->rc == 0;
    ranks_broadcast(&begun, sizeof begun);
    s->written = !begun;
    if (!begun) return;
  }
  copy_state(s);
  s->started = s->beside && thread_start(&s->thread, write_checkpoint, s) == 0;
  if (!s->started) {
    engine_await(s->engine);
    write_checkpoint(s);
  }
  s->stood = time_now() - began;
}

int saver_has_written(const Saver *s) {
  return s->pending && !s->commits && s->written;
}

// All processes have come here, each when it has written: 0 on rank 0, which then makes it a checkpoint, and -1 with
// *err on all where one of them failed.
static int gather_written(Saver *s, Error *err) {
  join_thread(s);
  if (s->rc) *err = s->err;
  int bad = ranks_worst(s->rc, err);
  Written *each = xmalloc((size_t)s->ranks * sizeof *each);
  ranks_gather(&s->own, sizeof s->own, each);
  s->pending = s->commits = !bad && s->rank == 0;
  if (bad && s->rank == 0) checkpoint_abandon(s->run, s->step);
  if (s->pending) {
    s->all = xmalloc((size_t)s->ranks * (STATE_FILES + 1) * sizeof *s->all);
    s->n_all = 0;
    for (int r = 0; r < s->ranks; r++)
      for (int i = 0; i < each[r].n; i++) s->all[s->n_all++] = each[r].entry[i];
    s->written = false;
    s->started = thread_start(&s->thread, commit, s) == 0;
    if (!s->started) commit(s);
  }
  free(each);
  return bad;
}

static double written_gb(const Saver *s) {
  double bytes = 0;
  for (int i = 0; i < s->n_all; i++) bytes += (double)s->all[i].sum.bytes;
  return bytes / 1e9;
}

// The end of a save that this process makes a checkpoint.
static int end_save(Saver *s, Error *err) {
  join_thread(s);
  double gb = written_gb(s);
  s->pending = false;
  if (s->ranks > 1) free(s->all);
  if (s->rc != 0) {
    *err = s->err;
    return -1;
  }
  log_info("checkpoint of step %lld: training stood still %.1f ms, %.3f GB on the disk after %.2f s (%.2f GB/s)",
           (long long)s->step, 1e3 * s->stood, gb, s->seconds, gb / s->seconds);
  return 0;
}

int saver_result(Saver *s, int wait, Error *err) {
  if (!s->pending || (!wait && !s->written)) return 0;
  if (!s->commits && gather_written(s, err) != 0) return -1;
  return s->pending && (wait || s->written) ? end_save(s, err) : 0;
}

void saver_close(Saver *s) {
  if (!s) return;
  Error err;
  if (s->pending && s->commits && end_save(s, &err) != 0) log_warn("%s", err.text);
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
