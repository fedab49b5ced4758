"""Runs of the program for tests/scripts/test_keys.py: a set of pictures, a tiny model, short runs, and what they leave: rows of
metrics, tensors of checkpoints and dumps, packs, drawings. A run of the same settings is made once."""
import contextlib
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

import fixed_weights
from checks import run_metrics

BUILD = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build").resolve()
TRAIN = BUILD / "train"
WORK = pathlib.Path(tempfile.mkdtemp())
BOS, IMAGES, PIXELS = 256, 31, 16
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of the ids from 0 on, GPT-2's order; then the rest
BYTES += [b for b in range(256) if b not in BYTES]
FAMILIES = (1, 2, 4, 8, 16)  # images of each, so that a count of whole families says which

# ---- data ----


def png(path, pixels):
    """RGB8 [height, width, 3]."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def family_of(i):
    return [f for f, n in enumerate(FAMILIES) for _ in range(n)][i]


def make_folder(name, wide=(), what="picture"):
    """IMAGES pictures, left half dark and right half light; those in `wide` are twice as wide as high."""
    folder = WORK / name
    folder.mkdir()
    lines = []
    for i in range(IMAGES):
        width = 2 * PIXELS if i in wide else PIXELS
        picture = np.full((PIXELS, width, 3), 30 + i)
        picture[:, width // 2 :] = 200 + i
        png(folder / f"{i}.png", picture)
        caption = f"{'ABCDE'[family_of(i)]}{i:02} is the name of this {what}"
        lines.append(json.dumps({"file": f"{i}.png", "caption": caption, "family": "ABCDE"[family_of(i)]}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def source(kind, name):
    return [{"type": kind, "path": str(WORK / name)}]


PICTURES = {"data.sources": source("folder", "pictures")}
WIDE = {"data.sources": source("folder", "wide")}  # the last 16 are twice as wide as high
BROKEN = {"data.sources": source("folder", "broken")}  # five cannot be decoded
LONG = {"data.sources": source("text", "long.txt")}  # one text of 1000 bytes


def make_data():
    make_folder("pictures")
    make_folder("strangers", what="stranger")
    make_folder("wide", wide=range(IMAGES - 16, IMAGES))
    broken = make_folder("broken")
    for i in range(5):
        (broken / f"{i}.png").write_bytes((broken / f"{i}.png").read_bytes()[:60])
    (WORK / "long.txt").write_text("".join(chr(97 + i * i % 26) for i in range(1000)) + "\n")


# ---- running ----

BASE = {
    "run.device": "cpu",
    "model.dim": 16,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 8,
    "model.cond_dim": 8,
    "model.patch": 4,
    "model.vocab": 300,
    "model.text.experts": 3,
    "model.text.expert_dim": 8,
    "model.image.experts": 3,
    "model.image.expert_dim": 8,
    "data.micro_batch_tokens": 256,
    "data.image_size": PIXELS,
    "data.tokenizer": "bytes",
    "data.held_out": 0,
    "train.steps": 1,
    "train.warmup_steps": 0,
    "train.decay_fraction": 0,
    "train.lr": 0.01,
    "eval.every": 0,
    "eval.samples": 0,
    "eval.documents": 0,
    "checkpoint.every": 0,
}
tried = {}  # key: values it was set to
cache = {}


def text_of(value):
    return value if isinstance(value, str) else json.dumps(value)


def start(sets, flags=(), where=None, **options):
    """A process of the program, with BASE and `sets`."""
    config = {**PICTURES, **BASE, **sets}
    for key, value in sets.items():
        tried.setdefault(key, []).append(value)
    where = where or tempfile.mkdtemp(dir=WORK)
    (pathlib.Path(where) / "c.json").write_text("{}")
    if "run.folder" not in config and "run.dir" not in config:
        config["run.folder"] = f"{where}/run"
    command = [TRAIN, f"{where}/c.json", *flags]
    for key, value in config.items():
        command += ["--set", f"{key}={text_of(value)}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=where, **options)
    process.where = pathlib.Path(where)
    return process


class Run:
    """What a finished run left."""

    def __init__(self, process, rc):
        self.out, self.log = process.communicate(timeout=300)
        self.rc, self.where = process.returncode, process.where
        assert rc is None or self.rc == rc, f"exit code {self.rc}, expected {rc}:\n{self.log[-2000:]}"
        self.folder = self.where / "run"
        self.rows = run_metrics.steps(self.folder)
        self.evals = {line["step"]: line["eval"] for line in run_metrics.evaluations(self.folder)}
        self.loads = [line["load"] for line in run_metrics.lines(self.folder) if "load" in line]

    def tensors(self, name, step=None):
        """{name: array} of a file of tensors: of a dump, or of a checkpoint."""
        folder = self.where / "dump" if step is None else self.folder / f"ckpt-{step}"
        (path,) = glob.glob(f"{folder}/{name}.safetensors")
        data = pathlib.Path(path).read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        kinds = {"F32": "<f4", "I32": "<i4", "U8": "u1", "I64": "<i8"}
        return {
            key: np.frombuffer(data[base + t["data_offsets"][0] : base + t["data_offsets"][1]], kinds[t["dtype"]])
            .reshape(t["shape"])
            .astype(np.float64 if t["dtype"] == "F32" else np.int64)
            for key, t in json.loads(data[8:base]).items()
            if key != "__metadata__"
        }

    def moments(self, step):
        """First and second moments of all parameters, one after the other."""
        t = self.tensors("optimizer*", step)
        pick = lambda letter: np.concatenate([v.ravel() for k, v in sorted(t.items()) if k.split(".")[0] == letter])
        return pick("m"), pick("v")


def run(sets={}, *flags, rc=0, **options):
    key = (json.dumps(sets, sort_keys=True), flags)
    if options or key not in cache:
        cache[key] = Run(start(sets, flags, **options), rc)
    for name, value in sets.items():
        tried.setdefault(name, []).append(value)
    return cache[key]


class Dump(Run):
    """One dumped step: packs, params, grads, losses."""

    def __init__(self, sets, rc=0):
        where = tempfile.mkdtemp(dir=WORK)
        super().__init__(start(sets, ("--dump", f"{where}/dump"), where), rc)
        self.params, self.grads = self.tensors("params"), self.tensors("grads")
        self.losses = json.loads((self.where / "dump/losses.json").read_text())
        self.packs = [self.tensors(f"micro_{k}") for k in range(len(list((self.where / "dump").glob("micro_*"))))]

    def texts(self):
        """The documents' bytes of all packs, specials as "|"."""
        documents = []
        for p in self.packs:
            for first in sorted(set(p["doc_start"].tolist())):
                rows = [p["row"][q] for q in np.flatnonzero(p["doc_start"] == first)]
                ids = [p["token"][r] for r in sorted(rows) if r < p["dims"][0]]
                documents.append("".join(chr(BYTES[i]) if i < BOS else "|" for i in ids))
        return documents

    def images(self):
        """(kind, time, caption length, patches [n, 3p^2]) of every image."""
        found = []
        for p in self.packs:
            for g in range(1, p["dims"][2]):
                at = p["seg_start"][g] - p["dims"][0]
                patches = p["patch"][at : at + p["seg_len"][g]]
                found.append((p["seg_kind"][g], p["seg_time"][g], p["cap_end"][g] - p["cap_start"][g], patches))
        return found


