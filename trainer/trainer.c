#include "trainer/trainer_internal.h"

#include "base/hash.h"
#include "trainer/dump.h"
#include "trainer/losses.h"
#include "trainer/overview.h"
#include "trainer/profile.h"
#include "trainer/report.h"
#include "trainer/run_folder.h"
#include "trainer/slab.h"
#include "trainer/signals.h"
#include "trainer/verify.h"

#include <inttypes.h>
#include <libgen.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- opening ----

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

// A BPE learnt from every text of the training samples.
static Tokenizer *train_tokenizer(const Trainer *t, Error *err) {
  const Config *c = t->config;
  const char **text = NULL;
  size_t *bytes = NULL;
  int64_t n = 0, room = 0;
  for (int s = 0; s < t->sources; s++) {
    for (int64_t i = 0; i < source_count(t->source[s]); i++) {
      const Sample *sample = source_sample(t->source[s], i);
      if (sample_is_held_out(sample->group, c->data.held_out)) continue;
      for (int k = 0; k < sample->segments; k++) {
        if (sample->segment[k].kind != SEGMENT_TEXT) continue;
        if (n == room) {
          room = room ? 2 * room : 1024;
          text = xrealloc(text, (size_t)room * sizeof *text);
          bytes = xrealloc(bytes, (size_t)room * sizeof *bytes);
        }
        text[n] = sample->segment[k].text;
        bytes[n++] = sample->segment[k].text_bytes;
      }
    }
  }
  Tokenizer *tokenizer = tokenizer_train(text, bytes, n, c->model.vocab, err);
  free(text);
  free(bytes);
  return tokenizer;
}

// The tokenizer of the run that a checkpoint belongs to, where there is one: its file lies beside the checkpoint.
static char *tokenizer_beside(const Trainer *t) {
  const char *given = t->options->from ? t->options->from : t->options->init;
  char *paths[2] = {xasprintf("%s/tokenizer.bpe", t->run), NULL}, *found = NULL;
  if (given) {
    char *copy = xstrdup(given);
    paths[1] = xasprintf("%s/tokenizer.bpe", dirname(copy));
    free(copy);
  }
  for (int i = 1; i >= 0; i--) {
    if (paths[i] && !found && access(paths[i], R_OK) == 0)
      found = paths[i];
    else
      free(paths[i]);
  }
  return found;
}

// `continues`: a checkpoint is being used, whose tokenizer must stay.
static int open_tokenizer(Trainer *t, int continues, Error *err) {
  const Config *c = t->config;
  char *path = continues ? tokenizer_beside(t) : NULL;
  if (path)
    t->tokenizer = tokenizer_load(path, c->model.vocab, err);
  else if (strcmp(c->data.tokenizer, "bytes") == 0)
    t->tokenizer = tokenizer_load(NULL, c->model.vocab, err);
  else if (strcmp(c->data.tokenizer, "train") != 0)
    t->tokenizer = tokenizer_load(c->data.tokenizer, c->model.vocab, err);
  else if (t->sources)
    t->tokenizer = train_tokenizer(t, err);
  else
    error_set(err, "train the run first", "%s has no tokenizer.bpe", t->run);
  free(path);
  if (!t->tokenizer) return -1;
  // Its identity: a hash over what every id stands for.
  uint64_t hash = 0;
  for (int32_t id = 0; id < tokenizer_used(t->tokenizer); id++) {
    size_t n;
    char *bytes = tokenizer_decode(t->tokenizer, &id, 1, &n);
    hash = hash64(bytes, n, hash);
    free(bytes);
  }
  t->state.tokenizer = xasprintf("%016" PRIx64, hash);
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
  int found = checkpoint_find(t->run, below, c, err);
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
  Filling f = {slab_writer_open(e, PARAMS_PIECE, err), engine_slab(e, SPACE_EMA) != NULL};
  if (!f.writer) return -1;
  params_stream(&e->model.params, t->options->dump ? PARAMS_RANDOM : PARAMS_INITIAL, (uint64_t)t->config->run.seed,
                e->model.backend->dtype_bytes[DT_REAL], put_values, &f);
  slab_writer_close(f.writer);
  return 0;
}

// Records the programs and holds what they need against the budget: before the data, which may take long to index.
static int plan_memory(Trainer *t, Error *err) {
  Engine *e = &t->engine;
  const Backend *backend = engine_backend(t->config, err);
  if (!backend) return -1;
  start_mark(&t->start, START_DEVICE);
  if (engine_record(e, t->config, backend, !uses_checkpoint(t->options), err) != 0) return -1;
  start_mark(&t->start, START_PLAN);
  if (engine_check_budget(e, err) == 0 && engine_check_host(e, err) == 0) return 0;
  engine_print_plan(e, stderr);
  return -1;
}

