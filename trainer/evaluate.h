// Quality figures on a fixed set of captioned images, with fixed times and noise: the same for every run that holds out
// the same samples, whatever its seed. They use the weights that engine_use_ema chose.
#ifndef TESSERA_EVALUATE_H
#define TESSERA_EVALUATE_H

#include "data/stream.h"
#include "data/tokenizer.h"
#include "model/expert_load.h"
#include "trainer/engine.h"

#include <stdbool.h>

enum { EVAL_TIMES = 5, EVAL_CHOICES = 16 };
enum { EVAL_TRUE, EVAL_SHUFFLED, EVAL_PAIRINGS }; // the sample's own partner, or that of another with another caption
extern const double eval_time[EVAL_TIMES];        // .1 .3 .5 .7 .9

// A captioned image as evaluation takes it.
typedef struct EvalItem {
  const char *caption; // the source's
  size_t caption_bytes;
  ImageGrid grid;
  uint8_t *patches; // [rows * columns, 3p^2]
} EvalItem;

// Loads the captioned samples among list [n], in order, at most `most`; other kinds are passed over, images that cannot
// be decoded are named in a warning and left out. *items [returned count] is malloc'd.
int eval_items_load(const Config *c, Source *const *source, const HeldOut *list, int64_t n, int most, EvalItem **items);
// Frees *items too.
void eval_items_free(EvalItem *items, int n);
// Captioned samples that are not held out, mixed over all sources, at most `most`; returns how many. *list is malloc'd.
int64_t eval_list_training(const Config *c, Source *const *source, int sources, int most, HeldOut **list);

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

// Measures items [n]. Captions are cut to data.max_caption tokens. -1 with *err set when one does not fit the engine.
int evaluate(Engine *e, const Tokenizer *t, const EvalItem *items, int n, Evaluation *out, Error *err);
// Caption retrieval alone: the share of the images whose own caption has a lower summed negative log likelihood
// (caption and eos) than EVAL_CHOICES - 1 other captions of the items; ties miss.
int evaluate_retrieval(Engine *e, const Tokenizer *t, const EvalItem *items, int n, double *out, Error *err);
// A short table to the log, which says whose figures they are; without documents, that there is nothing to measure.
void evaluation_print(const Evaluation *e);
// One JSON object on one line, {"step":N,"eval":{..}}, null for what was not measured; malloc'd.
char *evaluation_json(const Evaluation *e, int64_t step);
#endif
