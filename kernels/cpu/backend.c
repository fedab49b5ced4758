// The CPU backend's table of kernels.
#include "kernels/cpu/cpu.h"

#include <stdlib.h>

static void *cpu_alloc(size_t bytes) {
  size_t rounded = (bytes + 255) / 256 * 256;
  void *p = aligned_alloc(256, rounded);
  return p ? memset(p, 0, rounded) : NULL;
}

static void cpu_copy(void *dst, const void *src, size_t bytes) {
  memcpy(dst, src, bytes);
}

const Backend backend_cpu = {
    .name = "cpu",
    .dtype_bytes = {[DT_ACT] = sizeof(real), [DT_REAL] = sizeof(real), [DT_I32] = 4, [DT_U8] = 1, [DT_F64] = 8},
    .gradient_per_micro = 1,
    .alloc = cpu_alloc,
    .release = free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .fn =
        {
#define OP_ROW(name, in, out) [OP_##name] = cpu_##name,
            OP_LIST(OP_ROW)
#undef OP_ROW
        },
};
