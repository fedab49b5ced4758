#include "model/files/checkpoint_internal.h"

#include "base/file_out.h"
#include "base/text_out.h"
#include "base/thread.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TEMP_PREFIX ".tmp-ckpt-" // what a killed save leaves behind; the next save removes it

// ---- folders ----

static int folder_sync(const char *path) {
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return -1;
  int rc = fsync(fd), code = errno;
  close(fd);
  errno = code;
  return rc;
}

// Removes a folder and the files in it; state.json first, so that what a crash leaves is no checkpoint.
static int folder_remove(const char *path) {
  char *state = xasprintf("%s/" STATE_FILE, path);
  unlink(state);
  free(state);
  DIR *d = opendir(path);
  if (!d) return -1;
  for (struct dirent *e; (e = readdir(d));) unlinkat(dirfd(d), e->d_name, 0); // rmdir tells what could not be removed
  closedir(d);
  return rmdir(path);
}

static void remove_leftovers(const char *run_dir) {
  DIR *d = opendir(run_dir);
  for (struct dirent *e; d && (e = readdir(d));) {
    if (strncmp(e->d_name, TEMP_PREFIX, strlen(TEMP_PREFIX)) != 0) continue;
    char *path = xasprintf("%s/%s", run_dir, e->d_name);
    folder_remove(path);
    free(path);
  }
  if (d) closedir(d);
}

// ---- files ----

static int write_text(const char *path, const char *head, const char *text, size_t bytes, Error *err) {
  FileOut f;
  if (file_out_open(&f, path)) return error_set(err, NULL, "cannot create %.300s: %s", path, strerror(errno));
  int rc = file_out_write(&f, head, strlen(head)) || file_out_write(&f, text, bytes) ? -1 : 0, code = errno;
  if (file_out_close(&f, rc == 0) && rc == 0) {
    rc = -1;
    code = errno;
  }
  return rc ? error_set(err, NULL, "cannot write %.300s: %s", path, strerror(code)) : 0;
}

// What safetensors files say of themselves: at most 1 + n_files pairs, their values malloc'd; their number.
static int build_metadata(const CheckpointFile *files, int n_files, SafePair *pairs) {
  int n = 0;
  pairs[n++] = (SafePair){"format", xstrdup("pt")};
  for (int i = 0; i < n_files; i++) {
    if (checkpoint_holds_tensors(files[i].name)) continue;
    const SafeTensor *t = files[i].tensors;
    pairs[n++] = (SafePair){files[i].name, xasprintf("%.*s", (int)safe_bytes(t), (const char *)t->data)};
  }
  return n;
}

// One file and its thread. The first that fails stops the others.
typedef struct FileJob {
  const CheckpointFile *file;
  char *path;
  const SafePair *metadata;
  int n_metadata;
  atomic_bool *stop;
  pthread_t thread;
  bool started; // the thread
  bool failed;  // and it was the first to
  SafeSum sum;
  Error err;
} FileJob;

static int write_file(FileJob *j) {
  const CheckpointFile *f = j->file;
  if (!checkpoint_holds_tensors(f->name)) {
    size_t bytes = safe_bytes(f->tensors);
    j->sum = (SafeSum){bytes, hash64(f->tensors->data, bytes, 0)};
    return write_text(j->path, "", f->tensors->data, bytes, &j->err);
  }
  SafeContent content = {f->tensors, f->n, j->n_metadata, j->metadata, f->source};
  return safetensors_stream(j->path, &content, j->stop, &j->sum, &j->err);
}

static void *run_job(void *argument) {
  FileJob *j = argument;
  if (write_file(j) != 0) j->failed = !atomic_exchange(j->stop, true);
  return NULL;
}

