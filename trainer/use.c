// What a checkpoint is used for: quality figures, drawings, captions.
#include "trainer/trainer_internal.h"

#include "trainer/grid.h"
#include "trainer/sampler.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SHEET_SCALE = 2, CAPTION_LINE = 4096 };

void trainer_load_items(Trainer *t) {
  const Config *c = t->config;
  if (t->held_out || t->training || !c->eval.documents) return;
  HeldOut *list;
  int64_t n = stream_held_out(t->source, t->sources, c->data.held_out, c->data.max_pixels, &list);
  t->n_held_out = eval_items_load(c, t->source, list, n, c->eval.documents, &t->held_out);
  free(list);
  n = eval_list_training(c, t->source, t->sources, c->eval.documents, &list);
  t->n_training = eval_items_load(c, t->source, list, n, c->eval.documents, &t->training);
  free(list);
}

int trainer_measure(Trainer *t, Evaluation *out, Error *err) {
  // Without held-out samples the figures are those of training ones.
  int held_out = t->n_held_out > 0;
  const EvalItem *items = held_out ? t->held_out : t->training;
  if (evaluate(&t->engine, t->tokenizer, items, held_out ? t->n_held_out : t->n_training, out, err) != 0) return -1;
  if (evaluate_retrieval(&t->engine, t->tokenizer, t->training, t->n_training, &out->retrieval_training, err) != 0)
    return -1;
  if (!held_out) log_info("no held-out samples (data.held_out): the figures are those of training samples");
  evaluation_print(out);
  return 0;
}

Image item_image(const Config *c, const EvalItem *item) {
  Image image = {.width = item->grid.columns * c->model.patch, .height = item->grid.rows * c->model.patch};
  image.rgb = xmalloc((size_t)image.width * (size_t)image.height * 3);
  image_from_patches(item->patches, c->model.patch, &image);
  return image;
}

int trainer_draw_items(Trainer *t, const EvalItem *items, int n, Image *out, Error *err) {
  SamplerOptions options = sampler_options(t->config);
  for (int i = 0; i < n;) {
    // Images of one shape are drawn together.
    int same = 1;
    while (i + same < n && items[i + same].grid.rows == items[i].grid.rows &&
           items[i + same].grid.columns == items[i].grid.columns)
      same++;
    const char **captions = xcalloc((size_t)same, sizeof *captions);
    for (int k = 0; k < same; k++) captions[k] = items[i + k].caption;
    int bad =
        sampler_draw(&t->engine, t->tokenizer, captions, same, items[i].grid, 1 + (uint64_t)i, &options, out + i, err);
    free(captions);
    if (bad) {
      for (int k = 0; k < i; k++) image_free(&out[k]);
      return -1;
    }
    i += same;
  }
  return 0;
}

// Cells of one section: each drawing, then the real image.
static int fill_section(Trainer *t, const EvalItem *items, int n, Image *images, GridCell *cells, Error *err) {
  if (trainer_draw_items(t, items, n, images, err) != 0) return -1;
  for (int i = 0; i < n; i++) {
    images[n + i] = item_image(t->config, &items[i]);
    cells[2 * i] = (GridCell){.image = &images[i], .caption = items[i].caption};
    cells[2 * i + 1] = (GridCell){.image = &images[n + i]};
  }
  return 0;
}

int trainer_write_sheet(Trainer *t, const char *path, Error *err) {
  static const char *const titles[2] = {"held-out captions, never trained on", "training captions"};
  static const char *const columns[] = {"drawn", "real", "drawn", "real", "drawn", "real", "drawn", "real"};
  enum { COLUMNS = sizeof columns / sizeof *columns };
  const EvalItem *items[2] = {t->held_out, t->training};
  int n[2] = {(int)min_i64(t->config->eval.samples, t->n_held_out),
              (int)min_i64(t->config->eval.samples, t->n_training)};
  GridSection sections[2];
  GridCell *cells[2];
  Image *images[2];
  int bad = 0, made = 0;
  for (int s = 0; s < 2 && !bad; s++) {
    if (!n[s]) continue;
    images[made] = xcalloc((size_t)(2 * n[s]), sizeof(Image));
    cells[made] = xcalloc((size_t)(2 * n[s]), sizeof(GridCell));
    bad = fill_section(t, items[s], n[s], images[made], cells[made], err) != 0;
    sections[made] = (GridSection){.title = titles[s], .column_title = columns, .cells = cells[made], .n = 2 * n[s]};
    made++;
  }
  if (!bad) bad = grid_write(path, sections, made, COLUMNS, SHEET_SCALE, err) != 0;
  for (int s = 0; s < made; s++) {
    for (int i = 0; i < sections[s].n; i++) image_free(&images[s][i]);
    free(images[s]);
    free(cells[s]);
  }
  return bad ? -1 : 0;
}

int trainer_read_captions(Trainer *t, int n, Error *err) {
  const EvalItem *items = t->n_held_out ? t->held_out : t->training;
  n = (int)min_i64(n, t->n_held_out ? t->n_held_out : t->n_training);
  if (!n) return 0;
  Image *images = xcalloc((size_t)n, sizeof *images);
  char **captions = xcalloc((size_t)n, sizeof *captions);
  for (int i = 0; i < n; i++) images[i] = item_image(t->config, &items[i]);
  WriterOptions options = writer_options(t->config);
  options.temperature = 0;
  int bad = sampler_describe(&t->engine, t->tokenizer, images, n, 1, &options, captions, err);
  if (!bad)
    log_info("captions read off %s images (left: what it says, right: the truth)",
             t->n_held_out ? "held-out" : "training");
  for (int i = 0; i < n; i++) {
    if (!bad) log_info("  %-48s %s", captions[i], items[i].caption);
    image_free(&images[i]);
    free(captions[i]);
  }
  free(images);
  free(captions);
  return bad;
}

