#!/usr/bin/python3
"""What guards a run against its hardware and its data: --verify-every and train.spike.

    tests/scripts/guards.py BUILD [FLAG...]     flags of ./train for every run, such as --device cuda

A bit that flips in one matrix product (BUILD/tests/flip_gemm.so, on the CPU alone) is seen before the update, named and
saved apart; replaying changes no bit of a run. A step whose gradient norm is beyond train.spike times the median is
skipped, as computed again here; too many in a row send the run back to its newest checkpoint with the data after them,
and too many of that end it. Exit code 1 on the first thing that is not as it should be.
"""
import json, os, re, shutil, statistics, subprocess, sys, tempfile
from pathlib import Path

from checks import check, run_metrics

ROOT = Path(__file__).resolve().parents[2]
BASE = ["configs/demo.json", "--tokens", "256", "--steps", "60"] + [
    part for key, value in {"model.layers": 2, "model.dim": 64, "checkpoint.every": 0, "checkpoint.keep_last": 9,
                            "eval.every": 0, "eval.documents": 0, "eval.samples": 0, "train.micro_batches": 2,
                            "train.warmup_steps": 4}.items()
    for part in ("--set", f"{key}={value}")
]


class Runs:
    def __init__(self, build, flags, folder):
        self.build, self.flags, self.folder = Path(build).resolve(), flags, folder

    def run(self, name, *flags, code=0, env=None):
        command = [self.build / "train", *BASE, *self.flags, "--run-dir", self.folder / name, *flags]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, **(env or {})})
        check(done.returncode == code, f"{name} {flags}: exit code {done.returncode}, not {code}\n{done.stderr[-2000:]}")
        return done.stderr

    def rows(self, name):
        return run_metrics.steps(self.folder / name)

    def figures(self, name):
        return [{key: row.get(key) for key in ("step", "loss", "grad_norm", "tokens", "skipped")} for row in self.rows(name)]

    def same_state(self, one, other, step):
        for file in ("model", "ema", "optimizer-0x1"):
            a, b = (self.folder / name / f"ckpt-{step}" / f"{file}.safetensors" for name in (one, other))
            check(a.read_bytes() == b.read_bytes(), f"{a} is not {b}")


def test_replays(runs):
    """Replaying every second step's first micro-batch leaves the run as it is."""
    runs.run("plain", "--stop-at", 6)
    runs.run("verified", "--stop-at", 6, "--verify-every", 2)
    check(runs.figures("plain") == runs.figures("verified"), "a verified run has other figures")
    runs.same_state("plain", "verified", 6)
    check(not list((runs.folder / "verified").glob("corrupted-*")), "something was saved apart without a reason")


