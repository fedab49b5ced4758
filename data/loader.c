#include "data/loader.h"

#include "base/philox.h"
#include "data/cache.h"
#include "data/loader_state.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

// Images that cannot be decoded: so many are named as they come, so many in the error that ends the run.
enum { BAD_IMAGES_NAMED = 20, BAD_IMAGES_LISTED = 5 };

// Losses' denominators of a step.
typedef struct StepCounts {
  int64_t targets, noised;
} StepCounts;

// One step's packs of this process, formed but not decoded. A step is planned whole, since the scales of its first pack
// count the targets of its last.
typedef struct Plan {
  DraftList *pack; // [per_step]
  DraftList other; // a pack of another process
  StepCounts counts;
} Plan;

struct Loader {
  LoaderConfig config;
  int per_step; // packs of a step that are this process's
  int depth;    // packs decoded ahead of the training step
  ImageCache *cache;
  pthread_t *thread; // [threads]
  int threads;       // started

  // The planner, which the threads take turns at. Local packs count from the first step of this loader.
  pthread_mutex_t plan_lock;
  Stream *stream;
  Plan plan;
  int64_t planned;     // steps planned
  int64_t taken;       // local packs a thread has begun
  int64_t first;       // number of the first step's first pack
  StreamState *before; // [snapshots] the stream before step s, at s % snapshots
  int snapshots;

  // The queue.
  pthread_mutex_t lock;
  pthread_cond_t room, ready;
  Pack **queue;    // [depth] decoded local pack n at n % depth, NULL until it is
  int64_t tickets; // local packs that threads may begin: at most depth more than were handed out
  int64_t given;   // local packs handed out
  Pack **spare;    // released ones
  int spares, spare_capacity;
  LoaderStats stats;
  int64_t named; // images that could not be decoded, ahead of what was handed out
  bool stop, failed;
  bool ended;  // loader_next has said so: what other threads still finish is not handed out any more
  Error error; // why it failed

  BadImages bad; // of the packs handed out; empty without a limit. Of the thread that calls loader_next
};

int sample_patches(const Source *source, const SampleSegment *segment, const ImageFit *fit, int64_t max_pixels,
                   uint8_t *patches, Error *err) {
  uint8_t *bytes;
  size_t n;
  if (source_read_image(source, segment->image, &bytes, &n, err)) return -1;
  Image image = {0}, fitted = {0};
  int rc = image_decode(bytes, n, max_pixels, &image, err);
  free(bytes);
  if (rc) return -1;
  if (image.width != segment->width || image.height != segment->height)
    rc = error_set(err, NULL, "the image has %d x %d pixels, its header said %d x %d", image.width, image.height,
                   segment->width, segment->height);
  if (!rc) rc = image_fit(&image, fit, false, &fitted, err);
  if (!rc) image_to_patches(&fitted, fit->patch, patches);
  image_free(&image);
  image_free(&fitted);
  return rc;
}

// Ends the loader: its threads stop, and loader_next returns the first such error after the packs that are ready.
static void loader_fail_locked(Loader *l, const Error *err) {
  if (!l->failed) l->error = *err;
  l->failed = true;
  pthread_cond_broadcast(&l->ready);
  pthread_cond_broadcast(&l->room);
}

static void loader_fail(Loader *l, const Error *err) {
  pthread_mutex_lock(&l->lock);
  loader_fail_locked(l, err);
  pthread_mutex_unlock(&l->lock);
}

// Names an image that cannot be decoded, when it is met for the first time.
static void loader_name_bad(Loader *l, ImageId id, const Error *why) {
  pthread_mutex_lock(&l->lock);
  int64_t named = ++l->named;
  pthread_mutex_unlock(&l->lock);
  if (named > BAD_IMAGES_NAMED) return;
  char *name = source_image_name(l->config.stream.source[id.source], id.image);
  log_warn("%s cannot be decoded and is passed over: %s%s", name, why->text,
           named == BAD_IMAGES_NAMED ? " (further ones are counted only)" : "");
  free(name);
}

