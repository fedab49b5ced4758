// Adam's moments in bf16 (train.moments): rounded up or down by chance, the likelier the nearer, so that what is added
// to one step by step stays in the mean even where it is less than half of a bf16's last place. Chances are drawn from
// the step's number and the element's, so that any order, thread, process and resumed run rounds alike.
#ifndef TESSERA_MOMENTS_H
#define TESSERA_MOMENTS_H

#include "base/philox.h"

#include <string.h>

// Words of elements 4 quad .. 4 quad + 3: the lower half is for m, the upper for v.
PHILOX_FN Philox4 moment_chances(int64_t step, int64_t quad) {
  return philox4(0, (uint64_t)step, STREAM_MOMENTS, (uint32_t)quad);
}

// The bf16 (its bits) below x in magnitude, or with a chance as large as x's way from it to the next that one. Of
// `chance` the lower 16 bits count.
PHILOX_FN uint16_t moment_round(float x, uint32_t chance) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (uint16_t)(bits >> 16 | ((bits & 0x7fffffu) != 0) << 6);
  return (uint16_t)((bits + (chance & 0xffffu)) >> 16);
}

PHILOX_FN float moment_float(uint16_t moment) {
  uint32_t bits = (uint32_t)moment << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
#endif
