// What the fused AdaLN (adaln.cu) and its unfused twin (adaln_unfused.cu) share: loads of streamed rows, and sums over
// the rows of each segment.
//
// The used rows are cut into `runs` runs of equal length, one a block. A piece is what a run and a segment have in
// common. Down the rows, run + segment grows from piece to piece, so it numbers a slot that is the piece's own: a block
// writes its pieces' sums there, and adaln_segment_sums adds each segment's pieces in the order of the rows. The order
// depends on the pack and the device's size alone.
#ifndef TESSERA_ADALN_H
#define TESSERA_ADALN_H

#include "kernels/cuda/activation.h"
#include "kernels/cuda/sums.h"

#define ADALN_EPS 1e-6f
enum { ADALN_SUMS = 3, ADALN_MAX_DIM = CUDA_MOST_DIM };
enum { ADALN_RUN_THREADS = 512 };     // of a block with sums over segments, at most
enum { ADALN_SHARED_COLUMNS = 2048 }; // of all groups of a block, where there are several

static_assert(ADALN_RUN_THREADS * 8 >= ADALN_MAX_DIM, "a thread owns 8 columns of a row");

// Ends the process where the width is not one that the kernels are made for.
static inline void adaln_check_dim(int C) {
  cuda_check(C % 8 || C > ADALN_MAX_DIM ? cudaErrorInvalidValue : cudaSuccess, "AdaLN: dim", __FILE__, __LINE__);
}

// A grid for one pass over the rows with sums over segments: threads own 8 columns each, `warps` warps share a row, a
// block works on `groups` rows at a time.
typedef struct AdalnRuns {
  int warps, groups;
  int blocks; // = runs
} AdalnRuns;
AdalnRuns adaln_runs(int C);
// The same for a kernel that runs beside collectives, in no more blocks.
AdalnRuns adaln_runs_beside(int C);

// fp32 elements of the pieces' sums, [runs + SEG][ADALN_SUMS][C].
int64_t adaln_pieces_size(const Dims *dims);

// dmod[g, columns[k] + i] = sum of pieces[.., k, i] over the pieces of segment g, for k < sums and every used segment.
typedef struct AdalnSums {
  const float *pieces; // [runs + SEG][ADALN_SUMS][C]
  bf16 *dmod;          // [SEG, M]
  int columns[ADALN_SUMS], sums, runs;
} AdalnSums;
void adaln_segment_sums(const KernelCall *c, const AdalnSums *s);

// The unfused twin: the same ops as separate kernels for residual, norm, modulation, activation and mask.
extern "C" void cuda_ADALN_FWD_unfused(const KernelCall *c);
extern "C" void cuda_ADALN_BWD_unfused(const KernelCall *c);
size_t adaln_unfused_scratch(OpKind kind, const Dims *dims, const OpArgs *args);

// Rows of a run; the last runs may be shorter or empty.
static __device__ inline int adaln_run_rows(const BatchDims *dims, int runs) {
  return ceil_div(dims->n_text + dims->n_image, runs);
}

// Leaves a piece's sums in its slot, those of the block's groups added in order.
template <int SUMS>
static __device__ void adaln_piece_store(float *slot, const float sums[SUMS][8], int C, int group, int groups,
                                         int column, float *shared) {
  if (groups == 1) {
    if (column >= C) return;
#pragma unroll
    for (int k = 0; k < SUMS; k++) store_sums(slot + k * C + column, sums[k]);
    return;
  }
  int width = ADALN_SHARED_COLUMNS / groups;
#pragma unroll
  for (int k = 0; k < SUMS; k++) store_sums(shared + k * ADALN_SHARED_COLUMNS + group * width + column, sums[k]);
  __syncthreads();
  for (int i = threadIdx.x; i < SUMS * (C / 4); i += blockDim.x) {
    int k = i / (C / 4), first = i % (C / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int other = 0; other < groups; other++) {
      float4 v = *reinterpret_cast<const float4 *>(shared + k * ADALN_SHARED_COLUMNS + other * width + first);
      sum = add4(sum, v);
    }
    *reinterpret_cast<float4 *>(slot + k * C + first) = sum;
  }
  __syncthreads();
}

// 16 bytes by a load that is not moved away from where it is written, ahead of what it is to overlap with; zeros where
// !there.
#define ADALN_LOAD(load, v, p, there)                                                                                  \
  asm volatile("{\n\t"                                                                                                 \
               ".reg .pred there;\n\t"                                                                                 \
               "setp.ne.s32 there, %5, 0;\n\t"                                                                         \
               "mov.b32 %0, 0;\n\t"                                                                                    \
               "mov.b32 %1, 0;\n\t"                                                                                    \
               "mov.b32 %2, 0;\n\t"                                                                                    \
               "mov.b32 %3, 0;\n\t"                                                                                    \
               "@there " load " {%0, %1, %2, %3}, [%4];\n\t"                                                           \
               "}"                                                                                                     \
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)                                                        \
               : "l"(p), "r"((int)(there)))

// 8 bf16 that nobody in this block will read again: they go past L1, which the modulation rows then keep.
static __device__ inline uint4 load_once(const bf16 *p, bool there) {
  uint4 v;
  ADALN_LOAD("ld.global.nc.L1::no_allocate.v4.u32", v, p, there);
  return v;
}

// 8 bf16 of a modulation row.
static __device__ inline uint4 load_kept(const bf16 *p, bool there) {
  uint4 v;
  ADALN_LOAD("ld.global.nc.v4.u32", v, p, there);
  return v;
}

// 8 elements of a modulation row, or zeros.
static __device__ inline void load_mod8(const bf16 *p, bool there, float x[8]) {
  unpack8(there ? __ldg(reinterpret_cast<const uint4 *>(p)) : make_uint4(0, 0, 0, 0), x);
}

// xnew = x + gate * branch, rounded to bf16: forward and backward must agree to the bit.
static __device__ inline uint4 adaln_residual(uint4 x, const float gate[8], uint4 branch) {
  float a[8], b[8];
  unpack8(x, a);
  unpack8(branch, b);
#pragma unroll
  for (int i = 0; i < 8; i++) a[i] = __fmaf_rn(gate[i], b[i], a[i]);
  return pack8(a);
}
#endif
