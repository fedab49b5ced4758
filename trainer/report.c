#include "trainer/report.h"

#include "base/json.h"
#include "trainer/append.h"
#include "trainer/tensorboard.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Steps whose expert loads are summed before they are written: single steps are noisy and their histograms many.
enum { LOAD_STEPS = 50 };

struct Report {
  AppendFile metrics;
  EventWriter *events;
  int64_t steps;
  int terminal;
  double per_step; // smoothed seconds
  double redrawn;
  int64_t done;
  Dims dims;      // of load; L = 0 before the first
  double *load;   // [L][E_0 + E_1] sums since the last load line
  int load_steps; // in those sums
};

// A figure under its name in metrics.jsonl and its tag in TensorBoard. One that is not finite is left out of both.
typedef struct Figure {
  const char *key, *tag;
  double value;
} Figure;

// The bar stands on the last line of the terminal; log lines erase it first.
static void erase_bar(void) {
  fputs("\r\033[K", stderr);
}

// Whether a line of metrics.jsonl belongs to the first `from_step` steps. A step line counts its own step from 0; other
// lines ({"step":N,"eval":{..}}) say how many steps were done.
static int line_is_before(const char *line, const char *end, int64_t from_step) {
  static const char key[] = "{\"step\":";
  if (end - line < (ptrdiff_t)sizeof key || memcmp(line, key, sizeof key - 1) != 0) return 0;
  const char *number = line + sizeof key - 1, *colon = memchr(number, ':', (size_t)(end - number));
  int64_t step = atoll(number);
  return colon && (colon[1] == '{' ? step <= from_step : step < from_step);
}

// Cuts the file behind the last whole line of the first from_step steps: steps only grow in it, and cutting needs no
// space.
static int drop_later(AppendFile *f, int64_t from_step, Error *err) {
  size_t bytes, keep = 0;
  char *text = file_read(f->path, (size_t)1 << 40, &bytes, err);
  if (!text) return -1;
  for (char *line = text, *end; (end = memchr(line, '\n', bytes - (size_t)(line - text))); line = end + 1)
    if (line_is_before(line, end, from_step)) keep = (size_t)(end + 1 - text);
  free(text);
  if (keep < bytes && ftruncate(f->fd, (off_t)keep) != 0)
    return error_set(err, "check the folder's permissions", "cannot shorten %s: %s", f->path, strerror(errno));
  f->size = (int64_t)keep;
  return 0;
}

Report *report_open(const char *folder, int64_t from_step, int64_t steps, Error *err) {
  Report *r = xcalloc(1, sizeof *r);
  *r = (Report){.metrics.fd = -1, .steps = steps, .terminal = isatty(STDERR_FILENO), .done = from_step};
  char *path = xasprintf("%s/metrics.jsonl", folder);
  int bad = append_open(&r->metrics, path, 0, err) != 0 || drop_later(&r->metrics, from_step, err) != 0;
  free(path);
  if (!bad) r->events = events_open(folder, from_step + 1, err);
  if (!r->events) {
    append_close(&r->metrics);
    free(r);
    return NULL;
  }
  if (r->terminal) log_set_hook(erase_bar);
  return r;
}

// ---- lines ----

// A line of metrics.jsonl in the making; line_end writes it.
typedef struct Line {
  FILE *f;
  char *text;
  size_t bytes;
} Line;

static void line_begin(Line *l, int64_t step) {
  l->f = open_memstream(&l->text, &l->bytes);
  if (!l->f) panic("out of memory: a line of metrics");
  fprintf(l->f, "{\"step\":%lld", (long long)step);
}

static void line_end(Line *l, Report *r) {
  fputs("}\n", l->f);
  if (fclose(l->f) != 0) panic("out of memory: a line of metrics");
  append_record(&r->metrics, l->text, l->bytes);
  free(l->text);
}

// ---- steps ----

