"""scripts/memory_curve.py with a stand-in for ./train: what it asks for, what it writes, and that it goes on where it was
broken off."""
import csv
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

CURVE = Path(__file__).resolve().parents[2] / "scripts" / "memory_curve.py"
SVG = "{http://www.w3.org/2000/svg}"

# keep needs 10 GB, recompute 4, offload 3; auto has a plan from 2.5 GB on. A step takes 100 ms longer for each GB less
# than keep's; runs take 1% more than predicted and 0.2% more memory. Of T slots, 1000 if nothing is said, all takes
# T / 1000 times as long; the most are 3000, with auto 5000. It is started hundreds of times: by the interpreter
# itself, which a `python3` of PATH may take far longer to find, and plans import next to nothing.
TRAIN = f"#!{sys.executable} -IS\n" + '''
import sys
a = sys.argv[1:]
policy = a[a.index("--memory") + 1]
budget = next((float(x.split("=")[1]) for x in a if x.startswith("memory.budget_gb=")), 100)
slots = next((int(x.split("=")[1]) for x in a if x.startswith("data.micro_batch_tokens=")), 1000)
if "--tokens" in a:
    slots = 5000 if policy == "auto" else 3000
needs = {"keep": 10, "recompute": 4, "offload": 3, "auto": min(max(budget, 2.5), 10)}[policy]
ms = (1000 + 100 * (10 - needs)) * slots / 1000
with open(__file__.rpartition("/")[0] + "/calls", "a") as f:
    f.write(("plan" if "--plan" in a else "run") + f" {policy} {budget}\\n")
if needs > budget:
    sys.exit("error: memory.budget_gb is too small")
if "--plan" in a:
    print(f"parameters 1 M, slots {slots}, modulation rows 9, micro-batches 2, policy x")
    print(f"  total {needs * 10**9:.0f} bytes {needs * 1e3} MB")
    print(f"a step: predicted {ms:.2f} ms, 1.00 of them the update" +
          "; copies of the passes: to the host 2.00 ms, from it 2.00 ms, 99.0% hidden" * (policy == "auto"))
    sys.exit()
if policy == "offload":
    sys.exit("error: no more memory\\n  hint: take less")
import json, time
from pathlib import Path
run = Path(a[a.index("--run-dir") + 1])
run.mkdir(parents=True, exist_ok=True)
if "--trace" in a:  # 8 ms of the passes' copies, 6 of them beside an op; the update's count for nothing
    lanes = ["compute", "device to host", "host to device", "update"]
    events = [{"ph": "M", "name": "thread_name", "tid": i, "args": {"name": lane}} for i, lane in enumerate(lanes)]
    for tid, name, begin, end, args in [(0, "train first", 0, 20, {}), (0, "update", 20, 40, {}),
                                        (0, "LINEAR_FWD", 0, 10, {"tensor": "t"}), (1, "COPY", 6, 12, {"tensor": "t", "bytes": 10**8}),
                                        (2, "COPY", 2, 4, {"tensor": "t"}), (1, "COPY", 22, 32, {"tensor": "t"})]:
        events.append({"ph": "X", "tid": tid, "name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin), "args": args})
    Path(a[a.index("--trace") + 1]).write_text(json.dumps({"traceEvents": events}))
(run / "costs.json").write_text("{}")
assert not (run / "metrics.jsonl").exists()
sys.stderr.write(f"a step: predicted {ms:.2f} ms, measured {ms * 1.01:.2f} ms (+1.0%); every 5 steps the EMA "
                 f"takes 100.00 ms more; device memory: planned {needs:.3f} GB, in use {needs * 1.002:.3f} GB (+0.20%)\\n")
sys.stderr.flush()
with open(run / "metrics.jsonl", "w") as f:
    for step in range(40):
        warm = 5 if step < 4 else 1
        f.write(json.dumps({"step": step, "tokens": 2 * slots, "seconds": (ms * 1.01e-3 + 0.101 * (step % 5 == 4)) * warm}) + "\\n")
        if step == 20:
            f.write(json.dumps({"step": step, "eval": {}}) + "\\n" + '{"step":')
            f.flush()
            time.sleep(60)
'''


