#!/usr/bin/python3
"""What it costs to have the optimizer's state on the host, and that it changes no bit: a run of CONFIG in each budget.

    tests/gpu/bench_state.py CONFIG [--data FOLDER] [--tokens 4096] [--steps 12] [--budgets GB ...] [--set KEY=VALUE ...]

Prints for each budget what of the state left the device, a step's predicted and measured milliseconds (medians, of
steps without and with EMA), device memory planned and in use, and the seconds until the first step began. Every step's
loss and gradient norm must be those of the largest budget, digit by digit; exit code 1 where one is not. Runs are
killed before they write a checkpoint. FOLDER is one of scripts/make_bench_data.py, of the images that CONFIG takes.
"""
import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import run_metrics

WARM_UP = 3  # steps before those that count


def run(args, budget, folder):
    """The step lines and the log of a run in this budget."""
    steps = WARM_UP + args.steps
    command = ["./train", args.config, "--run-dir", folder / "run", "--device", args.device, "--tokens", str(args.tokens)]
    sets = [f"memory.budget_gb={budget}", f"train.steps={steps + 1000}", "eval.every=0", "checkpoint.every=0",
            "checkpoint.copy=never"]
    if args.data:
        sets += [f"data.tokenizer={args.data}/bench.bpe",
                 f'data.sources=[{{"type":"webdataset","path":"{args.data}/bench.tar"}}]', "data.max_caption=96"]
    for assignment in sets + args.set:
        command += ["--set", assignment]
    log, lines, began = folder / "log", [], time.time()
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        while process.poll() is None and len(lines) < steps and time.time() - began < args.limit:
            time.sleep(0.2)
            lines = run_metrics.steps(folder / "run")
        process.kill()
        process.wait()
    said = log.read_text(errors="replace")
    if len(lines) < steps:
        sys.exit(f"budget {budget}: {len(lines)} of {steps} steps\n" + "\n".join(said.splitlines()[-8:]))
    return lines[:steps], said


def found(pattern, text):
    matches = re.findall(pattern, text)
    return matches[-1] if matches else None


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1].strip())
    parser.add_argument("config")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budgets", type=float, nargs="+", default=[141, 60, 40, 24, 18])
    parser.add_argument("--limit", type=float, default=300, help="seconds of one run")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    reference, bad = None, False
    for budget in sorted(args.budgets, reverse=True):
        with tempfile.TemporaryDirectory() as folder:
            lines, said = run(args, budget, Path(folder))
        same = [(line["loss"], line["grad_norm"]) for line in lines]
        reference = reference or same
        ms = [1e3 * line["seconds"] for line in lines[WARM_UP:]]
        left = found(r"policy \w+; (.*)", said) or "all of the state on the device"
        predicted = found(r"a step: predicted ([\d.]+) ms, measured ([\d.]+) ms", said)
        memory = found(r"device memory: planned ([\d.]+) GB, in use ([\d.]+) GB", said)
        start = found(r"the first step begins after ([\d.]+) s", said)
        differ = sum(a != b for a, b in zip(same, reference))
        bad |= differ > 0
        print(f"{budget:g} GB: {left}; {statistics.median(ms):.1f} ms a step, {max(ms):.1f} the longest"
              + (f"; predicted {predicted[0]}, measured {predicted[1]} ms" if predicted else "")
              + (f"; memory planned {memory[0]}, in use {memory[1]} GB" if memory else "")
              + (f"; started in {start} s" if start else "")
              + (f"; {differ} OF {len(same)} STEPS DIFFER" if differ else "; the same bits"), flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
