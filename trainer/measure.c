#include "trainer/measure.h"

#include "base/hash.h"
#include "model/program/policy.h"
#include "model/program/seconds_file.h"

#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// ---- the file ----

// A hash of the program's own file: another build may have other kernels. malloc'd.
static char *build_hash(void) {
  uint64_t hash = 0;
  struct stat st;
  int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  void *at =
      fd >= 0 && fstat(fd, &st) == 0 ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  if (fd >= 0) close(fd);
  if (at != MAP_FAILED) {
    hash = hash64(at, (size_t)st.st_size, 0);
    munmap(at, (size_t)st.st_size);
  }
  return xasprintf("%016" PRIx64, hash);
}

// What ops' times depend on besides what their classes say. malloc'd.
static char *sizes_text(const Engine *e) {
  const Config *c = e->config;
  Dims d = dims_from_config(c, e->slots, e->segments);
  return xasprintf(
      "T %d, %d modulation rows, C %d, H %d, G %d, D %d, P %d, V %d, Z %d, L %d, text %d x %d of %d shared "
      "%d, image %d x %d of %d shared %d, adaln %d, moe_gemm %d, graph %d",
      d.T, d.segments, d.C, d.H, d.G, d.D, d.P, d.V, d.Z, d.L, d.K[TEXT], d.F[TEXT], d.E[TEXT], d.S[TEXT], d.K[IMAGE],
      d.F[IMAGE], d.E[IMAGE], d.S[IMAGE], c->kernels.adaln, c->kernels.moe_gemm, c->kernels.graph);
}

typedef struct OwnKey {
  char *path, *build, *sizes;
  CostsKey key;
} OwnKey;

static OwnKey own_key(const Engine *e, const char *run) {
  OwnKey k = {xasprintf("%s/" COSTS_FILE, run), build_hash(), sizes_text(e), {0}};
  k.key = (CostsKey){e->model.backend->kernels(), k.build, k.sizes};
  return k;
}

static void own_key_free(OwnKey *k) {
  free(k->path);
  free(k->build);
  free(k->sizes);
}

int measure_load(const Engine *e, const char *run, Costs *c) {
  OwnKey k = own_key(e, run);
  int found = costs_load(c, &k.key, k.path);
  own_key_free(&k);
  return found;
}

int measure_save(const Engine *e, const char *run, const Costs *c, Error *err) {
  OwnKey k = own_key(e, run);
  int bad = costs_save(c, &k.key, k.path, err);
  own_key_free(&k);
  return bad;
}

// ---- the device ----

void measure_device(const Backend *b, Costs *c) {
  LinkRates link = b->link ? b->link() : (LinkRates){0};
  if (link.d2h <= 0) return; // no device is open
  c->link = link;
  DeviceRates rates = b->rates();
  if (rates.bytes > 0) c->rates = rates;
}

// ---- ops ----

enum { SAMPLES = 5 };            // replays of each way, at most
static const double enough = .5; // seconds that they may take together, but for the first two

static int double_compare(const void *pa, const void *pb) {
  double a = *(const double *)pa, b = *(const double *)pb;
  return (a > b) - (a < b);
}

static double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, double_compare);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

// Medians over replays, op by op, of the pack that was staged last. seconds: [n_ops].
static void time_ops(Program *p, double *seconds) {
  size_t ops = (size_t)p->n_ops;
  OpTime *times = xcalloc(ops, sizeof *times);
  double(*samples)[SAMPLES] = xcalloc(ops, sizeof *samples), began = time_now();
  int n = 0;
  for (; n < SAMPLES && (n < 2 || time_now() - began < enough); n++) {
    program_replay(p, times);
    for (size_t i = 0; i < ops; i++) samples[i][n] = times[i].end - times[i].begin;
  }
  for (size_t i = 0; i < ops; i++) seconds[i] = median(samples[i], n);
  free(samples);
  free(times);
}

// The median of whole replays, as training does them.
static double time_replays(const Queues *q, Program *p) {
  double samples[SAMPLES], began = time_now();
  int n = 0;
  for (; n < SAMPLES && (n < 2 || time_now() - began < enough); n++) {
    q->record(LANE_COMPUTE, EVENT_TIMED);
    program_replay(p, NULL);
    q->record(LANE_COMPUTE, EVENT_TIMED + 1);
    q->finish(EVENT_TIMED + 1);
    samples[n] = q->seconds(EVENT_TIMED, EVENT_TIMED + 1);
  }
  return median(samples, n);
}

static int uses_copies(const Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane != LANE_COMPUTE) return 1;
  return 0;
}

// Measures a bound program. *gap: see seconds_gap; taken over where copies run beside the ops, whose sum is unknown.
static void measure_program(Engine *e, const ModelProgram *m, const void *pack, double *gap, Costs *c) {
  Program *p = m->program;
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds);
  engine_run(e, m, pack, NULL); // loads kernels, captures the graph, wakes the clocks
  program_replay(p, NULL);
  time_ops(p, seconds);
  if (!uses_copies(p)) *gap = seconds_gap(p, seconds, time_replays(e->model.backend->queues, p));
  seconds_close(p, seconds, *gap);
  costs_note(c, p, seconds);
  free(seconds);
}

static int is_measured(const Costs *c, const Program *p) {
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].lane == LANE_COMPUTE && !costs_have(c, p, &p->ops[i])) return 0;
  return 1;
}

static int fits(const Engine *e, const Program *p) {
  return p->arena_bytes <= e->bytes[SPACE_ARENA] && p->host_bytes <= e->bytes[SPACE_HOST] &&
         p->scratch_bytes <= e->bytes[SPACE_SCRATCH];
}

// Measures the program of a mode with everything recomputed, where it fits.
static void measure_recomputed(Engine *e, Mode mode, const void *pack, double *gap, Costs *c) {
  PolicyTable policy = policy_table_new(e->config->model.layers, MEMORY_RECOMPUTE);
  ModelProgram m = transformer_record(&e->model, mode, e->slots, e->segments, &policy);
  if (fits(e, m.program) && !is_measured(c, m.program)) {
    m.program->one_queue = e->first.program->one_queue;
    m.program->use_graph = e->first.program->use_graph;
    program_bind(m.program, &e->bases);
    measure_program(e, &m, pack, gap, c);
  }
  program_free(m.program);
  policy_table_free(&policy);
}

void measure_train(Engine *e, const void *pack, const Extents *extents, Costs *c) {
  const ModelProgram *const own[] = {&e->first, &e->later};
  double began = time_now(), gap = 3e-6; // of an H200 and its host
  if (!e->model.backend->queues || e->bases.separate) return;
  Mode first = e->later.program ? MODE_TRAIN_FIRST : MODE_TRAIN_ONLY;
  int before = c->n_classes;
  c->extents = *extents;
  for (int i = 0; i < 2; i++) {
    if (!own[i]->program) continue;
    if (e->config->memory.policy == MEMORY_AUTO) measure_recomputed(e, i ? MODE_TRAIN_MIDDLE : first, pack, &gap, c);
    if (!is_measured(c, own[i]->program)) measure_program(e, own[i], pack, &gap, c);
  }
  if (c->n_classes > before) log_info("%d kinds of ops timed in %.1f s", c->n_classes - before, time_now() - began);
}

void measure_note(const Program *p, const OpTime *times, Costs *c) {
  double *seconds = xcalloc((size_t)p->n_ops, sizeof *seconds);
  for (int i = 0; i < p->n_ops; i++) seconds[i] = times[i].end - times[i].begin;
  costs_note(c, p, seconds);
  free(seconds);
}
