// Tensor-core products in the manner of Ampere: bf16 tiles in shared memory, fragments in a warp's registers.
//
// Tiles are [rows, D] with 16-byte chunks swizzled so that the eight rows that ldmatrix reads at once lie in different
// banks. Fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments"): lane = 4 g + t holds of C [16, 8] the elements
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of A [16, 16] the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8),
// (g + 8, 2t + 8); of B [16, 8] the pairs (2t, g), (2t + 8, g). So two C fragments side by side, packed, are an A.
#ifndef TESSERA_MMA_H
#define TESSERA_MMA_H

#include "kernels/cuda/cuda.h"

static __device__ inline uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// Keeps the compiler from computing everything derived from x once, outside a loop: registers are dearer than sums.
static __device__ inline uint32_t recompute(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Copies 16 (4) bytes from global memory to a shared address in the background; when !valid, writes zeros and reads
// nothing.
static __device__ inline void copy16_async(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
static __device__ inline void copy4_async(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
static __device__ inline void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most `pending` of this thread's committed groups are under way.
template <int pending> static __device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices; lane i gives the shared address of row i % 8 of matrix i / 8. Each lane gets the pair (g, 2t) of
// each matrix, or of its transpose.
static __device__ inline void load_matrix(uint32_t r[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
static __device__ inline void load_matrix_transposed(uint32_t r[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]
static __device__ inline void mma_add(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x; -inf gives 0.
static __device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
