#include "model/files/checkpoint_internal.h"

#include "base/hash.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define TENSOR_SUFFIX ".safetensors"

enum { TEXT_MAX_BYTES = 256 << 20 };

// ---- names ----

int64_t checkpoint_step(const char *name) {
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

int checkpoint_steps(const char *run_dir, int64_t **steps) {
  *steps = NULL;
  DIR *d = opendir(run_dir);
  if (!d) return -1;
  int n = 0;
  for (struct dirent *e; (e = readdir(d));) {
    int64_t step = checkpoint_step(e->d_name);
    if (step < 0) continue;
    *steps = xrealloc(*steps, (size_t)(n + 1) * sizeof **steps);
    (*steps)[n++] = step;
  }
  closedir(d);
  if (n > 1) qsort(*steps, (size_t)n, sizeof **steps, compare_falling);
  return n;
}

char *checkpoint_path(const char *run_dir, int64_t step) {
  return xasprintf("%s/" FOLDER_PREFIX "%" PRId64, run_dir, step);
}

bool checkpoint_plain_name(const char *name) {
  return name[0] && name[0] != '.' && !strchr(name, '/');
}

bool checkpoint_holds_tensors(const char *name) {
  size_t n = strlen(name), suffix = strlen(TENSOR_SUFFIX);
  return n > suffix && strcmp(name + n - suffix, TENSOR_SUFFIX) == 0;
}

// ---- opening ----

static int damaged(const char *path, Error *err) {
  return error_set(err, NULL, "%.300s is damaged: its checksum differs", path);
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
    damaged(path, err);
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
  if (!checkpoint_plain_name(entry->string) || !cJSON_IsNumber(b) || !cJSON_IsString(h)) return -1;
  *bytes = b->valuedouble;
  *checksum = h->valuestring;
  return 0;
}

// Checks a file as far as can be done without reading its tensors; *file is left open when it holds any.
static int entry_open(const char *dir, const cJSON *entry, SafeFile **file, const char **checksum, Error *err) {
  double bytes;
  *file = NULL;
  if (entry_read(entry, &bytes, checksum))
    return error_set(err, NULL, "%.300s/" STATE_FILE ": bad entry for file \"%.60s\"", dir, entry->string);
  char *path = xasprintf("%s/%s", dir, entry->string), *text = NULL, found[17] = "";
  size_t found_bytes = 0;
  if (checkpoint_holds_tensors(path)) {
    *file = safetensors_open(path, err);
    if (*file) {
      found_bytes = safetensors_size(*file);
      safetensors_unmap_data(*file); // it is read through checkpoint_read
    }
  } else if ((text = file_read(path, TEXT_MAX_BYTES, &found_bytes, err))) {
    snprintf(found, sizeof found, "%016" PRIx64, hash64(text, found_bytes, 0));
  }
  int rc = *file || text ? 0 : -1;
  if (rc == 0 && (double)found_bytes != bytes)
    rc = error_set(err, NULL, "%.300s is damaged: it has %zu bytes, not %.0f", path, found_bytes, bytes);
  else if (text && strcmp(found, *checksum) != 0)
    rc = damaged(path, err);
  if (rc) safetensors_close(*file);
  free(text);
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
  c->checksum = xcalloc(n, sizeof *c->checksum);
  cJSON_ArrayForEach(entry, files) {
    if (entry_open(dir, entry, &c->file[c->n_files], &c->checksum[c->n_files], err)) {
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
  free(c->checksum);
  free(c->dir);
  cJSON_Delete(c->root);
  free(c);
}

// Index of a file of tensors, -1 when there is none of that name.
static int file_index(const Checkpoint *c, const char *name) {
  for (int i = 0; i < c->n_files; i++)
    if (c->file[i] && strcmp(c->name[i], name) == 0) return i;
  return -1;
}

const SafeFile *checkpoint_file(const Checkpoint *c, const char *name) {
  int i = file_index(c, name);
  return i < 0 ? NULL : c->file[i];
}

// Whether the system keeps a checkpoint that does not open from this process: no damage, so that none before it may
// take its place. Then *err says so.
static bool is_withheld(const char *dir, Error *err) {
  DIR *d = opendir(dir);
  int code = d ? 0 : errno;
  char *path = xstrdup(dir);
  for (struct dirent *e; d && code != EACCES && (e = readdir(d));) {
    free(path);
    path = xasprintf("%s/%s", dir, e->d_name);
    code = faccessat(AT_FDCWD, path, R_OK, AT_EACCESS) ? errno : 0;
  }
  if (d) closedir(d);
  if (code == EACCES)
    error_set(err, "train as its owner, or change its permissions; --from CKPT goes on from an older one",
              "cannot read checkpoint %.300s: %s", path, strerror(code));
  free(path);
  return code == EACCES;
}

// Opens the newest of steps[n] below *below. 1, 0 when none opens, -1 with *err set when one may not be read.
static int open_newest(const char *run_dir, const int64_t *steps, int n, int64_t *below, Checkpoint **out, Error *err) {
  for (int i = 0; i < n; i++) {
    if (steps[i] >= *below) continue;
    char *dir = checkpoint_path(run_dir, steps[i]);
    *out = checkpoint_open(dir, err);
    bool withheld = !*out && is_withheld(dir, err);
    if (!*out && !withheld) log_warn("checkpoint %s is left out: %s", dir, err->text);
    free(dir);
    if (withheld) return -1;
    if (!*out) continue;
    *below = steps[i];
    return 1;
  }
  return 0;
}

int checkpoint_find(const char *run_dir, int64_t *below, Checkpoint **out, Error *err) {
  *out = NULL;
  int64_t *steps, newest = -1;
  int n, rc = 0;
  // A run that is being trained removes what was listed here once there is a newer one: then all are listed again.
  while ((n = checkpoint_steps(run_dir, &steps)) > 0 && rc == 0 && steps[0] > newest) {
    newest = steps[0];
    rc = open_newest(run_dir, steps, n, below, out, err);
    free(steps);
    steps = NULL;
  }
  int code = errno;
  free(steps);
  if (rc) return rc;
  if (n < 0 && code != ENOENT)
    return error_set(err, "check its permissions", "cannot read %.300s: %s", run_dir, strerror(code));
  if (n <= 0) return 0;
  return error_set(err, "restore one from a backup, or start a new run in another folder",
                   "none of the %d checkpoints in %.300s is valid", n, run_dir);
}

bool checkpoint_looks_whole(const char *dir) {
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

// ---- reading ----

// Tensors of a file by their place in it, and how far they have been given to the sink.
typedef struct Pieces {
  const SafeFile *file;
  const SafeTensor **order; // [n]
  int next;                 // the tensor that the next byte belongs to
  size_t at;                // of its bytes given so far
} Pieces;

static int compare_place(const void *a, const void *b) {
  const char *x = (*(const SafeTensor *const *)a)->data, *y = (*(const SafeTensor *const *)b)->data;
  return (x > y) - (x < y);
}

static Pieces pieces_begin(const SafeFile *f) {
  Pieces p = {.file = f, .order = xmalloc((size_t)f->n * sizeof *p.order)};
  int n = 0;
  for (int i = 0; i < f->n; i++)
    if (safe_bytes(&f->tensor[i])) p.order[n++] = &f->tensor[i];
  if (n > 1) qsort(p.order, (size_t)n, sizeof *p.order, compare_place);
  return p;
}

// Gives the sink the next `bytes` of the tensors' data, which has no holes (safetensors_open).
static void pieces_give(Pieces *p, const char *data, size_t bytes, CheckpointSink sink, void *context) {
  while (bytes) {
    const SafeTensor *t = p->order[p->next];
    size_t left = safe_bytes(t) - p->at, n = left < bytes ? left : bytes;
    sink(context, (int)(t - p->file->tensor), p->at, n, data);
    p->at += n;
    data += n;
    bytes -= n;
    if (p->at < safe_bytes(t)) continue;
    p->next++;
    p->at = 0;
  }
}

size_t checkpoint_memory(const Checkpoint *c) {
  size_t most = 0;
  for (int i = 0; i < c->n_files; i++) {
    size_t need = c->file[i] ? file_in_memory(safetensors_size(c->file[i])) : 0;
    if (need > most) most = need;
  }
  return most;
}

// Hashes what is read and hands it on; *hash is that of the whole file. One that has grown since it was opened gives
// the sink no more than its tensors' bytes.
static int read_through(FileIn *in, const SafeFile *f, CheckpointSink sink, void *context, uint64_t *hash, Error *err) {
  Pieces pieces = pieces_begin(f);
  Hash64 state = hash64_begin(0);
  uint64_t header = safetensors_header(f), size = safetensors_size(f), at = 0;
  const void *data;
  int64_t n;
  while ((n = file_in_next(in, &data, err)) > 0) {
    hash64_add(&state, data, (size_t)n);
    uint64_t begin = at < header ? header - at : 0, end = (uint64_t)n; // of the tensors' data in this chunk
    if (at + end > size) end = size > at ? size - at : 0;
    if (sink && begin < end) pieces_give(&pieces, (const char *)data + begin, (size_t)(end - begin), sink, context);
    at += (uint64_t)n;
  }
  free(pieces.order);
  *hash = hash64_end(&state);
  return n < 0 ? -1 : 0;
}

int checkpoint_read(const Checkpoint *c, const char *name, void *memory, CheckpointSink sink, void *context,
                    Error *err) {
  int i = file_index(c, name);
  if (i < 0) return error_set(err, NULL, "%.300s has no %s", c->dir, name);
  char *path = xasprintf("%s/%s", c->dir, name), found[17];
  FileIn *in = NULL;
  uint64_t hash;
  int rc = -1;
  if (safetensors_header(c->file[i]) % sizeof(double)) // what is written here is aligned, so chunks split no element
    error_set(err, NULL, "%.300s is damaged: its data is not aligned", path);
  else if ((in = file_in_open(path, memory, err)))
    rc = read_through(in, c->file[i], sink, context, &hash, err);
  file_in_close(in);
  if (rc == 0) {
    snprintf(found, sizeof found, "%016" PRIx64, hash);
    if (strcmp(found, c->checksum[i]) != 0) rc = damaged(path, err);
  }
  free(path);
  return rc;
}

int checkpoint_verify(const Checkpoint *c, Error *err) {
  void *memory = xmalloc(checkpoint_memory(c));
  int rc = 0;
  for (int i = 0; i < c->n_files && rc == 0; i++)
    if (c->file[i]) rc = checkpoint_read(c, c->name[i], memory, NULL, NULL, err);
  free(memory);
  return rc;
}

// ---- the lock ----

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
