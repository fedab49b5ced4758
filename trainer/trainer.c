#include "trainer/trainer_internal.h"

#include "base/ranks.h"
#include "model/expert_load.h"
#include "model/program/cost.h"
#include "model/program/replay.h"
#include "trainer/dump.h"
#include "trainer/overview.h"
#include "trainer/profile.h"
#include "trainer/run_folder.h"
#include "trainer/signals.h"
#include "trainer/verify.h"

#include <stdlib.h>
#include <unistd.h>

static void sum_counts(void *context, int64_t *value, int n) {
  (void)context;
  ranks_sum_i64(value, n);
}

// What the run's loader is, but for the packs that are held.
static LoaderConfig loader_config(const Trainer *t) {
  const Config *c = t->config;
  const Engine *e = &t->engine;
  return (LoaderConfig){.stream = {.source = t->source,
                                   .weight = t->weight,
                                   .sources = t->sources,
                                   .tokenizer = t->tokenizer,
                                   .shape = dims_batch_shape(&e->first.program->dims),
                                   .packing = c->kernels.packing,
                                   .max_text = config_max_text(c),
                                   .max_document = config_max_document(c),
                                   .max_caption = c->data.max_caption,
                                   .fit = image_fit_of(c),
                                   .max_pixels = c->data.max_pixels,
                                   .held_out = c->data.held_out,
                                   .cfg_drop = c->data.cfg_drop,
                                   .caption_to_image = c->data.caption_to_image,
                                   .flow_times = flow_times_of(c),
                                   .seed = (uint64_t)c->run.seed},
                        .flip = c->data.flip,
                        .ce_weight = c->train.ce_weight,
                        .packs_per_step = c->train.micro_batches * c->processes,
                        .rank = c->processes > 1 ? ranks_rank() : 0,
                        .world = c->processes,
                        .sum = sum_counts,
                        .threads = c->data.threads,
                        .cache_mb = c->data.cache_mb,
                        .max_bad = c->data.max_bad,
                        .host_alloc = e->model.backend->host_alloc,
                        .host_release = e->model.backend->host_release};
}

// ---- one step ----

// What ends or interrupts a row of steps beside an error (-1).
enum {
  DATA_ENDED = -2, // no further step from the loader, which says so between two: the state is that of the steps before
  SPIKES = 1       // too many in a row: the run must go back to a checkpoint
};

// Before a step, no other being under way.
static int time_ops(Trainer *t, const void *pack, const Extents *extents, Error *err) {
  if (!t->start.ended) start_mark(&t->start, START_LAUNCH);
  int bad = watch_pack(&t->watch, &t->engine, pack, extents, t->state.step, err);
  if (!t->start.ended) start_mark(&t->start, START_TIMES);
  return bad;
}

// The micro-steps: uploads and replays `micro_batches` packs. Counts go into *s. -1 or DATA_ENDED with *err set.
static int run_micro_steps(Trainer *t, Feed *feed, Profile *profile, StepSums *s, Error *err) {
  const Config *c = t->config;
  Engine *e = &t->engine;
  for (int k = 0; k < c->train.micro_batches; k++) {
    Pack *pack;
    double waited = feed_next(feed, &pack, err);
    if (waited < 0) return DATA_ENDED;
    const BatchDims *d = pack->batch.dims;
    s->data_wait += waited;
    s->tokens += d->n_text + d->n_image - pack->padding;
    const Extents extents = {d->n_text, d->n_image, d->n_segments - 1, d->n_target, (double)batch_pairs(&pack->batch)};
    // What the model needs: padding is work, but no use.
    s->flops += transformer_flops(c, extents.text - pack->padding, extents.image, extents.pairs - pack->padding_pairs);
    s->slots += e->slots;
    if (k == 0 && watch_due(&t->watch) && time_ops(t, pack->block, &extents, err) != 0) return -1;
    const ModelProgram *m = engine_micro_step(e, k);
    OpTime *times = profile_times(profile, m->program, t->state.step);
    engine_run(e, m, pack->block, times);
    int wrong = k == 0 && c->train.verify_every && t->state.step % c->train.verify_every == 0 &&
                verify_micro_step(e, &pack->batch, t->state.step, t->run, err) != 0;
    if (wrong) return -1;
    if (times && profile_note(profile, m->program, &extents, t->state.step, err) != 0) return -1;
  }
  return 0;
}

