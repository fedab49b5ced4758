#include "trainer/state_files.h"

#include "base/ranks.h"
#include "model/placement.h"
#include "trainer/slab.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The hint where a checkpoint and the config are not of one model.
#define OTHER_MODEL "it belongs to another model: use the config.json of its run, or another run folder"

// ---- what is in a checkpoint ----

static const struct {
  const char *name;
  int spaces;
  Space space[2];
  const char *prefix[2]; // before the parameter's name
} files[STATE_FILES] = {{"model.safetensors", 1, {SPACE_WEIGHTS}, {""}},
                        {"optimizer-0x1.safetensors", 2, {SPACE_ADAM_M, SPACE_ADAM_V}, {"m.", "v."}},
                        {"ema.safetensors", 1, {SPACE_EMA}, {""}}};
enum { MODEL_FILE, OPTIMIZER_FILE, EMA_FILE };

static SafeDtype dtype_of(const Engine *e) {
  return e->model.backend->dtype_bytes[DT_REAL] == sizeof(double) ? SAFE_F64 : SAFE_F32;
}

// Adds what of a parameter lies in a part of the slabs.
static void add_piece(StateFile *f, const Engine *e, const char *prefix, Space space, int param, Shard part) {
  const Param *w = &e->model.params.of[param];
  int64_t begin = max_i64(w->offset, part.begin), end = min_i64(w->offset + w->count, part.end), first;
  if (begin >= end) return;
  first = begin - w->offset;
  int whole = end - begin == w->count;
  SafeTensor *t = &f->tensor[f->n];
  *t = (SafeTensor){.dtype = dtype_of(e), .rank = whole ? w->rank : 1};
  for (int k = 0; k < t->rank; k++) t->shape[k] = whole ? w->shape[k] : end - begin;
  t->name = whole ? xasprintf("%s%s", prefix, w->name)
                  : xasprintf("%s%s[%" PRId64 ":%" PRId64 "]", prefix, w->name, first, first + end - begin);
  f->piece[f->n++] = (StatePiece){space, param, first, end - begin, part.at + begin - part.begin};
}

// A file with whole slabs, or with this process's shares of them.
static StateFile file_make(const Engine *e, int which, int shared) {
  const ParamTable *p = &e->model.params;
  size_t most = (size_t)(files[which].spaces * p->n);
  StateFile f = {.piece = xcalloc(most, sizeof *f.piece), .tensor = xcalloc(most, sizeof *f.tensor)};
  snprintf(f.name, sizeof f.name, "%s", files[which].name);
  if (shared) snprintf(f.name, sizeof f.name, "optimizer-%dx%d.safetensors", e->model.shard, config_shards(e->config));
  for (int k = 0; k < files[which].spaces; k++)
    for (const ParamBucket *b = p->bucket; b < p->bucket + p->buckets; b++)
      for (int i = b->first; i < b->first + b->n; i++)
        add_piece(&f, e, files[which].prefix[k], files[which].space[k], i,
                  shared ? bucket_shard(&e->model, b) : (Shard){b->begin, b->end, b->begin});
  return f;
}

static void file_free(StateFile *f) {
  for (int i = 0; i < f->n; i++) free((char *)f->tensor[i].name);
  free(f->tensor);
  free(f->piece);
}

StateLayout state_layout(const Engine *e) {
  StateLayout l = {0};
  for (int f = 0; f < STATE_FILES; f++)
    if (slab_is_written(e, files[f].space[0]))
      l.file[l.n++] = file_make(e, f, f == OPTIMIZER_FILE && space_is_shared(&e->model, files[f].space[0]));
  return l;
}

void state_layout_free(StateLayout *l) {
  for (int f = 0; f < l->n; f++) file_free(&l->file[f]);
}

// ---- loading: the slabs ----

// A file of a checkpoint and where its tensors go.
typedef struct Target {
  Engine *engine;
  SlabWriter *writer;
  const char *name;
  StatePiece *piece; // [n of the file's tensors]
  int ema_too;       // the checkpoint has no EMA: the weights go there as well
} Target;

typedef struct Targets {
  int n;
  Target *of; // [n]
} Targets;

static Target *add_target(Targets *t, Engine *e, const Checkpoint *c, const char *name) {
  const SafeFile *file = checkpoint_file(c, name);
  t->of = xrealloc(t->of, (size_t)(t->n + 1) * sizeof *t->of);
  t->of[t->n] = (Target){.engine = e, .name = name, .piece = xcalloc((size_t)file->n + 1, sizeof(StatePiece))};
  return &t->of[t->n++];
}

