"""scripts/memory_claims.py with the stand-in for ./train of test_memory_curve.py: which runs it makes, that it goes on
where it was broken off, and what its table says of them."""
import subprocess
import sys
import tempfile
from pathlib import Path

from test_memory_curve import TRAIN

CLAIMS = Path(__file__).resolve().parents[2] / "scripts" / "memory_claims.py"


def main():
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        train, out = top / "train", top / "out"
        train.write_text(TRAIN)
        train.chmod(0o755)

        def claims(*more):
            (top / "calls").write_text("")
            command = [sys.executable, CLAIMS, out, "--train", train, "--data", top, "--steps", "6", "--configs", "base", "small", *more]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            table = [line for line in done.stdout.splitlines() if line.startswith(("base", "wide", "fine", "small"))]
            return table, [call for call in (top / "calls").read_text().splitlines() if call.startswith("run")]

        def value(table, begins):
            found = [line for line in table if line.startswith(begins)]
            assert len(found) == 1, (begins, table)
            return found[0].split("  ")[-1].strip()

        table, runs = claims("--seconds", "1e-9")
        assert runs == [] and value(table, "base: auto half way") == "not measured yet", table
        table, runs = claims()
        step = lambda needs, slots=1: ((1000 + 100 * (10 - needs)) * slots * 1.01 + 20.2) / slots
        assert value(table, "base: auto half way") == f"{step(4) / step(7):.3f}", table
        assert value(table, "base: of its passes' transfers hidden") == "75.0%", table
        assert value(table, "base: auto in recompute's budget") == "1.000", table
        assert value(table, "base: longest micro-batch, slots: keep") == "3000", table
        assert value(table, "base: longest micro-batch, slots: auto") == "5000", table
        assert value(table, "base: auto at twice that") == f"{step(4, 5.952) / step(10, 5.952):.3f}", table
        assert value(table, "base: what leaves for the host there") == "0.1", table
        assert value(table, "base: of the time until the last has left") == "50.0%", table  # 6 of 12 ms
        assert value(table, "base: auto in 24 GB, tokens/s") == f"{2000 / step(10) * 1e3:.0f}", table
        assert value(table, "small: step time") == "1.00%, 1.00%", table
        assert value(table, "small: budgets on the curve") == "24 of 24", table
        assert len(runs) == 18 + 9, runs
        assert all((out / config / "curve.svg").exists() for config in ("base", "small"))
        _, runs = claims()
        assert set(runs) == {"run offload 3.0"}, runs  # which fails each time
        table, runs = claims("--seconds", "1e-9")  # what is kept is shown all the same
        assert runs == [] and value(table, "base: auto half way") == f"{step(4) / step(7):.3f}", table
    print("claims: left out, measured, not measured again")


main()
