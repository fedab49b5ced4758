#!/usr/bin/python3
"""scripts/compare_torch.py BUILD/train on the CPU: the model is the engine's for two configs, both are timed, and a
model with another formula is refused. Exit code 77 without PyTorch."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPARE = ROOT / "scripts" / "compare_torch.py"
# The same program with another epsilon in all norms.
WRONG = f"""import sys
sys.path.insert(0, {str(COMPARE.parent)!r})
import torch_model
torch_model.EPS = 1e-2
import compare_torch
compare_torch.main()"""


def compare(*arguments, code=0, program=(COMPARE,)):
    command = [sys.executable, *program, *arguments, "--train", Path(sys.argv[1]).resolve()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == 77:
        sys.exit(77)
    assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done)
    return done.stdout + done.stderr


with tempfile.TemporaryDirectory() as top:
    common = ["--device", "cpu", "--seconds", "0.01", "--set", "run.threads=1"]
    for config, rounds in (("configs/demo.json", 2), ("tests/gpu/gpu_tiny.json", 1)):
        out = Path(top) / Path(config).stem
        said = compare(ROOT / config, out, *common, "--tokens", "192", "--rounds", rounds)
        found = json.loads((out / "torch.json").read_text())
        engine, eager = found["rows"]
        assert found["about"]["tokens"] > 150 and found["agreement"]["gradients_worst"] < 1e-3, found
        assert engine["rounds"] == eager["rounds"] == rounds and eager["lines"] > 100, found
        assert engine["tokens_per_second"] > 0 and eager["tokens_per_second"] > 0 and "failed" not in eager, found
        assert eager["least"] <= eager["engine"] <= eager["largest"], found
        assert f"{eager['ms']:.2f}" in (out / "torch.txt").read_text() and not (out / "dump").exists(), said
    out = Path(top) / "wrong"
    said = compare(ROOT / "tests/gpu/gpu_tiny.json", out, *common, "--rounds", "1", code=1, program=("-c", WRONG))
    assert "NOT the same model" in said and "another model" in said, said
    (Path(top) / "file").write_text("")
    for what, *arguments in (("no", "nothing.json", out), ("file", ROOT / "configs/demo.json", Path(top) / "file"),
                             ("--rounds", ROOT / "configs/demo.json", out, "--rounds", "0"),
                             ("--dump failed", ROOT / "configs/demo.json", out, *common, "--set", "train.lr=-1")):  # fmt: skip
        said = compare(*arguments, code=2 if what == "--rounds" else 1)
        assert what in said, (what, said)
print("PyTorch: the same losses and gradients, timed, refused")