static void targets_free(Targets *t) {
  for (int i = 0; i < t->n; i++) free(t->of[i].piece);
  free(t->of);
}

// A file of whole slabs, with exactly the tensors that a model of this config has, shapes included: one with fewer
// layers would otherwise take what it finds and ignore all else.
static int match_whole(Targets *targets, Engine *e, const Checkpoint *c, int which, Error *err) {
  const SafeFile *have = checkpoint_file(c, files[which].name);
  if (!have) return error_set(err, "take another checkpoint with --from", "%s has no %s", c->dir, files[which].name);
  StateFile want = file_make(e, which, 0);
  Target *t = add_target(targets, e, c, files[which].name);
  int rc = 0;
  if (have->n != want.n)
    rc = error_set(err, OTHER_MODEL, "%.300s/%s has %d tensors, the model of this config has %d", c->dir, want.name,
                   have->n, want.n);
  for (int i = 0; i < want.n && !rc; i++) {
    const SafeTensor *w = &want.tensor[i], *found = safetensors_get(have, w->name, w->dtype, w->rank, w->shape, err);
    if (found) {
      t->piece[found - have->tensor] = want.piece[i];
      continue;
    }
    rc = error_prefix(err, "%.200s/%s", c->dir, want.name);
    snprintf(err->hint, sizeof err->hint, "%s", OTHER_MODEL);
  }
  file_free(&want);
  return rc;
}

// What a tensor of an optimizer's file is. False where this model has no such thing.
static bool read_piece(const Engine *e, const SafeTensor *t, StatePiece *out) {
  const ParamTable *p = &e->model.params;
  size_t name = strcspn(t->name, "[");
  const char *range = t->name + name;
  for (int k = 0; k < files[OPTIMIZER_FILE].spaces; k++) {
    const char *prefix = files[OPTIMIZER_FILE].prefix[k];
    size_t n = strlen(prefix);
    if (strncmp(t->name, prefix, n) != 0) continue;
    for (int i = 0; i < p->n; i++) {
      const Param *w = &p->of[i];
      if (strlen(w->name) != name - n || strncmp(w->name, t->name + n, name - n) != 0) continue;
      int64_t first = 0, end = w->count;
      int bytes = 0, whole = !*range, rank = whole ? w->rank : 1;
      if (!whole && (sscanf(range, "[%" SCNd64 ":%" SCNd64 "]%n", &first, &end, &bytes) != 2 || range[bytes] || !bytes))
        return false;
      *out = (StatePiece){files[OPTIMIZER_FILE].space[k], i, first, end - first, 0};
      bool fits = t->dtype == dtype_of(e) && t->rank == rank && first >= 0 && first < end && end <= w->count;
      for (int d = 0; fits && d < rank; d++) fits = t->shape[d] == (whole ? w->shape[d] : end - first);
      return fits;
    }
  }
  return false;
}

static int compare_pieces(const void *a, const void *b) {
  const StatePiece *x = a, *y = b;
  if (x->space != y->space) return x->space < y->space ? -1 : 1;
  if (x->param != y->param) return x->param < y->param ? -1 : 1;
  return (x->first > y->first) - (x->first < y->first);
}

// Whether pieces [n] are every element of the moments once. Sorts them.
static bool are_complete(const ParamTable *p, StatePiece *piece, int n) {
  int at = 0;
  qsort(piece, (size_t)n, sizeof *piece, compare_pieces);
  for (int k = 0; k < files[OPTIMIZER_FILE].spaces; k++)
    for (int i = 0; i < p->n; i++)
      for (int64_t next = 0; next < p->of[i].count; next += piece[at++].count)
        if (at == n || piece[at].space != files[OPTIMIZER_FILE].space[k] || piece[at].param != i ||
            piece[at].first != next)
          return false;
  return at == n;
}

// Whether any element of a file's pieces is in this process's shares.
static bool is_needed(const Engine *e, const StatePiece *piece, int n) {
  for (int i = 0; i < n; i++) {
    Shard shard = bucket_shard(&e->model, bucket_of(&e->model.params, piece[i].param));
    int64_t first = e->model.params.of[piece[i].param].offset + piece[i].first;
    if (!space_is_shared(&e->model, piece[i].space) || (first < shard.end && shard.begin < first + piece[i].count))
      return true;
  }
  return false;
}