def main():
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        config, train, out = top / "some.json", top / "train", top / "out"
        config.write_text("{}")
        train.write_text(TRAIN)
        train.chmod(0o755)

        def curve(*more):
            (top / "calls").write_text("")
            command = [sys.executable, CURVE, config, out, "--train", train, "--steps", "6", *more]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout, (top / "calls").read_text().splitlines()

        _, calls = curve("--plan-only")
        assert not any(call.startswith("run") for call in calls), calls
        assert not list((out / "curve.svg").parent.glob("run/*"))
        said, calls = curve()
        runs = [call for call in calls if call.startswith("run")]
        assert len(runs) == 6 + 3 and runs[0] == "run auto 7.0", runs
        assert "needed, GB: recompute 4.000, offload 3.000, keep 10.000" in said, said
        assert "step time, predicted against measured in 8 runs: median 1.00%, worst 1.00%" in said, said
        assert "device memory, predicted against measured in 8 runs: median 0.20%" in said, said
        with open(out / "curve.csv", newline="") as f:
            rows = {(r["kind"], r["policy"], r["budget_gb"]): r for r in csv.DictReader(f)}
        assert "policy offload, budget_gb 3.000, note error: no more memory" in said, said
        assert ("point", "offload", "3.000") not in rows, rows  # to be tried again
        keep = rows["point", "keep", "10.000"]
        assert keep["measured_ms"] == "1030.200" and keep["predicted_ms"] == "1020.00", keep
        assert keep["tokens_per_second"] == f"{2000 / 1.0302:.0f}" and keep["in_use_gb"] == "10.020", keep
        lines = sorted(float(key[2]) for key in rows if key[:2] == ("line", "auto"))
        assert len(lines) == 24 and 2.5 <= lines[0] < 2.61 and lines[-1] == 10, lines
        assert rows["line", "recompute", "4.000"]["tokens_per_second"] == f"{2000 / 1.6:.0f}"
        root = xml.parse(out / "curve.svg").getroot()
        assert len(list(root.iter(f"{SVG}circle"))) == 6 + 2 + 4  # the legend's too
        assert sum(e.get("fill") == "none" for e in root.iter(f"{SVG}path")) == 4
        page = top / "page.md"
        (top / "figures").mkdir()
        page.write_text("<!-- memory some -->\nold\n<!-- end -->\n")
        _, calls = curve("--markdown", page)
        text = page.read_text()
        assert not calls and "old" not in text and "(figures/memory-some.svg)" in text, text
        table = [line for line in text.splitlines() if line.startswith("|")][2:]
        assert table[:2] == ["| auto | 10.0 | 1030.2 | 1020.0 | 1,941 | 1.59 |",
                             "| keep | 10.0 | 1030.2 | 1020.0 | 1,941 | 1.59 |"], table  # fmt: skip
        assert len(table) == 6 + 2 and "| recompute | 4.0 | 1636.2 | 1620.0 | 1,222 | 1.00 |" in table, table
        assert (top / "figures" / "memory-some.svg").read_text() == (out / "curve.svg").read_text()
        # A curve that was broken off: only what is missing is measured.
        text = (out / "curve.csv").read_text().splitlines(keepends=True)
        (out / "curve.csv").write_text("".join(line for line in text if not line.startswith("point,keep")))
        _, calls = curve()
        assert [call for call in calls if call.startswith("run")] == ["run offload 3.0", "run keep 10.0"], calls
        command = [sys.executable, CURVE, config, out, "--train", train, "--steps", "6", "--policies", "offload"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "the last run said: error: no more memory" in done.stderr, done.stderr
        other = top / "else.json"
        other.write_text("{}")
        for what, command in (("--set: none then, train.lr=1 now", [config, out, "--set", "train.lr=1"]),
                              (f"CONFIG: {config} then, {other} now", [other, out]),
                              ("--device: none then, cpu now", [config, out, "--device", "cpu"])):
            done = subprocess.run([sys.executable, CURVE, *command, "--train", train], capture_output=True, text=True)
            assert done.returncode == 1 and what in done.stderr and "another OUT" in done.stderr, done.stderr
        done = subprocess.run([sys.executable, CURVE, config, top / "other", "--train", "/bin/false"],
                              capture_output=True, text=True)
        assert done.returncode == 1 and "fix:" in done.stderr, done.stderr
        (top / "file").write_text("")
        (top / "cut").mkdir()
        (top / "cut" / "curve.csv").write_text("".join(text)[:-20])
        (top / "empty").mkdir()
        (top / "empty" / "curve.csv").write_text("")
        for what, *arguments in (("file", top / "file"), ("curve.csv", top / "cut"),
                                 ("curve.csv", top / "empty"), ("--budgets", out, "--budgets", "nan"),
                                 ("--limit", out, "--limit", "-1"), ("--steps", out, "--steps", "0"),
                                 ("measure first", top / "none", "--markdown", page), ("no place", out, "--markdown", train),
                                 ("nowhere", out, "--data", top / "nowhere"), ("nothing", out, "--train", top / "nothing")):
            command = [sys.executable, CURVE, config, arguments[0], "--train", train, *arguments[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode in (1, 2) and what in done.stderr and "Traceback" not in done.stderr, done.stderr
    print("curves: planned, measured, continued, refused")


if __name__ == "__main__":
    main()
