#include "base/file_in.h"

#include "base/thread.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { THREADS = 8 };

// Chunk i lies in slot i % slots. Threads take chunks in order; one may be read once its slot was given back.
struct FileIn {
  int fd;
  char *path;
  char *memory;
  uint64_t bytes;
  int64_t chunks, slots;
  pthread_t thread[THREADS];
  int threads;
  pthread_mutex_t lock; // of all below
  pthread_cond_t read, freed;
  int64_t taken;                 // chunks that some thread reads or has read
  int64_t given;                 // chunks that the caller was given; the last of them is in use
  int64_t length[FILE_IN_SLOTS]; // of the chunk in the slot; -1: not there yet, -2: it could not be read
  int code;                      // errno of that
  bool stop;
};

size_t file_in_memory(uint64_t file_bytes) {
  uint64_t chunks = (file_bytes + FILE_IN_CHUNK - 1) / FILE_IN_CHUNK;
  return (size_t)(chunks < 1 ? 1 : chunks < FILE_IN_SLOTS ? chunks : FILE_IN_SLOTS) * FILE_IN_CHUNK;
}

// Reads a chunk into its slot: its length, shorter than expected where the file ends; -2 with *code.
static int64_t read_chunk(const FileIn *f, int64_t chunk, int *code) {
  off_t begin = (off_t)(chunk * FILE_IN_CHUNK);
  char *to = f->memory + chunk % f->slots * FILE_IN_CHUNK;
  int64_t want = min_i64(FILE_IN_CHUNK, (int64_t)f->bytes - begin);
  posix_fadvise(f->fd, begin, want, POSIX_FADV_WILLNEED); // all of it at once, so that the disk's queue is deep
  int64_t have = file_read_at(f->fd, begin, to, want);
  if (have >= 0) return have;
  *code = errno;
  return -2;
}

static void *read_ahead(void *argument) {
  FileIn *f = argument;
  pthread_mutex_lock(&f->lock);
  for (;;) {
    // The chunk in use, given - 1, keeps its slot.
    while (!f->stop && f->taken < f->chunks && f->taken >= max_i64(f->given - 1, 0) + f->slots)
      pthread_cond_wait(&f->freed, &f->lock);
    if (f->stop || f->taken == f->chunks) break;
    int64_t chunk = f->taken++;
    f->length[chunk % f->slots] = -1;
    pthread_mutex_unlock(&f->lock);
    int code = 0;
    int64_t length = read_chunk(f, chunk, &code);
    pthread_mutex_lock(&f->lock);
    f->length[chunk % f->slots] = length;
    if (code) f->code = code;
    pthread_cond_signal(&f->read); // only the caller waits for it
  }
  pthread_mutex_unlock(&f->lock);
  return NULL;
}

// As many as are wished and can be had; without any, file_in_next reads.
static void start_threads(FileIn *f) {
  while (f->threads < min_i64(THREADS, f->chunks) && thread_start(&f->thread[f->threads], read_ahead, f) == 0)
    f->threads++;
}

FileIn *file_in_open(const char *path, void *memory, Error *err) {
  FileIn *f = xcalloc(1, sizeof *f);
  *f = (FileIn){.fd = open(path, O_RDONLY | O_CLOEXEC), .path = xstrdup(path), .memory = memory};
  pthread_mutex_init(&f->lock, NULL);
  pthread_cond_init(&f->read, NULL);
  pthread_cond_init(&f->freed, NULL);
  struct stat st = {0};
  int code = f->fd < 0 || fstat(f->fd, &st) != 0 ? errno : S_ISREG(st.st_mode) ? 0 : EINVAL;
  if (code == 0) {
    f->bytes = (uint64_t)st.st_size;
    f->chunks = (st.st_size + FILE_IN_CHUNK - 1) / FILE_IN_CHUNK;
    f->slots = (int64_t)(file_in_memory(f->bytes) / FILE_IN_CHUNK);
    for (int i = 0; i < FILE_IN_SLOTS; i++) f->length[i] = -1;
    start_threads(f);
  }
  if (code == 0) return f;
  error_set(err, "check the path", "cannot open %.300s: %s", path, strerror(code));
  file_in_close(f);
  return NULL;
}

int64_t file_in_next(FileIn *f, const void **data, Error *err) {
  *data = NULL;
  pthread_mutex_lock(&f->lock);
  int64_t chunk = f->given, length = 0;
  if (chunk < f->chunks) {
    f->given++; // frees the slot of the chunk before
    if (!f->threads) f->length[f->taken++ % f->slots] = read_chunk(f, chunk, &f->code);
    pthread_cond_broadcast(&f->freed);
    // Not taken yet, or not read yet; a slot that was just freed still has the length of what lay there.
    while (f->taken <= chunk || f->length[chunk % f->slots] == -1) pthread_cond_wait(&f->read, &f->lock);
    length = f->length[chunk % f->slots];
    *data = f->memory + chunk % f->slots * FILE_IN_CHUNK;
  }
  int code = f->code;
  pthread_mutex_unlock(&f->lock);
  if (length == -2) return error_set(err, NULL, "cannot read %.300s: %s", f->path, strerror(code));
  return length;
}

void file_in_close(FileIn *f) {
  if (!f) return;
  pthread_mutex_lock(&f->lock);
  f->stop = true;
  pthread_cond_broadcast(&f->freed);
  pthread_mutex_unlock(&f->lock);
  for (int i = 0; i < f->threads; i++) pthread_join(f->thread[i], NULL);
  pthread_cond_destroy(&f->freed);
  pthread_cond_destroy(&f->read);
  pthread_mutex_destroy(&f->lock);
  if (f->fd >= 0) close(f->fd);
  free(f->path);
  free(f);
}