// -1 with *err that names the first of the bad images.
static int loader_too_many_bad(const Loader *l, Error *err) {
  char list[600] = "";
  for (int64_t i = 0, at = 0; i < min_i64(l->bad.n, BAD_IMAGES_LISTED); i++) {
    ImageId id = l->bad.of[i];
    char *name = source_image_name(l->config.stream.source[id.source], id.image);
    size_t n = strlen(name), most_shown = 100; // of a long path the end says more
    at += snprintf(list + at, sizeof list - (size_t)at, "%s%s", i ? ", " : "", n > most_shown ? ".." : "");
    at += snprintf(list + at, sizeof list - (size_t)at, "%s", n > most_shown ? name + n - most_shown : name);
    free(name);
  }
  return error_set(err, "mend them or take them out of the data, or raise data.max_bad (0: no limit)",
                   "%lld images cannot be decoded, more than data.max_bad = %d: %s%s", (long long)l->bad.n,
                   l->config.max_bad, list, l->bad.n > BAD_IMAGES_LISTED ? ", .." : "");
}

// Counts the images of a pack that is about to be handed out. Counted here rather than where they are decoded, so that
// neither the state nor the pack that is one too many depends on how far the threads are ahead.
static int loader_count_bad(Loader *l, const Pack *pack, Error *err) {
  int most = l->config.max_bad;
  for (int i = 0; i < pack->n_met && most > 0; i++)
    if (bad_images_note(&l->bad, pack->met[i].id, pack->met[i].bad) && l->bad.n > most)
      return loader_too_many_bad(l, err);
  return 0;
}

// The patches of image `id`: cached, or decoded into `space`. NULL when it cannot be decoded.
static const uint8_t *loader_patches(Loader *l, ImageId id, const SampleSegment *segment, const Part *part,
                                     uint8_t *space) {
  const StreamConfig *c = &l->config.stream;
  const uint8_t *cached = NULL;
  CacheAnswer answer = cache_get(l->cache, id.source, id.image, &cached);
  if (answer == CACHE_FOUND) return cached;
  if (answer == CACHE_BAD) return NULL;
  Error err;
  if (sample_patches(c->source[id.source], segment, &c->fit, c->max_pixels, space, &err)) {
    if (cache_put_bad(l->cache, id.source, id.image)) loader_name_bad(l, id, &err);
    return NULL;
  }
  cache_put(l->cache, id.source, id.image, space, (size_t)part->tokens * (size_t)c->shape.patch);
  return space;
}

// Mirrors an image left to right: from and to [rows * columns, p, p, 3], not overlapping.
static void patches_mirror(const uint8_t *from, int rows, int columns, int p, uint8_t *to) {
  size_t line = (size_t)p * 3, patch = line * (size_t)p;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) {
      const uint8_t *source = from + (size_t)(r * columns + columns - 1 - c) * patch;
      uint8_t *target = to + (size_t)(r * columns + c) * patch;
      for (int y = 0; y < p; y++)
        for (int x = 0; x < p; x++) memcpy(target + y * line + x * 3, source + y * line + (size_t)(p - 1 - x) * 3, 3);
    }
}

// Sets the patches of a document's images, which pack->met lists; *space moves past what was decoded or mirrored. On
// failure it is silent.
static void loader_decode(Loader *l, Draft *draft, uint8_t **space, Pack *pack) {
  Document *d = &draft->document;
  size_t values = (size_t)l->config.stream.shape.patch;
  for (int i = 0; i < d->parts && !d->silent; i++) {
    Part *part = &d->part[i];
    if (part->kind != PART_IMAGE) continue;
    if (part->copy) {
      part->patch = d->part[i - 1].patch;
      continue;
    }
    size_t bytes = (size_t)part->tokens * values;
    const SampleSegment *segment = &draft->sample->segment[part->tag];
    ImageId id = {draft->origin.source, segment->image};
    part->patch = loader_patches(l, id, segment, part, *space);
    d->silent = part->patch == NULL;
    pack->met[pack->n_met++] = (MetImage){id, d->silent};
    if (part->patch == *space) *space += bytes;
    uint32_t stream = STREAM_FLIP | (uint32_t)part->tag << 8;
    if (d->silent || !l->config.flip || !document_chance(l->config.stream.seed, d->draw, stream, 0.5)) continue;
    patches_mirror(part->patch, part->rows, part->columns, l->config.stream.fit.patch, *space);
    part->patch = *space;
    *space += bytes;
  }
  for (int i = 0; i < d->parts && d->silent; i++) d->part[i].patch = NULL;
}

// Forms all packs of the next step and keeps this process's.
static int loader_plan_step(Loader *l, Error *err) {
  const LoaderConfig *c = &l->config;
  stream_save(l->stream, &l->before[l->planned % l->snapshots]);
  l->plan.counts = (StepCounts){0};
  for (int i = 0; i < c->packs_per_step; i++) {
    DraftList *list = i % c->world == c->rank ? &l->plan.pack[i / c->world] : &l->plan.other;
    stream_recycle(l->stream, list);
    if (stream_pack(l->stream, list, err)) return -1;
    for (int j = 0; j < list->count; j++) {
      l->plan.counts.targets += list->draft[j]->size.targets;
      l->plan.counts.noised += list->draft[j]->size.noised;
    }
  }
  stream_recycle(l->stream, &l->plan.other);
  l->planned++;
  return 0;
}

