// Opening a run: memory, data, tokenizer, engine and weights, in the order in which faults should be found.
#include "trainer/trainer_internal.h"

#include "base/ranks.h"
#include "kernels/backends.h"
#include "model/program/policy.h"
#include "trainer/costs.h"
#include "trainer/run_folder.h"
#include "trainer/run_tokenizer.h"
#include "trainer/slab.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int uses_checkpoint(const Options *o) {
  return o->sample || o->describe || o->eval;
}

static int need_sources(const Config *c, Error *err) {
  if (c->data.sources) return 0;
  return error_set(err,
                   "add {\"type\": \"webdataset\", \"path\": \"...\"} to data.sources; README.md shows the formats",
                   "data.sources is empty: there is nothing to train on");
}

static int open_sources(Trainer *t, Error *err) {
  const Config *c = t->config;
  for (int i = 0; i < c->data.sources; i++) {
    t->source[i] = source_open(c->data.source[i].type, c->data.source[i].path, c->data.held_out_by, err);
    if (!t->source[i]) {
      if (access(c->data.source[i].path, F_OK) != 0 && !strpbrk(c->data.source[i].path, "*?[{~:"))
        snprintf(err->hint, sizeof err->hint, "paths are relative to the folder ./train is called in%s",
                 strncmp(c->data.source[i].path, ".cache/", 7)
                     ? ""
                     : "; make demo (scripts/make_shapes.py), make demo-emoji "
                       "and make demo-icons make the demos' data");
      return error_prefix(err, "data.sources[%d]", i);
    }
    t->weight[i] = c->data.source[i].weight;
    t->sources++;
    if (source_limit_pixels(t->source[i], c->data.max_pixels, err)) return error_prefix(err, "data.sources[%d]", i);
    source_log(t->source[i]);
  }
  return 0;
}

#define OTHER_CHECKPOINT "name another one; --resume takes the newest valid one of a run"

// --from and --init take a checkpoint: where the folder of a run was given, the hint names the newest in it. Returns
// -1.
static int hint_checkpoint_of_run(const char *given, Error *err) {
  Checkpoint *newest = NULL;
  Error none;
  int64_t below = INT64_MAX;
  char *config = xasprintf("%s/config.json", given), *state = xasprintf("%s/state.json", given);
  if (access(config, F_OK) == 0 && access(state, F_OK) != 0 && checkpoint_find(given, &below, &newest, &none) > 0) {
    error_set(err, NULL, "%s is the folder of a run, not a checkpoint", given);
    snprintf(err->hint, sizeof err->hint, "its newest is %s", newest->dir);
    checkpoint_close(newest);
  }
  free(state);
  free(config);
  return -1;
}

int trainer_find(const Trainer *t, int64_t *below, Checkpoint **out, Error *err) {
  if (t->config->processes == 1) return checkpoint_find(t->run, below, out, err);
  *out = NULL;
  int found = ranks_rank() == 0 ? checkpoint_find(t->run, below, out, err) : 0;
  if (found < 0) return -1;
  char *dir = ranks_broadcast_text(*out ? (*out)->dir : NULL);
  ranks_broadcast(below, sizeof *below);
  if (dir && !*out && !(*out = checkpoint_open(dir, err))) found = error_prefix(err, "what rank 0 goes on from");
  free(dir);
  return found < 0 ? -1 : *out != NULL;
}

// Opens the checkpoint that the options ask for; *c stays NULL where they ask for none or --resume finds none. *below
// as in checkpoint_find.
static int open_checkpoint(const Trainer *t, Checkpoint **c, int64_t *below, Error *err) {
  const Options *o = t->options;
  const char *given = o->from ? o->from : o->init;
  *c = NULL;
  if (given) {
    *c = checkpoint_open(given, err);
    if (*c) return 0;
    if (!err->hint[0]) snprintf(err->hint, sizeof err->hint, OTHER_CHECKPOINT);
    return hint_checkpoint_of_run(given, err);
  }
  if (!o->resume && !uses_checkpoint(o)) return 0;
  int found = trainer_find(t, below, c, err);
  if (found < 0) return -1;
  if (!found && uses_checkpoint(o))
    return error_set(err, "train it first, or name a checkpoint with --from", "%s has no checkpoint", t->run);
  if (!found) log_info("%s has no checkpoint yet: starting at step 0", t->run);
  return 0;
}