static void draw_bar(Report *r) {
  enum { WIDTH = 30 };
  double left = r->per_step * (double)(r->steps - r->done), now = time_now();
  if (now - r->redrawn < 0.1 && r->done < r->steps) return;
  r->redrawn = now;
  int full = r->steps > 0 ? (int)(WIDTH * r->done / r->steps) : WIDTH;
  fprintf(stderr, "\r\033[K[%.*s%.*s] %lld/%lld  %d:%02d left", full, "##############################", WIDTH - full,
          "..............................", (long long)r->done, (long long)r->steps, (int)left / 60, (int)left % 60);
  fflush(stderr);
}

static void log_step(const StepReport *s) {
  char caption[16] = "-", text[16] = "-";
  if (isfinite(s->ce_caption)) snprintf(caption, sizeof caption, "%.3f", s->ce_caption);
  if (isfinite(s->ce_text)) snprintf(text, sizeof text, "%.3f", s->ce_text);
  log_info("step %5lld  loss %.4f  flow %.4f  ce %s cap %s text  balance %.4f  lr %.2e  norm %.2f  %.1fk tok/s  "
           "%.0f GFLOP/s  %.0f ms (data %.1f)%s%s",
           (long long)s->step + 1, s->loss, s->flow, caption, text, s->balance + s->z, s->lr, s->grad_norm,
           s->tokens / s->seconds / 1e3, s->flops / s->seconds / 1e9, s->seconds * 1e3, s->data_wait * 1e3,
           s->skipped ? "  SKIPPED: not finite: " : "", s->skipped ? s->bad : "");
}

void report_step(Report *r, const StepReport *s) {
  const Figure figures[] = {
      {"loss", "loss/total", s->loss},
      {"flow", "loss/flow", s->flow},
      {"ce", "loss/ce", s->ce},
      {"ce_caption", "loss/ce_caption", s->ce_caption},
      {"ce_text", "loss/ce_text", s->ce_text},
      {"balance", "router/balance", s->balance},
      {"z", "router/z", s->z},
      {"lr", "optimizer/lr", s->lr},
      {"grad_norm", "optimizer/grad_norm", s->grad_norm},
      {"tokens", "data/tokens", s->tokens},
      {"fill", "data/fill", s->fill},
      {"seconds", "speed/seconds", s->seconds},
      {"data_wait", "speed/data_wait", s->data_wait},
      {"tokens_per_second", "speed/tokens_per_second", s->tokens / s->seconds},
      {"flops_per_second", "speed/flops_per_second", s->flops / s->seconds},
      {"expert_load_max", "router/expert_load_max", s->load_max},
  };
  log_step(s);
  Line line;
  line_begin(&line, s->step);
  for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
    if (!isfinite(figures[i].value)) continue;
    fprintf(line.f, ",\"%s\":%.9g", figures[i].key, figures[i].value);
    events_scalar(r->events, figures[i].tag, figures[i].value);
  }
  if (s->skipped) {
    fputs(",\"skipped\":", line.f);
    json_write_string(line.f, s->bad);
  }
  line_end(&line, r);
  r->done = s->step + 1;
  events_write(r->events, r->done);
  r->per_step = r->per_step == 0 ? s->seconds : 0.95 * r->per_step + 0.05 * s->seconds;
  if (r->terminal) draw_bar(r);
}

// ---- expert loads ----

static void figure_scalar(Report *r, const char *tag, double v) {
  if (isfinite(v)) events_scalar(r->events, tag, v);
}

// The load figures of a modality as router/text_entropy or, in an evaluation, eval/text_experts/entropy.
static void figure_load(Report *r, const char *prefix, const LoadFigures *f) {
  const Figure figures[] = {{.tag = "entropy", .value = f->entropy},
                            {.tag = "max_over_mean", .value = f->max_over_mean},
                            {.tag = "dead", .value = isnan(f->entropy) ? NAN : f->dead}};
  for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
    char tag[64];
    snprintf(tag, sizeof tag, "%s%s", prefix, figures[i].tag);
    figure_scalar(r, tag, figures[i].value);
  }
}

