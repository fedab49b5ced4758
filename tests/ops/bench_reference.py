#!/usr/bin/python3
"""Times a training step of the PyTorch reference, float32, on the packs of a dump: what the engine is compared with.

    ./train configs/demo.json --dump DIR && /usr/bin/python3 tests/ops/bench_reference.py DIR

A step is forward, backward, clipping by the global norm and AdamW (without the EMA that the engine also keeps). It runs
eagerly: experts as one product each, attention in padded batches of documents of similar length. Nothing is reported
when torch multiplies at less than half of OpenBLAS's rate, as it does where it is linked to the reference BLAS. On
steps this small two threads may lose to one, so both are timed and the best counts.
Exit code 0, 1 where it refuses, 77 without PyTorch."""
import argparse
import ctypes
import glob
import json
import math
import statistics
import sys
import time

try:
    import numpy as np
    import torch
    import reference as R
except ImportError as error:
    print(f"skipped: {error} (Debian: apt install python3-torch, and run with /usr/bin/python3)")
    sys.exit(77)


def rate(multiply, n, repeats=5):
    """GFLOP/s of the best of a few n x n products."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e9


def blas_rates(threads, n=1024):
    """GFLOP/s of torch and of OpenBLAS itself, the same product on as many threads."""
    blas = ctypes.CDLL("libopenblas.so.0")
    blas.openblas_set_num_threads(threads)
    a, b = (np.random.default_rng(i).standard_normal((n, n)).astype(np.float32) for i in (1, 2))
    c = np.zeros_like(a)
    at = lambda array: array.ctypes.data_as(ctypes.c_void_p)
    one, zero, row_major, plain = ctypes.c_float(1), ctypes.c_float(0), 101, 111

    def openblas():
        blas.cblas_sgemm(row_major, plain, plain, n, n, n, one, at(a), n, at(b), n, zero, at(c), n)

    own = rate(openblas, n)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    theirs = rate(lambda: torch.mm(x, y), n)
    if not np.allclose(torch.mm(x, y).numpy(), c, atol=1e-3):
        sys.exit("bench_reference: torch and OpenBLAS disagree about a product")
    return theirs, own


def step_times(p, packs, s, threads, steps):
    """Milliseconds of each of `steps` training steps, after 3 that are not timed."""
    torch.set_num_threads(threads)
    optimizer = torch.optim.AdamW(p.values(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=True)
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        R.step(p, packs, s)
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
    return times[3:]


def main():
    parser = argparse.ArgumentParser(description="Times a training step of the PyTorch reference in float32.")
    parser.add_argument("dump", help="folder written by ./train CONFIG --dump")
    parser.add_argument("--threads", type=int, default=torch.multiprocessing.cpu_count())
    parser.add_argument("--steps", type=int, default=20, help="steps to time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    theirs, own = blas_rates(options.threads)
    print(f"1024^3 product, {options.threads} threads: torch {theirs:.1f} GFLOP/s, OpenBLAS {own:.1f} GFLOP/s")
    if theirs < own / 2:
        print("bench_reference: torch is not using OpenBLAS, so its time would say nothing")
        print("  fix: apt install libopenblas0-pthread, and run with /usr/bin/python3")
        return 1

    s = R.sizes_from_config(json.load(open(f"{options.dump}/config.json")))
    params = R.safetensors_read(f"{options.dump}/params.safetensors")
    p = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in params.items()}
    files = sorted(glob.glob(f"{glob.escape(options.dump)}/micro_*.safetensors"))
    packs = [R.Pack(R.safetensors_read(path), torch.float32) for path in files]
    tokens = sum(pack.n for pack in packs)
    print(f"PyTorch {torch.__version__}, float32, {tokens} tokens a step")
    best = math.inf
    for threads in sorted({1, options.threads}):
        times = step_times(p, packs, s, threads, options.steps)
        median = statistics.median(times)
        best = min(best, median)
        speed = tokens / median * 1e3
        print(f"threads {threads}: {median:.1f} ms/step (fastest {min(times):.1f}), {speed:.0f} tokens/s")
    print(f"best: {best:.1f} ms/step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
