// How evenly tokens spread over experts, from the metrics that a step's programs summed.
#ifndef TESSERA_EXPERT_LOAD_H
#define TESSERA_EXPERT_LOAD_H

#include "kernels/kernels.h"

// The load in a step's metrics [metrics_size doubles], as the functions below take it.
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
