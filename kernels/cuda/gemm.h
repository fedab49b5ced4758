// Matrix products over row groups whose extents lie on the device. One launch covers all groups of both sides (text and
// image, of different widths); nothing waits for a count on the host.
//
//   gemm_rows     C[r] = A[r] op(B_g)   for rows r of every group g   (forward, input gradient)
//   gemm_weights  dW_g (+)= sum over rows r of group g of A[r]^T B[r]  (weight gradient)
//
// Products accumulate in fp32. Row r of a side is row r of its own A, B and C views: begin[g] counts from there.
#ifndef TESSERA_GEMM_H
#define TESSERA_GEMM_H

#include "kernels/cuda/cuda.h"

// Rows [begin, begin + count) of a group: fixed numbers plus, where a pointer is given, a number on the device, read at
// index g. (EXT_SEGMENTS: begin_fixed 1, count = &n_segments, count_fixed -1.)
typedef struct GemmExtent {
  const int32_t *begin, *count; // [groups] on the device, or NULL
  int begin_fixed, count_fixed;
} GemmExtent;

// The product taken as dA, the gradient of an activation a = swiglu(pre) that was weighted by w: what EXPERT_DOWN_BWD
// wants is stored instead of C. For gemm_rows with b_transposed and a_index, without bias, add, act or c_float.
enum { GEMM_DOT_COLUMNS = 32 };
typedef struct GemmSwigluBackward {
  const bf16 *pre;     // [rows, 2N] pairs (gate 2f, up 2f + 1); NULL: an ordinary product
  const float *weight; // of row r: weight[a_index[r]]
  bf16 *dpre;          // [rows, 2N] gradient of pre for w dA
  bf16 *sa;            // [rows, N] w a
  float *dot;          // [ceil(N / GEMM_DOT_COLUMNS), rows] <dA, a> over so many columns
} GemmSwigluBackward;

typedef struct GemmSide {
  int groups; // 0: the side is absent
  GemmExtent extent;
  int rows;                         // capacity: no extent of the side reaches beyond it
  const bf16 *a;                    // [rows, K] (gemm_weights: [rows, M])
  const int32_t *a_index, *b_index; // row r of A (B) is row index[r] / index_divisor of it; NULL: row r
  const bf16 *b;                    // [groups, N, K], or [groups, K, N] with b_transposed (gemm_weights: [rows, N])
  void *c;                          // [rows, N], bf16 or fp32 (gemm_weights: [groups, M, N] fp32)
  int M, N, K;                      // M: gemm_weights only; K: gemm_rows only. Multiples of 8; 0: nothing to do
  const bf16 *bias;                 // [N] or NULL; gemm_rows only, as are the following
  const bf16 *add;                  // [rows, N] or NULL: added to the product
  bf16 *act;                        // [rows, N/2] or NULL: SwiGLU of the row's (gate, up) pairs 2f, 2f + 1, from the
                                    //   rounded C
  GemmSwigluBackward swiglu;
} GemmSide;

typedef struct Gemm {
  GemmSide side[MODALITIES];
  int b_transposed;   // gemm_rows: B_g is [K, N]
  int c_float;        // gemm_rows: C is fp32
  int accumulate;     // gemm_weights: add to dW; else overwrite, groups without rows with zeros
  int index_divisor;  // of a_index and b_index; 0 means 1
  const float *scale; // on the device: what products are multiplied by, before bias, add and accumulation; NULL: 1. Not
                      //   with `swiglu`
  void *scratch;      // gemm_rows_scratch / gemm_weights_scratch bytes, aligned to 16; NULL: tiles with a long inner
                      //   dimension stay whole, and slow where they are few
} Gemm;

// C of the rows of every group; other rows of C are not written.
void gemm_rows(const Gemm *g, cudaStream_t stream);
void gemm_weights(const Gemm *g, cudaStream_t stream);

// Bytes of g->scratch; they depend on groups, rows, M, N and K alone (pointers are not looked at). Usually 0 for
// gemm_rows; for gemm_weights only where no counts could make parts of a group worth while.
size_t gemm_rows_scratch(const Gemm *g);
size_t gemm_weights_scratch(const Gemm *g);
#endif
