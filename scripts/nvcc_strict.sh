#!/usr/bin/env bash
# nvcc, which fails where ptxas gives up on asynchronous matrix products: scripts/nvcc_strict.sh ARGUMENT...
# ptxas puts a wait behind every wgmma where it cannot prove that registers are left alone meanwhile, which costs most of
# the speed, and says so (C7510 and its neighbours) as an information that no flag turns into an error.
set -u
said=$(nvcc "$@" 2>&1)
status=$?
[ -z "$said" ] || printf '%s\n' "$said" >&2
if [ $status -eq 0 ] && grep -q 'instructions are serialized' <<<"$said"; then
  echo "error: ptxas serialises wgmma, see above" >&2
  for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = -o ]; then j=$((i + 1)) && rm -f "${!j}"; fi
  done
  exit 1
fi
exit $status
