#include "trainer/report.h"

#include "base/json.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct Report {
  FILE *metrics;
  int64_t steps;
  int terminal;
  double per_step; // smoothed seconds
  double redrawn;
  int64_t done;
};

// The bar stands on the last line of the terminal; log lines erase it first.
static void erase_bar(void) {
  fputs("\r\033[K", stderr);
}

// Copies the lines whose step lies before from_step to a new file that then takes the old one's place.
static int drop_later(const char *path, int64_t from_step, Error *err) {
  Error missing;
  size_t bytes;
  char *text = file_read(path, (size_t)1 << 40, &bytes, &missing);
  if (!text) return 0;
  char *next = xasprintf("%s.new", path);
  FILE *f = fopen(next, "wb");
  int bad = f == NULL;
  for (char *line = text; !bad && *line;) {
    char *end = strchr(line, '\n');
    if (!end) break; // a line that a crash cut short
    const char *key = strstr(line, "\"step\":");
    if (key && key < end && atoll(key + 7) < from_step)
      bad = fwrite(line, 1, (size_t)(end - line + 1), f) != (size_t)(end - line + 1);
    line = end + 1;
  }
  if (f && fclose(f) != 0) bad = 1;
  if (!bad && rename(next, path) != 0) bad = 1;
  if (bad) error_set(err, "check space and permissions", "cannot rewrite %s: %s", path, strerror(errno));
  free(next);
  free(text);
  return bad ? -1 : 0;
}

Report *report_open(const char *folder, int64_t from_step, int64_t steps, Error *err) {
  char *path = xasprintf("%s/metrics.jsonl", folder);
  if (drop_later(path, from_step, err) != 0) {
    free(path);
    return NULL;
  }
  FILE *f = fopen(path, "ab");
  if (!f) {
    error_set(err, "check the folder's permissions", "cannot write %s: %s", path, strerror(errno));
    free(path);
    return NULL;
  }
  free(path);
  Report *r = xcalloc(1, sizeof *r);
  *r = (Report){.metrics = f, .steps = steps, .terminal = isatty(STDERR_FILENO), .done = from_step};
  if (r->terminal) log_set_hook(erase_bar);
  return r;
}

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

static void print_mean(FILE *f, const char *name, double v) {
  if (isfinite(v)) fprintf(f, ",\"%s\":%.9g", name, v);
}

void report_step(Report *r, const StepReport *s) {
  FILE *f = r->metrics;
  char caption[16] = "-", text[16] = "-";
  if (isfinite(s->ce_caption)) snprintf(caption, sizeof caption, "%.3f", s->ce_caption);
  if (isfinite(s->ce_text)) snprintf(text, sizeof text, "%.3f", s->ce_text);
  log_info("step %5lld  loss %.4f  flow %.4f  ce %s cap %s text  balance %.4f  lr %.2e  norm %.2f  %.1fk tok/s  "
           "%.0f GFLOP/s  %.0f ms (data %.1f)%s%s",
           (long long)s->step + 1, s->loss, s->flow, caption, text, s->balance + s->z, s->lr, s->grad_norm,
           s->tokens / s->seconds / 1e3, s->flops / s->seconds / 1e9, s->seconds * 1e3, s->data_wait * 1e3,
           s->skipped ? "  SKIPPED: not finite: " : "", s->skipped ? s->bad : "");
  fprintf(f, "{\"step\":%lld", (long long)s->step);
  print_mean(f, "loss", s->loss);
  print_mean(f, "flow", s->flow);
  print_mean(f, "ce", s->ce);
  print_mean(f, "ce_caption", s->ce_caption);
  print_mean(f, "ce_text", s->ce_text);
  print_mean(f, "balance", s->balance);
  print_mean(f, "z", s->z);
  print_mean(f, "lr", s->lr);
  print_mean(f, "grad_norm", s->grad_norm);
  fprintf(f,
          ",\"tokens\":%.0f,\"fill\":%.4f,\"seconds\":%.6f,\"data_wait\":%.6f,\"tokens_per_second\":%.1f,"
          "\"flops_per_second\":%.4e,\"expert_load_max\":%.3f",
          s->tokens, s->fill, s->seconds, s->data_wait, s->tokens / s->seconds, s->flops / s->seconds, s->load_max);
  if (s->skipped) {
    fputs(",\"skipped\":", f);
    json_write_string(f, s->bad);
  }
  fputs("}\n", f);
  fflush(f);
  r->done = s->step + 1;
  r->per_step = r->per_step == 0 ? s->seconds : 0.95 * r->per_step + 0.05 * s->seconds;
  if (r->terminal) draw_bar(r);
}

void report_json(Report *r, const char *json) {
  fprintf(r->metrics, "%s\n", json);
  fflush(r->metrics);
}

void report_close(Report *r) {
  if (!r) return;
  if (r->terminal) {
    erase_bar();
    log_set_hook(NULL);
  }
  fclose(r->metrics);
  free(r);
}
