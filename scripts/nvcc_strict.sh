#!/usr/bin/env bash
# nvcc, which fails where code is not what the engine relies on: scripts/nvcc_strict.sh ARGUMENT...
#
# ptxas puts a wait behind every wgmma where it cannot prove that registers are left alone meanwhile, which costs most of
# the speed, and says so (C7510 and its neighbours) as an information that no flag turns into an error.
#
# A kernel that is launched before the one in front of it has ended must wait for it, before anything that touches memory
# of the device (await_previous in kernels/cuda/cuda.h). It is looked for in the PTX, where the compiler has moved what it
# wants to move.
set -u
kept=$(mktemp -d)
trap 'rm -rf "$kept"' EXIT
said=$(nvcc --keep --keep-dir "$kept" "$@" 2>&1)
status=$?
[ -z "$said" ] || printf '%s\n' "$said" >&2
[ $status -eq 0 ] || exit $status
bad=0
if grep -q 'instructions are serialized' <<<"$said"; then
  echo "error: ptxas serialises wgmma, see above" >&2
  bad=1
fi
# Entries that are empty are never launched, or for cards whose code is elsewhere.
early=$(awk '
  /^\.target/ { waits = substr($2, 4) + 0 >= 90 }
  /\.entry / { name = $0; sub(/.*\.entry /, "", name); sub(/[(].*/, "", name); body = touched = waited = 0 }
  /^{/ { body = name != "" }
  /^}/ { if (body && waits && touched && !waited) print name; name = ""; body = 0 }
  !body || waited { next }
  /griddepcontrol\.wait/ { waited = 1; if (touched) print name; next }
  { sub(/^[ \t]*(@!?%p[0-9]+ )?/, "") }
  /^(call|atom|red|multimem)/ || /^(ld|st|ldu|prefetch|cp|discard|applypriority)(\.[a-z0-9_:]+)*/ && !/^prefetch\.tensormap/ &&
    !/^(ld|st)(\.volatile|\.relaxed|\.weak)?\.(param|shared|local|const)/ { touched = 1 }' "$kept"/*.ptx | sort -u)
if [ -n "$early" ]; then
  c++filt <<<"$early" | sed 's/^/error: a kernel touches memory before await_previous(), or lacks it: /' >&2
  bad=1
fi
if [ $bad -ne 0 ]; then
  for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = -o ]; then j=$((i + 1)) && rm -f "${!j}"; fi
  done
fi
exit $bad
