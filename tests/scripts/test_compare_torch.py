#!/usr/bin/python3
"""scripts/compare_torch.py BUILD/train on the CPU: the model is the engine's for two configs, updates are AdamW's, all
ways are timed, those that fail, hang or die say so while others go on, and a model with another formula is refused.
Exit code 77 without PyTorch."""
import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
COMPARE = ROOT / "scripts" / "compare_torch.py"
TINY = ROOT / "tests" / "gpu" / "gpu_tiny.json"
COMMON = ["--device", "cpu", "--seconds", "0.01", "--set", "run.threads=1"]
sys.path.insert(0, str(COMPARE.parent))
# The same program with another epsilon in all norms; with ways that fail, die and hang.
PROGRAM = f"""import os, sys, time
sys.path.insert(0, {str(COMPARE.parent)!r})
import torch_model, torch_ways
%s
import compare_torch
compare_torch.main()"""
WRONG = PROGRAM % "torch_model.EPS = 1e-2"
BROKEN = PROGRAM % """
def fails(self, *operands): raise RuntimeError("no such luck")
def check(*operands, whole=torch_ways.check):
    if operands[4] == "checkpoint": time.sleep(100)
    return whole(*operands)
torch_ways.Update.__init__, torch_ways.MastersUpdate.__init__ = fails, lambda *operands: os._exit(3)
torch_ways.check = check
torch_ways.EAGER.append(torch_ways.Way("good", masters=True, memory="good"))
torch_ways.MEMORY["good"] = torch_ways.MEMORY["keep"]
masters_update = type("Good", (), {"__init__": lambda self, *operands: None, "__call__": lambda self: None})
def training(self, peer, way, host, whole=torch_ways.Training.__init__):
    if way.name == "good": torch_ways.MastersUpdate = masters_update
    whole(self, peer, way, host)
torch_ways.Training.__init__ = training
"""


def compare(*arguments, code=0, program=(COMPARE,)):
    command = [sys.executable, *program, *arguments, "--train", Path(sys.argv[1]).resolve()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == 77:
        sys.exit(77)
    assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done)
    return done.stdout + done.stderr


def updates():
    """Both updates of torch_ways.py, three steps, against AdamW with clipping by the norm; to the rounding of fp32."""
    import torch
    import torch_ways as W

    class Cpu:
        gpu, device = False, "cpu"

    torch.manual_seed(1)
    first = [torch.randn(shape) for shape in ((3, 5), (32,), (4, 16))]
    grads = [[torch.randn_like(t) for t in first] for _ in range(3)]
    grads[1] = [1e-3 * g for g in grads[1]]  # nothing to clip

    def trained(make):
        leaves = [t.clone().requires_grad_() for t in first]
        update = make(leaves)
        for step in grads:
            for t, g in zip(leaves, step):
                t.grad = g.clone()
            update(leaves)
        return torch.cat([t.detach().flatten() - b.flatten() for t, b in zip(leaves, first)])

    def plain(leaves):
        optimizer = torch.optim.AdamW(leaves, lr=W.LR, betas=W.BETAS, eps=W.EPS, weight_decay=0)
        return lambda leaves: (torch.nn.utils.clip_grad_norm_(leaves, 1.0), optimizer.step())

    def ours(make):
        def build(leaves):
            update = make(leaves, Cpu)
            return lambda leaves: update()

        return build

    want = trained(plain)
    for make in (W.Update, W.MastersUpdate):
        error = (trained(ours(make)) - want).norm() / want.norm()
        assert want.norm() > 0 and error < 1e-2, (make, error)  # of steps of 1e-5 on weights of 1


def memory_and_end(top):
    """Memory is that of the round with the least; none begins that would end too late, by what it took before."""
    import compare_torch as C

    row = lambda ms, gb: {"ms": ms, "memory_gb": gb, "reserved_gb": gb + 1}
    way, about = C.W.EAGER[0], {"tokens": 1000, "gb": 10, "parameters": 0}
    of = C.summary([way], {"engine": {}, way.name: {0: row(1, 3), 1: row(2, 2)}}, about)[1]
    assert (of["ms"], of["memory_gb"], of["reserved_gb"], of["largest_T"]) == (1.5, 2, 3, 5000), of

    class Engine:
        now = 0

        def round(self):
            self.now += 2
            return {"tokens_per_second": 1}

    engine, args = Engine(), argparse.Namespace(rounds=9, once=[], out=top)
    clock = argparse.Namespace(time=lambda: engine.now)
    with mock.patch.object(C, "time", clock), mock.patch.object(C, "write"):
        found = {"about": about, "agreement": {}}
        assert not C.measure(found, None, engine, [], args, 5) and len(found["measured"]["engine"]) == 2, found