// One PNG a drawing and captions.tsv.
static int write_folder(const char *folder, const Image *images, const char *const *captions, int n, Error *err) {
  if (folder_make(folder, err) != 0) return -1;
  char *path = xasprintf("%s/captions.tsv", folder);
  FILE *f = fopen(path, "wb");
  int bad = !f;
  for (int i = 0; i < n && !bad; i++) {
    char *image = xasprintf("%s/%04d.png", folder, i);
    bad = fprintf(f, "%04d.png\t%s\n", i, captions[i]) < 0;
    if (!bad && image_write_png(image, &images[i], err) != 0) {
      free(image);
      free(path);
      fclose(f);
      return -1;
    }
    free(image);
  }
  if (f && fclose(f) != 0) bad = 1;
  if (bad) error_set(err, "check space and permissions", "cannot write %s: %s", path, strerror(errno));
  free(path);
  return bad ? -1 : 0;
}

static int has_suffix(const char *s, const char *suffix) {
  size_t n = strlen(s), k = strlen(suffix);
  return n >= k && strcmp(s + n - k, suffix) == 0;
}

// A file that ends in .png gets a sheet, anything else is a folder of PNGs.
static int write_drawings(const char *out, const Image *images, const char *const *captions, int n, Error *err) {
  if (!has_suffix(out, ".png")) return write_folder(out, images, captions, n, err);
  if (n == 1) return image_write_png(out, &images[0], err);
  GridCell *cells = xcalloc((size_t)n, sizeof *cells);
  for (int i = 0; i < n; i++) cells[i] = (GridCell){.image = &images[i], .caption = captions[i]};
  GridSection section = {.cells = cells, .n = n};
  int bad = grid_write(out, &section, 1, (int)min_i64(n, 8), SHEET_SCALE, err);
  free(cells);
  return bad;
}

int trainer_evaluate(Trainer *t, Error *err) {
  Evaluation figures;
  trainer_load_items(t);
  if (trainer_measure(t, &figures, err) != 0) return -1;
  char *json = evaluation_json(&figures, t->state.step);
  printf("%s\n", json);
  free(json);
  if (!t->options->out) return 0;
  // Drawings of held-out captions, for judging them by other means.
  int n = (int)min_i64(t->config->eval.samples, t->n_held_out);
  Image *images = xcalloc((size_t)n + 1, sizeof *images);
  const char **captions = xcalloc((size_t)n + 1, sizeof *captions);
  int bad = trainer_draw_items(t, t->held_out, n, images, err);
  for (int i = 0; i < n; i++) captions[i] = t->held_out[i].caption;
  if (!bad) bad = write_drawings(t->options->out, images, captions, n, err);
  for (int i = 0; i < n; i++) image_free(&images[i]);
  free(images);
  free(captions);
  return bad;
}

// Captions from standard input, one a line; empty lines draw unconditionally.
static int read_captions(char ***captions) {
  char line[CAPTION_LINE];
  int n = 0;
  *captions = NULL;
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\r\n")] = 0;
    *captions = xrealloc(*captions, (size_t)(n + 1) * sizeof **captions);
    (*captions)[n++] = xstrdup(line);
  }
  return n;
}

int trainer_sample(Trainer *t, const char *caption, const char *out, Error *err) {
  const Config *c = t->config;
  char **captions = NULL;
  int n = 1;
  if (strcmp(caption, "-") == 0) {
    n = read_captions(&captions);
  } else {
    captions = xcalloc(1, sizeof *captions);
    captions[0] = xstrdup(caption);
  }
  int bad = 0;
  if (!n) bad = error_set(err, "one caption a line", "--sample -: standard input has no captions");
  ImageGrid grid = {c->data.image_size / c->model.patch, c->data.image_size / c->model.patch};
  SamplerOptions options = sampler_options(c);
  Image *images = xcalloc((size_t)n + 1, sizeof *images);
  if (!bad)
    bad = sampler_draw(&t->engine, t->tokenizer, (const char *const *)captions, n, grid, (uint64_t)c->run.seed,
                       &options, images, err);
  char *path = out ? xstrdup(out) : xasprintf("%s/samples/drawn.png", t->run);
  if (!bad) {
    bad = write_drawings(path, images, (const char *const *)captions, n, err);
    if (!bad) log_info("drawn: %s", path);
    for (int i = 0; i < n; i++) image_free(&images[i]);
  }
  for (int i = 0; i < n; i++) free(captions[i]);
  free(captions);
  free(images);
  free(path);
  return bad;
}

int trainer_describe(Trainer *t, const char *path, Error *err) {
  const Config *c = t->config;
  size_t bytes;
  Image decoded, fitted;
  char *data = file_read(path, (size_t)1 << 30, &bytes, err), *caption = NULL;
  if (!data) return -1;
  int bad = image_decode((uint8_t *)data, bytes, c->data.max_pixels, &decoded, err);
  free(data);
  if (bad) return error_prefix(err, "%s", path);
  ImageFit fit = config_image_fit(c);
  bad = image_fit(&decoded, &fit, false, &fitted, err);
  image_free(&decoded);
  if (bad) return error_prefix(err, "%s", path);
  WriterOptions options = writer_options(c);
  bad = sampler_describe(&t->engine, t->tokenizer, &fitted, 1, (uint64_t)c->run.seed, &options, &caption, err);
  image_free(&fitted);
  if (!bad) printf("%s\n", caption);
  free(caption);
  return bad;
}
