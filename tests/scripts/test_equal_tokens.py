"""scripts/equal_tokens.py BUILD/train: the demo at T and at 2 T for as many tokens, planned in keep's memory, with warm-up
and average the same in tokens; that what was trained is not trained again, and what goes wrong is said."""
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EQUAL = ROOT / "scripts" / "equal_tokens.py"
DEMO = ROOT / "configs" / "demo.json"


def equal(*arguments, code=0):
    command = [sys.executable, EQUAL, "--train", Path(sys.argv[1]).resolve(), "--device", "cpu", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, (arguments, done)
    return done.stdout + done.stderr


with tempfile.TemporaryDirectory() as folder:
    out, page = Path(folder) / "out", Path(folder) / "page.md"
    given = [DEMO, out, "--steps", "4", "--set", "eval.documents=4"]
    said = equal(*given, "--seeds", "3")
    with open(out / "equal.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["slots"], r["steps"], r["lr"]) for r in rows] == [("768", "4", "0.003"), ("1536", "2", "0.003"),
                                                                 ("1536", "2", "0.00424")], rows  # fmt: skip
    assert len({r["tokens"] for r in rows}) == 1 and all(r["seed"] == "3" and 0 < float(r["flow"]) < 9 for r in rows), rows
    assert rows[1]["flow"] != rows[2]["flow"] and all(r["of"] == "held_out" for r in rows), rows
    configs = [json.loads((out / "runs" / f"demo-{i}-3" / "config.json").read_text()) for i in range(3)]
    assert [c["train"]["warmup_steps"] for c in configs] == [50, 25, 25], configs
    assert [c["train"]["ema"] for c in configs] == [0.99, 0.9801, 0.9801], configs
    assert [c["memory"]["policy"] for c in configs] == ["keep", "auto", "auto"], configs
    assert len({c["memory"]["budget_gb"] for c in configs}) == 1 and configs[0]["memory"]["budget_gb"] < 0.1, configs
    assert "768 x 4" in said and "0.0M tokens a run, 1 seed;" in said, said
    # Another call trains what is missing.
    before = (out / "log").stat().st_size
    assert "held-out samples" in equal(*given, "--seeds", "3") and (out / "log").stat().st_size == before
    page.write_text("<!-- equal tokens demo -->\nold\n<!-- end -->\n")
    equal(DEMO, out, "--markdown", page)
    assert "| 2 T | 1,536 x 2 | 0.003 |" in page.read_text() and "old" not in page.read_text(), page.read_text()
    # Bad input.
    wrong = Path(folder) / "wrong"
    for what, code, *arguments in (("--steps: 4 then, 6 now", 1, DEMO, out, "--steps", "6", *given[4:]),
                                   ("measure first", 1, DEMO, Path(folder) / "new", "--markdown", page),
                                   ("--device: cpu then, cuda now", 1, *given, "--device", "cuda"),
                                   ("--steps: at least 2", 2, DEMO, out, "--steps", "1"),
                                   ("5 steps cannot be halved", 1, DEMO, wrong, "--steps", "5"),
                                   ("there is no", 1, out / "none.json", out),
                                   ("train.lr", 1, DEMO, wrong, "--set", "train.lr=no"),
                                   ("OUT is a folder", 1, DEMO, page)):  # fmt: skip
        assert what in equal(*arguments, code=code), what
print("equal tokens: trained, compared, continued, refused")
