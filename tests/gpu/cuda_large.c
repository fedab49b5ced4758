// Micro-batches of 262144 slots on the GPU, at top 8 of 64 and of 256 experts: expert buffers of more than 2^31
// elements, text and images together and each alone, and one document that fills all slots.
//
//   cuda_large    exit code 1 when something is wrong, 2 without a GPU, 77 where it has too little memory free
//
// No CPU computes such a step in time. So the same documents are computed as one pack of 262144 slots and as eight
// packs of 32768, whose losses and gradients add up to the same; the one document is held against its own beginning,
// which sees nothing of what follows, and its gradient against differences of its loss.
#include "trainer/slab.h"

#include "base/base.h"
#include "base/philox.h"
#include "data/packer.h"
#include "model/config/load.h"
#include "tests/ops/slab_fill.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 262144, GROUPS = 8, GROUP_SLOTS = SLOTS / GROUPS, MOST_IMAGES = 1024, LARGE = 1024 };
static const double loss_tolerance = 1e-3, norm_tolerance = 0.01;
static const double least_cosine[2] = {0.99, 0.999};   // of parameters with fewer elements than LARGE, and of others
static const double begin_tolerance[2] = {1e-2, 1e-3}; // of a token's loss, of their mean
static const double slope_tolerance = 0.05, slope_change = 0.01; // of the loss

typedef enum Kind { MIXED, TEXT_ONLY, IMAGES_ONLY, KINDS } Kind;
static const char *const kind_name[KINDS] = {"text and images", "text only", "images only"};

typedef struct LargeModel {
  const char *name;
  int kinds; // of packs: the first ones
  const char *set[12];
} LargeModel;

// Of the first, pre [T 8, 2 F] and y [T 8, C] have more than 2^31 elements.
static const LargeModel models[] = {
    {"64 and 256 experts, wide",
     KINDS,
     {"model.dim=1032", "model.text.experts=64", "model.text.expert_dim=520", "model.image.experts=256",
      "model.image.expert_dim=520"}},
    {"256 and 256 experts",
     KINDS,
     {"model.dim=128", "model.text.experts=256", "model.text.expert_dim=64", "model.image.experts=256",
      "model.image.expert_dim=72"}},
};

static const int64_t needed_bytes = (int64_t)26e9;

static int failures;

static void fail(const char *what, double got, double want) {
  printf("  FAIL %s: %.9g, expected %.9g\n", what, got, want);
  failures++;
}

// ---- documents ----

// Documents of a step, group by group; those of a group fit GROUP_SLOTS.
typedef struct Documents {
  Document *of;
  const Document **list;
  int n, first[GROUPS + 1]; // documents of group g: [first[g], first[g + 1])
  uint8_t *pixels;          // what all images are cut from
  int64_t targets, noised;
} Documents;

enum { PIXEL_TOKENS = 4096, MOST_TOKENS = 1000 };

static uint32_t draw(uint64_t number, uint32_t below) {
  return philox4(77, number, 0, 0).v[0] % below;
}

static void make_document(Document *doc, Kind kind, uint64_t number, int V, int P, const uint8_t *pixels) {
  int32_t ids[MOST_TOKENS];
  int n = 32 + (int)draw(4 * number, 65), sort = kind == MIXED       ? (int)draw(4 * number + 1, 3)
                                                 : kind == TEXT_ONLY ? 2
                                                                     : 3;
  float time = 0.02f + 0.0095f * (float)draw(4 * number + 2, 100);
  for (int i = 0; i < MOST_TOKENS; i++)
    ids[i] = (int32_t)draw((1u << 20) + number * MOST_TOKENS + (uint64_t)i, (uint32_t)V - 4);
  const ImageGrid square = {16, 16}, large = {32, 32};
  if (sort == 0) document_caption_to_image(doc, number, V, ids, n, square, time);
  if (sort == 1) document_image_to_caption(doc, number, V, ids, n, square);
  if (sort == 2) document_text(doc, number, V, ids, 200 + (int)draw(4 * number + 3, 800), true);
  if (sort == 3) {
    document_reset(doc, number);
    document_add_image(doc, large, SEGMENT_NOISED, time);
  }
  for (int i = 0; i < doc->parts; i++)
    if (doc->part[i].kind == PART_IMAGE)
      doc->part[i].patch = pixels + (size_t)draw(4 * number + 3, PIXEL_TOKENS - 1024) * (size_t)P;
}

