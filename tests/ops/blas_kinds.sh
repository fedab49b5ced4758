#!/usr/bin/env bash
# Runs what computes with OpenBLAS under each of its kinds of kernels that this processor can run:
# tests/ops/blas_kinds.sh BUILD. Kinds that the OpenBLAS of this machine was not built with are named and left out. The
# last line is "N passed, N failed". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/../.." || exit 2
build=$1
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs/blas
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as ./train sets for itself
# shellcheck source=tests/count.sh
. tests/count.sh

# A kind and what the processor must have for it. Any x86-64 runs Nehalem's, but for very old ones.
kinds='Nehalem sse4_2
Haswell avx2 fma
Zen avx2 fma
SkylakeX avx512f avx512bw avx512cd avx512dq avx512vl
Cooperlake avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16
SapphireRapids avx512f avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_bf16 amx_int8'
# The tests whose figures come from matrix products.
programs="$(cd tests/ops && echo test_*.c | sed 's/\.c//g') test_queues test_evaluate test_sampler"

runs() { # FLAG... : whether this processor has them all
  local flag
  for flag in "$@"; do grep -qw "$flag" /proc/cpuinfo || return 1; done
}

# The kernels that OpenBLAS takes when told to take some: a kind that it does not know it passes over in silence.
taken() { # KIND
  OPENBLAS_CORETYPE=$1 "$build/tests/test_blas" 2>&1 | sed -n 's/^OpenBLAS kernels: //p'
}

tried=0
while read -r kind flags; do
  # shellcheck disable=SC2086
  if ! runs $flags; then
    echo "$kind: not on this processor"
    continue
  fi
  got=$(taken "$kind")
  if [ "$got" != "$kind" ]; then
    echo "$kind: not in this OpenBLAS, which takes ${got:-none}"
    continue
  fi
  tried=$((tried + 1))
  export OPENBLAS_CORETYPE=$kind
  for program in $programs; do
    for at in tests f64/tests; do
      [ -x "$build/$at/$program" ] || continue
      name="$kind $at/$program" rc=0 began=$SECONDS
      log="$logs/${name//[ \/]/_}.log"
      timeout --kill-after=10 600 "$build/$at/$program" >"$log" 2>&1 || rc=$?
      count_cmocka "$name" "$rc" "$log"
    done
  done
  if "$python" -c 'import torch' 2>/dev/null; then
    check "${kind}_parity_ops" timeout 600 tests/ops/parity.sh ops "$build"
  fi
  unset OPENBLAS_CORETYPE
done <<<"$kinds"

if [ "$tried" -eq 0 ]; then # another architecture, or an OpenBLAS for one kind alone: what it runs has been tested
  echo "OpenBLAS runs one kind of kernels here: $(taken '')"
fi
count_print
