// The loader: threads that turn the stream of packs (data/stream.h) into packed micro-batches ahead of the training
// step. Which bytes a pack holds does not depend on the number of threads.
//
// Packs are numbered over the whole run: step s takes packs [s K, (s + 1) K), and process r of N those congruent r mod
// N. Every process forms every pack, from texts and image sizes, and decodes the images of its own only. A step begins
// when all its packs are decoded, since the losses are means over what could be.
#ifndef TESSERA_LOADER_H
#define TESSERA_LOADER_H

#include "data/bad_images.h"
#include "data/stream.h"

typedef struct LoaderConfig {
  StreamConfig stream;
  bool flip; // mirror half of the images
  double ce_weight;
  int packs_per_step; // K: micro-batches of a step over all processes; a multiple of `world`
  int rank, world;    // r, N
  int threads;        // at least 1
  int cache_mb;       // resized pixels kept in memory
  int max_bad;        // images of the run that cannot be decoded before loader_next gives up; 0: no limit
  int held;           // packs that the caller keeps at once at most, at least 1
  // Where packs lie: memory aligned to 64 bytes that a device can fetch them from. NULL: there is none left.
  void *(*host_alloc)(size_t bytes);
  void (*host_release)(void *block);
  // Sums n numbers over the processes, each in place: all call it equally often in a step. Of no use to a process
  // alone.
  void (*sum)(void *context, int64_t *value, int n);
  void *sum_context;
} LoaderConfig;

// An image of a pack.
typedef struct MetImage {
  ImageId id;
  bool bad; // it could not be decoded
} MetImage;

// A micro-batch, ready for upload: `bytes` from `block` on are what batch_bind lays out. The scales of its dims count
// the targets and noised tokens of all packs of its step. A document with an image that cannot be decoded is left out
// of all of it, and no other one takes its slots: there is more filler instead.
typedef struct Pack {
  Batch batch;
  void *block;
  size_t bytes;
  int64_t number;       // in the run
  int documents;        // laid out
  int lost;             // left out, since an image of theirs could not be decoded
  int64_t noised;       // noised image tokens
  int padding;          // text rows that pad documents, see Packing
  double padding_pairs; // allowed (query, key) pairs whose query is one of them
  MetImage *met;        // [n_met]
  int n_met;
} Pack;

typedef struct LoaderStats {
  int64_t packs, documents, lost; // handed out, and documents left out of these packs
  int64_t slots_used, slots;      // of the packs handed out; used: without padding
  double waited;                  // seconds loader_next has blocked
  StreamStats stream;             // of the documents looked ahead
} LoaderStats;

typedef struct Loader Loader;

// Packs in memory: a whole step of this process, one more that each thread works at, one, so that decoding goes on when
// a step begins, and those that the caller holds.
static inline int64_t loader_packs(int packs_per_step, int threads, int held) {
  return (int64_t)packs_per_step + threads + 1 + held;
}

// Allocates all packs and starts the threads. `state`: what loader_state returned, to go on exactly there, or NULL for
// the beginning. The sources and the tokenizer must live as long as the loader. NULL with *err set when the
// configuration does not fit together or the state does not belong to it.
Loader *loader_open(const LoaderConfig *config, const char *state, Error *err);
void loader_close(Loader *loader);

// Waits for the next pack of this process, which stays the caller's until loader_release: `held` of them at most.
// Images are decoded into its memory directly. Returns the seconds waited, or -1 with *err set, which happens between
// two steps only: no sample fits into a pack, or with the next step more than max_bad images could not be decoded (*err
// names the first of them), or a long row of images of a source, on all processes at once; or a shard has changed. One
// thread calls it.
double loader_next(Loader *loader, Pack **pack, Error *err);
void loader_release(Loader *loader, Pack *pack);

// The position after the last pack handed out, as a JSON object (malloc'd). In the middle of a step it counts as if all
// processes were equally far. It fits any number of processes and threads and is the same on every process, with the
// images that any of them could not decode: one counts once in a run, and no more when it was mended before the run
// went on.
char *loader_state(Loader *loader);

LoaderStats loader_stats(Loader *loader);
#endif