// Writes all files, those of tensors each in a thread of its own where one can be had.
static int run_jobs(FileJob *jobs, int n, Error *err) {
  int rc = 0;
  for (int i = 1; i < n; i++)
    if (checkpoint_holds_tensors(jobs[i].file->name))
      jobs[i].started = thread_start(&jobs[i].thread, run_job, &jobs[i]) == 0;
  for (int i = 0; i < n; i++)
    if (jobs[i].started)
      pthread_join(jobs[i].thread, NULL);
    else
      run_job(&jobs[i]);
  for (int i = 0; i < n; i++) {
    if (!jobs[i].failed) continue;
    *err = jobs[i].err;
    rc = -1;
  }
  return rc;
}

// Writes the files that are this process's into `dir` and says what they are.
static int write_files(const char *dir, const CheckpointFile *files, int n_files, CheckpointEntry *entry, int *n,
                       Error *err) {
  SafePair *metadata = xcalloc((size_t)n_files + 1, sizeof *metadata);
  FileJob *jobs = xcalloc((size_t)n_files + 1, sizeof *jobs);
  atomic_bool stop = false;
  int n_metadata = build_metadata(files, n_files, metadata);
  *n = 0;
  for (int i = 0; i < n_files; i++)
    if (!files[i].elsewhere)
      jobs[(*n)++] = (FileJob){.file = &files[i],
                               .path = xasprintf("%s/%s", dir, files[i].name),
                               .metadata = metadata,
                               .n_metadata = n_metadata,
                               .stop = &stop};
  int rc = run_jobs(jobs, *n, err);
  for (int i = 0; i < *n; i++) {
    snprintf(entry[i].name, sizeof entry[i].name, "%s", jobs[i].file->name);
    entry[i].sum = jobs[i].sum;
    free(jobs[i].path);
  }
  for (int i = 0; i < n_metadata; i++) free((char *)metadata[i].value);
  free(metadata);
  free(jobs);
  return rc;
}

// state.json, which vouches for all that was written, and the folder's names.
static int write_state(const char *dir, int64_t step, const CheckpointEntry *entry, int n, const char *state,
                       Error *err) {
  char head[STATE_LINE_BYTES + 1];
  TextOut out;
  FILE *f = text_begin(&out);
  fprintf(f, "\"format\": %d, \"step\": %" PRId64 ", \"files\": {", CHECKPOINT_FORMAT, step);
  for (int i = 0; i < n; i++) {
    fputs(i ? ",\n  " : "\n  ", f);
    json_write_string(f, entry[i].name);
    fprintf(f, ": {\"bytes\": %" PRIu64 ", \"xxh64\": \"%016" PRIx64 "\"}", entry[i].sum.bytes, entry[i].sum.hash);
  }
  fprintf(f, "},\n\"state\": %s}\n", state);
  char *text = text_end(&out), *path = xasprintf("%s/" STATE_FILE, dir);
  snprintf(head, sizeof head, STATE_LINE, hash64(text, out.bytes, 0));
  int rc = write_text(path, head, text, out.bytes, err);
  free(path);
  free(text);
  if (rc == 0 && folder_sync(dir))
    rc = error_set(err, NULL, "cannot flush %.300s to the disk: %s", dir, strerror(errno));
  return rc;
}

// Renames `temp` to `dir`. One of that name is exchanged for it in one step where the file system can; what was there
// is a leftover then.
static int move_into_place(const char *temp, const char *dir) {
  if (rename(temp, dir) == 0) return 0;
  if (errno != ENOTEMPTY && errno != EEXIST) return -1;
  if (renameat2(AT_FDCWD, temp, AT_FDCWD, dir, RENAME_EXCHANGE) == 0) return 0;
  char *aside = xasprintf("%s-old", temp);
  int rc = rename(dir, aside);
  if (rc == 0 && (rc = rename(temp, dir)) != 0) {
    int code = errno;
    rename(aside, dir);
    errno = code;
  }
  free(aside);
  return rc;
}