// What the ranks counted of a step, together. The ops have summed their own.
static void sum_over_ranks(StepSums *s) {
  double counted[] = {s->tokens, s->slots, s->flops};
  ranks_sum_f64(counted, 3);
  s->tokens = counted[0];
  s->slots = counted[1];
  s->flops = counted[2];
  s->peak_flops *= ranks_size();
}

// Waits for the step that the device was given last, unless that was done already, and reports it. -1: it was one too
// many to be skipped; *err is set. Or SPIKES.
static int collect_step(Trainer *t, Report *report, Error *err) {
  const Config *c = t->config;
  const ParamTable *params = &t->engine.model.params;
  StepReport *s = &t->pending;
  StepSums *sums = &t->sums;
  UpdateStatus status;
  if (!t->is_pending) return 0;
  t->is_pending = 0;
  sums->seconds = engine_results(&t->engine, &status, t->metrics);
  sums->grad_norm = status.norm;
  sum_over_ranks(sums);
  figures_sum(c, t->metrics, sums);
  figures_of(c, sums, s->figure);
  watch_step(&t->watch, &t->engine, s->step, sums->seconds);
  s->skipped = status.skip;
  s->spike = status.skip && status.bad < 0;
  if (status.skip)
    snprintf(s->bad, sizeof s->bad, "%s",
             status.bad < 0            ? "spike"
             : status.bad >= params->n ? "the loss"
                                       : params->of[status.bad].name);
  Dims d = dims_from_config(c, 1, 1);
  if (report) {
    report_step(report, s);
    report_load(report, metrics_load(t->metrics), &d);
  }
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
static int train_step(Trainer *t, Feed *feed, Report *report, Profile *profile, Error *err) {
  const Config *c = t->config;
  const Backend *b = t->engine.model.backend;
  StepSums s = {.peak_flops = b->sheet_flops ? b->sheet_flops() : 0};
  int bad = watch_due(&t->watch) ? collect_step(t, report, err) : 0;
  if (!bad) bad = run_micro_steps(t, feed, profile, &s, err);
  if (bad || (bad = collect_step(t, report, err))) return bad;
  StepScalars scalars = optimizer_scalars(c, &t->state.optimizer, t->state.step);
  int ema = optimizer_ema_due(c, t->state.step);
  const Program *update = ema ? t->engine.update_ema : t->engine.update;
  OpTime *times = profile_times(profile, update, t->state.step);
  OpTime *watched = times ? NULL : watch_times(&t->watch, &t->engine, update, t->state.step);
  engine_update(&t->engine, &scalars, ema, watched ? watched : times);
  if (watched) watch_update(&t->watch, &t->engine, update);
  note_start(t, s.data_wait);
  if (times && profile_note(profile, update, NULL, t->state.step, err) != 0) return -1;
  s.lr = scalars.lr;
  t->sums = s;
  t->pending = (StepReport){.step = t->state.step};
  t->is_pending = 1;
  t->state.step++;
  return b->queues ? 0 : collect_step(t, report, err);
}

// ---- the run ----

// A warning about what all processes know.
static void warn_once(const char *text, const char *more) {
  if (ranks_rank() == 0) log_warn("%s%s", text, more);
}

// What became of the last save. -1 with *err when it failed, unless training may go on all the same. `wait`: for one
// that is still being written; `last`: the run ends here, so that a failure loses work.
static int check_save(Trainer *t, int wait, int last, Error *err) {
  int others_write = t->saver && saver_has_written(t->saver) && !t->save_written;
  if (!t->saver || (!wait && others_write) || saver_result(t->saver, wait, err) == 0) return 0;
  if (t->config->checkpoint.on_error == SAVE_ERROR_CONTINUE && !last) {
    warn_once(err->text, "; going on, as checkpoint.on_error says");
    return 0;
  }
  snprintf(err->hint, sizeof err->hint,
           "the checkpoints before it are as they were: make room, then --resume goes on from the newest%s",
           last ? "" : "; with checkpoint.on_error=continue a run trains on");
  return -1;
}

// Begins a save, when the one before is on the disk. The run's last save makes up for one that was not written.
static int save(Trainer *t, const Feed *feed, int last, Error *err) {
  engine_flush(&t->engine); // the weights, for who writes them
  double began = time_now();
  if (last && saver_result(t->saver, 1, err) != 0)
    warn_once(err->text, "");
  else if (check_save(t, 1, last, err) != 0)
    return -1;
  free(t->state.loader);
  t->state.loader = loader_state(feed->loader);
  saver_begin(t->saver, &t->state, began);
  t->save_written = 0;
  return 0;
}

// Whether a signal came to one of the processes: all leave after the same step. And whether all have written what they
// had to of a save.
static int group_stops(Trainer *t) {
  int64_t sums[] = {signals_stop() != 0, t->saver && saver_has_written(t->saver)};
  ranks_sum_i64(sums, 2);
  t->save_written = sums[1] == ranks_size();
  return t->stopped = sums[0] != 0;
}

// Draws the sheet. A picture is not worth a run.
static void draw_sheet(Trainer *t, Report *report) {
  Error err;
  char *path = xasprintf("%s/samples/step-%06lld.png", t->run, (long long)t->state.step);
  int bad = trainer_write_sheet(t, path, &err);
  if (report && !bad) {
    log_info("drawings: %s", path);
    report_drawings(report, path, t->state.step);
  } else if (report && !signals_stop()) {
    log_warn("no drawings: %s", err.text);
  }
  free(path);
}

// The line of the figures comes last: a run that is killed or stopped in its evaluation owes it still.
static int evaluate_weights(Trainer *t, Report *report, int last, Error *err) {
  Evaluation figures;
  log_begin_shared();
  trainer_load_items(t);
  log_begin_own();
  if (trainer_measure(t, &figures, err) != 0) return -1;
  if (t->config->eval.samples > 0 && t->n_held_out + t->n_training > 0) draw_sheet(t, report);
  if (!report) return 0;
  if (signals_check(err) != 0 || (last && trainer_read_captions(t, 8, err) != 0)) return -1;
  report_evaluation(report, &figures, t->state.step);
  return 0;
}

// The quality figures and drawings of the EMA, where there is one, by all processes; rank 0 has the report. An
// evaluation that a signal stops is no failure.
static int evaluate_step(Trainer *t, Report *report, int last, Error *err) {
  engine_use_ema(&t->engine, 1);
  int bad = evaluate_weights(t, report, last, err), stops = group_stops(t);
  if (bad && !stops) return -1;
  engine_use_ema(&t->engine, 0);
  return 0;
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
  log_begin_shared();
  int found = check_save(t, 1, 0, err) ? -1 : trainer_find(t, &below, &checkpoint, err);
  if (found < 0) return -1;
  if (!found)
    return error_set(err, "lower train.lr or raise train.spike; checkpoint.every says when the first one is saved",
                     "step %lld: the gradient norm stays beyond train.spike, and there is no checkpoint to go back to",
                     (long long)given_up);
  int bad = trainer_restore(t, &checkpoint, below, 0, err);
  if (!bad) {
    log_warn(
        "the gradient norm stays beyond train.spike: back from step %lld to %s, with the data that follow; %lld of "
        "%d times",
        (long long)given_up, checkpoint->dir, (long long)rewinds, c->train.spike_rewinds);
    t->state.optimizer.rewinds = rewinds;
    *kept = t->state.step;
    if (*report) {
      report_close(*report);
      *report = report_open(t->run, t->state.step, c->train.steps, err);
      bad = !*report;
    }
  }
  checkpoint_close(checkpoint);
  log_begin_own();
  engine_begin_step(&t->engine);
  return bad ? -1 : 0;
}

// Where this run stops: the schedule's last step, or the one of --stop-at.
static int64_t end_step(const Trainer *t) {
  int64_t steps = t->config->train.steps;
  return t->options->stop_at ? min_i64(t->options->stop_at, steps) : steps;
}

// Keeps the steps since the last save when the data ends the run, unless they are being skipped. The data of one
// process end the others where they are.
static void save_before_error(Trainer *t, const Feed *feed, Report *report) {
  Error err;
  if (ranks_size() > 1 || collect_step(t, report, &err) != 0 || t->state.optimizer.skipped_in_row) return;
  if (save(t, feed, 1, &err) != 0 || check_save(t, 1, 1, &err) != 0)
    log_warn("%s", err.text);
  else
    log_info("saved after step %lld, from which --resume goes on", (long long)t->state.step);
}

// Steps until the end, with what is due on the way.
static int run_steps(Trainer *t, Feed *feed, Report **report, Profile *profile, Error *err) {
  const Config *c = t->config;
  int64_t end = end_step(t), kept = t->state.step; // kept: the steps saved
  start_mark(&t->start, START_RUN);
  engine_begin_step(&t->engine);
  while (t->state.step < end) {
    int bad = train_step(t, feed, *report, profile, err);
    if (bad == DATA_ENDED && t->state.step > kept) save_before_error(t, feed, *report);
    if (bad == SPIKES && go_back(t, report, &kept, err) == 0) continue;
    if (bad || check_save(t, 0, 0, err) != 0) return -1;
    if (t->saver) saver_warm(t->saver);
    int64_t done = t->state.step;
    int last = done == c->train.steps, leaving = group_stops(t) || done == end;
    int save_due = c->checkpoint.every && done % c->checkpoint.every == 0;
    int evaluation_due = last || (c->eval.every && done % c->eval.every == 0);
    if (!leaving && !save_due && !evaluation_due) continue;
    bad = collect_step(t, *report, err);
    if (bad == SPIKES && !leaving && go_back(t, report, &kept, err) == 0) continue;
    if (bad && !(bad == SPIKES && leaving)) return -1;
    // Saves before it evaluates: an evaluation takes long, and the run may be killed in it. Saves nothing while steps
    // are being skipped: good checkpoints would make way for the state that may be the cause.
    if (leaving || (save_due && !t->state.optimizer.skipped_in_row)) {
      if (save(t, feed, leaving, err) != 0) return -1;
      kept = done;
    }
    if (evaluation_due && !t->stopped && evaluate_step(t, *report, last, err) != 0) return -1;
    engine_begin_step(&t->engine);
    if (!t->stopped && !group_stops(t)) continue;
    return kept == done ? 0 : save(t, feed, 1, err); // unsaved: it came in the evaluation
  }
  return 0;
}

// Whether a run that has all its steps, or was told to stop before, has nothing to do; rank 0 looks.
static int nothing_to_do(const Trainer *t) {
  int64_t from = t->state.step;
  int trained = from >= t->config->train.steps;
  int nothing = trained ? report_evaluated(t->run, from) : t->options->stop_at && t->options->stop_at <= from;
  ranks_broadcast(&nothing, sizeof nothing);
  return nothing;
}

// -1 with *err where this process's run folder is not the one that rank 0 has locked: all write into it.
static int share_folder(const Trainer *t, Error *err) {
  enum { LOOKS = 60, PAUSE_US = 250000 }; // a network's file system may show a new folder late
  int64_t leader = getpid(), found = -1;
  ranks_broadcast(&leader, sizeof leader);
  if (ranks_rank() == 0) found = leader;
  char *path = xasprintf("%s/lock", t->run);
  int rc = 0;
  for (int i = 0; i < LOOKS && found != leader; i++) {
    size_t bytes;
    Error ignored;
    char *text = file_read(path, 64, &bytes, &ignored);
    if (text) found = strtoll(text, NULL, 10);
    free(text);
    if (found != leader) usleep(PAUSE_US);
  }
  free(path);
  if (found != leader)
    rc = error_set(err, "all hosts must have the run's folder in a file system that they share",
                   "this process does not see %s as rank 0 does", t->run);
  return ranks_worst(rc, err);
}

// What rank 0 alone has of a run: its folder, the report, which is returned. NULL with *err.
static Report *open_outputs(Trainer *t, Error *err) {
  const Config *c = t->config;
  int64_t from = t->state.step;
  if (run_folder_begin(t->run, c, t->options, t->tokenizer, from, err) != 0) return NULL;
  Report *report = report_open(t->run, from, c->train.steps, err);
  if (report) overview_log(&t->engine, t->source, t->sources, t->tokenizer, from, end_step(t));
  return report;
}

static void log_end(const Trainer *t, Loader *loader) {
  if (t->stopped)
    log_info("stopped by a signal after step %lld; --resume goes on from there", (long long)t->state.step);
  LoaderStats stats = loader_stats(loader);
  int64_t sums[] = {stats.slots_used, stats.slots, stats.documents, stats.lost};
  ranks_sum_i64(sums, 4);
  if (stats.packs)
    log_info("run folder: %s (fill %.1f%%, %lld documents, %lld undecodable, %lld captions truncated)", t->run,
             100.0 * (double)sums[0] / (double)max_i64(sums[1], 1), (long long)sums[2], (long long)sums[3],
             (long long)stats.stream.truncated);
}

int trainer_train(Trainer *t, Error *err) {
  const Config *c = t->config;
  int64_t from = t->state.step;
  int trained = from >= c->train.steps, leads = ranks_rank() == 0;
  if (nothing_to_do(t)) {
    log_info("%s is already at step %lld of %d: nothing to do", t->run, (long long)from, c->train.steps);
    return 0;
  }
  signals_catch();
  if (leads) t->lock = run_folder_lock(t->run, t->options, err);
  if ((leads && t->lock < 0) || share_folder(t, err) != 0) return -1;
  // What may refuse the run comes first: one that is refused leaves the folder as it was.
  Feed feed = {0};
  int open = feed_open(&feed, &t->engine, loader_config(t), t->state.loader, err) == 0 &&
             (trained || (t->saver = saver_open(&t->engine, t->run, err)));
  Report *report = open && leads ? open_outputs(t, err) : NULL;
  if (!open || (leads && !report)) {
    feed_close(&feed);
    return -1;
  }
  Profile *profile = NULL; // from a step on that has nothing left to warm up, if there is one
  if (leads && !trained && (t->options->profile || t->options->trace))
    profile = profile_open(&t->engine, t->options->profile, t->options->trace, min_i64(from + 3, end_step(t) - 1));
  log_begin_own();
  t->watch = watch_open(&t->engine, t->run, from, profile != NULL);
  // A trained run that was killed in its last evaluation still owes it.
  int bad = (trained ? evaluate_step(t, report, 1, err) : run_steps(t, &feed, &report, profile, err)) != 0;
  if (!bad && !trained) bad = check_save(t, 1, 1, err) != 0;
  watch_close(&t->watch);
  report_close(report);
  Error unwritten;
  if (profile_close(profile, bad ? &unwritten : err) != 0) bad = 1;
  if (!bad) {
    ranks_wait(); // for what rank 0 still had to write
    log_end(t, feed.loader);
  }
  feed_close(&feed);
  return bad ? 1 : 0;
}

int trainer_dump(Trainer *t, const char *folder, Error *err) {
  int n = t->config->train.micro_batches, bad = 0, have = 0;
  LoaderConfig config = loader_config(t);
  config.held = n;
  Loader *loader = loader_open(&config, t->state.loader, err);
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
