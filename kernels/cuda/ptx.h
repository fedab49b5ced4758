// Hopper's own instructions (sm_90a), one function each: barriers that count bytes and the copy engine. Warpgroup
// products: wgmma.h. "shared" addresses are 32-bit offsets into the block's shared memory (shared_address). What sm_80
// has too is in mma.h.
#ifndef TESSERA_PTX_H
#define TESSERA_PTX_H

#include "kernels/cuda/mma.h"

// Kernels in these instructions are empty in code for other targets, and the host takes code for compute capability 9.0
// to have them: without this, code for plain sm_90 would run and compute nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for 90a, not 90 (make CUDA_ARCH=90a): only sm_90a has warpgroup products"
#endif

// Whether this build has a kernel's body for this card: only code built for sm_90a does. Other builds that run on such
// a card were translated from older PTX.
static inline bool built_for_sm90(const void *kernel) {
  cudaFuncAttributes a;
  return cudaFuncGetAttributes(&a, kernel) == cudaSuccess && a.binaryVersion == 90 && a.ptxVersion >= 90;
}

// ---- barriers in shared memory that count arrivals and bytes ----

static __device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine; before the __syncthreads() that publishes them.
static __device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and keeps the phase open until that many bytes have been copied too.
static __device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Keeps the phase open until that many bytes have been copied; the thread has yet to arrive in it.
static __device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives when all cp.async copies that this thread has issued are done.
static __device__ inline void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity (0 first) is over. A new barrier's phase "before the first" has parity 1 and is over.
static __device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{\n\t"
                 ".reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t"
                 "}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!over);
}
// A barrier of `threads` threads of the block, by number; 0 is __syncthreads().
static __device__ inline void named_barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Orders ordinary accesses to shared memory that are known to this thread before later ones by the copy engine and the
// tensor cores.
static __device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8 x 8 matrices to shared memory, as load_matrix reads them.
static __device__ inline void store_matrix(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// ---- the copy engine: boxes of a tensor that a map describes; elements outside of it arrive as zeros ----

static __device__ inline void tma_load_2d(uint32_t to, const void *map, uint32_t barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
               "[%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(x), "r"(y)
               : "memory");
}
static __device__ inline void tma_load_3d(uint32_t to, const void *map, uint32_t barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
               "%5}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// ---- the copy engine: bytes from shared to global memory, both aligned to 16 bytes ----

static __device__ inline void bulk_store(void *to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
// Adds floats to those that are there.
static __device__ inline void bulk_add(float *to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
static __device__ inline void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's committed copies have read shared memory; until they are done.
static __device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
static __device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Orders accesses to all memory between this thread's ordinary instructions and the copy engine, either way.
static __device__ inline void fence_async_proxy_everywhere() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// ---- how a multiprocessor's registers are shared out between warpgroups ----

template <int REGISTERS> static __device__ inline void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> static __device__ inline void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
#endif
