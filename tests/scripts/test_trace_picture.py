"""scripts/trace_picture.py draws traces with and without copies, says what hid under what, and refuses what is none."""
import json
import math
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from checks import check

import scaling

PICTURE = Path(__file__).resolve().parents[2] / "scripts" / "trace_picture.py"
SVG = "{http://www.w3.org/2000/svg}"
LANES = ["compute", "device to host", "host to device", "update", "between processes"]


def trace(slices):
    """slices: (lane, op, begin ms, end ms, bytes of a copy)."""
    end = max((s[3] for s in slices), default=0)
    events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "step 4, <cuda>"}}]
    events += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": n}} for i, n in enumerate(LANES)]
    events.append({"ph": "X", "pid": 1, "tid": 0, "name": "train first", "ts": 0, "dur": 1e3 * end, "args": {}})
    for lane, op, begin, last, carried in slices:
        args = {"tensor": "t", "bytes": carried} if carried else {"tensor": "t"}
        events.append({"ph": "X", "pid": 1, "tid": lane, "name": op, "ts": 1e3 * begin, "dur": 1e3 * (last - begin),
                       "args": args})
    return {"traceEvents": events}


OPS = [(0, "LINEAR_FWD", k, k + .99, 0) for k in range(40)] + [(0, "HEAD_CE", 42, 44, 0), (0, "ADAMW", 44, 50, 0)]
# 12 ms of copies down, of which 10 beside ops; the gap from 40 to 42 ms is what they hold up.
DOWN = [(1, "COPY", 30.0, 36.0, 3e8), (1, "COPY", 36.0, 42.0, 3e8)]
UP = [(2, "COPY", 42.0, 46.0, 2e8)]
BESIDE = [(3, "ADAMW", 0, 25, 0)]  # of the step before
BETWEEN = [(4, "ALL_GATHER", 38, 42, 8e8)]  # half of it while nothing is computed


def run(*arguments):
    return subprocess.run([sys.executable, PICTURE, *map(str, arguments)], capture_output=True, text=True)


def rectangles(path):
    root = xml.fromstring(path.read_text())
    width, height = float(root.get("width")), float(root.get("height"))
    found = []
    for e in root.iter(f"{SVG}rect"):
        if e.get("x"):
            x, y, w, h = (float(e.get(k)) for k in ("x", "y", "width", "height"))
            assert 0 <= x and x + w <= width + .2 and 0 <= y and y + h <= height, (x, y, w, h)
            found.append((x, y, w, e.get("fill")))
    return found, [e.text for e in root.iter(f"{SVG}text")]


def main():
    with tempfile.TemporaryDirectory() as top:
        file, out = Path(top) / "step.json", Path(top) / "step.svg"
        file.write_text(json.dumps(trace(OPS + DOWN + UP + BESIDE)))
        done = run(file)
        assert done.returncode == 0, done.stderr
        # 0.6 GB in 12 ms; of those 12, the gap of 2.01 ms is no work, those of .01 ms are pauses between ops.
        assert "device to host: 2 copies, 0.6 GB in 12 ms of copying, 50 GB/s\n" in done.stdout, done.stdout
        assert "host to device: 1 copies, 0.2 GB in 4 ms of copying, 50 GB/s\n" in done.stdout, done.stdout
        hidden = re.search(r"transfers hidden: device to host ([\d.]+)%, host to device 100.0%; ([\d.]+) ms", done.stdout)
        assert math.isclose(float(hidden[1]), 100 * (12 - 2.01) / 12, abs_tol=.06), done.stdout
        assert math.isclose(float(hidden[2]), 2.01, abs_tol=.006), done.stdout
        whole, texts = rectangles(out)
        assert all(lane in texts for lane in LANES[:-1]) and "step 4, <cuda>, 50.0 ms" in texts, texts
        assert hidden[0] in " ".join(texts), texts
        updates = sorted((r for r in whole if r[3] == "#666666" and r[2] != 12), key=lambda r: r[2])
        assert len(updates) == 2 and math.isclose(updates[1][2] / updates[0][2], 25 / 6, rel_tol=.01), updates
        copies = [r for r in whole if r[3] == "#56b4e9" and r[2] != 12]  # 12: the legend's
        assert len(copies) == 2, copies  # the two down touch
        assert math.isclose(copies[0][2] / copies[1][2], 3, rel_tol=.01), copies
        assert run(file, out, "--from", 40, "--to", 45).returncode == 0
        file.write_text(json.dumps(trace(OPS + BETWEEN)))
        said = scaling.exposed(file)  # as scripts/scaling.py reads it
        check(said == "between processes: 1 copies, 0.8 GB in 4 ms of copying, 200 GB/s; 2.01 ms with no op beside them", said)
        part, _ = rectangles(out)
        copies = [r for r in part if r[3] == "#56b4e9" and r[2] != 12]
        assert math.isclose(copies[0][2] / copies[1][2], 2 / 3, rel_tol=.01), copies
        file.write_text(json.dumps(trace(OPS)))
        done = run(file, out)
        assert done.returncode == 0 and "device to host: nothing" in done.stdout and "no transfers" in done.stdout
        assert "host to device" not in rectangles(out)[1]
        for text, arguments, says in (("{", (), "is no trace"), (json.dumps(trace([])), (), "holds no op"),
                                      ('{"traceEvents": [1]}', (), "is no trace"), ('{"traceEvents": 5}', (), "is no trace"),
                                      ('{"traceEvents": [{"ph": "X", "name": "a"}]}', (), "is no trace"),
                                      (json.dumps(trace(OPS)), ("--to", "nan"), "nothing lies between"),
                                      (json.dumps(trace(OPS)), (Path(top) / "no" / "x.svg",), "cannot write"),
                                      (json.dumps(trace(OPS)), ("--from", 60), "nothing lies between")):
            file.write_text(text)
            done = run(file, *arguments)
            assert done.returncode == 1 and says in done.stderr and "fix:" in done.stderr, done.stderr
    print("traces drawn: with copies, a part, without copies; eight refused")


main()