// Takes the next local pack to decode: its documents into *list, whose old ones are given back.
static int loader_take(Loader *l, DraftList *list, StepCounts *counts, int64_t *n, Error *err) {
  pthread_mutex_lock(&l->plan_lock);
  stream_recycle(l->stream, list);
  int rc = l->taken == l->planned * l->per_step ? loader_plan_step(l, err) : 0;
  if (!rc) {
    DraftList *mine = &l->plan.pack[l->taken % l->per_step], empty = *list;
    *list = *mine;
    *mine = empty;
    *counts = l->plan.counts;
    *n = l->taken++;
  }
  pthread_mutex_unlock(&l->plan_lock);
  return rc;
}

static Pack *loader_new_pack(const Loader *l) {
  BatchShape shape = l->config.stream.shape;
  Pack *pack = xcalloc(1, sizeof *pack);
  pack->bytes = batch_bind(&pack->batch, shape, NULL);
  if (posix_memalign(&pack->block, 64, pack->bytes)) panic("out of memory for a pack of %zu bytes", pack->bytes);
  memset(pack->block, 0, pack->bytes); // the gaps between the arrays too
  batch_bind(&pack->batch, shape, pack->block);
  pack->met = xcalloc((size_t)shape.segments, sizeof *pack->met); // an image has a segment
  return pack;
}

static void pack_free(Pack *pack) {
  if (!pack) return;
  free(pack->met);
  free(pack->block);
  free(pack);
}

static int loader_fill(Loader *l, const DraftList *list, StepCounts counts, int64_t n, uint8_t *space,
                       const Document **docs, Pack *pack, Error *err) {
  const LoaderConfig *c = &l->config;
  pack->number = l->first + n / l->per_step * c->packs_per_step + n % l->per_step * c->world + c->rank;
  pack->documents = list->count;
  pack->silent = pack->n_met = pack->padding = 0;
  pack->padding_pairs = 0;
  for (int i = 0; i < list->count; i++) {
    loader_decode(l, list->draft[i], &space, pack);
    docs[i] = &list->draft[i]->document;
    pack->silent += docs[i]->silent;
    pack->padding += docs[i]->padding;
    pack->padding_pairs += (double)document_padding_pairs(docs[i]);
  }
  if (pack_layout(docs, list->count, c->stream.shape, &pack->batch, err)) return -1;
  pack_scale(&pack->batch, c->stream.shape, c->ce_weight, counts.targets, counts.noised, c->packs_per_step,
             c->stream.seed);
  return 0;
}

// Waits until there is room in the queue for another pack. Returns a block for it; NULL when it is time to stop.
static Pack *loader_wait_room(Loader *l) {
  pthread_mutex_lock(&l->lock);
  while (!l->stop && !l->failed && l->tickets - l->given >= l->depth) pthread_cond_wait(&l->room, &l->lock);
  Pack *pack = NULL;
  if (!l->stop && !l->failed) {
    l->tickets++;
    pack = l->spares ? l->spare[--l->spares] : loader_new_pack(l);
  }
  pthread_mutex_unlock(&l->lock);
  return pack;
}

static void *loader_thread(void *argument) {
  Loader *l = argument;
  // Decoding yields to compute. Priorities are per thread on Linux; without the right to change it, it stays.
  setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 5);
  BatchShape shape = l->config.stream.shape;
  // Decoded and mirrored patches; each image takes both at most, and only what is touched takes memory.
  uint8_t *space = xmalloc(2 * (size_t)shape.slots * (size_t)shape.patch);
  const Document **docs = xmalloc((size_t)shape.slots * sizeof *docs);
  DraftList list = {0};
  StepCounts counts;
  Error err;
  int64_t n;
  Pack *pack;
  while ((pack = loader_wait_room(l))) {
    if (loader_take(l, &list, &counts, &n, &err) || loader_fill(l, &list, counts, n, space, docs, pack, &err)) {
      pack_free(pack);
      loader_fail(l, &err);
      break;
    }
    pthread_mutex_lock(&l->lock);
    l->queue[n % l->depth] = pack;
    pthread_cond_signal(&l->ready);
    pthread_mutex_unlock(&l->lock);
  }
  pthread_mutex_lock(&l->plan_lock);
  stream_recycle(l->stream, &list);
  pthread_mutex_unlock(&l->plan_lock);
  draft_list_free(&list);
  free(docs);
  free(space);
  return NULL;
}

