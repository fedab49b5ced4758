#include "trainer/run_folder.h"

#include "model/config/load.h"
#include "model/files/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int save_tokenizer(const Tokenizer *tokenizer, const char *run, Error *err) {
  char *path = xasprintf("%s/tokenizer.bpe", run), *next = xasprintf("%s.new", path);
  int bad = tokenizer_save(tokenizer, next, err) != 0 || file_put(next, path, err) != 0;
  free(next);
  free(path);
  return bad ? -1 : 0;
}

static int save_config(const Config *c, const char *run, Error *err) {
  char *path = xasprintf("%s/config.json", run), *text = config_to_json(c);
  int bad = file_replace(path, text, strlen(text), err);
  free(text);
  free(path);
  return bad;
}

// Whether a checkpoint's folder lies in this run's.
static bool is_own(const char *run, const char *checkpoint) {
  char *copy = xstrdup(checkpoint), own[PATH_MAX], parent[PATH_MAX];
  bool same = realpath(run, own) && realpath(dirname(copy), parent) && strcmp(own, parent) == 0;
  free(copy);
  return same;
}

// Number of the run's checkpoints, damaged ones too.
static int count_checkpoints(const char *run) {
  int n = 0;
  DIR *dir = opendir(run);
  for (struct dirent *entry; dir && (entry = readdir(dir));) n += checkpoint_step(entry->d_name) >= 0;
  if (dir) closedir(dir);
  return n;
}

// RUN/set-aside-NAME, or with a number behind it where that is taken. malloc'd.
static char *free_name(const char *run, const char *name) {
  char *path = xasprintf("%s/set-aside-%s", run, name);
  for (int i = 2; faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0; i++) {
    free(path);
    path = xasprintf("%s/set-aside-%s-%d", run, name, i);
  }
  return path;
}

static bool same_folder(const char *a, const char *b) {
  struct stat x, y;
  return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// Renames the checkpoints that are not of the past of `given`, one of step `step`: those of later steps, and where it
// was itself set aside or renamed, that of its step. --resume must not take them. -1 with *err where one stays.
static int set_aside_others(const char *run, const char *given, int64_t step, Error *err) {
  DIR *dir = opendir(run);
  int rc = 0;
  for (struct dirent *entry; rc == 0 && dir && (entry = readdir(dir));) {
    if (checkpoint_step(entry->d_name) < step) continue;
    char *from = xasprintf("%s/%s", run, entry->d_name), *to = free_name(run, entry->d_name);
    if (checkpoint_step(entry->d_name) == step && same_folder(from, given))
      ; // the one gone on from
    else if (rename(from, to) == 0)
      log_info("%s belongs to what is given up now: set aside as %s", from, to);
    else
      rc = error_set(err, "remove it, or go back in a copy of the run: --resume would take it",
                     "cannot set %s aside: %s", from, strerror(errno));
    free(from);
    free(to);
  }
  if (dir) closedir(dir);
  return rc;
}

static bool continues_own(const char *run, const Options *o) {
  return o->resume || (o->from && is_own(run, o->from));
}

int run_folder_lock(const char *run, const Options *o, Error *err) {
  char *samples = xasprintf("%s/samples", run);
  int lock = folder_make(samples, err) == 0 ? run_lock(run, err) : -1;
  free(samples);
  if (lock < 0 || continues_own(run, o) || count_checkpoints(run) == 0) return lock;
  close(lock);
  return error_set(err,
                   "--resume goes on from the newest, --from CKPT from one of them, --run-dir trains elsewhere; or "
                   "remove the folder",
                   "%s already holds checkpoints of a run", run);
}

int run_folder_begin(const char *run, const Config *c, const Options *o, const Tokenizer *tokenizer, int64_t step,
                     Error *err) {
  // --resume took the newest valid one: what is newer is damaged and stays for the next save to replace.
  if (o->from && continues_own(run, o) && set_aside_others(run, o->from, step, err) != 0) return -1;
  return save_tokenizer(tokenizer, run, err) == 0 ? save_config(c, run, err) : -1;
}

void run_folder_name_changes(const Config *c, const char *checkpoint) {
  Error err;
  Config *before = xmalloc(sizeof *before);
  char *copy = xstrdup(checkpoint), *run = dirname(copy), *file = xasprintf("%s/config.json", run), *changes = NULL;
  if (config_load(before, file, NULL, 0, &err) != 0)
    log_warn("which settings changed cannot be told: %s", err.text);
  else {
    if (strcmp(before->data.tokenizer, c->data.tokenizer) != 0)
      log_warn("data.tokenizer = %s changes nothing: the run keeps the tokenizer it began with, %s/tokenizer.bpe",
               c->data.tokenizer, run);
    memcpy(before->data.tokenizer, c->data.tokenizer, sizeof before->data.tokenizer);
    changes = config_changes(before, c);
  }
  if (changes) log_warn("not as %s was trained so far: %s", run, changes);
  free(changes);
  free(file);
  free(copy);
  free(before);
}
