#!/usr/bin/env bash
# Comparison with PyTorch in float64: tests/ops/parity.sh ops|model [BUILD]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${2:-build}
python=${PYTHON:-/usr/bin/python3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
case $1 in
  ops)
    "$build/tests/dump_ops" "$dir/ops"
    "$python" tests/ops/parity_ops.py "$dir/ops"
    ;;
  model)
    # Small models put together in every way, then a real step of the demo.
    "$build/tests/dump_model" "$dir/models"
    [ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
    "$build/train" configs/demo.json --dump "$dir/demo" --run-dir "$dir/run" --set train.micro_batches=2 \
      --set flow.t_uniform=0.3
    "$python" tests/ops/parity_model.py "$dir"/models/model_*
    "$python" tests/ops/parity_model.py --times "$dir/demo"
    ;;
esac
