#include "trainer/run_tokenizer.h"

#include "data/tokenizer_samples.h"

#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// The file beside a checkpoint, else the one in the run's folder; NULL: there is none. malloc'd.
static char *tokenizer_file(const char *run, const char *checkpoint) {
  char *copy = xstrdup(checkpoint);
  const char *folders[] = {dirname(copy), run};
  char *path = NULL;
  for (int i = 0; i < 2 && !path; i++) {
    path = xasprintf("%s/tokenizer.bpe", folders[i]);
    if (access(path, R_OK) == 0) continue;
    free(path);
    path = NULL;
  }
  free(copy);
  return path;
}

Tokenizer *run_tokenizer_open(const Config *c, const char *run, const char *checkpoint, Source *const *source,
                              int sources, Error *err) {
  char *path = checkpoint ? tokenizer_file(run, checkpoint) : NULL;
  Tokenizer *t = NULL;
  if (path)
    t = tokenizer_load(path, c->model.vocab, err);
  else if (strcmp(c->data.tokenizer, "bytes") == 0)
    t = tokenizer_load(NULL, c->model.vocab, err);
  else if (strcmp(c->data.tokenizer, "train") != 0)
    t = tokenizer_load(c->data.tokenizer, c->model.vocab, err);
  else if (sources)
    t = tokenizer_train_samples(source, sources, c->data.held_out, c->model.vocab, err);
  else
    error_set(err, "train the run first", "%s has no tokenizer.bpe", run);
  free(path);
  return t;
}
