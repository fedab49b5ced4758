// The figures of a step, one table: its line in the log, metrics.jsonl, TensorBoard and --dump's losses.json are loops
// over it, and a test holds docs/metrics.md to it. A new loss is a field of Metrics and a term of metrics_losses
// (kernels.h), and a row here.
#ifndef TESSERA_FIGURES_H
#define TESSERA_FIGURES_H

#include "kernels/kernels.h"
#include "model/params.h"

#include <stdio.h>

// What the figures of a step are made of. What the ops summed, tokens, slots, flops and data_wait add up over the
// micro-steps; the others are one a step.
typedef struct StepSums {
  Metrics m;
  double load_max;             // the fullest expert's load over its fair share, any layer; 0 without any load
  double tokens, slots, flops; // tokens: without filler; slots: with it; flops: that the model needs
  double data_wait, seconds;   // waiting for the loader; the whole step
  double peak_flops;           // a second, that the device's data sheet promises; 0: not known
  double lr, grad_norm;
} StepSums;

// FIGURE(id, unit, key, tag, dump, line, scale, value). NULL: not shown there.
//   key    in metrics.jsonl
//   tag    in TensorBoard
//   dump   in --dump's losses.json
//   line   in the step's line, with a conversion for `scale` times the figure
//   value  from the sums s and the config c; NAN where there is none
// The order is that of the line and of metrics.jsonl.
// clang-format off
#define STEP_FIGURES(FIGURE)                                                                                           \
  FIGURE(LOSS, "", "loss", "loss/total", "total", "  loss %.4f", 1, total_loss(c, s))                                  \
  FIGURE(FLOW, "", "flow", "loss/flow", "flow", "  flow %.4f", 1, mean_flow(s))                                        \
  FIGURE(CE, "nats", "ce", "loss/ce", "ce", NULL, 1, mean_ce(s))                                                       \
  FIGURE(CE_CAPTION, "nats", "ce_caption", "loss/ce_caption", "ce_caption",                                            \
         "  ce_caption %.3f", 1, mean_ce_of(s, TARGET_CAPTION))                                                        \
  FIGURE(CE_TEXT, "nats", "ce_text", "loss/ce_text", "ce_text", "  ce_text %.3f", 1, mean_ce_of(s, TARGET_TEXT))       \
  FIGURE(BALANCE, "", "balance", "router/balance", "balance", NULL, 1, s->m.balance)                                   \
  FIGURE(Z, "", "z", "router/z", "z", NULL, 1, s->m.z)                                                                 \
  FIGURE(ROUTER, "", NULL, NULL, NULL, "  balance %.4f", 1, s->m.balance + s->m.z)                                     \
  FIGURE(LR, "", "lr", "optimizer/lr", NULL, "  lr %.2e", 1, s->lr)                                                    \
  FIGURE(GRAD_NORM, "", "grad_norm", "optimizer/grad_norm", "grad_norm", "  norm %.2f", 1, s->grad_norm)               \
  FIGURE(TARGETS, "", NULL, NULL, "targets", NULL, 1, targets(s))                                                      \
  FIGURE(NOISED_TOKENS, "", NULL, NULL, "noised_tokens", NULL, 1, noised_tokens(c, s))                                 \
  FIGURE(TOKENS, "", "tokens", "data/tokens", NULL, NULL, 1, s->tokens)                                                \
  FIGURE(FILL, "0 to 1", "fill", "data/fill", NULL, NULL, 1, s->tokens / s->slots)                                     \
  FIGURE(TOKEN_RATE, "1/s", "tokens_per_second", "speed/tokens_per_second", NULL,                                      \
         "  %.1fk tok/s", 1e-3, s->tokens / s->seconds)                                                                \
  FIGURE(FLOP_RATE, "1/s", "flops_per_second", "speed/flops_per_second", NULL,                                         \
         "  %.0f GFLOP/s", 1e-9, s->flops / s->seconds)                                                                \
  FIGURE(MFU, "0 to 1", "mfu", "speed/mfu", NULL, " (MFU %.1f%%)", 100, mfu(s))                                        \
  FIGURE(SECONDS, "s", "seconds", "speed/seconds", NULL, "  %.0f ms", 1e3, s->seconds)                                 \
  FIGURE(DATA_WAIT, "s", "data_wait", "speed/data_wait", NULL, " (data %.1f)", 1e3, s->data_wait)                      \
  FIGURE(LOAD_MAX, "", "expert_load_max", "router/expert_load_max", NULL, NULL, 1, s->load_max)
// clang-format on

typedef enum FigureId {
#define FIGURE_ENUM(id, unit, key, tag, dump, line, scale, value) FIGURE_##id,
  STEP_FIGURES(FIGURE_ENUM)
#undef FIGURE_ENUM
      FIGURES
} FigureId;

typedef struct FigureInfo {
  const char *unit, *key, *tag, *dump, *line;
  double scale;
} FigureInfo;
extern const FigureInfo figure_info[FIGURES];

// Puts the metrics of a step [metrics_size doubles] into the sums that come from them.
void figures_sum(const Config *c, const double *metrics, StepSums *s);
// Every figure of a step.
void figures_of(const Config *c, const StepSums *s, double figure[FIGURES]);

// "  loss 1.0421  flow -  ..": what the step's line shows. "-" is a figure that does not exist; one whose text is in
// brackets is left out.
void figures_print(FILE *f, const double figure[FIGURES]);
#endif
