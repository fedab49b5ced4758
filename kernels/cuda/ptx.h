// Hopper's own instructions (sm_90a), one function each: barriers that count bytes, the copy engine, warpgroup
// products. "shared" addresses are 32-bit offsets into the block's shared memory (shared_address). What sm_80 has too
// is in mma.h.
#ifndef TESSERA_PTX_H
#define TESSERA_PTX_H

#include "kernels/cuda/mma.h"

// Kernels in these instructions are empty in code for other targets, and the host takes code for compute capability 9.0
// to have them: without this, code for plain sm_90 would run and compute nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for 90a, not 90 (make CUDA_ARCH=90a): only sm_90a has warpgroup products"
#endif

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

// Brings the line of an address of device memory into L2.
static __device__ inline void prefetch_l2(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ---- warpgroup matrix products ----

template <int REGISTERS> static __device__ inline void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> static __device__ inline void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Describes an operand in shared memory with the 128-byte swizzle (chunk ^= row % 8, in 1024-byte blocks of 8 rows of
// 128 bytes, aligned to 1024). Inner-contiguous (K-major): a row is 64 inner elements of one tile row; blocks of 8 tile
// rows follow each other; 16 further along the inner dimension is 32 bytes further. Otherwise (MN-major): a row is 64
// tile rows at one inner element; blocks of 8 inner elements follow each other, and the next 64 tile rows are `next_64`
// bytes on; 16 further along the inner dimension is 2048 bytes further. (PTX ISA, matrix descriptor; CUTLASS
// mma_traits_sm90_gmma.hpp: MN-major leading offset = from 64 to 64 tile rows, stride offset = from 8 to 8 inner
// elements.)
static __device__ inline uint64_t wgmma_descriptor(uint32_t at, int next_64) {
  return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(next_64 >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}
static __device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> static __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Behind wgmma_wait: keeps the compiler from moving uses of d in front of it.
template <int REGISTERS> static __device__ inline void wgmma_keep(float (&d)[REGISTERS]) {
#pragma unroll
  for (int i = 0; i < REGISTERS; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64, N] += a [64, 16] b [N, 16]^T, N = 128 or 256; TRANS: the operand is MN-major. Warp w of the group holds rows
// 16 w .., each 8 columns as mma_add's c: d[4 j .. 4 j + 3] are of the columns from 8 j.
#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4), WGMMA_4(d, i + 8), WGMMA_4(d, i + 12)
// clang-format off
template <int TRANS_A, int TRANS_B>
static __device__ inline void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "%64, %65, add, 1, 1, %66, %67;}"
               : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48)
               : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B));
}
template <int TRANS_A, int TRANS_B>
static __device__ inline void wgmma_bf16(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
               "%128, %129, add, 1, 1, %130, %131;}"
               : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48), WGMMA_16(d, 64), WGMMA_16(d, 80), WGMMA_16(d, 96), WGMMA_16(d, 112)
               : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B));
}
// clang-format on
#undef WGMMA_16
#undef WGMMA_4
#endif
