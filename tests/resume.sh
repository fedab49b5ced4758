#!/usr/bin/env bash
# Resume is bit-exact: 2N steps = N steps + resume + N steps, with accumulation, EMA, shuffled data and any number of
# loader and compute threads.
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
flags=(configs/demo.json --set train.micro_batches=2 --tokens 256 --set eval.every=0 --set checkpoint.every=0
  --set eval.documents=0 --set eval.samples=0 --set train.ema_every=2 --steps 10)
run() { ./train "${flags[@]}" "$@" 2>>"$dir/log" || { tail -5 "$dir/log"; exit 1; }; }
run --run-dir "$dir/whole" --set data.threads=1
run --run-dir "$dir/halves" --set data.threads=3 --stop-at 5 --set run.threads=1
run --run-dir "$dir/halves" --set data.threads=2 --resume --set run.threads=3
for file in model ema optimizer-0x1; do
  cmp "$dir/whole/ckpt-10/$file.safetensors" "$dir/halves/ckpt-10/$file.safetensors"
done
echo "10 steps and 5 + 5 steps gave the same bits"
