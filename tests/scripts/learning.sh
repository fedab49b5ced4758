#!/usr/bin/env bash
# The learning test on drawn shapes: trains configs/shapes.json to STEPS and compares with the bounds.
#   tests/scripts/learning.sh 300|1500|3500 [BUILD [RUN_FOLDER]]
# BUILD is build unless given; the run stays only where it is given a folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
steps=$1
build=${2:-build}
python=${PYTHON:-/usr/bin/python3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
run=${3:-$dir/run}
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
"$build/train" configs/shapes.json --run-dir "$run" --steps "$steps" 2>"$dir/log" || { tail -5 "$dir/log"; exit 1; }
"$python" - "$run/metrics.jsonl" "$steps" <<'P'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
last = [r["eval"] for r in rows if "eval" in r][-1]
# 300: seeds 1 to 8 give .0915 +- .0012 and .969 +- .015 (tests/scripts/learning_spread.sh), seed 1 alone .0914 to .0940
# with four kinds of OpenBLAS kernels; the bounds are four deviations away. Held out by key instead of by combination
# .0968 to .0996. Nearer faults, as clipping that is left out (.0938 to .0954), are for test_keys.py.
# 1500: seeds 1 to 5 give .0238 +- .0006 and .997 +- .007. 3500: seeds 1 to 3 give .0187 to .0192.
bounds = {300: (0.0962, 0.91), 1500: (0.0262, 0.98), 3500: (0.0205, 0.98)}
flow, retrieval = bounds[int(sys.argv[2])]
print(f"{sys.argv[2]} steps: held-out flow {last['flow']:.4f} (at most {flow}), caption retrieval "
      f"{last['retrieval']:.3f} (at least {retrieval})")
sys.exit(not (last["flow"] <= flow and last["retrieval"] >= retrieval))
P