// Puts the stream where the state says: at the beginning of a step, or `given` packs into it.
static int loader_restore(Loader *l, const char *text, Error *err) {
  const LoaderConfig *c = &l->config;
  LoaderState state;
  if (loader_state_parse(text, &state, err)) return -1;
  l->bad = state.bad;
  bool same = state.sources == c->stream.sources;
  for (int i = 0; same && i < state.sources; i++) same = state.samples[i] == stream_samples(l->stream, i);
  for (int64_t i = 0; same && i < l->bad.n; i++)
    same = l->bad.of[i].source < state.sources &&
           l->bad.of[i].image < source_images(c->stream.source[l->bad.of[i].source]);
  if (!same)
    return error_set(err, "continue with the sources and the held-out part the run was started with",
                     "the data is not what it was when the state was saved");
  if (stream_restore(l->stream, &state.stream, err)) return -1;
  l->first = state.pack;
  if (state.given == state.packs_per_step) { // a whole step: pass over it, whatever a step is now
    for (int64_t i = 0; i < state.given; i++) {
      if (stream_pack(l->stream, &l->plan.other, err)) return -1;
      stream_recycle(l->stream, &l->plan.other);
    }
    l->first += state.given;
    return 0;
  }
  if (state.given == 0) return 0;
  if (state.packs_per_step != c->packs_per_step || state.given % c->world)
    return error_set(err, "continue with the same micro-batches a step and processes, or from the end of a step",
                     "the data state is %lld packs into a step of %lld; now a step has %d, on %d processes",
                     (long long)state.given, (long long)state.packs_per_step, c->packs_per_step, c->world);
  if (loader_plan_step(l, err)) return -1;
  l->taken = l->tickets = l->given = state.given / c->world;
  return 0;
}

static int loader_check_config(const LoaderConfig *c, Error *err) {
  if (c->world < 1 || c->rank < 0 || c->rank >= c->world || c->packs_per_step < 1 || c->packs_per_step % c->world)
    return error_set(err, "the micro-batches of a step must be a multiple of the processes",
                     "%d packs a step cannot be shared by %d processes", c->packs_per_step, c->world);
  if (c->threads < 1 || c->threads > 1024)
    return error_set(err, "set data.threads to at least 1", "%d loader threads", c->threads);
  if (c->cache_mb < 0) return error_set(err, NULL, "an image cache of %d MB", c->cache_mb);
  if (c->max_bad < 0) return error_set(err, "0 is no limit", "a limit of %d bad images", c->max_bad);
  return 0;
}

static int loader_start_threads(Loader *l, Error *err) {
  // Signals that ask the program to end are the main thread's.
  sigset_t end, old;
  sigemptyset(&end);
  sigaddset(&end, SIGINT);
  sigaddset(&end, SIGTERM);
  sigaddset(&end, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &end, &old);
  int rc = 0;
  while (l->threads < l->config.threads && !rc) {
    rc = pthread_create(&l->thread[l->threads], NULL, loader_thread, l);
    if (!rc) l->threads++;
  }
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (rc)
    return error_set(err, "lower data.threads", "cannot start loader thread %d: %s", l->threads + 1, strerror(rc));
  return 0;
}

Loader *loader_open(const LoaderConfig *config, const char *state, Error *err) {
  if (loader_check_config(config, err)) return NULL;
  Stream *stream = stream_open(&config->stream, err);
  if (!stream) return NULL;
  Loader *l = xcalloc(1, sizeof *l);
  l->config = *config;
  l->stream = stream;
  l->per_step = config->packs_per_step / config->world;
  l->depth = config->threads + 2;
  // Steps between the one being handed out and the one being planned: at most one a queued pack, and these two.
  l->snapshots = l->depth + 2;
  l->before = xcalloc((size_t)l->snapshots, sizeof *l->before);
  l->plan.pack = xcalloc((size_t)l->per_step, sizeof *l->plan.pack);
  l->queue = xcalloc((size_t)l->depth, sizeof(Pack *));
  l->cache = cache_new((size_t)config->cache_mb << 20);
  l->thread = xcalloc((size_t)config->threads, sizeof *l->thread);
  pthread_mutex_init(&l->plan_lock, NULL);
  pthread_mutex_init(&l->lock, NULL);
  pthread_cond_init(&l->room, NULL);
  pthread_cond_init(&l->ready, NULL);
  if (state && loader_restore(l, state, err)) {
    loader_close(l);
    return NULL;
  }
  // Valid before anything is planned too.
  if (l->planned == 0) stream_save(l->stream, &l->before[0]);
  if (loader_start_threads(l, err)) {
    loader_close(l);
    return NULL;
  }
  return l;
}

