// The run's folder before training begins: its lock, its config and tokenizer, and what earlier runs left in it.
#ifndef TESSERA_RUN_FOLDER_H
#define TESSERA_RUN_FOLDER_H

#include "data/tokenizer.h"
#include "model/config/config.h"
#include "trainer/options.h"

// Creates the folder and its samples/ and takes its lock. A folder that already has checkpoints is refused unless the
// run continues one of them (--resume, or --from one of its own). Returns the lock's descriptor, to be closed at the
// end, or -1 with *err set.
int run_folder_lock(const char *run, const Options *o, Error *err);
// Turns the locked folder into that of the run that begins at `step`, once nothing can refuse the run any more: writes
// config.json and tokenizer.bpe, each whole or not at all. With --from, sets checkpoints aside that are not in the past
// of the named one, since this run will make them again (renamed to set-aside-ckpt-N, with a further number where that
// exists). 0, or -1 with *err set.
int run_folder_begin(const char *run, const Config *c, const Options *o, const Tokenizer *tokenizer, int64_t step,
                     Error *err);

// Warns of settings that differ from those of the run that a checkpoint belongs to, whose config.json lies beside it.
void run_folder_name_changes(const Config *c, const char *checkpoint);
#endif
