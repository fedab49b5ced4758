#!/usr/bin/env bash
# Runs the test suite of a build folder and counts: tests/run.sh BUILD [--sanitized] TEST_PROGRAM...
# The programs are those that the Makefile just built: a folder may hold others, of tests that are gone. --sanitized:
# only what is not training. The last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1
shift
sanitized=
if [ "${1:-}" = --sanitized ]; then sanitized=1 && shift; fi
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as ./train sets for itself
# shellcheck source=tests/count.sh
. tests/count.sh

# A test that hangs is a failed one. In the background, so that a signal to this script reaches it.
child=
trap '[ -z "$child" ] || kill "$child"; exit 130' INT TERM
limited() { # COMMAND...
  local seconds=300 rc=0
  timeout --kill-after=10 $seconds "$@" &
  child=$!
  wait "$child" || rc=$?
  child=
  [ $rc -ne 124 ] || echo "error: no end within $seconds s"
  return $rc
}

if [ $# -eq 0 ]; then failed=1 && echo "no test programs: 'make test' names them"; fi
for binary in "$@"; do
  name=$(basename "$binary")
  case $binary in */f64/*) name="$name (double)" ;; esac
  log="$logs/${name// /_}.log" rc=0 began=$SECONDS
  limited "$binary" >"$log" 2>&1 || rc=$?
  count_cmocka "$name" "$rc" "$log"
done

check cli limited tests/cli.sh "$build"
if [ "$sanitized" ]; then
  # What the comparisons with PyTorch are made from; they themselves need no sanitizer.
  check dump_ops limited "$build/tests/dump_ops" "$build/dumps/ops"
  check dump_model limited "$build/tests/dump_model" "$build/dumps/models"
  rm -rf "$build/dumps"
else
  check messages limited tests/messages.sh "$build"
  if "$python" -c 'import torch' 2>/dev/null; then
    check reference limited "$python" tests/test_reference.py
    check parity_ops limited tests/parity.sh ops "$build"
    check parity_model limited tests/parity.sh model "$build"
  elif [ "${TESSERA_REQUIRE_TORCH:-}" ]; then
    failed=$((failed + 1))
    echo "parity: FAILED: python3-torch is required here and absent"
  else
    skipped=$((skipped + 3))
    echo "parity: SKIPPED: $python has no torch (python3-torch)"
  fi
  check resume limited tests/resume.sh "$build"
  check faults limited "$python" tests/faults.py --kills 5 --train "$build/train"
  check emoji_fill limited tests/emoji_fill.sh "$build"
  check infer limited tests/infer.sh "$build"
  check plot limited "$python" tests/test_plot.py
  check learning limited tests/learning.sh 300 "$build"
fi

count_print
