// The CPU backend's table of kernels.
#include "kernels/cpu/cpu.h"

#include "base/machine.h"
#include "base/ranks.h"

#include <stdlib.h>
#include <sys/mman.h>

// Slabs of many megabytes lie on huge pages where the system has them: fewer TLB misses in every product. Written once,
// so that a machine without room says so now, and the first step finds its pages.
static void *cpu_alloc(size_t bytes) {
  const size_t huge = (size_t)2 << 20, align = bytes >= huge ? huge : 256;
  size_t rounded = (bytes + align - 1) / align * align;
  void *p = aligned_alloc(align, rounded);
  if (p && align == huge) madvise(p, rounded, MADV_HUGEPAGE);
  if (!p) return NULL;
#pragma omp parallel for schedule(static) if (rounded > huge)
  for (size_t at = 0; at < rounded; at += huge) memset((char *)p + at, 0, rounded - at < huge ? rounded - at : huge);
  return p;
}

// Four fifths of what this process and the ranks beside it may use, shared: the rest is for data, decoding and
// everybody
static int64_t cpu_memory(void) {
  return machine_memory("", NULL) / 5 * 4 / ranks_on_host();
}

static int cpu_open(Error *err) {
  return blas_open(err) != 0 ? -2 : 0;
}

static void cpu_copy(void *dst, const void *src, size_t bytes) {
  memcpy(dst, src, bytes);
}

static void cpu_clear(void *p, size_t bytes) {
  memset(p, 0, bytes);
}

const Backend backend_cpu = {
    .name = "cpu",
    .dtype_bytes = {[DT_ACT] = sizeof(real),
                    [DT_REAL] = sizeof(real),
                    [DT_I32] = 4,
                    [DT_U8] = 1,
                    [DT_F64] = 8,
                    [DT_MOMENT] = sizeof(real)},
    .gradient_per_micro = 1,
    .head_chunk = 256,
    .open = cpu_open,
    .kernels = blas_kernels,
    .assumed = {.bytes = 10e9, .flops = 100e9},
    .assumed_link = {.d2h = 5e9, .h2d = 5e9, .both_d2h = 5e9, .both_h2d = 5e9},
    .assumed_group = {.reduce = 1e9, .gather = 1e9, .latency = 50e-6},
    .memory = cpu_memory,
    .alloc_unit = 1,
    .alloc = cpu_alloc,
    .release = free,
    .host_alloc = cpu_alloc,
    .host_release = free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .clear = cpu_clear,
    .fn =
        {
#define OP_ROW(name, ...) [OP_##name] = cpu_##name,
            OP_LIST(OP_ROW)
#undef OP_ROW
        },
};
