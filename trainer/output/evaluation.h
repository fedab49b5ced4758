// The quality figures of an evaluation, as the log and metrics.jsonl show them (docs/metrics.md).
#ifndef TESSERA_EVALUATION_H
#define TESSERA_EVALUATION_H

#include "model/expert_load.h"

#include <stdbool.h>

enum { EVAL_TIMES = 5, EVAL_CHOICES = 16 };
enum { EVAL_TRUE, EVAL_SHUFFLED, EVAL_PAIRINGS }; // the sample's own partner, or that of another with another caption
extern const double eval_time[EVAL_TIMES];        // .1 .3 .5 .7 .9

// A figure that cannot be measured is NAN: flow without noised images, shuffled ones with fewer than 2 different
// captions, retrieval with fewer than EVAL_CHOICES.
typedef struct Evaluation {
  int documents;
  bool of_training; // the documents are training samples; the caller's to set; evaluate leaves false
  double flow;      // velocity error as the training loss has it, at the quantiles (i + 1/2) / n of the training times
  double flow_at[EVAL_TIMES][EVAL_PAIRINGS]; // the same at fixed times, with true and shuffled captions
  double x_mse[EVAL_TIMES][EVAL_PAIRINGS];   // mean (x^ - x)^2 per element
  double bits_per_byte[EVAL_PAIRINGS]; // of caption and eos, per byte of caption, given the true, a shuffled image
  double retrieval;                    // images whose own caption has a lower summed nll than 15 others
  double retrieval_training;           // the same of training images; the caller's to set; evaluate leaves NAN
  LoadFigures load[MODALITIES];        // over everything that was measured; entropy NAN without any
} Evaluation;

// A short table to the log, which says whose figures they are; without documents, that there is nothing to measure.
void evaluation_print(const Evaluation *e);
// One JSON object on one line, {"step":N,"eval":{..}}, null for what was not measured; malloc'd.
char *evaluation_json(const Evaluation *e, int64_t step);
#endif
