// Warpgroup matrix products (sm_90a): bf16 operands, fp32 sums in the registers of the four warps of a group. Warp w
// holds rows 16 w .. of the 64, each 8 columns as mma_add's c (mma.h): d[4 j .. 4 j + 3], or d[j], are of the columns
// from 8 j.
//
// Sums may not be touched from a product's start until its group has been waited for: ptxas proves it or puts a wait
// behind every product, which fails the build.
#ifndef TESSERA_WGMMA_H
#define TESSERA_WGMMA_H

#include "kernels/cuda/ptx.h"

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
// Behind wgmma_wait: keep the compiler from moving uses of d in front of it.
template <int REGISTERS> static __device__ inline void wgmma_keep(float (&d)[REGISTERS]) {
#pragma unroll
  for (int i = 0; i < REGISTERS; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n> static __device__ inline void wgmma_keep(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+f"(d[i][j])::"memory");
}

// ---- the products; each starts, and belongs to the group of the next wgmma_commit ----

// The first 16, 32, 64, 128 operands, and sums as operands: 4, 16, 64 of d [n]; 2, 8 fragments of d [n][4].
#define WGMMA_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_32                                                                                                  \
  WGMMA_LIST_16 ", "                                                                                                   \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_64                                                                                                  \
  WGMMA_LIST_32 ", "                                                                                                   \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_128                                                                                                 \
  WGMMA_LIST_64 ", "                                                                                                   \
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                     \
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                     \
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "         \
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4), WGMMA_4(d, i + 8), WGMMA_4(d, i + 12)
#define WGMMA_64(d, i) WGMMA_16(d, i), WGMMA_16(d, i + 16), WGMMA_16(d, i + 32), WGMMA_16(d, i + 48)
#define WGMMA_PAIR(d, i) WGMMA_4(d[i], 0), WGMMA_4(d[i + 1], 0)
#define WGMMA_8(d, i) WGMMA_PAIR(d, i), WGMMA_PAIR(d, i + 2), WGMMA_PAIR(d, i + 4), WGMMA_PAIR(d, i + 6)

// d [64, N] += a [64, 16] b [N, 16]^T, N = 128 or 256; TRANS: the operand is MN-major.
template <int TRANS_A, int TRANS_B> static __device__ inline void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_LIST_64
               "}, %64, %65, add, 1, 1, %66, %67;}"
               : WGMMA_64(d, 0)
               : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B));
}
template <int TRANS_A, int TRANS_B> static __device__ inline void wgmma_bf16(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WGMMA_LIST_128
               "}, %128, %129, add, 1, 1, %130, %131;}"
               : WGMMA_64(d, 0), WGMMA_64(d, 64)
               : "l"(a), "l"(b), "n"(TRANS_A), "n"(TRANS_B));
}

// d [64, N] = a [64, 16] b [N, 16]^T, N = 32, 64 or 128, added to d if `add`; TRANS: the operand is MN-major.
template <int TRANS_A = 0, int TRANS_B = 0>
static __device__ inline void wgmma_score(float (&d)[4][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, %18, 0; "
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" WGMMA_LIST_16
               "}, %16, %17, add, 1, 1, %19, %20;}"
               : WGMMA_PAIR(d, 0), WGMMA_PAIR(d, 2)
               : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
}
template <int TRANS_A = 0, int TRANS_B = 0>
static __device__ inline void wgmma_score(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_LIST_32
               "}, %32, %33, add, 1, 1, %35, %36;}"
               : WGMMA_8(d, 0)
               : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
}
template <int TRANS_A = 0, int TRANS_B = 0>
static __device__ inline void wgmma_score(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_LIST_64
               "}, %64, %65, add, 1, 1, %67, %68;}"
               : WGMMA_8(d, 0), WGMMA_8(d, 8)
               : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
}

// d [64, N] += a [64, 16] b [16, N], N = 64 or 128; a: this warp's rows as an A fragment.
static __device__ inline void wgmma_add(float (&d)[8][4], const uint32_t a[4], uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_LIST_32
               "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;}"
               : WGMMA_8(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ inline void wgmma_add(float (&d)[16][4], const uint32_t a[4], uint64_t b) {
  asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_LIST_64
               "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;}"
               : WGMMA_8(d, 0), WGMMA_8(d, 8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef WGMMA_8
#undef WGMMA_PAIR
#undef WGMMA_64
#undef WGMMA_16
#undef WGMMA_4
#undef WGMMA_LIST_128
#undef WGMMA_LIST_64
#undef WGMMA_LIST_32
#undef WGMMA_LIST_16
#endif
