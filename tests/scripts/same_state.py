#!/usr/bin/env python3
"""Whether two checkpoints hold the same parameters, EMA and Adam's moments, bit for bit, whatever number of processes
wrote them: of N each its share, in optimizer-RANKxN.safetensors.

    tests/scripts/same_state.py CKPT CKPT

Standard library alone, and nothing of the engine's reader. Exit code 1 with the first difference."""
import json
import re
import struct
import sys
from pathlib import Path


def tensors(path):
    """{name: (shape, bytes)} of a safetensors file."""
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    begin = 8 + header
    return {name: (t["shape"], data[begin + t["data_offsets"][0]:begin + t["data_offsets"][1]])
            for name, t in json.loads(data[8:begin]).items() if name != "__metadata__"}


def moments(folder):
    """{name: bytes} of all of the optimizer's files, pieces put together."""
    files = sorted(folder.glob("optimizer-*.safetensors"))
    shares = {re.fullmatch(r"optimizer-(\d+)x(\d+)\.safetensors", f.name).groups() for f in files}
    n = len(files)
    assert shares == {(str(rank), str(n)) for rank in range(n)} and n, f"{folder}: {[f.name for f in files]}"
    pieces = {}
    for file in files:
        for name, (shape, data) in tensors(file).items():
            whole, begin, end = re.fullmatch(r"([^\[]+)(?:\[(\d+):(\d+)\])?", name).groups()
            if begin:
                assert shape == [int(end) - int(begin)], f"{file}: {name} has the shape {shape}"
            pieces.setdefault(whole, []).append((int(begin or 0), int(end or len(data) // 4), data))
    whole = {}
    for name, parts in pieces.items():
        parts.sort()
        ends = [0] + [end for _, end, _ in parts]
        assert [begin for begin, _, _ in parts] == ends[:-1], f"{folder}: {name} has the pieces {ends}"
        whole[name] = b"".join(data for _, _, data in parts)
    return whole


def compare(a, b):
    for name in ("model.safetensors", "ema.safetensors"):
        x, y = tensors(a / name), tensors(b / name)
        assert x.keys() == y.keys(), f"{name}: other tensors"
        for key in x:
            assert x[key] == y[key], f"{name}: {key} differs"
    x, y = moments(a), moments(b)
    shapes = {key: data for key, (_, data) in tensors(a / "model.safetensors").items()}
    assert x.keys() == y.keys() == {f"{m}.{key}" for m in "mv" for key in shapes}, "other moments"
    for key in x:
        assert len(x[key]) == len(shapes[key[2:]]), f"{a}: {key} is not whole"
        assert x[key] == y[key], f"{key} differs"


if __name__ == "__main__":
    try:
        compare(Path(sys.argv[1]), Path(sys.argv[2]))
    except AssertionError as error:
        sys.exit(f"{sys.argv[1]}, {sys.argv[2]}: {error}")
