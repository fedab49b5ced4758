// A step's losses and its expert loads from the metrics its programs summed.
#ifndef TESSERA_LOSSES_H
#define TESSERA_LOSSES_H

#include "kernels/kernels.h"
#include "model/config/config.h"

typedef struct StepLosses {
  double ce_caption, ce_text;    // nats, means over their own targets; NAN without any
  double ce, flow, balance, z;   // ce: mean over all targets; flow: over noised image elements; NAN without any
  double total;                  // flow + ce_weight ce + balance + z, of those that there are
  double targets, noised_tokens; // what the means were divided by
  double load_max;               // largest expert load over its fair share, any layer and modality; 0 without any
} StepLosses;

// From a step's metrics [metrics_size doubles]: Metrics, then the load.
StepLosses losses_of(const Config *c, const double *metrics);
// The load in them, as the functions below take it.
static inline const double *metrics_load(const double *metrics) {
  return metrics + sizeof(Metrics) / sizeof(double);
}

// How evenly the assignments of a modality's tokens spread over its experts, over the layers that saw any; the two
// figures are NAN where none did.
typedef struct LoadFigures {
  double entropy;       // of the load over the experts / log(experts), mean over layers: 1 = even
  double max_over_mean; // the fullest expert's load over the mean load, largest of all layers
  int dead, experts;    // experts without a single assignment, of those in all layers
} LoadFigures;

// The functions below take the load of Metrics: [L][E_0 + E_1] assignments counted per expert.

// Load over fair share of the E_m experts of modality m in one layer, out [E_m]. Returns how many it wrote: none where
// the layer saw no token of the modality.
int load_shares(const double *load, const Dims *d, int layer, int m, double *out);
void load_figures(const double *load, const Dims *d, LoadFigures out[MODALITIES]);
#endif
