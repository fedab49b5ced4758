# Counts tests; sourced by run.sh and run_long.sh, which set $logs, a folder.
# shellcheck shell=bash disable=SC2154
passed=0 failed=0 skipped=0
figures=() # a line for each check, for a table at the end
mkdir -p "$logs"

# Adds up what cmocka printed; a program that ends badly without naming a failed test counts as one failure.
count_cmocka() { # NAME EXIT_CODE LOG
  local ok skip bad
  ok=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  skip=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  bad=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) test(s).*/\1/p' "$3" | tail -1)
  if [ "$2" -ne 0 ] && [ "${bad:-0}" -eq 0 ]; then bad=1; fi
  passed=$((passed + ${ok:-0})) failed=$((failed + ${bad:-0})) skipped=$((skipped + ${skip:-0}))
  printf '%-28s %3d passed %3d failed %3d skipped  %4ss\n' \
    "$1" "${ok:-0}" "${bad:-0}" "${skip:-0}" "$((SECONDS - began))"
  # A skipped test says why in the line before.
  awk '/^\[  SKIPPED \]/ && before !~ /^\[/ { print "  " $NF ": SKIPPED: " before } { before = $0 }' "$3"
  if [ "${bad:-0}" -ne 0 ]; then grep -E 'FAILED|ERROR|error|Sanitizer' "$3" | head -20; fi
}

# A check that is one test: passes with exit code 0, is skipped with 77. Shows the last line of what it said.
check() { # NAME COMMAND...
  local name=$1 log=$logs/$1.log rc=0 said result
  shift
  began=$SECONDS
  "$@" >"$log" 2>&1 || rc=$?
  said=$(tail -1 "$log")
  case $rc in
    0) passed=$((passed + 1)) result=passed && echo "$name: passed ($((SECONDS - began))s)${said:+: $said}" ;;
    77) skipped=$((skipped + 1)) result=SKIPPED && echo "$name: SKIPPED: $said" ;;
    *) failed=$((failed + 1)) result=FAILED && echo "$name: FAILED (exit $rc)" && tail -15 "$log" ;;
  esac
  figures+=("$(printf '%-18s %-8s %5ss  %s' "$name" "$result" $((SECONDS - began)) "$said")")
}

# The last line. False when anything failed.
count_print() {
  if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
  else
    echo "$passed passed, $failed failed"
  fi
  [ "$failed" -eq 0 ]
}
