#include "data/flow_time.h"

#include "base/philox.h"

#include <math.h>

FlowTimes flow_times_of(const Config *c) {
  return (FlowTimes){.mean = c->flow.t_mean, .std = c->flow.t_std, .uniform = c->flow.t_uniform};
}

float flow_time_draw(const FlowTimes *f, uint64_t seed, uint64_t draw, int ordinal) {
  Philox4 words = philox4(seed, draw, STREAM_TIME | (uint32_t)ordinal << 8, 0);
  if (philox_uniform(words.v[2]) < f->uniform) return philox_uniform(words.v[3]);
  float normal, other;
  philox_normal2(words.v[0], words.v[1], &normal, &other);
  return 1.0f / (1.0f + expf(-(float)(f->mean + f->std * normal)));
}

// The share of the draws below sigmoid(x).
static double share_below(const FlowTimes *f, double x) {
  double normal = f->std > 0 ? 0.5 * erfc((f->mean - x) / (f->std * sqrt(2))) : x > f->mean;
  return (1 - f->uniform) * normal + f->uniform / (1 + exp(-x));
}

double flow_time_quantile(const FlowTimes *f, double p) {
  double low = -800, high = 800; // sigmoid of these is 0 and 1 in double
  for (int i = 0; i < 80; i++) {
    double middle = (low + high) / 2;
    *(share_below(f, middle) < p ? &low : &high) = middle;
  }
  return 1 / (1 + exp(-low));
}
