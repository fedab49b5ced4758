#include "data/loader.h"

#include "base/philox.h"
#include "base/thread.h"
#include "data/cache.h"
#include "data/loader_state.h"
#include "data/sample_patches.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BAD_IMAGES_NAMED = 20 }; // of the images that cannot be decoded, the first ones are named

// One step's packs of this process, formed but not decoded. A step is formed whole, since a state is that of the
// stream before a step.
typedef struct StepPacks {
  DraftList *pack; // [per_step]
  DraftList other; // a pack of another process
} StepPacks;

// What was decoded of all packs of a step, over all processes; nothing but numbers to be summed.
typedef struct StepCounts {
  int64_t targets, noised; // the losses' denominators
  int64_t lost;            // documents that were left out
  int64_t bad;             // images that could not be decoded
  int64_t decoded[STREAM_SOURCES];
} StepCounts;

// Why an image could not be decoded, kept until its step begins.
typedef struct Reason {
  ImageId id;
  char *text;
} Reason;
enum { REASONS = 256 };

struct Loader {
  LoaderConfig config;
  int per_step; // packs of a step that are this process's
  int depth;    // packs decoded ahead of the training step
  ImageCache *cache;
  pthread_t *thread; // [threads]
  int threads;       // started

  // Forming packs, which the threads take turns at. Local packs count from the first step of this loader.
  pthread_mutex_t form_lock;
  Stream *stream;
  StepPacks step_packs;
  int64_t formed;      // steps formed
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
  Pack **spare;    // [spares] of [depth + held] those that nobody uses
  int spares;
  LoaderStats stats;
  Reason reason[REASONS]; // of the first images that could not be decoded, ahead of what was handed out
  int reasons;
  bool stop;
  int64_t end; // local packs from here on never come, for the reason below
  Error error;

  // Of the thread that calls loader_next.
  StepCounts counts; // of the step that is being handed out
  BadImages bad;     // of the steps begun; empty without a limit
  ImageId named[BAD_IMAGES_NAMED];
  int n_named;
  bool lost_step; // there was a step of which no document could be decoded
};

// Ends the loader: its threads stop, local pack n and those after it never come.
static void loader_fail(Loader *l, int64_t n, const Error *err) {
  pthread_mutex_lock(&l->lock);
  if (n < l->end) {
    l->end = n;
    l->error = *err;
  }
  pthread_cond_broadcast(&l->ready);
  pthread_cond_broadcast(&l->room);
  pthread_mutex_unlock(&l->lock);
}

static bool same_image(ImageId a, ImageId b) {
  return a.source == b.source && a.image == b.image;
}

// Keeps why an image cannot be decoded, when it is met for the first time.
static void loader_keep_reason(Loader *l, ImageId id, const Error *why) {
  pthread_mutex_lock(&l->lock);
  if (l->reasons < REASONS) l->reason[l->reasons++] = (Reason){id, xstrdup(why->text)};
  pthread_mutex_unlock(&l->lock);
}

// Names an image that cannot be decoded, once, on the process that tried; all call it for each such image.
static void loader_name_bad(Loader *l, ImageId id, bool mine) {
  for (int i = 0; i < l->n_named; i++)
    if (same_image(l->named[i], id)) return;
  if (l->n_named == BAD_IMAGES_NAMED) return;
  l->named[l->n_named++] = id;
  if (!mine) return;
  const char *why = NULL;
  pthread_mutex_lock(&l->lock);
  for (int i = 0; i < l->reasons && !why; i++)
    if (same_image(l->reason[i].id, id)) why = l->reason[i].text;
  pthread_mutex_unlock(&l->lock);
  char *name = source_image_name(l->config.stream.source[id.source], id.image);
  log_warn("%s cannot be decoded and is passed over%s%s%s", name, why ? ": " : "", why ? why : "",
           l->n_named == BAD_IMAGES_NAMED ? " (further ones are counted only)" : "");
  free(name);
}

// A pack of the step that is next in the queue. Nobody but the caller's thread takes them out of it.
static const Pack *loader_step_pack(const Loader *l, int i) {
  return l->queue[(l->given + i) % l->depth];
}