// Restores from an open checkpoint. One that checkpoint_find chose (*c was not named: below says which it was) and that
// proves to be damaged makes way for the one before.
static int restore(Trainer *t, Checkpoint **c, int64_t below, int weights_only, Error *err) {
  int rc;
  while ((rc = state_load(&t->engine, &t->state, *c, weights_only, err)) == STATE_DAMAGED) {
    if (below == INT64_MAX) {
      snprintf(err->hint, sizeof err->hint, OTHER_CHECKPOINT);
      return -1;
    }
    log_warn("checkpoint %s is left out: %s", (*c)->dir, err->text);
    checkpoint_close(*c);
    int found = checkpoint_find(t->run, &below, c, err);
    if (found == 0) error_set(err, "does another program change it?", "the checkpoints in %s are gone", t->run);
    if (found <= 0) return -1;
  }
  return rc;
}

// The weights of a checkpoint, and where training goes on its moments and counters too.
static int load_weights(Trainer *t, Checkpoint **checkpoint, int64_t below, Error *err) {
  const Options *o = t->options;
  double began = time_now();
  if (restore(t, checkpoint, below, o->init || uses_checkpoint(o), err) != 0) return -1;
  if (uses_checkpoint(o))
    t->state.step = (*checkpoint)->step;
  else if (!o->init)
    run_folder_name_changes(t->config, (*checkpoint)->dir);
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
  if (open_tokenizer(t, *checkpoint != NULL, err) != 0) return -1;
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

static Loader *open_loader(Trainer *t, Error *err) {
  const Config *c = t->config;
  const Engine *e = &t->engine;
  LoaderConfig l = {.stream = {.source = t->source,
                               .weight = t->weight,
                               .sources = t->sources,
                               .tokenizer = t->tokenizer,
                               .shape = dims_batch_shape(&e->first.program->dims),
                               .packing = c->kernels.packing,
                               .max_text = config_max_text(c),
                               .max_document = config_max_document(c),
                               .max_caption = c->data.max_caption,
                               .fit = config_image_fit(c),
                               .max_pixels = c->data.max_pixels,
                               .held_out = c->data.held_out,
                               .cfg_drop = c->data.cfg_drop,
                               .caption_to_image = c->data.caption_to_image,
                               .flow_times = config_flow_times(c),
                               .seed = (uint64_t)c->run.seed},
                    .flip = c->data.flip,
                    .ce_weight = c->train.ce_weight,
                    .packs_per_step = c->train.micro_batches,
                    .world = 1,
                    .threads = c->data.threads,
                    .cache_mb = c->data.cache_mb,
                    .max_bad = c->data.max_bad};
  return loader_open(&l, t->state.loader, err);
}

// ---- one step ----

// Allowed (query, key) pairs of a pack.
static double count_pairs(const Batch *b) {
  double pairs = 0;
  for (int i = 0; i < b->dims->n_text + b->dims->n_image; i++) pairs += b->q_end[i] - b->q_start[i];
  return pairs;
}

// What ends or interrupts a row of steps beside an error (-1).
enum {
  DATA_ENDED = -2, // no further step from the loader, which says so between two: the state is that of the steps before
  SPIKES = 1       // too many in a row: the run must go back to a checkpoint
};

// The micro-steps: uploads and replays `micro_batches` packs. Counts go into *s. -1 or DATA_ENDED with *err set.
static int run_micro_steps(Trainer *t, Loader *loader, Profile *profile, StepReport *s, Error *err) {
  const Config *c = t->config;
  Engine *e = &t->engine;
  double slots = 0;
  for (int k = 0; k < c->train.micro_batches; k++) {
    Pack *pack;
    double waited = loader_next(loader, &pack, err);
    if (waited < 0) return DATA_ENDED;
    const BatchDims *d = pack->batch.dims;
    s->data_wait += waited;
    s->tokens += d->n_text + d->n_image - pack->padding;
    const ModelProgram *m = k ? &e->later : &e->first;
    const Extents extents = {d->n_text, d->n_image, d->n_segments - 1, d->n_target, count_pairs(&pack->batch)};
    // What the model needs: padding is work, but no use.
    s->flops += transformer_flops(c, extents.text - pack->padding, extents.image, extents.pairs - pack->padding_pairs);
    slots += e->slots;
    OpTime *times = profile_times(profile, t->state.step);
    engine_run(e, m, pack->block, times);
    int wrong = k == 0 && c->train.verify_every && t->state.step % c->train.verify_every == 0 &&
                verify_micro_step(e, &pack->batch, t->state.step, t->run, err) != 0;
    loader_release(loader, pack);
    if (wrong) return -1;
    if (times && profile_note(profile, m->program, &extents, t->state.step, err) != 0) return -1;
  }
  s->fill = s->tokens / slots;
  return 0;
}

// Waits for the step that the device was given last, unless that was done already, and reports it. -1: it was one too
// many to be skipped; *err is set. Or SPIKES.
static int collect_step(Trainer *t, Report *report, Error *err) {
  const Config *c = t->config;
  const ParamTable *params = &t->engine.model.params;
  StepReport *s = &t->pending;
  UpdateStatus status;
  if (!t->is_pending) return 0;
  t->is_pending = 0;
  s->seconds = engine_results(&t->engine, &status, t->metrics);
  StepLosses l = losses_of(c, t->metrics);
  s->loss = l.total;
  s->flow = l.flow;
  s->ce = l.ce;
  s->ce_caption = l.ce_caption;
  s->ce_text = l.ce_text;
  s->balance = l.balance;
  s->z = l.z;
  s->load_max = l.load_max;
  s->grad_norm = status.norm;
  s->skipped = status.skip;
  s->spike = status.skip && status.bad < 0;
  if (status.skip)
    snprintf(s->bad, sizeof s->bad, "%s",
             status.bad < 0            ? "spike"
             : status.bad >= params->n ? "the loss"
                                       : params->of[status.bad].name);
  report_step(report, s);
  Dims d = dims_from_config(c, 1, 1);
  report_load(report, metrics_load(t->metrics), &d);
  return optimizer_count(c, &t->state.optimizer, &status, err);
}

// At the first step of this run. Without queues the step has been computed too, which is no start.
static void note_start(Trainer *t, double data_wait) {
  StartTimes *s = &t->start;
  if (s->ended) return;
  s->seconds[START_PACK] += data_wait;
  if (t->engine.model.backend->queues) {
    start_mark(s, START_LAUNCH);
    s->seconds[START_LAUNCH] -= data_wait;
  }
  start_end(s);
}

// Gives the device one more step. The one before is collected once the passes of this one are under way, so that the
// device never waits for the host; its update needs to know whether that one was skipped. -1 with *err when a
// replay differed or that step was one too many to be skipped, DATA_ENDED when there was no pack; or SPIKES.
static int train_step(Trainer *t, Loader *loader, Report *report, Profile *profile, Error *err) {
  const Config *c = t->config;
  const Backend *b = t->engine.model.backend;
  StepReport s = {.step = t->state.step, .peak = b->sheet_flops ? b->sheet_flops() : 0};
  int bad = run_micro_steps(t, loader, profile, &s, err);
  if (bad || (bad = collect_step(t, report, err))) return bad;
  StepScalars scalars = optimizer_scalars(c, &t->state.optimizer, t->state.step);
  int ema = optimizer_ema_due(c, t->state.step);
  OpTime *times = profile_times(profile, t->state.step);
  engine_update(&t->engine, &scalars, ema, times);
  note_start(t, s.data_wait);
  const Program *update = ema ? t->engine.update_ema : t->engine.update;
  if (times && profile_note(profile, update, NULL, t->state.step, err) != 0) return -1;
  s.lr = scalars.lr;
  t->pending = s;
  t->is_pending = 1;
  t->state.step++;
  return b->queues ? 0 : collect_step(t, report, err);
}

// ---- the run ----

// What became of the last save. -1 with *err when it failed, unless training may go on all the same. `wait`: for one
// that is still being written; `last`: the run ends here, so that a failure loses work.
static int check_save(Trainer *t, int wait, int last, Error *err) {
  if (saver_result(t->saver, wait, err) == 0) return 0;
  if (t->config->checkpoint.on_error == SAVE_ERROR_CONTINUE && !last) {
    log_warn("%s; going on, as checkpoint.on_error says", err->text);
    return 0;
  }
  snprintf(err->hint, sizeof err->hint,
           "the checkpoints before it are as they were: make room, then --resume goes on from the newest%s",
           last ? "" : "; with checkpoint.on_error=continue a run trains on");
  return -1;
}

// Begins a save, when the one before is on the disk. The run's last save makes up for one that was not written.
static int save(Trainer *t, Loader *loader, int last, Error *err) {
  double began = time_now();
  if (last && saver_result(t->saver, 1, err) != 0)
    log_warn("%s", err->text);
  else if (check_save(t, 1, last, err) != 0)
    return -1;
  free(t->state.loader);
  t->state.loader = loader_state(loader);
  saver_begin(t->saver, &t->state, began);
  return check_save(t, 0, last, err);
}

// The line of the figures comes last: a run that is killed or stopped in its evaluation owes it still.
static int evaluate_weights(Trainer *t, Report *report, int last, Error *err) {
  Evaluation figures;
  trainer_load_items(t);
  if (trainer_measure(t, &figures, err) != 0) return -1;
  if (t->config->eval.samples > 0 && t->n_held_out + t->n_training > 0) {
    char *path = xasprintf("%s/samples/step-%06lld.png", t->run, (long long)t->state.step);
    if (trainer_write_sheet(t, path, err) == 0) {
      log_info("drawings: %s", path);
      report_drawings(report, path, t->state.step);
    } else if (!signals_stop()) {
      log_warn("no drawings: %s", err->text); // a picture is not worth a run
    }
    free(path);
  }
  if (signals_check(err) != 0 || (last && trainer_read_captions(t, 8, err) != 0)) return -1;
  report_evaluation(report, &figures, t->state.step);
  return 0;
}

// The quality figures and drawings of the EMA, where there is one. One that a signal stops is no failure.
static int evaluate_step(Trainer *t, Report *report, int last, Error *err) {
  engine_use_ema(&t->engine, 1);
  int bad = evaluate_weights(t, report, last, err);
  engine_use_ema(&t->engine, 0);
  return signals_stop() ? 0 : bad;
}

// Loads the newest checkpoint again, while the data go on, and cuts the figures of the steps given up. *kept becomes
// its step.
static int go_back(Trainer *t, Report **report, int64_t *kept, Error *err) {
  const Config *c = t->config;
  int64_t given_up = t->state.step, rewinds = t->state.optimizer.rewinds + 1;
  Checkpoint *checkpoint = NULL;
  if (rewinds > c->train.spike_rewinds)
    return error_set(err, "lower train.lr, look at the data, or raise train.spike or train.spike_rewinds",
                     "step %lld: %lld steps in a row had a gradient norm beyond train.spike %g times the median, and "
                     "the run was sent back %lld times already",
                     (long long)given_up, (long long)t->state.optimizer.skipped_in_row, c->train.spike,
                     (long long)rewinds - 1);
  int64_t below = INT64_MAX;
  int found = check_save(t, 1, 0, err) ? -1 : checkpoint_find(t->run, &below, &checkpoint, err);
  if (found < 0) return -1;
  if (!found)
    return error_set(err, "lower train.lr or raise train.spike; checkpoint.every says when the first one is saved",
                     "step %lld: the gradient norm stays beyond train.spike, and there is no checkpoint to go back to",
                     (long long)given_up);
  int bad = restore(t, &checkpoint, below, 0, err);
  if (!bad) {
    log_warn(
        "the gradient norm stays beyond train.spike: back from step %lld to %s, with the data that follow; %lld of "
        "%d times",
        (long long)given_up, checkpoint->dir, (long long)rewinds, c->train.spike_rewinds);
    t->state.optimizer.rewinds = rewinds;
    *kept = t->state.step;
    report_close(*report);
    *report = report_open(t->run, t->state.step, c->train.steps, err);
    bad = !*report;
  }
  checkpoint_close(checkpoint);
  engine_begin_step(&t->engine);
  return bad ? -1 : 0;
}

// Where this run stops: the schedule's last step, or the one of --stop-at.
static int64_t end_step(const Trainer *t) {
  int64_t steps = t->config->train.steps;
  return t->options->stop_at ? min_i64(t->options->stop_at, steps) : steps;
}

// Keeps the steps since the last save when the data ends the run, unless they are being skipped.
static void save_before_error(Trainer *t, Loader *loader, Report *report) {
  Error err;
  if (collect_step(t, report, &err) != 0 || t->state.optimizer.skipped_in_row) return;
  if (save(t, loader, 1, &err) != 0 || check_save(t, 1, 1, &err) != 0)
    log_warn("%s", err.text);
  else
    log_info("saved after step %lld, from which --resume goes on", (long long)t->state.step);
}

// Steps until the end, with what is due on the way.
static int run_steps(Trainer *t, Loader *loader, Report **report, Profile *profile, Error *err) {
  const Config *c = t->config;
  int64_t end = end_step(t), kept = t->state.step; // kept: the steps saved
  start_mark(&t->start, START_RUN);
  engine_begin_step(&t->engine);
  while (t->state.step < end) {
    int bad = train_step(t, loader, *report, profile, err);
    if (bad == DATA_ENDED && t->state.step > kept) save_before_error(t, loader, *report);
    if (bad == SPIKES && go_back(t, report, &kept, err) == 0) continue;
    if (bad || check_save(t, 0, 0, err) != 0) return -1;
    saver_warm(t->saver);
    int64_t done = t->state.step;
    int last = done == c->train.steps, leaving = signals_stop() || done == end;
    int save_due = c->checkpoint.every && done % c->checkpoint.every == 0;
    int evaluation_due = last || (c->eval.every && done % c->eval.every == 0);
    if (!leaving && !save_due && !evaluation_due) continue;
    bad = collect_step(t, *report, err);
    if (bad == SPIKES && !leaving && go_back(t, report, &kept, err) == 0) continue;
    if (bad && !(bad == SPIKES && leaving)) return -1;
    // Saved before it is evaluated: an evaluation takes long enough to be killed in. Not while steps are being skipped:
    // good checkpoints would make way for the state that may be the cause.
    if (leaving || (save_due && !t->state.optimizer.skipped_in_row)) {
      if (save(t, loader, leaving, err) != 0) return -1;
      kept = done;
    }
    if (evaluation_due && !signals_stop() && evaluate_step(t, *report, last, err) != 0) return -1;
    engine_begin_step(&t->engine);
    if (!signals_stop()) continue;
    return kept == done ? 0 : save(t, loader, 1, err); // unsaved: it came in the evaluation
  }
  return 0;
}

int trainer_train(Trainer *t, Error *err) {
  const Config *c = t->config;
  int64_t from = t->state.step;
  int trained = from >= c->train.steps;
  if (trained ? report_evaluated(t->run, from) : t->options->stop_at && t->options->stop_at <= from) {
    log_info("%s is already at step %lld of %d: nothing to do", t->run, (long long)from, c->train.steps);
    return 0;
  }
  signals_catch();
  t->lock = run_folder_lock(t->run, t->options, err);
  if (t->lock < 0) return -1;
  // What may refuse the run comes first: one that is refused leaves the folder as it was.
  Loader *loader = open_loader(t, err);
  Report *report = NULL;
  if (loader && !trained) t->saver = saver_open(&t->engine, t->run, err);
  if (loader && (trained || t->saver) && run_folder_begin(t->run, c, t->options, t->tokenizer, from, err) == 0)
    report = report_open(t->run, from, c->train.steps, err);
  if (!report) {
    loader_close(loader);
    return -1;
  }
  overview_log(&t->engine, t->source, t->sources, t->tokenizer, from, end_step(t));
  Profile *profile = NULL; // from a step on that has nothing left to warm up, if there is one
  if (!trained && (t->options->profile || t->options->trace))
    profile = profile_open(&t->engine, t->options->profile, t->options->trace, min_i64(from + 3, end_step(t) - 1));
  // A trained run that was killed in its last evaluation still owes it.
  int bad = (trained ? evaluate_step(t, report, 1, err) : run_steps(t, loader, &report, profile, err)) != 0;
  if (!bad && !trained) bad = check_save(t, 1, 1, err) != 0;
  report_close(report);
  Error unwritten;
  if (profile_close(profile, bad ? &unwritten : err) != 0) bad = 1;
  if (!bad && signals_stop())
    log_info("stopped by a signal after step %lld; --resume goes on from there", (long long)t->state.step);
  LoaderStats stats = loader_stats(loader);
  if (!bad && stats.packs)
    log_info("run folder: %s (fill %.1f%%, %lld documents, %lld undecodable, %lld captions truncated)", t->run,
             100.0 * (double)stats.slots_used / (double)max_i64(stats.slots, 1), (long long)stats.documents,
             (long long)stats.lost, (long long)stats.stream.truncated);
  loader_close(loader);
  return bad ? 1 : 0;
}

int trainer_dump(Trainer *t, const char *folder, Error *err) {
  int n = t->config->train.micro_batches, bad = 0, have = 0;
  Loader *loader = open_loader(t, err);
  if (!loader) return -1;
  Pack **packs = xcalloc((size_t)n, sizeof *packs);
  const Batch **batches = xcalloc((size_t)n, sizeof *batches);
  for (; have < n && !bad; have++) {
    bad = loader_next(loader, &packs[have], err) < 0;
    if (!bad) batches[have] = &packs[have]->batch;
  }
  if (!bad) bad = dump_step(&t->engine, batches, n, folder, err) != 0;
  for (int i = 0; i < n; i++)
    if (packs[i]) loader_release(loader, packs[i]);
  free(packs);
  free(batches);
  loader_close(loader);
  return bad ? -1 : 0;
}
