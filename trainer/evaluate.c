#include "trainer/evaluate.h"

#include "base/ranks.h"
#include "data/sample_patches.h"
#include "trainer/forward.h"
#include "trainer/signals.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Not the run's seed, so that runs of different seeds are measured with the same noise.
enum { EVAL_SEED = 1 };

// ---- items ----

int eval_items_load(const Config *c, Source *const *source, const HeldOut *list, int64_t n, int most,
                    EvalItem **items) {
  ImageFit fit = image_fit_of(c);
  size_t P = 3 * (size_t)c->model.patch * (size_t)c->model.patch;
  *items = xcalloc((size_t)max_i64(min_i64(n, most), 1), sizeof **items);
  int count = 0;
  for (int64_t i = 0; i < n && count < most; i++) {
    const Source *from = source[list[i].source];
    const Sample *sample = source_sample(from, list[i].sample);
    if (sample->kind != SAMPLE_CAPTIONED) continue;
    const SamplePart *caption = &sample->part[0], *image = &sample->part[1];
    ImageGrid grid = image_fit_grid(&fit, image->width, image->height);
    EvalItem item = {.caption = caption->text, .caption_bytes = caption->text_bytes, .grid = grid};
    item.patches = xmalloc((size_t)grid.rows * (size_t)grid.columns * P);
    Error err;
    if (sample_patches(from, image, &fit, c->data.max_pixels, false, item.patches, &err) == 0) {
      (*items)[count++] = item;
      continue;
    }
    log_warn("%s is left out of the evaluation: %s", sample->key, err.text);
    free(item.patches);
  }
  return count;
}

void eval_items_free(EvalItem *items, int n) {
  for (int i = 0; i < n; i++) free(items[i].patches);
  free(items);
}

int64_t eval_list_training(const Config *c, Source *const *source, int sources, int most, HeldOut **list) {
  HeldOut *all;
  int64_t n = stream_held_out(source, sources, 1, &all), count = 0; // every sample, mixed
  for (int64_t i = 0; i < n && count < most; i++) {
    const Sample *sample = source_sample(source[all[i].source], all[i].sample);
    if (sample->kind == SAMPLE_CAPTIONED && !sample_is_held_out(sample->group, c->data.held_out)) all[count++] = all[i];
  }
  *list = all;
  return count;
}

// ---- captions ----

typedef struct Caption {
  int32_t *ids; // [n] cut to data.max_caption
  int n;
  size_t bytes; // that these ids stand for
} Caption;

// The items with their captions as tokens. `distinct` names one item for each different caption.
typedef struct EvalSet {
  Engine *engine;
  const EvalItem *items;
  int n;
  Caption *caption; // [n]
  int *distinct;    // [different]
  int different;
  Document *doc;         // [n] scratch
  const Document **list; // [n] their addresses
  double *nll, *error;   // [n] results of eval_run
} EvalSet;

static int caption_compare(const Caption *a, const Caption *b) {
  if (a->n != b->n) return a->n < b->n ? -1 : 1;
  return a->n ? memcmp(a->ids, b->ids, (size_t)a->n * sizeof *a->ids) : 0;
}

static int index_compare(const void *a, const void *b, void *captions) {
  const Caption *caption = captions;
  int i = *(const int *)a, j = *(const int *)b, order = caption_compare(&caption[i], &caption[j]);
  return order ? order : (i > j) - (i < j);
}

static Caption caption_encode(const Tokenizer *t, const EvalItem *item, int most) {
  Caption c = {.ids = xmalloc((item->caption_bytes + 1) * sizeof *c.ids), .bytes = item->caption_bytes};
  int64_t n = tokenizer_encode(t, item->caption, item->caption_bytes, c.ids);
  c.n = (int)min_i64(n, most);
  if (c.n < n) free(tokenizer_decode(t, c.ids, c.n, &c.bytes));
  return c;
}

