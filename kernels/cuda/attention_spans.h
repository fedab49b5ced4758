// Tiles cut at documents, listed on the device for blocks that take one after another: nothing of another document is
// in a tile, and rows behind a document's end are zeros in shared memory, so that what is infinite elsewhere is never
// multiplied.
#ifndef TESSERA_ATTENTION_SPANS_H
#define TESSERA_ATTENTION_SPANS_H

#include "kernels/cuda/attention.h"

enum { SPAN_THREADS = 256, SPAN_WARPS = SPAN_THREADS / 32, SPAN_RUN = 16 }; // of the block that makes a list

// A tile that begins at `first`, of the document [start, end).
typedef struct Span {
  int start, end, first, unused;
} Span;

typedef struct SpanCounts {
  int spans; // of the list
  int taken; // units of work that blocks have taken
} SpanCounts;

typedef struct SpanList {
  Span *span; // [T]
  int *start; // [T + 1] of documents
  SpanCounts *counts;
} SpanList;

// Lays a list out from `base` (NULL: to measure), which is aligned to 16 bytes; bytes.
static inline size_t span_list_bind(SpanList *list, int T, void *base) {
  list->span = (Span *)base;
  list->start = (int *)(list->span + T);
  list->counts = (SpanCounts *)(list->start + T + 2 - T % 2);
  return (size_t)((char *)(list->counts + 1) - (char *)base);
}

// The sum of the values of all threads before this one; *total: of all. One block.
static __device__ inline int block_sum_before(int value, int *total) {
  __shared__ int warp_sum[SPAN_WARPS];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32, sum = value;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < SPAN_WARPS; i++) {
    if (i < warp) before += warp_sum[i];
    all += warp_sum[i];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// Lists tiles of `rows`, document by document, the last one of each first. One block.
static __device__ inline void list_spans(const SpanList &list, const Batch &b, int rows) {
  int used = batch_used(b), documents = 0, spans = 0, total;
  for (int base = 0; base < used; base += SPAN_THREADS * SPAN_RUN) {
    int first = base + threadIdx.x * SPAN_RUN, count = 0;
    uint32_t begins = 0;
#pragma unroll
    for (int i = 0; i < SPAN_RUN; i++)
      if (first + i < used && b.doc_start[first + i] == first + i) begins |= 1u << i, count++;
    int at = documents + block_sum_before(count, &total);
    documents += total;
    for (; begins; begins &= begins - 1) list.start[at++] = first + __ffs(begins) - 1;
  }
  if (threadIdx.x == 0) list.start[documents] = used;
  __syncthreads();
  for (int base = 0; base < documents; base += SPAN_THREADS) {
    int document = base + threadIdx.x, start = 0, end = 0;
    if (document < documents) start = list.start[document], end = list.start[document + 1];
    int at = spans + block_sum_before(ceil_div(end - start, rows), &total);
    spans += total;
    for (int first = end - 1 - (end - 1 - start) % rows; first >= start && start < end; first -= rows)
      list.span[at++] = {start, end, first, 0};
  }
  if (threadIdx.x == 0) *list.counts = {spans, 0};
}
#endif
