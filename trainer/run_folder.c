#include "trainer/run_folder.h"

#include "model/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Puts a file that was written as PATH.new in the place of PATH: a run killed here still has its old one whole.
static int replace_file(const char *next, const char *path, Error *err) {
  int fd = open(next, O_RDONLY | O_CLOEXEC), bad = fd < 0 || fsync(fd) != 0 || rename(next, path) != 0, code = errno;
  if (fd >= 0) close(fd);
  if (bad) unlink(next);
  return bad ? error_set(err, "check space and permissions", "cannot write %s: %s", path, strerror(code)) : 0;
}

static int save_tokenizer(const Tokenizer *tokenizer, const char *run, Error *err) {
  char *path = xasprintf("%s/tokenizer.bpe", run), *next = xasprintf("%s.new", path);
  int bad = tokenizer_save(tokenizer, next, err) != 0 || replace_file(next, path, err) != 0;
  free(next);
  free(path);
  return bad ? -1 : 0;
}

static int save_config(const Config *c, const char *run, Error *err) {
  char *path = xasprintf("%s/config.json", run), *next = xasprintf("%s.new", path), *text = config_to_json(c);
  FILE *f = fopen(next, "wb");
  int bad = !f || fputs(text, f) < 0, code = errno;
  if (f && fclose(f) != 0 && !bad) {
    bad = 1;
    code = errno;
  }
  if (bad)
    error_set(err, "check space and permissions", "cannot write %s: %s", next, strerror(code));
  else
    bad = replace_file(next, path, err) != 0;
  free(text);
  free(next);
  free(path);
  return bad ? -1 : 0;
}

// Whether a checkpoint's folder lies in this run's.
static bool is_own(const char *run, const char *checkpoint) {
  char *copy = xstrdup(checkpoint), own[PATH_MAX], parent[PATH_MAX];
  bool same = realpath(run, own) && realpath(dirname(copy), parent) && strcmp(own, parent) == 0;
  free(copy);
  return same;
}

// The step of a folder named ckpt-STEP, -1 for any other name.
static int64_t checkpoint_step(const char *name) {
  if (strncmp(name, "ckpt-", 5) != 0 || !name[5] || strspn(name + 5, "0123456789") != strlen(name + 5)) return -1;
  return strtoll(name + 5, NULL, 10);
}

// Counts the checkpoints of steps beyond `step`; with `set_aside` renames them too.
static int64_t later_checkpoints(const char *run, int64_t step, bool set_aside) {
  int64_t n = 0;
  DIR *dir = opendir(run);
  for (struct dirent *entry; dir && (entry = readdir(dir));) {
    if (checkpoint_step(entry->d_name) <= step) continue;
    n++;
    if (!set_aside) continue;
    char *from = xasprintf("%s/%s", run, entry->d_name), *to = xasprintf("%s/set-aside-%s", run, entry->d_name);
    if (rename(from, to) == 0)
      log_info("%s belongs to what is given up now: set aside as %s", from, to);
    else
      log_warn("cannot rename %s: %s; --resume would take it", from, strerror(errno));
    free(from);
    free(to);
  }
  if (dir) closedir(dir);
  return n;
}

int run_folder_prepare(const char *run, const Config *c, const Options *o, const Tokenizer *tokenizer, int64_t step,
                       Error *err) {
  char *samples = xasprintf("%s/samples", run);
  int lock = folder_make(samples, err) == 0 ? run_lock(run, err) : -1;
  free(samples);
  if (lock < 0) return -1;
  bool continues = o->resume || (o->from && is_own(run, o->from)) || o->init;
  if (!continues && later_checkpoints(run, -1, false) > 0) {
    close(lock);
    return error_set(err,
                     "--resume goes on from the newest, --from CKPT from one of them, --run-dir trains elsewhere; or "
                     "remove the folder",
                     "%s already holds checkpoints of a run", run);
  }
  // --resume took the newest valid one: what is newer is damaged and stays for the next save to replace.
  if (o->from || o->init) later_checkpoints(run, o->init ? -1 : step, true);
  if (save_tokenizer(tokenizer, run, err) == 0 && save_config(c, run, err) == 0) return lock;
  close(lock);
  return -1;
}
