// A step's losses from the metrics its programs summed.
#ifndef TESSERA_LOSSES_H
#define TESSERA_LOSSES_H

#include "trainer/engine.h"

typedef struct StepLosses {
  double ce_caption, ce_text;    // nats, means over their own targets; NAN without any
  double ce, flow, balance, z;   // ce: mean over all targets; flow: mean over noised image elements
  double total;                  // flow + ce_weight ce + balance + z
  double targets, noised_tokens; // what the means were divided by
  double load_max;               // largest expert load over its fair share, any layer and modality
} StepLosses;

// Reads the metrics of the step just replayed.
StepLosses losses_read(const Engine *e);
#endif