static Documents documents_make(const Config *c, Kind kind) {
  int V = c->model.vocab, P = 3 * c->model.patch * c->model.patch;
  Documents d = {.of = xcalloc(SLOTS, sizeof *d.of),
                 .list = xcalloc(SLOTS, sizeof *d.list),
                 .pixels = xmalloc((size_t)PIXEL_TOKENS * (size_t)P)};
  for (int i = 0; i < PIXEL_TOKENS * P; i++) d.pixels[i] = (uint8_t)draw((1ull << 40) + (uint64_t)i, 256);
  for (int g = 0; g < GROUPS; g++) {
    PackRoom room = {GROUP_SLOTS, GROUP_SLOTS, MOST_IMAGES / GROUPS};
    d.first[g] = d.n;
    for (;; d.n++) {
      make_document(&d.of[d.n], kind, (uint64_t)d.n, V, P, d.pixels);
      DocumentSize size = document_size(&d.of[d.n], V);
      if (!pack_room_fits(room, size)) break;
      room = pack_room_left(room, size);
      d.targets += size.targets;
      d.noised += size.noised;
      d.list[d.n] = &d.of[d.n];
    }
  }
  d.first[GROUPS] = d.n;
  return d;
}

static void documents_free(Documents *d) {
  for (int i = 0; i < SLOTS; i++) document_free(&d->of[i]);
  free(d->of);
  free(d->list);
  free(d->pixels);
}

// Documents [from, to) as a pack of a program's sizes, with the scales of a step of `packs` packs.
static void *pack_make(const Program *p, const Documents *d, int from, int to, int packs) {
  BatchShape shape = dims_batch_shape(&p->dims);
  Batch b;
  Error err;
  void *block = aligned_alloc(64, (batch_bind(&b, shape, NULL) + 63) / 64 * 64);
  if (!block) panic("out of memory: a pack");
  batch_bind(&b, shape, block);
  if (pack_layout(d->list + from, to - from, shape, &b, &err) != 0) fatal(&err);
  pack_scale(&b, shape, 1, d->targets, d->noised, packs, 5);
  return block;
}

// ---- engines ----

static void open_config(Config *c, const LargeModel *m, int slots) {
  static const char *const common[] = {
      "model.layers=1", "model.heads=2",         "model.kv_heads=1",   "model.head_dim=32",    "model.cond_dim=64",
      "model.patch=4",  "model.vocab=512",       "model.text.top_k=8", "model.image.top_k=8",  "data.image_size=64",
      "train.ema=0",    "train.micro_batches=2", "memory.policy=keep", "data.max_images=1024", "router.balance=0",
      "router.z=0",     "data.max_caption=128"};
  enum { COMMON = sizeof common / sizeof *common };
  const char *sets[COMMON + 13];
  char tokens[48];
  int n = COMMON;
  Error err;
  memcpy(sets, common, sizeof common);
  for (int i = 0; m->set[i]; i++) sets[n++] = m->set[i];
  snprintf(tokens, sizeof tokens, "data.micro_batch_tokens=%d", slots);
  sets[n++] = tokens;
  if (config_load(c, NULL, sets, n, &err) != 0) fatal(&err);
}

static void put_weights(void *arg, int64_t offset, int64_t count, const void *values) {
  slab_writer_put(arg, SPACE_WEIGHTS, offset, count, values);
}

static void open_engine(Engine *e, const Config *c) {
  Error err;
  if (engine_record(e, c, &backend_cuda, 1, &err) != 0 || engine_allocate(e, &err) != 0) fatal(&err);
  SlabWriter *w = slab_writer_open(e, PARAMS_PIECE, &err);
  if (!w) fatal(&err);
  params_stream(&e->model.params, PARAMS_RANDOM, 3, sizeof(float), put_weights, w);
  slab_writer_close(w);
}

// What a step of some packs leaves.
typedef struct Outcome {
  Metrics metrics;
  float *grads; // [parameters]
} Outcome;

static Outcome read_outcome(const Engine *e) {
  Outcome o = {.grads = xmalloc((size_t)e->model.params.total * sizeof *o.grads)};
  e->model.backend->download(&o.metrics, e->bases.of[SPACE_METRICS], sizeof o.metrics);
  engine_slab_read(e, SPACE_GRADS, o.grads);
  return o;
}

static Outcome run_packs(Engine *e, const Documents *d, int packs) {
  for (int k = 0; k < packs; k++) {
    const ModelProgram *m = engine_micro_step(e, k);
    void *pack = pack_make(m->program, d, d->first[k * GROUPS / packs], d->first[(k + 1) * GROUPS / packs], packs);
    engine_run(e, m, pack, NULL);
    engine_await_packs(e, true);
    free(pack);
  }
  return read_outcome(e);
}

// ---- one pack against eight ----

