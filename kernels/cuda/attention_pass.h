// The backward attention on Hopper for head_dim 128: one pass over tiles of keys (attention_bwd_pass.cu), between a
// kernel that prepares it and one that finishes dq (attention_pass.cu).
//
// A unit is a tile of 128 keys of one document and one kv head, against every tile of queries that sees some of them,
// all heads that share the kv head as rows of one matrix. dk and dv of a unit stay in registers. What it adds to dq
// goes to memory in fp32, where units of one document and kv head take turns, so that every sum has a fixed order:
// those of earlier keys first, which are taken first, so that no block waits for one that has not begun. Each takes the
// last queries first, which see keys of nearly all units (not those of noised images before them): so the units of a
// document go through its queries side by side, and find these and dq's sums in L2.
#ifndef TESSERA_ATTENTION_PASS_H
#define TESSERA_ATTENTION_PASS_H

#include "kernels/cuda/attention_bwd.h"

enum { PASS_KEYS = BATCH_TILE };

// Memory between the kernels of a call.
typedef struct PassScratch {
  float *dq;           // [H T, D] by pass_line, unscaled; elements of a row as dq_place says
  float *lse2, *delta; // [H T] by pass_line: lse log2(e); rowsum(dO * O)
  uint32_t *turn;      // [H T] of the tile of rows that begins there: units that have had their turn, and TURN_WRITTEN
  int *taken;          // units that blocks have taken
} PassScratch;
#define TURN_WRITTEN (1u << 31) // one of them has written dq: the next adds to it

typedef struct PassCall {
  BackwardCall c;
  PassScratch s;
} PassCall;

// Lays the arrays out from `base` (NULL: to measure); bytes.
size_t pass_bind(PassScratch *s, const Dims *d, void *base);

// Finds delta, sets turns and taken units to 0.
void attention_pass_prepare(const PassCall *p, cudaStream_t stream);
// dq in bf16, and zeros in the filler rows of all gradients.
void attention_pass_finish(const PassCall *p, cudaStream_t stream);

// Where the rows of a kv head begin that are of the positions from `position` on; those of a document follow each
// other.
static __device__ inline int64_t pass_line(const AttentionShape &s, int kv_head, int position) {
  return ((int64_t)kv_head * s.T + position) * s.heads;
}

// The row of a head and position: where it lies, and its number in its document and kv head. `in_document`: the
// position counted from the document's first.
typedef struct PassRow {
  int64_t line;
  int local;
} PassRow;

static __device__ inline PassRow pass_row(const AttentionShape &s, int head, int position, int in_document) {
  const int kv_head = divide(head, &s.by_heads), own = head - kv_head * s.heads;
  return {pass_line(s, kv_head, position) + own, in_document * s.heads + own};
}

// A row of dq in fp32: place i (of 4 floats) holds what lane t = i % 4 of a row's four lanes has of two neighbouring
// fragments, columns 16 m + 2 t + {0, 1, 8, 9}, m = i / 4. In odd rows of a document and kv head neighbouring groups
// of 4 places change, so that two rows lie in different banks of shared memory.
static __device__ inline int dq_place(int i, int row) {
  return i ^ (row & 1) << 2;
}
#endif
