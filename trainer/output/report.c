#include "trainer/output/report.h"

#include "base/json.h"
#include "base/text_out.h"
#include "data/image.h"
#include "trainer/output/append.h"
#include "trainer/output/tail.h"
#include "trainer/output/tensorboard.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
  LOAD_STEPS = 50,   // whose expert loads are summed before they are written: single ones are noisy, histograms many
  TIMED_STEPS = 10,  // after which the run says how long it will take
  SHORT_SECONDS = 10 // that are not worth a line
};

struct Report {
  AppendFile metrics;
  EventWriter *events;
  int64_t steps;
  int terminal;
  double per_step; // smoothed seconds
  double redrawn;
  int64_t from, done;
  Dims dims;      // of load; L = 0 before the first
  double *load;   // [L][E_0 + E_1] sums since the last load line
  int load_steps; // in those sums
};

// The bar stands on the last line of the terminal; log lines erase it first.
static void erase_bar(void) {
  fputs("\r\033[K", stderr);
}

// The step of a line of metrics.jsonl and whether it is a step line, which counts its own step from 0; other lines
// ({"step":N,"eval":{..}}) say how many steps were done. -1 for what is no line of it.
static int64_t line_step(const TailLine *line, bool *is_step) {
  static const char key[] = "{\"step\":";
  const char *number = line->text + sizeof key - 1, *end = line->text + line->bytes;
  if (end <= number || memcmp(line->text, key, sizeof key - 1) != 0) return -1;
  const char *colon = memchr(number, ':', (size_t)(end - number));
  if (!colon || colon + 1 == end) return -1;
  *is_step = colon[1] != '{';
  return atoll(number);
}

// Cuts the file behind the last whole line of the first from_step steps: steps only grow in it, and cutting needs no
// space.
static int drop_later(AppendFile *f, int64_t from_step, Error *err) {
  Tail tail;
  TailLine line;
  if (tail_open(&tail, f->path, err) != 0) return -1;
  int64_t keep = 0;
  int more;
  while (!keep && (more = tail_line(&tail, &line, err)) > 0) {
    bool is_step = false;
    int64_t step = line_step(&line, &is_step);
    if (step >= 0 && (is_step ? step < from_step : step <= from_step)) keep = line.end;
  }
  tail_close(&tail);
  if (!keep && more < 0) return -1;
  if (keep < f->size && ftruncate(f->fd, (off_t)keep) != 0)
    return error_set(err, "check the folder's permissions", "cannot shorten %s: %s", f->path, strerror(errno));
  f->size = keep;
  return 0;
}

bool report_evaluated(const char *folder, int64_t step) {
  Error missing;
  Tail tail;
  TailLine line;
  char *path = xasprintf("%s/metrics.jsonl", folder), *wanted = xasprintf("{\"step\":%lld,\"eval\":", (long long)step);
  bool found = false, is_step, earlier = false;
  if (tail_open(&tail, path, &missing) == 0) {
    while (!found && !earlier && tail_line(&tail, &line, &missing) > 0) {
      int64_t at = line_step(&line, &is_step);
      earlier = at >= 0 && at + 1 < step;
      found = line.bytes > strlen(wanted) && memcmp(line.text, wanted, strlen(wanted)) == 0;
    }
    tail_close(&tail);
  }
  free(wanted);
  free(path);
  return found;
}

