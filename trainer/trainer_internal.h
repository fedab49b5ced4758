// What open.c (opening), trainer.c (training) and use.c (uses of a checkpoint) share.
#ifndef TESSERA_TRAINER_INTERNAL_H
#define TESSERA_TRAINER_INTERNAL_H

#include "trainer/evaluate.h"
#include "trainer/feed.h"
#include "trainer/output/report.h"
#include "trainer/saver.h"
#include "trainer/start.h"
#include "trainer/state.h"
#include "trainer/trainer.h"
#include "trainer/watch.h"

struct Trainer {
  const Config *config;
  const Options *options;
  char *run; // the run's folder
  StartTimes start;
  int lock; // its descriptor while training, -1 otherwise
  Engine engine;
  RunState state;
  Saver *saver;       // while training
  Watch watch;        // likewise
  double *metrics;    // [metrics_size] of the step collected last
  StepReport pending; // of the step that the device was given last
  StepSums sums;      // of that step, as far as they are known
  int is_pending;     // it is not collected yet
  int stopped;        // by a signal, to whichever process
  int save_written;   // all processes have written what they had to of a save
  Tokenizer *tokenizer;
  Source *source[CONFIG_SOURCES];
  double weight[CONFIG_SOURCES];
  int sources;
  EvalItem *held_out, *training; // what evaluations measure
  int n_held_out, n_training;
};

// checkpoint_find in the run's folder, with several processes as rank 0 finds.
int trainer_find(const Trainer *t, int64_t *below, Checkpoint **out, Error *err);
// Restores from an open checkpoint. One that checkpoint_find chose (*c was not named: below says which it was) and that
// proves to be damaged makes way for the one before. 0, or -1 with *err set.
int trainer_restore(Trainer *t, Checkpoint **c, int64_t below, int weights_only, Error *err);
// Loads the evaluation's items on first use.
void trainer_load_items(Trainer *t);
// The quality figures with training retrieval, printed.
int trainer_measure(Trainer *t, Evaluation *out, Error *err);
// A sheet of drawings beside the real images, for held-out and training captions.
int trainer_write_sheet(Trainer *t, const char *path, Error *err);
// Logs captions read off held-out images beside the true ones.
int trainer_read_captions(Trainer *t, int n, Error *err);
#endif
