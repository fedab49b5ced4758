"""scripts/plot.py draws every run it can meet: short, without evaluations, resumed by an older version, damaged."""
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

PLOT = Path(__file__).resolve().parents[2] / "scripts" / "plot.py"
SVG = "{http://www.w3.org/2000/svg}"


def step_line(step, **figures):
    row = {"step": step, "loss": 5 / (step + 1) + 0.1, "flow": 1 / (step + 1), "ce": 4 / (step + 1), "tokens": 1000,
           "seconds": 0.1, "data_wait": 0.0, "tokens_per_second": 1e4, "expert_load_max": 1 + random.random()}
    row.update(figures)
    return json.dumps({k: v for k, v in row.items() if v is not None})


def figures_line(step, kind, of=None):
    experts = {"dead": 1, "all": 8, "entropy": 0.9, "max_over_mean": 1.2}
    figures = {"text_experts": experts, "image_experts": dict(experts, entropy=None, max_over_mean=None)}
    if kind == "eval":
        figures.update(of=of, flow=0.1, retrieval=0.5, caption_bits_per_byte=0.2, caption_bits_per_byte_shuffled=None)
    return json.dumps({"step": step, kind: figures})


RUNS = {
    "one step": [step_line(0)],
    "every figure missing": [step_line(s, loss=None, flow=None, ce=None, expert_load_max=None) for s in range(3)],
    "zeros": [step_line(s, loss=0, flow=0, ce=0, tokens_per_second=0) for s in range(9)],
    "constant": [step_line(s, loss=2, flow=2, ce=2, expert_load_max=1) for s in range(400)],
    "huge": [step_line(s, loss=10.0 ** (s % 40 - 20), tokens_per_second=1e12 + s) for s in range(500)],
    "long": [line for s in range(20000) for line in [step_line(s)] + [figures_line(s + 1, "load")] * (s % 50 == 49)],
    "evaluated": [line for s in range(90) for line in [step_line(s)] + [figures_line(s + 1, "eval")] * (s % 30 == 29)],
    "of training": [step_line(0), step_line(1), figures_line(2, "eval", of="training")],
    "of held-out": [step_line(0), step_line(1), figures_line(2, "eval", of="held_out")],
    "skipped & <odd>": [step_line(0), step_line(1, loss=None, skipped="block.0.wqkv"), step_line(2)],
    "damaged": [step_line(0), "", "not json", "[1, 2]", '{"step": 1, "lo', "{}", '{"step": "x"}', step_line(1)],
}


def check(name, svg):
    root = xml.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    panels = root.findall(f"{SVG}g")
    assert len(panels) == 4, f"{len(panels)} panels"
    for panel in panels:
        x0, y0 = (float(v) for v in re.fullmatch(r"translate\((\S+) (\S+)\)", panel.get("transform")).groups())
        points = [(float(e.get("x")), float(e.get("y"))) for e in panel.iter(f"{SVG}text")]
        points += [(float(e.get("cx")), float(e.get("cy"))) for e in panel.iter(f"{SVG}circle")]
        for e in panel.iter(f"{SVG}path"):
            points += [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([-\d.]+)", e.get("d"))]
        for x, y in points:
            assert math.isfinite(x + y) and 0 <= x0 + x <= width and 0 <= y0 + y <= height, f"({x}, {y}) is outside"
    titles = [e.text for e in root.iter(f"{SVG}text")]
    assert name in titles, titles[:3]
    assert f"Evaluation, {'training' if name == 'of training' else 'held-out'} samples" in titles, titles
    curves = [e for e in root.iter(f"{SVG}path") if e.get("fill") == "none"]
    return len(curves)


def main():
    random.seed(1)
    curves = {}
    with tempfile.TemporaryDirectory() as top:
        for name, lines in RUNS.items():
            run = Path(top) / name
            run.mkdir()
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            done = subprocess.run([sys.executable, PLOT, run], capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            assert done.stdout.strip() == str(run / "metrics.svg"), done.stdout
            assert ("left out" in done.stderr) == (name == "damaged"), f"{name}: {done.stderr}"
            curves[name] = check(name, (run / "metrics.svg").read_text())
        assert curves["one step"] == 5 and curves["evaluated"] == 8 and curves["long"] == 6, curves
        for arguments, says in (([top], "cannot read"), ([Path(top) / "one step", "/nowhere/x.svg"], "cannot write")):
            done = subprocess.run([sys.executable, PLOT, *arguments], capture_output=True, text=True)
            assert done.returncode == 1 and says in done.stderr and "fix:" in done.stderr, done.stderr
        empty = Path(top) / "empty"
        empty.mkdir()
        (empty / "metrics.jsonl").write_text("")
        done = subprocess.run([sys.executable, PLOT, empty], capture_output=True, text=True)
        assert done.returncode == 1 and "no step" in done.stderr, done.stderr
    print(f"{len(RUNS)} runs drawn, {sum(curves.values())} curves")


main()