static EvalSet set_make(Engine *e, const Tokenizer *t, const EvalItem *items, int n) {
  EvalSet s = {.engine = e, .items = items, .n = n};
  size_t room = (size_t)n + 1;
  s.caption = xcalloc(room, sizeof *s.caption);
  s.distinct = xcalloc(room, sizeof *s.distinct);
  s.doc = xcalloc(room, sizeof *s.doc);
  s.list = xcalloc(room, sizeof *s.list);
  s.nll = xcalloc(room, sizeof *s.nll);
  s.error = xcalloc(room, sizeof *s.error);
  for (int i = 0; i < n; i++) {
    s.caption[i] = caption_encode(t, &items[i], e->config->data.max_caption);
    s.distinct[i] = i;
    s.list[i] = &s.doc[i];
  }
  qsort_r(s.distinct, (size_t)n, sizeof *s.distinct, index_compare, s.caption);
  for (int i = 0; i < n; i++) {
    int before = s.different ? s.distinct[s.different - 1] : -1;
    if (before < 0 || caption_compare(&s.caption[before], &s.caption[s.distinct[i]]) != 0)
      s.distinct[s.different++] = s.distinct[i];
  }
  return s;
}

static void set_free(EvalSet *s) {
  for (int i = 0; i < s->n; i++) {
    free(s->caption[i].ids);
    document_free(&s->doc[i]);
  }
  void *owned[] = {s->caption, s->distinct, s->doc, s->list, s->nll, s->error};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

// The k-th of the items that have other captions than item i and than one another: a pseudo-random order of its own for
// every i. 0 <= k < different - 1.
static int set_other(const EvalSet *s, int i, int k) {
  for (int64_t at = 0;; at++) {
    int j = s->distinct[stream_permute(EVAL_SEED, (uint64_t)i, 0, s->different, at)];
    if (caption_compare(&s->caption[i], &s->caption[j]) == 0) continue;
    if (k-- == 0) return j;
  }
}

// ---- measuring ----

// [bos] caption of item `text` [boi] image of item `image` at time t.
static void set_noised(EvalSet *s, int at, int image, int text, double t) {
  const Caption *c = &s->caption[text];
  Document *d = &s->doc[at];
  document_caption_to_image(d, (uint64_t)image, s->engine->config->model.vocab, c->ids, c->n, s->items[image].grid,
                            (float)t);
  d->part[1].patch = s->items[image].patches;
}

// [bos][boi] image of item `image` [eoi] caption of item `text` [eos].
static void set_described(EvalSet *s, int at, int image, int text) {
  const Caption *c = &s->caption[text];
  Document *d = &s->doc[at];
  document_image_to_caption(d, (uint64_t)image, s->engine->config->model.vocab, c->ids, c->n, s->items[image].grid);
  d->part[1].patch = s->items[image].patches;
}

// Sums the results of one pack whose first document is number `first`.
static void pack_collect(EvalSet *s, const ForwardPack *p, int first, const float *nll, const float *error) {
  const Batch *b = &p->batch;
  for (int i = 0; i < p->docs; i++) {
    double sum = 0;
    for (int r = p->text[i]; r < p->text[i + 1]; r++)
      if (b->target[r] >= 0 && b->target_kind[r] == TARGET_CAPTION) sum += (double)nll[r];
    s->nll[first + i] = sum;
    s->error[first + i] = (double)error[p->segment[i]];
  }
}

// Puts together what each process ran, of which the others have zeros.
static int set_share(EvalSet *s, int rc, Error *err) {
  if (s->engine->config->processes == 1) return rc;
  if (ranks_worst(rc, err) != 0) return -1;
  ranks_sum_f64(s->nll, s->n);
  ranks_sum_f64(s->error, s->n);
  return 0;
}

// Runs the n documents of the set: nll [n], summed over caption and eos of a described image; error [n], mean squared
// error of a noised one.
static int set_run(EvalSet *s, Error *err) {
  ForwardPack pack = {0};
  Engine *e = s->engine;
  float *nll = xmalloc((size_t)e->slots * sizeof *nll);        // [T]
  float *error = xmalloc((size_t)e->segments * sizeof *error); // [SEG]
  int taken = 0, ranks = e->config->processes, rank = ranks > 1 ? ranks_rank() : 0;
  memset(s->nll, 0, (size_t)s->n * sizeof *s->nll);
  memset(s->error, 0, (size_t)s->n * sizeof *s->error);
  for (int at = 0, number = 0; at < s->n; at += taken, number++) {
    int stopped = signals_check(err) != 0;
    taken = stopped ? -1 : forward_pack_fill(&pack, e, MODE_EVAL, s->list + at, s->n - at, EVAL_SEED, err);
    if (taken < 0) break;
    if (number % ranks != rank) continue;
    const ModelProgram *m = &pack.program->m;
    engine_run(e, m, pack.block, NULL);
    engine_read(e, m, m->nll, pack.batch.dims->n_text, nll);
    engine_read(e, m, m->seg_error, pack.batch.dims->n_segments, error);
    pack_collect(s, &pack, at, nll, error);
  }
  forward_pack_free(&pack);
  free(nll);
  free(error);
  return set_share(s, taken < 0 ? -1 : 0, err);
}

// Predicts every image, noised to its time, with the caption of item text[i]: mean squared error and velocity error per
// element.
static int measure_flow(EvalSet *s, const double *time, const int *text, double *mse, double *flow, Error *err) {
  for (int i = 0; i < s->n; i++) set_noised(s, i, i, text[i], time[i]);
  if (set_run(s, err) != 0) return -1;
  double elements = 0, squares = 0, weighted = 0;
  for (int i = 0; i < s->n; i++) {
    double tokens = (double)s->items[i].grid.rows * s->items[i].grid.columns;
    double left = fmax(1 - (double)(float)time[i], s->engine->config->flow.t_floor);
    elements += tokens;
    squares += s->error[i] * tokens;
    weighted += s->error[i] * tokens / (left * left);
  }
  *mse = squares / elements;
  *flow = weighted / elements;
  return 0;
}

static int measure_noised(EvalSet *s, const int *own, const int *other, Evaluation *out, Error *err) {
  FlowTimes times = flow_times_of(s->engine->config);
  double *time = xmalloc(((size_t)s->n + 1) * sizeof *time), ignored;
  for (int i = 0; i < s->n; i++) { // a quantile's item is a random one
    double p = ((double)stream_permute(EVAL_SEED, 0, 1, s->n, i) + 0.5) / s->n;
    time[i] = flow_time_quantile(&times, p);
  }
  int failed = measure_flow(s, time, own, &ignored, &out->flow, err);
  for (int k = 0; k < EVAL_TIMES && !failed; k++) {
    for (int i = 0; i < s->n; i++) time[i] = eval_time[k];
    failed = measure_flow(s, time, own, &out->x_mse[k][EVAL_TRUE], &out->flow_at[k][EVAL_TRUE], err);
    if (failed || !other) continue;
    failed = measure_flow(s, time, other, &out->x_mse[k][EVAL_SHUFFLED], &out->flow_at[k][EVAL_SHUFFLED], err);
  }
  free(time);
  return failed;
}

static double bits_per_byte(const EvalSet *s) {
  double nll = 0, bytes = 0;
  for (int i = 0; i < s->n; i++) {
    nll += s->nll[i];
    bytes += (double)s->caption[i].bytes;
  }
  return nll / log(2) / bytes;
}

// Describes every image with its own caption, then with 15 others; `bits` (may be NULL) is of the own ones. *hits: the
// share of the images whose own one is the likeliest.
static int measure_retrieval(EvalSet *s, double *bits, double *hits, Error *err) {
  *hits = NAN;
  for (int i = 0; i < s->n; i++) set_described(s, i, i, i);
  if (set_run(s, err) != 0) return -1;
  if (bits) *bits = bits_per_byte(s);
  if (s->different < EVAL_CHOICES) return 0;
  double *own = xmalloc((size_t)s->n * sizeof *own);
  char *hit = xmalloc((size_t)s->n);
  memcpy(own, s->nll, (size_t)s->n * sizeof *own);
  memset(hit, 1, (size_t)s->n);
  int failed = 0;
  for (int k = 0; k < EVAL_CHOICES - 1 && !failed; k++) {
    for (int i = 0; i < s->n; i++) set_described(s, i, i, set_other(s, i, k));
    failed = set_run(s, err);
    for (int i = 0; i < s->n; i++) hit[i] = (char)(hit[i] && own[i] < s->nll[i]);
  }
  int count = 0;
  for (int i = 0; i < s->n; i++) count += hit[i];
  if (!failed) *hits = (double)count / s->n;
  free(own);
  free(hit);
  return failed;
}

static void evaluation_clear(Evaluation *out, int n) {
  *out = (Evaluation){.documents = n, .flow = NAN, .retrieval = NAN, .retrieval_training = NAN};
  for (int p = 0; p < EVAL_PAIRINGS; p++) {
    for (int k = 0; k < EVAL_TIMES; k++) out->flow_at[k][p] = out->x_mse[k][p] = NAN;
    out->bits_per_byte[p] = NAN;
  }
  for (int m = 0; m < MODALITIES; m++) out->load[m] = (LoadFigures){.entropy = NAN, .max_over_mean = NAN};
}

int evaluate(Engine *e, const Tokenizer *t, const EvalItem *items, int n, Evaluation *out, Error *err) {
  evaluation_clear(out, n);
  if (forward_check_tokenizer(e, t, err) != 0) return -1;
  if (n == 0) return 0;
  Dims d = dims_from_config(e->config, 1, 1);
  size_t metrics_bytes = (size_t)metrics_size(&d) * sizeof(double);
  double *metrics = xcalloc(1, metrics_bytes);
  e->model.backend->upload(engine_slab(e, SPACE_METRICS), metrics, metrics_bytes);
  EvalSet s = set_make(e, t, items, n);
  int *own = xmalloc((size_t)n * sizeof *own), *other = s.different > 1 ? xmalloc((size_t)n * sizeof *other) : NULL;
  for (int i = 0; i < n; i++) {
    own[i] = i;
    if (other) other[i] = set_other(&s, i, 0);
  }
  int failed = measure_noised(&s, own, other, out, err);
  if (!failed) failed = measure_retrieval(&s, &out->bits_per_byte[EVAL_TRUE], &out->retrieval, err);
  if (!failed && other) {
    for (int i = 0; i < n; i++) set_described(&s, i, other[i], i);
    failed = set_run(&s, err);
    if (!failed) out->bits_per_byte[EVAL_SHUFFLED] = bits_per_byte(&s);
  }
  // Every replay has added its assignments to what was zeroed above.
  e->model.backend->download(metrics, engine_slab(e, SPACE_METRICS), metrics_bytes);
  if (e->config->processes > 1 && !failed) ranks_sum_f64(metrics, metrics_size(&d));
  load_figures(metrics_load(metrics), &d, out->load);
  free(metrics);
  free(own);
  free(other);
  set_free(&s);
  return failed ? -1 : 0;
}

int evaluate_retrieval(Engine *e, const Tokenizer *t, const EvalItem *items, int n, double *out, Error *err) {
  *out = NAN;
  if (forward_check_tokenizer(e, t, err) != 0) return -1;
  if (n == 0) return 0;
  EvalSet s = set_make(e, t, items, n);
  int failed = measure_retrieval(&s, NULL, out, err);
  set_free(&s);
  return failed ? -1 : 0;
}
