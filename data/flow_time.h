// The distribution of the flow times t in (0, 1) of training: 0 is noise, 1 the image.
#ifndef TESSERA_FLOW_TIME_H
#define TESSERA_FLOW_TIME_H

#include "model/config/config.h"

#include <stdint.h>

// sigmoid(N(mean, std)), but for a share `uniform` of the draws, which are uniform.
typedef struct FlowTimes {
  double mean, std;
  double uniform; // 0 to 1
} FlowTimes;

// As the config says.
FlowTimes flow_times_of(const Config *c);
// The time of noised image `ordinal` of document `draw`: the first block of its STREAM_TIME, words 0 and 1 for the
// normal, 2 to choose, 3 for the uniform.
float flow_time_draw(const FlowTimes *f, uint64_t seed, uint64_t draw, int ordinal);
// The t below which a share p of the draws lies, 0 < p < 1.
double flow_time_quantile(const FlowTimes *f, double p);
#endif