static void loader_sum(Loader *l, int64_t *value, int64_t n) {
  if (l->config.world > 1) l->config.sum(l->config.sum_context, value, (int)n);
}

// Counts and names the images of all packs of a step, those of other processes too, in the packs' order: what is
// counted does not depend on the number of processes. Counted here rather than where they are decoded, so that neither
// the state nor the pack that is one too many depends on how far the threads are ahead.
static int loader_count_bad(Loader *l, Error *err) {
  const LoaderConfig *c = &l->config;
  int64_t *count = xcalloc((size_t)c->packs_per_step, sizeof *count), total = 0, at = 0;
  for (int i = 0; i < l->per_step; i++) count[i * c->world + c->rank] = loader_step_pack(l, i)->n_met;
  loader_sum(l, count, c->packs_per_step);
  for (int k = 0; k < c->packs_per_step; k++) total += count[k];
  int64_t(*met)[2] = xcalloc((size_t)total, sizeof *met); // [total] source and whether it is bad, image
  for (int k = 0; k < c->packs_per_step; at += count[k++])
    for (int64_t j = 0; k % c->world == c->rank && j < count[k]; j++) {
      const MetImage *m = &loader_step_pack(l, k / c->world)->met[j];
      met[at + j][0] = 2 * m->id.source + m->bad;
      met[at + j][1] = m->id.image;
    }
  loader_sum(l, met[0], 2 * total);
  int rc = 0;
  for (int k = 0, i = 0; k < c->packs_per_step && !rc; k++)
    for (int64_t j = 0; j < count[k] && !rc; j++, i++) {
      ImageId id = {(int)(met[i][0] / 2), met[i][1]};
      bool bad = met[i][0] % 2;
      if (bad) loader_name_bad(l, id, k % c->world == c->rank);
      rc = bad_images_meet(&l->bad, c->stream.source, id, bad, c->max_bad, err);
    }
  free(met);
  free(count);
  return rc;
}

// Counts what was decoded of the step whose packs are next in the queue.
static int loader_begin_step(Loader *l, Error *err) {
  StepCounts s = {0};
  for (int i = 0; i < l->per_step; i++) {
    const Pack *pack = loader_step_pack(l, i);
    s.targets += pack->batch.dims->n_target;
    s.noised += pack->noised;
    s.lost += pack->lost;
    for (int k = 0; k < pack->n_met; k++) (*(pack->met[k].bad ? &s.bad : &s.decoded[pack->met[k].id.source]))++;
  }
  loader_sum(l, &s.targets, (int64_t)(sizeof s / sizeof s.targets));
  l->counts = s;
  for (int i = 0; i < STREAM_SOURCES && !s.bad && bad_images_calm(&l->bad); i++)
    if (s.decoded[i]) bad_images_decoded(&l->bad, i);
  if ((s.bad || !bad_images_calm(&l->bad)) && loader_count_bad(l, err)) return -1;
  if (s.lost && !s.targets && !s.noised && !l->lost_step) {
    l->lost_step = true;
    if (l->config.rank == 0)
      log_warn("a step learns nothing: no image of its %lld documents can be decoded (further ones go unnamed)",
               (long long)s.lost);
  }
  return 0;
}

// Puts the patches of image `id` to `to`, by way of the cache where they are or fit into it. *bad: it cannot be
// decoded. -1 with *err set when its shard has changed: then no image in it can be trusted.
static int loader_patches(Loader *l, ImageId id, const SamplePart *from, const Part *part, bool mirror, uint8_t *to,
                          bool *bad, Error *err) {
  const StreamConfig *c = &l->config.stream;
  size_t bytes = (size_t)part->tokens * (size_t)c->shape.patch;
  const uint8_t *cached = NULL;
  *bad = false;
  if (cache_get(l->cache, id.source, id.image, &cached) == CACHE_UNKNOWN) {
    uint8_t *kept = cache_reserve(l->cache, bytes);
    int rc = sample_patches(c->source[id.source], from, &c->fit, c->max_pixels, mirror && !kept, kept ? kept : to, err);
    if (rc && kept) cache_return(l->cache, kept, bytes);
    if (rc == SOURCE_CHANGED) return -1;
    *bad = rc != 0;
    if (*bad && cache_put_bad(l->cache, id.source, id.image)) loader_keep_reason(l, id, err);
    if (*bad || !kept) return 0;
    cached = cache_put(l->cache, id.source, id.image, kept, bytes);
  }
  *bad = !cached;
  if (*bad) return 0;
  if (mirror)
    patches_mirror(cached, part->rows, part->columns, c->fit.patch, to);
  else
    memcpy(to, cached, bytes);
  return 0;
}