// Removes checkpoints older than the keep.keep_last newest ones up to `step`. Damaged ones do not count as kept.
static void prune(const char *run_dir, int64_t step, CheckpointKeep keep) {
  int64_t *steps;
  int n = checkpoint_steps(run_dir, &steps), kept = 0;
  for (int i = 0; i < n; i++) {
    if (steps[i] > step) continue;
    char *dir = checkpoint_path(run_dir, steps[i]);
    bool permanent = keep.keep_every > 0 && steps[i] % keep.keep_every == 0;
    if (kept < keep.keep_last)
      kept += checkpoint_looks_whole(dir);
    else if (!permanent && folder_remove(dir))
      log_warn("cannot remove old checkpoint %s: %s", dir, strerror(errno));
    free(dir);
  }
  free(steps);
}

static int check_files(const CheckpointFile *files, int n_files, Error *err) {
  for (int i = 0; i < n_files; i++) {
    const CheckpointFile *f = &files[i];
    if (!checkpoint_plain_name(f->name) || strcmp(f->name, STATE_FILE) == 0 ||
        strlen(f->name) >= sizeof((CheckpointEntry *)0)->name)
      return error_set(err, NULL, "\"%.100s\" is no name for a file of a checkpoint", f->name);
    if (!checkpoint_holds_tensors(f->name) && (f->n != 1 || f->tensors->dtype != SAFE_U8))
      return error_set(err, NULL, "\"%.100s\" is the name of a text, which is one tensor of U8", f->name);
  }
  return 0;
}

static int check_state(const char *state, Error *err) {
  cJSON *parsed = json_parse(state, strlen(state), "state", JSON_PLAIN, err);
  bool object = cJSON_IsObject(parsed), bad = !parsed;
  cJSON_Delete(parsed);
  if (bad) return -1;
  return object ? 0 : error_set(err, NULL, "the state of a checkpoint must be a JSON object");
}

static char *temp_path(const char *run_dir, int64_t step) {
  return xasprintf("%s/" TEMP_PREFIX "%" PRId64, run_dir, step);
}

// Passes on what one of the parts returns.
static int not_saved(int rc, int64_t step, Error *err) {
  return rc ? error_prefix(err, "checkpoint of step %" PRId64 " not saved", step) : 0;
}

int checkpoint_begin(const char *run_dir, int64_t step, Error *err) {
  remove_leftovers(run_dir);
  char *temp = temp_path(run_dir, step);
  int rc = mkdir(temp, 0777);
  if (rc) error_set(err, NULL, "cannot create %.300s: %s", temp, strerror(errno));
  free(temp);
  return not_saved(rc, step, err);
}

int checkpoint_write(const char *run_dir, int64_t step, const CheckpointFile *files, int n_files,
                     CheckpointEntry *entry, int *n, Error *err) {
  char *temp = temp_path(run_dir, step);
  int rc = check_files(files, n_files, err) ? -1 : write_files(temp, files, n_files, entry, n, err);
  free(temp);
  return not_saved(rc, step, err);
}

int checkpoint_commit(const char *run_dir, int64_t step, const CheckpointEntry *entry, int n, const char *state,
                      CheckpointKeep keep, Error *err) {
  char *temp = temp_path(run_dir, step), *dir = checkpoint_path(run_dir, step);
  int rc = check_state(state, err) ? -1 : write_state(temp, step, entry, n, state, err);
  if (rc == 0 && move_into_place(temp, dir))
    rc = error_set(err, NULL, "cannot rename %.300s to %.300s: %s", temp, dir, strerror(errno));
  if (rc)
    folder_remove(temp);
  else if (folder_sync(run_dir))
    rc = error_set(err, NULL, "cannot flush %.300s to the disk: %s", run_dir, strerror(errno));
  if (rc == 0) { // what this one replaces goes now that no crash can bring it back
    remove_leftovers(run_dir);
    prune(run_dir, step, keep);
  }
  free(temp);
  free(dir);
  return not_saved(rc, step, err);
}

void checkpoint_abandon(const char *run_dir, int64_t step) {
  char *temp = temp_path(run_dir, step);
  folder_remove(temp);
  free(temp);
}
