"""Runs of ./train that are timed: what the scripts which compare them share. A run is killed once it has done enough
steps, before it writes a checkpoint, which would take longer than all of them."""
import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import run_metrics

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["checkpoint.every=0", "eval.every=0", "eval.samples=0"]  # nothing but steps


def config_read(path):
    """A config as written: no defaults. Comments are those of the project's own configs, from // to the line's end."""
    return json.loads("\n".join(line.split("//")[0] for line in Path(path).read_text().splitlines()))


def make_file(path, script, *arguments):
    """Runs a script that makes `path`, unless it is there. None, or what went wrong."""
    said = None
    for python in dict.fromkeys([sys.executable, "/usr/bin/python3"]):  # whichever has numpy
        if path.exists():
            return None
        done = subprocess.run([python, str(ROOT / "scripts" / script), *arguments], capture_output=True, text=True)
        said = done.stderr.strip() if done.returncode else None
    return said


def bench_data(folder, pixels):
    """Makes the data set of scripts/make_bench_data.py in `folder`. None, or what went wrong."""
    arguments = [str(folder), "--size", str(pixels), "--samples", "1000"]
    return make_file(folder / "bench.tar", "make_bench_data.py", *arguments)


def config_data(config, data, folder):
    """KEY=VALUE for the data of a run: of the folder `data` where it is given, else what the config names, which for
    the demo is drawn, else a data set made in `folder`. (KEY=VALUEs, None or what went wrong)."""
    sources = config["data"].get("sources")
    if data or not sources:
        pixels = config["data"]["image_size"]
        folder = data or folder / f"data-{pixels}"
        return bench_sets(folder), bench_data(folder, pixels)
    drawn = ".cache/shapes/shapes.tar"
    if any(isinstance(source, dict) and source.get("path") == drawn for source in sources):
        return [], make_file(ROOT / drawn, "make_shapes.py", str(ROOT / drawn))
    return [], None


def bench_sets(folder):
    """KEY=VALUE that make a config read such a folder."""
    sources = [{"type": "webdataset", "path": str(folder / "bench.tar")}]
    return [f"data.sources={json.dumps(sources)}", f"data.tokenizer={folder / 'bench.bpe'}",
            "data.max_caption=96", "data.cfg_drop=0", "data.threads=8", "data.cache_mb=1024"]


class Plan:
    """What --plan says. fits: whether there is a plan; needed_gb: a budget of which it is enough; slots of a step
    and of a micro-batch; predicted_ms: None where a device's time cannot be told; hidden: of the passes' copies, a share, None without any;
    text: all of it, or the error."""

    def __init__(self, command):
        done = subprocess.run([*command, "--plan"], cwd=ROOT, capture_output=True, text=True)
        self.fits, self.text = done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr.strip()
        total = re.search(r"^ +total +(\d+) bytes", done.stdout, re.M)
        slots = re.search(r"slots (\d+),.* micro-batches (\d+)", done.stdout)
        step = re.search(r"a step: predicted ([\d.]+) ms", done.stdout)
        hidden = re.search(r"copies of the passes: [^;]* ([\d.]+)% hidden", done.stdout)
        if self.fits and not (total and slots):
            raise ValueError("--plan says nothing of a total")
        if self.fits:
            self.needed_gb = math.ceil(int(total[1]) / 1e6) / 1e3
            self.slots, self.micro_slots = int(slots[1]) * int(slots[2]), int(slots[1])
            self.predicted_ms = step and step[1]
            self.hidden = hidden and f"{float(hidden[1]) / 100:.3f}"


def clear_run(run):
    """Of a run before, only its costs are of use."""
    for path in run.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "costs.json":
            path.unlink()


def has_gpu():
    return Path("/dev/nvidiactl").exists()


def gpus():
    """How many there are, as nvidia-smi says it."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return len(re.findall(r"^GPU ", listed, re.M))


def gpu_memory():
    """What is used of all GPUs that a run may see, as nvidia-smi says it; None without it."""
    if not (has_gpu() and shutil.which("nvidia-smi")):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["--id", seen]  # others may be at work on the rest
    done = subprocess.run(command, capture_output=True, text=True)
    return sum(map(int, done.stdout.split())) if done.returncode == 0 else None


def wait_for_memory(before):
    """A killed process's device memory may be freed after its end: the next run must not see that happen."""
    if before is None:
        time.sleep(0.5 if has_gpu() else 0)
        return
    end = time.time() + 3
    while (gpu_memory() or 0) > before and time.time() < end:
        time.sleep(0.05)


