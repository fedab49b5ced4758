// What a run says while it runs: one line a step, how long it will take, a progress bar on a terminal, and in the run
// folder metrics.jsonl (docs/metrics.md) and a TensorBoard event file with the same figures, expert loads and sheets.
//
// TensorBoard's step is the number of steps done: step line n of metrics.jsonl is its step n + 1.
#ifndef TESSERA_REPORT_H
#define TESSERA_REPORT_H

#include "trainer/output/evaluation.h"
#include "trainer/output/figures.h"

typedef struct StepReport {
  int64_t step; // 0-based
  double figure[FIGURES];
  int skipped;  // nothing was updated
  int spike;    // since the gradient norm is beyond train.spike; else what `bad` names is not finite
  char bad[64]; // "spike", "the loss", or the first parameter whose gradient is not finite
} StepReport;

typedef struct Report Report;

// Opens metrics.jsonl in the run folder for appending, without the lines of steps from `from_step` on that it may hold,
// so that a resumed run has no doubles, and begins a new event file, which tells TensorBoard the same. An evaluation or
// a load line at from_step itself stays: it was made when that many steps were done. NULL with *err set.
//
// Later failures to write are warnings: a run does not end for its figures.
Report *report_open(const char *folder, int64_t from_step, int64_t steps, Error *err);
// Whether metrics.jsonl in the folder holds the evaluation made when `step` steps were done.
bool report_evaluated(const char *folder, int64_t step);
void report_step(Report *r, const StepReport *s);
// After report_step: the step's expert loads, [L][E_0 + E_1] assignments as they follow Metrics. Summed over up to 50
// steps, then written: per modality a line of figures and a histogram of load / fair share over all experts.
void report_load(Report *r, const double *load, const Dims *d);
// `step`: steps done.
void report_evaluation(Report *r, const Evaluation *e, int64_t step);
// A sheet of generated images, a PNG file. `step`: steps done. One that cannot be read is a warning.
void report_drawings(Report *r, const char *path, int64_t step);
// Writes the loads that are still unwritten. NULL is allowed.
void report_close(Report *r);
#endif
