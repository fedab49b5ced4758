#include "model/checkpoint.h"

#include "base/hash.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define STATE_FILE "state.json"
#define FOLDER_PREFIX "ckpt-"
#define TENSOR_SUFFIX ".safetensors"
#define TEMP_PREFIX ".tmp-ckpt-" // what a killed save leaves behind; the next save removes it
// The first line of state.json, of fixed length; its checksum is over everything after it.
#define STATE_LINE "{\"xxh64\": \"%016" PRIx64 "\",\n"

enum { TEXT_MAX_BYTES = 256 << 20, STATE_LINE_BYTES = 30 };

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

// The step of a folder named ckpt-STEP, -1 for any other name.
static int64_t folder_step(const char *name) {
  size_t prefix = strlen(FOLDER_PREFIX);
  if (strncmp(name, FOLDER_PREFIX, prefix) != 0) return -1;
  name += prefix;
  size_t digits = strspn(name, "0123456789");
  if (digits == 0 || digits > 18 || name[digits] || (digits > 1 && name[0] == '0')) return -1;
  return strtoll(name, NULL, 10);
}

static int compare_falling(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

// Steps of all ckpt-STEP in a run's folder, newest first; their number, -1 when the folder cannot be read.
static int list_steps(const char *run_dir, int64_t **steps) {
  *steps = NULL;
  DIR *d = opendir(run_dir);
  if (!d) return -1;
  int n = 0;
  for (struct dirent *e; (e = readdir(d));) {
    int64_t step = folder_step(e->d_name);
    if (step < 0) continue;
    *steps = xrealloc(*steps, (size_t)(n + 1) * sizeof **steps);
    (*steps)[n++] = step;
  }
  closedir(d);
  if (n > 1) qsort(*steps, (size_t)n, sizeof **steps, compare_falling);
  return n;
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

static char *folder_path(const char *run_dir, int64_t step) {
  return xasprintf("%s/" FOLDER_PREFIX "%" PRId64, run_dir, step);
}

// ---- reading ----

static bool is_plain_name(const char *name) {
  return name[0] && name[0] != '.' && !strchr(name, '/');
}

static bool holds_tensors(const char *name) {
  size_t n = strlen(name), suffix = strlen(TENSOR_SUFFIX);
  return n > suffix && strcmp(name + n - suffix, TENSOR_SUFFIX) == 0;
}

// state.json, its checksum and the types of its members checked.
static cJSON *state_read(const char *dir, Error *err) {
  char *path = xasprintf("%s/" STATE_FILE, dir), line[STATE_LINE_BYTES + 1];
  size_t bytes;
  char *text = file_read(path, TEXT_MAX_BYTES, &bytes, err);
  cJSON *root = NULL;
  if (!text) goto done;
  if (bytes >= STATE_LINE_BYTES)
    snprintf(line, sizeof line, STATE_LINE, hash64(text + STATE_LINE_BYTES, bytes - STATE_LINE_BYTES, 0));
  if (bytes < STATE_LINE_BYTES || memcmp(text, line, STATE_LINE_BYTES) != 0) {
    error_set(err, NULL, "%.300s is damaged: its checksum differs", path);
    goto done;
  }
  root = json_parse(text, bytes, path, JSON_PLAIN, err);
  if (!root) goto done;
  const cJSON *format = cJSON_GetObjectItemCaseSensitive(root, "format");
  if (!cJSON_IsNumber(format) || format->valuedouble != CHECKPOINT_FORMAT ||
      !cJSON_IsNumber(cJSON_GetObjectItemCaseSensitive(root, "step")) ||
      !cJSON_IsObject(cJSON_GetObjectItemCaseSensitive(root, "files")) ||
      !cJSON_IsObject(cJSON_GetObjectItemCaseSensitive(root, "state"))) {
    error_set(err, "was it written by another version?", "%.300s is not a checkpoint's state of format %d", path,
              CHECKPOINT_FORMAT);
    cJSON_Delete(root);
    root = NULL;
  }
done:
  free(text);
  free(path);
  return root;
}

// What state.json says about a file; -1 when it says nothing usable.
static int entry_read(const cJSON *entry, double *bytes, const char **checksum) {
  const cJSON *b = cJSON_GetObjectItemCaseSensitive(entry, "bytes"),
              *h = cJSON_GetObjectItemCaseSensitive(entry, "xxh64");
  if (!is_plain_name(entry->string) || !cJSON_IsNumber(b) || !cJSON_IsString(h)) return -1;
  *bytes = b->valuedouble;
  *checksum = h->valuestring;
  return 0;
}

// Size and checksum of a file as it lies on the disk; *file is left open when it holds tensors.
static int file_checksum(const char *path, SafeFile **file, size_t *bytes, char checksum[17], Error *err) {
  char *text = NULL;
  *file = NULL;
  if (holds_tensors(path))
    *file = safetensors_open(path, err);
  else
    text = file_read(path, TEXT_MAX_BYTES, bytes, err);
  if (!*file && !text) return -1;
  const void *data = *file ? safetensors_bytes(*file, bytes) : text;
  snprintf(checksum, 17, "%016" PRIx64, hash64(data, *bytes, 0));
  free(text);
  return 0;
}

static int entry_open(const char *dir, const cJSON *entry, SafeFile **file, Error *err) {
  double bytes;
  const char *checksum;
  if (entry_read(entry, &bytes, &checksum))
    return error_set(err, NULL, "%.300s/" STATE_FILE ": bad entry for file \"%.60s\"", dir, entry->string);
  char *path = xasprintf("%s/%s", dir, entry->string), found[17];
  size_t found_bytes;
  int rc = file_checksum(path, file, &found_bytes, found, err);
  if (rc == 0 && ((double)found_bytes != bytes || strcmp(found, checksum) != 0)) {
    rc = error_set(err, NULL, "%.300s is damaged: its checksum differs", path);
    safetensors_close(*file);
  }
  free(path);
  return rc;
}

Checkpoint *checkpoint_open(const char *dir, Error *err) {
  cJSON *root = state_read(dir, err);
  if (!root) return NULL;
  const cJSON *files = cJSON_GetObjectItemCaseSensitive(root, "files"), *entry;
  size_t n = (size_t)cJSON_GetArraySize(files);
  Checkpoint *c = xcalloc(1, sizeof *c);
  c->dir = xstrdup(dir);
  c->root = root;
  c->step = (int64_t)cJSON_GetObjectItemCaseSensitive(root, "step")->valuedouble;
  c->state = cJSON_GetObjectItemCaseSensitive(root, "state");
  c->name = xcalloc(n, sizeof *c->name);
  c->file = xcalloc(n, sizeof *c->file);
  cJSON_ArrayForEach(entry, files) {
    if (entry_open(dir, entry, &c->file[c->n_files], err)) {
      checkpoint_close(c);
      return NULL;
    }
    c->name[c->n_files++] = entry->string;
  }
  return c;
}

void checkpoint_close(Checkpoint *c) {
  if (!c) return;
  for (int i = 0; i < c->n_files; i++) safetensors_close(c->file[i]);
  free(c->name);
  free(c->file);
  free(c->dir);
  cJSON_Delete(c->root);
  free(c);
}

const SafeFile *checkpoint_file(const Checkpoint *c, const char *name) {
  for (int i = 0; i < c->n_files; i++)
    if (strcmp(c->name[i], name) == 0) return c->file[i];
  return NULL;
}

int checkpoint_find(const char *run_dir, Checkpoint **out, Error *err) {
  *out = NULL;
  int64_t *steps;
  int n = list_steps(run_dir, &steps);
  if (n < 0 && errno == ENOENT) return 0;
  if (n < 0) return error_set(err, "check its permissions", "cannot read %.300s: %s", run_dir, strerror(errno));
  for (int i = 0; i < n && !*out; i++) {
    char *dir = folder_path(run_dir, steps[i]);
    *out = checkpoint_open(dir, err);
    if (!*out) log_warn("checkpoint %s is left out: %s", dir, err->text);
    free(dir);
  }
  free(steps);
  if (*out) return 1;
  if (n == 0) return 0;
  return error_set(err, "restore one from a backup, or start a new run in another folder",
                   "none of the %d checkpoints in %.300s is valid", n, run_dir);
}

// Whether a checkpoint has a valid state.json and files of the right sizes: all that can be told without reading it.
static bool looks_whole(const char *dir) {
  Error ignored; // the answer is enough
  cJSON *root = state_read(dir, &ignored);
  if (!root) return false;
  bool whole = true;
  const cJSON *entry;
  cJSON_ArrayForEach(entry, cJSON_GetObjectItemCaseSensitive(root, "files")) {
    double bytes;
    const char *checksum;
    struct stat st;
    char *path = xasprintf("%s/%s", dir, entry->string);
    whole &= !entry_read(entry, &bytes, &checksum) && stat(path, &st) == 0 && (double)st.st_size == bytes;
    free(path);
  }
  cJSON_Delete(root);
  return whole;
}

// ---- writing ----

static int write_text(const char *path, const char *head, const char *text, size_t bytes, Error *err) {
  FILE *f = fopen(path, "wb");
  bool bad = !f || fputs(head, f) < 0 || fwrite(text, 1, bytes, f) != bytes || fflush(f) || fsync(fileno(f));
  int code = errno;
  if (f && fclose(f) && !bad) {
    bad = true;
    code = errno;
  }
  return bad ? error_set(err, NULL, "cannot write %.300s: %s", path, strerror(code)) : 0;
}

// What safetensors files say of themselves: at most 1 + n_files pairs, their values malloc'd; their number.
static int build_metadata(const CheckpointFile *files, int n_files, SafePair *pairs) {
  int n = 0;
  pairs[n++] = (SafePair){"format", xstrdup("pt")};
  for (int i = 0; i < n_files; i++) {
    if (holds_tensors(files[i].name)) continue;
    const SafeTensor *t = files[i].tensors;
    pairs[n++] = (SafePair){files[i].name, xasprintf("%.*s", (int)safe_bytes(t), (const char *)t->data)};
  }
  return n;
}

static int write_file(const char *path, const CheckpointFile *file, const SafePair *metadata, int n_metadata,
                      Error *err) {
  if (!holds_tensors(file->name)) return write_text(path, "", file->tensors->data, safe_bytes(file->tensors), err);
  return safetensors_write(path, file->tensors, file->n, metadata, n_metadata, true, err);
}

// Writes the files into `dir` and the text of state.json, without its first line, to `out`.
static int write_files(const char *dir, int64_t step, const CheckpointFile *files, int n_files, const char *state,
                       FILE *out, Error *err) {
  SafePair *metadata = xcalloc((size_t)n_files + 1, sizeof *metadata);
  int n_metadata = build_metadata(files, n_files, metadata), rc = 0;
  fprintf(out, "\"format\": %d, \"step\": %" PRId64 ", \"files\": {", CHECKPOINT_FORMAT, step);
  for (int i = 0; i < n_files && rc == 0; i++) {
    char *path = xasprintf("%s/%s", dir, files[i].name), checksum[17];
    SafeFile *f = NULL;
    size_t bytes;
    rc = write_file(path, &files[i], metadata, n_metadata, err);
    if (rc == 0) rc = file_checksum(path, &f, &bytes, checksum, err);
    safetensors_close(f);
    free(path);
    if (rc) break;
    fputs(i ? ",\n  " : "\n  ", out);
    json_write_string(out, files[i].name);
    fprintf(out, ": {\"bytes\": %zu, \"xxh64\": \"%s\"}", bytes, checksum);
  }
  fprintf(out, "},\n\"state\": %s}\n", state);
  for (int i = 0; i < n_metadata; i++) free((char *)metadata[i].value);
  free(metadata);
  return rc;
}

static int write_folder(const char *dir, int64_t step, const CheckpointFile *files, int n_files, const char *state,
                        Error *err) {
  if (mkdir(dir, 0777) != 0) return error_set(err, NULL, "cannot create %.300s: %s", dir, strerror(errno));
  char *text = NULL, head[STATE_LINE_BYTES + 1];
  size_t bytes;
  FILE *out = open_memstream(&text, &bytes);
  if (!out) panic("out of memory");
  int rc = write_files(dir, step, files, n_files, state, out, err);
  if (fclose(out)) panic("out of memory");
  if (rc == 0) {
    char *path = xasprintf("%s/" STATE_FILE, dir);
    snprintf(head, sizeof head, STATE_LINE, hash64(text, bytes, 0));
    rc = write_text(path, head, text, bytes, err);
    free(path);
  }
  free(text);
  if (rc == 0 && folder_sync(dir))
    rc = error_set(err, NULL, "cannot flush %.300s to the disk: %s", dir, strerror(errno));
  return rc;
}

// Renames `temp` to `dir`. One of that name is exchanged for it in one step where the file system can.
static int move_into_place(const char *temp, const char *dir) {
  if (rename(temp, dir) == 0) return 0;
  if (errno != ENOTEMPTY && errno != EEXIST) return -1;
  if (renameat2(AT_FDCWD, temp, AT_FDCWD, dir, RENAME_EXCHANGE) == 0) {
    folder_remove(temp); // it holds the old one now
    return 0;
  }
  char *aside = xasprintf("%s-old", temp);
  int rc = rename(dir, aside);
  if (rc == 0) {
    rc = rename(temp, dir);
    int code = errno;
    if (rc)
      rename(aside, dir);
    else
      folder_remove(aside);
    errno = code;
  }
  free(aside);
  return rc;
}

// Removes checkpoints older than the keep.keep_last newest ones up to `step`. Damaged ones do not count as kept.
static void prune(const char *run_dir, int64_t step, CheckpointKeep keep) {
  int64_t *steps;
  int n = list_steps(run_dir, &steps), kept = 0;
  for (int i = 0; i < n; i++) {
    if (steps[i] > step) continue;
    char *dir = folder_path(run_dir, steps[i]);
    bool permanent = keep.keep_every > 0 && steps[i] % keep.keep_every == 0;
    if (kept < keep.keep_last)
      kept += looks_whole(dir);
    else if (!permanent && folder_remove(dir))
      log_warn("cannot remove old checkpoint %s: %s", dir, strerror(errno));
    free(dir);
  }
  free(steps);
}

static int check_arguments(const CheckpointFile *files, int n_files, const char *state, Error *err) {
  for (int i = 0; i < n_files; i++) {
    const CheckpointFile *f = &files[i];
    if (!is_plain_name(f->name) || strcmp(f->name, STATE_FILE) == 0)
      return error_set(err, NULL, "\"%.100s\" is no name for a file of a checkpoint", f->name);
    if (!holds_tensors(f->name) && (f->n != 1 || f->tensors->dtype != SAFE_U8))
      return error_set(err, NULL, "\"%.100s\" is the name of a text, which is one tensor of U8", f->name);
  }
  cJSON *parsed = json_parse(state, strlen(state), "state", JSON_PLAIN, err);
  bool object = cJSON_IsObject(parsed), bad = !parsed;
  cJSON_Delete(parsed);
  if (bad) return -1;
  return object ? 0 : error_set(err, NULL, "the state of a checkpoint must be a JSON object");
}

int checkpoint_save(const char *run_dir, int64_t step, const CheckpointFile *files, int n_files, const char *state,
                    CheckpointKeep keep, Error *err) {
  if (check_arguments(files, n_files, state, err)) return -1;
  remove_leftovers(run_dir);
  char *temp = xasprintf("%s/" TEMP_PREFIX "%" PRId64, run_dir, step), *dir = folder_path(run_dir, step);
  int rc = write_folder(temp, step, files, n_files, state, err);
  if (rc == 0 && move_into_place(temp, dir))
    rc = error_set(err, NULL, "cannot rename %.300s to %.300s: %s", temp, dir, strerror(errno));
  if (rc)
    folder_remove(temp);
  else if (folder_sync(run_dir))
    rc = error_set(err, NULL, "cannot flush %.300s to the disk: %s", run_dir, strerror(errno));
  if (rc == 0)
    prune(run_dir, step, keep);
  else
    error_prefix(err, "checkpoint of step %" PRId64 " not saved", step);
  free(temp);
  free(dir);
  return rc;
}

int run_lock(const char *run_dir, Error *err) {
  char *path = xasprintf("%s/lock", run_dir), pid[32] = "";
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) {
    error_set(err, "check its permissions", "cannot open %.300s: %s", path, strerror(errno));
  } else if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    ssize_t n = read(fd, pid, sizeof pid - 1);
    pid[n > 0 ? n : 0] = 0;
    pid[strspn(pid, "0123456789")] = 0;
    error_set(err, "wait for it, or choose another folder with --run-dir", "another run uses %.300s (process %s)",
              run_dir, pid[0] ? pid : "unknown");
    close(fd);
    fd = -1;
  } else {
    int n = snprintf(pid, sizeof pid, "%ld\n", (long)getpid());
    // The number is for the message alone: the lock holds without it.
    if (ftruncate(fd, 0) != 0 || pwrite(fd, pid, (size_t)n, 0) != n)
      log_warn("cannot write %s: %s", path, strerror(errno));
  }
  free(path);
  return fd;
}
