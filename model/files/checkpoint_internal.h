// What reading and writing checkpoints share: the names in a run's folder.
#ifndef TESSERA_CHECKPOINT_INTERNAL_H
#define TESSERA_CHECKPOINT_INTERNAL_H

#include "model/files/checkpoint.h"

#include <inttypes.h>

#define STATE_FILE "state.json"
#define FOLDER_PREFIX "ckpt-"
// The first line of state.json, of fixed length; its checksum is over everything after it.
#define STATE_LINE "{\"xxh64\": \"%016" PRIx64 "\",\n"

enum { STATE_LINE_BYTES = 30 };

// RUN/ckpt-STEP, malloc'd.
char *checkpoint_path(const char *run_dir, int64_t step);
// Steps of all ckpt-STEP in a run's folder, newest first; their number, -1 when the folder cannot be read.
int checkpoint_steps(const char *run_dir, int64_t **steps);
// Whether a name is one of a plain file, not hidden, in no folder of its own.
bool checkpoint_plain_name(const char *name);
// Whether a file of this name holds tensors, or is a text.
bool checkpoint_holds_tensors(const char *name);
// Whether a checkpoint has a valid state.json and files of the right sizes: all that can be told without reading it.
bool checkpoint_looks_whole(const char *dir);
#endif
