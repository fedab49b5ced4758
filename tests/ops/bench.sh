#!/usr/bin/env bash
# How fast a training step of configs/demo.json is: against the PyTorch reference on the same cores, and its products
# against plain OpenBLAS. About two minutes; other load on the machine disturbs it.
#   tests/ops/bench.sh BUILD
# Rounds of PyTorch, the engine and plain products take turns, so that a machine that slows down slows all of them.
# Exit code 1 when the engine is not fast enough, 2 where a comparison would say nothing (see bench_reference.py).
set -eu
cd "$(dirname "$0")/../.."
build=$1
python=${PYTHON:-/usr/bin/python3}
rounds=5
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

quietly() { # COMMAND...; what it said only when it fails
  "$@" >"$dir/said" 2>&1 || { tail -5 "$dir/said" >&2; exit 1; }
}

[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
quietly ./train configs/demo.json --run-dir "$dir/run" --dump "$dir/step"
# The rows of products vary a little with the pack: their mean over eight.
quietly ./train configs/demo.json --run-dir "$dir/run" --dump "$dir/packs" --set train.micro_batches=8
"$build/tests/bench_gemm" "$dir/packs" >"$dir/products"

for round in $(seq $rounds); do
  echo "round $round of $rounds" >&2
  "$python" tests/ops/bench_reference.py "$dir/step" >"$dir/torch.$round" ||
    { cat "$dir/torch.$round" >&2; echo "bench: no comparison with PyTorch" >&2; exit 2; }
  quietly ./train configs/demo.json --run-dir "$dir/run.$round" --stop-at 100 --set eval.every=0 \
    --set checkpoint.every=0 --profile
  mv "$dir/said" "$dir/profile.$round"
  "$build/tests/bench_gemm" >"$dir/rates.$round"
done

"$python" - "$dir" $rounds <<'P'
import json, os, re, sys
from statistics import median

WARM_UP = 20  # steps of a round that do not count: the loader fills its cache
AT_LEAST = 1.5

folder, rounds = sys.argv[1], range(1, int(sys.argv[2]) + 1)
products = {op: float(gflop) for op, gflop in map(str.split, open(f"{folder}/products"))}
text = lambda name, k: open(f"{folder}/{name}.{k}").read()

engine, torch, blas, waits, rates, profiles = [], [], [], [], {}, []
for k in rounds:
    steps = [s for s in map(json.loads, open(f"{folder}/run.{k}/metrics.jsonl")) if "seconds" in s]
    waits += [s["data_wait"] * 1e3 for s in steps[WARM_UP:]]
    # Per token, since packs differ in how full they are: microseconds.
    engine.append(median((s["seconds"] - s["data_wait"]) / s["tokens"] * 1e6 for s in steps[WARM_UP:]))
    tokens = sum(s["tokens"] for s in steps) / len(steps)
    said = text("torch", k)
    torch_tokens = int(re.search(r"(\d+) tokens a step", said)[1])
    torch.append(float(re.search(r"best: ([\d.]+) ms", said)[1]) / torch_tokens * 1e3)
    blas.append([float(gflops) for gflops in re.search(r"torch ([\d.]+) GFLOP/s, OpenBLAS ([\d.]+)", said).groups()])
    for shape, middle, best in re.findall(r"(\S+) median ([\d.]+) best ([\d.]+)", text("rates", k)):
        rates.setdefault(shape, []).append((float(middle), float(best)))
    mean_step = sum(s["seconds"] for s in steps) / len(steps) * 1e3
    profiles.append({op: (float(ms), float(ms) / mean_step) for op, ms in
                     re.findall(r"^(\S+) +[\d.]+ +([\d.]+) +[\d.]+% +[\d.]+ +[\d.]+$", text("profile", k), re.M)})

ratios = [t / e for t, e in zip(torch, engine)]
print(f"configs/demo.json, {os.cpu_count()} cores, {tokens:.0f} tokens a step, medians of {len(rounds)} rounds "
      f"({len(waits)} steps of the engine)\n")
print(f"{'training step':<36}{'ms':>8}{'tokens/s':>10}")
for name, costs in (("PyTorch, best thread count", torch), ("this engine, which keeps an EMA too", engine)):
    print(f"{name:<36}{median(costs) * tokens / 1e3:>8.1f}{1e6 / median(costs):>10.0f}")
print(f"{'waiting for data':<36}{median(waits):>8.3f}")
print(f"the engine is {median(ratios):.2f} times as fast (rounds: {min(ratios):.2f} to {max(ratios):.2f}; at least "
      f"{AT_LEAST} is wanted);")
print("a product of 1024^3 on all cores: torch {:.0f}, OpenBLAS {:.0f} GFLOP/s\n".format(*map(median, zip(*blas))))

print(f"{'products, all cores':<36}{'ms':>8}{'of step':>10}{'GFLOP/s':>10}")
by_op = {op: (median(p[op][0] for p in profiles), median(p[op][1] for p in profiles)) for op in products}
for op, (ms, share) in sorted(by_op.items(), key=lambda item: -item[1][0]):
    print(f"  {op:<34}{ms:>8.2f}{share:>10.1%}{products[op] / ms * 1e3:>10.1f}")
total = [sum(p[op][0] for op in products) for p in profiles]
share = median(sum(p[op][1] for op in products) for p in profiles)
rate = median(sum(products.values()) / ms * 1e3 for ms in total)
print(f"{'all of them':<36}{median(total):>8.2f}{share:>10.1%}{rate:>10.1f}")
for shape, found in rates.items():
    middle = median(m for m, _ in found)
    print(f"{'plain OpenBLAS, ' + shape:<36}{'':>18}{middle:>10.1f}  best {max(b for _, b in found):.1f}; "
          f"the engine's rate is {rate / middle:.0%} of the median")
print("FLOPs at the rows the packs have. An op's time includes what it does around its product: gathering rows,\n"
      "SwiGLU, the softmax of the head.")
sys.exit(median(ratios) < AT_LEAST)
P
