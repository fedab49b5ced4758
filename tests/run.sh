#!/usr/bin/env bash
# Runs the test suite of a build folder and counts: tests/run.sh build [--sanitized]
# The last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1
sanitized=${2:-}
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as ./train sets for itself
# shellcheck source=tests/count.sh
. tests/count.sh

for binary in "$build"/tests/test_* "$build"/f64/tests/test_*; do
  case $binary in *.o | *.d) continue ;; esac
  [ -x "$binary" ] || continue
  name=$(basename "$binary")
  case $binary in */f64/*) name="$name (double)" ;; esac
  log="$logs/${name// /_}.log" rc=0 began=$SECONDS
  "$binary" >"$log" 2>&1 || rc=$?
  count_cmocka "$name" "$rc" "$log"
done

if [ -z "$sanitized" ]; then
  check cli tests/cli.sh "$build"
  if "$python" -c 'import torch' 2>/dev/null; then
    check reference "$python" tests/test_reference.py
    check parity_ops tests/parity.sh ops "$build"
    check parity_model tests/parity.sh model "$build"
  elif [ "${TESSERA_REQUIRE_TORCH:-}" ]; then
    failed=$((failed + 1))
    echo "parity: FAILED: python3-torch is required here and absent"
  else
    skipped=$((skipped + 3))
    echo "parity: SKIPPED: $python has no torch (python3-torch)"
  fi
  check resume tests/resume.sh
  check infer tests/infer.sh "$build"
  check plot "$python" tests/test_plot.py
  check learning tests/learning.sh 300
fi

count_print
