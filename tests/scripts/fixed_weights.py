#!/usr/bin/python3
"""Replaces the weights of a checkpoint, so that what is drawn with it does not depend on what was learned.

    tests/scripts/fixed_weights.py CKPT_FOLDER...

Every tensor of model.safetensors and ema.safetensors becomes normal numbers of its name and shape alone, matrices with
a deviation of .7 / sqrt(their last dimension) and the others about what they are at the start; the two files differ.
Checksums follow (XXH64, base/hash.h)."""
import json
import pathlib
import re
import sys
import zlib

import numpy as np

P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P4, P5, MASK = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, (1 << 64) - 1


def rotate(x, bits):
    return ((x << bits) | (x >> (64 - bits))) & MASK


def mix(acc, lane):
    return rotate((acc + lane * P2) & MASK, 31) * P1 & MASK


def xxh64(data):
    n, at = len(data), 0
    if n >= 32:
        acc = [(P1 + P2) & MASK, P2, 0, -P1 & MASK]
        lanes = np.frombuffer(data, "<u8", n // 32 * 4).reshape(-1, 4).tolist()
        for row in lanes:
            acc = [mix(a, lane) for a, lane in zip(acc, row)]
        h = sum(rotate(a, bits) for a, bits in zip(acc, (1, 7, 12, 18))) & MASK
        for a in acc:
            h = ((h ^ mix(0, a)) * P1 + P4) & MASK
        at = n // 32 * 32
    else:
        h = P5
    h = (h + n) & MASK
    while n - at >= 8:
        h = (rotate(h ^ mix(0, int.from_bytes(data[at : at + 8], "little")), 27) * P1 + P4) & MASK
        at += 8
    if n - at >= 4:
        h = (rotate(h ^ (int.from_bytes(data[at : at + 4], "little") * P1 & MASK), 23) * P2 + P3) & MASK
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ (byte * P5 & MASK), 11) * P1 & MASK
    h = (h ^ (h >> 33)) * P2 & MASK
    h = (h ^ (h >> 29)) * P3 & MASK
    return h ^ (h >> 32)


def values(name, shape, salt):
    rng = np.random.default_rng(zlib.crc32(f"{salt} {name}".encode()))
    x = rng.standard_normal(shape).astype(np.float32)
    if name == "embed.weight":
        return x
    if name.endswith("_norm"):
        return 1 + 0.3 * x
    if len(shape) == 1 or name in ("mod.base", "cond.kind"):
        return 0.3 * x
    return x * np.float32(0.7 / shape[-1] ** 0.5)


def replace(folder, spoil=False):
    """spoil: all of it NaN."""
    state = (folder / "state.json").read_text()
    for salt in ("model", "ema"):
        path = folder / f"{salt}.safetensors"
        if not path.exists():
            continue
        data = bytearray(path.read_bytes())
        base = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:base]).items():
            if name == "__metadata__":
                continue
            first, end = tensor["data_offsets"]
            new = values(name, tensor["shape"], salt) * np.float32("nan" if spoil else 1)
            data[base + first : base + end] = new.tobytes()
        path.write_bytes(data)
        entry = re.compile(rf'("{path.name}": *{{[^}}]*"xxh64": *")[0-9a-f]{{16}}')
        state, found = entry.subn(lambda m: f"{m[1]}{xxh64(bytes(data)):016x}", state)
        assert found == 1, state
    head, body = state.split("\n", 1)
    head, found = re.subn(r"[0-9a-f]{16}", f"{xxh64(body.encode()):016x}", head)
    assert found == 1, head
    (folder / "state.json").write_text(f"{head}\n{body}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        replace(pathlib.Path(name))
