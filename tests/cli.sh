#!/usr/bin/env bash
# The command line: what must be refused is refused with exit code 2, a message and nothing created; what needs no data
# works without any.
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
train=$1/train

refused() { # EXPECTED_TEXT ARGS...
  local expect=$1 rc=0
  shift
  "$train" "$@" >"$dir/out" 2>&1 || rc=$?
  if [ "$rc" -ne 2 ] || ! grep -q -- "$expect" "$dir/out" || ! grep -q 'hint:' "$dir/out"; then
    echo "expected exit 2 and '$expect' with a hint from: $*"
    cat "$dir/out"
    exit 1
  fi
}

run=(--run-dir "$dir/run")
refused 'unknown flag --bogus' configs/demo.json --bogus
refused 'needs a value' configs/demo.json --steps
refused 'exclude each other' configs/demo.json --resume --from x
refused 'exclude each other' configs/demo.json --plan --eval
refused 'no/such.json' no/such.json
refused 'train.lr' configs/demo.json --set train.lr=-1
refused 'train.steps' configs/demo.json --set train.stepz=1
refused 'CUDA' configs/demo.json --device cuda
refused 'data.sources' configs/base.json "${run[@]}"
refused 'no/shapes.tar' configs/demo.json "${run[@]}" --set 'data.sources=[{"type":"webdataset","path":"no/shapes.tar"}]'
refused 'no checkpoint' configs/demo.json "${run[@]}" --eval
refused 'budget' configs/base.json --plan --set memory.budget_gb=1
refused 'memory.per_tensor' configs/demo.json --plan --set 'memory.per_tensor={"x":"recompute"}'
[ ! -e "$dir/run" ] || { echo "a refused run left its folder"; exit 1; }

for config in configs/*.json; do
  "$train" "$config" --plan --set memory.budget_gb=1000 >"$dir/plan"
  grep -q 'activations (arena)' "$dir/plan"
  "$train" "$config" --print-config >"$dir/config"
  grep -q 'micro_batch_tokens' "$dir/config"
done
"$train" --help | grep -q -- 'train.warmup_steps'

# A short run, its lock and its refusal to be overwritten; then its uses.
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
short=(--set data.micro_batch_tokens=256 --set eval.documents=16 --set eval.samples=2 --set eval.sampler_steps=2)
"$train" configs/demo.json "${run[@]}" "${short[@]}" --steps 2 2>"$dir/log"
[ -f "$dir/run/samples/step-000002.png" ] && [ -f "$dir/run/ckpt-2/state.json" ]
refused 'already holds checkpoints' configs/demo.json "${run[@]}" "${short[@]}" --steps 2
"$train" "$dir/run" --eval --out "$dir/drawings" >"$dir/eval.json" 2>"$dir/log"
grep -q '"flow"' "$dir/eval.json" && [ -f "$dir/drawings/captions.tsv" ]
"$train" "$dir/run" --sample "a small red circle" --out "$dir/one.png" 2>"$dir/log"
"$train" "$dir/run" --describe "$dir/one.png" >"$dir/caption" 2>"$dir/log"
printf 'a red square\na blue circle\n' | "$train" "$dir/run" --sample - --out "$dir/two.png" 2>"$dir/log"
[ -s "$dir/one.png" ] && [ -s "$dir/two.png" ]
refused 'cannot' "$dir/run" --describe no/such.png
refused 'train.steps' "$dir/run" --set train.steps=0
"$train" configs/demo.json --run-dir "$dir/tuned" "${short[@]}" --steps 1 --init "$dir/run/ckpt-2" 2>"$dir/log"
"$train" configs/demo.json "${run[@]}" "${short[@]}" --steps 3 --from "$dir/run/ckpt-2" 2>"$dir/log"
[ -f "$dir/run/ckpt-3/state.json" ]
echo "command line: all as it should be"