def test_flipped_bit(runs):
    """Each of several single wrong products ends the run at its own step, before anything was updated by it."""
    library, count = runs.build / "tests/flip_gemm.so", runs.folder / "calls"
    env = {"LD_PRELOAD": str(library), "FLIP_GEMM_COUNT": str(count)}
    runs.run("counted", "--stop-at", 4, "--verify-every", 1, env=env)
    calls = int(count.read_text())
    check(calls > 100, f"{calls} products in 4 steps")
    seen = 0
    for share in (0.3, 0.45, 0.62, 0.81):
        name = f"flipped-{share}"
        env["FLIP_GEMM_AT"] = str(int(calls * share))
        command = [runs.build / "train", *BASE, "--run-dir", runs.folder / name, "--stop-at", 4, "--verify-every", 1]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
        if done.returncode == 0:
            continue  # it hit the second micro-batch, which is not replayed, or nothing that a gradient reads
        seen += 1
        check(done.returncode == 1, f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        said = re.search(r"error: step (\d+): .*silent data corruption in (\S+)", done.stderr)
        check(said, f"{name}: no such error\n{done.stderr[-2000:]}")
        step = int(said.group(1)) - 1
        check([row["step"] for row in runs.rows(name)] == list(range(step)), f"{name}: rows {runs.rows(name)}")
        apart = runs.folder / name / f"corrupted-{step + 1:06d}"
        hashes = json.loads((apart / "hashes.json").read_text())
        check(hashes["step"] == step + 1 and hashes["backend"] == "cpu", str(hashes)[:200])
        check(hashes["parameters"], "no parameter is named")
        for parameter, (first, second, third) in hashes["parameters"].items():
            check(first != second and third in (first, second), f"{parameter}: {first} {second} {third}")
        check(said.group(2).rstrip(",;") in hashes["parameters"], f"{said.group(2)} is not in hashes.json")
        for file in ("grads.safetensors", "params.safetensors", "micro_0.safetensors"):
            check((apart / file).stat().st_size > 1000, f"{apart / file} is empty")
    check(seen >= 2, f"{seen} of 4 flipped bits were seen: half of all products are replayed ones")


def test_spikes(runs):
    """The steps that are skipped are those beyond the limit, and what a resume remembers is exact."""
    flags = ("--set", "train.spike=1.05", "--set", "train.spike_patience=1000")
    runs.run("spikes", *flags, "--stop-at", 50)
    norms, skipped = [], 0
    for row in runs.rows("spikes"):
        limit = 1.05 * statistics.median(norms[-64:]) if len(norms) >= 16 else float("inf")
        check(abs(row["grad_norm"] / limit - 1) > 1e-7, "too close to tell")
        check(("skipped" in row) == (row["grad_norm"] > limit), f"limit {limit}: {row}")
        if "skipped" in row:
            check(row["skipped"] == "spike", str(row))
            skipped += 1
        else:
            norms.append(row["grad_norm"])
    check(2 <= skipped <= 32, f"{skipped} of 50 steps were skipped")
    for end in (23, 37, 50):
        runs.run("parts", *flags, "--stop-at", end, *(["--resume"] if end > 23 else []))
    check(runs.figures("parts") == runs.figures("spikes"), "a resumed run skips other steps")
    runs.same_state("parts", "spikes", 50)


def test_going_back(runs):
    """Spikes in a row: back to the checkpoint, on with later data, at most as often as allowed."""
    flags = ("--set", "train.spike=0.1", "--set", "train.spike_patience=3", "--set", "train.spike_rewinds=2",
             "--set", "checkpoint.every=10")
    said = runs.run("back", *flags, code=1)
    # Norms 1 to 16 set the median, all after them are beyond a tenth of it: steps 17, 18, 19, three times over.
    back = re.findall(r"back from step (\d+) to \S+ckpt-(\d+), .*; (\d) of 2", said)
    check([(to, n) for _, to, n in back] == [("10", "1"), ("10", "2")], f"went back {back}\n{said[-2000:]}")
    check(re.search(r"error: step \d+: 3 steps in a row .* sent back 2 times already", said), said[-1500:])
    check(len(re.findall("SKIPPED: spike", said)) == 9, f"{said[-1500:]}")
    rows = runs.rows("back")
    check([row["step"] for row in rows] == sorted({row["step"] for row in rows}), "a step is there twice")
    # The data went on: the steps after going back are not those of a run that never left.
    runs.run("straight", "--stop-at", 16, "--set", "checkpoint.every=10")
    straight = {row["step"]: row["loss"] for row in runs.rows("straight")}
    again = [row for row in rows if 10 <= row["step"] < 16]
    check(all(row["loss"] == straight[row["step"]] for row in rows if row["step"] < 10), "the first ten differ")
    check(again and all(row["loss"] != straight[row["step"]] for row in again), "the same data a second time")
    said = runs.run("nowhere", "--set", "train.spike=0.1", "--set", "train.spike_patience=2", code=1)
    check("no checkpoint to go back to" in said, said[-1500:])


def main():
    runs = Runs(sys.argv[1], sys.argv[2:], Path(tempfile.mkdtemp()))
    tests = [test_replays, test_spikes, test_going_back] + ([] if sys.argv[2:] else [test_flipped_bit])
    try:
        if not (ROOT / ".cache/shapes/shapes.tar").exists():
            subprocess.run(["scripts/make_shapes.py", ".cache/shapes/shapes.tar"], cwd=ROOT, check=True)
        for test in tests:
            test(runs)
    except AssertionError as error:
        print(f"{test.__name__}: FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(runs.folder, ignore_errors=True)
    print(f"{len(tests)} guards: as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
