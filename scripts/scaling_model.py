#!/usr/bin/env python3
"""What several GPUs should give: memory, communication and time, by arithmetic, as the tables of docs/SCALING.md.

    scripts/scaling_model.py [--train build/train] [--measured base=169.3 ...] [--check]

The engine's planner says what one process needs and how long it computes (./train CONFIG --plan --device cuda, for
which the build needs the CUDA backend, but the machine no GPU); a step measured on one GPU takes the place of its
prediction. From the config come the buckets, in which gradients are reduced and weights gathered. The rest is this
file: a lane of ops and a lane of collectives, side by side. --check holds memory and times against the planner's own
for 2, 4 and 8 processes, which need mpirun. Needs nothing but Python 3.

Links: between two GPUs of a host 260 GB/s, as NCCL was measured on two H200; among more 340 GB/s of bus bandwidth
(measured by others on H100s without NVLS); between hosts a network adapter of 400 Gb/s = 50 GB/s for each GPU or each
host. A collective takes (N - 1) / N of its tensor's bytes over that, twice for an all-reduce, and the latency of a
ring: 20 us to begin, 1 us from GPU to GPU, 5 us from host to host (assumed). What collectives cost the kernels beside
them, and waiting for the slower process, are shares as two H200 have them.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path

from timed_run import ROOT, config_read

STATE = ["weights", "remainders of the weights", "gradients", "Adam m", "Adam v", "EMA"]  # rows of --plan
TOKENS, MEMORY_GB = 16384, 139  # slots of a micro-batch; what an H200 leaves for allocations
PAIR, NVLINK, ADAPTER = 260e9, 340e9, 50e9  # bytes a second
HOST = 8  # GPUs of one host
FORWARD = 1 / 3  # of the passes: twice as many products backward
SQUARES = 0.13  # of the update: what the norm is made from, which the last reductions run beside
DRAG = 0.23  # seconds that ops lose to a second of collectives beside them: NCCL has 24 of 132 multiprocessors
SLOWER = 0.02  # of the passes: packs and GPUs differ, and a step takes as long as the slowest of them


def parameters(config):
    """Elements of the buckets, in the slabs' order: what stands before the layers, a layer, the heads, the modulation
    table; and how many of a layer's are experts'."""
    m = config["model"]
    C, L, H, G, D, Z, V = (m[key] for key in ("dim", "layers", "heads", "kv_heads", "head_dim", "cond_dim", "vocab"))
    P, bottleneck = 3 * m["patch"] ** 2, m.get("patch_bottleneck", 0)
    rows = 6 * C * L + 2 * C
    first = V * C + bottleneck * P + C * (bottleneck or P) + C + Z * 256 + Z + Z * Z + Z + Z * C + 2 * Z + 2 * rows
    layer = (2 if m.get("attn_per_modality") else 1) * ((H + 2 * G) * D * C + C * H * D) + 4 * D
    experts = sum(3 * m[kind]["experts"] * m[kind]["expert_dim"] * C for kind in ("text", "image"))
    layer += experts + sum(m[kind]["experts"] * C + 3 * C * m[kind].get("shared_dim", 0) for kind in ("text", "image"))
    heads = (0 if m.get("tie_embeddings") else V * C) + P * C + P
    return [first, *[layer] * L, heads, rows * Z], experts


def latency(n):
    hosts = n / HOST if n > HOST else 0
    return 20e-6 + 1e-6 * (n - hosts) + 5e-6 * hosts


class Model:
    def __init__(self, name, train, measured=None, sets=()):
        self.name, self.train, self.sets = name, train, list(sets)
        self.config = config_read(ROOT / "configs" / f"{name}.json")
        for key, value in sets:
            part = self.config
            *path, last = key.split(".")
            for step in path:
                part = part[step]
            part[last] = value
        self.buckets, experts = parameters(self.config)
        self.total, self.experts = sum(self.buckets), experts * self.config["model"]["layers"]
        rows, text = self.plan(1)
        told = float(re.search(r"^parameters ([\d.]+) M", text)[1])
        if abs(told - self.total / 1e6) > 1e-2:
            sys.exit(f"{name} has {self.total / 1e6} M parameters by this file, {told} M by the engine")
        self.arena = rows["activations (arena)"]
        self.state = {key: rows[key] for key in STATE}
        self.others = rows["total"] - self.arena - sum(self.state.values())
        step, update = map(float, re.search(r"predicted ([\d.]+) ms, ([\d.]+) of them the update", text).groups())
        self.update, self.passes = update / 1e3, ((measured or step) - update) / 1e3

    def plan(self, processes, zero=1, memory="keep"):
        """{row: bytes} and all of what --plan says."""
        command = [self.train, ROOT / f"configs/{self.name}.json", "--plan", "--device", "cuda", "--tokens", TOKENS,
                   "--memory", memory, "--set", "memory.budget_gb=1000", "--set", f"parallel.zero={zero}",
                   "--set", "memory.share_gradients=false"]  # which memory() counts by themselves
        for key, value in self.sets:
            command += ["--set", f"{key}={value}"]
        launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", processes] if processes > 1 else []
        done = subprocess.run([str(word) for word in launch + command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip())
        rows = {label: int(n) for label, n in re.findall(r"^  (\S.*?) +(\d+) bytes", done.stdout, re.M)}
        return rows, done.stdout

    def memory(self, n, zero, arena=None):
        """Bytes of one of n GPUs: what is shared out is a n-th."""
        s = dict(self.state)
        n_state, n_gradients = n if zero else 1, n if zero == 2 else 1
        for key in ("remainders of the weights", "Adam m", "Adam v", "EMA"):
            s[key] /= n_state
        s["gradients"] /= n_gradients
        if n_gradients > 1:  # and those of a micro-step, of layers two at a time
            s["gradients"] += 4 * (sum(self.buckets) - (len(self.buckets) - 5) * self.buckets[1])
        return (self.arena if arena is None else arena) + self.others + sum(s.values())

    def step(self, n, zero, rate, micro=1):
        """Seconds of a step of n GPUs, and of collectives in all and with no op beside them."""

        def collective(elements, width):
            return latency(n) + (n - 1) / n * elements * width / rate if n > 1 else 0

        before, *layers, heads, modulation = self.buckets
        passes = self.passes * (1 + SLOWER if n > 1 else 1)
        update = self.update / (n if zero else 1)
        forward, backward = (passes * share / len(layers) for share in (FORWARD, 1 - FORWARD))
        compute = comm = busy = opening = 0.0
        for k in range(micro):
            gathers = k == 0 and zero  # weights come together, each layer's ahead of its use
            for at, bucket in enumerate(layers):
                if gathers and at:
                    comm += collective(bucket, 2)
                    compute = max(compute, comm)
                compute += forward
            if gathers:
                comm += collective(heads, 2)
                compute = max(compute, comm)
                busy += comm
                opening = sum(collective(bucket, 2) for bucket in (before, modulation, layers[0]))
            reduces = n > 1 and (zero == 2 or k == micro - 1)
            for bucket, seconds in [(heads, 0), *((layer, backward) for layer in layers), (modulation, 0), (before, 0)]:
                compute += seconds
                if reduces:
                    took = collective(bucket, 4) * (1 if zero else 2)
                    busy += took
                    comm = max(comm, compute) + took
        end = max(compute + SQUARES * update, comm) + (2 * latency(n) if n > 1 else 0)  # metrics and the norm
        # What the next step reads at once comes together beside the rest of the update.
        end += max((1 - SQUARES) * update, opening)
        exposed = end - passes * micro - update
        busy += opening
        return end + DRAG * max(0, busy - exposed), busy, exposed


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


# A ring enters and leaves each host once, by all of its adapters.
PLACES = [("2", 2, PAIR), ("4", 4, NVLINK), ("8, one host", 8, NVLINK),
          ("64, an adapter a GPU", 64, min(NVLINK, HOST * ADAPTER)), ("64, an adapter a host", 64, ADAPTER)]


def print_memory(models):
    print("**GB of one GPU**, T 16,384, everything kept; host: most that a process copies for checkpoints\n")
    rows = []
    for m in models:
        for zero in (0, 1, 2):
            copy = (4 + 8 / 8 if zero else 8) * m.total  # weights or EMA and a share of the moments, or all of these
            need = [f"{m.memory(n, zero) / 1e9:.1f}" for n in (1, 2, 4, 8, 64)]
            rows.append([m.name, f"{m.total / 1e9:.3f}", zero, *need, f"{copy / 1e9:.1f}"])
    table(["model", "10^9 parameters", "`parallel.zero`", "1", "2", "4", "8", "64", "host, of 8"], rows)


def print_time(models, micro):
    packs = f"{micro} micro-batch{'es' if micro > 1 else ''} of 16,384 a GPU"
    print(f"**ms a step**, {packs} (tokens/s of a GPU against one alone; ms of collectives, unhidden)\n")
    rows = []
    for m in models:
        alone = m.step(1, 1, NVLINK, micro)[0]
        for zero in (0, 1, 2):
            row = [m.name, zero, f"{1e3 * alone:.2f}"]
            for _, n, rate in PLACES:
                total, busy, exposed = m.step(n, zero, rate, micro)
                share = f"{100 * alone / total:.0f}%; {1e3 * busy:.1f}, {1e3 * max(0, exposed):.1f}"
                row.append(f"{1e3 * total:.2f} ({share})")
            rows.append(row)
    table(["model", "zero", "1", *(name for name, _, _ in PLACES)], rows)


def print_experts(base, train):
    print("**base with more experts**: GB of one GPU, `--memory recompute`; ms a step with base's passes (unhidden)\n")
    rows = []
    for times in (1, 2, 4, 6, 8, 12, 16):
        sets = [("model.text.experts", 16 * times), ("model.image.experts", 8 * times)]
        m = Model("base", train, sets=sets) if times > 1 else base
        arena = m.plan(1, memory="recompute")[0]["activations (arena)"]
        cells = []
        for zero in (1, 2):
            for n in (8, 64):
                gb = m.memory(n, zero, arena) / 1e9
                cells.append(f"{gb:.0f}" + ("" if gb <= MEMORY_GB else " no"))
        m.passes = base.passes  # a token takes as many experts
        total, _, exposed = m.step(8, 1, NVLINK)
        split = (m.memory(64, 1, arena) - m.experts * (2 + 4 + 14 / 64) + m.experts * 20 / 64) / 1e9
        rows.append([f"{16 * times} + {8 * times}", f"{m.total / 1e9:.1f}", f"{100 * m.experts / m.total:.0f}%", *cells,
                     f"{split:.0f}", f"{1e3 * total:.0f} ({1e3 * exposed:.0f})"])
    table(["experts a layer", "10^9 parameters", "of them experts", "zero 1, 8", "zero 1, 64", "zero 2, 8",
           "zero 2, 64", "experts shared out over 64", "a step of 8, zero 1"], rows)


def print_all_to_all(models):
    print("**All-to-all**: ms of a step if nothing hid them, against what ZeRO's collectives move\n")
    rows = []
    for m in models:
        c = m.config["model"]
        k = (c["text"]["top_k"] + 4 * c["image"]["top_k"]) / 5  # a fifth of the rows text
        one = TOKENS * k * c["dim"] * 2
        row = [m.name, f"{one / 1e6:.0f} MB", f"{4 * c['layers'] * one / 1e9:.2f} GB"]
        # Between hosts a GPU's rows leave by its own adapter, or by its share of the host's.
        for link, share in ((NVLINK, 7 / 8), (ADAPTER, 56 / 64), (ADAPTER / HOST, 56 / 64)):
            seconds = 4 * c["layers"] * one * share / link
            row.append(f"{1e3 * seconds:.0f} ({100 * seconds / m.passes:.0f}%)")
        rows.append([*row, f"{6 * m.total / 1e9:.2f} GB"])
    table(["model", "one of a layer", "4 a layer, a step", "8, one host", "64, an adapter a GPU",
           "64, an adapter a host", "ZeRO 1 moves"], rows)


def check(models):
    """Against the planner, which records what each process does."""
    bad = 0
    for m in models:
        for n in (2, 4, 8):
            for zero in (0, 1, 2):
                rows, text = m.plan(n, zero)
                here, there = m.memory(n, zero, rows["activations (arena)"]), rows["total"]
                told = re.search(r"collectives of .*; ([\d.]+) ms of a step, ([\d.]+) ms of them exposed", text)
                _, busy, exposed = m.step(n, zero, PAIR)  # as the planner assumes
                off = here / there - 1
                bad += abs(off) > 0.005
                print(f"{m.name} x {n}, zero {zero}: {here / 1e9:.2f} GB, by the planner {there / 1e9:.2f} "
                      f"({100 * off:+.1f}%); collectives {1e3 * busy:.2f} ms, {1e3 * exposed:.2f} unhidden, by the "
                      f"planner {told[1]}, {told[2]}")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=str(ROOT / "build/train"))
    parser.add_argument("--measured", nargs="*", default=[], metavar="NAME=MS", help="a step on one GPU, T 16384")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    train = str(Path(options.train).resolve())
    names = ("small", "medium", "base")
    if not Path(train).is_file():
        parser.error(f"there is no {train}: make builds it")
    measured = {}
    for word in options.measured:
        if not (found := re.fullmatch(rf"({'|'.join(names)})=(\d+\.?\d*)", word)):
            parser.error(f"--measured {word}: NAME=MS with a NAME of {', '.join(names)}")
        measured[found[1]] = float(found[2])
    models = [Model(name, train, measured.get(name)) for name in names]
    if options.check:
        return 1 if check(models) else 0
    print_memory(models)
    for micro in (1, 4):
        print_time(models, micro)
    print_experts(models[-1], train)
    print_all_to_all(models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
