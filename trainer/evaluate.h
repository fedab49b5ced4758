// Quality figures on a fixed set of captioned images, with fixed times and noise: the same for every run that holds out
// the same samples, whatever its seed. They use the weights that engine_use_ema chose. Processes that train together
// (Config.processes) measure together: each runs its share of the packs, and all have the same figures. What ends one
// of them early, a signal too, ends all with its error.
#ifndef TESSERA_EVALUATE_H
#define TESSERA_EVALUATE_H

#include "data/stream.h"
#include "data/tokenizer.h"
#include "trainer/engine.h"
#include "trainer/output/evaluation.h"

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

// Measures items [n]. Captions are cut to data.max_caption tokens. -1 with *err set when one does not fit the engine.
int evaluate(Engine *e, const Tokenizer *t, const EvalItem *items, int n, Evaluation *out, Error *err);
// Caption retrieval alone: the share of the images whose own caption has a lower summed negative log likelihood
// (caption and eos) than EVAL_CHOICES - 1 other captions of the items; ties miss.
int evaluate_retrieval(Engine *e, const Tokenizer *t, const EvalItem *items, int n, double *out, Error *err);
#endif
