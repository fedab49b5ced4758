#include "trainer/output/evaluation.h"

#include "base/base.h"
#include "base/json.h"
#include "base/text_out.h"

#include <math.h>
#include <stdio.h>

const double eval_time[EVAL_TIMES] = {.1, .3, .5, .7, .9};

// A figure, or "-" where it was not measured.
static const char *figure(char text[16], double v) {
  if (isnan(v)) return "-";
  snprintf(text, 16, "%.4g", v);
  return text;
}

void evaluation_print(const Evaluation *e) {
  char a[16], b[16], c[16], d[16];
  if (!e->documents) {
    log_info("no captioned images: nothing to measure");
    return;
  }
  if (e->of_training)
    log_info("eval of %d training samples: flow %s  caption retrieval among %d: %s", e->documents, figure(a, e->flow),
             EVAL_CHOICES, figure(b, e->retrieval));
  else
    log_info("eval of %d held-out samples: flow %s  caption retrieval among %d: %s held out, %s training", e->documents,
             figure(a, e->flow), EVAL_CHOICES, figure(b, e->retrieval), figure(c, e->retrieval_training));
  log_info("  caption bits/byte %s, with another image %s", figure(a, e->bits_per_byte[EVAL_TRUE]),
           figure(b, e->bits_per_byte[EVAL_SHUFFLED]));
  log_info("     t       flow  shuffled     x mse  shuffled");
  for (int k = 0; k < EVAL_TIMES; k++)
    log_info("  %4.1f %10s %9s %9s %9s", eval_time[k], figure(a, e->flow_at[k][EVAL_TRUE]),
             figure(b, e->flow_at[k][EVAL_SHUFFLED]), figure(c, e->x_mse[k][EVAL_TRUE]),
             figure(d, e->x_mse[k][EVAL_SHUFFLED]));
  for (int m = 0; m < MODALITIES; m++)
    if (!isnan(e->load[m].entropy))
      log_info("  %s experts: load entropy %s, max/mean %s, %d of %d dead", m == TEXT ? "text" : "image",
               figure(a, e->load[m].entropy), figure(b, e->load[m].max_over_mean), e->load[m].dead, e->load[m].experts);
}

static void write_pairings(FILE *f, const char *name, const double *v, int n, int pairing) {
  fprintf(f, ",\"%s%s\":[", name, pairing == EVAL_SHUFFLED ? "_shuffled" : "");
  for (int k = 0; k < n; k++) {
    if (k) fputc(',', f);
    json_write_number(f, v[k * EVAL_PAIRINGS + pairing]);
  }
  fputc(']', f);
}

static void write_figure(FILE *f, const char *name, double v) {
  fprintf(f, ",\"%s\":", name);
  json_write_number(f, v);
}

char *evaluation_json(const Evaluation *e, int64_t step) {
  TextOut out;
  FILE *f = text_begin(&out);
  const char *of = !e->documents ? "null" : e->of_training ? "\"training\"" : "\"held_out\"";
  fprintf(f, "{\"step\":%lld,\"eval\":{\"documents\":%d,\"of\":%s", (long long)step, e->documents, of);
  write_figure(f, "flow", e->flow);
  write_figure(f, "retrieval", e->retrieval);
  write_figure(f, "retrieval_training", e->retrieval_training);
  write_figure(f, "caption_bits_per_byte", e->bits_per_byte[EVAL_TRUE]);
  write_figure(f, "caption_bits_per_byte_shuffled", e->bits_per_byte[EVAL_SHUFFLED]);
  fputs(",\"t\":[", f);
  for (int k = 0; k < EVAL_TIMES; k++) fprintf(f, "%s%g", k ? "," : "", eval_time[k]);
  fputc(']', f);
  for (int p = 0; p < EVAL_PAIRINGS; p++) {
    write_pairings(f, "flow_at", &e->flow_at[0][0], EVAL_TIMES, p);
    write_pairings(f, "x_mse", &e->x_mse[0][0], EVAL_TIMES, p);
  }
  for (int m = 0; m < MODALITIES; m++) {
    fprintf(f, ",\"%s_experts\":{\"dead\":%d,\"all\":%d", m == TEXT ? "text" : "image", e->load[m].dead,
            e->load[m].experts);
    write_figure(f, "entropy", e->load[m].entropy);
    write_figure(f, "max_over_mean", e->load[m].max_over_mean);
    fputc('}', f);
  }
  fputs("}}", f);
  return text_end(&out);
}
