// The tokenizer of a run. Weights speak the ids of one tokenizer, so that a run keeps the one it began with, in a file
// beside its checkpoints, whatever data.tokenizer says later.
#ifndef TESSERA_RUN_TOKENIZER_H
#define TESSERA_RUN_TOKENIZER_H

#include "data/source.h"
#include "data/tokenizer.h"
#include "model/config/config.h"

// Opens, or learns, the tokenizer that data.tokenizer names. `checkpoint`: the folder of a checkpoint that is used,
// whose run's tokenizer it is instead, where there is one; NULL: none. NULL with *err set.
Tokenizer *run_tokenizer_open(const Config *c, const char *run, const char *checkpoint, Source *const *source,
                              int sources, Error *err);
#endif
