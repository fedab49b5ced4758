#!/usr/bin/env bash
# Runs the test suite of a build folder and counts: tests/run.sh build [--sanitized]
# The last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1
sanitized=${2:-}
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
mkdir -p "$logs"
passed=0 failed=0 skipped=0

# Adds up what cmocka printed; a program that ends badly without naming a failed test counts as one failure.
count_cmocka() { # NAME EXIT_CODE LOG
  local ok skip bad
  ok=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  skip=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  bad=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  if [ "$2" -ne 0 ] && [ "${bad:-0}" -eq 0 ]; then bad=1; fi
  passed=$((passed + ${ok:-0})) failed=$((failed + ${bad:-0})) skipped=$((skipped + ${skip:-0}))
  printf '%-28s %3d passed %3d failed %3d skipped  %4ss\n' "$1" "${ok:-0}" "${bad:-0}" "${skip:-0}" "$((SECONDS - began))"
  if [ "${bad:-0}" -ne 0 ]; then grep -E 'FAILED|ERROR|error|Sanitizer' "$3" | head -20; fi
}

# A check that is one test: passes with exit code 0, is skipped with 77.
check() { # NAME COMMAND...
  local name=$1 log=$logs/$1.log rc=0
  shift
  began=$SECONDS
  "$@" >"$log" 2>&1 || rc=$?
  case $rc in
    0) passed=$((passed + 1)) && echo "$name: passed ($((SECONDS - began))s)" ;;
    77) skipped=$((skipped + 1)) && echo "$name: SKIPPED: $(tail -1 "$log")" ;;
    *) failed=$((failed + 1)) && echo "$name: FAILED (exit $rc)" && tail -15 "$log" ;;
  esac
}

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
  check learning tests/learning.sh 300
fi

if [ "$skipped" -gt 0 ]; then
  echo "$passed passed, $failed failed, $skipped skipped"
else
  echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