static void compare_losses(const Metrics *got, const Metrics *want) {
  const struct {
    const char *name;
    double got, want, tolerance;
  } of[] = {{"nll of text", got->nll[0], want->nll[0], loss_tolerance},
            {"nll of captions", got->nll[1], want->nll[1], loss_tolerance},
            {"flow", got->flow, want->flow, loss_tolerance},
            {"targets of text", got->targets[0], want->targets[0], 0},
            {"targets of captions", got->targets[1], want->targets[1], 0},
            {"flow elements", got->flow_elems, want->flow_elems, 0}};
  double worst = 0, all = 0;
  for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
    double error = fabs(of[i].got - of[i].want);
    if (!(error <= of[i].tolerance * fabs(of[i].want))) fail(of[i].name, of[i].got, of[i].want);
    if (of[i].tolerance > 0 && of[i].want > 0) worst = fmax(worst, error / of[i].want);
    all += of[i].got;
  }
  if (!(all > 0)) fail("all losses together", all, 1);
  printf("  losses within %.1e", worst);
}

static void compare_grads(const ParamTable *params, Kind kind, const float *got, const float *want) {
  double least = 1, most = 0;
  int without = 0;
  for (int i = 0; i < params->n; i++) {
    const Param *p = &params->of[i];
    double gg = 0, ww = 0, gw = 0;
#pragma omp parallel for reduction(+ : gg, ww, gw) schedule(static)
    for (int64_t j = p->offset; j < p->offset + p->count; j++) {
      gg += (double)got[j] * (double)got[j];
      ww += (double)want[j] * (double)want[j];
      gw += (double)got[j] * (double)want[j];
    }
    if (gg == 0 && ww == 0) { // of the other modality
      without++;
      continue;
    }
    double cosine = gw / sqrt(gg * ww), norm = sqrt(gg / ww);
    if (!(cosine >= least_cosine[p->count >= LARGE])) fail(p->name, cosine, 1);
    if (!(fabs(norm - 1) <= norm_tolerance)) fail(p->name, norm, 1);
    least = fmin(least, cosine);
    most = fmax(most, fabs(norm - 1));
  }
  if (without > (kind == MIXED ? 0 : 2 * params->n / 3)) fail("parameters without a gradient", without, 0);
  printf(", gradients: cosine %.6f or more, norms within %.2f%%, %d of %d without any\n", least, 100 * most, without,
         params->n);
}

static void test_model(const LargeModel *m) {
  double start = time_now();
  Outcome of[KINDS];
  Documents documents[KINDS];
  for (int whole = 1; whole >= 0; whole--) {
    Config c;
    Engine e;
    open_config(&c, m, whole ? SLOTS : GROUP_SLOTS);
    open_engine(&e, &c);
    if (whole) {
      int64_t bytes = 0;
      for (int s = 0; s < SPACE_COUNT; s++) bytes += e.bytes[s];
      printf("%s: %.0f M parameters, %.1f GB\n", m->name, (double)e.model.params.parameters / 1e6, (double)bytes / 1e9);
    }
    for (int k = 0; k < m->kinds; k++) {
      if (whole) documents[k] = documents_make(&c, (Kind)k);
      Outcome got = run_packs(&e, &documents[k], whole ? 1 : GROUPS);
      if (whole) {
        of[k] = got;
        continue;
      }
      printf("  %-16s %d documents:", kind_name[k], documents[k].n);
      compare_losses(&of[k].metrics, &got.metrics);
      compare_grads(&e.model.params, (Kind)k, of[k].grads, got.grads);
      free(of[k].grads);
      free(got.grads);
      documents_free(&documents[k]);
    }
    engine_free(&e);
  }
  printf("  one pack of %d slots against %d of %d: %.1f s\n", (int)SLOTS, (int)GROUPS, (int)GROUP_SLOTS,
         time_now() - start);
}

// ---- one document ----

// A text of `slots` tokens that goes on; all of its tokens are drawn alike, so that a shorter one is its beginning.
static Documents one_text(const Config *c, int slots) {
  int V = c->model.vocab;
  int32_t *ids = xmalloc((size_t)slots * sizeof *ids);
  Documents d = {.of = xcalloc(SLOTS, sizeof *d.of), .list = xcalloc(1, sizeof *d.list), .n = 1};
  for (int i = 0; i < slots; i++) ids[i] = (int32_t)draw((uint64_t)i, (uint32_t)V - 4);
  document_text(&d.of[0], 9, V, ids, slots - 1, false);
  DocumentSize size = document_size(&d.of[0], V);
  if (size.slots != slots) panic("a document of %d slots, not %d", size.slots, slots);
  d.list[0] = &d.of[0];
  d.targets = size.targets;
  free(ids);
  return d;
}

