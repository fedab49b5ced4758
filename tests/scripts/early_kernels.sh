#!/usr/bin/env bash
# What scripts/nvcc_strict.sh refuses: kernels that may begin before the one in front of them has ended, and touch memory
# before await_previous() or never call it. Exit code 77 without nvcc.
set -eu
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || { echo "there is no nvcc"; exit 77; }
work=$(mktemp -d)
trap 'wait; rm -rf "$work"' EXIT

declare -A body # of each kernel, of x, y [n] floats, of which x is read only
body[first]='await_previous(); if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x];'
body[shared_before]='s[threadIdx.x] = n; __syncthreads(); await_previous(); y[threadIdx.x] = x[0] + s[n];'
body[empty]=''
early=(without load_before moved_before atomic_before global_before prefetch_before)
body[without]='y[threadIdx.x] = 1;'
body[load_before]='float v = x[threadIdx.x]; await_previous(); y[threadIdx.x] = v;'
body[moved_before]='if (n > 3) y[0] = 1; await_previous(); y[threadIdx.x] = __ldg(x);'
body[atomic_before]='atomicAdd(y, 1.0f); await_previous();'
body[global_before]='of_all = n; await_previous();'
body[prefetch_before]='asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); await_previous(); *y = *x;'

compiles() { # FILE KERNEL...: all in one file, for it is the header that takes the time
  local file=$1 name launches=
  shift
  {
    printf '#include "kernels/cuda/cuda.h"\n'
    printf 'static __device__ float of_all;\n'
    for name in "$@"; do
      printf 'static __global__ void %s(int n, const float *__restrict__ x, float *y) {\n  __shared__ float s[32];\n' "$name"
      printf '%s\n}\n' "${body[$name]}"
      launches+=" CUDA_LAUNCH($name, 1, 32, 0, s, 32, &of_all, NULL);"
    done
    printf 'void run(cudaStream_t s) {%s }\n' "$launches"
  } >"$work/$file.cu"
  scripts/nvcc_strict.sh -std=c++17 -I. -O3 -gencode=arch=compute_90a,code=sm_90a -c -o "$work/$file.o" "$work/$file.cu" \
    >"$work/$file.said" 2>&1
}

compiles all "${!body[@]}" & # beside the other
all=$!
compiles good first shared_before empty || { echo "refused: $(cat "$work/good.said")" && exit 1; }
[ -s "$work/good.o" ] || { echo "no object" && exit 1; }
! wait "$all" || { echo "not refused" && exit 1; }
[ ! -e "$work/all.o" ] || { echo "it left an object" && exit 1; }
named=$(sed -n 's/^error: a kernel touches memory before await_previous(), or lacks it: \(\w*\)(.*/\1/p' "$work/all.said")
if [ "$(sort <<<"$named")" != "$(printf '%s\n' "${early[@]}" | sort)" ]; then
  echo "those named are not ${early[*]}:" && cat "$work/all.said" && exit 1
fi
echo "${#body[@]} kernels: those that wait too late are refused"
