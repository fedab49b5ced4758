#!/usr/bin/python3
"""What a checkpoint costs: how long training stands still, until when it is on the disk, host memory, and how fast a run
is resumed from it, beside the rates of the disk.

    tests/scripts/bench_checkpoint.py BUILD CONFIG FOLDER [--after 100] [--layers N] [--set KEY=VALUE ...]

A run of CONFIG on random captioned images is killed once its first checkpoint, that of step --after, is on the disk, and
resumed from there until it has done a step. FOLDER, which is made and removed again, needs room for one checkpoint and
8 GB; --layers makes it smaller. Nothing of the checkpoint is in memory any more when it is read.
"""
import argparse
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHUNK, DISK_GB = 16 << 20, 8


def peak_gb(pid):
    """Peak resident memory, and anonymous memory now: without what is mapped or shared with a device."""
    status = Path(f"/proc/{pid}/status").read_text()
    return [int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / 1e9 for name in ("VmHWM", "RssAnon")]


def watch(command, until):
    """Runs a command until a line of its log matches; its log, that line's time from the start, its memory then."""
    began, lines, seen = time.monotonic(), [], {}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        lines.append(line)
        for name, pattern in until.items():
            if name not in seen and re.search(pattern, line):
                seen[name] = (time.monotonic() - began, *peak_gb(process.pid))
        if len(seen) == len(until):
            process.kill()
            break
    process.wait()
    if len(seen) < len(until):
        sys.exit(f"{command}\nended without {set(until) - set(seen)}:\n{''.join(lines[-15:])}")
    return "".join(lines), seen


def forget(path):
    """Takes a file's pages out of memory."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def direct(flags):
    return flags | getattr(os, "O_DIRECT", 0)


def disk_rates(path, readers=8):
    """GB/s of writing zeros front to back, flushed, and of reading them by several threads, past the page cache where
    the file system allows it."""
    size = DISK_GB << 30

    def open_direct(flags):
        try:
            return os.open(path, direct(flags), 0o600)
        except OSError:
            return os.open(path, flags, 0o600)

    buffers = [mmap.mmap(-1, CHUNK) for _ in range(readers)]
    fd, began = open_direct(os.O_WRONLY | os.O_CREAT), time.monotonic()
    for _ in range(size // CHUNK):
        os.write(fd, buffers[0])
    os.fsync(fd)
    written = size / 1e9 / (time.monotonic() - began)
    os.close(fd)
    forget(path)
    fd = open_direct(os.O_RDONLY)

    def read(k):
        for at in range(k * CHUNK, size, readers * CHUNK):
            os.preadv(fd, [buffers[k]], at)

    began = time.monotonic()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(readers)))
    rate = size / 1e9 / (time.monotonic() - began)
    os.close(fd)
    path.unlink()
    return written, rate


def step_ms(log):
    return [(int(step), float(ms)) for step, ms in re.findall(r"^step +(\d+) .* (\d+) ms \(data", log, re.M)]


def middle(values):
    return sorted(values)[len(values) // 2] if values else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--after", type=int, default=100)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    folder, run = options.folder.resolve(), options.folder.resolve() / "run"
    folder.mkdir(parents=True)
    try:
        sizes = json.loads("\n".join(line.split("//")[0] for line in open(options.config)))
        side = sizes["data"]["image_size"]
        subprocess.run([sys.executable, ROOT / "scripts/make_bench_data.py", folder, "--size", str(side), "--samples",
                        "500"], check=True, stdout=subprocess.DEVNULL)
        sets = [f"data.sources=[{{\"type\":\"webdataset\",\"path\":\"{folder}/bench.tar\"}}]", "checkpoint.keep_last=1",
                f"data.tokenizer={folder}/bench.bpe", "train.steps=1000000", "eval.every=0", "data.held_out_by=key",
                "data.held_out=0", "data.cache_mb=1024",
                f"checkpoint.every={options.after}", *([f"model.layers={options.layers}"] if options.layers else []),
                *options.set]
        command = [options.build.resolve() / "train", options.config.resolve(), "--run-dir", run, "--resume"]
        command += [part for text in sets for part in ("--set", text)]
        written, read = disk_rates(folder / "disk")
        print(f"disk: writes {written:.2f} GB/s, reads {read:.2f} GB/s (8 threads)", flush=True)

        log, seen = watch(command, {"first": r"^step +1 ", "saved": r"^checkpoint of step "})
        print(re.search(r"^checkpoint of step .*$", log, re.M)[0])
        steps = step_ms(log)
        before = middle([ms for step, ms in steps if options.after // 2 < step <= options.after])
        beside = middle([ms for step, ms in steps if step > options.after + 1])
        print(f"a step takes {before:.0f} ms before it, {beside:.0f} ms while it is written; the first was done after "
              f"{seen['first'][0]:.1f} s; host memory: peak {seen['saved'][1]:.2f} GB")

        saved = run / f"ckpt-{options.after}"
        gb = sum(path.stat().st_size for path in saved.glob("*.safetensors")) / 1e9
        for path in saved.glob("*.safetensors"):
            forget(path)
        log, seen = watch(command, {"loaded": r"^loaded ", "step": r"^step "})
        loaded = re.search(r"^loaded .* in ([\d.]+) s$", log, re.M)
        rate = f"{loaded[1]} s, {gb / float(loaded[1]):.2f} GB/s, {gb / float(loaded[1]) / read:.0%} of the disk's rate" \
            if loaded else "less than a second"
        print(f"resume: {gb:.1f} GB read in {rate}; host memory then: {seen['loaded'][2]:.2f} GB (with all that is "
              f"mapped: peak {seen['loaded'][1]:.2f}); first step done after {seen['step'][0]:.1f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
