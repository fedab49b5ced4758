#!/usr/bin/env bash
# Runs the test suite of a build folder and counts: tests/run.sh BUILD [--sanitized|--threads] TEST_PROGRAM...
# The programs are those that the Makefile just built: a folder may hold others, of tests that are gone. --sanitized:
# only what is not training. --threads: the programs, and a short run that loads and decodes in three threads, all built
# with ThreadSanitizer. The last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1
shift
part=all
case ${1:-} in --sanitized | --threads) part=${1#--} && shift ;; esac
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as ./train sets for itself
# shellcheck source=tests/count.sh
. tests/count.sh

# A test that hangs is a failed one. In the background, so that a signal to this script reaches it.
child=
trap '[ -z "$child" ] || kill "$child"; exit 130' INT TERM
limited() { # COMMAND...
  local seconds=600 rc=0
  timeout --kill-after=10 $seconds "$@" &
  child=$!
  wait "$child" || rc=$?
  child=
  [ $rc -ne 124 ] || echo "error: no end within $seconds s"
  return $rc
}

# A training run in which every thread is the engine's own: neither OpenMP nor OpenBLAS has any. Checkpoints are written
# while it goes on, and it is resumed.
threads() {
  local run status steps
  run=$(mktemp -d)
  [ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar || return 1
  for steps in 10 12; do
    OPENBLAS_NUM_THREADS=1 limited "$build/train" configs/demo.json --run-dir "$run/run" --resume --tokens 256 \
      --steps 12 --stop-at $steps --set run.threads=1 --set data.threads=3 --set checkpoint.every=3 \
      --set eval.samples=0 --set eval.documents=0 2>>"$run/log"
    status=$?
    [ $status -eq 0 ] || break
  done
  tail -200 "$run/log"
  rm -rf "$run"
  return $status
}

if [ "$part" = threads ]; then
  export OMP_NUM_THREADS=1 # OpenMP's threads synchronize out of ThreadSanitizer's sight
  for binary in "$@" "$build/train"; do # a build that is not instrumented would pass whatever it does
    grep -q __tsan_func_entry "$binary" || { failed=$((failed + 1)) && echo "$binary: FAILED: not built with ThreadSanitizer"; }
  done
fi
if [ $# -eq 0 ]; then failed=1 && echo "no test programs: 'make test' names them"; fi
for binary in "$@"; do
  name=$(basename "$binary")
  case $binary in */f64/*) name="$name (double)" ;; esac
  log="$logs/${name// /_}.log" rc=0 began=$SECONDS
  limited "$binary" >"$log" 2>&1 || rc=$?
  count_cmocka "$name" "$rc" "$log"
done

case $part in
  threads)
    check threads threads
    ;;
  sanitized)
    check cli limited tests/scripts/cli.sh "$build"
    # What the comparisons with PyTorch are made from; they themselves need no sanitizer.
    check dump_ops limited "$build/tests/dump_ops" "$build/dumps/ops"
    check dump_model limited "$build/tests/dump_model" "$build/dumps/models"
    rm -rf "$build/dumps"
    ;;
  all)
    check house "$python" tests/scripts/house.py
    check unused "$python" tests/scripts/unused.py "$build"
    check mutants_texts "$python" tests/scripts/mutants.py --texts
    check cli limited tests/scripts/cli.sh "$build"
    check messages limited tests/scripts/messages.sh "$build"
    check early_kernels limited tests/scripts/early_kernels.sh
    if "$python" -c 'import torch' 2>/dev/null; then
      check reference limited "$python" tests/ops/test_reference.py
      check parity_ops limited tests/ops/parity.sh ops "$build"
      check parity_model limited tests/ops/parity.sh model "$build"
      check peer limited "$python" tests/gpu/test_peer.py
      check compare_torch limited "$python" tests/scripts/test_compare_torch.py "$build/train"
      check torch_scaling limited "$python" tests/scripts/test_torch_scaling.py "$build/train"
      check keys limited "$python" tests/scripts/test_keys.py "$build"
      check uses limited "$python" tests/scripts/uses.py "$build"
    elif [ "${TESSERA_REQUIRE_TORCH:-}" ]; then
      failed=$((failed + 1))
      echo "parity: FAILED: python3-torch is required here and absent"
    else
      skipped=$((skipped + 8))
      echo "parity: SKIPPED: $python has no torch (python3-torch)"
    fi
    check resume limited tests/scripts/resume.sh "$build"
    check ranks limited tests/scripts/ranks.sh "$build"
    check ranks_faults limited "$python" tests/scripts/ranks_faults.py --kills 2 --build "$build"
    check faults limited "$python" tests/scripts/faults.py --kills 5 --train "$build/train"
    check data_run limited "$python" tests/scripts/data_run.py "$build/train"
    check machine limited "$python" tests/scripts/machine.py "$build"
    check run_folder limited "$python" tests/scripts/run_folder.py "$build/train"
    check guards limited "$python" tests/scripts/guards.py "$build"
    check emoji_fill limited tests/scripts/emoji_fill.sh "$build"
    check infer limited tests/scripts/infer.sh "$build"
    check patch_grid limited "$python" tests/scripts/test_patch_grid.py
    check plot limited "$python" tests/scripts/test_plot.py
    check trace_picture limited "$python" tests/scripts/test_trace_picture.py
    check scaling_model limited "$python" tests/scripts/test_scaling_model.py "$build"
    check memory_curve limited "$python" tests/scripts/test_memory_curve.py
    check memory_claims limited "$python" tests/scripts/test_memory_claims.py
    check ablate limited "$python" tests/scripts/test_ablate.py "$build/train"
    check equal_tokens limited "$python" tests/scripts/test_equal_tokens.py "$build/train"
    check learning limited tests/scripts/learning.sh 300 "$build"
    ;;
esac

count_print
