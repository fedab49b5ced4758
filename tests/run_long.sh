#!/usr/bin/env bash
# The long learning runs, about half an hour on two cores: tests/run_long.sh BUILD
# Runs stay in BUILD/long, drawings among them; a second call starts over. The last line is "N passed, N failed[, N
# skipped]". Exit code 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 2
build=$1
python=${PYTHON:-/usr/bin/python3}
logs=$build/logs
long=$build/long
# shellcheck source=tests/count.sh
. tests/count.sh

# Held-out captions of the 3500-step run, drawn: what does the nearest template show?
drawings() {
  local templates=.cache/shapes/templates.tar
  [ -f "$templates" ] || scripts/make_shapes.py --templates "$templates" || return 1
  "$build/train" "$long/shapes-3500" --eval --set eval.samples=64 --out "$long/drawings" || return 1
  "$python" scripts/nearest_template.py "$long/drawings" "$templates" \
    --at-least color=.9 position=.9 background=.9
}

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

rm -rf "$long" && mkdir -p "$long"
check learning_1500 tests/learning.sh 1500 "$build" "$long/shapes-1500"
check learning_3500 tests/learning.sh 3500 "$build" "$long/shapes-3500"
check drawings drawings
check emoji emoji
check faults_50 "$python" tests/faults.py --kills 50 --leaks --train "$build/train"
count_print
