#!/usr/bin/python3
"""Computes every op that dump_ops ran again with PyTorch in float64 (ops_reference.py) and compares.

    dump_ops DIR && /usr/bin/python3 tests/ops/parity_ops.py DIR

An output passes when the norm of its difference is at most 2e-6 of the larger norm, 1e-5 for the gradients of routers,
which are differences of nearly equal terms; elements that the contract leaves
alone must still hold what they held, and zeros that it promises must be zeros. Prints the worst error of each op.
Exit code 0: all equal, 1: not, 77: no PyTorch."""
import argparse
import glob
import math
import sys
from collections import defaultdict

try:
    import ops_reference
    import reference as R
    import torch
    from recorded_call import Call, Case, Written
except ImportError as error:
    print(f"skipped: {error} (Debian: apt install python3-torch, and run with /usr/bin/python3)")
    sys.exit(77)

LIMIT = 2e-6
LIMITS = {("ROUTER_BWD", "dwr_0"): 1e-5, ("ROUTER_BWD", "dwr_1"): 1e-5}

OF_A_GROUP = {"ALL_REDUCE", "REDUCE_SCATTER", "ALL_GATHER"}  # processes compute it together: tests/scripts/ranks.sh


def output_error(got, want):
    """Relative error of one output; infinite where a promise is broken, which the second value then names."""
    written = want if isinstance(want, Written) else Written(want, None)
    want, got = written.want.flatten().to(torch.float64), got.to(torch.float64)
    if got.shape != want.shape:
        return math.inf, f"has {len(got)} elements, expected {len(want)}"
    if written.mask is not None:
        mask = written.mask.flatten()
        left = got[~mask]  # outputs are poisoned with NaN before the call
        if not (torch.isnan(left) | ((left == 0) & written.or_zero)).all():
            return math.inf, "writes elements that it should leave alone"
        got, want = got[mask], want[mask]
    infinite = torch.isinf(want)
    if not torch.equal(got[infinite], want[infinite]) or not torch.isfinite(got[~infinite]).all():
        return math.inf, "is not finite, or not infinite, where it should be"
    got, want = got[~infinite], want[~infinite]
    if (got[want == 0] != 0).any() and (want == 0).sum() > 0:
        stray = got[want == 0].abs().max()
        if stray > LIMIT * max(float(want.abs().max()), 1e-3):
            return math.inf, f"is {float(stray):.1e} where it should be zero"
    scale = max(float(want.norm()), float(got.norm()))
    return (float((got - want).norm()) / scale if scale else 0.0), ""


def compare_call(case, op, call, worst, problems, where):
    try:
        want = getattr(ops_reference, f"op_{op.lower()}")(case, call)
    except AssertionError as error:
        problems.append(f"{where} {op}: {error}")
        return
    if set(want) != set(call.out):
        problems.append(f"{where} {op}: writes {sorted(call.out)}, expected {sorted(want)}")
        return
    for name, value in want.items():
        if value is None:  # scratch, or judged by the op's function
            continue
        error, remark = output_error(call.out[name], value)
        worst[op, name] = max(worst[op, name], error)
        if not error <= LIMITS.get((op, name), LIMIT):
            problems.append(f"{where} {op}: {name} {remark or f'differs by {error:.1e}'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compares every op with PyTorch in float64.")
    parser.add_argument("dump", help="folder written by dump_ops")
    folder = parser.parse_args(argv).dump
    torch.set_num_threads(1)  # small tensors
    worst, problems, seen = defaultdict(float), [], defaultdict(int)
    for path in sorted(glob.glob(f"{glob.escape(folder)}/case_*.safetensors")):
        tensors = R.safetensors_read(path)
        case, calls = Case(tensors), defaultdict(dict)
        for name, v in tensors.items():
            if name[0].isdigit():
                call, kind, operand = name.split("/")
                calls[call][kind, operand] = v
        for name, parts in calls.items():
            op = name.split(".")[1]
            seen[op] += 1
            compare_call(case, op, Call(parts), worst, problems, f"{path.split('/')[-1]} call {name.split('.')[0]}")
    for op in open(f"{folder}/ops.txt").read().split():
        if not seen[op] and op not in OF_A_GROUP:
            problems.append(f"{op} is in kernels.h but was never called")
        errors = ", ".join(f"{name} {error:.1e}" for (of, name), error in worst.items() if of == op)
        print(f"{op:18} {seen[op]:4} calls  {errors}")
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"parity of ops: {'FAILED' if problems else 'all equal'}, {sum(seen.values())} calls")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
