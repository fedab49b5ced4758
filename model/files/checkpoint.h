// Checkpoints: RUN/ckpt-STEP/{*.safetensors, state.json}. A checkpoint is written into a temporary folder, flushed to
// the disk with its folders, and renamed; it exists whole or not at all. state.json is
//   {"xxh64": "<of the bytes after this line>",
//    "format": 1, "step": STEP, "files": {"model.safetensors": {"bytes": N, "xxh64": "..."}, ...}, "state": {...}}
// so that a flipped bit anywhere is found before anything is loaded. Readers ignore folders without a valid state.json.
#ifndef TESSERA_CHECKPOINT_H
#define TESSERA_CHECKPOINT_H

#include "base/file_in.h"
#include "base/json.h"
#include "model/files/safetensors.h"

enum { CHECKPOINT_FORMAT = 1 }; // grows when what is written changes its meaning

// One file of a checkpoint to be written. A name that ends in .safetensors holds tensors; any other file, such as
// config.json, is a text: the U8 bytes of one tensor. A safetensors file's metadata has "format": "pt", as PyTorch's
// tools write it, and every text of the checkpoint under its name, so that weights that are copied elsewhere still say
// what they are.
typedef struct CheckpointFile {
  const char *name;
  const SafeTensor *tensors; // [n]
  int n;
  const SafeSource *source; // of tensors without data; NULL: all have theirs
  bool elsewhere;           // another process writes it; a text still goes into the metadata
} CheckpointFile;

// Which older checkpoints stay: the `keep_last` (>= 1) newest, and those at multiples of `keep_every` (0 = none).
typedef struct CheckpointKeep {
  int keep_last, keep_every;
} CheckpointKeep;

// A file as it was written, for state.json.
typedef struct CheckpointEntry {
  char name[64];
  SafeSum sum;
} CheckpointEntry;

// A checkpoint, of one process or of several that write it together: one of them begins, all write their files, and
// once all have, that one commits what all wrote as run_dir/ckpt-STEP (replacing one of that step), or abandons it.
// Each 0, or -1 with *err set, every older checkpoint whole. The caller holds the run's lock; any thread may call
// these.
int checkpoint_begin(const char *run_dir, int64_t step, Error *err);
// Each file by a thread of its own. entry: [n_files] what was written, their number in *n.
int checkpoint_write(const char *run_dir, int64_t step, const CheckpointFile *files, int n_files,
                     CheckpointEntry *entry, int *n, Error *err);
// state: the trainer's, the text of a JSON object; numbers of more than 53 bits belong into strings. Once the
// checkpoint is on the disk for good, its name too, removes old ones; those of later steps are left alone. On an error
// nothing half-written is left.
int checkpoint_commit(const char *run_dir, int64_t step, const CheckpointEntry *entry, int n, const char *state,
                      CheckpointKeep keep, Error *err);
void checkpoint_abandon(const char *run_dir, int64_t step);

// An open checkpoint. What state.json says and the texts are right; the tensors are once they have been read.
typedef struct Checkpoint {
  char *dir;
  int64_t step;
  const cJSON *state; // what checkpoint_commit was given
  int n_files;
  char **name;           // [n_files]
  SafeFile **file;       // [n_files] NULL: a text
  const char **checksum; // [n_files]
  cJSON *root;           // owner of state, names and checksums
} Checkpoint;

// Opens one folder, comparing the checksums of state.json and the texts, and the sizes and headers of the files of
// tensors. NULL with *err set saying what is wrong with it.
Checkpoint *checkpoint_open(const char *dir, Error *err);
void checkpoint_close(Checkpoint *c);
// A file of tensors by name, which tells names and shapes but not their data; NULL when it has none of that name.
const SafeFile *checkpoint_file(const Checkpoint *c, const char *name);

// Takes bytes [at, at + n) of tensor i of the file that is being read, both multiples of its element's size.
typedef void (*CheckpointSink)(void *context, int i, size_t at, size_t n, const void *data);

// Bytes of memory that reading any of the files needs.
size_t checkpoint_memory(const Checkpoint *c);
// Reads a file of tensors once, front to back, at the disk's rate. Every byte of its tensors goes to the sink
// (NULL: none) before the checksum is known: they are right only when 0 is returned. -1 with *err
// naming the damage. `memory` [checkpoint_memory]: see file_in_open.
int checkpoint_read(const Checkpoint *c, const char *name, void *memory, CheckpointSink sink, void *context,
                    Error *err);
// Reads all of them: 0, or -1 with *err naming the first damage.
int checkpoint_verify(const Checkpoint *c, Error *err);

// The step of a folder's name, ckpt-STEP, as every part of the program reads it: no sign, no leading zeros; -1 for any
// other name.
int64_t checkpoint_step(const char *name);

// Opens the newest checkpoint of a run that opens among those of steps below *below (INT64_MAX: all), to which *below
// is then set; each newer one that is damaged is warned about, one that may not be read is an error. 1 and *out, 0 when
// the run has no checkpoints at all, -1 with *err set when it has some and none opens (or the folder cannot be read).
// A caller that finds this one damaged when reading it calls again.
int checkpoint_find(const char *run_dir, int64_t *below, Checkpoint **out, Error *err);

// Takes the run's lock (RUN/lock, gone with the process): a descriptor to close, or -1 with *err set when another
// process has it. The folder must exist.
int run_lock(const char *run_dir, Error *err);
#endif
