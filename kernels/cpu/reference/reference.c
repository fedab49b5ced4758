#include "kernels/cpu/reference/reference.h"

const KernelFn reference[OP_COUNT] = {
#define REFERENCE_ROW(name) [OP_##name] = reference_##name,
    REFERENCE_LIST(REFERENCE_ROW)
#undef REFERENCE_ROW
};