// Puts the patches of a document's images, which pack->met lists, into the pack, from image row *row on, which moves
// past them. *whole: all could be decoded; else *row stays. -1 with *err set when the data has changed.
static int loader_decode(Loader *l, Draft *draft, Pack *pack, int *row, bool *whole, Error *err) {
  const StreamConfig *c = &l->config.stream;
  Document *d = &draft->document;
  int next = *row;
  *whole = true;
  for (int i = 0; i < d->parts; i++) {
    Part *part = &d->part[i];
    if (part->kind != PART_IMAGE) continue;
    uint8_t *to = pack_patches(&pack->batch, c->shape, next);
    next += part->tokens;
    if (part->copy) {
      memcpy(to, d->part[i - 1].patch, (size_t)part->tokens * (size_t)c->shape.patch);
    } else {
      const SamplePart *from = &draft->sample->part[part->tag];
      ImageId id = {draft->origin.source, from->image};
      uint32_t stream = STREAM_FLIP | (uint32_t)part->tag << 8;
      bool mirror = l->config.flip && document_chance(c->seed, d->draw, stream, 0.5), bad;
      if (loader_patches(l, id, from, part, mirror, to, &bad, err)) return -1;
      pack->met[pack->n_met++] = (MetImage){id, bad};
      *whole = !bad;
      if (bad) return 0;
    }
    part->patch = to;
  }
  *row = next;
  return 0;
}

// Forms all packs of the next step and keeps this process's.
static int loader_form_step(Loader *l, Error *err) {
  const LoaderConfig *c = &l->config;
  stream_save(l->stream, &l->before[l->formed % l->snapshots]);
  for (int i = 0; i < c->packs_per_step; i++) {
    DraftList *list = i % c->world == c->rank ? &l->step_packs.pack[i / c->world] : &l->step_packs.other;
    stream_recycle(l->stream, list);
    if (stream_pack(l->stream, list, err)) return -1;
  }
  stream_recycle(l->stream, &l->step_packs.other);
  l->formed++;
  return 0;
}

// Takes the next local pack to decode: its documents into *list, whose old ones are given back.
static int loader_take(Loader *l, DraftList *list, int64_t *n, Error *err) {
  pthread_mutex_lock(&l->form_lock);
  stream_recycle(l->stream, list);
  *n = l->taken;
  int rc = l->taken == l->formed * l->per_step ? loader_form_step(l, err) : 0;
  if (!rc) {
    DraftList *mine = &l->step_packs.pack[l->taken % l->per_step], empty = *list;
    *list = *mine;
    *mine = empty;
    l->taken++;
  }
  pthread_mutex_unlock(&l->form_lock);
  return rc;
}

static void pack_free(const Loader *l, Pack *pack) {
  if (!pack) return;
  free(pack->met);
  if (pack->block) l->config.host_release(pack->block);
  free(pack);
}

// All packs that there ever are.
static int loader_allocate(Loader *l, Error *err) {
  BatchShape shape = l->config.stream.shape;
  int packs = l->depth + l->config.held;
  l->spare = xcalloc((size_t)packs, sizeof(Pack *));
  while (l->spares < packs) {
    Pack *pack = l->spare[l->spares++] = xcalloc(1, sizeof *pack);
    pack->bytes = batch_bind(&pack->batch, shape, NULL);
    pack->met = xcalloc((size_t)shape.segments, sizeof *pack->met); // an image has a segment
    pack->block = l->config.host_alloc(pack->bytes);
    if (!pack->block)
      return error_set(err, "close what else uses this machine's memory, or lower data.threads",
                       "out of host memory for %d packs of %.3f MB", packs, (double)pack->bytes / 1e6);
    batch_bind(&pack->batch, shape, pack->block);
    uint8_t *end = pack_patches(&pack->batch, shape, shape.slots); // no array has the bytes behind it
    memset(end, 0, (size_t)((uint8_t *)pack->block + pack->bytes - end));
  }
  return 0;
}