static void write_load(Report *r) {
  static const char *const names[MODALITIES] = {[TEXT] = "text", [IMAGE] = "image"};
  const Dims *d = &r->dims;
  int64_t n = (int64_t)d->L * (d->E[TEXT] + d->E[IMAGE]);
  LoadFigures figures[MODALITIES];
  load_figures(r->load, d, figures);
  double *shares = xmalloc((size_t)n * sizeof *shares);
  Line line;
  line_begin(&line, r->done);
  fprintf(line.f, ",\"load\":{\"steps\":%d", r->load_steps);
  for (int m = 0; m < MODALITIES; m++) {
    const LoadFigures *f = &figures[m];
    fprintf(line.f, ",\"%s_experts\":{\"dead\":%d,\"all\":%d,\"entropy\":", names[m], f->dead, f->experts);
    json_write_number(line.f, f->entropy);
    fputs(",\"max_over_mean\":", line.f);
    json_write_number(line.f, f->max_over_mean);
    fputc('}', line.f);
    char tag[32];
    snprintf(tag, sizeof tag, "router/%s_", names[m]);
    figure_load(r, tag, f);
    snprintf(tag, sizeof tag, "router/%s_load", names[m]);
    int64_t filled = 0;
    for (int l = 0; l < d->L; l++) filled += load_shares(r->load, d, l, m, shares + filled);
    events_histogram(r->events, tag, shares, filled);
  }
  fputc('}', line.f);
  line_end(&line, r);
  events_write(r->events, r->done);
  memset(r->load, 0, (size_t)n * sizeof *r->load);
  r->load_steps = 0;
  free(shares);
}

void report_load(Report *r, const double *load, const Dims *d) {
  int64_t n = (int64_t)d->L * (d->E[TEXT] + d->E[IMAGE]);
  if (!r->load) {
    r->dims = *d;
    r->load = xcalloc((size_t)n, sizeof *r->load);
  }
  for (int64_t i = 0; i < n; i++) r->load[i] += load[i];
  r->load_steps++;
  if (r->done % LOAD_STEPS == 0) write_load(r);
}

// ---- evaluations ----

void report_evaluation(Report *r, const Evaluation *e, int64_t step) {
  char *json = evaluation_json(e, step), *line = xasprintf("%s\n", json);
  append_record(&r->metrics, line, strlen(line));
  free(json);
  free(line);
  figure_scalar(r, "eval/flow", e->flow);
  figure_scalar(r, "eval/retrieval", e->retrieval);
  figure_scalar(r, "eval/retrieval_training", e->retrieval_training);
  figure_scalar(r, "eval/caption_bits_per_byte", e->bits_per_byte[EVAL_TRUE]);
  figure_scalar(r, "eval/caption_bits_per_byte_shuffled", e->bits_per_byte[EVAL_SHUFFLED]);
  for (int p = 0; p < EVAL_PAIRINGS; p++) {
    for (int k = 0; k < EVAL_TIMES; k++) {
      char tag[64];
      snprintf(tag, sizeof tag, "eval_flow_at%s/t%.1f", p == EVAL_SHUFFLED ? "_shuffled" : "", eval_time[k]);
      figure_scalar(r, tag, e->flow_at[k][p]);
      snprintf(tag, sizeof tag, "eval_x_mse%s/t%.1f", p == EVAL_SHUFFLED ? "_shuffled" : "", eval_time[k]);
      figure_scalar(r, tag, e->x_mse[k][p]);
    }
  }
  figure_load(r, "eval/text_experts_", &e->load[TEXT]);
  figure_load(r, "eval/image_experts_", &e->load[IMAGE]);
  events_write(r->events, step);
}

void report_drawings(Report *r, const char *path, int64_t step) {
  Error err;
  size_t bytes;
  int width, height;
  char *png = file_read(path, (size_t)1 << 30, &bytes, &err);
  if (png && image_info((const uint8_t *)png, bytes, &width, &height, &err) == 0) {
    events_image(r->events, "drawings", width, height, png, bytes);
    events_write(r->events, step);
  } else {
    log_warn("%s is not in the event file: %s", path, err.text);
  }
  free(png);
}

void report_close(Report *r) {
  if (!r) return;
  if (r->load_steps) write_load(r);
  if (r->terminal) {
    erase_bar();
    log_set_hook(NULL);
  }
  append_close(&r->metrics);
  events_close(r->events);
  free(r->load);
  free(r);
}
