#!/usr/bin/env bash
# Resume is bit-exact: a run that a signal stops, that goes on, stops where it was told to and goes on again ends with
# the same weights, moments, losses and place in the data as one that is never stopped. With accumulation, EMA, shuffled
# data so small that every part crosses epochs, and any number of loader and compute threads.
#   tests/scripts/resume.sh [BUILD [FLAG...]]     flags of ./train for every run, such as --device cuda
set -euo pipefail
cd "$(dirname "$0")/../.."
train=${1:-build}/train
shift $(($# > 0))
python=${PYTHON:-/usr/bin/python3}
samples=40
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 "$pid"; rm -rf "$dir"' EXIT
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar

# The first samples; each has two members.
tar tf .cache/shapes/shapes.tar >"$dir/members"
head -$((2 * samples)) "$dir/members" >"$dir/first"
mkdir "$dir/samples"
tar xf .cache/shapes/shapes.tar -C "$dir/samples" -T "$dir/first"
tar cf "$dir/small.tar" -C "$dir/samples" -T "$dir/first"

flags=(configs/demo.json --tokens 256 --steps 2000 --set train.micro_batches=2 --set train.ema_every=2
  --set eval.every=0 --set eval.documents=0 --set eval.samples=0 --set checkpoint.every=0 --set checkpoint.keep_last=9
  --set "data.sources=[{\"type\": \"webdataset\", \"path\": \"$dir/small.tar\"}]" "$@")
run() {
  "$train" "${flags[@]}" "$@" 2>>"$dir/log" || { tail -5 "$dir/log"; exit 1; }
}

# Stopped by a signal, at whichever step it comes; far from the schedule's end.
"$train" "${flags[@]}" --run-dir "$dir/parts" --set data.threads=3 --set run.threads=1 2>"$dir/log" &
pid=$!
until grep -qs '"step":4,' "$dir/parts/metrics.jsonl"; do
  kill -0 "$pid" 2>/dev/null || { tail -5 "$dir/log"; exit 1; }
  sleep 0.02
done
kill -TERM "$pid"
rc=0
wait "$pid" || rc=$?
pid=
saved=$(cd "$dir/parts" && echo ckpt-*)
first=${saved#ckpt-}
if [ "$rc" -ne 143 ] || [ ! -f "$dir/parts/ckpt-$first/state.json" ]; then
  echo "SIGTERM: exit code $rc and $saved, expected 143 and one checkpoint"
  tail -5 "$dir/log"
  exit 1
fi

last=$((first + 10))
run --run-dir "$dir/parts" --resume --stop-at $((first + 5)) --set data.threads=2 --set run.threads=3
run --run-dir "$dir/parts" --resume --stop-at $last --set data.threads=1
run --run-dir "$dir/whole" --stop-at $last
for file in model ema optimizer-0x1; do
  cmp "$dir/whole/ckpt-$last/$file.safetensors" "$dir/parts/ckpt-$last/$file.safetensors"
done

"$python" - "$dir" "$first" "$last" "$samples" <<'P'
import json, sys

folder, first, last, samples = sys.argv[1], *map(int, sys.argv[2:])
TIMES = ("seconds", "data_wait", "tokens_per_second", "flops_per_second", "mfu")


def steps(run):
    rows = [row for row in map(json.loads, open(f"{folder}/{run}/metrics.jsonl")) if "loss" in row]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def state(run, step):
    return json.load(open(f"{folder}/{run}/ckpt-{step}/state.json"))["state"]


whole, parts = steps("whole"), steps("parts")
if [row["step"] for row in whole] != list(range(last)):
    sys.exit(f"metrics.jsonl has the steps {[row['step'] for row in whole]}, expected 0 to {last - 1}")
if len(parts) != len(whole):
    sys.exit(f"metrics.jsonl has {len(parts)} steps in parts, {len(whole)} in one")
for a, b in zip(whole, parts):
    if a != b:
        sys.exit(f"metrics.jsonl: {a}\nin one, {b}\nin parts")
if state("whole", last) != state("parts", last):
    sys.exit(f"state.json: {state('whole', last)}\nin one, {state('parts', last)}\nin parts")
drawn = [state("parts", step)["loader"]["drawn"][0] for step in (first, last)]
if drawn[0] <= samples or drawn[1] - drawn[0] <= samples:
    sys.exit(f"{drawn} of {samples} samples were drawn: no epoch crossed in both parts")
P
echo "$last steps and $first (SIGTERM) + 5 + 5 gave the same bits, losses and place in the data"
