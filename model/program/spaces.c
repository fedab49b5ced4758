#include "model/program/spaces.h"

const SpaceInfo space_info[SPACE_COUNT] = {
    [SPACE_ARENA] = {"activations (arena)", SPACE_BYTES, SPACE_LAID_OUT},
    [SPACE_HOST] = {"offloaded (host slab)", SPACE_BYTES, SPACE_LAID_OUT | SPACE_ON_HOST},
    [SPACE_WEIGHTS] = {"weights", SPACE_ACT, SPACE_SAVED},
    [SPACE_REMAINDER] = {"remainders of the weights", SPACE_REMAINDERS, SPACE_SAVED},
    [SPACE_GRADS] = {"gradients", SPACE_REAL, 0},
    [SPACE_MICRO_GRADS] = {"micro-step gradients", SPACE_REAL, 0},
    [SPACE_HOST_GRADS] = {"gradients of layers", SPACE_REAL, SPACE_ON_HOST},
    [SPACE_PARAM_SUMS] = {"sums of gradients", SPACE_BYTES, 0},
    [SPACE_ADAM_M] = {"Adam m", SPACE_MOMENTS, SPACE_CLEARED | SPACE_SAVED},
    [SPACE_ADAM_V] = {"Adam v", SPACE_MOMENTS, SPACE_CLEARED | SPACE_SAVED},
    [SPACE_EMA] = {"EMA", SPACE_REAL, SPACE_SAVED},
    [SPACE_STAGING] = {"staged pack", SPACE_BYTES, 0},
    [SPACE_BATCH] = {"live pack", SPACE_BYTES, 0},
    [SPACE_METRICS] = {"metrics", SPACE_BYTES, 0},
    [SPACE_SCALARS] = {"step scalars", SPACE_BYTES, 0},
    [SPACE_STATUS] = {"update status", SPACE_BYTES, 0},
    [SPACE_INPUT] = {"sampler input", SPACE_BYTES, 0},
    [SPACE_SCRATCH] = {"scratch", SPACE_BYTES, 0},
};

size_t space_element(const Backend *b, Space space) {
  switch (space_info[space].element) {
  case SPACE_BYTES:
    break;
  case SPACE_ACT:
    return b->dtype_bytes[DT_ACT];
  case SPACE_REAL:
    return b->dtype_bytes[DT_REAL];
  case SPACE_MOMENTS:
    return b->dtype_bytes[DT_MOMENT];
  case SPACE_REMAINDERS:
    return (size_t)b->remainder_bytes;
  }
  return 0;
}
