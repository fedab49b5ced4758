#include "trainer/dump.h"

#include "base/json.h"
#include "base/text_out.h"
#include "model/config/load.h"
#include "model/files/safetensors.h"
#include "trainer/output/figures.h"
#include "trainer/slab.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static SafeTensor array(const char *name, SafeDtype dtype, int64_t n0, int64_t n1, const void *data) {
  return (SafeTensor){.name = name, .dtype = dtype, .rank = n1 ? 2 : 1, .shape = {n0, n1}, .data = data};
}

static int write_file(const char *folder, const char *name, const SafeTensor *t, int n, Error *err) {
  char *path = xasprintf("%s/%s", folder, name);
  int bad = safetensors_write(path, t, n, NULL, 0, false, err);
  free(path);
  return bad;
}

static int write_text(const char *folder, const char *name, const char *text, Error *err) {
  char *path = xasprintf("%s/%s", folder, name);
  int bad = file_write(path, text, strlen(text), err);
  free(path);
  return bad;
}

// One slab of parameters or gradients, by name.
static int write_slab(const Engine *e, const char *folder, const char *name, Space space, Error *err) {
  const ParamTable *p = &e->model.params;
  const Backend *b = e->model.backend;
  size_t element = b->dtype_bytes[DT_REAL];
  char *host = xmalloc((size_t)p->total * element);
  SafeTensor *t = xcalloc((size_t)p->n, sizeof *t);
  engine_slab_read(e, space, host);
  for (int i = 0; i < p->n; i++) {
    const Param *w = &p->of[i];
    t[i] = slab_tensor(e, i, w->name);
    t[i].data = host + (size_t)w->offset * element;
  }
  int bad = write_file(folder, name, t, p->n, err);
  free(t);
  free(host);
  return bad;
}

static int write_pack(const Engine *e, const ModelProgram *m, const Batch *b, const char *folder, int k, Error *err) {
  const BatchDims *d = b->dims;
  const Dims *dims = &m->program->dims;
  int64_t used = d->n_text + d->n_image, P = dims->P, n_image = d->n_image;
  float *z = xmalloc((size_t)(dims->T * P) * sizeof *z), *clean = xmalloc((size_t)(n_image * P + 1) * sizeof *clean);
  engine_read(e, m, m->z, dims->T * P, z);
  for (int64_t i = 0; i < n_image * P; i++) clean[i] = (float)b->patch[i] / 127.5f - 1;
  int32_t counts[5] = {d->n_text, d->n_image, d->n_segments, d->n_target, d->n_ids};
  int64_t seg = d->n_segments;
  const SafeTensor t[] = {array("dims", SAFE_I32, 5, 0, counts),
                          array("row", SAFE_I32, used, 0, b->row),
                          array("seq", SAFE_I32, used, 0, b->seq),
                          array("token", SAFE_I32, used, 0, b->token),
                          array("target", SAFE_I32, used, 0, b->target),
                          array("target_kind", SAFE_I32, used, 0, b->target_kind),
                          array("segment", SAFE_I32, used, 0, b->segment),
                          array("position", SAFE_I32, used, 2, b->position),
                          array("doc_start", SAFE_I32, used, 0, b->doc_start),
                          array("kv_end", SAFE_I32, used, 0, b->kv_end),
                          array("q_start", SAFE_I32, used, 0, b->q_start),
                          array("q_end", SAFE_I32, used, 0, b->q_end),
                          array("pool_segment", SAFE_I32, used, 0, b->pool_segment),
                          array("seg_kind", SAFE_I32, seg, 0, b->seg_kind),
                          array("seg_start", SAFE_I32, seg, 0, b->seg_start),
                          array("seg_len", SAFE_I32, seg, 0, b->seg_len),
                          array("seg_ordinal", SAFE_I32, seg, 0, b->seg_ordinal),
                          array("cap_start", SAFE_I32, seg, 0, b->cap_start),
                          array("cap_end", SAFE_I32, seg, 0, b->cap_end),
                          array("seg_doc", SAFE_I64, seg, 0, b->seg_doc),
                          array("seg_time", SAFE_F32, seg, 0, b->seg_time),
                          array("patch", SAFE_U8, n_image, P, b->patch),
                          array("clean", SAFE_F32, n_image, P, clean),
                          array("noised", SAFE_F32, n_image, P, z + (int64_t)d->n_text * P)};
  char name[32];
  snprintf(name, sizeof name, "micro_%d.safetensors", k);
  int bad = write_file(folder, name, t, (int)(sizeof t / sizeof *t), err);
  free(z);
  free(clean);
  return bad;
}

// Of the parameters' elements: between them there may be anything.
static double gradient_norm(const Engine *e) {
  const ParamTable *p = &e->model.params;
  size_t element = e->model.backend->dtype_bytes[DT_REAL];
  char *host = xmalloc((size_t)p->total * element);
  double sum = 0;
  engine_slab_read(e, SPACE_GRADS, host);
  for (int i = 0; i < p->n; i++) {
    const void *at = host + (size_t)p->of[i].offset * element;
    for (int64_t k = 0; k < p->of[i].count; k++) {
      double v = element == sizeof(double) ? ((const double *)at)[k] : (double)((const float *)at)[k];
      sum += v * v;
    }
  }
  free(host);
  return sqrt(sum);
}

// null where there is no number: a cross-entropy without targets, a loss that is not finite.
static char *losses_json(const Config *c, const StepSums *s, int n) {
  double figure[FIGURES];
  figures_of(c, s, figure);
  TextOut out;
  FILE *f = text_begin(&out);
  fprintf(f, "{\"micro_batches\": %d", n);
  for (int i = 0; i < FIGURES; i++) {
    if (!figure_info[i].dump) continue;
    fprintf(f, ", \"%s\": ", figure_info[i].dump);
    json_write_number(f, figure[i]);
  }
  fputs("}\n", f);
  return text_end(&out);
}

int dump_step(Engine *e, const Batch *const *packs, int n, const char *folder, Error *err) {
  if (folder_make(folder, err) != 0) return -1;
  char *config = config_to_json(e->config);
  int bad = write_text(folder, "config.json", config, err) != 0 ||
            write_slab(e, folder, "params.safetensors", SPACE_WEIGHTS, err) != 0;
  free(config);
  for (int k = 0; !bad && k < n; k++) {
    const ModelProgram *m = engine_micro_step(e, k);
    engine_run(e, m, packs[k]->dims, NULL);
    bad = write_pack(e, m, packs[k], folder, k, err) != 0;
  }
  if (bad) return -1;
  Dims d = dims_from_config(e->config, 1, 1);
  size_t bytes = (size_t)metrics_size(&d) * sizeof(double);
  double *metrics = xmalloc(bytes);
  e->model.backend->download(metrics, engine_slab(e, SPACE_METRICS), bytes);
  StepSums sums = {.grad_norm = gradient_norm(e)};
  figures_sum(e->config, metrics, &sums);
  char *losses = losses_json(e->config, &sums, n);
  free(metrics);
  bad = write_text(folder, "losses.json", losses, err);
  free(losses);
  if (bad) return -1;
  return write_slab(e, folder, "grads.safetensors", SPACE_GRADS, err);
}
