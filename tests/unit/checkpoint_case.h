// A checkpoint of one process, from its beginning to its end.
#ifndef TESSERA_TESTS_CHECKPOINT_CASE_H
#define TESSERA_TESTS_CHECKPOINT_CASE_H

#include "model/files/checkpoint.h"

#include <stdlib.h>

static int checkpoint_save(const char *run_dir, int64_t step, const CheckpointFile *files, int n_files,
                           const char *state, CheckpointKeep keep, Error *err) {
  CheckpointEntry *entry = xcalloc((size_t)n_files + 1, sizeof *entry);
  int n, rc = checkpoint_begin(run_dir, step, err);
  if (rc == 0 && checkpoint_write(run_dir, step, files, n_files, entry, &n, err)) {
    checkpoint_abandon(run_dir, step);
    rc = -1;
  }
  if (rc == 0) rc = checkpoint_commit(run_dir, step, entry, n, state, keep, err);
  free(entry);
  return rc;
}
#endif
