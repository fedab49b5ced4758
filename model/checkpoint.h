// Checkpoints: RUN/ckpt-STEP/{*.safetensors, state.json}. A checkpoint is written into a temporary folder, flushed to
// the disk with its folders, and renamed; it exists whole or not at all. state.json is
//   {"xxh64": "<of the bytes after this line>",
//    "format": 1, "step": STEP, "files": {"model.safetensors": {"bytes": N, "xxh64": "..."}, ...}, "state": {...}}
// so that a flipped bit anywhere is found before anything is loaded. Readers ignore folders without a valid state.json.
#ifndef TESSERA_CHECKPOINT_H
#define TESSERA_CHECKPOINT_H

#include "base/json.h"
#include "model/safetensors.h"

enum { CHECKPOINT_FORMAT = 1 }; // grows when what is written changes its meaning

// One file of a checkpoint to be. A name as in "model.safetensors" holds its tensors; under any other one, as in
// "config.json", a text is written as it is: the U8 bytes of one tensor. Metadata of the safetensors files: "format" is
// "pt", as PyTorch's own tools write it, and every text of the checkpoint stands there under its name, so that weights
// that are copied elsewhere still say what they are.
typedef struct CheckpointFile {
  const char *name;
  const SafeTensor *tensors; // [n]
  int n;
} CheckpointFile;

// Which older checkpoints stay: the `keep_last` (>= 1) newest, and those at multiples of `keep_every` (0 = none).
typedef struct CheckpointKeep {
  int keep_last, keep_every;
} CheckpointKeep;

// Saves run_dir/ckpt-STEP (replacing one of that step) with the trainer's `state` (the text of a JSON object; numbers
// of more than 53 bits belong into strings), then removes old ones. Checkpoints of later steps are left alone. 0, or -1
// with *err set, every older checkpoint whole and nothing half-written left. The caller holds the run's lock.
int checkpoint_save(const char *run_dir, int64_t step, const CheckpointFile *files, int n_files, const char *state,
                    CheckpointKeep keep, Error *err);

// An open, verified checkpoint.
typedef struct Checkpoint {
  char *dir;
  int64_t step;
  const cJSON *state; // what checkpoint_save was given
  int n_files;
  char **name;     // [n_files]
  SafeFile **file; // [n_files] NULL: a text
  cJSON *root;     // owner of state
} Checkpoint;

// Opens one folder, comparing every checksum. NULL with *err set saying what is wrong with it.
Checkpoint *checkpoint_open(const char *dir, Error *err);
void checkpoint_close(Checkpoint *c);
// A file of tensors by name; NULL when it has none of that name.
const SafeFile *checkpoint_file(const Checkpoint *c, const char *name);

// Opens the newest valid checkpoint of a run; each newer one that is damaged is warned about. 1 and *out, 0 when the
// run has none at all, -1 with *err set when it has some and none is valid (or the folder cannot be read).
int checkpoint_find(const char *run_dir, Checkpoint **out, Error *err);

// Takes the run's lock (RUN/lock, gone with the process): a descriptor to close, or -1 with *err set when another
// process has it. The folder must exist.
int run_lock(const char *run_dir, Error *err);
#endif