void loader_close(Loader *l) {
  if (!l) return;
  pthread_mutex_lock(&l->lock);
  l->stop = true;
  pthread_cond_broadcast(&l->room);
  pthread_mutex_unlock(&l->lock);
  for (int i = 0; i < l->threads; i++) pthread_join(l->thread[i], NULL);
  for (int i = 0; i < l->depth; i++) pack_free(l->queue[i]);
  for (int i = 0; i < l->spares; i++) pack_free(l->spare[i]);
  for (int i = 0; i < l->per_step; i++) {
    stream_recycle(l->stream, &l->plan.pack[i]);
    draft_list_free(&l->plan.pack[i]);
  }
  stream_recycle(l->stream, &l->plan.other);
  draft_list_free(&l->plan.other);
  stream_close(l->stream);
  cache_free(l->cache);
  bad_images_free(&l->bad);
  pthread_mutex_destroy(&l->plan_lock);
  pthread_mutex_destroy(&l->lock);
  pthread_cond_destroy(&l->room);
  pthread_cond_destroy(&l->ready);
  free(l->plan.pack);
  free(l->before);
  free(l->queue);
  free(l->spare);
  free(l->thread);
  free(l);
}

double loader_next(Loader *l, Pack **pack, Error *err) {
  double start = time_now();
  pthread_mutex_lock(&l->lock);
  Pack **slot = &l->queue[l->given % l->depth];
  while (!*slot && !l->failed) pthread_cond_wait(&l->ready, &l->lock);
  double waited = time_now() - start;
  Error too_many;
  if (*slot && !l->ended && loader_count_bad(l, *slot, &too_many)) {
    loader_fail_locked(l, &too_many);
    l->error = too_many; // also where a thread has failed further ahead
    l->ended = true;
  }
  if (*slot && !l->ended) {
    *pack = *slot;
    *slot = NULL;
    l->given++;
    const BatchDims *dims = (*pack)->batch.dims;
    l->stats.packs++;
    l->stats.documents += (*pack)->documents;
    l->stats.silent += (*pack)->silent;
    l->stats.slots_used += dims->n_text + dims->n_image - (*pack)->padding;
    l->stats.slots += l->config.stream.shape.slots;
    l->stats.waited += waited;
    pthread_cond_signal(&l->room);
  } else {
    *err = l->error;
    l->ended = true;
    waited = -1;
  }
  pthread_mutex_unlock(&l->lock);
  return waited;
}

void loader_release(Loader *l, Pack *pack) {
  pthread_mutex_lock(&l->lock);
  if (l->spares == l->spare_capacity) {
    l->spare_capacity = l->spare_capacity ? 2 * l->spare_capacity : 8;
    l->spare = xrealloc(l->spare, (size_t)l->spare_capacity * sizeof(Pack *));
  }
  l->spare[l->spares++] = pack;
  pthread_mutex_unlock(&l->lock);
}

char *loader_state(Loader *l) {
  const LoaderConfig *c = &l->config;
  int64_t step = l->given ? (l->given - 1) / l->per_step : 0; // the last step begun
  LoaderState state = {.pack = l->first + step * c->packs_per_step,
                       .given = (l->given - step * l->per_step) * c->world,
                       .packs_per_step = c->packs_per_step,
                       .sources = c->stream.sources,
                       .bad = l->bad};
  for (int i = 0; i < state.sources; i++) state.samples[i] = stream_samples(l->stream, i);
  pthread_mutex_lock(&l->plan_lock);
  state.stream = l->before[step % l->snapshots];
  pthread_mutex_unlock(&l->plan_lock);
  return loader_state_print(&state);
}

LoaderStats loader_stats(Loader *l) {
  pthread_mutex_lock(&l->plan_lock);
  StreamStats stream = stream_stats(l->stream);
  pthread_mutex_unlock(&l->plan_lock);
  pthread_mutex_lock(&l->lock);
  LoaderStats stats = l->stats;
  pthread_mutex_unlock(&l->lock);
  stats.stream = stream;
  return stats;
}
