#!/usr/bin/env bash
# What the bounds of tests/scripts/learning.sh are made from: configs/shapes.json to STEPS steps with seeds 1 .. N.
#   tests/scripts/learning_spread.sh STEPS [N [BUILD [--set KEY=VALUE ...]]]
# Prints each seed's held-out flow and caption retrieval, then mean, deviation and the bound at 4 deviations. With flags
# it shows what a fault would do to them: --set train.ema=0, --set train.clip=0.
set -eu
cd "$(dirname "$0")/../.."
steps=$1 seeds=${2:-5} build=${3:-build}
shift $(($# < 3 ? $# : 3))
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
for seed in $(seq "$seeds"); do
  "$build/train" configs/shapes.json --run-dir "$dir/$seed" --steps "$steps" --seed "$seed" --set eval.samples=0 "$@" \
    2>"$dir/log" || { tail -5 "$dir/log" && exit 1; }
done
"${PYTHON:-/usr/bin/python3}" - "$dir" "$seeds" <<'P'
import json, statistics, sys
figures = []
for seed in range(1, int(sys.argv[2]) + 1):
    rows = [json.loads(line) for line in open(f"{sys.argv[1]}/{seed}/metrics.jsonl")]
    last = [r["eval"] for r in rows if "eval" in r][-1]
    figures.append((last["flow"], last["retrieval"]))
    print(f"seed {seed}: flow {last['flow']:.4f}  retrieval {last['retrieval']:.3f}")
for name, values, sign in (("flow", [f for f, _ in figures], 1), ("retrieval", [r for _, r in figures], -1)):
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{name}: mean {mean:.4f}, deviation {std:.4f}, bound {mean + sign * 4 * std:.4f}")
P
