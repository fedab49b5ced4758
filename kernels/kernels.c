#include "kernels/kernels.h"

const OpInfo op_info[OP_COUNT] = {
#define OP_ROW(name, in, out) {#name, in, out},
    OP_LIST(OP_ROW)
#undef OP_ROW
};