Report *report_open(const char *folder, int64_t from_step, int64_t steps, Error *err) {
  Report *r = xcalloc(1, sizeof *r);
  *r = (Report){
      .metrics.fd = -1, .steps = steps, .terminal = isatty(STDERR_FILENO), .from = from_step, .done = from_step};
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

// Begins a line of metrics.jsonl; line_end writes it.
static void line_begin(TextOut *line, int64_t step) {
  fprintf(text_begin(line), "{\"step\":%lld", (long long)step);
}

static void line_end(TextOut *line, Report *r) {
  fputs("}\n", line->f);
  char *text = text_end(line);
  append_record(&r->metrics, text, line->bytes);
  free(text);
}

// ---- steps ----

// "1:02:03" or "2:03"
static void write_time(char text[32], double seconds) {
  long long s = (long long)(seconds + 0.5), h = s / 3600;
  if (h)
    snprintf(text, 32, "%lld:%02lld:%02lld", h, s / 60 % 60, s % 60);
  else
    snprintf(text, 32, "%lld:%02lld", s / 60, s % 60);
}

static double seconds_left(const Report *r) {
  return r->per_step * (double)(r->steps - r->done);
}

// Columns of the terminal; where nobody knows, as many as terminals always had.
static int terminal_columns(void) {
  struct winsize size;
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

// As wide as the terminal has room: a line that wraps would not be erased.
static void draw_bar(Report *r) {
  enum { WIDTH = 30, NARROWEST = 5 };
  double now = time_now();
  if (now - r->redrawn < 0.1 && r->done < r->steps) return;
  r->redrawn = now;
  char left[32], text[96];
  write_time(left, seconds_left(r));
  int n = snprintf(text, sizeof text, "%lld/%lld  %s left", (long long)r->done, (long long)r->steps, left);
  int room = terminal_columns() - 1, width = (int)min_i64(WIDTH, room - n - 3);
  int full = r->steps > 0 ? (int)(width * r->done / r->steps) : width;
  if (width >= NARROWEST)
    fprintf(stderr, "\r\033[K[%.*s%.*s] %s", full, "##############################", width - full,
            "..............................", text);
  else
    fprintf(stderr, "\r\033[K%.*s", room, text);
  fflush(stderr);
}

// How long the run will take, as far as its first steps can tell.
static void log_time_left(const Report *r) {
  char left[32];
  if (seconds_left(r) < SHORT_SECONDS) return;
  write_time(left, seconds_left(r));
  log_info("%s to go at %.0f ms a step; evaluations and checkpoints come on top", left, r->per_step * 1e3);
}

static void log_step(const StepReport *s) {
  TextOut line;
  figures_print(text_begin(&line), s->figure);
  char *text = text_end(&line);
  log_info("step %5lld%s%s%s", (long long)s->step + 1, text,
           !s->skipped ? ""
           : s->spike  ? "  SKIPPED: "
                       : "  SKIPPED: not finite: ",
           s->skipped ? s->bad : "");
  free(text);
}

void report_step(Report *r, const StepReport *s) {
  double seconds = s->figure[FIGURE_SECONDS];
  log_step(s);
  TextOut line;
  line_begin(&line, s->step);
  for (int i = 0; i < FIGURES; i++) {
    const FigureInfo *info = &figure_info[i];
    if (!isfinite(s->figure[i])) continue;
    if (info->key) fprintf(line.f, ",\"%s\":%.9g", info->key, s->figure[i]);
    if (info->tag) events_scalar(r->events, info->tag, s->figure[i]);
  }
  if (s->skipped) {
    fputs(",\"skipped\":", line.f);
    json_write_string(line.f, s->bad);
  }
  line_end(&line, r);
  r->done = s->step + 1;
  events_write(r->events, r->done);
  // The first step warms up what later ones find warm.
  r->per_step = r->done - r->from <= 2 ? seconds : 0.9 * r->per_step + 0.1 * seconds;
  if (r->done == r->from + TIMED_STEPS) log_time_left(r);
  if (r->terminal) draw_bar(r);
}

// ---- expert loads ----

static void figure_scalar(Report *r, const char *tag, double v) {
  if (isfinite(v)) events_scalar(r->events, tag, v);
}

// The load figures of a modality as router/text_entropy or, in an evaluation, eval/text_experts/entropy.
static void figure_load(Report *r, const char *prefix, const LoadFigures *f) {
  const struct {
    const char *name;
    double value;
  } figures[] = {
      {"entropy", f->entropy}, {"max_over_mean", f->max_over_mean}, {"dead", isnan(f->entropy) ? NAN : f->dead}};
  for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
    char tag[64];
    snprintf(tag, sizeof tag, "%s%s", prefix, figures[i].name);
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
  TextOut line;
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