// Decodes and lays out a pack. A document with an image that cannot be decoded is left out: what it would have taken is
// filler at the end, so that the pack is as if it had never been there.
static int loader_fill(Loader *l, const DraftList *list, int64_t n, const Document **docs, Pack *pack, Error *err) {
  const LoaderConfig *c = &l->config;
  pack->number = l->first + n / l->per_step * c->packs_per_step + n % l->per_step * c->world + c->rank;
  pack->documents = pack->lost = pack->n_met = pack->padding = 0;
  pack->noised = 0;
  pack->padding_pairs = 0;
  int row = 0;
  for (int i = 0; i < list->count; i++) {
    Draft *draft = list->draft[i];
    bool whole;
    if (loader_decode(l, draft, pack, &row, &whole, err)) return -1;
    pack->lost += !whole;
    if (!whole) continue;
    docs[pack->documents++] = &draft->document;
    pack->noised += draft->size.noised;
    pack->padding += draft->document.padding;
    pack->padding_pairs += (double)document_padding_pairs(&draft->document);
  }
  return pack_layout(docs, pack->documents, c->stream.shape, &pack->batch, err);
}

// Waits until there is room in the queue for another pack. Returns one to fill; NULL when it is time to stop.
static Pack *loader_wait_room(Loader *l) {
  pthread_mutex_lock(&l->lock);
  while (!l->stop && l->end == INT64_MAX && l->tickets - l->given >= l->depth) pthread_cond_wait(&l->room, &l->lock);
  Pack *pack = NULL;
  if (!l->stop && l->end == INT64_MAX) {
    // Those in use are at most depth - 1 that were not handed out, and those held.
    if (!l->spares) panic("more than %d packs of the loader are held at once", l->config.held);
    l->tickets++;
    pack = l->spare[--l->spares];
  }
  pthread_mutex_unlock(&l->lock);
  return pack;
}

static void *loader_thread(void *argument) {
  Loader *l = argument;
  // Decoding yields to compute. Priorities are per thread on Linux; without the right to change it, it stays.
  setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 5);
  const Document **docs = xmalloc((size_t)l->config.stream.shape.slots * sizeof *docs);
  DraftList list = {0};
  Error err;
  int64_t n;
  Pack *pack;
  while ((pack = loader_wait_room(l))) {
    if (loader_take(l, &list, &n, &err) || loader_fill(l, &list, n, docs, pack, &err)) {
      loader_release(l, pack);
      loader_fail(l, n, &err);
      break;
    }
    pthread_mutex_lock(&l->lock);
    l->queue[n % l->depth] = pack;
    pthread_cond_signal(&l->ready);
    pthread_mutex_unlock(&l->lock);
  }
  pthread_mutex_lock(&l->form_lock);
  stream_recycle(l->stream, &list);
  pthread_mutex_unlock(&l->form_lock);
  draft_list_free(&list);
  free(docs);
  return NULL;
}

// Whether a state was saved with this data; -1 with *err saying what is different.
static int loader_check_data(const Loader *l, const LoaderState *state, Error *err) {
  const StreamConfig *c = &l->config.stream;
  const char *hint = "go on with the data.sources, data.held_out and files of the run's start; with other data "
                     "--init CKPT begins a new run from a checkpoint's weights";
  if (state->sources != c->sources)
    return error_set(err, hint, "the data is not what it was when the checkpoint was saved: %d sources then, %d now",
                     state->sources, c->sources);
  for (int i = 0; i < c->sources; i++)
    if (state->samples[i] != stream_samples(l->stream, i))
      return error_set(err, hint,
                       "the data is not what it was when the checkpoint was saved: data.sources[%d] had %lld training "
                       "samples then, it has %lld now",
                       i, (long long)state->samples[i], (long long)stream_samples(l->stream, i));
  for (int64_t i = 0; i < state->bad.n; i++) {
    ImageId id = state->bad.of[i];
    if (id.source >= c->sources || id.image >= source_images(c->source[id.source]))
      return error_set(
          err, hint,
          "the data is not what it was when the checkpoint was saved: data.sources[%d] had an image %lld then",
          id.source, (long long)id.image);
  }
  return 0;
}

