#!/usr/bin/python3
"""scripts/torch_scaling.py BUILD/train with two processes on the CPU: gradients are the mean of both, and are refused
where they are not; a process that fails, dies or hangs ends all; scripts/scaling.py does without PyTorch. Exit code 77
without PyTorch."""
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import torch_scaling as S  # noqa: E402

CONFIG = ROOT / "tests/gpu/gpu_tiny.json"


def run(out, *more):
    """The script, in this process. (exit code or what went wrong, what it printed)"""
    said = io.StringIO()
    command = ["torch_scaling.py", CONFIG, out, "--ranks", 2, "--device", "cpu", "--steps", 1, "--train", sys.argv[1]]
    with mock.patch("sys.argv", [*map(str, [*command, *more])]), contextlib.redirect_stdout(said):
        try:
            S.main()
        except SystemExit as end:
            return end.code, said.getvalue()


def second_alone(what):
    """Makes the second of two processes do `what` once it has trained alone."""

    def distribute(self, *operands, whole=S.Replica.distribute):
        if S.dist.get_rank():
            what()
        return whole(self, *operands)

    return mock.patch.object(S.Replica, "distribute", distribute)


def fails():
    raise RuntimeError("no such luck")


def main():
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        code, said = run(top / "good")
        off, apart = map(float, re.search(r"gradients +(\S+) from the mean of all, a GPU's own (\S+)", said).groups())
        assert code == 0 and off < 1e-6 and apart > 0.01, said  # of other noise
        assert re.search(r"2 GPUs +\S+ ms a step \(\S+, \S+\), \d+ tokens/s a GPU = \d\.\d+ of one", said), said
        alone, together, ratio = (float(x) for x in re.findall(r"(\S+) ms a step|= (\S+) of one", said) for x in x if x)
        assert abs(alone / together / ratio - 1) < 0.01, said
        assert not (top / "good/dump").exists()
        layers = lambda say, training, args: say("gradients", (0, len(training.params["layers"])))
        with mock.patch.object(S, "measure", layers):
            assert "own 2.0e+00" in run(top / "good")[1]  # of the whole model, not of the dump's
        with mock.patch.object(S, "DistributedDataParallel", lambda module, **more: module):
            code, said = run(top / "wrong")
        assert code == 1 and "WRONG" in said, said
        broken = (fails, "no such luck"), (lambda: os._exit(3), "it ended"), (lambda: time.sleep(99), "says nothing")
        for what, why in broken:
            with second_alone(what):
                code, said = run(top / "broken", *(["--limit", 2] if why == "says nothing" else []))
            assert why in code and " of one" not in said, (code, said)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert run(top / "good", "--steps", 81)[0] == 2 and "--steps" in said.getvalue()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert run(top / "good", "--ranks", 0)[0] == 2 and "--ranks 2 --device cpu" in said.getvalue()
        assert "there is no" in run(top / "good", "--train", top / "none")[0]

        (top / "no/torch").mkdir(parents=True)
        (top / "no/torch/__init__.py").write_text("raise ImportError('none here')")
        for size in "64", "256":
            (top / size).mkdir()
            (top / size / "bench.tar").touch()
        command = [sys.executable, ROOT / "scripts/scaling.py", top, top / "scaling", "--ranks", "2"]
        done = subprocess.run([*command, "--sections", "torch", "--train", sys.argv[1]], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(top / "no")})  # fmt: skip
        assert done.returncode == 0 and "skipped: none here" in done.stdout and "0 wrong" in done.stdout, done
    print("PyTorch on two processes: gradients are the mean; refused, ended")


main()
