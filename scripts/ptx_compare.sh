#!/usr/bin/env bash
# Which kernels do two revisions compile differently? scripts/ptx_compare.sh A [B] [NAME ...]
# Compares the PTX of every kernel in kernels/cuda between A and B (git revisions; B left out or '': the working tree),
# or of the files NAME.cu, where a NAME may be a pattern. Comments, lines, the numbers of labels, the names that nvcc
# makes of a file's own and the file that a kernel stands in do not count. For each kernel that differs: registers,
# spilled bytes and instructions of its machine code, before and after. Status 1 if any differs. CUDA_ARCH: 90a unless
# set.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/{/^#/s/^# //p}' "$0" >&2; exit 2; }
arch=${CUDA_ARCH:-90a}
root=$(git rev-parse --show-toplevel)
cd "$root"
a=$(git rev-parse "$1^{commit}")
b=${2:-}
if [ -n "$b" ]; then b=$(git rev-parse "$b^{commit}"); else b=$(git stash create) && b=${b:-$(git rev-parse HEAD)}; fi
shift $(($# < 2 ? $# : 2))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# $work/$1/ptx/FILE.ptx of the kernels of revision $2.
compile() {
  local side=$1 revision=$2
  shift 2
  mkdir -p "$work/$side/tree" "$work/$side/ptx" "$work/$side/entries"
  git archive "$revision" | tar -x -C "$work/$side/tree"
  cd "$work/$side/tree"
  local files=(kernels/cuda/*.cu)
  [ $# -eq 0 ] || files=($(for name in "$@"; do ls kernels/cuda/$name.cu 2>/dev/null || true; done))
  [ ${#files[@]} -eq 0 ] || printf '%s\n' "${files[@]}" | xargs -P "$(nproc)" -I{} sh -c \
    'nvcc -std=c++17 -I. -O3 -gencode=arch=compute_'"$arch"',code=compute_'"$arch"' -ptx -o ../ptx/$(basename {} .cu).ptx {}'
  cd "$root"
  split "$side"
}

# One file an entry, entries/N, with its name taken out of its text; index: name, .cu, N, hash of the text.
split() {
  local side=$1 ptx name
  for ptx in "$work/$side"/ptx/*.ptx; do
    [ -e "$ptx" ] || continue
    name=$(basename "$ptx" .ptx)
    sed -E -e 's,[[:space:]]*//.*,,' -e '/^[[:space:]]*(\.loc|\.file)[[:space:]]/d' -e '/^[[:space:]]*$/d' \
      -e 's/[0-9]+_INTERNAL_[0-9a-f]{8}_[0-9]+_[A-Za-z0-9_]+_cu_[0-9a-f]{8}/OWN/g' -e 's/_INTERNAL_[0-9a-f]{8}_[A-Za-z0-9_]+_cu_[0-9a-f]{8}_[0-9]+/OWN/g' \
      -e 's/\$L__BB[0-9]+_/$L__BB_/g' -e 's/__cuda_local_var_[0-9]+_[0-9]+_/__cuda_local_var_/g' "$ptx" |
      awk -v dir="$work/$side/entries" -v file="$name" '
        function close_entry() { if (out != "") { close(out); out = "" } }
        /(^|[ \t])\.entry[ \t]/ {
          entry = $0; sub(/.*\.entry[ \t]+/, "", entry); sub(/[(].*/, "", entry)
          own = substr(entry, 3)
          out = dir "/" file "." ++n; print entry "\t" file > (out ".name")
          close(out ".name")
        }
        out == "" { next }
        { line = $0; text = ""
          while (own != "" && (at = index(line, own))) { text = text substr(line, 1, at - 1) "SELF"; line = substr(line, at + length(own)) }
          print text line > out }
        /^}/ { close_entry() }'
  done
  for name in "$work/$side"/entries/*.name; do
    [ -e "$name" ] || continue
    printf '%s\t%s\t%s\n' "$(cat "$name")" "$(basename "${name%.name}")" "$(sha1sum <"${name%.name}" | cut -c 1-16)"
  done | sort >"$work/$side/index"
}

# "registers spill instructions" of entry $3 of file $2 of a side; leaves its machine code, an instruction a line, in
# $work/$1/code.
resources() {
  local side=$1 entry=$3 cubin="$work/$1/ptx/$2.cubin" offset size
  if [ ! -e "$cubin" ]; then
    ptxas -arch="sm_$arch" -O3 -v "${cubin%.cubin}.ptx" -o "$cubin" 2>"$cubin.log" || { cat "$cubin.log" >&2; exit 2; }
    readelf -SW "$cubin" 2>/dev/null | sed 's/^ *\[ *[0-9]*\]//' >"$cubin.sections"
  fi
  read -r offset size < <(awk -v name=".text.$entry" '$1 == name { print $4, $5 }' "$cubin.sections")
  tail -c +$((0x$offset + 1)) "$cubin" | head -c $((0x$size)) | od -An -v -tx8 -w16 >"$work/$side/code"
  awk -v entry="'$entry'" -v n="$(grep -c . "$work/$side/code")" '
    /Compiling entry function/ { on = index($0, entry) > 0 }
    on && /bytes spill stores/ { for (i = 1; i < NF; i++) if ($(i + 2) == "spill") spill += $i }
    on && /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); print substr($0, RSTART + 5, RLENGTH - 5), spill + 0, n; exit }' "$cubin.log"
}
# Names in ptxas's output are the real ones: entry N of a file as the PTX has it.
real_name() {
  grep -oE '\.entry[[:space:]]+[^(]+' "$work/$1/ptx/${2%.*}.ptx" | sed -n "${2##*.}p" | awk '{print $2}'
}
shown() {
  c++filt <<<"$1" | cut -c 1-100
}

compile a "$a" "$@"
compile b "$b" "$@"
cd "$work"
# name, file, N, hash of a then of b; '-' where one side has none. Entries of one name pair up in the order of hashes.
number() { sort -t "$(printf '\t')" -k1,1 -k4,4 "$1/index" | awk -F'\t' -v OFS='\t' '{ print $1 "#" ++seen[$1], $2, $3, $4 }' | sort -t "$(printf '\t')" -k1,1; }
number a >a.n
number b >b.n
join -t "$(printf '\t')" -a 1 -a 2 -e - -o 0,1.2,1.3,1.4,2.2,2.3,2.4 a.n b.n >both
same=$(awk -F'\t' '$4 == $7' both | wc -l)
moved=$(awk -F'\t' '$4 == $7 && $2 != $5' both | wc -l)
echo "$same kernels the same, $moved of them in another file; others with registers, spilled bytes, instructions"
status=0
awk -F'\t' '$4 != $7 && $4 != "-" && $7 != "-"' both >differ
while IFS=$'\t' read -r name file_a at_a _ file_b at_b _; do
  before=$(resources a "$file_a" "$(real_name a "$at_a")")
  after=$(resources b "$file_b" "$(real_name b "$at_b")")
  lines=$(diff a/code b/code | grep -c '^>' || true)
  echo "differs: $file_b: $(shown "${name%#*}"): $before -> $after, $lines of them other"
  status=1
done <differ
# Entries of one side alone; the same text under another name is a kernel renamed.
awk -F'\t' '$7 == "-" { print $4 "\t" $2 "\t" $3 "\t" $1 }' both | sort >gone
awk -F'\t' '$4 == "-" { print $7 "\t" $5 "\t" $6 "\t" $1 }' both | sort >new
join -t "$(printf '\t')" -j 1 -o 1.2,1.4,2.2,2.4 gone new | while IFS=$'\t' read -r file_a name_a file_b name_b; do
  echo "renamed, the same: $file_a: $(shown "${name_a%#*}") -> $file_b: $(shown "${name_b%#*}")"
done
for side in a b; do
  list=$([ $side = a ] && echo gone || echo new)
  other=$([ $side = a ] && echo new || echo gone)
  join -t "$(printf '\t')" -v 1 $list $other >"only.$side"
  while IFS=$'\t' read -r _ file at name; do
    echo "$list: $file: $(shown "${name%#*}"): $(resources $side "$file" "$(real_name $side "$at")")"
    status=1
  done <"only.$side"
done
exit $status
