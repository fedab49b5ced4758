// What else a plan could be: the lines of --plan that set it beside one policy for all, and beside more memory.
#ifndef TESSERA_ALTERNATIVES_H
#define TESSERA_ALTERNATIVES_H

#include "trainer/engine.h"

// Appends, for an engine that was recorded for training beside a device: the rates that it reckons with, what every
// policy costs, what one policy for all tensors would come to, how far the plan is from what no plan can beat, what
// a step would take with all of the optimizer's state on the device, and what a gigabyte more would buy.
void alternatives_print(Engine *e, FILE *f);
#endif