// The optimizer's files, of however many processes wrote them: those that hold something of this one's become targets.
static int match_optimizer(Targets *targets, Engine *e, const Checkpoint *c, Error *err) {
  StatePiece *all = NULL;
  int n = 0, found = 0, rc = 0;
  for (int f = 0; f < c->n_files && !rc; f++) {
    if (!c->file[f] || strncmp(c->name[f], "optimizer-", 10) != 0) continue;
    const SafeFile *file = c->file[f];
    Target *t = add_target(targets, e, c, c->name[f]);
    found++;
    for (int i = 0; i < file->n && !rc; i++)
      if (!read_piece(e, &file->tensor[i], &t->piece[i]))
        rc = error_set(err, OTHER_MODEL, "%.300s/%s: tensor %.100s is none of the model of this config", c->dir,
                       c->name[f], file->tensor[i].name);
    all = xrealloc(all, (size_t)(n + file->n + 1) * sizeof *all);
    memcpy(all + n, t->piece, (size_t)file->n * sizeof *all);
    n += file->n;
    if (!is_needed(e, t->piece, file->n)) free(targets->of[--targets->n].piece);
  }
  if (!found) rc = error_set(err, "take another checkpoint with --from", "%s has no optimizer-0x1.safetensors", c->dir);
  if (!rc && !are_complete(&e->model.params, all, n))
    rc = error_set(err, OTHER_MODEL, "%.300s: the optimizer's %d files have not each of Adam's moments once", c->dir,
                   found);
  free(all);
  return rc;
}

static void put_part(void *context, int i, size_t at, size_t n, const void *data) {
  const Target *t = context;
  size_t element = t->engine->model.backend->dtype_bytes[DT_REAL];
  const StatePiece *p = &t->piece[i];
  int64_t first = t->engine->model.params.of[p->param].offset + p->first + (int64_t)(at / element);
  slab_writer_put(t->writer, p->space, first, (int64_t)(n / element), data);
  if (t->ema_too) slab_writer_put(t->writer, SPACE_EMA, first, (int64_t)(n / element), data);
}

// Reads the files of all targets, each once.
static int read_slabs(Engine *e, const Targets *targets, const Checkpoint *c, Error *err) {
  // Padding between parameters is zero, as in a slab that begins.
  for (int s = 0; s < SPACE_COUNT; s++)
    if (space_has((Space)s, SPACE_SAVED)) engine_slab_clear(e, (Space)s);
  SlabWriter *writer = slab_writer_open(e, FILE_IN_CHUNK / (int64_t)e->model.backend->dtype_bytes[DT_REAL], err);
  if (!writer) return -1;
  void *memory = xmalloc(checkpoint_memory(c));
  int rc = 0;
  for (int i = 0; i < targets->n && rc == 0; i++) {
    Target *t = &targets->of[i];
    t->writer = writer;
    if (checkpoint_read(c, t->name, memory, put_part, t, err) != 0) rc = STATE_DAMAGED;
  }
  slab_writer_close(writer);
  free(memory);
  return rc;
}

// The targets of a load; -1 with *err where the checkpoint has not what this engine needs.
static int choose_targets(Engine *e, const Checkpoint *c, int weights_only, Targets *targets, Error *err) {
  int wants_ema = engine_slab_bytes(e, SPACE_EMA) > 0, has_ema = checkpoint_file(c, files[EMA_FILE].name) != NULL;
  if (match_whole(targets, e, c, MODEL_FILE, err) != 0) return -1;
  targets->of[0].ema_too = wants_ema && !has_ema;
  // A run whose EMA was off so far begins its average at the weights.
  if (targets->of[0].ema_too) log_warn("%s has no EMA; it begins at the weights", c->dir);
  int moments = !weights_only && engine_slab_bytes(e, SPACE_ADAM_M);
  if (moments && match_optimizer(targets, e, c, err) != 0) return -1;
  return wants_ema && has_ema ? match_whole(targets, e, c, EMA_FILE, err) : 0;
}

int state_load_slabs(Engine *e, const Checkpoint *c, int weights_only, Error *err) {
  Targets targets = {0};
  Error damage;
  int rc = choose_targets(e, c, weights_only, &targets, err);
  if (rc == 0) {
    rc = read_slabs(e, &targets, c, err);
  } else if (checkpoint_verify(c, &damage) != 0) { // a header that tells of another model may be a damaged one
    *err = damage;
    rc = STATE_DAMAGED;
  }
  targets_free(&targets);
  return e->config->processes > 1 ? ranks_worst(rc, err) : rc;
}