// Puts the stream where the state says, at the beginning of a step. *skip: packs of this process that were taken of it.
static int loader_restore(Loader *l, const char *text, int *skip, Error *err) {
  const LoaderConfig *c = &l->config;
  LoaderState state;
  if (loader_state_parse(text, &state, err)) return -1;
  l->bad = state.bad;
  if (loader_check_data(l, &state, err) || stream_restore(l->stream, &state.stream, err)) return -1;
  l->first = state.pack;
  if (state.given == state.packs_per_step) { // a whole step: pass over it, whatever a step is now
    for (int64_t i = 0; i < state.given; i++) {
      if (stream_pack(l->stream, &l->step_packs.other, err)) return -1;
      stream_recycle(l->stream, &l->step_packs.other);
    }
    l->first += state.given;
    return 0;
  }
  if (state.given == 0) return 0;
  if (state.packs_per_step != c->packs_per_step || state.given % c->world)
    return error_set(err, "continue with the same micro-batches a step and processes, or from the end of a step",
                     "the data state is %lld packs into a step of %lld; now a step has %d, on %d processes",
                     (long long)state.given, (long long)state.packs_per_step, c->packs_per_step, c->world);
  *skip = (int)(state.given / c->world);
  return 0;
}

// Takes packs that were taken before: they count in their step's scales.
static int loader_skip(Loader *l, int packs, Error *err) {
  Pack *pack;
  for (int i = 0; i < packs; i++) {
    if (loader_next(l, &pack, err) < 0) return -1;
    loader_release(l, pack);
  }
  l->stats = (LoaderStats){0};
  return 0;
}

static int loader_check_config(const LoaderConfig *c, Error *err) {
  if (c->world < 1 || c->rank < 0 || c->rank >= c->world || c->packs_per_step < 1 || c->packs_per_step % c->world)
    return error_set(err, "the micro-batches of a step must be a multiple of the processes",
                     "%d packs a step cannot be shared by %d processes", c->packs_per_step, c->world);
  if (c->world > 1 && !c->sum) return error_set(err, NULL, "%d processes that cannot sum", c->world);
  if (c->threads < 1 || c->threads > 1024)
    return error_set(err, "set data.threads to at least 1", "%d loader threads", c->threads);
  if (c->held < 1) return error_set(err, NULL, "%d packs held", c->held);
  if (c->cache_mb < 0) return error_set(err, NULL, "an image cache of %d MB", c->cache_mb);
  if (c->max_bad < 0) return error_set(err, "0 is no limit", "a limit of %d bad images", c->max_bad);
  return 0;
}

static int loader_start_threads(Loader *l, Error *err) {
  int rc = 0;
  while (l->threads < l->config.threads && !rc) {
    rc = thread_start(&l->thread[l->threads], loader_thread, l);
    if (!rc) l->threads++;
  }
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
  l->end = INT64_MAX;
  l->per_step = config->packs_per_step / config->world;
  l->depth = (int)loader_packs(l->per_step, config->threads, 0);
  // Steps between the one being handed out and the one being formed: at most one a queued pack, and these two.
  l->snapshots = l->depth + 2;
  l->before = xcalloc((size_t)l->snapshots, sizeof *l->before);
  l->step_packs.pack = xcalloc((size_t)l->per_step, sizeof *l->step_packs.pack);
  l->queue = xcalloc((size_t)l->depth, sizeof(Pack *));
  l->cache = cache_new((size_t)config->cache_mb << 20);
  l->thread = xcalloc((size_t)config->threads, sizeof *l->thread);
  pthread_mutex_init(&l->form_lock, NULL);
  pthread_mutex_init(&l->lock, NULL);
  pthread_cond_init(&l->room, NULL);
  pthread_cond_init(&l->ready, NULL);
  int skip = 0, rc = loader_allocate(l, err);
  if (!rc && state) rc = loader_restore(l, state, &skip, err);
  if (!rc) stream_save(l->stream, &l->before[0]); // valid before anything is formed too
  if (!rc) rc = loader_start_threads(l, err);
  if (!rc) rc = loader_skip(l, skip, err);
  if (!rc) return l;
  loader_close(l);
  return NULL;
}

