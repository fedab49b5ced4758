#include "trainer/sampler.h"

#include "base/philox.h"
#include "base/ranks.h"
#include "data/flow_time.h"
#include "trainer/forward.h"
#include "trainer/signals.h"

#include <stdlib.h>
#include <string.h>

// Share of the training times below the latest that the network is given: the network's answers beyond are arbitrary,
// often the same in every patch. With .99 drawings are the same from 10 steps on; .999 still leaves some of it, 1 makes
// it worse with every step (docs/LOG.md).
#define SAMPLER_TRAINED 0.99

SamplerOptions sampler_options(const Config *c) {
  FlowTimes times = flow_times_of(c);
  double trained = fmin(flow_time_quantile(&times, SAMPLER_TRAINED), 1 - c->flow.t_floor);
  return (SamplerOptions){.kind = c->eval.sampler,
                          .steps = c->eval.sampler_steps,
                          .t_end = c->eval.t_end > 0 ? c->eval.t_end : trained,
                          .guidance = c->eval.guidance,
                          .guidance_from = c->eval.guidance_from};
}

WriterOptions writer_options(const Config *c) {
  return (WriterOptions){.temperature = c->eval.temperature, .top_p = c->eval.top_p, .max_tokens = c->data.max_caption};
}

// ---- caption to image ----

// Images that are drawn together. Their documents, the conditional ones first, lie in as few packs as they fit; the
// layout stays from step to step, only times and z change.
typedef struct DrawGroup {
  int images;
  int branches;      // 2: conditional and unconditional, 1: conditional only
  int64_t elements;  // of an image: its tokens * P
  Document *doc;     // [branches * images]
  ForwardPack *pack; // [packs], holding documents [first[i], first[i+1])
  int *first;        // [packs + 1]
  int packs;
  float *z;     // [images, elements]
  float *probe; // [images, elements] where Heun's method evaluates the second velocity
  float *v[2];  // [images, elements]
  float *xhat;  // [branches * images, elements]
  char *rows;   // image rows of one pack, in the backend's storage type
  float *read;  // all used rows of one pack
} DrawGroup;

