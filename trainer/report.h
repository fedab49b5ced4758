// What a run says while it runs: one line a step, a progress bar with the time left on a terminal, and metrics.jsonl.
#ifndef TESSERA_REPORT_H
#define TESSERA_REPORT_H

#include "base/base.h"

#include <stdio.h>

typedef struct StepReport {
  int64_t step;               // 0-based
  double loss;                // what is minimised: flow + ce_weight ce + balance + z
  double flow;                // mean over noised image elements
  double ce;                  // mean over all targets, nats
  double ce_caption, ce_text; // means over their own targets; NAN without any
  double balance, z;          // router terms
  double lr, grad_norm;
  double tokens;    // without filler
  double fill;      // tokens / slots
  double flops;     // as for MFU
  double seconds;   // whole step
  double data_wait; // of it, waiting for the loader
  int skipped;      // nothing was updated
  char bad[64];     // the first tensor that was not finite
  double load_max;  // largest share of an expert's load over its fair share, any layer
} StepReport;

typedef struct Report Report;

// Opens metrics.jsonl in the run folder for appending; with `from_step` > 0 lines of later steps are dropped first, so
// that a resumed run has no doubles. NULL with *err set.
Report *report_open(const char *folder, int64_t from_step, int64_t steps, Error *err);
void report_step(Report *r, const StepReport *s);
// Appends one JSON object to metrics.jsonl; `json` is its text.
void report_json(Report *r, const char *json);
void report_close(Report *r);
#endif
