// What collectives of the process group carry.
#ifndef TESSERA_GROUP_RATES_H
#define TESSERA_GROUP_RATES_H

#include "kernels/kernels.h"

// Measures a backend's collectives, the ways that the config chooses taken, with large tensors and with small ones, in
// up to 256 MB of its memory and a fraction of a second. All processes of a group of several call it together, when the
// devices are connected and their queues are empty; all get the same. Not measured where one of them has no memory.
GroupRates group_rates_measure(const Backend *b);
#endif
