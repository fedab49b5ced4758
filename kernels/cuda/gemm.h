// Matrix products over row groups whose extents lie on the device. One launch covers all groups of both sides (text and
// image, of different widths); nothing waits for a count on the host.
//
//   gemm_rows     C[r] = A[r] op(B_g)   for rows r of every group g   (forward, input gradient)
//   gemm_weights  dW_g (+)= sum over rows r of group g of A[r]^T B[r]  (weight gradient)
//
// Products accumulate in fp32. Row r of a side is row r of its own A, B and C views: begin[g] counts from there. What
// becomes of a product is said by its epilogue, one of the Gemm... structs below a side.
#ifndef TESSERA_GEMM_H
#define TESSERA_GEMM_H

#include "kernels/cuda/cuda.h"

// Rows [begin, begin + count) of a group: fixed numbers plus, where a pointer is given, a number on the device, read at
// index g; `more` belongs to the count, too. (EXT_SEGMENTS: begin_fixed 1, count = &n_segments, count_fixed -1.)
typedef struct GemmExtent {
  const int32_t *begin, *count; // [groups] on the device, or NULL
  int begin_fixed, count_fixed;
  const int32_t *more; // as count
} GemmExtent;

typedef struct GemmSide {
  int groups; // 0: the side is absent
  GemmExtent extent;
  int rows;                         // capacity: no extent of the side reaches beyond it
  const bf16 *a;                    // [rows, K] (gemm_weights: [rows, M])
  const int32_t *a_index, *b_index; // row r of A (B) is row index[r] / index_divisor of it; NULL: row r
  const bf16 *b;                    // [groups, N, K], or [groups, K, N] with b_transposed (gemm_weights: [rows, N])
  int M, N, K;                      // M: gemm_weights only; K: gemm_rows only. Multiples of 8; 0: nothing to do
} GemmSide;

// Rows that no group has, which the launch of a product writes beside it: those of a part of the pack.
typedef enum GemmPart {
  GEMM_NO_ROWS,
  GEMM_TEXT_ROWS,
  GEMM_IMAGE_ROWS,
  GEMM_FILLER_ROWS,    // behind text and image
  GEMM_TEXT_SEGMENT,   // of a tensor [SEG, .]: row 0,
  GEMM_UNUSED_SEGMENTS // and those behind the last segment
} GemmPart;
enum { GEMM_FILLS = 3 };
typedef struct GemmFill {
  GemmPart part;
  int width;        // a multiple of 8
  bf16 *to;         // [rows, width]
  const bf16 *from; // likewise, which is copied, or NULL: zeros
} GemmFill;

typedef struct Gemm {
  GemmSide side[MODALITIES]; // both gather the same operand, or neither does
  int b_transposed;          // gemm_rows: B_g is [K, N]
  int index_divisor;         // of a_index and b_index; 0 means 1
  int leaves;                // multiprocessors that are left to another lane's op (KernelCall)
  int reads;                 // the epilogue reads a tensor with rows like C's
  int same_tiles;            // both sides get tiles of one kind, not each those that are best for it
  int16_t tiles[MODALITIES]; // columns of a side's tiles; 0: those that are best
  void *scratch;             // gemm_rows_scratch / gemm_weights_scratch bytes, aligned to 16; NULL: tiles with a long
                             //   inner dimension stay whole, and slow where they are few
  int settled;               // the extents' numbers were there before the kernel in front of this one began
  const BatchDims *dims;     // on the device; where there are fills
  int fill_rows;             // capacity of what is filled
  GemmFill fill[GEMM_FILLS]; // gemm_rows only; the first GEMM_NO_ROWS ends them
} Gemm;

// ---- epilogues: what becomes of a product, by side. SPLITS: its inner dimension may be cut into parts ----

// c = scale A B + bias + add, rounded.
typedef struct GemmStore {
  static constexpr bool SPLITS = true;
  bf16 *c;            // [rows, N]
  const bf16 *bias;   // [N] or NULL
  const bf16 *add;    // [rows, N] or NULL
  const float *scale; // on the device, one for both sides, or NULL: 1
} GemmStore;

// c = A B, in fp32.
typedef struct GemmStoreFloat {
  static constexpr bool SPLITS = true;
  float *c; // [rows, N]
} GemmStoreFloat;

// c = A B, rounded, and the SwiGLU of its (gate 2f, up 2f + 1) pairs.
typedef struct GemmStoreSwiglu {
  static constexpr bool SPLITS = false;
  bf16 *c;   // [rows, N]
  bf16 *act; // [rows, N/2]
} GemmStoreSwiglu;

// A B is dA, the gradient of an activation a = swiglu(pre) that was weighted by w: what EXPERT_DOWN_BWD wants of it.
enum { GEMM_DOT_COLUMNS = 32 };
typedef struct GemmSwigluBackward {
  static constexpr bool SPLITS = false;
  const bf16 *pre;     // [rows, 2N] pairs (gate 2f, up 2f + 1)
  const float *weight; // of row r: weight[a_index[r]]
  bf16 *dpre;          // [rows, 2N] gradient of pre for w dA
  bf16 *sa;            // [rows, N] w a
  float *dot;          // [ceil(N / GEMM_DOT_COLUMNS), rows] <dA, a> over that many columns each
} GemmSwigluBackward;

// The same without weights: what SHARED_DOWN_BWD wants.
typedef struct GemmSharedBackward {
  static constexpr bool SPLITS = false;
  const bf16 *pre; // [rows, 2N]
  bf16 *dpre;      // [rows, 2N]
  bf16 *sa;        // [rows, N] a
} GemmSharedBackward;

// dw (+)= scale A^T B.
typedef struct GemmStoreWeights {
  static constexpr bool SPLITS = true;
  float *dw;          // [groups, M, N]
  const float *scale; // on the device, one for both sides, or NULL: 1
  int accumulate;     // else groups without rows become zeros
} GemmStoreWeights;

// The rows of every group; other rows of what an epilogue stores are written by g->fill or not at all. Only the
// products of GEMM_PRODUCTS (gemm_tiles.h) are built: others end the process.
void gemm_rows(const Gemm *g, const GemmStore end[MODALITIES], cudaStream_t stream);
void gemm_rows(const Gemm *g, const GemmStoreFloat end[MODALITIES], cudaStream_t stream);
void gemm_rows(const Gemm *g, const GemmStoreSwiglu end[MODALITIES], cudaStream_t stream);
void gemm_rows(const Gemm *g, const GemmSwigluBackward end[MODALITIES], cudaStream_t stream);
void gemm_rows(const Gemm *g, const GemmSharedBackward end[MODALITIES], cudaStream_t stream);
void gemm_weights(const Gemm *g, const GemmStoreWeights end[MODALITIES], cudaStream_t stream);

// Columns of the tiles that a side gets; 0: it has nothing to do.
void gemm_rows_tiles(const Gemm *g, int columns[MODALITIES]);
void gemm_weights_tiles(const Gemm *g, int columns[MODALITIES]);

// Bytes of g->scratch; they depend on groups, rows, M, N and K alone (pointers are not looked at). Usually 0 for
// gemm_rows; for gemm_weights only where no counts could make parts of a group worth while. Epilogues that do not split
// need none.
size_t gemm_rows_scratch(const Gemm *g);
size_t gemm_weights_scratch(const Gemm *g);
#endif