void loader_close(Loader *l) {
  if (!l) return;
  pthread_mutex_lock(&l->lock);
  l->stop = true;
  pthread_cond_broadcast(&l->room);
  pthread_mutex_unlock(&l->lock);
  for (int i = 0; i < l->threads; i++) pthread_join(l->thread[i], NULL);
  for (int i = 0; i < l->depth; i++) pack_free(l, l->queue[i]);
  for (int i = 0; i < l->spares; i++) pack_free(l, l->spare[i]);
  for (int i = 0; i < l->per_step; i++) {
    stream_recycle(l->stream, &l->step_packs.pack[i]);
    draft_list_free(&l->step_packs.pack[i]);
  }
  stream_recycle(l->stream, &l->step_packs.other);
  draft_list_free(&l->step_packs.other);
  stream_close(l->stream);
  cache_free(l->cache);
  bad_images_free(&l->bad);
  for (int i = 0; i < l->reasons; i++) free(l->reason[i].text);
  pthread_mutex_destroy(&l->form_lock);
  pthread_mutex_destroy(&l->lock);
  pthread_cond_destroy(&l->room);
  pthread_cond_destroy(&l->ready);
  free(l->step_packs.pack);
  free(l->before);
  free(l->queue);
  free(l->spare);
  free(l->thread);
  free(l);
}

// Waits until the packs of the step that are still to be handed out are decoded: what could not be decoded of the last
// is known to the scales of the first. -1 with *err set when one of them never will be.
static int loader_wait_step(Loader *l, Error *err) {
  pthread_mutex_lock(&l->lock);
  int64_t at = l->given, end = at - at % l->per_step + l->per_step;
  for (; at < end; at++)
    while (!l->queue[at % l->depth] && at < l->end) pthread_cond_wait(&l->ready, &l->lock);
  int rc = end <= l->end ? 0 : -1;
  if (rc) *err = l->error;
  pthread_mutex_unlock(&l->lock);
  return rc;
}

// The next pack, whose step is decoded, out of the queue.
static Pack *loader_hand_out(Loader *l, double waited) {
  const LoaderConfig *c = &l->config;
  pthread_mutex_lock(&l->lock);
  Pack **slot = &l->queue[l->given % l->depth], *pack = *slot;
  const BatchDims *dims = pack->batch.dims;
  *slot = NULL;
  l->given++;
  l->stats.packs++;
  l->stats.documents += pack->documents;
  l->stats.lost += pack->lost;
  l->stats.slots_used += dims->n_text + dims->n_image - pack->padding;
  l->stats.slots += c->stream.shape.slots;
  l->stats.waited += waited;
  pthread_cond_signal(&l->room);
  pthread_mutex_unlock(&l->lock);
  pack_scale(&pack->batch, c->stream.shape, c->ce_weight, l->counts.targets, l->counts.noised, c->packs_per_step,
             c->stream.seed);
  return pack;
}

double loader_next(Loader *l, Pack **pack, Error *err) {
  double start = time_now();
  if (loader_wait_step(l, err)) return -1;
  double waited = time_now() - start;
  if (l->given % l->per_step == 0 && loader_begin_step(l, err)) {
    loader_fail(l, l->given, err);
    return -1;
  }
  *pack = loader_hand_out(l, waited);
  return waited;
}

void loader_release(Loader *l, Pack *pack) {
  pthread_mutex_lock(&l->lock);
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
  pthread_mutex_lock(&l->form_lock);
  state.stream = l->before[step % l->snapshots];
  pthread_mutex_unlock(&l->form_lock);
  return loader_state_print(&state);
}

LoaderStats loader_stats(Loader *l) {
  pthread_mutex_lock(&l->form_lock);
  StreamStats stream = stream_stats(l->stream);
  pthread_mutex_unlock(&l->form_lock);
  pthread_mutex_lock(&l->lock);
  LoaderStats stats = l->stats;
  pthread_mutex_unlock(&l->lock);
  stats.stream = stream;
  return stats;
}