def measured(top):
    """Both configs: agreement, the table and its place in a page; and what is left out when told so."""
    for config, rounds in (("configs/demo.json", 2), ("tests/gpu/gpu_tiny.json", 1)):
        out = top / Path(config).stem
        said = compare(ROOT / config, out, *COMMON, "--tokens", "192", "--rounds", rounds)
        found = json.loads((out / "torch.json").read_text())
        engine, *ways = found["rows"]
        assert found["about"]["tokens"] > 150 and len(ways) == 3, found
        for kind in ("keep", "checkpoint"):
            assert found["agreement"][kind]["agree"] and found["agreement"][kind]["gradients_worst"] < 1e-3, found
        assert engine["rounds"] == rounds and engine["tokens_per_second"] > 0, found
        for way in ways:
            assert way["rounds"] == rounds and way["lines"] > 100 and way["tokens_per_second"] > 0, found
            assert way["least"] <= way["engine"] <= way["largest"] and "failed" not in way, found
            assert f"{way['ms']:.2f}" in (out / "torch.txt").read_text() and not (out / "dump").exists(), said
        assert ways[1]["lines"] != ways[0]["lines"] < ways[2]["lines"], found
    page = top / "page.md"
    page.write_text("a\n<!-- torch gpu_tiny short -->\nold\n<!-- end -->\n")
    compare(TINY, out, "--markdown", page)
    assert "| eager, masters |" in page.read_text() and "old" not in page.read_text(), page.read_text()
    said = compare(TINY, out, *COMMON, "--minutes", "1e-6")
    assert "--minutes" in said and json.loads((out / "torch.json").read_text())["rows"][0]["rounds"] == 0, said
    said = compare(TINY, out, *COMMON, "--rounds", "2", "--ways", "eager", "eager, masters", "--once", "eager")
    order = [line.split(" {")[0] for line in said.splitlines() if line.startswith("round ")]
    assert order == ["round 1: engine", "round 1: eager, masters", "round 2: eager, masters", "round 2: engine",
                     "round 2: eager"], said  # fmt: skip


def broken(top):
    """Ways that fail, die and hang, which is waited for."""
    out = top / "broken"
    said = compare(TINY, out, *COMMON, "--rounds", "2", "--limit", "15", program=("-c", BROKEN))
    engine, fails, dies, hangs, good = json.loads((out / "torch.json").read_text())["rows"]
    for row, why in ((fails, "no such luck"), (dies, "its process ended with 3"), (hangs, "longer than 15 s")):
        assert row["rounds"] == 0 and row["failed"] == why and f"({why})" in said, said
    assert good["rounds"] == engine["rounds"] == 2 and "no such luck" in (out / "torch.log").read_text(), said


def refused(top):
    """Another model, and bad input."""
    out = top / "wrong"
    said = compare(TINY, out, *COMMON, "--rounds", "1", code=1, program=("-c", WRONG))
    assert "NOT the same model" in said and "another model" in said, said
    (top / "file").write_text("")
    (top / "cut").mkdir()
    (top / "cut/torch.json").write_text('{"about":')
    for what, *arguments in (("no", "nothing.json", out), ("file", ROOT / "configs/demo.json", top / "file"),
                             ("--rounds", ROOT / "configs/demo.json", out, "--rounds", "0"),
                             ("not whole", TINY, top / "cut", "--markdown", "page"),
                             ("measure first", TINY, top / "none", "--markdown", "page"),
                             ("--dump failed", ROOT / "configs/demo.json", out, *COMMON, "--set", "train.lr=-1")):  # fmt: skip
        said = compare(*arguments, code=2 if what == "--rounds" else 1)
        assert what in said, (what, said)


# Beside each other: importing PyTorch takes one core, and fifteen seconds pass with a way that hangs.
with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
    for done in [pool.submit(test, Path(folder)) for test in (measured, broken, refused)]:
        done.result()
    memory_and_end(Path(folder))
updates()
print("PyTorch: the same losses and gradients, timed, refused")
