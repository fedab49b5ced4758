#!/usr/bin/python3
"""What several GPUs of one host give: one table, in less than four minutes.

    scripts/make_bench_data.py DATA/64 --size 64; scripts/make_bench_data.py DATA/256 --size 256
    scripts/scaling.py DATA OUT [--ranks N]      N: as many as there are GPUs; needs mpirun

curve   the losses of N processes with a micro-batch each beside one process with N: within rounding; parallel.zero 0,
        1 and 2; the same bits in two runs
kill    kill -9 of a process, any of them at any moment after a checkpoint: how long the others live, and whether the
        resumed run has the bits of an unbroken one; the same checkpoint continued by one process
weak    tokens a second and GPU of medium and base, T 16384, against the mean of the GPUs, each by itself in the same
        run; what was predicted, by the ops' times and by scripts/scaling_model.py from the step of one; and of a traced
        step (OUT/base-N.trace.json) how long GPUs talked, and how much of it with no op beside it
torch   the same of PyTorch's DistributedDataParallel, where there is PyTorch (scripts/torch_scaling.py); only if it is
        asked for, for it takes two minutes
Exit code 1 when a run fails, or a loss, the bits or the end of a killed run is not as it should be.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import run_metrics
import scaling_model
import trace_picture
from timed_run import ROOT, bench_sets, end_quietly, gpu_memory, gpus, wait_for_memory

SECTIONS = ["curve", "kill", "weak", "torch"]
WEAK = ("medium", 64, 60), ("base", 256, 20)  # config, pictures' side in pixels, steps
STEPS = 20  # of curves and of the run that is killed
SAVED = 10  # its checkpoint
WARM_UP = 5
FIRST_ROUNDING = 1e-5  # of the first step's loss and norm
ROUNDING = 0.01  # of a loss: what bf16 and another order of sums may do in STEPS steps
KILLED_WITHIN = 30  # seconds
RUN_LIMIT = 100  # seconds of a run


def median(values):
    return statistics.median(values) if values else float("nan")


class Runs:
    def __init__(self, args):
        self.args = args
        self.failed = []
        self.began = time.time()
        self.random = random.Random(args.seed)
        self.memory = gpu_memory()  # that others have

    def say(self, what, text, good=True):
        print(f"{what:<34} {text}{'' if good else '  WRONG'}", flush=True)
        if not good:
            self.failed.append(what)

    def command(self, config, size, run, processes, *more):
        """`size`: the pictures' side in pixels."""
        sets = [*bench_sets(self.args.data / str(size)), "data.threads=6", "eval.every=0", "eval.documents=0",
                "eval.samples=0", "checkpoint.every=0", *self.args.set]
        # A process bound to one core would decode and launch with that one.
        launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(processes)]
        command = [*(launch if processes > 1 else []), str(self.args.train), str(ROOT / "configs" / f"{config}.json"),
                   "--run-dir", str(self.args.out / run), "--device", self.args.device, "--memory", "keep"]
        for assignment in sets:
            command += ["--set", assignment]
        return command + list(more)

    def start(self, config, size, run, processes, *more, gpu=None):
        """`gpu`: the only one that it sees."""
        (self.args.out / run).mkdir(parents=True, exist_ok=True)
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with open(self.args.out / f"{run}.log", "a") as log:
            return subprocess.Popen(self.command(config, size, run, processes, *more), cwd=ROOT, stdout=log, stderr=log,
                                    env={**os.environ, **seen})

    def wait_for(self, process, run, steps):
        """Whether the run came to have so many steps."""
        until = time.time() + RUN_LIMIT
        while process.poll() is None and time.time() < until:
            if len(run_metrics.steps(self.args.out / run)) >= steps:
                return True
            time.sleep(0.1)
        return len(run_metrics.steps(self.args.out / run)) >= steps

    def train(self, config, size, run, processes, *more):
        """A run to its end; its steps."""
        process = self.start(config, size, run, processes, *more)
        try:
            code = process.wait(RUN_LIMIT)
        except subprocess.TimeoutExpired:
            self.end(process)
            code = "no end"
        if code:
            self.say(run, f"{code}: {self.last_lines(run)}", False)
        return run_metrics.steps(self.args.out / run)

    def last_lines(self, run):
        lines = (self.args.out / f"{run}.log").read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("error", "  hint"))] or lines[-3:]
        return " / ".join(told)[:400]

    def end(self, process):
        """Kills one of the processes of a job, which ends all; how long that took. Infinite of one that has ended."""
        if process.poll() is not None:
            return math.inf
        began = time.time()
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(self.random.choice(ranks)) if ranks else process.pid, signal.SIGKILL)
        took = math.inf
        try:
            process.wait(KILLED_WITHIN)
            took = time.time() - began
        except subprocess.TimeoutExpired:
            for pid in [*map(int, ranks), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        wait_for_memory(self.memory)
        return took


def worst_difference(a, b, key="loss"):
    if not a or len(a) != len(b):
        return float("inf")
    return max(abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(a, b))


def figures(steps):
    return [(row["loss"], row["grad_norm"]) for row in steps]


def state_hash(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def same_bits(runs, *names):
    a, b = (state_hash(runs.args.out / name / f"ckpt-{STEPS}") for name in names)
    return bool(a) and a == b


def exposed(path):
    """What a traced step says of the lane between processes."""
    if not path.exists():
        return "no trace"
    slices = trace_picture.read_trace(path)[2]
    took, hidden = trace_picture.copy_times(trace_picture.TRANSFERS[-1:], slices)
    return f"{trace_picture.copies_text(trace_picture.TRANSFERS[-1], slices)}; {took - hidden:.2f} ms with no op beside them"


def curve(runs, n):
    stop = ["--stop-at", str(STEPS)]
    one = runs.train("small", 64, "one", 1, *stop, "--set", f"train.micro_batches={n}")
    many = runs.train("small", 64, "many", n, *stop)
    again = runs.train("small", 64, "again", n, *stop)
    for key in "loss", "grad_norm":  # before rounding makes other routes of some tokens
        off = worst_difference(many[:1], one[:1], key)
        runs.say(f"first {key} of {n} x 1 beside 1 x {n}", f"{off:.1e} apart", off <= FIRST_ROUNDING)
    off = worst_difference(many, one)
    runs.say(f"losses of {n} x 1 beside 1 x {n}", f"{100 * off:.4f}% apart at most, in {len(many)} steps", off <= ROUNDING)
    for zero in 0, 2:
        off = worst_difference(runs.train("small", 64, f"zero{zero}", n, *stop, "--set", f"parallel.zero={zero}"), many)
        runs.say(f"parallel.zero {zero} beside 1", f"{100 * off:.4f}% apart at most", off <= ROUNDING)
    same = figures(many) == figures(again) and same_bits(runs, "many", "again")
    runs.say("two runs", "the same bits" if same else "other bits", same)
    if one and many:
        a, b = (median([row["tokens"] / row["seconds"] for row in rows[WARM_UP:]]) for rows in (many, one))
        runs.say("small, tokens/s", f"{a:.0f} by {n}, {b:.0f} by one that takes {n} micro-batches: {a / b / n:.3f} a GPU")


def kill(runs, n):
    out, save = runs.args.out, ["--set", f"checkpoint.every={SAVED}", "--set", "checkpoint.keep_last=9"]
    process = runs.start("small", 64, "killed", n, *save)
    runs.wait_for(process, "killed", SAVED + 3)
    until = time.time() + 60
    while not (out / "killed" / f"ckpt-{SAVED}").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.1)
    # In steps, updates and the saves that follow.
    time.sleep(runs.random.uniform(0, SAVED) * median([row["seconds"] for row in run_metrics.steps(out / "killed")]))
    if process.poll() is not None:
        runs.say("killed", runs.last_lines("killed"), False)
        return
    took = runs.end(process)
    runs.say("kill -9 of a process", f"the job ends after {took:.1f} s", took <= KILLED_WITHIN)
    for path in (out / "killed").glob("ckpt-*"):
        if path.name != f"ckpt-{SAVED}":
            shutil.rmtree(path)
    shutil.rmtree(out / "other", ignore_errors=True)
    shutil.copytree(out / "killed", out / "other")
    stop = ["--resume", "--stop-at", str(STEPS)]
    killed = runs.train("small", 64, "killed", n, *stop)
    other = runs.train("small", 64, "other", 1, *stop, "--set", f"train.micro_batches={n}")
    if (out / "many").exists():
        same = same_bits(runs, "killed", "many")
        runs.say("resumed", "the bits of an unbroken run" if same else "other bits than an unbroken run", same)
    off = worst_difference(other[-STEPS + SAVED :], killed[-STEPS + SAVED :])
    runs.say("continued by one process", f"{100 * off:.4f}% apart at most", off <= ROUNDING)


def alone(runs, config, size, n, steps, flags):
    """Seconds of a step and tokens a second of one GPU: the mean of n, each by itself and all at once. None: failed."""
    names = [f"{config}-1-{k}" for k in range(n)]
    jobs = [runs.start(config, size, name, 1, *flags, gpu=k) for k, name in enumerate(names)]
    enough = [runs.wait_for(job, name, WARM_UP + steps) for job, name in zip(jobs, names)]
    for job in jobs:
        runs.end(job)  # no checkpoint of so much
    rows = [run_metrics.steps(runs.args.out / name)[WARM_UP:] for name in names]
    for name, whole in zip(names, enough):
        if not whole:
            runs.say(name, runs.last_lines(name), False)
    if not all(enough):
        return None
    seconds, rates = [median([r["seconds"] for r in row]) for row in rows], [median_rate(row) for row in rows]
    each = ", ".join(f"{1e3 * s:.2f}" for s in seconds)
    seconds, rate = statistics.mean(seconds), statistics.mean(rates)
    runs.say(f"{config}, T {runs.args.tokens}, a GPU alone", f"{1e3 * seconds:.2f} ms a step ({each}), {rate:.0f} tokens/s")
    return seconds, rate


def median_rate(rows):
    return median([row["tokens"] / row["seconds"] for row in rows])


def say_predicted(runs, config, n, run, seconds, one):
    """What was predicted of a step, of its collectives and of memory."""
    log = (runs.args.out / f"{run}.log").read_text(errors="replace")
    told = re.findall(r"^a step: predicted ([\d.]+) ms \(collectives ([\d.]+) ms, ([\d.]+) of them exposed\)", log, re.M)
    memory = re.findall(r"device memory: (.*)$", log, re.M)
    if told:
        predicted, took, open_ = map(float, told[-1])
        runs.say("  predicted by its ops' times", f"{predicted:.2f} ms ({100 * (1e3 * seconds / predicted - 1):+.1f}%), "
                 f"collectives {took:.2f} ms, {open_:.2f} of them exposed")
    if memory:
        runs.say("  memory of a GPU", memory[-1])
    costs = json.loads((runs.args.out / run / "costs.json").read_text())
    rates, link = costs["collectives"], costs["link"]
    runs.say("  rates that it measured", f"reduced {rates['reduce'] / 1e9:.4g} GB/s, gathered {rates['gather'] / 1e9:.4g}, "
             f"{1e6 * rates['latency']:.0f} us; all copying: {link['d2h'] / 1e9:.1f} GB/s to the host, "
             f"{link['h2d'] / 1e9:.1f} from it, both at once {link['both_d2h'] / 1e9:.1f}, {link['both_h2d'] / 1e9:.1f}")
    if told and one and not runs.args.set:  # of the config as it is, beside a device
        model = scaling_model.Model(config, str(runs.args.train), 1e3 * one)
        guess, took, open_ = model.step(n, 1, (rates["reduce"] + rates["gather"]) / 2)
        runs.say("  predicted from one GPU's step", f"{1e3 * guess:.2f} ms ({100 * (seconds / guess - 1):+.1f}%), "
                 f"collectives {1e3 * took:.2f} ms, {1e3 * open_:.2f} of them exposed")


def weak(runs, n):
    flags = ["--tokens", str(runs.args.tokens)]
    for config, size, steps in WEAK:
        one, rate_of_one = alone(runs, config, size, n, steps, flags) or (None, None)
        run, trace = f"{config}-{n}", runs.args.out / f"{config}-{n}.trace.json"
        process = runs.start(config, size, run, n, *flags, "--trace", str(trace))
        enough = runs.wait_for(process, run, WARM_UP + steps)
        runs.end(process)
        rows = run_metrics.steps(runs.args.out / run)[WARM_UP:]
        if not enough:
            runs.say(run, runs.last_lines(run), False)
            continue
        took, rate = median([row["seconds"] for row in rows]), median_rate(rows) / n
        share = f" = {rate / rate_of_one:.3f} of one" if one else ""
        runs.say(f"{config}, T {runs.args.tokens}, {n} GPUs", f"{1e3 * took:.2f} ms a step, {rate:.0f} tokens/s a GPU{share}")
        if n > 1:
            say_predicted(runs, config, n, run, took, one)
            runs.say("  a traced step", exposed(trace))


def torch(runs, n):
    for config, size, _ in WEAK:
        command = [sys.executable, str(ROOT / "scripts/torch_scaling.py"), str(ROOT / "configs" / f"{config}.json")]
        command += [str(runs.args.out / f"torch-{config}"), "--data", str(runs.args.data / str(size))]
        command += ["--device", runs.args.device, "--ranks", str(n), "--tokens", str(runs.args.tokens)]
        code = subprocess.run([*command, "--train", str(runs.args.train)]).returncode
        if code == 77:  # which it says itself
            return
        if code:
            runs.say(f"{config}, PyTorch", f"exit code {code}", False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="with the folders 64 and 256")
    parser.add_argument("out", type=Path, help="folder for runs and logs")
    parser.add_argument("--ranks", type=int, default=gpus(), help="processes (default: GPUs)")
    parser.add_argument("--sections", nargs="+", default=SECTIONS[:-1], choices=SECTIONS)
    parser.add_argument("--device", default="cuda", help="as ./train takes it")
    parser.add_argument("--tokens", type=int, default=16384, help="slots of a micro-batch of `weak` (default 16384)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of the moment of the kill; printed")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")
    args = parser.parse_args()
    args.data, args.out, args.train = args.data.resolve(), args.out.resolve(), args.train.resolve()
    if args.ranks < 1:
        sys.exit("error: no GPU is visible\n  hint: --ranks 2 --set parallel.collectives=host tries two processes on one")
    if not args.train.is_file():
        sys.exit(f"error: there is no {args.train}\n  hint: make builds it")
    for path in (args.data / size / "bench.tar" for size in ("64", "256")[: 1 + bool({"weak", "torch"} & {*args.sections})]):
        if not path.is_file():
            sys.exit(f"error: there is no {path}\n  hint: scripts/make_bench_data.py {path.parent} --size {path.parent.name}")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty\n  hint: name a new folder: runs there would be continued")
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    print(f"{args.ranks} processes, seed {args.seed}", flush=True)
    for section in args.sections:
        {"curve": curve, "kill": kill, "weak": weak, "torch": torch}[section](runs, args.ranks)
    print(f"{time.time() - runs.began:.0f} s; {len(runs.failed)} wrong")
    sys.exit(bool(runs.failed))


if __name__ == "__main__":
    end_quietly(main)
