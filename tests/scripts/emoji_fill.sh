#!/usr/bin/env bash
# How full packs of real images and captions are: the emoji set at 4096 token slots, for a model small enough that only
# packing matters. Skipped (77) where the set was never made.
#   tests/scripts/emoji_fill.sh [BUILD]
set -euo pipefail
cd "$(dirname "$0")/../.."
train=${1:-build}/train
python=${PYTHON:-/usr/bin/python3}
[ -f .cache/emoji/emoji.tar ] || { echo "there is no .cache/emoji/emoji.tar (make demo-emoji draws it, and make test-long runs this)" && exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$train" configs/emoji.json --run-dir "$dir/run" --tokens 4096 --steps 10 --set model.dim=16 --set model.layers=1 \
  --set model.heads=1 --set model.kv_heads=1 --set model.head_dim=16 --set model.cond_dim=16 --set eval.every=0 \
  --set eval.documents=0 --set eval.samples=0 --set checkpoint.every=0 2>"$dir/log" || { tail -5 "$dir/log"; exit 1; }
"$python" - "$dir/run/metrics.jsonl" <<'P'
import json, sys
AT_LEAST = 0.97
fill = [row["fill"] for row in map(json.loads, open(sys.argv[1])) if "fill" in row]
print(f"{len(fill)} packs of 4096 slots are {sum(fill) / len(fill):.2%} full, the worst {min(fill):.2%} "
      f"(at least {AT_LEAST:.0%})")
sys.exit(len(fill) != 10 or min(fill) < AT_LEAST)
P
