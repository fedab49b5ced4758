// What a checkpoint is used for: quality figures, drawings, captions.
#include "trainer/trainer_internal.h"

#include "base/ranks.h"
#include "base/utf8.h"
#include "trainer/output/grid.h"
#include "trainer/sampler.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SHEET_SCALE = 2, SHEET_COLUMNS = 8, MOST_DRAWINGS = 4096 };

void trainer_load_items(Trainer *t) {
  const Config *c = t->config;
  if (t->held_out || t->training || !c->eval.documents) return;
  HeldOut *list;
  int64_t n = stream_held_out(t->source, t->sources, c->data.held_out, &list);
  t->n_held_out = eval_items_load(c, t->source, list, n, c->eval.documents, &t->held_out);
  free(list);
  n = eval_list_training(c, t->source, t->sources, c->eval.documents, &list);
  t->n_training = eval_items_load(c, t->source, list, n, c->eval.documents, &t->training);
  free(list);
}

int trainer_measure(Trainer *t, Evaluation *out, Error *err) {
  // Where nothing is held out that could be measured, the figures are those of training samples.
  int of_training = t->n_held_out == 0;
  const EvalItem *items = of_training ? t->training : t->held_out;
  if (evaluate(&t->engine, t->tokenizer, items, of_training ? t->n_training : t->n_held_out, out, err) != 0) return -1;
  out->of_training = of_training;
  if (of_training)
    out->retrieval_training = out->retrieval;
  else if (evaluate_retrieval(&t->engine, t->tokenizer, t->training, t->n_training, &out->retrieval_training, err) != 0)
    return -1;
  if (t->config->eval.documents) evaluation_print(out);
  return 0;
}

static Image item_image(const Config *c, const EvalItem *item) {
  Image image = {.width = item->grid.columns * c->model.patch, .height = item->grid.rows * c->model.patch};
  image.rgb = xmalloc((size_t)image.width * (size_t)image.height * 3);
  image_from_patches(item->patches, c->model.patch, &image);
  return image;
}

// Generates images of `n` items from their captions; free them.
static int generate_items(Trainer *t, const EvalItem *items, int n, Image *out, Error *err) {
  SamplerOptions options = sampler_options(t->config);
  for (int i = 0; i < n;) {
    // Images of one shape are drawn together.
    int same = 1;
    while (i + same < n && items[i + same].grid.rows == items[i].grid.rows &&
           items[i + same].grid.columns == items[i].grid.columns)
      same++;
    const char **captions = xcalloc((size_t)same, sizeof *captions);
    for (int k = 0; k < same; k++) captions[k] = items[i + k].caption;
    int bad = sampler_generate(&t->engine, t->tokenizer, captions, same, items[i].grid, 1 + (uint64_t)i, &options,
                               out + i, err);
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
  if (generate_items(t, items, n, images, err) != 0) return -1;
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
  if (!bad && ranks_rank() == 0) bad = grid_write(path, sections, made, COLUMNS, SHEET_SCALE, err) != 0;
  for (int s = 0; s < made; s++) {
    for (int i = 0; i < sections[s].n; i++) image_free(&images[s][i]);
    free(images[s]);
    free(cells[s]);
  }
  return bad ? -1 : 0;
}

static void log_captions(const char *said, const char *truth) {
  char *left = utf8_printable(said), *right = utf8_printable(truth);
  log_info("  %-48s %s", left, right);
  free(left);
  free(right);
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
    if (!bad) log_captions(captions[i], items[i].caption);
    image_free(&images[i]);
    free(captions[i]);
  }
  free(images);
  free(captions);
  return bad;
}

// Pictures of captions: `count` of each, those of one caption one after the other.
typedef struct Drawings {
  Image *image;               // [n * count]
  const char *const *caption; // [n]
  int n, count;
} Drawings;

static void drawings_free(Drawings *d) {
  for (int i = 0; i < d->n * d->count; i++) image_free(&d->image[i]);
  free(d->image);
}