// Where initial values go.
typedef struct Filling {
  SlabWriter *writer;
  int has_ema;
} Filling;

static void put_values(void *arg, int64_t offset, int64_t count, const void *values) {
  const Filling *f = arg;
  slab_writer_put(f->writer, SPACE_WEIGHTS, offset, count, values);
  if (f->has_ema) slab_writer_put(f->writer, SPACE_EMA, offset, count, values);
}

// Fills the weights (and EMA) of a run that begins: initial values, or random ones for --dump.
static int fill_weights(Trainer *t, Error *err) {
  Engine *e = &t->engine;
  Filling f = {slab_writer_open(e, PARAMS_PIECE, err), engine_slab_bytes(e, SPACE_EMA) > 0};
  if (!f.writer) return -1;
  params_stream(&e->model.params, t->options->dump ? PARAMS_RANDOM : PARAMS_INITIAL, (uint64_t)t->config->run.seed,
                e->model.backend->dtype_bytes[DT_REAL], put_values, &f);
  slab_writer_close(f.writer);
  return 0;
}

// Records the programs and holds what they need against the budget: before the data, which may take long to index.
static int plan_memory(Trainer *t, Error *err) {
  Engine *e = &t->engine;
  const Backend *backend = backend_for_run(t->config, err);
  if (!backend) return -1;
  start_mark(&t->start, START_DEVICE);
  int trains = !uses_checkpoint(t->options), bad, goes_on = 0;
  PolicyTable plan; // of the run so far
  if (trains && t->options->resume) {
    char *path = xasprintf("%s/" PLAN_FILE, t->run);
    goes_on = policy_file_load(&plan, t->config->model.layers, path);
    free(path);
  }
  if (trains)
    bad = engine_record_with(e, t->config, backend, 1, costs_open(t->config, backend, t->run), goes_on ? &plan : NULL,
                             err);
  else
    bad = engine_record(e, t->config, backend, 0, err);
  e->given = NULL;
  if (goes_on) policy_table_free(&plan);
  if (bad) return -1;
  start_mark(&t->start, START_PLAN);
  if (engine_check_budget(e, err) == 0 && engine_check_host(e, err) == 0) return 0;
  engine_print_plan(e, stderr);
  return -1;
}

int trainer_restore(Trainer *t, Checkpoint **c, int64_t below, int weights_only, Error *err) {
  int rc;
  while ((rc = state_load(&t->engine, &t->state, *c, weights_only, err)) == STATE_DAMAGED) {
    if (below == INT64_MAX) {
      snprintf(err->hint, sizeof err->hint, OTHER_CHECKPOINT);
      return -1;
    }
    log_warn("checkpoint %s is left out: %s", (*c)->dir, err->text);
    // A run that is being trained removes it when it has a newer one.
    if (access((*c)->dir, F_OK) != 0) below = INT64_MAX;
    checkpoint_close(*c);
    int found = trainer_find(t, &below, c, err);
    if (found == 0) error_set(err, "does another program change it?", "the checkpoints in %s are gone", t->run);
    if (found <= 0) return -1;
  }
  return rc;
}

// Says that a step is of another size than the checkpoint's: another number of processes does that, too.
static void name_step_change(const Config *c, const Checkpoint *checkpoint) {
  const cJSON *loader = cJSON_GetObjectItemCaseSensitive(checkpoint->state, "loader");
  const cJSON *packs = cJSON_GetObjectItemCaseSensitive(loader, "packs_per_step");
  int now = c->train.micro_batches * c->processes;
  double before = cJSON_IsNumber(packs) ? packs->valuedouble : now;
  if (now == before) return;
  char *way =
      fmod(before, c->processes) == 0
          ? xasprintf("train.micro_batches=%.0f, or --batch, keeps it", before / c->processes)
          : xasprintf("a number of processes that divides %.0f keeps it, with train.micro_batches or --batch", before);
  log_warn("a step takes %d micro-batches over all processes, not %.0f as so far; %s", now, before, way);
  free(way);
}