def dump(sets={}):
    key = json.dumps(sets, sort_keys=True)
    if ("dump", key) not in cache:
        cache["dump", key] = Dump(sets)
    for name, value in sets.items():
        tried.setdefault(name, []).append(value)
    return cache["dump", key]


def plan(sets={}, rc=0):
    r = run(sets, "--plan", rc=rc)
    return r.out + r.log


def shape(sets, name):
    return dump(sets).params[name].shape


def planned(sets, label):
    """MB in a row of the memory table, kept, recomputed, offloaded."""
    row = re.search(rf"^ *{label} +(.*)$", plan(sets), re.M)[1]
    return [0 if v == "-" else float(v[:-3]) for v in re.findall(r"[0-9.]+ MB|-(?= |$)", row)]


def tasks(process):
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{process.pid}/task"))
    return 0


def memory_of(field):
    """A look at a process: bytes of VmRSS or VmSize."""
    return lambda process: 1024 * int(re.search(rf"{field}:\s+(\d+)", open(f"/proc/{process.pid}/status").read())[1])


def while_running(sets, look):
    """look(process) once steps are being made; the run is stopped then."""
    process = start({"train.steps": 1000000, **sets})
    try:
        metrics = process.where / "run/metrics.jsonl"
        until = time.time() + 60
        while time.time() < until and process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
        return look(process)
    finally:
        process.kill()
        process.communicate()


drawn = 0


def drawing(sets):
    """The pixels' file of a drawing with fixed weights."""
    return asked(sets, "--sample", "some words")


def description(sets, seed=1):
    return asked(sets, "--describe", WORK / "pictures/3.png", "--seed", str(seed))


def asked(sets, *flags):
    """What a trained run draws or says, its weights fixed ones."""
    global drawn
    drawn += 1
    if "fixed" not in cache:
        cache["fixed"] = run({"train.ema": 0}, where=tempfile.mkdtemp(dir=WORK)).folder
        fixed_weights.replace(cache["fixed"] / "ckpt-1")
    command = [TRAIN, cache["fixed"], *flags]
    out = WORK / f"drawn-{drawn}.png"
    if flags[0] == "--sample":
        command += ["--out", out]
    for key, value in sets.items():
        tried.setdefault(key, []).append(value)
        command += ["--set", f"{key}={text_of(value)}"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return out.read_bytes() if flags[0] == "--sample" else done.stdout


def close(a, b, tolerance=1e-4):
    assert abs(a - b) <= tolerance * max(abs(a), abs(b)), f"{a} is not {b}"


def norm(x):
    return float(np.sqrt(np.square(x).sum()))
