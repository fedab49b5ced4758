// Times single calls of the CUDA backend: out of a captured graph, over copies of the operands that together exceed the
// L2 cache.
#ifndef TESSERA_CUDA_BENCH_H
#define TESSERA_CUDA_BENCH_H

#include "tests/gpu/cuda_case.h"

typedef struct TimedCall {
  void *graph;  // of many calls
  int launches; // how many
  char *memory; // of their operands
} TimedCall;

// Makes a call ready: what in[] and out[] hold is on the device when this returns, and not needed any more. Panics
// where the device has too little memory.
TimedCall timed_call_new(const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in, const Value *out);
// Median seconds of one call.
double timed_call_seconds(const TimedCall *t);
void timed_call_free(TimedCall *t);

// Times a call and prints a line: against the floor that its FLOPs and the bytes it must move set; where the case's
// backend has another way of the op in its table, against what that way's kernels read and write.
void cuda_bench_call(const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in, const Value *out);
#endif
