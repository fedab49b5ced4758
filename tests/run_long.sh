#!/usr/bin/env bash
# Everything that takes long, about two hours on two cores: tests/run_long.sh BUILD BUILD_SANITIZED FUZZ_TARGET...
# One after the other, as they use all cores: long learning runs, drawings, planted bugs, real images, tests of data
# that has to be fetched (GPT-2's merges, packs of emoji), 50 kills of a run and 20 of a rank, 2,000 steps with flat memory, mutations of every
# input format under ASan and UBSan. Then the fuzz targets, as many at a time as there are cores. From the environment:
# FUZZ_SECONDS of each target and FUZZ_CC, a clang with libFuzzer.
# Runs stay in BUILD/long, drawings among them; a second call starts over. All figures are in one table at the end. The
# last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1 sanitized=$2
shift 2
targets=("$@")
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
long=$build/long
mutations=200000 # of each image
rounds=200      # of 16 mutations of each file of the fuzz corpora
fuzz_seconds=${FUZZ_SECONDS:-600}
fuzz_cc=${FUZZ_CC:-clang}
# shellcheck source=tests/count.sh
. tests/count.sh

# Real images: the right caption among 16, for images that were trained on.
emoji() {
  if ! [ -f .cache/emoji/emoji.tar ] && ! scripts/make_emoji.py .cache/emoji; then
    echo "there is no .cache/emoji/emoji.tar and scripts/make_emoji.py could not make it: $logs/emoji.log says why"
    return 77
  fi
  "$build/train" configs/emoji.json --run-dir "$long/emoji" || return 1
  "$python" - "$long/emoji/metrics.jsonl" <<'P'
import json, sys
last = [row["eval"] for row in map(json.loads, open(sys.argv[1])) if "eval" in row][-1]
print(f"caption retrieval among 16: training {last['retrieval_training']:.3f} (at least 0.9), held-out "
      f"{last['retrieval']:.3f}; held-out flow {last['flow']:.4f}")
sys.exit(last["retrieval_training"] < 0.9)
P
}

# The tokenizer on GPT-2's merges, which a fresh checkout does not have.
gpt2() {
  if ! scripts/vocab_bpe.sh .cache/vocab.bpe; then
    echo "there is no .cache/vocab.bpe and scripts/vocab_bpe.sh could not fetch it: $logs/gpt2.log says why"
    return 77
  fi
  local said
  said=$(TESSERA_VOCAB_BPE=.cache/vocab.bpe "$build/tests/test_tokenizer") || { echo "$said" && return 1; }
  grep '^\[       OK \] test_gpt2$' <<<"$said"
}

# A folder of 50,000 pictures with a caption beside each: the time is in proportion to their number.
many_files() {
  "$build/tests/test_folder" 50000 || return 1
  grep '^seconds of the processor' "$logs/many_files.log"
}

# A test program that mutates and counts: "N mutations of ..." a line. Says how many all in all, and of what.
mutated() { # PROGRAM ARGUMENT
  "$@" || return 1
  awk '/^[0-9]+ mutations of / { n += $1; sub(/ mutations/, ""); what = what "; " $0 }
       END { printf "%d mutations: %s\n", n, substr(what, 3); exit n == 0 }' "$logs/$name.log"
}

# All targets, as many at a time as there are cores; what each found is in its own log.
fuzz() {
  make --no-print-directory -k -j"$(nproc)" fuzz FUZZ_SECONDS="$fuzz_seconds" FUZZ_CC="$fuzz_cc"
}

# What `fuzz` said of one target. Without its line the target failed or was not built.
fuzzed() { # TARGET
  if grep "^$1: [0-9]* executions" "$logs/fuzz.log"; then return 0; fi
  tail -30 "build-fuzz/$1.log"
  return 1
}

can_fuzz() {
  local program status
  program=$(mktemp)
  echo 'int LLVMFuzzerTestOneInput(const char *data, long n) { return data && n < 0; }' |
    "$fuzz_cc" -x c -fsanitize=fuzzer,address,undefined -o "$program" - 2>"$logs/fuzz.log"
  status=$?
  rm -f "$program"
  return $status
}

rm -rf "$long" && mkdir -p "$long"
check learning_1500 tests/scripts/learning.sh 1500 "$build" "$long/shapes-1500"
check learning_3500 tests/scripts/learning.sh 3500 "$build" "$long/shapes-3500"
check drawings tests/scripts/drawings.sh "$build" "$long/shapes-3500" "$long/drawings"
check mutants "$python" tests/scripts/mutants.py "$build"
check emoji emoji
check emoji_fill tests/scripts/emoji_fill.sh "$build"
check gpt2 gpt2
check faults_50 "$python" tests/scripts/faults.py --kills 50 --leaks --train "$build/train"
check ranks_faults_20 "$python" tests/scripts/ranks_faults.py --kills 20 --build "$build"
check many_files many_files
check mutations_images mutated "$sanitized/tests/test_damaged_images" $mutations
check mutations_corpora mutated "$sanitized/tests/test_fuzz" $rounds
if can_fuzz; then
  echo "fuzzing ${#targets[@]} targets, $fuzz_seconds s each"
  rm -f "$logs"/fuzz.log
  fuzz >"$logs/fuzz.log" 2>&1
  for target in "${targets[@]}"; do check "fuzz_$target" fuzzed "$target"; done
else
  cannot_fuzz() { echo "no libFuzzer with $fuzz_cc; make test-long FUZZ_CC=... takes another" && return 77; }
  for target in "${targets[@]}"; do check "fuzz_$target" cannot_fuzz; done
fi

echo
printf '%s\n' "${figures[@]}"
awk '/^fuzz_/ && / executions/ { for (i = 2; i <= NF; i++) if ($i ~ /^executions/) executions += $(i - 1) }
     / mutations:/ { for (i = 2; i <= NF; i++) if ($i == "mutations:") mutations += $(i - 1) }
     / kills survived/ { for (i = 2; i <= NF; i++) if ($i == "kills") kills += $(i - 1) }
     END { printf "all in all: %d kills survived, %d mutations, %d fuzz executions\n", kills, mutations, executions }' \
  <<<"$(printf '%s\n' "${figures[@]}")"
count_print
