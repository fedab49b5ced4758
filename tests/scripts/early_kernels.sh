#!/usr/bin/env bash
# What scripts/nvcc_strict.sh refuses: kernels that may begin before the one in front of them has ended, and touch memory
# before await_previous() or never call it. Exit code 77 without nvcc.
set -eu
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || { echo "there is no nvcc"; exit 77; }
work=$(mktemp -d)
trap 'wait; rm -rf "$work"' EXIT
pids=()

compiles() { # NAME, the kernel's body: x, y [n] floats, of which x is read only
  {
    printf '#include "kernels/cuda/cuda.h"\n'
    printf 'static __device__ float of_all;\n'
    printf 'static __global__ void probe(int n, const float *__restrict__ x, float *y) {\n  __shared__ float s[32];\n'
    printf '%s\n' "$2"
    printf '}\nvoid run(cudaStream_t s) { CUDA_LAUNCH(probe, 1, 32, 0, s, 32, &of_all, NULL); }\n'
  } >"$work/$1.cu"
  scripts/nvcc_strict.sh -std=c++17 -I. -O3 -gencode=arch=compute_90a,code=sm_90a -c -o "$work/$1.o" "$work/$1.cu" \
    >"$work/$1.said" 2>&1
}
passes() {
  compiles "$@" || { echo "$1: refused" && cat "$work/$1.said" && exit 1; }
  [ -s "$work/$1.o" ] || { echo "$1: no object" && exit 1; }
}
refused() {
  ! compiles "$@" || { echo "$1: not refused" && exit 1; }
  grep -q '^error: a kernel touches memory before await_previous(), or lacks it: probe' "$work/$1.said" ||
    { echo "$1: says something else" && cat "$work/$1.said" && exit 1; }
  [ ! -e "$work/$1.o" ] || { echo "$1: left an object" && exit 1; }
}

judge() { # beside the others
  "$@" &
  pids+=($!)
}

judge passes first 'await_previous(); if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x];'
judge passes shared_before 's[threadIdx.x] = n; __syncthreads(); await_previous(); y[threadIdx.x] = x[0] + s[n];'
judge passes empty ''
judge refused without 'y[threadIdx.x] = 1;'
judge refused load_before 'float v = x[threadIdx.x]; await_previous(); y[threadIdx.x] = v;'
judge refused moved_before 'if (n > 3) y[0] = 1; await_previous(); y[threadIdx.x] = __ldg(x);'
judge refused atomic_before 'atomicAdd(y, 1.0f); await_previous();'
judge refused global_before 'of_all = n; await_previous();'
judge refused prefetch_before 'asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); await_previous(); *y = *x;'
for pid in "${pids[@]}"; do wait "$pid"; done # set -e: one that is judged wrongly ends the test
echo "${#pids[@]} kernels: those that wait too late are refused"
