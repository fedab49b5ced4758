#!/usr/bin/env python3
"""Whether scripts/scaling_model.py counts as the engine does, and its clock is right where the answer is known.

    tests/scripts/test_scaling_model.py [BUILD]"""
import re
import subprocess
import sys
from pathlib import Path

from checks import check

import scaling_model
from scaling_model import DRAG, HOST, ROOT, SLOWER, Model, latency, parameters


def count_parameters(build):
    """Of every config of the project, against --plan."""
    for path in sorted((ROOT / "configs").glob("*.json")):
        buckets, experts = parameters(scaling_model.config_read(path))
        plan = subprocess.run([build / "train", path, "--plan"], capture_output=True, text=True).stdout
        told = float(re.search(r"^parameters ([\d.]+) M", plan)[1])
        check(abs(sum(buckets) / 1e6 - told) < 1e-3, f"{path.name}: {sum(buckets) / 1e6} M parameters, not {told}")
        check(0 < experts < buckets[1], f"{path.name}: {experts} of a layer's {buckets[1]} parameters are experts'")
    return path.name


def model():
    """Ten layers of 10^8 parameters and three buckets of 10^7, 90 ms of passes, 8 ms of update."""
    m = object.__new__(Model)
    m.buckets = [1e7, *[1e8] * 10, 1e7, 1e7]
    m.passes, m.update = 0.090, 0.008
    return m


def near(found, expected, what):
    check(abs(found - expected) < 1e-9, f"{what}: {found}, not {expected}")


def clock():
    m = model()
    total = sum(m.buckets)
    near(m.step(1, 1, 1e9)[0], 0.098, "one GPU")
    near(m.step(1, 1, 1e9, 4)[0], 0.368, "four micro-batches of one GPU")
    for zero, update in (0, 0.008), (1, 0.004), (2, 0.004):
        seconds, busy, exposed = m.step(2, zero, 1e30)
        check(0 < exposed < 10 * latency(2), f"zero {zero}, a link of any rate: {exposed} s unhidden")
        beside = DRAG * (busy - exposed)
        near(seconds - exposed - beside, 0.090 * (1 + SLOWER) + update, f"zero {zero}: a step without collectives")
    # So slow a link that it never rests: but for what is computed before the first reduction, all of it is waited for.
    for zero, bytes_each in (0, 8), (1, 6), (2, 6):
        _, busy, _ = m.step(2, zero, 1e8)
        collectives = len(m.buckets) * (1 if zero == 0 else 2)
        latencies = collectives * latency(2) * (2 if zero == 0 else 1)
        near(busy, bytes_each * total / 2 / 1e8 + latencies, f"zero {zero}: seconds of collectives")
    slow = m.step(2, 1, 1e8)
    check(slow[1] < slow[0] < slow[1] + (1 + DRAG) * (0.090 * (1 + SLOWER) + 0.004), f"a slow link: {slow}")
    # A link that is just fast enough for the passes, but not for the last reductions: the norm's squares hide these.
    near(m.step(2, 1, 1e30)[2], 2 * latency(2), "what is exposed where collectives only have a latency")
    # Reductions of every micro-batch, or of the last.
    near(m.step(2, 2, 1e9, 3)[1] - m.step(2, 2, 1e9, 2)[1], m.step(2, 2, 1e9, 2)[1] - m.step(2, 2, 1e9)[1], "zero 2")
    near(m.step(2, 1, 1e9, 3)[1], m.step(2, 1, 1e9)[1], "zero 1")
    near(latency(8), 28e-6, "the latency of a host")
    near(latency(64), 20e-6 + 56e-6 + 40e-6, f"that of {64 // HOST} hosts")


if __name__ == "__main__":
    try:
        count_parameters(Path(sys.argv[1] if len(sys.argv) > 1 else "build").resolve())
        clock()
    except AssertionError as error:
        sys.exit(str(error))
    print("parameters are those of the engine, collectives take what they must")