static float *text_nll(Engine *e, const Config *c, int slots) {
  const ForwardProgram *f = engine_forward(e, MODE_EVAL, slots, 0);
  Documents d = one_text(c, slots);
  void *pack = pack_make(f->m.program, &d, 0, 1, 1);
  float *nll = xmalloc((size_t)f->slots * sizeof *nll);
  engine_run(e, &f->m, pack, NULL);
  engine_read(e, &f->m, f->m.nll, f->slots, nll);
  free(pack);
  documents_free(&d);
  return nll;
}

// The mean loss of the whole text with weights that are `by` times a direction away from `weights`.
static double loss_at(Engine *e, const Config *c, const float *weights, const float *direction, double by) {
  int64_t total = e->model.params.total;
  float *moved = xmalloc((size_t)total * sizeof *moved);
  for (int64_t i = 0; i < total; i++) moved[i] = (float)((double)weights[i] + by * (double)direction[i]);
  slab_upload(e, SPACE_WEIGHTS, moved);
  float *nll = text_nll(e, c, SLOTS);
  double sum = 0;
  for (int i = 0; i < SLOTS; i++) sum += (double)nll[i];
  free(nll);
  free(moved);
  return sum / (SLOTS - 1);
}

// The loss falls along the gradient as it says.
static void check_slope(Engine *e, const Config *c, const Outcome *o) {
  int64_t total = e->model.params.total;
  float *weights = xmalloc((size_t)total * sizeof *weights);
  double norm = 0, loss = o->metrics.nll[0] / o->metrics.targets[0];
  engine_slab_read(e, SPACE_WEIGHTS, weights);
  for (int64_t i = 0; i < total; i++) norm += (double)o->grads[i] * (double)o->grads[i];
  double by = slope_change * loss / norm; // changes the loss by that part
  double slope = (loss_at(e, c, weights, o->grads, by) - loss_at(e, c, weights, o->grads, -by)) / (2 * by);
  printf("  loss %.5f; its slope along the gradient is %.4f of the gradient's square\n", loss, slope / norm);
  if (!(fabs(slope / norm - 1) <= slope_tolerance)) fail("slope", slope / norm, 1);
  slab_upload(e, SPACE_WEIGHTS, weights);
  free(weights);
}

static void test_one_document(void) {
  static const LargeModel model = {"one document",
                                   0,
                                   {"model.dim=128", "model.heads=1", "model.text.experts=8",
                                    "model.text.expert_dim=64", "model.image.experts=8", "model.image.expert_dim=64"}};
  double start = time_now(), difference = 0, shift = 0;
  Config c;
  Engine e;
  open_config(&c, &model, SLOTS);
  open_engine(&e, &c);
  printf("one document of %d tokens\n", (int)SLOTS);
  float *whole = text_nll(&e, &c, SLOTS), *begin = text_nll(&e, &c, GROUP_SLOTS);
  for (int i = 0; i < GROUP_SLOTS - 1; i++) {
    difference += fabs((double)whole[i] - (double)begin[i]) / (GROUP_SLOTS - 1);
    shift += ((double)whole[i] - (double)begin[i]) / (GROUP_SLOTS - 1);
  }
  printf("  nll of its first %d tokens against the beginning alone: differences of %.1e, on average %+.1e\n",
         (int)GROUP_SLOTS - 1, difference, shift);
  if (!(difference <= begin_tolerance[0])) fail("mean difference of a token's nll", difference, 0);
  if (!(fabs(shift) <= begin_tolerance[1])) fail("difference of the mean nll", shift, 0);
  free(whole);
  free(begin);

  Documents d = one_text(&c, SLOTS);
  void *pack = pack_make(e.first.program, &d, 0, 1, 1);
  Outcome of[2];
  for (int i = 0; i < 2; i++) {
    engine_run(&e, &e.first, pack, NULL);
    of[i] = read_outcome(&e);
  }
  if (memcmp(of[0].grads, of[1].grads, (size_t)e.model.params.total * sizeof(float)) != 0)
    fail("bits of the gradients the second time", 1, 0);
  check_slope(&e, &c, &of[0]);
  printf("  %.1f s\n", time_now() - start);
  free(of[0].grads);
  free(of[1].grads);
  free(pack);
  documents_free(&d);
  engine_free(&e);
}

int main(void) {
  Error err;
  double start = time_now();
  if (backend_cuda.open(&err) != 0) fatal(&err);
  if (backend_cuda.memory() < needed_bytes) {
    printf("%.0f GB of device memory are needed, %.0f GB are free\n", (double)needed_bytes / 1e9,
           (double)backend_cuda.memory() / 1e9);
    return 77;
  }
  for (size_t i = 0; i < sizeof models / sizeof *models; i++) test_model(&models[i]);
  test_one_document();
  printf("%s in %.0f s\n", failures ? "FAILED" : "large micro-batches: as they should be", time_now() - start);
  return failures > 0;
}