// One PNG a drawing and captions.tsv, in which a caption is one line without tabs.
static int write_folder(const char *folder, const Drawings *d, Error *err) {
  if (folder_make(folder, err) != 0) return -1;
  char *path = xasprintf("%s/captions.tsv", folder);
  FILE *f = fopen(path, "wb");
  int bad = !f;
  for (int i = 0; i < d->n * d->count && !bad; i++) {
    char *image = xasprintf("%s/%04d.png", folder, i), *caption = utf8_printable(d->caption[i / d->count]);
    bad = fprintf(f, "%04d.png\t%s\n", i, caption) < 0;
    free(caption);
    if (!bad && image_write_png(image, &d->image[i], err) != 0) {
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

// A caption under its drawing, or over all of them where it has several.
static int write_sheet(const char *path, const Drawings *d, Error *err) {
  int all = d->n * d->count, several = d->count > 1, columns = (int)min_i64(several ? d->count : d->n, SHEET_COLUMNS);
  GridCell *cells = xcalloc((size_t)all, sizeof *cells);
  GridSection *sections = xcalloc((size_t)d->n, sizeof *sections);
  for (int i = 0; i < all; i++) cells[i] = (GridCell){.image = &d->image[i], .caption = several ? NULL : d->caption[i]};
  for (int i = 0; i < d->n; i++)
    sections[i] = (GridSection){.title = d->caption[i], .cells = cells + i * d->count, .n = d->count};
  if (!several) sections[0] = (GridSection){.cells = cells, .n = all};
  int bad = grid_write(path, sections, several ? d->n : 1, columns, SHEET_SCALE, err);
  free(sections);
  free(cells);
  return bad;
}

// A file that ends in .png gets the drawing or a sheet, anything else is a folder of PNGs.
static int write_drawings(const char *out, const Drawings *d, Error *err) {
  if (!options_out_is_file(out)) return write_folder(out, d, err);
  return d->n * d->count == 1 ? image_write_png(out, &d->image[0], err) : write_sheet(out, d, err);
}

// The real images of items [n] go into FOLDER/real under the names of their drawings.
static int write_real(const Config *c, const EvalItem *items, const Drawings *drawn, const char *folder, Error *err) {
  Drawings real = {
      .image = xcalloc((size_t)drawn->n, sizeof *real.image), .caption = drawn->caption, .n = drawn->n, .count = 1};
  for (int i = 0; i < real.n; i++) real.image[i] = item_image(c, &items[i]);
  char *path = xasprintf("%s/real", folder);
  int bad = write_folder(path, &real, err);
  free(path);
  drawings_free(&real);
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
  if (!n)
    return error_set(err, "raise data.held_out, eval.documents or eval.samples",
                     "--out: there are no held-out captions to draw");
  const char **captions = xcalloc((size_t)n, sizeof *captions);
  for (int i = 0; i < n; i++) captions[i] = t->held_out[i].caption;
  Drawings d = {.image = xcalloc((size_t)n, sizeof *d.image), .caption = captions, .n = n, .count = 1};
  int bad = generate_items(t, t->held_out, n, d.image, err) || write_drawings(t->options->out, &d, err);
  bool sheet = options_out_is_file(t->options->out);
  if (!bad && !sheet) bad = write_real(t->config, t->held_out, &d, t->options->out, err);
  if (!bad)
    log_info("drawn: %d held-out captions in %s%s", n, t->options->out, sheet ? "" : ", the real images in real/");
  drawings_free(&d);
  free(captions);
  return bad;
}

// ---- drawing captions ----

// Says which captions are longer than training ever saw: what is drawn knows only their beginnings.
static void name_cut_captions(const Trainer *t, const char *const *captions, int n) {
  enum { SHOWN = 60 }; // bytes
  for (int i = 0; i < n; i++) {
    size_t bytes = strlen(captions[i]);
    int32_t *ids = xmalloc((bytes + 1) * sizeof *ids);
    int64_t tokens = tokenizer_encode(t->tokenizer, captions[i], bytes, ids);
    free(ids);
    if (tokens <= t->config->data.max_caption) continue;
    char *shown = utf8_printable(captions[i]);
    int cut = (int)min_i64(SHOWN, (int64_t)strlen(shown));
    while (cut && (shown[cut] & 0xC0) == 0x80) cut--; // not inside a character
    log_warn("\"%.*s%s\" is %lld tokens: cut to the first %d (data.max_caption)", cut, shown, shown[cut] ? "..." : "",
             (long long)tokens, t->config->data.max_caption);
    free(shown);
  }
}

// Generates images of captions [n] and writes them: image k of each is of seed + k, whatever else is generated.
static int draw_captions(Trainer *t, const char *const *captions, int n, uint64_t seed, const char *path, Error *err) {
  const Config *c = t->config;
  ImageGrid grid = {c->data.image_size / c->model.patch, c->data.image_size / c->model.patch};
  SamplerOptions options = sampler_options(c);
  int count = (int)t->options->count, bad = 0;
  if (n > MOST_DRAWINGS / count)
    return error_set(err, "draw fewer at a time", "%d drawings of each of %d captions are more than %d", count, n,
                     MOST_DRAWINGS);
  name_cut_captions(t, captions, n);
  Drawings d = {.caption = captions, .n = n, .count = count};
  d.image = xcalloc((size_t)(n * count), sizeof *d.image);
  Image *drawn = xcalloc((size_t)n, sizeof *drawn);
  for (int k = 0; k < count && !bad; k++) {
    bad = sampler_generate(&t->engine, t->tokenizer, captions, n, grid, seed + (uint64_t)k, &options, drawn, err);
    for (int i = 0; i < n && !bad; i++) d.image[i * count + k] = drawn[i];
  }
  if (!bad) bad = write_drawings(path, &d, err);
  drawings_free(&d);
  free(drawn);
  return bad;
}

// The next line of standard input without its end, NULL after the last; one buffer for all of them.
static const char *read_line(char **line, size_t *room) {
  if (getline(line, room, stdin) < 0) return NULL;
  (*line)[strcspn(*line, "\r\n")] = 0;
  return *line;
}

// Captions from standard input, one a line; empty lines draw unconditionally.
static int read_captions(char ***captions) {
  char *line = NULL;
  size_t room = 0;
  int n = 0;
  *captions = NULL;
  while (read_line(&line, &room)) {
    *captions = xrealloc(*captions, (size_t)(n + 1) * sizeof **captions);
    (*captions)[n++] = xstrdup(line);
  }
  free(line);
  return n;
}

// RUN/samples/drawn-N.png, the first free N from *number.
static char *next_path(const char *run, int *number) {
  for (;; (*number)++) {
    char *path = xasprintf("%s/samples/drawn-%04d.png", run, *number);
    if (access(path, F_OK) != 0) return path;
    free(path);
  }
}

// Generates an image of each caption as it is typed. Seeds go on from run.seed, so that the same caption again gives
// another image, and are logged, so that every image can be made again.
static int draw_typed(Trainer *t, const char *out, Error *err) {
  uint64_t seed = (uint64_t)t->config->run.seed;
  char *line = NULL;
  size_t room = 0;
  int bad = 0, number = 1;
  fputs("Type captions to draw; an empty line ends.\n", stderr);
  while (!bad) {
    fputs("caption> ", stderr);
    const char *caption = read_line(&line, &room);
    if (!caption) fputs("\n", stderr);
    if (!caption || !*caption) break;
    char *path = out ? xstrdup(out) : next_path(t->run, &number);
    bad = draw_captions(t, &caption, 1, seed, path, err);
    if (!bad) log_info("drawn: %s (--seed %lld)", path, (long long)seed);
    free(path);
    seed += (uint64_t)t->options->count;
  }
  free(line);
  return bad;
}

int trainer_sample(Trainer *t, const char *caption, const char *out, Error *err) {
  int from_input = strcmp(caption, "-") == 0, n = 1, bad = 0;
  if (!out) {
    char *samples = xasprintf("%s/samples", t->run);
    bad = folder_make(samples, err);
    free(samples);
    if (bad) return -1;
  }
  if (from_input && isatty(STDIN_FILENO)) return draw_typed(t, out, err);
  char **lines = NULL;
  if (from_input) n = read_captions(&lines);
  char *path = out ? xstrdup(out) : xasprintf("%s/samples/drawn.png", t->run);
  const char *const *captions = from_input ? (const char *const *)lines : &caption;
  if (!n)
    bad = error_set(err, "one caption a line", "--sample -: standard input has no captions");
  else
    bad = draw_captions(t, captions, n, (uint64_t)t->config->run.seed, path, err);
  if (!bad) log_info("drawn: %s", path);
  for (int i = 0; i < n && lines; i++) free(lines[i]);
  free(lines);
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
  ImageFit fit = image_fit_of(c);
  bad = image_fit(&decoded, &fit, &fitted, err);
  image_free(&decoded);
  if (bad) return error_prefix(err, "%s", path);
  WriterOptions options = writer_options(c);
  bad = sampler_describe(&t->engine, t->tokenizer, &fitted, 1, (uint64_t)c->run.seed, &options, &caption, err);
  image_free(&fitted);
  if (bad) return -1;
  // A terminal obeys control characters; what reads a pipe gets the model's own bytes.
  char *shown = isatty(STDOUT_FILENO) ? utf8_printable(caption) : xstrdup(caption);
  printf("%s\n", shown);
  free(shown);
  free(caption);
  return 0;
}