def run_steps(command, run, log, enough, limit):
    """Runs `command`, whose run folder is `run`, until enough(step lines) or for `limit` seconds. Returns the step
    lines and what the run said, which goes to the file `log`."""
    clear_run(run)
    began, before = time.time(), gpu_memory()
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the run, too
        try:
            while process.poll() is None and not enough(run_metrics.steps(run)) and time.time() - began < limit:
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
            signal.signal(signal.SIGTERM, handler)
    wait_for_memory(before)
    return run_metrics.steps(run), log.read_text(errors="replace")


def mean_step(lines, every, more=0.0):
    """Seconds of a step: the medians of those with the EMA's update, each `every`th, and of those without, as they take
    turns. `more`: what the EMA should add, where none of the lines has it."""
    ema = [line["seconds"] for line in lines if every > 1 and (line["step"] + 1) % every == 0]
    plain = [line["seconds"] for line in lines if every == 1 or (line["step"] + 1) % every]
    if not plain:
        return statistics.median(ema)
    added = statistics.median(ema) - statistics.median(plain) if ema else more
    return statistics.median(plain) + added / every


def last_line(said):
    """What a run that failed said of that: its error, behind which may be a hint, or else its last words."""
    lines = said.strip().splitlines() or ["no output"]
    return ([line for line in lines if line.startswith("error: ")] or lines)[-1][:200]


def device_memory(said):
    """(planned, in use) in GB as the log has them, or None."""
    found = re.findall(r"device memory: planned ([\d.]+) GB, in use ([\d.]+) GB", said)
    return found[-1] if found else None


def table_read(path, columns):
    """Rows of a CSV that has these columns; None where it has others, or a row has more."""
    with open(path, newline="", errors="replace") as f:
        table = csv.DictReader(f)
        names, rows = table.fieldnames, list(table)  # of an empty file none
    return None if names != columns or any(None in row.values() for row in rows) else rows


def table_append(path, columns, row):
    new = not path.exists()
    with open(path, "a", newline="") as f:
        out = csv.DictWriter(f, columns)
        if new:
            out.writeheader()
        out.writerow(row)


def check_settings(fail, table, settings):
    """Holds {name: value} of all that a measurement depends on, and its row does not say, against those that the rows
    of the CSV `table` were measured with: a JSON file beside it, written while there is none. Ends a script by
    fail(text, fix) where they differ."""
    path = table.with_suffix(".settings.json")
    if not (table.exists() and path.exists()):
        path.write_text(json.dumps(settings, indent=1) + "\n")
        return
    said = lambda value: "none" if value in (None, []) else " ".join(value) if isinstance(value, list) else value
    try:
        before = json.loads(path.read_text())
        changed = [name for name in settings if before[name] != settings[name]]
        differ = "; ".join(f"{n}: {said(before[n])} then, {said(settings[n])} now" for n in changed)
    except (ValueError, KeyError, TypeError):
        differ = f"{path} is not whole"
    if differ:
        fail(f"{table} was measured with other settings: {differ}", "name another OUT, or give the same settings")


def end_quietly(main):
    """Ctrl-C ends a script by its exit code alone: what it had measured is kept."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


def dump_step(fail, command, folder):
    """Has a command of ./train write a step to `folder`."""
    done = subprocess.run([*command, "--dump", str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(f"./train --dump failed: {done.stderr.strip()}", "see what ./train CONFIG says")


def end_without_torch(doc, error):
    """Ends a script that could not import PyTorch; its help is shown all the same."""
    if {"-h", "--help"} & {*sys.argv}:
        print(doc)
    print(f"skipped: {error} (of {sys.executable})\n  fix: call it with a Python that has PyTorch")
    sys.exit(77)


def check_paths(fail, out, files=()):
    """Ends a script by fail(text, fix) where one of `files`, (path, fix)s, is not there, or there can be no folder
    `out`."""
    for path, fix in files:
        if not path.is_file():
            fail(f"there is no {path}", fix)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"{out}: {e.strerror}", "OUT is a folder, which need not be there yet")


def positive(text):
    """For argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