// The weights of a checkpoint, and where training goes on its moments and counters too.
static int load_weights(Trainer *t, Checkpoint **checkpoint, int64_t below, Error *err) {
  const Options *o = t->options;
  double began = time_now();
  if (t->engine.bases.host_bytes[SPACE_ADAM_M] && engine_await_host(&t->engine, err) != 0) return -1;
  if (trainer_restore(t, checkpoint, below, o->init || uses_checkpoint(o), err) != 0) return -1;
  if (uses_checkpoint(o))
    t->state.step = (*checkpoint)->step;
  else if (!o->init) {
    run_folder_name_changes(t->config, (*checkpoint)->dir);
    name_step_change(t->config, *checkpoint);
  }
  char took[32] = "";
  double seconds = time_now() - began;
  if (seconds >= 1) snprintf(took, sizeof took, " in %.1f s", seconds);
  log_info("loaded %s (step %lld)%s", (*checkpoint)->dir, (long long)(*checkpoint)->step, took);
  return 0;
}

// What trainer_open does, in the order in which faults should be found.
static int open_all(Trainer *t, Checkpoint **checkpoint, Error *err) {
  const Options *o = t->options;
  Engine *e = &t->engine;
  int samples = o->sample || o->describe;
  int64_t below = INT64_MAX;
  if ((!samples && need_sources(t->config, err) != 0) || plan_memory(t, err) != 0) return -1;
  if (open_checkpoint(t, checkpoint, &below, err) != 0) return -1;
  start_mark(&t->start, START_CHECKPOINT);
  if (!samples && open_sources(t, err) != 0) return -1;
  start_mark(&t->start, START_DATA);
  const char *used = *checkpoint ? (*checkpoint)->dir : NULL;
  t->tokenizer = run_tokenizer_open(t->config, t->run, used, t->source, t->sources, err);
  if (!t->tokenizer) return -1;
  t->state.tokenizer = tokenizer_identity(t->tokenizer);
  start_mark(&t->start, START_TOKENIZER);
  if (engine_allocate_begin(e, err) != 0) return -1;
  start_mark(&t->start, START_MEMORY);
  if ((*checkpoint ? load_weights(t, checkpoint, below, err) : fill_weights(t, err)) != 0) return -1;
  start_mark(&t->start, START_WEIGHTS);
  if (engine_allocate_end(e, err) != 0) return -1;
  start_mark(&t->start, START_MEMORY);
  if (uses_checkpoint(o)) engine_use_ema(e, 1);
  return 0;
}

Trainer *trainer_open(const Config *c, const Options *o, const char *run, Error *err) {
  Trainer *t = xcalloc(1, sizeof *t);
  t->config = c;
  t->options = o;
  t->run = xstrdup(run);
  t->lock = -1;
  start_begin(&t->start);
  Checkpoint *checkpoint = NULL;
  Dims d = dims_from_config(c, 1, 1);
  t->metrics = xmalloc((size_t)metrics_size(&d) * sizeof *t->metrics);
  int bad = open_all(t, &checkpoint, err);
  checkpoint_close(checkpoint);
  if (!bad) return t;
  trainer_close(t);
  return NULL;
}

void trainer_close(Trainer *t) {
  if (!t) return;
  saver_close(t->saver); // waits for what it writes
  eval_items_free(t->held_out, t->n_held_out);
  eval_items_free(t->training, t->n_training);
  engine_free(&t->engine);
  tokenizer_free(t->tokenizer);
  for (int i = 0; i < t->sources; i++) source_close(t->source[i]);
  free(t->metrics);
  free(t->state.loader);
  free(t->state.tokenizer);
  if (t->lock >= 0) close(t->lock);
  free(t->run);
  free(t);
}