static void group_free(DrawGroup *g) {
  for (int i = 0; g->doc && i < g->branches * g->images; i++) document_free(&g->doc[i]);
  for (int i = 0; i < g->packs; i++) forward_pack_free(&g->pack[i]);
  void *owned[] = {g->doc, g->pack, g->first, g->z, g->probe, g->v[0], g->v[1], g->xhat, g->rows, g->read};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

static void draw_document(Document *d, const Engine *e, const Tokenizer *t, const char *caption, ImageGrid grid) {
  size_t bytes = caption ? strlen(caption) : 0;
  int32_t *ids = xmalloc((bytes + 1) * sizeof *ids);
  int64_t n = bytes ? min_i64(tokenizer_encode(t, caption, bytes, ids), e->config->data.max_caption) : 0;
  document_caption_to_image(d, 0, e->config->model.vocab, ids, (int)n, grid, 0);
  free(ids);
}

// How many of the next images are drawn together: as many as one pack holds, but at least one, whose documents may
// then be in packs of their own.
static int group_take(const Engine *e, const Tokenizer *t, const char *const *captions, int n, ImageGrid grid,
                      int branches) {
  PackRoom left = forward_room(e);
  Document d = {0};
  draw_document(&d, e, t, NULL, grid);
  DocumentSize blank = document_size(&d, e->config->model.vocab);
  int count = 0;
  for (; count < n; count++) {
    draw_document(&d, e, t, captions[count], grid);
    DocumentSize size = document_size(&d, e->config->model.vocab);
    if (!pack_room_fits(left, size)) break;
    left = pack_room_left(left, size);
    if (branches == 1) continue;
    if (!pack_room_fits(left, blank)) break;
    left = pack_room_left(left, blank);
  }
  document_free(&d);
  return count ? count : 1;
}

static int group_layout(DrawGroup *g, const Engine *e, Error *err) {
  int docs = g->branches * g->images, most = 0;
  const Document **list = xmalloc((size_t)docs * sizeof *list);
  for (int i = 0; i < docs; i++) list[i] = &g->doc[i];
  g->pack = xcalloc((size_t)docs, sizeof *g->pack);
  g->first = xcalloc((size_t)docs + 1, sizeof *g->first);
  int taken = 0;
  for (int at = 0; at < docs && taken >= 0; at += taken) {
    ForwardPack *p = &g->pack[g->packs++];
    taken = forward_pack_fill(p, e, MODE_GENERATE, list + at, docs - at, 0, err);
    if (taken < 0) break;
    g->first[g->packs] = at + taken;
    most = (int)max_i64(most, p->program->slots);
  }
  free(list);
  if (taken < 0) return -1;
  size_t P = 3 * (size_t)e->config->model.patch * (size_t)e->config->model.patch;
  g->rows = xmalloc((size_t)most * P * e->model.backend->dtype_bytes[DT_ACT]);
  g->read = xmalloc((size_t)most * P * sizeof *g->read);
  return 0;
}

static int group_make(DrawGroup *g, const Engine *e, const Tokenizer *t, const char *const *captions, ImageGrid grid,
                      Error *err) {
  int64_t P = 3 * (int64_t)e->config->model.patch * e->config->model.patch;
  g->elements = (int64_t)grid.rows * grid.columns * P;
  size_t all = (size_t)(g->images * g->elements);
  g->doc = xcalloc((size_t)(g->branches * g->images), sizeof *g->doc);
  for (int i = 0; i < g->images; i++) draw_document(&g->doc[i], e, t, captions[i], grid);
  for (int i = g->images; i < g->branches * g->images; i++) draw_document(&g->doc[i], e, t, NULL, grid);
  g->z = xmalloc(all * sizeof *g->z);
  g->probe = xmalloc(all * sizeof *g->probe);
  g->v[0] = xmalloc(all * sizeof *g->v[0]);
  g->v[1] = xmalloc(all * sizeof *g->v[1]);
  g->xhat = xmalloc(all * (size_t)g->branches * sizeof *g->xhat);
  return group_layout(g, e, err);
}

// z [images, elements] of the pack's documents to the rows of SPACE_INPUT; its text rows are never read. Documents have
// one image each, so its rows follow one another as the documents do.
static void group_upload(const DrawGroup *g, const Engine *e, const ForwardPack *p, int first, const float *z) {
  const Backend *b = e->model.backend;
  size_t size = b->dtype_bytes[DT_ACT], P = (size_t)p->program->m.program->dims.P;
  for (int i = 0; i < p->docs; i++) {
    const float *from = z + (first + i) % g->images * g->elements;
    char *to = g->rows + (size_t)(i * g->elements) * size;
    floats_to(from, size, g->elements, to);
  }
  char *input = engine_slab(e, SPACE_INPUT);
  b->upload(input + (size_t)p->batch.dims->n_text * P * size, g->rows, (size_t)(p->docs * g->elements) * size);
}

// xhat [branches * images, elements] of z at time t.
static void group_predict(DrawGroup *g, Engine *e, const float *z, double t) {
  for (int i = 0; i < g->packs; i++) {
    ForwardPack *p = &g->pack[i];
    const ModelProgram *m = &p->program->m;
    const BatchDims *n = p->batch.dims;
    int64_t P = m->program->dims.P;
    for (int s = 1; s < n->n_segments; s++) p->batch.seg_time[s] = (float)t;
    group_upload(g, e, p, g->first[i], z);
    engine_run(e, m, p->block, NULL);
    engine_read(e, m, m->xhat, (n->n_text + n->n_image) * P, g->read);
    memcpy(g->xhat + g->first[i] * g->elements, g->read + n->n_text * P,
           (size_t)(p->docs * g->elements) * sizeof *g->xhat);
  }
}

// v [images, elements] = (x^ - z) / max(1 - t, t_floor), guided where t is in (guidance_from, 1). Guiding x^ guides v:
// it is linear in x^.
static void group_velocity(DrawGroup *g, Engine *e, const float *z, double t, const SamplerOptions *o, float *v) {
  group_predict(g, e, z, t);
  int64_t all = g->images * g->elements;
  float scale = (float)(1 / fmax(1 - t, e->config->flow.t_floor)), w = (float)o->guidance;
  const float *c = g->xhat, *u = g->xhat + all;
  if (g->branches == 1 || t <= o->guidance_from) {
    for (int64_t i = 0; i < all; i++) v[i] = (c[i] - z[i]) * scale;
    return;
  }
  for (int64_t i = 0; i < all; i++) v[i] = (u[i] + w * (c[i] - u[i]) - z[i]) * scale;
}

// Where step s begins, and for s = steps the last one ends.
static double grid_time(const SamplerOptions *o, int s) {
  if (s == o->steps) return 1;
  int whole = o->steps == 1 || (double)(o->steps - 1) / o->steps <= o->t_end;
  return whole ? (double)s / o->steps : s * o->t_end / (o->steps - 1);
}

static int group_integrate(DrawGroup *g, Engine *e, const SamplerOptions *o, Error *err) {
  int64_t all = g->images * g->elements;
  for (int s = 0; s < o->steps; s++) {
    if (signals_check(err) != 0) return -1;
    double t = grid_time(o, s), next = grid_time(o, s + 1);
    float dt = (float)(next - t);
    group_velocity(g, e, g->z, t, o, g->v[0]);
    if (o->kind == SAMPLER_EULER || s + 1 == o->steps) {
      for (int64_t i = 0; i < all; i++) g->z[i] += dt * g->v[0][i];
      continue;
    }
    for (int64_t i = 0; i < all; i++) g->probe[i] = g->z[i] + dt * g->v[0][i];
    group_velocity(g, e, g->probe, next, o, g->v[1]);
    for (int64_t i = 0; i < all; i++) g->z[i] += dt * 0.5f * (g->v[0][i] + g->v[1][i]);
  }
  return 0;
}

// z [n] as the normals of image `index`.
static void noise_fill(float *z, int64_t n, uint64_t seed, uint64_t index) {
  for (int64_t i = 0; i < n; i += 4) {
    float normal[4];
    philox_normal4(seed, index, STREAM_SAMPLE, (uint32_t)(i / 4), normal);
    memcpy(z + i, normal, (size_t)min_i64(4, n - i) * sizeof *z);
  }
}

// x [elements] in [-1, 1] to pixels; what is not a number becomes 0.
static Image image_from_flow(const float *x, ImageGrid grid, int patch) {
  Image image = {.width = grid.columns * patch, .height = grid.rows * patch};
  size_t n = 3 * (size_t)image.width * (size_t)image.height;
  uint8_t *patches = xmalloc(n);
  for (size_t i = 0; i < n; i++) {
    float level = (x[i] + 1) * 127.5f;
    patches[i] = (uint8_t)(level >= 255 ? 255 : level > 0 ? lrintf(level) : 0);
  }
  image.rgb = xmalloc(n);
  image_from_patches(patches, patch, &image);
  free(patches);
  return image;
}

static int draw_check(const Engine *e, const Tokenizer *t, ImageGrid grid, const SamplerOptions *o, Error *err) {
  if (forward_check_tokenizer(e, t, err) != 0) return -1;
  if (o->steps < 1) return error_set(err, "set eval.sampler_steps", "%d sampler steps; at least 1", o->steps);
  int64_t room = forward_room(e).slots;
  if (grid.rows >= 1 && grid.columns >= 1 && grid.rows <= room && grid.columns <= room / grid.rows) return 0;
  return error_set(err, "draw at data.image_size, or raise data.micro_batch_tokens (--tokens)",
                   "an image of %d x %d patches does not fit %lld tokens", grid.rows, grid.columns, (long long)room);
}

// Brings the images [n] of all processes together, of which each has `share` in a row.
static void share_images(Image *drawn, int n, int share, ImageGrid grid, int patch) {
  int width = grid.columns * patch, height = grid.rows * patch, rank = ranks_rank();
  size_t bytes = (size_t)width * (size_t)height * 3;
  uint8_t *all = xcalloc((size_t)(ranks_size() * share), bytes);
  for (int i = rank * share; i < n && i < (rank + 1) * share; i++) memcpy(all + (size_t)i * bytes, drawn[i].rgb, bytes);
  ranks_share(all, (size_t)share * bytes);
  for (int i = 0; i < n; i++) {
    if (drawn[i].rgb) continue;
    drawn[i] = (Image){.width = width, .height = height, .rgb = xmalloc(bytes)};
    memcpy(drawn[i].rgb, all + (size_t)i * bytes, bytes);
  }
  free(all);
}

int sampler_generate(Engine *e, const Tokenizer *t, const char *const *captions, int n, ImageGrid grid, uint64_t seed,
                     const SamplerOptions *options, Image *out, Error *err) {
  if (draw_check(e, t, grid, options, err) != 0) return -1;
  int branches = options->guidance != 1 && options->guidance_from < 1 ? 2 : 1, failed = 0;
  int ranks = e->config->processes, rank = ranks > 1 ? ranks_rank() : 0, share = (n + ranks - 1) / ranks;
  Image *drawn = xcalloc((size_t)n + 1, sizeof *drawn);
  for (int at = rank * share, end = (int)min_i64(n, at + share); at < end && !failed;) {
    DrawGroup g = {.images = group_take(e, t, captions + at, end - at, grid, branches), .branches = branches};
    failed = group_make(&g, e, t, captions + at, grid, err) != 0;
    if (!failed) {
      for (int i = 0; i < g.images; i++) noise_fill(g.z + i * g.elements, g.elements, seed, (uint64_t)(at + i));
      failed = group_integrate(&g, e, options, err) != 0;
      for (int i = 0; i < g.images && !failed; i++)
        drawn[at + i] = image_from_flow(g.z + i * g.elements, grid, e->config->model.patch);
    }
    at += g.images;
    group_free(&g);
  }
  if (ranks > 1) failed = ranks_worst(failed ? -1 : 0, err) != 0;
  if (ranks > 1 && !failed) share_images(drawn, n, share, grid, e->config->model.patch);
  for (int i = 0; i < n; i++) {
    if (failed)
      image_free(&drawn[i]);
    else
      out[i] = drawn[i];
  }
  free(drawn);
  return failed ? -1 : 0;
}

// ---- image to caption ----

typedef struct Choice {
  float score;
  int32_t id;
} Choice;

static int choice_compare(const void *a, const void *b) {
  const Choice *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? -1 : 1;
  return x->id < y->id ? -1 : x->id > y->id;
}

int32_t sampler_choose(const float *logits, const Tokenizer *t, double temperature, double top_p, float u) {
  int n = tokenizer_used(t) + 1;
  Choice *choice = xmalloc((size_t)n * sizeof *choice);
  for (int i = 0; i < n; i++) {
    int32_t id = i + 1 < n ? i : special_ids(tokenizer_vocab(t)).eos;
    choice[i] = (Choice){isnan(logits[id]) ? -INFINITY : logits[id], id};
  }
  qsort(choice, (size_t)n, sizeof *choice, choice_compare);
  int chosen = 0, kept = 1;
  if (temperature > 0 && isfinite(choice[0].score)) {
    double total = 0, sum = 0, top = (double)choice[0].score;
    for (int i = 0; i < n; i++) {
      choice[i].score = (float)exp(((double)choice[i].score - top) / temperature);
      total += (double)choice[i].score;
    }
    for (sum = (double)choice[0].score; kept < n && sum < top_p * total; kept++) sum += (double)choice[kept].score;
    double left = (double)u * sum - (double)choice[0].score;
    while (left > 0 && chosen + 1 < kept) left -= (double)choice[++chosen].score;
  }
  int32_t id = choice[chosen].id;
  free(choice);
  return id;
}

// A caption being written: the document grows by a token a step.
typedef struct Writing {
  Document doc;
  uint8_t *patches; // [tokens, P]
  int room;         // tokens it may still get
  int done;
} Writing;

static int writing_begin(Writing *w, const Engine *e, const Image *image, int index, int max_tokens, Error *err) {
  int patch = e->config->model.patch, vocab = e->config->model.vocab;
  if (image->width < patch || image->height < patch || image->width % patch || image->height % patch)
    return error_set(err, "fit the image to the patch grid first",
                     "image %d: %d x %d pixels are not a number of patches of %d", index + 1, image->width,
                     image->height, patch);
  ImageGrid grid = {image->height / patch, image->width / patch};
  const SpecialIds id = special_ids(vocab);
  const int32_t opening[] = {id.bos, id.boi};
  document_reset(&w->doc, 0);
  document_add_text(&w->doc, opening, 2);
  document_add_image(&w->doc, grid, SEGMENT_CLEAN, 1);
  document_add_text(&w->doc, &id.eoi, 1);
  w->doc.silent = true; // no targets: the rows to predict are set by hand
  DocumentSize size = document_size(&w->doc, vocab);
  PackRoom room = forward_room(e);
  w->room = (int)min_i64(max_tokens, min_i64(room.slots - size.slots, room.text - size.text));
  if (w->room < 1 || room.images < 1)
    return error_set(err, "raise data.micro_batch_tokens (--tokens) or data.max_text, or use a smaller image",
                     "image %d: %d tokens and a caption do not fit %d tokens", index + 1, size.slots, room.slots);
  w->patches = xmalloc(3 * (size_t)image->width * (size_t)image->height);
  image_to_patches(image, patch, w->patches);
  w->doc.part[1].patch = w->patches;
  return 0;
}

// How many of the next captions fit in one pack when each has got all its tokens.
static int writing_take(const Engine *e, const Writing *w, int n) {
  PackRoom left = forward_room(e);
  int count = 0;
  for (; count < n; count++) {
    DocumentSize size = document_size(&w[count].doc, e->config->model.vocab);
    size.slots += w[count].room;
    size.text += w[count].room;
    if (!pack_room_fits(left, size)) break;
    left = pack_room_left(left, size);
  }
  return count;
}

// The logits [docs, V] of the tokens that follow the pack's documents.
static void pack_next_logits(Engine *e, ForwardPack *p, float *logits) {
  Batch *b = &p->batch;
  for (int i = 0; i < p->docs; i++) {
    int last = p->text[i + 1] - 1;
    b->target[last] = 0; // any id: the logits of all are read
    b->target_row[i] = last;
  }
  b->dims->n_target = p->docs;
  engine_run(e, &p->program->m, p->block, NULL);
  engine_read(e, &p->program->m, p->program->m.logits, (int64_t)p->docs * e->config->model.vocab, logits);
}

// Writes n captions that fit in one pack; first: the index of the first among all.
static int writing_run(Engine *e, const Tokenizer *t, Writing *w, int n, int first, uint64_t seed,
                       const WriterOptions *o, Error *err) {
  int V = e->config->model.vocab, failed = 0, open = n;
  ForwardPack pack = {0};
  const Document **list = xmalloc((size_t)n * sizeof *list);
  int *who = xmalloc((size_t)n * sizeof *who);
  float *logits = xmalloc((size_t)n * (size_t)V * sizeof *logits);
  for (uint32_t step = 0; open > 0 && !failed; step++) {
    open = 0;
    for (int i = 0; i < n; i++) {
      if (w[i].done) continue;
      who[open] = i;
      list[open++] = &w[i].doc;
    }
    if (!open) break;
    failed = signals_check(err) != 0 || forward_pack_fill(&pack, e, MODE_WRITE, list, open, 0, err) < 0;
    if (failed) break;
    pack_next_logits(e, &pack, logits);
    for (int i = 0; i < open; i++) {
      Writing *at = &w[who[i]];
      float u = philox_uniform(philox4(seed, (uint64_t)(first + who[i]), STREAM_SAMPLE, step).v[0]);
      int32_t id = sampler_choose(logits + (int64_t)i * V, t, o->temperature, o->top_p, u);
      at->done = id == special_ids(tokenizer_vocab(t)).eos || --at->room == 0;
      if (id != special_ids(tokenizer_vocab(t)).eos) document_add_text(&at->doc, &id, 1);
    }
  }
  forward_pack_free(&pack);
  free(list);
  free(who);
  free(logits);
  return failed ? -1 : 0;
}

int sampler_describe(Engine *e, const Tokenizer *t, const Image *images, int n, uint64_t seed,
                     const WriterOptions *options, char **out, Error *err) {
  if (forward_check_tokenizer(e, t, err) != 0) return -1;
  Writing *w = xcalloc((size_t)n + 1, sizeof *w);
  int failed = 0;
  for (int i = 0; i < n && !failed; i++) failed = writing_begin(&w[i], e, &images[i], i, options->max_tokens, err) != 0;
  for (int at = 0, count; at < n && !failed; at += count) {
    count = writing_take(e, w + at, n - at);
    failed = writing_run(e, t, w + at, count, at, seed, options, err) != 0;
  }
  for (int i = 0; i < n; i++) {
    const Document *d = &w[i].doc; // bos, boi, image, eoi, and what was written
    if (!failed) out[i] = tokenizer_decode(t, d->token + 3, d->tokens - 3, NULL);
    document_free(&w[i].doc);
    free(w[i].patches);
  }
  free(w);
  return failed ? -1 : 0;
}
