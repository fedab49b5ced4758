// The trainer: data, engine, checkpoints and reports put together. What ./train does once the config is known.
#ifndef TESSERA_TRAINER_H
#define TESSERA_TRAINER_H

#include "model/config/config.h"
#include "trainer/options.h"

typedef struct Trainer Trainer;

// Opens data and tokenizer and builds the engine; nothing is written yet. `run` is the run's folder. Loads the
// checkpoint that --resume, --from, --init, or the use of one (--sample, --describe, --eval) asks for. NULL with *err
// set.
Trainer *trainer_open(const Config *c, const Options *o, const char *run, Error *err);
void trainer_close(Trainer *t);

// Trains to train.steps or --stop-at, with evaluations, grids and checkpoints on the way; on SIGINT, SIGTERM, SIGHUP or
// SIGPIPE finishes the step, or leaves the evaluation, saves and returns: signals_die then ends the process. Locks and
// fills the run's folder. Returns 0; -1 with *err when it could not begin; 1 with *err when a step, a checkpoint or an
// evaluation failed.
int trainer_train(Trainer *t, Error *err);
// --dump: one step. Without a checkpoint every parameter is made random first, since at initialisation almost every
// gradient is zero.
int trainer_dump(Trainer *t, const char *folder, Error *err);
// --eval, --sample, --describe.
int trainer_evaluate(Trainer *t, Error *err);
int trainer_sample(Trainer *t, const char *caption, const char *out, Error *err);
int trainer_describe(Trainer *t, const char *image, Error *err);
#endif
